"""Preconditioning: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (arXiv 2206.00364, table 1).

All in EDM's frame, where a noisy image is x0 + sigma noise: a variance-preserving network sees x scaled to unit
variance, and its noise estimate eps gives D = x - sigma eps.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddo_cli.diffusion import vp_sde
from ddo_cli.transfer import to_device

PrecondName = Literal["edm", "vp", "ve", "iddpm", "ddpm", "cosine", "flow", "flow-reversed", "vp-unbounded"]


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in, c_noise; each of sigma's shape."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioner(ABC):
    """How a raw network F becomes a denoiser D, and the noise levels it knows."""

    sigma_min: float = 0.0
    sigma_max: float = math.inf
    keeps_dtype = False  # D has the type of x; else it is float32, as in the published samplers

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The four factors at noise levels of any shape, float32."""

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / c_out^2, which makes of the squared error of D that of F: the loss of all published networks."""
        return 1 / self.coefficients(sigma).c_out.square()

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that the network knows, of sigma's shape and type."""
        return sigma


class Edm(Preconditioner):
    """EDM's, which knows every noise level: input and target of the network have unit variance at each."""

    def __init__(self, sigma_data: float = 0.5):
        self.sigma_data = sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        total = sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt()
        return Coefficients(c_skip, c_out, c_in=1 / total.sqrt(), c_noise=sigma.log() / 4)

    def weight(self, sigma: Tensor) -> Tensor:
        """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


# --- Song et al.'s two continuous processes (arXiv 2011.13456)


class Vp(Preconditioner):
    """Variance preserving: F estimates the noise, and c_noise is 999 t(sigma), the time of the linear VP-SDE."""

    last_step = 999  # of M = 1000
    t_min = 1e-5

    def __init__(self) -> None:
        # In float32, as the published networks store them: the smallest level suffers a cancellation there.
        self.schedule = vp_sde.VpSchedule()
        self.sigma_min, self.sigma_max = self.schedule.sigma(torch.tensor([self.t_min, 1.0])).tolist()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = self.last_step * self.schedule.time(sigma)
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise)


class VpUnbounded(Vp):
    """... and c_noise is 999 (A - A_0) / (A_1 - A_0), A = ln(1 - e^-B + 0.001) + B (Soft Truncation, arXiv 2106.05527).

    A_0, A_1: at the times 1e-5 and 1. With sigma^2 = e^B - 1 the logarithm's 1 - e^-B is sigma^2 / (1 + sigma^2).
    """

    def coefficients(self, sigma: Tensor) -> Coefficients:
        low, high = vp_sde.sigma_of(torch.tensor([self.t_min, 1.0], dtype=torch.float64)).tolist()
        first, last = (_unbounded(torch.tensor(end, dtype=torch.float64)).item() for end in (low, high))
        label = self.last_step * (_unbounded(sigma) - first) / (last - first)
        return super().coefficients(sigma)._replace(c_noise=label)


def _unbounded(sigma: Tensor) -> Tensor:
    """A at the time of a noise level."""
    square = sigma.square()
    return (square / (1 + square) + 1e-3).log() + square.log1p()


class Ve(Preconditioner):
    """Variance exploding: F estimates the noise of the unscaled image, with the opposite sign."""

    sigma_min, sigma_max = 0.02, 100.0

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log())


# --- Flow matching (arXiv 2209.03003, 2210.02747)


class Flow(Preconditioner):
    """Flow matching on the linear path (1 - n) x0 + n eps, n the share of noise; F estimates its velocity.

    With sigma = n / (1 - n) the path's state is x / (1 + sigma), and D = x / (1 + sigma) - n dx/dn. The network's time
    is 1 - n, from noise to data, and its velocity x0 - eps (SiT, arXiv 2401.08740); reversed: its time is n and its
    velocity eps - x0 (REPA, SD3, FLUX). The weight makes of the squared error of D that of the velocity.

    The ends of the path, where sigma is infinite or the velocity no longer in D, are met up to float32's rounding.
    """

    sigma_min, sigma_max = 1e-8, 1e8
    keeps_dtype = True  # the velocity is (x / (1 + sigma) - D) / n: near n = 0 float32 loses it

    def __init__(self, reversed: bool = False):
        self.reversed = reversed

    def coefficients(self, sigma: Tensor) -> Coefficients:
        data, noise = 1 / (1 + sigma), sigma / (1 + sigma)
        return Coefficients(data, -noise if self.reversed else noise, data, c_noise=noise if self.reversed else data)


# --- Networks that were trained at discrete steps

Prediction = Literal["eps", "v", "x0"]


class Discrete(Preconditioner):
    """DDPM's kind: F was trained at the noise levels of M steps; c_noise is the step's number (arXiv 2006.11239).

    sigmas: (M,) increasing, sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t). prediction: what F estimates: the noise,
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (arXiv 2202.00512), or the clean image. rescaled: the network is
    told the step's number times 1000 / M. is_linear: whether the levels are those of DDPM's linear schedule.
    """

    def __init__(self, sigmas: Tensor, prediction: Prediction = "eps", rescaled: bool = False):
        sigmas = sigmas.to(torch.float32)
        rises = sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas.diff() > 0).all() and sigmas[0] > 0)
        if not rises or not bool(sigmas.isfinite().all()):
            raise ValueError("the noise levels of discrete steps must be two or more, finite, positive and increasing")
        self.sigmas, self.prediction = sigmas, prediction
        self.step_scale = NUM_STEPS / len(sigmas) if rescaled else 1.0
        with self.sigmas.device:  # a network around it may be under construction on the meta device
            linear = linear_sigmas(len(sigmas)) if len(sigmas) > FEWEST_LINEAR else None
        self.is_linear = linear is not None and torch.allclose(self.sigmas, linear.to(torch.float32), rtol=1e-4)
        self.sigma_min, self.sigma_max = self.sigmas[0].item(), self.sigmas[-1].item()
        self._table = functools.cache(functools.partial(to_device, self.sigmas))  # by device

    def step_of(self, sigma: Tensor) -> Tensor:
        """The number 0..M - 1 of the nearest level, int64 of sigma's shape."""
        return (sigma.to(torch.float32)[..., None] - self._table(sigma.device)).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self._table(sigma.device)[self.step_of(sigma)].to(sigma.dtype)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_in = 1 / (sigma**2 + 1).sqrt()
        c_noise = self.step_of(sigma).to(torch.float32) * self.step_scale
        if self.prediction == "v":
            return Coefficients(c_in**2, -sigma * c_in, c_in, c_noise)
        if self.prediction == "x0":
            return Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma), c_in, c_noise)
        return Coefficients(torch.ones_like(sigma), -sigma, c_in, c_noise)


NUM_STEPS = 1000  # of every published discrete model
FEWEST_LINEAR = 20  # up to so many steps the linear schedule's last beta is 1 or more
IDDPM_C1, IDDPM_C2 = 0.001, 0.008  # largest shrinking of alpha_bar in a step; offset of the cosine


def linear_sigmas(num_steps: int = NUM_STEPS, beta_first: float = 1e-4, beta_last: float = 0.02) -> Tensor:
    """Levels of DDPM's linear schedule, (M,) float64 increasing. beta_first, beta_last: those of 1000 steps."""
    scale = NUM_STEPS / num_steps
    return sigmas_of_betas(torch.linspace(scale * beta_first, scale * beta_last, num_steps, dtype=torch.float64))


def sigmas_of_betas(betas: Tensor) -> Tensor:
    """sqrt((1 - alpha_bar) / alpha_bar) of a schedule's betas (M,), alpha_bar_t = prod_s<=t (1 - beta_s); float64."""
    alpha_bar = torch.cumprod(1 - betas.to(torch.float64), 0)
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def cosine_sigmas(num_steps: int = NUM_STEPS) -> Tensor:
    """Levels of the cosine schedule (arXiv 2102.09672, eq. 17), (M,) float64 increasing."""
    steps = torch.arange(num_steps + 1, dtype=torch.float64)
    alpha_bar = (0.5 * math.pi * (steps / num_steps + IDDPM_C2) / (1 + IDDPM_C2)).cos() ** 2
    return sigmas_of_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=1 - IDDPM_C1))


def edm_cosine_sigmas(num_steps: int = NUM_STEPS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels of the cosine schedule in EDM's rounding, (M,) increasing.

    By its recursion (arXiv 2206.00364, table 1); in float32, as the published networks store their levels. The lowest
    is 5e-4 of itself below that of `cosine_sigmas`, since alpha_bar is float32 there whatever the type:
    u_M = 0, u_(j-1)^2 = (u_j^2 + 1) / max(alpha_bar_(j-1) / alpha_bar_j, C_1) - 1.
    """
    steps = torch.arange(num_steps + 1)
    alpha_bar = (0.5 * math.pi * steps / num_steps / (IDDPM_C2 + 1)).sin() ** 2
    u = torch.zeros(num_steps + 1, dtype=dtype)
    for j in range(num_steps, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / (alpha_bar[j - 1] / alpha_bar[j]).clamp(min=IDDPM_C1) - 1).sqrt()
    return u[:-1].flip(0)


PRECONDITIONERS: dict[PrecondName, Callable[[float], Preconditioner]] = {
    "edm": Edm,
    "vp": lambda sigma_data: Vp(),
    "ve": lambda sigma_data: Ve(),
    "iddpm": lambda sigma_data: Discrete(edm_cosine_sigmas()),
    "ddpm": lambda sigma_data: Discrete(linear_sigmas()),
    "cosine": lambda sigma_data: Discrete(cosine_sigmas()),
    "vp-unbounded": lambda sigma_data: VpUnbounded(),
    "flow": lambda sigma_data: Flow(),
    "flow-reversed": lambda sigma_data: Flow(reversed=True),
}
# Levels of the schedules that exist for any number of steps.
SCHEDULES: dict[PrecondName, Callable[[int], Tensor]] = {"ddpm": linear_sigmas, "cosine": cosine_sigmas}
