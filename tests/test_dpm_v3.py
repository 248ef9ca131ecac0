"""DPM-Solver-v3 against the published sampler's numbers, a plain rewrite with each of its choices changed, and a known
flow."""

import math

import pytest
import torch
from conftest import CPU, make_checkpoint
from test_samplers import Recording, analytic, gaussian, stream
from torch import nn
from torch.testing import assert_close

from ddo_cli.codec import Codec
from ddo_cli.diffusion import precond, samplers
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.guidance import AutoGuide, GradientGuide
from ddo_cli.diffusion.schedules import karras_sigmas, snapped_sigmas
from ddo_cli.engines.edit import inputs as edit_inputs
from ddo_cli.engines.sampling import sample
from ddo_cli.errors import UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

# Nodes of the published sampler, of 250 intervals between sigma = 80 and 0.002.
NODES = {
    25: [0, 5, 11, 16, 22, 28, 34, 41, 47, 54, 62, 69, 77, 86, 95, 104, 114, 125, 136, 148, 162, 176, 191, 209, 228,
         250],
    32: [0, 4, 8, 13, 17, 21, 26, 31, 36, 41, 46, 52, 57, 63, 69, 75, 82, 88, 95, 103, 110, 118, 127, 136, 145, 155,
         166, 177, 189, 203, 217, 233, 250],
}  # fmt: skip
# The published sampler's samples for `analytic`, 25 steps: first four, last two, mean, standard deviation.
PUBLISHED = [-0.576568, 1.05805, 0.252886, 1.07766, 0.164717, 0.573764, 0.04978901, 0.7020269]


def summary(x):
    flat = x.flatten().double()
    return torch.cat([flat[:4], flat[-2:], flat.mean()[None], flat.std(correction=0)[None]])


def drawn(solver, sigmas):
    x = stream(3, (2, 3, 4, 4)).double() * 80
    return summary(solver(analytic, x, sigmas))


@pytest.mark.parametrize("steps", [25, 32])
def test_levels_are_snapped_to_the_grid(steps):
    sigmas = snapped_sigmas(steps, 0.002, 80)
    nodes = 250 * (math.log(80) - sigmas.log()) / math.log(80 / 0.002)
    assert_close(nodes, torch.tensor(NODES[steps], dtype=torch.float64), rtol=0, atol=1e-9)
    if steps == 25:  # as printed
        assert_close(
            sigmas[[0, 1, 2, -2, -1]], sigmas.new_tensor([80, 64.7215, 50.1879, 0.00508173, 0.002]), rtol=1e-5, atol=0
        )


def test_parity_with_the_published_sampler():
    found = drawn(samplers.dpm_v3, snapped_sigmas(25, 0.002, 80))
    assert_close(found, torch.tensor(PUBLISHED, dtype=torch.float64), rtol=3e-6, atol=1e-7)  # six digits are printed


def rewritten(denoise, x, sigmas, integral="trapezoid", corrector=True, again=False, low_end=True, first=2):
    """The same in noise terms of a textbook's loop, with a switch for each choice."""
    lam = -sigmas.log()
    n = len(sigmas) - 1

    def e(i, j, power):
        h = lam[j] - lam[i]
        if integral == "analytic":
            return h.expm1() if power == 0 else h.exp() * (h - 1) + 1
        nodes = torch.linspace(0, 1, int((h * 250 / (lam[n] - lam[0])).round()) + 1, dtype=torch.float64) * h
        return torch.trapezoid(nodes.exp() * nodes**power, nodes)

    def step(x, i, j, d, other=None):
        total = x + e(i, j, 0) * d[i]
        if other is not None:
            total = total + e(i, j, 1) * (d[other] - d[i]) / (lam[other] - lam[i])
        return total * (lam[i] - lam[j]).exp()

    states, d, order = [x], [], 0
    for k in range(1, n + 1):
        d.append(denoise(states[-1], sigmas[k - 1]))
        if corrector and order == 2:
            states[-1] = step(states[-2], k - 2, k - 1, d, k - 1)
            if again:
                d[-1] = denoise(states[-1], sigmas[k - 1])
        order = min(first, k, n + 1 - k if low_end else n)
        states.append(step(states[-1], k - 1, k, d, k - 2 if order == 2 else None))
    return states[-1]


def test_the_rewritten_loop_agrees():
    sigmas = snapped_sigmas(25, 0.002, 80)
    assert_close(drawn(samplers.dpm_v3, sigmas), drawn(rewritten, sigmas), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"integral": "analytic"},
        {"corrector": False},
        {"again": True},
        {"low_end": False},
        {"first": 1},
        {"snap": False},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_each_choice_matters(wrong):
    wrong = dict(wrong)
    sigmas = snapped_sigmas(25, 0.002, 80) if wrong.pop("snap", True) else karras_sigmas(26, 0.002, 80)[:-1]
    found = drawn(lambda *given: rewritten(*given, **wrong), sigmas)
    apart = (found - torch.tensor(PUBLISHED, dtype=torch.float64)).abs().max().item()
    assert apart > 3e-5  # ten times the tolerance above


def test_convergence_on_a_gaussian():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None] * 10

    def error(n):
        exact = x * math.sqrt((0.25 + 0.05**2) / (0.25 + 10.0**2))
        return (samplers.dpm_v3(gaussian, x, snapped_sigmas(n, 0.05, 10.0), None) - exact).abs().max().item()

    errors = [error(n) for n in (8, 16, 32)]
    assert errors[0] / errors[1] > 3.5  # second order: a fourth
    assert errors[1] / errors[2] > 3.5
    assert errors[2] < 1e-2 * 0.5 * 3


# ---------------------------------------------------------------------------------------------------------------------
# In a model


def test_a_model_takes_25_evaluations_and_ends_at_the_smallest_level():
    model = Recording()
    found = model.sample(torch.tensor([-1, -1]), RowRng([0, 1]), SamplingRecipe(sampler="dpm-v3"))
    assert found.nfe == len(model.levels) == 25
    assert_close(torch.stack(model.levels), snapped_sigmas(25, 0.002, 80)[:-1])
    assert_close(model.sigmas(SamplingRecipe(sampler="dpm-v3", steps=5, sigma_min=0.1))[-1].item(), 0.1)


class Stepped(DiffusionModel):
    """The model of `gaussian`, which knows the noise levels of DDPM's thousand steps."""

    def __init__(self, known=None):
        known = known or precond.Discrete(precond.linear_sigmas())
        super().__init__(nn.Identity(), Codec((1,)), 0, DiffusionOptions(), DiffusionDrawOptions(), known)
        self.levels = []

    def denoise(self, x, sigma, label):
        self.levels.append(sigma)
        return gaussian(x, sigma)


def test_a_model_of_discrete_steps_is_evaluated_at_its_own_levels():
    model, spec = Stepped(), SamplingRecipe(sampler="dpm-v3")
    found = model.sample(torch.full((8,), -1), RowRng(range(8)), spec)
    assert set(torch.stack(model.levels).float().tolist()) <= set(model.precond.sigmas.tolist())
    assert found.nfe == 25
    low, high = (model.sigmas(spec)[i].item() for i in (-1, 0))
    exact = RowRng(range(8)).randn((1,)).double() * high * math.sqrt((0.25 + low**2) / (0.25 + high**2))
    assert_close(found.x, exact, rtol=0.02, atol=0)


def test_levels_that_are_one_to_the_network_are_refused():
    model = Stepped(precond.Discrete(torch.tensor([0.1, 1.0, 10.0])))
    with pytest.raises(UsageError, match=r"sigma_min = 0.9 and sigma_max = 1.1 are one level to this network"):
        model.check_sampling(SamplingRecipe(sampler="dpm-v3", sigma_min=0.9, sigma_max=1.1))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"steps": 200}, "steps = 200: two of the 200 steps meet on one node of dpm-v3's grid of 250 .*; give fewer"),
        ({"rho": 0.5}, "steps = 25: two of the 25 steps"),
        ({"spacing": "vp"}, "spacing = vp: dpm-v3 has a spacing of its own"),
        ({"respacing": "ddim25"}, "respacing = ddim25 chooses among the steps"),
        ({"s_churn": 4.0}, "dpm-v3 has no churn"),
        ({"scaling": "vp"}, "EDM's generalised sampler needs sampler heun or euler"),
    ],
)
def test_options_of_other_samplers_are_refused(options, complaint):
    with pytest.raises(UsageError, match=complaint):
        Recording().check_sampling(SamplingRecipe(sampler="dpm-v3", **options))


def test_a_files_own_settings_do_not_forbid_it():
    own = SamplingRecipe(sampler="ddpm", spacing="steps", respacing="250", s_churn=3.0)
    Stepped().check_sampling(own.merged(sampler="dpm-v3"))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def test_guides_steer_every_evaluation(ckpt):
    model = registry.load_model(ckpt, CPU).model
    bad = registry.load_model(ckpt, CPU).model
    stages = []

    def potential(x_vp, t, label):
        stages.append(t)
        return x_vp.flatten(1).sum(1)

    spec = SamplingRecipe(sampler="dpm-v3", steps=4, cfg_scale=2.0)
    guides = [AutoGuide(bad, 1.5), GradientGuide(potential, 1.0, time_min=0.0)]
    found = model.guided_by(guides).sample(torch.tensor([1, 2]), RowRng([0, 1]), spec)
    plain = model.sample(torch.tensor([1, 2]), RowRng([0, 1]), spec)
    assert (found.nfe, found.disc_nfe, plain.nfe) == (12, 4, 8)
    assert (found.x - plain.x).abs().max() > 0.1


def test_it_draws_from_a_checkpoint_and_edits(ckpt, tmp_path):
    settings = {"sampler": "dpm-v3", "steps": 5}
    assert sample.run(ckpt, range(4), tmp_path / "set", sampling=settings, device=CPU)["nfe"] == 5
    model, spec = registry.load_model(ckpt, CPU).model, SamplingRecipe(**settings)
    assert edit_inputs.check_levels([1.0, 0.0021], spec, model) == [0.0021, 1.0]
    x0 = torch.rand(4, 3, 32, 32) * 2 - 1
    for level, near in ((0.0021, 0.02), (1.0, 10.0)):
        at_level = spec.merged(sigma_max=level)
        found = model.sample(torch.arange(4), RowRng(range(4)), at_level, x0=x0)
        assert found.nfe == 5
        assert_close(model.sigmas(at_level)[[0, -1]], torch.tensor([level, 0.002], dtype=torch.float64))
        assert near / 100 < (found.x - x0).abs().max() < near  # the more noise, the less is kept
