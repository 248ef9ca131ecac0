"""Guides on densities and logits of closed form, and the golden values of Discriminator Guidance's own sampler."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ddo_cli.codec import Codec
from ddo_cli.diffusion import samplers, vp_sde
from ddo_cli.diffusion.churn import Boost, Churn
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.guidance import AutoGuide, GradientGuide, climb, extrapolated, in_turn
from ddo_cli.diffusion.mixture import GaussianMixture, toy2d
from ddo_cli.diffusion.schedules import karras_sigmas
from ddo_cli.diffusion.trace import Trace, rows_of
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

LABEL = torch.zeros(4, dtype=torch.long)


def normal(n, seed=0, dim=2):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(*values):
    return torch.tensor(values, dtype=torch.float64)


def zero(x, sigma, stage="predictor"):
    """A denoiser that leaves the guide's term alone."""
    return torch.zeros_like(x)


def curved(x_vp, t, label):
    """A potential that depends on x, t and label in ways that a wrong factor or sign would show."""
    k = torch.arange(x_vp[0].numel(), dtype=x_vp.dtype)
    flat = x_vp.flatten(1)
    return torch.sin(flat + k).sum(1) * (1 - t).to(x_vp) + (t * flat.square().sum(1)).to(x_vp) / 4 + label


class Counting:
    """A potential that keeps what it was called with."""

    def __init__(self, potential=curved):
        self.potential, self.calls = potential, []

    def __call__(self, x_vp, t, label):
        self.calls.append((x_vp, t, label))
        return self.potential(x_vp, t, label)


def steered(guide, denoise=zero, trace=None, label=LABEL):
    return guide.steer(denoise, label, trace or Trace())


# ---------------------------------------------------------------------------------------------------------------------
# The direction


def log_ratio_at(x, sigma, label):
    """L as a function of the denoiser's state, float64."""
    rows = sigma.expand(len(x))
    return curved(x / (1 + rows.square()).sqrt().view(-1, *[1] * (x.ndim - 1)), vp_sde.time_of(rows), label)


@pytest.mark.parametrize("sigma", [torch.tensor(0.7, dtype=torch.float64), levels(0.05, 0.7, 5.0, 80.0)])
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 2, 2)])
def test_climb_is_sigma_squared_times_the_gradient_of_the_log_ratio(sigma, shape):
    x = normal(4, dim=math.prod(shape[1:])).view(shape) * (1 + sigma.expand(4).view(-1, *[1] * (len(shape) - 1)))
    label = torch.arange(4)
    value, direction = climb(curved, x, sigma, label)
    assert_close(value.double(), log_ratio_at(x, sigma, label), rtol=1e-6, atol=1e-6)  # the potential sees float32
    gradient = torch.zeros_like(x).flatten(1)
    h = 1e-5
    for i in range(gradient.shape[1]):
        step = torch.zeros_like(gradient)
        step[:, i] = h
        step = step.view_as(x)
        gradient[:, i] = (log_ratio_at(x + step, sigma, label) - log_ratio_at(x - step, sigma, label)) / (2 * h)
    squared = sigma.expand(4).square().view(-1, *[1] * (len(shape) - 1))
    # At sigma = 80 the differences' own rounding is 1e-16 x 10 / h x sigma^2 = 6e-7; float32's share is 1e-6 of 100.
    assert_close(direction, squared * gradient.view_as(x), rtol=1e-5, atol=1e-5)


def test_a_potential_sees_the_vp_state_in_float32_and_the_vp_time_in_float64():
    potential, x, sigma = Counting(), normal(4), levels(0.1, 1.0, 5.0, 80.0)
    value, direction = climb(potential, x, sigma, LABEL)
    ((x_vp, t, label),) = potential.calls
    assert (x_vp.dtype, t.dtype, direction.dtype) == (torch.float32, torch.float64, torch.float64)
    assert_close(x_vp.detach(), (x / (1 + sigma**2).sqrt()[:, None]).float())
    assert_close(t, vp_sde.time_of(sigma))
    assert label is LABEL
    assert not value.requires_grad
    assert not direction.requires_grad


def test_a_scalar_level_is_everyones_level():
    x, sigma = normal(4), torch.tensor(1.3, dtype=torch.float64)
    for one, each in zip(climb(curved, x, sigma, LABEL), climb(curved, x, sigma.expand(4), LABEL), strict=True):
        assert_close(one, each)


def test_climb_keeps_the_graph_of_a_caller_that_differentiates():
    x, sigma, v = normal(4), levels(0.1, 0.7, 2.0, 5.0), normal(4, seed=1)

    def along(state):
        return (climb(curved, state.requires_grad_(), sigma, LABEL)[1] * v).sum()

    x.requires_grad_()
    (found,) = torch.autograd.grad(along(x), x)
    h = 1e-5
    for i in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[i]
        for row in range(4):
            shift = torch.zeros_like(x)
            shift[row] = step
            difference = (along((x + shift).detach()) - along((x - shift).detach())) / (2 * h)
            assert_close(found[row, i], difference.detach(), rtol=1e-7, atol=1e-8)  # h^2 of curvature, rounding / h


def test_no_graph_is_kept_under_no_grad():
    x = normal(4).requires_grad_()
    with torch.no_grad():
        value, direction = climb(curved, x, levels(0.1, 0.7, 2.0, 5.0), LABEL)
    assert not value.requires_grad
    assert not direction.requires_grad


def test_guidance_raises_the_logit():
    x, sigma = normal(4), levels(0.05, 0.7, 5.0, 50.0)
    guided = steered(GradientGuide(curved, weight=1.0), lambda x, sigma, stage="predictor": x)(x, sigma)
    moved = x + 1e-3 * (guided - x) / (guided - x).norm(dim=1, keepdim=True)
    assert (log_ratio_at(moved, sigma, LABEL) > log_ratio_at(x, sigma, LABEL)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Two known densities


def log_density_ratio(a, b):
    """The optimal discriminator's logit, log p_a - log p_b of the noised densities, in VP coordinates."""

    def potential(x_vp, t, label):
        sigma = vp_sde.sigma_of(t)
        x = x_vp.double() * (1 + sigma.square()).sqrt()[:, None]
        return a.log_prob(x, sigma) - b.log_prob(x, sigma)

    return potential


BENT = GaussianMixture(torch.tensor([[0.5, 0.2], [-0.6, 0.1]]), torch.tensor([0.4, 0.7]), torch.tensor([1.0, 2.0]))
WIDE = GaussianMixture(torch.tensor([[-0.1, 0.3]]), torch.tensor([[[0.5, 0.2], [0.2, 0.8]]]))


@pytest.mark.parametrize(("a", "b"), [(BENT, WIDE), (WIDE, BENT), (toy2d(), WIDE)])
def test_the_optimal_discriminator_turns_one_denoiser_into_the_other(a, b):
    sigma = levels(0.05, 0.2, 1.0, 3.0, 20.0, 80.0).repeat_interleave(8)
    x = WIDE.sample(48, torch.Generator().manual_seed(0)) + sigma[:, None] * normal(48)
    label = torch.zeros(48, dtype=torch.long)

    def denoise(x, sigma, stage="predictor"):
        return b.denoise(x, sigma)

    guide = GradientGuide(log_density_ratio(a, b), weight=1.0)
    guided = guide.steer(denoise, label, Trace())(x, sigma)
    # x_vp is rounded to float32: 6e-8 of x, times sigma^2 of the scores' curvature.
    assert_close(guided, a.denoise(x, sigma), rtol=0, atol=1e-4)
    _, direction = climb(log_density_ratio(a, b), x, sigma, label)
    expected = sigma.square()[:, None] * (a.score(x, sigma) - b.score(x, sigma))
    assert_close(direction, expected, rtol=0, atol=1e-4)


def test_weight_two_steps_as_far_beyond():
    sigma, x = levels(0.3, 1.0, 2.0, 10.0), normal(4)
    guide = GradientGuide(log_density_ratio(BENT, WIDE), weight=2.0)
    guided = guide.steer(lambda x, sigma, stage="predictor": WIDE.denoise(x, sigma), LABEL, Trace())(x, sigma)
    d_a, d_b = BENT.denoise(x, sigma), WIDE.denoise(x, sigma)
    assert_close(guided, d_b + 2 * (d_a - d_b), rtol=0, atol=1e-4)


class Exact(DiffusionModel):
    """The model of a mixture, with its closed form for a denoiser."""

    def __init__(self, mixture):
        super().__init__(nn.Identity(), Codec((2,)), 0, DiffusionOptions(), DiffusionDrawOptions())
        self.mixture = mixture

    def denoise(self, x, sigma, label):
        return self.mixture.denoise(x, sigma)


def test_the_optimal_discriminator_turns_one_density_into_the_other():
    x, label, spec = normal(6), torch.full((6,), -1), SamplingRecipe()
    guide = GradientGuide(log_density_ratio(BENT, WIDE), time_min=0.0)
    expected = Exact(BENT).log_density(x, label, spec)
    assert (expected - Exact(WIDE).log_density(x, label, spec)).abs().max() > 0.1
    found = Exact(WIDE).guided_by([guide]).log_density(x, label, spec)
    assert_close(found, expected, rtol=0, atol=1e-9)  # a differentiated potential sees float64


def test_the_optimal_discriminator_turns_one_models_samples_into_the_others():
    label, spec = torch.full((6,), -1), SamplingRecipe(steps=10)
    # The weight of the correctors too, and no window: what is left is the other model's own sampler.
    guide = GradientGuide(log_density_ratio(BENT, WIDE), weight=1.0, weight_2nd=1.0, time_min=0.0)
    expected = Exact(BENT).sample(label, RowRng(range(6)), spec)
    found = Exact(WIDE).guided_by([guide]).sample(label, RowRng(range(6)), spec)
    assert_close(found.x, expected.x, rtol=0, atol=1e-6)  # x_vp is float32, 6e-8 of x
    assert (found.nfe, found.disc_nfe) == (19, 19)


# ---------------------------------------------------------------------------------------------------------------------
# Where the weight is what


def test_the_window_is_each_samples_own_and_includes_its_ends():
    sigma = levels(0.04, 0.05, 1.0, 10.0, 10.1)
    low, high = (float(t) for t in vp_sde.time_of(sigma[[1, 3]]))
    x, label = normal(5), torch.zeros(5, dtype=torch.long)
    guided = steered(GradientGuide(curved, time_min=low, time_max=high), label=label)(x, sigma)
    _, direction = climb(curved, x, sigma, label)
    assert torch.equal(guided[[0, 4]], torch.zeros(2, 2, dtype=torch.float64))
    assert_close(guided[1:4], direction[1:4])


def test_the_default_window_ends_where_the_published_runs_end():
    trace = Trace()
    guided = steered(GradientGuide(curved), trace=trace)
    for i, sigma in enumerate(karras_sigmas(18, 0.002, 80)[:-1]):
        guided(normal(4), sigma)
        assert trace.disc_nfe == min(i + 1, 15)


@pytest.mark.parametrize("sigma", [torch.tensor(0.02, dtype=torch.float64), levels(0.001, 0.01, 0.03, 0.04)])
def test_a_batch_outside_the_window_does_not_ask_the_potential(sigma):
    potential, trace, x = Counting(), Trace(), normal(4)
    answer = torch.ones_like(x)
    guided = steered(GradientGuide(potential), lambda x, sigma, stage="predictor": answer, trace)
    assert guided(x, sigma) is answer
    assert potential.calls == []
    assert trace.disc_nfe == 0


def test_weight_zero_is_the_denoiser_itself():
    potential, trace, x = Counting(), Trace(), normal(4)
    answer = torch.ones_like(x)
    guided = steered(GradientGuide(potential, weight=0.0), lambda x, sigma, stage="predictor": answer, trace)
    for stage in ("predictor", "corrector"):
        assert guided(x, torch.ones((), dtype=torch.float64), stage) is answer
    assert potential.calls == []
    assert trace.disc_nfe == 0


@pytest.mark.parametrize(("first", "second"), [(2.0, 0.0), (0.0, 3.0), (2.0, 3.0)])
def test_each_stage_has_its_weight(first, second):
    x, sigma, trace = normal(4), torch.tensor(0.7, dtype=torch.float64), Trace()
    _, direction = climb(curved, x, sigma, LABEL)
    guided = steered(GradientGuide(curved, weight=first, weight_2nd=second), trace=trace)
    assert_close(guided(x, sigma), first * direction)  # a predictor unless told otherwise
    assert_close(guided(x, sigma, "corrector"), second * direction)
    assert trace.disc_nfe == (first > 0) + (second > 0)


def test_the_denoiser_is_told_its_stage():
    stages = []

    def denoise(x, sigma, stage="predictor"):
        stages.append(stage)
        return x

    class Bad:
        def denoise(self, x, sigma, label):
            return x

    guided = steered(
        AutoGuide(Bad(), 2.0), steered(GradientGuide(curved), extrapolated(denoise, in_turn(denoise, denoise), 2.0))
    )
    guided(normal(4), torch.ones((), dtype=torch.float64), "corrector")
    assert stages == ["corrector", "corrector"]


@pytest.mark.parametrize(
    ("decay", "factor"),
    [
        ("constant", lambda t: torch.ones_like(t)),
        ("linear", lambda t: t),
        ("cosine", lambda t: torch.sin(math.pi * t / 2).square()),
    ],
)
def test_the_weight_decays_with_time(decay, factor):
    t = levels(0.02, 0.25, 0.5, 0.9)
    x, sigma = normal(4), vp_sde.sigma_of(t)
    _, direction = climb(curved, x, sigma, LABEL)
    guided = steered(GradientGuide(curved, weight=3.0, decay=decay))(x, sigma)
    assert_close(guided, 3 * factor(t)[:, None] * direction)


def test_the_cosine_decay_at_known_times():
    x, sigma = normal(3), vp_sde.sigma_of(levels(1 / 3, 0.5, 2 / 3))
    _, direction = climb(curved, x, sigma, LABEL[:3])
    guided = steered(GradientGuide(curved, decay="cosine"), label=LABEL[:3])(x, sigma)
    assert_close(guided, levels(0.25, 0.5, 0.75)[:, None] * direction)


# ---------------------------------------------------------------------------------------------------------------------
# Boosting


def tilted(scores):
    """A potential of known sign by row, whose gradient is 1 everywhere."""
    return lambda x_vp, t, label: x_vp.sum(1) - x_vp.detach().sum(1) + scores


def test_boosting_doubles_the_weight_of_negative_log_ratios_at_even_steps():
    x, sigma = normal(4), torch.tensor(2.0, dtype=torch.float64)
    guide = GradientGuide(tilted(torch.tensor([-3.0, 3.0, -0.1, 0.0])), weight=1.5, weight_2nd=1.0, boost=Boost())
    guided = steered(guide)
    plain = 4 / math.sqrt(5) * torch.ones(4, 2, dtype=torch.float64)  # sigma^2 m
    for step in range(4):
        factor = levels(2, 1, 2, 1) if step % 2 == 0 else levels(1, 1, 1, 1)
        assert_close(guided(x, sigma), 1.5 * factor[:, None] * plain)
        assert_close(guided(x, sigma, "corrector"), plain)  # neither boosted nor counted as a step


def test_boosting_period_and_factor_are_options():
    guide = GradientGuide(tilted(-torch.ones(4)), boost=Boost(weight_period=3, factor=5.0))
    guided, x = steered(guide), normal(4)
    found = [guided(x, torch.tensor(2.0, dtype=torch.float64))[0, 0].item() * math.sqrt(5) / 4 for _ in range(7)]
    assert found == pytest.approx([5, 1, 1, 5, 1, 1, 5])


def test_the_trace_holds_the_log_ratio_of_the_last_predictor():
    trace, x = Trace(), normal(4)
    scores = torch.tensor([-3.0, 3.0, -0.1, -2.0])
    guided = steered(GradientGuide(tilted(scores), weight_2nd=1.0, boost=Boost()), trace=trace)
    sigma = levels(1, 1, 1, 0.01)  # the last row is outside the window: it never looks generated
    guided(x, sigma)
    assert_close(trace.log_ratio, torch.tensor([-3.0, 3.0, -0.1, math.inf]))
    scores.neg_()
    guided(x, sigma, "corrector")
    assert_close(trace.log_ratio, torch.tensor([-3.0, 3.0, -0.1, math.inf]))
    guided(x, torch.tensor(0.01, dtype=torch.float64))
    assert trace.log_ratio is None


class Ones:
    """Stands in for RowRng: every draw is 1."""

    def __init__(self, rows):
        self.rows, self.calls = rows, 0

    def randn(self, shape, dtype):
        self.calls += 1
        return torch.ones(self.rows, *shape, dtype=dtype)


def test_boosted_churn_raises_generated_looking_samples_every_fifth_step():
    trace = Trace()
    churn = Churn(1.0, 0.0, math.inf, 1.5, Ones(3), Boost(), trace)
    x, sigma = torch.zeros(3, 2, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    for step in range(11):
        x_hat, sigma_hat = churn(x, sigma, 18)
        raised = torch.tensor([step in (5, 10), False, False])  # nothing is known before step 0
        gamma = torch.where(raised, 4 / 18, 1 / 18).double()
        s_noise = torch.where(raised, 1.0, 1.5).double()
        assert_close(sigma_hat, 2 * (1 + gamma), rtol=1e-7, atol=0)  # gamma may be float32
        assert_close(x_hat, (2 * ((1 + gamma) ** 2 - 1).sqrt() * s_noise)[:, None].expand(3, 2), rtol=1e-6, atol=0)
        trace.log_ratio = torch.tensor([-1.0, 1.0, math.inf])


def test_boosted_churn_keeps_to_its_window_and_to_the_cap():
    trace = Trace(log_ratio=torch.tensor([-1.0, 1.0]))
    x = torch.zeros(2, 1, dtype=torch.float64)
    churn = Churn(0.0, 0.1, 5.0, 1.0, Ones(2), Boost(s_churn=400), trace)
    _, inside = churn(x, torch.tensor(5.0, dtype=torch.float64), 18)
    assert_close(inside, 5 * levels(math.sqrt(2), 1), rtol=1e-7, atol=0)
    churn.step = 0
    x_hat, outside = churn(x, torch.tensor(57.57598, dtype=torch.float64), 18)
    # The official sampler is NaN here: it takes the root of a difference that float32 rounds below 0.
    assert torch.equal(outside, torch.full((2,), 57.57598, dtype=torch.float64))
    assert torch.equal(x_hat, x)
    assert churn.rng.calls == 2  # drawn all the same


def test_churn_reads_the_log_ratio_of_the_step_before():
    """Row 0 looks generated at step 4 only, row 1 at step 5 only: row 0 alone is churned at step 5."""
    trace, levels_seen, step = Trace(), [], -1

    def potential(x_vp, t, label):
        nonlocal step
        step += 1
        return tilted(torch.tensor([-1.0 if step == 4 else 1.0, -1.0 if step == 5 else 1.0]))(x_vp, t, label)

    def denoise(x, sigma, stage="predictor"):
        if stage == "predictor":
            levels_seen.append(sigma.expand(2))
        return x * 0.25 / (0.25 + rows_of(sigma, x) ** 2)

    guided = GradientGuide(potential, boost=Boost()).steer(denoise, LABEL[:2], trace)
    sigmas = karras_sigmas(18, 0.002, 80)
    churn = Churn(0.0, 0.0, math.inf, 1.0, Ones(2), Boost(), trace)
    samplers.heun(guided, normal(2) * sigmas[0], sigmas, churn)
    expected = sigmas[:-1, None].repeat(1, 2)
    expected[5, 0] *= 1 + 4 / 18
    assert_close(torch.stack(levels_seen), expected, rtol=1e-7, atol=0)


def test_a_guide_that_does_not_boost_leaves_the_log_ratio_alone():
    boosted = GradientGuide(tilted(torch.tensor([-3.0, 3.0, -0.1, -2.0])), boost=Boost())
    other = GradientGuide(curved, time_min=0.5)
    trace = Trace()
    both = steered(other, steered(boosted, trace=trace), trace)
    both(normal(4), torch.tensor(0.7, dtype=torch.float64))  # tau = 0.2: outside the other's window
    assert_close(trace.log_ratio, torch.tensor([-3.0, 3.0, -0.1, -2.0]))


# ---------------------------------------------------------------------------------------------------------------------
# Golden values of the official sampler (alsdudrla10/DG at 1a152b7, CPU; frozen in the facts of Discriminator Guidance)


class Waves:
    """Stands in for RowRng: every draw is cos(1.3 j + 0.5)."""

    def randn(self, shape, dtype):
        j = torch.arange(4 * math.prod(shape), dtype=torch.float64)
        return torch.cos(1.3 * j + 0.5).view(4, *shape).to(dtype)


def toy_denoise(x, sigma, stage="predictor"):
    """(0.25 x + 0.1 sigma^2) / (0.25 + sigma^2), in float32 as a network would be."""
    square = rows_of(sigma, x).to(torch.float32).square()
    return ((0.25 * x.to(torch.float32) + 0.1 * square) / (0.25 + square)).to(x.dtype)


def toy_logit(x_vp, t, label):
    cosines = torch.cos(torch.arange(12, dtype=torch.float32))
    return (1 - t) * (x_vp.flatten(1) * cosines).sum(1) + 0.2 * torch.cos(5 * t) - 0.1


class Golden(NamedTuple):
    x: torch.Tensor
    trace: Trace
    levels: list  # sigma of each predictor evaluation, (B,)


def toy_run(weight, boost=None, s_churn=0.0, s_noise=1.0, steps=18):
    seen, trace, sigmas = [], Trace(), karras_sigmas(steps, 0.002, 80)

    def denoise(x, sigma, stage="predictor"):
        if stage == "predictor":
            seen.append(sigma.expand(4))
        return toy_denoise(x, sigma)

    guided = GradientGuide(toy_logit, weight, boost=boost).steer(denoise, LABEL, trace)
    churn = Churn(s_churn, 0.0, math.inf, s_noise, Waves(), boost, trace)
    latents = torch.sin(0.7 * torch.arange(48, dtype=torch.float64) + 0.3).float().double().view(4, 3, 2, 2)
    return Golden(samplers.heun(guided, latents * sigmas[0], sigmas, churn), trace, seen)


GOLDEN = {
    "unguided": (
        {"weight": 0.0},
        (0.19388715, 0.10116997, 0.00289376, 0.19767838),
        (0.25526419, 0.54332125, 0.62256718, 0.45573154, 0.56569225, 0.61501044),
    ),
    "guided": (
        {"weight": 2.0},
        (0.17399371, 0.08127645, -0.01699969, 0.17778495),
        (0.83325130, 0.85560900, 0.38203982, -0.11647131, 0.08071986, 0.61756843),
    ),
    "boosted": (
        {"weight": 2.0, "boost": Boost()},
        (0.16154676, 0.08127645, -0.01791950, 0.13726701),
        (1.18335247, 0.76685894, -0.06243646, -0.38522634, -0.29608804, 0.62519121),
    ),
    "churned": (
        {"weight": 2.0, "s_churn": 10.0, "s_noise": 1.007},
        (0.14669169, 0.02338604, 0.19199057, -0.02172439),
        (1.72491312, -0.23209859, -1.66492224, -0.52480745, -1.39686036, 0.68711084),
    ),
    "boosted and churned": (
        {"weight": 2.0, "boost": Boost(), "s_churn": 1.0},
        (0.16658714, 0.01372326, 0.13165621, 0.01031288),
        (2.23651052, 0.21614714, -1.61731923, -0.84914106, -1.50923455, 0.90581673),
    ),
    "40 steps": (
        {"weight": 1.0, "steps": 40},
        (0.17562428, 0.08690448, -0.00713473, 0.17925206),
        (0.66157651, 0.74735636, 0.42816633, 0.03152153, 0.19907284, 0.59463435),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_parity_with_the_official_guided_sampler(name):
    settings, means, values = GOLDEN[name]
    x = toy_run(**settings).x
    # Denoiser and logit are float32; ours were within 4e-7 when this was written.
    assert_close(x.mean((1, 2, 3)), levels(*means), rtol=0, atol=1e-5)
    assert_close(torch.cat([x[0].flatten()[:4], x[3].flatten()[-2:]]), levels(*values), rtol=0, atol=1e-5)


def test_parity_of_the_boosted_noise_levels():
    run = toy_run(2.0, Boost())
    t = vp_sde.time_of(torch.stack(run.levels))  # (18, 4)
    assert_close(t[5], levels(0.7399, 0.7125, 0.7125, 0.7399), rtol=0, atol=6e-5)  # four digits are printed
    others = [i for i in range(18) if i != 5]
    expected = karras_sigmas(18, 0.002, 80)[others][:, None].expand(17, 4)
    assert torch.equal(torch.stack(run.levels)[others], expected)  # churn steps 0, 10 and 15 raise nobody


@pytest.mark.parametrize(("steps", "guided"), [(18, 15), (40, 33)])
def test_passes_of_the_discriminator_in_the_published_runs(steps, guided):
    assert toy_run(2.0, steps=steps).trace.disc_nfe == guided


# ---------------------------------------------------------------------------------------------------------------------
# Composition


class Known(DiffusionModel):
    """The denoiser of BENT, or of WIDE without a label."""

    def __init__(self):
        super().__init__(nn.Identity(), Codec((2,)), 2, DiffusionOptions(), DiffusionDrawOptions())

    def denoise(self, x, sigma, label):
        return torch.where(label[:, None] < 0, WIDE.denoise(x, sigma), BENT.denoise(x, sigma))


class Blurred:
    """A worse model."""

    def __init__(self):
        self.labels = []

    def denoise(self, x, sigma, label):
        self.labels.append(label)
        return BENT.denoise(0.9 * x, sigma)


@pytest.mark.parametrize("sigma", [torch.tensor(0.7, dtype=torch.float64), levels(0.05, 0.7, 5.0, 80.0)])
def test_guides_compose_each_with_its_own_weight(sigma):
    x, bad, trace = normal(4), Blurred(), Trace()
    guides = [AutoGuide(bad, 1.7), GradientGuide(curved, 0.6), GradientGuide(log_density_ratio(BENT, WIDE), 0.3)]
    found = Known().guided_by(guides).steered(LABEL, SamplingRecipe(cfg_scale=2.5), trace)(x, sigma)
    d_cond, d_uncond, d_bad = BENT.denoise(x, sigma), WIDE.denoise(x, sigma), BENT.denoise(0.9 * x, sigma)
    cfg = d_uncond + 2.5 * (d_cond - d_uncond)
    ratio = sigma.expand(4).square()[:, None] * (BENT.score(x, sigma) - WIDE.score(x, sigma))
    by_hand = d_bad + 1.7 * (cfg - d_bad) + 0.6 * climb(curved, x, sigma, LABEL)[1] + 0.3 * ratio
    assert_close(found, by_hand, rtol=0, atol=1e-4)  # the last potential sees float32
    assert (trace.nfe, trace.disc_nfe) == (3, 2)
    assert bad.labels[0] is LABEL


def test_autoguidance_of_scale_one_is_the_model_itself():
    x, sigma = normal(4), levels(0.05, 0.7, 5.0, 80.0)
    plain = Known().steered(LABEL, SamplingRecipe(), Trace())(x, sigma)
    guided = Known().guided_by([AutoGuide(Blurred(), 1.0)])
    assert_close(guided.steered(LABEL, SamplingRecipe(), Trace())(x, sigma), plain)


def test_autoguidance_moves_away_from_the_worse_model():
    x, sigma = normal(4), levels(0.05, 0.7, 5.0, 80.0)
    good, bad = BENT.denoise(x, sigma), BENT.denoise(0.9 * x, sigma)
    found = Known().guided_by([AutoGuide(Blurred(), 3.0)]).steered(LABEL, SamplingRecipe(), Trace())(x, sigma)
    assert_close(found - good, 2 * (good - bad))


@pytest.mark.parametrize(
    ("cfg_scale", "guides", "passes"),
    [
        (None, [], (1, 0)),
        (1.0, [], (1, 0)),
        (2.0, [], (2, 0)),
        (None, [AutoGuide(Blurred(), 2.0)], (2, 0)),
        (None, [GradientGuide(curved)], (1, 1)),
        (2.0, [GradientGuide(curved), GradientGuide(curved, 0.0)], (2, 1)),
    ],
)
def test_passes_are_counted(cfg_scale, guides, passes):
    trace = Trace()
    guided = Known().guided_by(guides)
    guided.steered(LABEL, SamplingRecipe(cfg_scale=cfg_scale), trace)(normal(4), levels(1, 1, 1, 1))
    assert (trace.nfe, trace.disc_nfe) == passes


def test_guides_without_weight_leave_samples_alone():
    spec, label = SamplingRecipe(steps=6), torch.zeros(8, dtype=torch.long)

    def sample(guides):
        return Known().guided_by(guides).sample(label, RowRng(range(8)), spec)

    plain, guided = sample([]), sample([GradientGuide(Counting(), 0.0)])
    assert torch.equal(plain.x, guided.x)
    assert (plain.nfe, plain.disc_nfe, guided.nfe, guided.disc_nfe) == (11, 0, 11, 0)


@pytest.mark.parametrize("sigma", [torch.tensor(0.7, dtype=torch.float64), levels(0.05, 0.7, 5.0, 80.0)])
def test_with_and_without_label_are_one_batch_and_the_variance_is_the_conditional_one(sigma):
    sizes = []

    class Labelled(nn.Module):
        """F = label, v = label + 1 / 2: of each row's own label."""

        def forward(self, x, c_noise, label):
            sizes.append((len(x), len(c_noise)))
            told = label.to(x.dtype)[:, None].expand_as(x)
            return torch.cat([told, told + 0.5], dim=1)

    options = DiffusionOptions(learned_variance=True)
    model = DiffusionModel(Labelled(), Codec((3,)), 10, options, DiffusionDrawOptions())
    x, trace, label = torch.zeros(4, 3, dtype=torch.float64), Trace(), torch.tensor([0, 3, 5, 9])
    interval = {"cfg_sigma_min": 0.01, "cfg_sigma_max": 100.0}
    found = model.steered(label, SamplingRecipe(cfg_scale=3.0, **interval), trace)(x, sigma)
    c_out = model.precond.coefficients(sigma.float()).c_out.expand(4)
    assert_close(found, (c_out * (-1 + 3.0 * (label + 1))).double()[:, None].expand(4, 3))
    assert_close(trace.variance, (label + 0.5)[:, None].expand(4, 3))
    assert (sizes, trace.nfe) == ([(8, 8)], 2)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decays_are_1_beyond_time_1(decay):
    sigma = vp_sde.sigma_of(torch.tensor(1.41, dtype=torch.float64))
    found = [steered(GradientGuide(curved, decay=each))(normal(4), sigma) for each in (decay, "constant")]
    assert torch.equal(*found)


def test_a_window_that_ends_at_1_has_no_end():
    """ADM's step 999 lies at VP time 1.0034 or 1.41; a window that ends before 1 does end there."""
    noisiest = vp_sde.sigma_of(torch.tensor([1.0034, 1.41], dtype=torch.float64))

    def potential(x_vp, t, label):
        return x_vp.flatten(1).sum(1)

    for time_max, guided in ((1.0, True), (0.99, False)):
        steer = GradientGuide(potential, 1.0, time_max=time_max).steer
        denoise = steer(lambda x, sigma, stage="predictor": x, torch.full((2,), -1), Trace())
        for sigma in noisiest:
            x = torch.zeros(2, 3)
            assert bool((denoise(x, sigma) != x).any()) == guided
