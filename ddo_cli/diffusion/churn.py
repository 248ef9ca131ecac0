"""EDM's stochasticity: noise added before a step (arXiv 2206.00364, algorithm 2), and boosting by a discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ddo_cli.diffusion.trace import Trace, filled, rows_of
from ddo_cli.rng import RowRng
from ddo_cli.transfer import to_device


class Boost(NamedTuple):
    """Boosting of samples that look generated, i.e. whose log-ratio is negative (arXiv 2211.17091).

    Every `churn_period` steps they are churned by `s_churn` and `s_noise`; every `weight_period` steps their guidance
    is multiplied by `factor`. Defaults: the published CIFAR-10 runs.
    """

    churn_period: int = 5
    weight_period: int = 2
    s_churn: float = 4.0
    s_noise: float = 1.0
    factor: float = 2.0


@dataclass
class Churn:
    """The source of a sampler's noise: raises the noise level by a factor 1 + gamma before a step.

    With `boost`, samples whose last log-ratio in `trace` is negative get another gamma, so that the noise level becomes
    a vector (B,). round_sigma: to the nearest noise levels that the network knows.
    """

    s_churn: float
    s_min: float
    s_max: float
    s_noise: float
    rng: RowRng
    boost: Boost | None = None
    trace: Trace = field(default_factory=Trace)
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma
    step: int = 0
    num_steps: int | None = None  # of the whole run, where a sampler is called for parts of it

    def __call__(self, x: Tensor, sigma: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        """(x_hat, sigma_hat), sigma_hat scalar or (B,). Draws nothing if s_churn is 0 and nothing is boosted."""
        if self.s_churn == 0 and self.boost is None:
            return x, sigma
        inside = bool(self.s_min <= sigma <= self.s_max)
        if not inside and x.dtype == torch.float32 and self.boost is None:
            return x, sigma  # EDM2's sampler, the float32 one, draws inside the window only
        # Drawn at every step, inside the window or not, so that the window does not shift the later noise.
        eps = self.eps(x)
        gamma: float | Tensor = _gamma(self.s_churn, self.num_steps or num_steps)
        s_noise: float | Tensor = self.s_noise
        if self.boost is not None:
            gammas = sigma.new_tensor([gamma, _gamma(self.boost.s_churn, num_steps)])  # of others, of boosted samples
            self.trace.levels = self.round_sigma(sigma * (1 + gammas * inside))
            gamma, s_noise = filled(gammas[0], x), filled(sigma.new_tensor(s_noise), x)  # (B,)
            if self.trace.log_ratio is not None and self.step % self.boost.churn_period == 0:
                boosted = self.trace.log_ratio < 0
                gamma = gamma.masked_fill(boosted, float(gammas[1]))
                s_noise = s_noise.masked_fill(boosted, self.boost.s_noise)
            self.step += 1
        sigma_hat = self.round_sigma(sigma * (1 + gamma * inside))
        added = (sigma_hat**2 - sigma**2).clamp(min=0).sqrt() * s_noise
        return x + rows_of(added, x) * eps, sigma_hat

    def eps(self, x: Tensor) -> Tensor:
        """Fresh standard normal numbers of x's shape, each row's from its own generator."""
        return to_device(self.rng.randn(x.shape[1:], dtype=x.dtype), x.device)


def _gamma(s_churn: float, num_steps: int) -> float:
    return min(s_churn / num_steps, math.sqrt(2) - 1)
