"""The linear VP-SDE on which discriminators are trained, and its relation to the noise levels sigma of a denoiser.

    dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw,   beta(t) = BETA_0 + (BETA_1 - BETA_0) t,   t in [0, 1]
    B(t) = int_0^t beta,   x_t = m(t) x_0 + s(t) z,   m = exp(-B / 2),   s = sqrt(1 - exp(-B))

Dividing by m turns x_t into x_0 + sigma z with sigma = s / m = sqrt(e^B - 1), so every noise level of a denoiser has
its time tau(sigma), and a noisy state x of the denoiser is m x = x / sqrt(1 + sigma^2) for the discriminator.
Score-based SDEs: arXiv 2011.13456, appendix C; importance-sampled times: arXiv 2101.09258, appendix D.

All functions compute in float64, for tensors of any shape: near t = 0 the differences below lose float32's digits.
`VpSchedule` has the formulas of published diffusion code, in the type of its argument.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddo_cli.diffusion.vp_samplers import BETA_0, BETA_1

T_MIN = 1e-5  # smallest time that is trained on
COSINE_S = 0.008  # offset of the cosine schedule (arXiv 2102.09672, eq. 17)
_COSINE_F0 = math.cos(COSINE_S / (1 + COSINE_S) * math.pi / 2) ** 2


def integrated_beta(t: Tensor) -> Tensor:
    """B(t)."""
    t = t.to(torch.float64)
    return (BETA_1 - BETA_0) * t.square() / 2 + BETA_0 * t


def mean_scale(t: Tensor) -> Tensor:
    """m(t), the factor of x_0."""
    return torch.exp(-integrated_beta(t) / 2)


def std(t: Tensor) -> Tensor:
    """s(t), the deviation of the noise; m^2 + s^2 = 1."""
    return torch.sqrt(-torch.expm1(-integrated_beta(t)))


def sigma_of(t: Tensor) -> Tensor:
    """The noise level s / m of time t; the inverse of `time_of`."""
    return torch.expm1(integrated_beta(t)).sqrt()


def time_of(sigma: Tensor) -> Tensor:
    """tau(sigma), the time whose s / m is sigma."""
    return _time_of_integrated_beta(torch.log1p(sigma.to(torch.float64).square()))


def scale_of(sigma: Tensor) -> Tensor:
    """m(tau(sigma)) = 1 / sqrt(1 + sigma^2)."""
    return 1 / (1 + sigma.to(torch.float64).square()).sqrt()


def cosine_time_of(t: Tensor) -> Tensor:
    """The time of the cosine schedule at which the signal is as strong as at time t of the linear one.

    Needed by networks that were trained on the cosine schedule, such as ADM's 64x64 classifier.
    """
    return (1 + COSINE_S) * 2 / math.pi * torch.arccos(math.sqrt(_COSINE_F0) * mean_scale(t)) - COSINE_S


def likelihood_weight(t: Tensor) -> Tensor:
    """lambda(t) = beta(t) / s(t)^2, the weight under which score matching bounds the likelihood (arXiv 2101.09258)."""
    t = t.to(torch.float64)
    return (BETA_0 + (BETA_1 - BETA_0) * t) / -torch.expm1(-integrated_beta(t))


def likelihood_weight_integral(t: Tensor) -> Tensor:
    """An antiderivative of lambda: ln(e^B - 1)."""
    return torch.log(torch.expm1(integrated_beta(t)))


def importance_sampled_time(u: Tensor, t_min: float = T_MIN) -> Tensor:
    """t of density lambda(t) / Z on [t_min, 1], for u uniform in [0, 1).

    A plain mean over such times is the lambda-weighted mean over uniform times divided by Z, so no weight is needed.
    """
    low, high = likelihood_weight_integral(torch.tensor([t_min, 1.0], dtype=torch.float64))
    integral = low + (high - low) * u.to(torch.float64)
    return _time_of_integrated_beta(torch.nn.functional.softplus(integral, threshold=50))  # B = ln(1 + e^A)


class VpSchedule(NamedTuple):
    """sigma(t) = sqrt(e^B - 1) with B(t) = slope t^2 / 2 + start t (arXiv 2206.00364, table 1: beta_d and beta_min).

    Not the stable forms above: published networks and levels were made with these, in their rounding.
    """

    slope: float = BETA_1 - BETA_0
    start: float = BETA_0

    @classmethod
    def between(cls, low: float, high: float, t_low: float) -> "VpSchedule":
        """With sigma(t_low) = low and sigma(1) = high."""
        at_low, at_high = math.log(low**2 + 1), math.log(high**2 + 1)
        slope = 2 * (at_low / t_low - at_high) / (t_low - 1)
        return cls(slope, at_high - slope / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return ((self.slope / 2 * t**2 + self.start * t).exp() - 1).sqrt()

    def rate(self, t: Tensor) -> Tensor:
        """dsigma/dt."""
        sigma = self.sigma(t)
        return (self.start + self.slope * t) / 2 * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`."""
        return ((self.start**2 + 2 * self.slope * (sigma**2 + 1).log()).sqrt() - self.start) / self.slope


NoiseDistribution = Literal["normal", "logistic"]
LOGISTIC_TAIL = 1e-4  # probability of each tail that is cut


def logistic(u: Tensor) -> Tensor:
    """Logistic numbers without their tails, of u's shape and type, for u uniform in [0, 1)."""
    return torch.logit(LOGISTIC_TAIL + (1 - 2 * LOGISTIC_TAIL) * u)


class TimeLaw(NamedTuple):
    """Density of the times to train at.

    name: "importance": lambda / Z, see `importance_sampled_time`; "uniform" on [t_min, 1]; "model": the times of
    sigma = exp(p_mean + p_std n), n of the model's own distribution.
    weighted: rows carry weights that make the expected loss that of "importance", with more variance.
    """

    name: Literal["importance", "uniform", "model"]
    weighted: bool = False
    t_min: float = T_MIN
    p_mean: float = 0.0
    p_std: float = 1.0
    distribution: NoiseDistribution = "normal"

    def times(self, u: Tensor) -> "Times":
        """Times for u (B,) uniform in [0, 1), increasing in u."""
        u = u.to(torch.float64)
        low, high = likelihood_weight_integral(torch.tensor([self.t_min, 1.0], dtype=torch.float64))  # ln sigma^2
        if self.name == "importance":
            return Times(importance_sampled_time(u, self.t_min), None)
        if self.name == "uniform":
            t = self.t_min + (1 - self.t_min) * u
            return Times(t, likelihood_weight(t) * (1 - self.t_min) / (high - low) if self.weighted else None)
        n = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)) if self.distribution == "normal" else logistic(u)
        log_sigma = self.p_mean + self.p_std * n
        t = time_of(log_sigma.exp()).clamp(max=1.0)
        if not self.weighted:
            return Times(t, None)
        # lambda = d(ln sigma^2) / dt, so the importance-sampled law is uniform in ln sigma between its ends.
        if self.distribution == "normal":
            density = torch.exp(-n.square() / 2) / (math.sqrt(2 * math.pi) * self.p_std)
        else:
            density = n.sigmoid() * (-n).sigmoid() / ((1 - 2 * LOGISTIC_TAIL) * self.p_std)
        inside = (2 * log_sigma >= low) & (2 * log_sigma <= high)
        return Times(t, inside * 2 / ((high - low) * density))


class Times(NamedTuple):
    """Times (B,) float64, and the weight (B,) of each row's loss; None where it is 1 everywhere."""

    t: Tensor
    weight: Tensor | None


def _time_of_integrated_beta(b: Tensor) -> Tensor:
    """The root t >= 0 of B(t) = b, in the form that does not cancel for small b."""
    return 2 * b / (BETA_0 + torch.sqrt(BETA_0**2 + 2 * (BETA_1 - BETA_0) * b))
