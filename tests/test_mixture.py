import math

import pytest
import torch
from torch.testing import assert_close

from ddo_cli.diffusion.mixture import GaussianMixture, toy2d


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_one_component_is_the_normal_density_with_noise_added_to_its_covariance():
    mean, cov = torch.tensor([[1.0, -2.0]]), torch.tensor([[[2.0, 0.5], [0.5, 1.0]]])
    x = torch.randn(7, 2, generator=generator(), dtype=torch.float64)
    noised = cov[0].double() + 0.3**2 * torch.eye(2)
    expected = torch.distributions.MultivariateNormal(mean[0].double(), noised).log_prob(x)
    assert_close(GaussianMixture(mean, cov).log_prob(x, 0.3), expected)


def test_log_prob_agrees_with_a_plain_loop_over_isotropic_components():
    means, stds, weights = (
        torch.randn(3, 4, generator=generator()),
        torch.tensor([0.2, 0.5, 1.0]),
        torch.tensor([1, 2, 5]),
    )
    x = torch.randn(5, 4, generator=generator(1), dtype=torch.float64)
    total = torch.zeros(5, dtype=torch.float64)
    for mean, std, weight in zip(means, stds, weights, strict=True):
        normal = torch.distributions.Normal(mean.double(), std.double())
        total += weight / 8 * normal.log_prob(x).sum(1).exp()
    assert_close(GaussianMixture(means, stds, weights).log_prob(x), total.log())


@pytest.mark.parametrize("sigma", [0.0, 0.1, 3.0])
def test_score_is_the_gradient_of_log_prob(sigma):
    mixture = toy2d()
    x = torch.randn(20, 2, generator=generator(), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x, sigma).sum(), x)
    assert_close(mixture.score(x.detach(), sigma), gradient)


def test_denoise_is_the_posterior_mean_found_by_integration():
    mixture, sigma = toy2d(), 0.2
    steps = torch.linspace(-2, 2, 400, dtype=torch.float64)
    x0 = torch.cartesian_prod(steps, steps)
    x = torch.tensor([[0.3, 0.1], [-0.6, -0.4]], dtype=torch.float64)
    for row, denoised in zip(x, mixture.denoise(x, sigma), strict=True):
        posterior = (mixture.log_prob(x0) - (row - x0).square().sum(1) / (2 * sigma**2)).softmax(0)
        assert_close(denoised, posterior @ x0, rtol=0, atol=1e-6)  # the sum's error at this spacing


def test_sigma_may_differ_by_row():
    mixture, x = toy2d(), torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.5, 20.0])
    for name in ("log_prob", "score", "denoise"):
        rows = [getattr(mixture, name)(x[i : i + 1], float(sigma[i])) for i in range(3)]
        assert_close(getattr(mixture, name)(x, sigma), torch.cat(rows))


def test_samples_have_the_mixtures_moments():
    mixture, n = toy2d(), 40_000
    x = mixture.sample(n, generator())
    # 5 standard errors of a mean, and as many of a variance of bounded kurtosis: false alarms below 1e-5.
    assert_close(x.mean(0), mixture.mean(), rtol=0, atol=5 * 0.55 / math.sqrt(n))
    assert_close(x.T.cov(), mixture.cov(), rtol=0, atol=5 * 0.5 / math.sqrt(n))


def test_toy2d_is_centred_with_the_deviation_that_sigma_data_expects():
    mixture = toy2d()
    assert_close(mixture.mean(), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(mixture.cov().trace() / 2, torch.tensor(0.25, dtype=torch.float64))


@pytest.mark.parametrize(
    ("covs", "weights"),
    [
        (torch.zeros(2), None),
        (torch.ones(3), None),
        (torch.ones(2), torch.tensor([1.0, 0.0])),
        (-torch.eye(2)[None], None),
    ],
)
def test_bad_components_are_refused(covs, weights):
    with pytest.raises(ValueError, match=r"covs|positive"):
        GaussianMixture(torch.zeros(2, 2), covs, weights)
