"""EDM's generalised sampler, in which its ablations are special cases (arXiv 2206.00364, algorithm 1 and table 1).

A noisy image is x = s(t) (x0 + sigma(t) noise). Step times, noise schedule sigma(t), scaling s(t) and solver are chosen
independently; EDM's published baselines were drawn so.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddo_cli.diffusion.churn import Churn
from ddo_cli.diffusion.precond import edm_cosine_sigmas
from ddo_cli.diffusion.schedules import karras_sigmas
from ddo_cli.diffusion.trace import Denoiser, rows_of
from ddo_cli.diffusion.vp_sde import VpSchedule

Function = Callable[[Tensor], Tensor]

EPSILON = 1e-3  # smallest time of the VP schedule
RANGES = {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}  # default noise levels


class Choice(NamedTuple):
    """The parts of a sampler, named as in `SamplingRecipe`.

    step_ratio: where in a step Heun's second evaluation lies, 1 = at its end. rho: of discretization edm.
    """

    discretization: str = "edm"
    schedule: str = "linear"
    scaling: str = "none"
    step_ratio: float = 1.0
    heun: bool = True
    rho: float = 7.0


def default_range(discretization: str) -> tuple[float, float]:
    """Smallest and largest noise level of a discretization, where none is given."""
    if discretization != "vp":
        return RANGES[discretization]
    low, high = VpSchedule().sigma(torch.tensor([EPSILON, 1.0], dtype=torch.float64)).tolist()
    return low, high


def levels(choice: Choice, n: int, low: float, high: float) -> Tensor:
    """The noise levels of n steps, decreasing, (n,) float64."""
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    if choice.discretization == "vp":
        return VpSchedule.between(low, high, EPSILON).sigma(1 + ramp * (EPSILON - 1))
    if choice.discretization == "ve":
        return high * (low / high) ** ramp  # evenly spaced in log sigma
    if choice.discretization == "iddpm":
        u = edm_cosine_sigmas(dtype=torch.float64).flip(0)
        u = u[(u >= low) & (u <= high)]
        return u[((len(u) - 1) * ramp).round().to(torch.int64)]
    return karras_sigmas(n, low, high, choice.rho)[:-1]


def sample(
    denoise: Denoiser, latent: Tensor, sigmas: Tensor, span: tuple[float, float], choice: Choice, churn: Churn
) -> Tensor:
    """x0 of a standard normal latent (B, ...).

    sigmas: `levels` of the span, rounded to those that the network knows. span: smallest and largest noise level.
    dx/dt = (sigma' / sigma + s' / s) x - (sigma' s / sigma) D(x / s; sigma), from sigmas[0] down to 0.
    """
    sigma_of, rate_of, time_of = _noise_schedule(choice, *span)
    times = torch.cat([time_of(sigmas), sigmas.new_zeros(1)])

    def scale(t: Tensor) -> Tensor:
        return 1 / (1 + sigma_of(t) ** 2).sqrt() if choice.scaling == "vp" else torch.ones_like(t)

    def slope(x: Tensor, t: Tensor, stage: str) -> Tensor:
        sigma, rate, s = rows_of(sigma_of(t), x), rows_of(rate_of(t), x), rows_of(scale(t), x)
        scale_rate = -sigma * rate * s**2 if choice.scaling == "vp" else torch.zeros_like(s)  # s' / s
        return (rate / sigma + scale_rate) * x - rate * s / sigma * denoise(x / s, sigma_of(t), stage=stage)

    x = latent * sigmas[0] * scale(times[0])
    for t, t_next in pairwise(times):
        # Churn raises the level of x0 + sigma noise, so the scaling is taken off before and put on after.
        raised, sigma_hat = churn(x / scale(t), sigma_of(t), len(sigmas))
        t_hat = time_of(sigma_hat)
        x_hat = rows_of(scale(t_hat), x) * raised
        h = rows_of(t_next - t_hat, x)
        first = slope(x_hat, t_hat, "predictor")
        x = x_hat + h * first
        if choice.heun and t_next > 0:
            t_second = t_hat + choice.step_ratio * (t_next - t_hat)
            second = slope(x_hat + choice.step_ratio * h * first, t_second, "corrector")
            share = 1 / (2 * choice.step_ratio)
            x = x_hat + h * ((1 - share) * first + share * second)
    return x


def _noise_schedule(choice: Choice, low: float, high: float) -> tuple[Function, Function, Function]:
    """sigma(t), its derivative, and its inverse."""
    if choice.schedule == "vp":
        vp = VpSchedule.between(low, high, EPSILON)
        return vp.sigma, vp.rate, vp.time
    if choice.schedule == "ve":
        return torch.sqrt, lambda t: 1 / (2 * t.sqrt()), torch.square
    return lambda t: t, torch.ones_like, lambda sigma: sigma
