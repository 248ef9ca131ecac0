"""The sampler of the variance-preserving SDE in its own frame and time, as score_sde draws (arXiv 2011.13456).

Torch is imported for its types only; see `samplers`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ddo_cli.diffusion.trace import Denoiser

if TYPE_CHECKING:
    from torch import Tensor

    from ddo_cli.diffusion.churn import Churn


BETA_0, BETA_1 = 0.1, 20.0  # of beta(t) = BETA_0 + (BETA_1 - BETA_0) t, see `vp_sde`


def euler_maruyama(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """Euler and Maruyama's rule for the reverse SDE, then a step of the ODE without noise: n + 1 evaluations.

        dy = -beta (y / 2 + s) dt + sqrt(beta) dw,   y = x / sqrt(1 + sigma^2),   s = score of y

    As published, each of the n steps has length 1 / n, although the times from 1 to 1e-5 lie 1 / (n - 1) apart. The
    last step starts from the mean of the one before, at the same t: y <- (2 - sqrt(1 - G)) y + G s / 2, G = t beta.
    """
    assert churn is not None, "it needs a source of noise"
    n = len(sigmas) - 1

    def score(y: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
        scale = (1 + sigma**2).sqrt()
        negative_noise = (denoise(scale * y, sigma, stage) / scale - y) * scale / sigma
        return negative_noise / _published_std(_time_of(sigma)).to(y.dtype)

    y = x / (1 + sigmas[0] ** 2).sqrt()
    mean = y
    for sigma in sigmas[:-1]:
        beta = BETA_0 + (BETA_1 - BETA_0) * float(_time_of(sigma))
        mean = y + beta / n * (y / 2 + score(y, sigma))
        y = mean + math.sqrt(beta / n) * churn.eps(y)
    sigma = sigmas[-2]
    t = float(_time_of(sigma))
    g = t * (BETA_0 + (BETA_1 - BETA_0) * t)
    return (2 - math.sqrt(1 - g)) * mean + g / 2 * score(mean, sigma)


def _time_of(sigma: Tensor) -> Tensor:
    """`vp_sde.time_of`, which recipes' table of samplers may not import."""
    b = sigma.double().square().log1p()
    return 2 * b / (BETA_0 + (BETA_0**2 + 2 * (BETA_1 - BETA_0) * b).sqrt())


def _published_std(t: Tensor) -> Tensor:
    """s(t) as score_sde's program computes it, in float32: at t = 1e-5 0.6 % too large, which its samples show."""
    t = t.float()
    log_mean = -0.25 * t**2 * (BETA_1 - BETA_0) - 0.5 * t * BETA_0
    return (1 - (2 * log_mean).exp()).sqrt()
