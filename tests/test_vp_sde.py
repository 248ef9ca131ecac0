"""The VP time of a noise level, against tables computed with Discriminator Guidance's official modules."""

import math

import pytest
import torch
from torch.testing import assert_close

from ddo_cli.diffusion import vp_sde

HALF_A_DIGIT = 6e-10  # the tables are printed with nine decimals

# sigma, tau(sigma), m(tau), cosine time of tau
LEVELS = [
    (80, 0.933511143, 0.012499024, 0.991979632),
    (50, 0.881767819, 0.019996001, 0.987168454),
    (10, 0.676044959, 0.099503719, 0.936046343),
    (5, 0.567226690, 0.196116135, 0.873338729),
    (1, 0.258960262, 0.707106781, 0.496049864),
    (0.5, 0.144813920, 0.894427191, 0.289628289),
    (0.1, 0.026994948, 0.995037190, 0.056455380),
    (0.05, 0.011593978, 0.998752339, 0.025041221),
    (0.02, 0.003064674, 0.999800060, 0.007121695),
    (0.002, 0.000039842, 0.999998000, 0.000102289),
]

# t, m(t), s(t), cosine time of t
TIMES = [
    (1e-5, 0.999999500, 0.001000497, 0.000025720),
    (0.01, 0.999002997, 0.044643155, 0.021752576),
    (0.1, 0.946721799, 0.322052536, 0.202562048),
    (0.25, 0.723657185, 0.690159604, 0.480851019),
    (0.5, 0.281182881, 0.959654202, 0.817109478),
    (0.75, 0.058663503, 0.998277814, 0.962336188),
    (1, 0.006571586, 0.999978407, 0.995783227),
]


def columns(table):
    return torch.tensor(table, dtype=torch.float64).unbind(1)


def midpoints(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_times_of_noise_levels():
    sigma, tau, m, cosine = columns(LEVELS)
    assert_close(vp_sde.time_of(sigma), tau, rtol=0, atol=HALF_A_DIGIT)
    assert_close(vp_sde.mean_scale(vp_sde.time_of(sigma)), m, rtol=0, atol=HALF_A_DIGIT)
    assert_close(vp_sde.scale_of(sigma), m, rtol=0, atol=HALF_A_DIGIT)
    assert_close(vp_sde.cosine_time_of(vp_sde.time_of(sigma)), cosine, rtol=0, atol=HALF_A_DIGIT)


def test_mean_deviation_and_cosine_time_of_times():
    t, m, s, cosine = columns(TIMES)
    assert_close(vp_sde.mean_scale(t), m, rtol=0, atol=HALF_A_DIGIT)
    assert_close(vp_sde.std(t), s, rtol=0, atol=HALF_A_DIGIT)
    assert_close(vp_sde.cosine_time_of(t), cosine, rtol=0, atol=HALF_A_DIGIT)


def test_noise_levels_of_times():
    t, sigma = columns([(0.01, 0.0446877), (0.5, 3.4129183), (1, 152.16697)])
    assert_close(vp_sde.sigma_of(t), sigma, rtol=1e-6, atol=0)  # printed with six digits or more


def test_time_and_noise_level_are_inverse():
    sigma = torch.logspace(-4, math.log10(152), 200, dtype=torch.float64)
    # Ten digits more than float32 holds near t = 0, where sigma^2 is the square of a small number.
    assert_close(vp_sde.sigma_of(vp_sde.time_of(sigma)), sigma, rtol=1e-12, atol=0)
    t = vp_sde.time_of(sigma)
    assert_close(vp_sde.std(t) / vp_sde.mean_scale(t), sigma, rtol=1e-12, atol=0)


def test_signal_and_noise_have_unit_power():
    t = torch.linspace(0, 1, 101)
    assert_close(vp_sde.mean_scale(t).square() + vp_sde.std(t).square(), torch.ones(101, dtype=torch.float64))


def test_the_ends_of_time():
    zero = torch.zeros((), dtype=torch.float64)
    assert vp_sde.time_of(zero) == vp_sde.sigma_of(zero) == vp_sde.std(zero) == 0
    assert vp_sde.mean_scale(zero) == 1
    assert abs(vp_sde.cosine_time_of(zero)) < 1e-12


def test_everything_is_float64_whatever_comes_in():
    t = torch.tensor([0.1, 0.6])  # float32
    functions = [vp_sde.mean_scale, vp_sde.std, vp_sde.sigma_of, vp_sde.time_of, vp_sde.scale_of, vp_sde.cosine_time_of]
    for function in [*functions, vp_sde.likelihood_weight, vp_sde.importance_sampled_time]:
        assert function(t).dtype == torch.float64
        assert function(t).shape == (2,)


def test_likelihood_weight_is_the_derivative_of_its_integral():
    t = torch.logspace(-4, -0.01, 50, dtype=torch.float64)
    h = 1e-5 * t
    slope = (vp_sde.likelihood_weight_integral(t + h) - vp_sde.likelihood_weight_integral(t - h)) / (2 * h)
    assert_close(slope, vp_sde.likelihood_weight(t), rtol=1e-7, atol=0)  # h^2 of curvature, and float64's rounding / h


def test_constants_of_the_importance_sampled_times():
    low, high = vp_sde.likelihood_weight_integral(torch.tensor([1e-5, 1.0], dtype=torch.float64)).tolist()
    assert vp_sde.T_MIN == 1e-5
    assert high == pytest.approx(10.0499568, abs=6e-8)  # eight digits are printed
    assert low == pytest.approx(-13.8145156, abs=6e-8)
    assert high - low == pytest.approx(23.8644724, abs=1e-7)


def test_importance_sampled_times():
    u, expected = columns(
        [
            (0.05, 3.29020e-5),
            (0.1, 1.077014e-4),
            (0.25, 0.00300470),
            (0.5, 0.11442145),
            (0.75, 0.63695614),
            (0.9, 0.87262766),
        ]
    )
    # Six digits are printed. The official float32 evaluation is off by 3e-4 to 1e-2 and must not pass.
    assert_close(vp_sde.importance_sampled_time(u), expected, rtol=2e-6, atol=0)
    ends = vp_sde.importance_sampled_time(torch.tensor([0.0, 1.0]))
    assert_close(ends, torch.tensor([1e-5, 1.0], dtype=torch.float64), rtol=1e-12, atol=0)


def test_law_of_the_importance_sampled_times():
    t = vp_sde.importance_sampled_time(midpoints(100_000))
    assert t.median().item() == pytest.approx(0.1144, abs=6e-5)
    assert t.mean().item() == pytest.approx(0.309, abs=6e-4)
    for limit, share in ((0.01, 0.318), (0.1, 0.489), (0.5, 1 - 0.318)):
        assert (t < limit).double().mean().item() == pytest.approx(share, abs=6e-4)  # three digits are printed


def test_a_mean_over_importance_sampled_times_is_the_weighted_mean_over_uniform_ones():
    def f(t):
        return torch.cos(3 * t) + t.square()

    drawn = f(vp_sde.importance_sampled_time(midpoints(100_000))).mean()
    # The weighted integral, in log t because lambda behaves as 1 / t.
    length = math.log(1 / vp_sde.T_MIN)
    t = vp_sde.T_MIN * torch.exp(length * midpoints(100_000))
    weighted = (vp_sde.likelihood_weight(t) * f(t) * t * length).mean()
    ends = vp_sde.likelihood_weight_integral(torch.tensor([vp_sde.T_MIN, 1.0], dtype=torch.float64))
    assert_close(drawn, weighted / (ends[1] - ends[0]), rtol=0, atol=1e-7)  # midpoint rule: (24 / 1e5)^2


def mean_of(law, function, n=200_000):
    """E[weight f(t)] by the midpoint rule in u."""
    times = law.times((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    weight = torch.ones(n, dtype=torch.float64) if times.weight is None else times.weight
    return (weight * function(times.t)).mean().item()


@pytest.mark.parametrize("name", ["uniform", "model"])
def test_weighted_laws_have_the_importance_sampled_objective(name):
    # t_min keeps the uniform law's weights within reach of the rule; p_std wide enough to cover both ends.
    law = vp_sde.TimeLaw(name, weighted=True, t_min=0.01, p_mean=0.5, p_std=3.0)
    importance = vp_sde.TimeLaw("importance", t_min=0.01)
    for function in (torch.ones_like, torch.sin, lambda t: (3 * t).exp()):
        assert mean_of(law, function) == pytest.approx(mean_of(importance, function), rel=2e-3)


def test_laws_without_weights():
    assert mean_of(vp_sde.TimeLaw("uniform", t_min=0.2), lambda t: t) == pytest.approx(0.6)
    model = vp_sde.TimeLaw("model", p_mean=-0.4, p_std=1.2)
    log_sigma = vp_sde.sigma_of(model.times(torch.linspace(0.01, 0.99, 99)).t).log()
    torch.testing.assert_close(log_sigma[49].item(), -0.4)  # the median
    assert (log_sigma.diff() > 0).all()
