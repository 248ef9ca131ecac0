"""Preconditioning: published values, and what makes D exact where F is."""

import pytest
import torch
from test_edm_unet import check, filled, stream
from torch.testing import assert_close

from ddo_cli.diffusion import precond, vp_sde
from ddo_cli.diffusion.precond import PRECONDITIONERS, Discrete, Vp, cosine_sigmas, edm_cosine_sigmas, linear_sigmas
from ddo_cli.models import registry
from ddo_cli.rng import RowRng

SMALL = {"channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "augment_dim": 0}
# What the official networks of these weights return: mean, deviation, first four and last two values.
VP_D = (-0.1622215, 17.60355, 1.43662, 0.0310011, 0.467995, -2.09627, -5.92678, 46.7128)
VE_D = (-1.96784, 17.08467, 1.4015, 1.01914, -0.239427, -1.33352, -16.9922, 21.7214)
IDDPM_D = (-0.4410163, 17.79997, 1.46015, -0.0384878, 0.392779, -2.03016, -3.64707, 46.9839)


@pytest.mark.parametrize(("name", "learned", "expected"), [("vp", 0, VP_D), ("ve", 0, VE_D), ("iddpm", 1, IDDPM_D)])
@torch.no_grad()
def test_denoisers_equal_the_official_ones(name, learned, expected):
    options = {**SMALL, "precond": name, "learned_variance": bool(learned)}
    model = filled(registry.build(registry.config_of("edm-unet", (3, 16, 16), 0, options, {})).eval(), 16)
    sigma = torch.tensor([0.5, 20.0])
    x = stream(2, 2, 3, 16, 16) * (1 + sigma)[:, None, None, None]
    check(model.denoise(x, sigma, torch.tensor([-1, -1])), expected)
    denoised, variance = model.evaluate(x, sigma, torch.tensor([-1, -1]))
    assert denoised.shape == x.shape
    assert (variance is None) != bool(learned)


def test_levels_of_the_cosine_schedule_in_edm_s_rounding():
    u = edm_cosine_sigmas()
    assert len(u) == 1000
    # As the published networks store them, float32.
    found = u[[999, 998, 997, 1, 0]]
    expected = torch.tensor([20291.171875, 641.66241, 320.83044, 0.0093477489, 0.0064223371])
    assert_close(found, expected, atol=0, rtol=2e-7)
    alpha_bar = 1 / (1 + u.double() ** 2)
    expected = torch.tensor([0.9999587158, 0.8470121613, 0.4938435904, 0.1442721024, 2.428766907e-9]).double()
    assert_close(alpha_bar[[0, 249, 499, 749, 999]], expected, atol=0, rtol=2e-4)


def test_levels_of_the_linear_schedule():
    alpha_bar = 1 / (1 + linear_sigmas() ** 2)
    expected = torch.tensor([0.9999, 0.9997800921, 0.5240853738, 0.07858724288, 0.003350550439, 4.035829765e-5])
    assert_close(alpha_bar[[0, 1, 249, 499, 749, 999]], expected.double(), atol=0, rtol=1e-7)
    # Half as many steps with twice the betas end about where the whole schedule does.
    assert_close(linear_sigmas(500)[-1], linear_sigmas()[-1], rtol=0.05, atol=0)


def test_levels_of_the_cosine_schedule():
    alpha_bar = 1 / (1 + cosine_sigmas() ** 2)
    expected = [0.9999587158, 0.9999125759, 0.8470121613, 0.4938435904, 0.1442721024, 2.428766907e-9]
    assert_close(alpha_bar[[0, 1, 249, 499, 749, 999]], torch.tensor(expected).double(), atol=0, rtol=1e-7)
    assert_close(edm_cosine_sigmas().double(), cosine_sigmas(), atol=0, rtol=1e-3)  # EDM's rounding of the lowest
    for num_steps in (50, 4000):
        levels = cosine_sigmas(num_steps)
        assert (len(levels), bool((levels.diff() > 0).all())) == (num_steps, True)


def test_steps_may_be_told_as_of_1000():
    sigmas = cosine_sigmas(4000)
    for rescaled, told in ((False, [0.0, 2001.0, 3999.0]), (True, [0.0, 500.25, 999.75])):
        known = Discrete(sigmas, rescaled=rescaled)
        assert known.coefficients(sigmas[[0, 2001, 3999]]).c_noise.tolist() == told


def test_nearest_step():
    iddpm = Discrete(edm_cosine_sigmas())
    sigma = torch.tensor([[0.3, 7.0]], dtype=torch.float64)
    assert iddpm.coefficients(sigma).c_noise.tolist() == [[178.0, 908.0]]
    found = iddpm.round_sigma(sigma)
    assert found.dtype == torch.float64
    assert_close(found, torch.tensor([[0.2997, 7.0039]], dtype=torch.float64), atol=5e-5, rtol=0)
    assert torch.equal(iddpm.round_sigma(found), found)


def test_range_of_the_vp_networks():
    assert (Vp().sigma_min, Vp().sigma_max) == (0.0009765625, 152.16697692871094)  # as the published networks store it
    sigma = torch.tensor([0.5, 80.0])
    assert_close(Vp().coefficients(sigma).c_noise, 999 * vp_sde.time_of(sigma).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_weight_is_one_over_c_out_squared(name):
    sigma = torch.tensor([0.02, 0.5, 30.0])
    found = PRECONDITIONERS[name](0.5)
    assert_close(found.weight(sigma) * found.coefficients(sigma).c_out ** 2, torch.ones(3))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_true_target_gives_the_clean_image(prediction):
    levels = Discrete(linear_sigmas(), prediction)
    sigma = levels.sigmas[[0, 500, 999]][:, None].double()
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    alpha_bar = 1 / (1 + sigma**2)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    c = levels.coefficients(sigma)
    x = x0 + sigma * eps
    assert_close(c.c_skip * x + c.c_out * {"eps": eps, "v": v, "x0": x0}[prediction], x0, rtol=1e-9, atol=1e-9)
    assert_close(c.c_in * x, alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps)


@pytest.mark.parametrize("levels", [[1.0], [2.0, 1.0], [0.0, 1.0], [[1.0, 2.0]], [1.0, float("inf")]])
def test_levels_must_increase(levels):
    with pytest.raises(ValueError, match="increasing"):
        Discrete(torch.tensor(levels))


@pytest.mark.parametrize("name", ["iddpm", "ddpm"])
def test_training_draws_known_levels(name):
    options = {**SMALL, "precond": name}
    model = registry.build(registry.config_of("edm-unet", (3, 16, 16), 0, options, {}))
    draw = model.draw(64, RowRng(range(64)))
    assert torch.isin(draw.sigma, model.precond.sigmas).all()
    x, label = torch.randn(64, 3, 16, 16), torch.full((64,), -1)
    prediction = model.predict(x, label, draw)
    assert torch.equal(model.log_ratio(prediction, prediction, x, draw), torch.zeros(64))
    assert isinstance(model.precond, precond.Discrete)
