"""Samplers: functions of a denoiser, a state and decreasing noise levels. Adding one touches this file only.

State and noise levels are float64, as in EDM's reference sampler, so that the number of steps is limited by the
network's accuracy and not by the integrator's rounding; the denoiser casts for its network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ddo_cli.rng import RowRng


class Denoiser(Protocol):
    """D(x; sigma) with the label and network already bound.

    stage: "predictor" or "corrector": which evaluation of a step this is; guides may weigh them differently.
    """

    def __call__(self, x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor: ...


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Decreasing noise levels ending in 0, (n + 1,), float64. EDM, eq. 5 (arXiv 2206.00364).

    sigma_min, sigma_max: in model-space units (pixels lie in [-1, 1]), 0 < sigma_min < sigma_max.
    """
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


class Churn:
    """EDM's stochasticity (algorithm 2): raise the noise level by a factor 1 + gamma before a step."""

    def __init__(self, s_churn: float, s_min: float, s_max: float, s_noise: float, rng: RowRng):
        self.s_churn, self.s_min, self.s_max, self.s_noise, self.rng = s_churn, s_min, s_max, s_noise, rng

    def __call__(self, x: Tensor, sigma: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """(x_hat, sigma_hat). Nothing is drawn where there is no churn at all."""
        if self.s_churn == 0:
            return x, sigma
        # Drawn at every step, inside the window or not, so that the window does not shift the later noise.
        eps = self.rng.randn(x.shape[1:], dtype=torch.float64).to(x.device)
        gamma = min(self.s_churn / num_steps, math.sqrt(2) - 1) if self.s_min <= sigma <= self.s_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        return x + (sigma_hat**2 - sigma**2).clamp(min=0).sqrt() * self.s_noise * eps, sigma_hat


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """First-order integration of dx/dsigma = (x - D) / sigma; one evaluation a step."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma = churn(x, sigma, len(sigmas) - 1) if churn else (x, sigma)
        slope = (x - denoise(x, sigma)) / sigma
        x = x + (sigma_next - sigma) * slope
    return x


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """EDM's algorithm 2: second order, 2 n - 1 evaluations (arXiv 2206.00364)."""
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma = churn(x, sigma, len(sigmas) - 1) if churn else (x, sigma)
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next, stage="corrector")) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


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
SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpmpp-2m": dpmpp_2m}
