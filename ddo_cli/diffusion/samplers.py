"""Samplers: functions of a denoiser, a state and decreasing noise levels. Adding one touches this file only.

State and noise levels are float64, as in EDM's reference sampler, so that the number of steps is limited by the
network's accuracy and not by the integrator's rounding; or float32, as in EDM2's. The denoiser casts for its network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddo_cli.diffusion.dpm_v3 import dpm_v3
from ddo_cli.rng import RowRng


class Denoiser(Protocol):
    """D(x; sigma) with the label and network already bound.

    sigma: scalar, or (B,) where samples differ. stage: "predictor" or "corrector", the evaluation of a step that this
    is; guides may weigh them differently.
    """

    def __call__(self, x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor: ...


class Boost(NamedTuple):
    """Discriminator guidance's boosting of samples that look generated, i.e. whose log-ratio is negative.

    Every `churn_period` steps they are churned by `s_churn` and `s_noise`; every `weight_period` steps their guidance
    is multiplied by `factor`. Defaults: the published CIFAR-10 runs.
    """

    churn_period: int = 5
    weight_period: int = 2
    s_churn: float = 4.0
    s_noise: float = 1.0
    factor: float = 2.0


@dataclass
class Trace:
    """What guides and sampler tell one another while a batch is drawn, and the network passes spent on it."""

    nfe: int = 0
    disc_nfe: int = 0
    variance: Tensor | None = None  # of the last network pass: where log variance lies in its range, in [-1, 1]
    log_ratio: Tensor | None = None  # (B,), of the last predictor evaluation; +inf outside the guide's window


class Churn:
    """EDM's stochasticity (algorithm 2): raise the noise level by a factor 1 + gamma before a step.

    With `boost`, samples whose last log-ratio in `trace` is negative get a gamma of their own, so that the noise level
    becomes a vector (B,).
    """

    def __init__(
        self,
        s_churn: float,
        s_min: float,
        s_max: float,
        s_noise: float,
        rng: RowRng,
        boost: Boost | None = None,
        trace: Trace | None = None,
        round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,
    ):
        """round_sigma: to the levels that the network knows."""
        self.round_sigma = round_sigma
        self.s_churn, self.s_min, self.s_max, self.s_noise, self.rng = s_churn, s_min, s_max, s_noise, rng
        self.boost, self.trace, self.step = boost, trace or Trace(), 0

    def __call__(self, x: Tensor, sigma: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """(x_hat, sigma_hat), sigma_hat scalar or (B,). Nothing is drawn where there can be no churn at all."""
        if self.s_churn == 0 and self.boost is None:
            return x, sigma
        inside = bool(self.s_min <= sigma <= self.s_max)
        if not inside and x.dtype == torch.float32 and self.boost is None:
            return x, sigma  # EDM2's sampler, the float32 one, draws inside the window only
        # Drawn at every step, inside the window or not, so that the window does not shift the later noise.
        eps = self.eps(x)
        if self.boost is None:
            gamma = _gamma(self.s_churn, num_steps) if inside else 0.0
            sigma_hat = self.round_sigma(sigma * (1 + gamma))
            return x + (sigma_hat**2 - sigma**2).clamp(min=0).sqrt() * self.s_noise * eps, sigma_hat
        raised = self._raised(x, self.boost)  # (B,)
        self.step += 1
        own = _gamma(self.s_churn, num_steps), _gamma(self.boost.s_churn, num_steps)
        gammas = torch.where(raised, sigma.new_tensor(own[1]), sigma.new_tensor(own[0])) * inside  # (B,)
        s_noise = torch.where(raised, sigma.new_tensor(self.boost.s_noise), sigma.new_tensor(self.s_noise))
        sigma_hat = self.round_sigma(sigma * (1 + gammas))
        added = (sigma_hat**2 - sigma**2).clamp(min=0).sqrt() * s_noise
        return x + rows_of(added, x) * eps, sigma_hat

    def eps(self, x: Tensor) -> Tensor:
        """Fresh standard normal numbers of x's shape, each row's from its own generator."""
        return self.rng.randn(x.shape[1:], dtype=x.dtype).to(x.device)

    def _raised(self, x: Tensor, boost: Boost) -> Tensor:
        last = self.trace.log_ratio
        if last is None or self.step % boost.churn_period:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return last < 0


def _gamma(s_churn: float, num_steps: int) -> float:
    return min(s_churn / num_steps, math.sqrt(2) - 1)


def rows_of(values: Tensor, x: Tensor) -> Tensor:
    """One value per row, (B,) or scalar, in a shape that multiplies x (B, ...)."""
    return values if values.ndim == 0 else values.view(-1, *[1] * (x.ndim - 1))


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """First-order integration of dx/dsigma = (x - D) / sigma; one evaluation a step."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma = churn(x, sigma, len(sigmas) - 1) if churn else (x, sigma)
        level = rows_of(sigma, x)
        slope = (x - denoise(x, sigma)) / level
        x = x + (sigma_next - level) * slope
    return x


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """EDM's algorithm 2: second order, 2 n - 1 evaluations (arXiv 2206.00364)."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma = churn(x, sigma, len(sigmas) - 1) if churn else (x, sigma)
        level = rows_of(sigma, x)
        slope = (x - denoise(x, sigma)) / level
        x_next = x + (sigma_next - level) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next, stage="corrector")) / sigma_next
            x_next = x + (sigma_next - level) * (slope + slope_next) / 2
        x = x_next
    return x


def ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None, eta: float = 0.0) -> Tensor:
    """DDIM (eta 0, arXiv 2010.02502) and DDPM (eta 1, arXiv 2006.11239); one evaluation each.

    In the variance-exploding frame x_t / sqrt(alpha_bar_t) the mean of either is an Euler step to sigma_down, and
    sigma_down^2 + sigma_up^2 = sigma_next^2 with sigma_up = eta sigma_next sqrt(1 - sigma_next^2 / sigma^2). This is
    the smaller of DDPM's variances; a network that has learnt its variance says where between it and the larger one
    the noise of eta = 1 lies (arXiv 2102.09672, eq. 15).
    """
    for sigma, sigma_next in pairwise(sigmas):
        up = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
        down = (sigma_next**2 - up**2).clamp(min=0).sqrt()
        slope = (x - denoise(x, sigma)) / sigma
        x = x + (down - sigma) * slope
        if up > 0:
            assert churn is not None, "eta > 0 needs a source of noise"
            share = churn.trace.variance
            deviation = up if share is None or eta != 1 else _learned_deviation(share.to(x), sigma, sigma_next)
            x = x + deviation * churn.eps(x)
    return x


def _learned_deviation(share: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Deviation of DDPM's noise whose log variance lies at `share` in [-1, 1] between its bounds, of share's shape.

    In the variance-exploding frame beta~ reads sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2, and beta
    (1 + sigma_next^2) (sigma^2 - sigma_next^2) / (1 + sigma^2).
    """
    difference = sigma**2 - sigma_next**2
    smaller = (sigma_next**2 * difference / sigma**2).log()
    larger = ((1 + sigma_next**2) * difference / (1 + sigma**2)).log()
    f = (share + 1) / 2
    return ((f * larger + (1 - f) * smaller) / 2).exp()


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """DPM-Solver++(2M), data prediction, one evaluation a step (arXiv 2211.01095, algorithm 2).

    With lambda = -log sigma and h = lambda_next - lambda, in the variance-exploding frame (alpha = 1):
    x <- (sigma_next / sigma) x + (1 - e^-h) ((1 + 1 / 2r) D - (1 / 2r) D_last),  r = h_last / h.
    """
    last: Tensor | None = None
    h_last = torch.zeros(())
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised  # h is infinite: the first-order step lands on D
        h = sigma.log() - sigma_next.log()
        direction = denoised
        if last is not None:
            half_ratio = h / (2 * h_last)
            direction = (1 + half_ratio) * denoised - half_ratio * last
        x = sigma_next / sigma * x - torch.expm1(-h) * direction
        last, h_last = denoised, h
    return x


Sampler = Callable[[Denoiser, Tensor, Tensor, "Churn | None"], Tensor]
SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "dpmpp-2m": dpmpp_2m,
    "dpm-v3": dpm_v3,
    "ddim": partial(ancestral, eta=0.0),
    "ddpm": partial(ancestral, eta=1.0),
}
CHURNED = ("euler", "heun")  # the samplers that churn
