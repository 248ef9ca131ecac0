"""Flow matching in EDM's frame: its likelihood, noise levels and samplers."""

import math
from itertools import pairwise

import pytest
import test_dit
import torch
from torch import nn
from torch.testing import assert_close

from ddo_cli.codec import Codec
from ddo_cli.diffusion import flow_samplers, samplers, vp_sde
from ddo_cli.diffusion.denoiser import DiffusionDraw, DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.guidance import GradientGuide
from ddo_cli.diffusion.schedules import flow_sigmas
from ddo_cli.errors import NumericsError, UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

KINDS = ("flow", "flow-reversed")


class Velocity(nn.Module):
    """Any velocity network: nonlinear in the state, dependent on its time; remembers what it saw."""

    def forward(self, x, c_noise, label):
        assert x.dtype == c_noise.dtype == torch.float32
        self.x, self.time = x, c_noise
        return torch.tanh(1.3 * x) - torch.cos(2 * c_noise)[:, None]


def build(kind, **draw):
    options = DiffusionOptions(precond=kind)
    return DiffusionModel(Velocity(), Codec((5,)), 0, options, DiffusionDrawOptions(**draw))


def labels(x):
    return torch.full((len(x),), -1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_likelihood_is_the_velocity_s_squared_error(kind):
    n = torch.tensor([1e-3, 0.05, 0.3, 0.7, 0.95, 0.999], dtype=torch.float64)
    x0, eps = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = build(kind)
    draw = DiffusionDraw(n / (1 - n), eps, torch.zeros(6, dtype=torch.bool))
    log_lik = model.log_lik(model.predict(x0, labels(x0), draw), x0, draw)
    # The network has seen the path's state at its own time: from noise to data, or the other way.
    assert_close(model.net.x.double(), (1 - n)[:, None] * x0 + n[:, None] * eps, rtol=1e-6, atol=1e-6)
    assert_close(model.net.time.double(), n if kind == "flow-reversed" else 1 - n, rtol=1e-6, atol=1e-7)
    v = eps - x0 if kind == "flow-reversed" else x0 - eps
    error = (model.net(model.net.x, model.net.time, None).double() - v).square().sum(1)
    assert_close(log_lik, -error, rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_likelihood_of_float32_states():
    """As in training. What is lost near n = 0 is n's share of float32's digits."""
    n = torch.tensor([1e-3, 0.05, 0.3, 0.7, 0.95, 0.999])
    x0, eps = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    model, zeros = build("flow"), torch.zeros(6, dtype=torch.bool)
    draw = DiffusionDraw(n / (1 - n), eps, zeros)
    found = model.log_lik(model.predict(x0, labels(x0), draw), x0, draw)
    exact_draw = DiffusionDraw(n.double() / (1 - n.double()), eps.double(), zeros)
    exact = model.log_lik(model.predict(x0.double(), labels(x0), exact_draw), x0.double(), exact_draw)
    assert found.dtype == torch.float32
    assert_close(found[0].double(), exact[0], rtol=1e-3, atol=0)
    assert_close(found[1:].double(), exact[1:], rtol=2e-5, atol=0)
    prediction = model.predict(x0, labels(x0), draw)
    assert torch.equal(model.log_ratio(prediction, prediction, x0, draw), torch.zeros(6))


def test_every_network_can_be_one():
    options = {"patch": 4, "widths": [8], "depths": [1], "emb_width": 8, "precond": "flow"}
    model = registry.build(registry.config_of("patch-unet", (1, 8, 8), 0, options, {"distribution": "logistic"}))
    draw = model.draw(3, RowRng(range(3)))
    assert model(torch.zeros(3, 1, 8, 8), torch.full((3,), -1), draw).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels of training


def test_uniform_and_shifted_times():
    """Logistic ln sigma: n is uniform; with p_mean ln(s), n of the shift is s u / (1 + (s - 1) u)."""
    rows = range(4000)
    u = RowRng(rows).rand().double()
    n = lambda sigma: sigma.double() / (1 + sigma.double())  # noqa: E731
    plain = build("flow", distribution="logistic", p_mean=0.0).draw(len(rows), RowRng(rows)).sigma
    assert_close(n(plain), u, rtol=0, atol=1.1e-4)  # the tails that are cut
    assert 0.9999e-4 < n(plain).min() < n(plain).max() < 0.99991
    shifted = build("flow", distribution="logistic", p_mean=math.log(3)).draw(len(rows), RowRng(rows)).sigma
    assert_close(n(shifted), 3 * u / (1 + 2 * u), rtol=0, atol=3.5e-4)
    logit_normal = build("flow", p_mean=0.5, p_std=0.8).draw(len(rows), RowRng(rows)).sigma
    assert_close(torch.logit(n(logit_normal)), 0.5 + 0.8 * RowRng(rows).randn().double(), rtol=1e-5, atol=1e-5)


def test_no_noise_level_is_infinite():
    u = torch.tensor([0.0, 1 - 2**-24])  # the ends of what torch draws
    assert_close(vp_sde.logistic(u), torch.tensor([-9.21, 9.21]), rtol=0, atol=0.01)


def test_a_discriminator_trains_at_the_model_s_levels():
    u = torch.linspace(0.1, 0.9, 50)
    law = vp_sde.TimeLaw("model", p_mean=0.3, p_std=1.2, distribution="logistic")
    log_sigma = vp_sde.sigma_of(law.times(u).t).log()
    inside = log_sigma < vp_sde.sigma_of(torch.tensor(1.0)).log() - 1e-6
    assert_close(log_sigma[inside], (0.3 + 1.2 * torch.logit(u.double()))[inside], rtol=0, atol=2e-3)
    # Weighted, its mean loss is importance's.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    times = law._replace(weighted=True).times(u)
    f = lambda t: torch.cos(vp_sde.sigma_of(t).log())  # noqa: E731
    expected = f(vp_sde.importance_sampled_time(u)).mean()
    assert_close((times.weight * f(times.t)).mean(), expected, rtol=0, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_euler_step_over_sigma_is_one_in_time(kind):
    model = build(kind)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n = torch.linspace(0.999, 0, 9, dtype=torch.float64)

    def denoise(x, sigma, stage="predictor"):
        return model.denoise(x, sigma, labels(x))

    flow = x.clone()
    for now, then in pairwise(n):
        sign, time = (1, now) if kind == "flow-reversed" else (-1, 1 - now)
        v = sign * model.net(flow.float(), time.float().expand(4), None).double()  # d x / d n
        flow = flow + (then - now) * v
    found = samplers.euler(denoise, x / (1 - n[0]), n / (1 - n))
    assert_close(found, flow, rtol=1e-6, atol=1e-6)


# N(0.3, 0.5^2): the path's marginals are normal, and the ODE moves each point along with mean and deviation.
MEAN, STD = 0.3, 0.5


def gaussian(x, sigma, stage="predictor"):
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def marginal(n):
    """Mean and deviation of y at share of noise n."""
    return (1 - n) * MEAN, math.hypot((1 - n) * STD, n)


def moved(y, n, n_next):
    """The ODE's exact solution, which keeps (y - mean) / deviation."""
    mean, std = marginal(n)
    mean_next, std_next = marginal(n_next)
    return mean_next + std_next / std * (y - mean)


def levels(steps, n_last=None):
    return flow_sigmas(steps, 1e8, None if n_last is None else n_last / (1 - n_last))


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("flow-euler", {}, 1),
        ("flow-heun", {}, 2),
        ("flow-heun", {"last_step": "euler"}, 2),  # first order in one step, of length 1 / steps
        ("dpmpp-2m", {}, 2),
        ("heun", {}, 2),
    ],
)
def test_order_of_convergence_to_the_exact_flow(name, options, order):
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]

    def error(steps):
        if name.startswith("flow"):
            sigmas, n = levels(steps), (1.0, 0.0)
        else:  # EDM's frame: from a finite level, and to a level above 0, as their last step is first order
            share = torch.linspace(0.99, 0.02, steps + 1, dtype=torch.float64)
            sigmas, n = share / (1 - share), (0.99, 0.02)
        found = samplers.SAMPLERS[name].integrate(gaussian, (1 + sigmas[0]) * z, sigmas, None, **options)
        return (found / (1 + sigmas[-1]) - moved(z, *n)).abs().max().item()

    assert error(80) / error(160) == pytest.approx(2**order, rel=0.2)


def test_the_first_level_is_pure_noise():
    """A start at sigma = 1e8 is one at infinity; one at 80 is another sampler."""
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]

    def one_step(sigma_max):
        sigmas = torch.tensor([sigma_max, 1.0, 0.0], dtype=torch.float64)
        return samplers.SAMPLERS["flow-euler"].integrate(gaussian, (1 + sigmas[0]) * z, sigmas, None)

    middle = z + 0.5 * (MEAN - z)  # y - 0.5 dy/dn, where D of pure noise is the mean
    exact = gaussian(2 * middle, torch.tensor(1.0))  # the second step lands on D
    assert_close(one_step(1e8), exact, rtol=1e-6, atol=1e-6)
    assert (one_step(80.0) - exact).abs().max() > 1e-3


class OneNoiseEach:
    """Stands in for `Churn`: in step k, row k alone gets noise, of 1."""

    def __init__(self):
        self.step = -1

    def eps(self, y):
        self.step += 1
        return (torch.arange(len(y)) == self.step).to(y)[:, None]


@pytest.mark.parametrize("form", ["sigma", "decreasing"])
@pytest.mark.parametrize("name", ["flow-sde", "flow-sde-heun"])
def test_the_sde_s_moments_converge(name, form):
    """Its steps are affine here: mean and variance follow, without sampling error, from the effect of each noise."""
    last = 0.04

    def moments(steps):
        sigmas = levels(steps, last)[:-1]  # to n = 0.04, whose marginal is known
        start = torch.zeros(steps + 1, 1, dtype=torch.float64)
        start[-2] = 1.0  # the noise at the start; the last row has none at all
        x = (1 + sigmas[0]) * start
        found = samplers.SAMPLERS[name].integrate(gaussian, x, sigmas, OneNoiseEach(), diffusion_form=form)
        y = found[:, 0] / (1 + sigmas[-1])
        return y[-1].item(), (y - y[-1]).square().sum().sqrt().item()

    exact_mean, exact_std = marginal(last)
    few, many = moments(64), moments(128)
    assert (few[1] - exact_std) / (many[1] - exact_std) == pytest.approx(2, rel=0.2)  # weak order 1
    assert many == (pytest.approx(exact_mean, abs=1e-6), pytest.approx(exact_std, abs=3e-3))


# ---------------------------------------------------------------------------------------------------------------------
# The samplers of SiT and REPA: numbers that their code gave for the tiny transformer of test_dit, 8 evaluations or so

SIT = {
    "flow-euler": (7, (-0.1927677, 1.3344943, (-1.444677, -0.814777, -0.445080, 0.468090))),
    "flow-heun": (7, (-0.1945462, 1.3075419, (-1.355393, -0.991838, -0.395672, 0.305760))),
    "flow-sde": (8, (-0.2268242, 1.0925552, (-0.000265, -0.679734, -0.297501, -0.220174))),
    "flow-sde-heun": (8, (-0.2242866, 1.0719501, (0.558298, -0.908163, 0.205842, -0.359194))),
}
SIT_PLAIN = {
    "flow-euler": (7, (-0.0496541, 1.2510677, (-1.907309, 0.380117, -0.409119, 2.611378))),
    "flow-heun": (7, (-0.0595889, 1.2476343, (-1.996183, 0.362561, -0.480063, 2.619673))),
    "flow-sde": (8, (-0.0736294, 1.0499784, (-1.115605, 0.667305, -1.020980, 1.937910))),
    "flow-sde-heun": (8, (-0.0874238, 1.0672338, (-1.307903, 0.657899, -0.958099, 1.970037))),
}
REPA = {
    "flow-euler": (8, (0.2491725, 1.3402116, (-0.987485, -2.425917, -0.001228, -1.378657))),
    "flow-heun": (8, (0.2732060, 1.3542406, (-1.067722, -2.432766, -0.005380, -1.388580))),
    "flow-sde": (8, (0.2895520, 1.2115601, (-0.791906, -2.195516, 1.384445, -1.005174))),
}
REPA_GUIDED = {  # scale 1.8, t up to 0.7
    "flow-euler": (8, (0.2272300, 1.3550147, (-1.234414, -2.445605, -0.186813, -1.370700))),
    "flow-sde": (8, (0.2574647, 1.2144462, (-1.070268, -2.254255, 1.187797, -1.086658))),
}


class GoldenNoise:
    """Stands in for RowRng: the latent, then the k-th noise cos(1.3 j + 0.5 + k), k = 1, 2, ..."""

    def __init__(self):
        self.k = 0

    def randn(self, shape, dtype=torch.float32):
        self.k += 1
        if self.k == 1:
            return test_dit.X
        j = torch.arange(2 * math.prod(shape), dtype=torch.float64)
        return torch.cos(1.3 * j + 0.5 + self.k - 1).view(2, *shape).to(dtype)

    def randint(self, high):
        return torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("golden", "options", "sampling"),
    [
        (SIT, {"precond": "flow", "unused_variance": True}, {}),
        (SIT_PLAIN, {"precond": "flow"}, {}),
        (REPA, {"precond": "flow-reversed"}, {"flow-heun": {"last_step": "euler"}}),
        (REPA_GUIDED, {"precond": "flow-reversed"}, {"": {"cfg_scale": 1.8, "cfg_sigma_max": 0.7001 / 0.2999}}),
    ],
    ids=["sit", "sit-plain", "repa", "repa-guided"],
)
def test_samplers_equal_the_official_ones(golden, options, sampling):
    model = test_dit.loaded(test_dit.build(**options))
    for name, (steps, (mean, std, first)) in golden.items():
        given = {**sampling.get("", {}), **sampling.get(name, {})}
        spec = SamplingRecipe(sampler=name, steps=steps, **given)
        model.check_sampling(spec)
        with torch.no_grad():
            found = model.sample(torch.tensor([1, 3]), GoldenNoise(), spec).x
        test_dit.check(found, mean, std, first)


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({"unused_variance": True}, (-0.1949007, 1.3071633, (-1.338027, -1.000127, -0.378693, 0.295980))),
        ({}, (-0.0604293, 1.2489164, (-2.001603, 0.364657, -0.484921, 2.626806))),
    ],
    ids=["sit", "sit-plain"],
)
def test_the_adaptive_solver_reaches_the_official_solution(options, golden):
    """SiT's default solver, dopri5 of torchdiffeq, at rtol 1e-7."""
    model = test_dit.loaded(test_dit.build(precond="flow", **options))
    exact, default = (
        model.sample(torch.tensor([1, 3]), GoldenNoise(), SamplingRecipe(sampler="flow-dopri5", tolerance=tolerance))
        for tolerance in (1e-7, None)
    )
    test_dit.check(exact.x, *golden)
    error = (default.x - exact.x).abs().max().item()
    assert 1e-6 < error < 1e-2
    assert default.nfe < exact.nfe / 2
    heun = model.sample(torch.tensor([1, 3]), GoldenNoise(), SamplingRecipe(sampler="flow-heun", steps=25)).x
    assert (heun - exact.x).abs().max() < 5e-3  # its limit


def test_every_row_has_steps_of_its_own():
    """A stiff row beside an easy one changes nothing but its cost."""
    model, spec = build("flow"), SamplingRecipe(sampler="flow-dopri5", tolerance=1e-5)
    model.net.forward = lambda x, c_noise, label: torch.tanh(x) * (1 + 40 * label.clamp(min=0))[:, None].float()
    easy = model.sample(torch.tensor([-1]), RowRng([2]), spec)
    both = model.sample(torch.tensor([3, -1]), RowRng([1, 2]), spec)
    assert_close(both.x[1:], easy.x, rtol=0, atol=1e-12)
    assert both.nfe > 3 * easy.nfe


def test_an_adaptive_solver_that_does_not_arrive(monkeypatch):
    monkeypatch.setattr(flow_samplers, "MAX_STEPS", 3)
    with pytest.raises(
        NumericsError, match=r"flow-dopri5 does not reach clean images within 3 steps at .* = 1e-08; ra"
    ):
        build("flow").sample(torch.tensor([-1]), RowRng([2]), SamplingRecipe(sampler="flow-dopri5", tolerance=1e-8))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sampler": "flow-heun", "dtype": "float32"}, "dtype = float32: flow-heun is float64"),
        ({"sampler": "flow-heun", "spacing": "vp"}, "flow-heun has a spacing of its own; leave it out"),
        ({"sampler": "flow-heun", "last_step": "mean"}, "last_step = mean .* flow-heun: it takes heun or euler"),
        ({"sampler": "heun", "last_step": "mean"}, "it is of flow-heun or flow-sde or flow-sde-heun; leave it out"),
        ({"sampler": "flow-euler", "diffusion_form": "sigma"}, "it is of flow-sde or flow-sde-heun; leave it out"),
        (
            {"sampler": "flow-dopri5", "steps": 50},
            "steps = 50: flow-dopri5 chooses its steps by sampling.tolerance; lea",
        ),
        ({"sampler": "flow-heun", "tolerance": 0.01}, "tolerance = 0.01 is of flow-dopri5, and flow-heun takes steps"),
        ({"sampler": "flow-sde", "sigma_max": 0.04}, "sigma_min = 0.041666.* must be below sampling.sigma_max = 0.04"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, complaint):
    with pytest.raises(UsageError, match=complaint):
        build("flow").check_sampling(SamplingRecipe(**options))


def test_other_models_have_no_flow_s_time():
    with pytest.raises(UsageError, match="flow-sde moves in flow matching's time and needs a model of precond flow or"):
        build("vp").check_sampling(SamplingRecipe(sampler="flow-sde"))


def test_another_sampler_drops_a_file_s_last_step():
    stored = SamplingRecipe(sampler="flow-sde", last_step="mean", diffusion_form="decreasing")
    assert stored.merged(sampler="flow-heun") == SamplingRecipe(sampler="flow-heun")
    assert stored.merged(sampler="flow-sde-heun").last_step == "mean"
    adaptive = SamplingRecipe(sampler="flow-dopri5", tolerance=1e-4)
    assert adaptive.merged(sampler="flow-heun") == SamplingRecipe(sampler="flow-heun")
    assert SamplingRecipe(sampler="flow-heun", steps=9).merged(sampler="flow-dopri5").steps is None


@pytest.mark.parametrize("name", sorted(name for name in samplers.SAMPLERS if name.startswith("flow")))
@torch.no_grad()
def test_guided_samples_do_not_depend_on_their_batch(name):
    """A gradient at infinite noise, where the guide is not asked, would be multiplied by 1e8."""
    guide = GradientGuide(lambda x_vp, t, label: x_vp.flatten(1).sum(1), 0.1, 0.1, time_min=0.0)
    model, spec = build("flow").guided_by([guide]), SamplingRecipe(sampler=name, steps=6)
    if name != "flow-dopri5":  # whose cost shows only as it runs
        assert model.passes(spec) == samplers.SAMPLERS[name].evaluations * 6 - (name == "flow-sde-heun")
    together = model.sample(torch.tensor([-1, -1]), RowRng([1, 2]), spec)
    alone = model.sample(torch.tensor([-1]), RowRng([2]), spec)
    assert_close(together.x[1:], alone.x, rtol=1e-5, atol=1e-5)
    assert (together.x - build("flow").sample(torch.tensor([-1, -1]), RowRng([1, 2]), spec).x).abs().max() < 10
