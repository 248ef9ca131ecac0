"""Samplers integrate fields whose solution is known, and reproduce EDM's published golden values."""

import math
from itertools import pairwise

import pytest
import test_dit
import torch
from conftest import CPU, make_checkpoint
from torch import nn
from torch.testing import assert_close

from ddo_cli.cli import main
from ddo_cli.codec import Codec
from ddo_cli.diffusion import denoiser, guidance, samplers, vp_sde
from ddo_cli.diffusion.churn import Churn
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.schedules import karras_sigmas, snapped_sigmas, vp_sigmas
from ddo_cli.errors import UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng


def test_karras_sigmas_of_edm():
    # The levels of EDM's CIFAR-10 run, 18 steps, sigma 0.002 to 80.
    expected = [80, 57.585985, 40.785574, 28.374585, 19.352453, 12.910082, 8.4009353, 5.3151945, 3.2568215]
    expected += [1.9233398, 1.0881706, 0.58534812, 0.29644228, 0.13951647, 0.059947311, 0.022934518, 0.00752802]
    expected += [0.002, 0]
    assert_close(karras_sigmas(18, 0.002, 80), torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-7)


def gaussian(x, sigma, stage="predictor"):
    """Denoiser of N(0, 0.5^2): the flow from sigma to 0 scales x by 0.5 / sqrt(0.25 + sigma^2)."""
    return x * 0.25 / (0.25 + sigma**2)


@pytest.mark.parametrize(("name", "steps", "order"), [("euler", 40, 1), ("heun", 20, 2), ("dpmpp-2m", 20, 2)])
def test_order_of_convergence_on_a_gaussian(name, steps, order):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None] * 10

    def error(n):
        # The last step to 0 is first order in each of them; end at sigma_min where the exact flow is known too.
        sigmas = karras_sigmas(n, 0.05, 10.0)[:-1]
        exact = x * math.sqrt((0.25 + 0.05**2) / (0.25 + 10.0**2))
        return (samplers.SAMPLERS[name].integrate(gaussian, x, sigmas, None) - exact).abs().max().item()

    ratio = error(steps) / error(2 * steps)
    assert ratio == pytest.approx(2**order, rel=0.35)


def hash_uniform(i, j):
    """The deterministic numbers of the parity vectors: u(i, j) by 32-bit integer hashing."""
    mask = 2**32 - 1
    h = ((j + 1) * 2654435761 + (i + 1) * 2246822519) & mask
    h ^= h >> 16
    h = h * 2246822507 & mask
    h ^= h >> 13
    h = h * 3266489909 & mask
    h ^= h >> 16
    return (h + 0.5) / 2**32


def stream(s, shape):
    n = math.prod(shape)
    values = [(2 * hash_uniform(1_000_000 + s, j) - 1) * math.sqrt(3) for j in range(n)]
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).view(shape)


def analytic(x, sigma, stage="predictor"):
    """The denoiser of the parity vectors, evaluated in float32 as a network would be."""
    x32, s = x.to(torch.float32), torch.as_tensor(sigma).to(torch.float32)
    d = 0.25 * x32 / (s**2 + 0.25) + 0.3 * s / (1 + s) * torch.tanh(x32)
    return d.to(torch.float64)


class FixedNoise:
    """Stands in for RowRng: the k-th draw is stream(100 + k), k = 1, 2, ..."""

    def __init__(self):
        self.k = 0

    def randn(self, shape, dtype):
        self.k += 1
        return stream(100 + self.k, (2, *shape)).to(dtype)


def test_parity_with_edm_deterministic():
    x = stream(3, (2, 3, 4, 4)).double()
    sigmas = karras_sigmas(18, 0.002, 80)
    found = samplers.heun(analytic, x * sigmas[0], sigmas)
    flat = found.flatten()
    # Numbers of EDM's own sampler on this denoiser; they are printed with 6 digits.
    assert_close(
        flat[:4], torch.tensor([-0.590208, 1.09064, 0.254791, 1.11102], dtype=torch.float64), atol=0, rtol=1e-5
    )
    assert_close(flat[-2:], torch.tensor([0.164395, 0.587294], dtype=torch.float64), atol=0, rtol=1e-5)
    assert_close(found.mean().item(), 0.05115117, atol=0, rtol=1e-5)
    assert_close(found.std(correction=0).item(), 0.7215595, atol=0, rtol=1e-5)


def test_parity_with_edm_churn():
    x = stream(3, (2, 3, 4, 4)).double()
    sigmas = karras_sigmas(32, 0.002, 80)
    churn = Churn(40, 0.05, 50, 1.003, FixedNoise())
    found = samplers.heun(analytic, x * sigmas[0], sigmas, churn)
    flat = found.flatten()
    expected = torch.tensor([0.437542, 1.08903, 0.0907073, 0.623781], dtype=torch.float64)
    assert_close(flat[:4], expected, atol=0, rtol=1e-5)
    assert_close(found.mean().item(), 0.05731784, atol=0, rtol=1e-5)
    assert_close(found.std(correction=0).item(), 0.6085659, atol=0, rtol=1e-5)


def test_churn_off_draws_nothing():
    rng = RowRng([1, 2])
    before = [generator.get_state() for generator in rng.generators]
    churn = Churn(0.0, 0.0, math.inf, 1.0, rng)
    samplers.heun(gaussian, torch.ones(2, 3, dtype=torch.float64), karras_sigmas(4, 0.1, 1.0), churn)
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, rng.generators, strict=True))


def test_heun_marks_its_stages():
    stages = []

    def denoise(x, sigma, stage="predictor"):
        stages.append(stage)
        return gaussian(x, sigma)

    samplers.heun(denoise, torch.ones(1, 1, dtype=torch.float64), karras_sigmas(3, 0.1, 1.0))
    assert stages == ["predictor", "corrector", "predictor", "corrector", "predictor"]  # 2 n - 1


def test_classifier_free_guidance_extrapolates():
    def conditional(x, sigma, stage="predictor"):
        return x + 1

    def unconditional(x, sigma, stage="predictor"):
        return x

    x = torch.zeros(3)
    pair = guidance.in_turn(conditional, unconditional)
    assert_close(guidance.extrapolated(conditional, pair, 1.0)(x, torch.ones(())), x + 1)
    assert_close(guidance.extrapolated(conditional, pair, 2.5)(x, torch.ones(())), x + 2.5)
    assert_close(guidance.extrapolated(conditional, pair, 0.0)(x, torch.ones(())), x)


# ---------------------------------------------------------------------------------------------------------------------
# VP spacing, DDIM and DDPM


def unchurned(rng):
    """What ddpm draws its noise from."""
    return Churn(0.0, 0.0, math.inf, 1.0, rng)


def test_vp_sigmas_are_evenly_spaced_in_time():
    sigmas = vp_sigmas(20, 0.002, 80)
    assert sigmas.dtype == torch.float64
    assert_close(sigmas[[0, -2, -1]], torch.tensor([80, 0.002, 0], dtype=torch.float64), rtol=1e-12, atol=0)
    steps = vp_sde.time_of(sigmas[:-1]).diff()
    assert_close(steps, torch.full((19,), -(0.933511143 - 0.000039842) / 19, dtype=torch.float64), rtol=1e-8, atol=0)
    assert_close(vp_sigmas(1, 0.002, 80), torch.tensor([80, 0], dtype=torch.float64))


@pytest.mark.parametrize("sigmas", [karras_sigmas(12, 0.002, 80), vp_sigmas(12, 0.002, 80)])
def test_ddim_is_euler_in_the_variance_exploding_frame(sigmas):
    x = stream(3, (2, 3, 4, 4)).double() * sigmas[0]
    rng = FixedNoise()
    found = samplers.SAMPLERS["ddim"].integrate(analytic, x, sigmas, unchurned(rng))
    assert_close(found, samplers.euler(analytic, x, sigmas), rtol=1e-12, atol=1e-12)
    assert rng.k == 0  # nothing was drawn


def textbook(x_vp, alpha_bar, rng, ancestral):
    """DDPM with variance beta-tilde (arXiv 2006.11239, eq. 7) or DDIM (arXiv 2010.02502, eq. 12), in VP coordinates.

    alpha_bar: of steps 1, ..., T, decreasing.
    """
    for i in reversed(range(len(alpha_bar))):
        a = alpha_bar[i]
        a_next = alpha_bar[i - 1] if i else torch.ones((), dtype=torch.float64)
        alpha, beta = a / a_next, 1 - a / a_next
        x0 = analytic(x_vp / a.sqrt(), ((1 - a) / a).sqrt())
        if ancestral:
            mean = a_next.sqrt() * beta / (1 - a) * x0 + alpha.sqrt() * (1 - a_next) / (1 - a) * x_vp
            variance = (1 - a_next) / (1 - a) * beta
            x_vp = mean + variance.sqrt() * rng.randn(x_vp.shape[1:], torch.float64) if i else mean
        else:
            eps = (x_vp - a.sqrt() * x0) / (1 - a).sqrt()
            x_vp = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
    return x_vp


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_parity_with_the_textbook_in_vp_coordinates(name):
    # DDPM's thousand steps, every 20th; a spacing that no schedule of ours has.
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[::20]
    x_vp = stream(3, (2, 3, 4, 4)).double()
    rng = FixedNoise()
    expected = textbook(x_vp, alpha_bar, rng, name == "ddpm")
    sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt().flip(0), torch.zeros(1, dtype=torch.float64)])
    own_rng = FixedNoise()
    found = samplers.SAMPLERS[name].integrate(analytic, x_vp / alpha_bar[-1].sqrt(), sigmas, unchurned(own_rng))
    # The denoiser is float32; its input differs in the last bits of float64, so that its answer may round otherwise.
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert own_rng.k == rng.k == (49 if name == "ddpm" else 0)  # none at the last step


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_an_ancestral_step_ends_at_the_next_noise_level(eta):
    class One:
        def randn(self, shape, dtype):
            return torch.ones(1, *shape, dtype=dtype)

    def nothing(x, sigma, stage="predictor"):
        return torch.zeros_like(x)

    sigma, sigma_next = 3.0, 2.0
    sigmas = torch.tensor([sigma, sigma_next], dtype=torch.float64)
    # With D = 0 the state is scaled by sigma_down / sigma, and sigma_up times the noise is added.
    at_zero = torch.zeros(1, 1, dtype=torch.float64)
    up = samplers.ancestral(nothing, at_zero, sigmas, unchurned(One()), eta).item()
    down = samplers.ancestral(nothing, at_zero + sigma, sigmas, unchurned(One()), eta).item() - up
    assert up**2 + down**2 == pytest.approx(sigma_next**2, rel=1e-12)
    assert up == pytest.approx(eta * 2 * math.sqrt(5) / 3, rel=1e-12)
    if eta == 1:
        assert down == pytest.approx(sigma_next**2 / sigma, rel=1e-12)


class OneRowEach:
    """Stands in for RowRng: the k-th draw, k = 1, 2, ..., is 1 in row k and 0 elsewhere."""

    def __init__(self, rows):
        self.rows, self.k = rows, 0

    def randn(self, shape, dtype):
        self.k += 1
        draw = torch.zeros(self.rows, *shape, dtype=dtype)
        draw[self.k] = 1
        return draw


def variance_of(name, n):
    """Variance of samples of N(0, 0.5^2), exactly: each row follows one of the independent sources of randomness."""
    sigmas = vp_sigmas(n, 0.002, 80)
    x = torch.zeros(n + 1, 1, dtype=torch.float64)
    x[0] = math.sqrt(0.25 + 80**2)
    found = samplers.SAMPLERS[name].integrate(gaussian, x, sigmas, unchurned(OneRowEach(n + 1)))
    return found.square().sum().item()


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_ancestral_samplers_reach_the_variance_of_gaussian_data(name):
    errors = [abs(variance_of(name, n) - 0.25) for n in (200, 400, 800)]
    assert errors[2] < 0.02 * 0.25
    # Both are first order: each doubling of the steps halves the error.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Options of a recipe


class Recording(DiffusionModel):
    """The model of `gaussian`, which keeps the noise levels it was asked for."""

    def __init__(self):
        super().__init__(nn.Identity(), Codec((1,)), 0, DiffusionOptions(), DiffusionDrawOptions())
        self.levels = []

    def denoise(self, x, sigma, label):
        self.levels.append(sigma)
        return gaussian(x, sigma)


@pytest.mark.parametrize(
    ("sampler", "spacing", "expected"),
    [
        ("ddim", None, vp_sigmas),
        ("ddpm", None, vp_sigmas),
        ("euler", None, karras_sigmas),
        ("dpmpp-2m", None, karras_sigmas),
        (None, "karras", karras_sigmas),
        ("ddim", "karras", karras_sigmas),
        ("euler", "vp", vp_sigmas),
    ],
)
def test_each_sampler_has_its_spacing_unless_told_otherwise(sampler, spacing, expected):
    model = Recording()
    model.sample(torch.tensor([-1]), RowRng([0]), SamplingRecipe(sampler=sampler, spacing=spacing, steps=5))
    found = torch.stack(model.levels).unique().flip(0)  # heun visits a level twice
    assert_close(found, expected(5, 0.002, 80)[:-1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return registry.load_model(make_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors"), CPU).model


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sampler": "ddim", "s_churn": 10.0}, r"s_churn = 10.0 needs sampler heun or euler; ddim has no churn"),
        ({"sampler": "ddpm", "s_churn": 10.0}, r"ddpm has no churn"),
        ({"sampler": "dpmpp-2m", "s_churn": 10.0}, r"dpmpp-2m has no churn"),
        ({"spacing": "vp", "rho": 7.0}, r"rho = 7.0 curves Karras noise levels; set sampling.spacing = karras"),
        ({"sampler": "ddim", "rho": 7.0}, r"rho = 7.0 curves Karras noise levels"),
        ({"sigma_max": 0.001}, r"sigma_min = 0.002 must be below sampling.sigma_max = 0.001"),
    ],
)
def test_options_that_do_nothing_are_refused(tiny, options, complaint):
    with pytest.raises(UsageError, match=complaint):
        tiny.check_sampling(SamplingRecipe(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"s_churn": 10.0},
        {"sampler": "euler", "s_churn": 10.0, "spacing": "vp"},
        {"sampler": "ddim", "s_churn": 0.0},
        {"sampler": "ddpm", "spacing": "karras", "rho": 5.0},
        {"cfg_scale": 2.0},
    ],
)
def test_options_that_fit_are_accepted(tiny, options):
    tiny.check_sampling(SamplingRecipe(**options))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_batch_does_not_change_an_ancestral_sample(tiny, sampler):
    spec = SamplingRecipe(sampler=sampler, steps=3)
    together = tiny.sample(torch.tensor([1, 2, 3]), RowRng([11, 12, 13]), spec)
    alone = tiny.sample(torch.tensor([2]), RowRng([12]), spec)
    assert together.nfe == 3
    # The network is float32, and its kernels sum in another order for another batch.
    assert_close(together.x[1:2], alone.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0}, {"sampler": "flow-dopri5"}])
@pytest.mark.parametrize("learned", [False, True])
def test_a_large_network_takes_few_rows_at_once(monkeypatch, settings, learned):
    """On a CPU; only rounding changes, and evaluations count as before."""
    model = test_dit.loaded(test_dit.build(precond="flow", **({"learned_variance": True} if learned else {})))
    spec, seen, forward = SamplingRecipe(**{"sampler": "flow-heun", "steps": 2, **settings}), [], model.net.forward
    model.net.forward = lambda x, *rest: seen.append(len(x)) or forward(x, *rest)
    label, seeds = torch.tensor([0, 1, 2, 3, -1]), range(5)
    whole = model.sample(label, RowRng(seeds), spec)
    rows = 10 if "cfg_scale" in settings else 5
    assert set(seen) == {rows}
    seen.clear()
    monkeypatch.setattr(denoiser, "LARGE", 1)
    monkeypatch.setattr(denoiser, "ROWS_IN_CACHE", 3)
    parts = model.sample(label, RowRng(seeds), spec)
    assert seen[: -(-rows // 3)] == [3] * (rows // 3) + [rows % 3]
    assert parts.nfe == whole.nfe
    # Rounding moves an adaptive solver's steps, and with them its error, of about its tolerance.
    assert_close(parts.x, whole.x, rtol=0, atol=2e-3 if spec.sampler == "flow-dopri5" else 1e-4)
    seen.clear()
    model.predict(torch.zeros(5, *model.codec.state_shape), label, model.draw(5, RowRng(seeds)))
    assert seen == [5]  # training sees its rows together


# ---------------------------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("name", sorted(name for name, one in samplers.SAMPLERS.items() if not one.is_adaptive))
def test_the_table_states_evaluations_and_churn(name):
    sampler, stages, rng = samplers.SAMPLERS[name], [], RowRng([0])
    before = rng.generators[0].get_state()

    def denoise(x, sigma, stage="predictor"):
        stages.append(stage)
        return gaussian(x, sigma)

    n, ends_in_0 = 5, sampler.spacing != "snapped" and name != "flow-heun"  # which ends with a corrector, as SiT's
    sigmas = snapped_sigmas(n, 0.1, 1.0) if sampler.spacing == "snapped" else karras_sigmas(n, 0.1, 1.0)
    sampler.integrate(denoise, torch.ones(1, 1).double(), sigmas, Churn(4.0, 0.0, math.inf, 1.0, rng))
    assert stages.count("predictor") == n + (name == "euler-maruyama")  # its last step is one more
    assert stages.count("corrector") == (sampler.evaluations - 1) * (n - ends_in_0)
    assert (not torch.equal(before, rng.generators[0].get_state())) == (
        sampler.churns or name in ("ddpm", "euler-maruyama", "flow-sde", "flow-sde-heun")
    )


def midpoint(denoise, x, sigmas, churn=None):
    """The explicit midpoint rule, its middle at the geometric mean of two levels; Euler's step to 0."""
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        if sigma_next > 0:
            middle = (sigma * sigma_next).sqrt()
            x_middle = x + (middle - sigma) * slope
            slope = (x_middle - denoise(x_middle, middle, stage="corrector")) / middle
        x = x + (sigma_next - sigma) * slope
    return x


def test_adding_a_sampler_is_a_function_and_a_line_of_the_table(tiny, monkeypatch, capsys):
    added = samplers.Sampler("midpoint", midpoint, evaluations=2, steps=40, spacing="steps")
    monkeypatch.setitem(samplers.SAMPLERS, "midpoint", added)
    # Recipes take the name, and drop a file's own settings that it does not read.
    spec = SamplingRecipe(sampler="heun", s_churn=4.0, schedule="vp").merged(sampler="midpoint")
    assert (spec.sampler, spec.s_churn, spec.schedule) == ("midpoint", None, None)
    # A model samples with it, in its own number of steps and spacing.
    model = Recording()
    model.check_sampling(spec)
    found = model.sample(torch.tensor([-1, -1]), RowRng([0, 1]), spec)
    assert found.nfe == model.passes(spec) == 79
    assert_close(torch.stack(model.levels[::2]), vp_sigmas(40, 0.002, 80)[:-1])
    exact = RowRng([0, 1]).randn((1,)).double() * 80 * 0.5 / math.sqrt(0.25 + 80**2)
    assert_close(found.x, exact, rtol=0.05, atol=0)
    # Checks know what it does not do.
    with pytest.raises(UsageError, match=r"s_churn = 4.0 needs sampler heun or euler; midpoint has no churn"):
        tiny.check_sampling(spec.merged(s_churn=4.0))
    with pytest.raises(UsageError, match="EDM's generalised sampler needs sampler heun or euler"):
        tiny.check_sampling(spec.merged(schedule="vp"))
    # Commands name it to those who misspell it, together with other mistakes.
    monkeypatch.setattr("sys.argv", ["ddo", "sample", "--sampler", "midpont", "--steps", "0"])
    with pytest.raises(SystemExit) as stopped:
        main()
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "sampler = 'midpont': no sampler has this name (did you mean 'midpoint'?); known: heun, euler," in message
    assert "steps = 0" in message
