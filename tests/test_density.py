import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ddo_cli.codec import Codec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.mixture import GaussianMixture, toy2d
from ddo_cli.errors import UsageError
from ddo_cli.metrics.density import DensityScorer
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

SPEC = SamplingRecipe()


class Known:
    """A model whose density is that of a mixture, as far as the scorer can see."""

    codec, num_classes = Codec((2,)), 0

    def __init__(self, mixture, scale=1.0):
        self.mixture, self.scale = mixture, scale

    def buffers(self):
        return iter(())

    def parameters(self):
        return iter(())

    def log_density(self, x, label, spec):
        assert (label == -1).all()
        return self.mixture.log_prob(x) + math.log(self.scale)


class Exact(DiffusionModel):
    """A diffusion model whose denoiser is the closed form of its data."""

    def __init__(self, mixture, dim):
        super().__init__(nn.Identity(), Codec((dim,)), 0, DiffusionOptions(), DiffusionDrawOptions())
        self.mixture = mixture

    def denoise(self, x, sigma, label):
        return self.mixture.denoise(x, sigma)


def normal(mean, std=0.3):
    return GaussianMixture(torch.tensor([mean]), torch.tensor([std]))


def no_label(x):
    return torch.full((len(x),), -1)


def test_a_model_equal_to_the_data_scores_zero():
    score = DensityScorer(toy2d()).score(Known(toy2d()), SPEC)
    assert list(score) == ["js", "forward_kl", "reverse_kl", "mass"]  # js first: it selects checkpoints
    assert_close(score, {"js": 0.0, "forward_kl": 0.0, "reverse_kl": 0.0, "mass": 1.0}, rtol=0, atol=1e-5)


def test_shifted_normals_have_the_closed_form_kl_in_both_directions():
    # KL = |shift|^2 / (2 std^2); the grid cuts the data at 7 deviations and the shifted model at 6.4.
    score = DensityScorer(normal([0.0, 0.0]), margin=7.0).score(Known(normal([0.15, 0.1])), SPEC)
    kl = (0.15**2 + 0.1**2) / (2 * 0.3**2)
    assert_close([score["forward_kl"], score["reverse_kl"]], [kl, kl], rtol=1e-6, atol=0)


def test_directions_of_the_kl_are_not_swapped():
    # Of centred normals in the plane, KL(std a || std b) = 2 log(b / a) + (a / b)^2 - 1.
    score = DensityScorer(normal([0.0, 0.0], 0.3), margin=7.0).score(Known(normal([0.0, 0.0], 0.2)), SPEC)
    assert_close(score["forward_kl"], 2 * math.log(2 / 3) + 9 / 4 - 1, rtol=1e-6, atol=0)
    assert_close(score["reverse_kl"], 2 * math.log(3 / 2) + 4 / 9 - 1, rtol=1e-6, atol=0)


def test_js_of_disjoint_densities_is_log_2():
    data = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.1, 0.1]), torch.tensor([1, 1e-12]))
    score = DensityScorer(data).score(Known(normal([2.0, 0.0], 0.1)), SPEC)
    assert_close(score["js"], math.log(2), rtol=1e-6, atol=0)


def test_the_density_is_renormalised_and_its_mass_reported():
    score = DensityScorer(toy2d()).score(Known(toy2d(), scale=0.9), SPEC)
    assert_close(score["mass"], 0.9, rtol=1e-5, atol=0)
    assert_close(score["js"], 0.0, rtol=0, atol=1e-6)


def test_pictures_have_the_data_where_its_points_are():
    _, p_data = DensityScorer(normal([1.0, -0.5], 0.1), size=51).score_and_densities(
        Known(normal([1.0, -0.5], 0.1)), SPEC
    )
    left, right, bottom, top = p_data.extent
    assert_close([left + right, bottom + top], [2.0, -1.0])
    _, shifted = DensityScorer(
        GaussianMixture(torch.tensor([[1.0, -0.5], [0.0, 0.0]]), torch.tensor([0.1, 0.1]), torch.tensor([9, 1])),
        size=51,
    ).score_and_densities(Known(normal([0.0, 0.0], 0.1)), SPEC)
    row, column = divmod(int(shifted.p_data.argmax()), 51)
    left, right, bottom, top = shifted.extent
    cell = (right - left) / 51
    assert_close([left + (column + 0.5) * cell, bottom + (row + 0.5) * cell], [1.0, -0.5], rtol=0, atol=cell)
    assert_close(float(shifted.p_model.sum()) * cell**2, 1.0)


def test_models_that_are_no_density_of_the_plane_are_refused():
    labelled = Known(toy2d())
    labelled.num_classes = 3
    with pytest.raises(UsageError, match="3 classes"):
        DensityScorer(toy2d()).score(labelled, SPEC)
    with pytest.raises(ValueError, match="2 dimensions"):
        DensityScorer(GaussianMixture(torch.zeros(1, 3), torch.ones(1)))
    with pytest.raises(ValueError, match="at least"):
        DensityScorer(toy2d(), size=20)


# ---------------------------------------------------------------------------------------------------------------------
# The densities of diffusion models (denoiser.py)


@pytest.mark.parametrize("dim", [1, 3])
def test_ode_density_of_a_normal_is_the_closed_form(dim):
    mixture = GaussianMixture(torch.full((1, dim), 0.1), torch.tensor([0.3]))
    x = mixture.sample(50, torch.Generator().manual_seed(0))
    # At sigma_max = 80 the noised data has mean 0.1 and the prior 0: log p moves by 0.1 / 80 sqrt(dim) per deviation.
    log_p = Exact(mixture, dim).log_density(x, no_label(x), SPEC)
    assert_close(log_p, mixture.log_prob(x, 0.002), rtol=0, atol=0.01)


def test_ode_density_of_the_toy_data_is_the_closed_form():
    mixture = toy2d()
    x = mixture.sample(500, torch.Generator().manual_seed(0))
    error = (Exact(mixture, 2).log_density(x, no_label(x), SPEC) - mixture.log_prob(x, 0.002)).abs()
    assert error.mean() < 1e-3


def test_ode_density_is_that_of_samples():
    """The mean of log p over a model's own samples is minus the entropy found on the grid."""
    torch.manual_seed(0)
    options = {"width": 8, "depth": 2}
    model = registry.build({"name": "mlp", "shape": [2], "num_classes": 0, "options": options, "draw": {}})
    nn.init.normal_(model.net.head.weight, std=0.3)
    spec = SamplingRecipe(steps=30, sigma_max=20.0)
    scorer = DensityScorer(normal([0.0, 0.0], 0.5), size=60, margin=8.0)
    extent, _, p_model, mass = scorer.score_and_densities(model, spec)[1]
    assert_close(mass, 1.0, rtol=0, atol=2e-3)
    cell = (extent[1] - extent[0]) / 60
    expected = float((p_model * torch.tensor(p_model).log().nan_to_num(neginf=0).numpy()).sum()) * cell**2
    label = torch.full((2000,), -1)
    with torch.inference_mode():  # the derivatives are taken all the same
        x = model.sample(label, RowRng(range(2000)), spec).x
        log_p = model.log_density(x, label, spec)
    # 5 standard errors
    assert_close(float(log_p.mean()), expected, rtol=0, atol=5 * float(log_p.std()) / math.sqrt(2000))


def test_churn_has_no_ode_density():
    x = torch.zeros(1, 2)
    with pytest.raises(UsageError, match="churn"):
        Exact(toy2d(), 2).log_density(x, no_label(x), SamplingRecipe(s_churn=1.0))
