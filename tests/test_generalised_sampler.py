"""EDM's generalised sampler: published golden values, and its agreement with the plain one."""

import math

import pytest
import torch
from test_samplers import analytic, gaussian, stream
from torch.testing import assert_close

from ddo_cli.diffusion import generalised_sampler, samplers
from ddo_cli.diffusion.churn import Churn
from ddo_cli.diffusion.generalised_sampler import Choice
from ddo_cli.diffusion.schedules import karras_sigmas
from ddo_cli.errors import UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

SMALL = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


def run(choice, n, denoise=analytic, latent=None, **churn):
    low, high = generalised_sampler.default_range(choice.discretization)
    sigmas = generalised_sampler.levels(choice, n, low, high)
    rng = RowRng([0, 1])
    own = Churn(churn.get("s_churn", 0.0), 0.0, math.inf, 1.0, rng)
    latent = stream(3, (2, 3, 4, 4)).double() if latent is None else latent
    return generalised_sampler.sample(denoise, latent, sigmas, (low, high), choice, own)


@pytest.mark.parametrize(
    ("choice", "steps", "expected"),
    [
        (
            Choice("vp", "vp", "vp", heun=False),
            64,
            (0.04866682, 0.6858537, -0.564091, 1.03268, 0.248714, 1.05179, 0.162601, 0.561363),
        ),
        (
            Choice("ve", "ve"),
            32,
            (0.04122256, 0.5818289, -0.479579, 0.874529, 0.211389, 0.890523, 0.137924, 0.477265),
        ),
        (
            Choice("iddpm", "linear"),
            32,
            (0.04911843, 0.6940907, -0.570164, 1.04612, 0.24917, 1.06551, 0.160888, 0.56739),
        ),
    ],
)
def test_parity_with_edm(choice, steps, expected):
    found = run(choice, steps)
    flat = found.flatten()
    numbers = [found.mean().item(), found.std(correction=0).item(), *flat[:4].tolist(), *flat[-2:].tolist()]
    assert numbers == pytest.approx(expected, rel=1e-5)


def test_default_choices_are_the_plain_sampler():
    sigmas = karras_sigmas(18, 0.002, 80)
    latent = stream(3, (2, 3, 4, 4)).double()
    assert_close(run(Choice(), 18), samplers.heun(analytic, latent * 80, sigmas), rtol=1e-12, atol=1e-12)
    assert_close(run(Choice(heun=False), 18), samplers.euler(analytic, latent * 80, sigmas), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["vp", "ve", "linear"])
@pytest.mark.parametrize("scaling", ["vp", "none"])
def test_every_choice_integrates_the_same_flow(schedule, scaling):
    latent = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3)
    choice = Choice("vp", schedule, scaling)
    exact = latent * 0.5 * 152.167 / math.hypot(0.5, 152.167)  # N(0, 0.5^2): the flow from 152.167 to 0
    assert_close(run(choice, 1000, gaussian, latent), exact, rtol=2e-2, atol=1e-3)


def test_the_midpoint_rule_differs_from_the_trapezoid():
    assert not torch.equal(run(Choice(step_ratio=0.5), 18), run(Choice(), 18))
    assert_close(run(Choice(step_ratio=0.5), 200), run(Choice(), 200), rtol=1e-3, atol=1e-4)


def test_churn_with_scaling_keeps_the_distribution():
    latent = torch.randn(2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = run(Choice("vp", "vp", "vp"), 64, gaussian, latent, s_churn=20.0)
    assert found.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"discretization": "vp", "sampler": "ddim"}, "needs sampler heun or euler"),
        ({"scaling": "vp", "spacing": "karras"}, "no sampling.spacing"),
        ({"discretization": "ve", "rho": 5.0}, "curves Karras"),
        ({"spacing": "steps"}, "discrete steps"),
        ({"respacing": "250"}, "trained at"),
    ],
)
def test_settings_that_do_not_go_together(settings, match):
    model = registry.build(registry.config_of("edm-unet", (3, 8, 8), 0, SMALL, {}))
    with pytest.raises(UsageError, match=match):
        model.check_sampling(SamplingRecipe(**settings))


def test_a_model_draws_with_it():
    model = registry.build(registry.config_of("edm-unet", (3, 8, 8), 0, {**SMALL, "precond": "vp"}, {})).eval()
    label = torch.full((2,), -1)
    spec = SamplingRecipe(discretization="vp", schedule="vp", scaling="vp", steps=4)
    with torch.no_grad():
        found = model.sample(label, RowRng([0, 1]), spec)
    assert found.nfe == 7
    assert found.x.shape == (2, 3, 8, 8)
    low, high = model.bounds(spec)
    assert (low, high) == pytest.approx((0.01048599, 152.16697), rel=1e-5)
    with pytest.raises(UsageError, match="SDEdit"):
        model.sample(label, RowRng([0, 1]), spec, x0=torch.zeros(2, 3, 8, 8))
