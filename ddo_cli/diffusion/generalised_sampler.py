"""EDM's generalised sampler, in which its ablations are special cases (arXiv 2206.00364, algorithm 1 and table 1).

An image is x = s(t) (x0 + sigma(t) noise). Step times, noise schedule sigma(t), scaling s(t) and solver are chosen
apart from one another: the published baselines were drawn so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddo_cli.diffusion.churn import Churn
from ddo_cli.diffusion.precond import cosine_sigmas
from ddo_cli.diffusion.schedules import karras_sigmas
from ddo_cli.diffusion.trace import Denoiser, rows_of

Discretization = Literal["vp", "ve", "iddpm", "edm"]
Schedule = Literal["vp", "ve", "linear"]
Scaling = Literal["vp", "none"]

EPSILON = 1e-3  # smallest time of the VP schedule
RANGES = {"vp": None, "ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}  # default noise levels
_VP_SLOPE, _VP_START = 19.9, 0.1  # beta_d and beta_min of the VP schedule; vp's default range is what they give


class Choice(NamedTuple):
    """What is chosen. step_ratio: where Heun's second evaluation lies, 1 = the end of the step."""

    discretization: Discretization = "edm"
    schedule: Schedule = "linear"
    scaling: Scaling = "none"
    step_ratio: float = 1.0
    heun: bool = True
    rho: float = 7.0


class _Vp(NamedTuple):
    """The VP noise schedule: sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""

    slope: float
    start: float

    @classmethod
    def between(cls, low: float, high: float) -> _Vp:
        """With sigma(EPSILON) = low and sigma(1) = high."""
        at_low, at_high = math.log(low**2 + 1), math.log(high**2 + 1)
        slope = 2 * (at_low / EPSILON - at_high) / (EPSILON - 1)
        return cls(slope, at_high - slope / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return ((self.slope / 2 * t**2 + self.start * t).exp() - 1).sqrt()

    def rate(self, t: Tensor) -> Tensor:
        """dsigma/dt."""
        sigma = self.sigma(t)
        return (self.start + self.slope * t) / 2 * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return ((self.start**2 + 2 * self.slope * (sigma**2 + 1).log()).sqrt() - self.start) / self.slope


class _Curve(NamedTuple):
    """A noise schedule: sigma(t), its derivative, and its inverse."""

    sigma: Callable[[Tensor], Tensor]
    rate: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]


def default_range(discretization: Discretization) -> tuple[float, float]:
    """Smallest and largest noise level of a discretization, where none is given."""
    if (found := RANGES[discretization]) is not None:
        return found
    low, high = _Vp(_VP_SLOPE, _VP_START).sigma(torch.tensor([EPSILON, 1.0], dtype=torch.float64)).tolist()
    return low, high


def levels(choice: Choice, n: int, low: float, high: float) -> Tensor:
    """The noise levels of n steps, decreasing, (n,) float64."""
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    if choice.discretization == "vp":
        return _Vp.between(low, high).sigma(1 + ramp * (EPSILON - 1))
    if choice.discretization == "ve":
        return high * (low / high) ** ramp  # evenly spaced in log sigma
    if choice.discretization == "iddpm":
        u = cosine_sigmas(dtype=torch.float64).flip(0)
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
    curve = _curve(choice, *span)
    times = torch.cat([curve.time(sigmas), sigmas.new_zeros(1)])

    def scale(t: Tensor) -> Tensor:
        return 1 / (1 + curve.sigma(t) ** 2).sqrt() if choice.scaling == "vp" else torch.ones_like(t)

    def slope(x: Tensor, t: Tensor, stage: str) -> Tensor:
        sigma, rate, s = rows_of(curve.sigma(t), x), rows_of(curve.rate(t), x), rows_of(scale(t), x)
        shrinking = -sigma * rate * s**2 if choice.scaling == "vp" else torch.zeros_like(s)  # s' / s
        return (rate / sigma + shrinking) * x - rate * s / sigma * denoise(x / s, curve.sigma(t), stage=stage)

    x = latent * sigmas[0] * scale(times[0])
    for t, t_next in pairwise(times):
        # Churn raises the level of x0 + sigma noise, so the scaling is taken off before and put on after.
        raised, sigma_hat = churn(x / scale(t), curve.sigma(t), len(sigmas))
        t_hat = curve.time(sigma_hat)
        x_hat = rows_of(scale(t_hat), x) * raised
        h = rows_of(t_next - t_hat, x)
        first = slope(x_hat, t_hat, "predictor")
        x = x_hat + h * first
        if choice.heun and t_next > 0:
            between = t_hat + choice.step_ratio * (t_next - t_hat)
            second = slope(x_hat + choice.step_ratio * h * first, between, "corrector")
            part = 1 / (2 * choice.step_ratio)
            x = x_hat + h * ((1 - part) * first + part * second)
    return x


def _curve(choice: Choice, low: float, high: float) -> _Curve:
    if choice.schedule == "vp":
        vp = _Vp.between(low, high)
        return _Curve(vp.sigma, vp.rate, vp.time)
    if choice.schedule == "ve":
        return _Curve(torch.sqrt, lambda t: 1 / (2 * t.sqrt()), torch.square)
    return _Curve(lambda t: t, torch.ones_like, lambda sigma: sigma)
