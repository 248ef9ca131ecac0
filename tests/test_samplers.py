"""Samplers integrate fields whose solution is known, and reproduce EDM's published golden values."""

import math

import pytest
import torch
from torch.testing import assert_close

from ddo_cli.diffusion import guidance, samplers
from ddo_cli.diffusion.samplers import karras_sigmas
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
        return (samplers.SAMPLERS[name](gaussian, x, sigmas, None) - exact).abs().max().item()

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
    churn = samplers.Churn(40, 0.05, 50, 1.003, FixedNoise())
    found = samplers.heun(analytic, x * sigmas[0], sigmas, churn)
    flat = found.flatten()
    expected = torch.tensor([0.437542, 1.08903, 0.0907073, 0.623781], dtype=torch.float64)
    assert_close(flat[:4], expected, atol=0, rtol=1e-5)
    assert_close(found.mean().item(), 0.05731784, atol=0, rtol=1e-5)
    assert_close(found.std(correction=0).item(), 0.6085659, atol=0, rtol=1e-5)


def test_churn_off_draws_nothing():
    rng = RowRng([1, 2])
    before = [generator.get_state() for generator in rng.generators]
    churn = samplers.Churn(0.0, 0.0, math.inf, 1.0, rng)
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
    assert_close(guidance.classifier_free(conditional, unconditional, 1.0)(x, torch.ones(())), x + 1)
    assert_close(guidance.classifier_free(conditional, unconditional, 2.5)(x, torch.ones(())), x + 2.5)
    assert_close(guidance.classifier_free(conditional, unconditional, 0.0)(x, torch.ones(())), x)
