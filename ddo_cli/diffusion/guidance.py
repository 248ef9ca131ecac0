"""Guides wrap a denoiser and return a denoiser, so they compose. Each has a weight of its own.

The order matters: autoguidance scales everything inside it, so it comes before the guides that add a gradient.
A score s changes a denoiser D = x + sigma^2 s, so adding w grad_x L to the score adds w sigma^2 grad_x L to D.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.churn import Boost
from ddo_cli.diffusion.trace import Denoiser, Trace, filled, rows_of

Decay = Literal["constant", "linear", "cosine"]
DECAYS: dict[Decay, Callable[[Tensor], Tensor]] = {  # share of the weight at VP time t
    "constant": torch.ones_like,
    "linear": lambda t: t,
    "cosine": lambda t: (1 - torch.cos(math.pi * t)) / 2,
}


INFINITE_NOISE = 1.5  # VP time of sigma 8e4, beyond every trained level; 1.94 is that of 1e8, see `precond.Flow`


class Potential(Protocol):
    """The function whose gradient guides: (B,) of x_vp = x / sqrt(1 + sigma^2), VP time t (B,) float64, label (B,).

    Discriminator guidance: the logit, an estimate of log p_data - log p_model at that time. Classifier guidance:
    log p(label | x_vp).
    """

    def __call__(self, x_vp: Tensor, t: Tensor, label: Tensor) -> Tensor: ...


class Guide(Protocol):
    """Changes a denoiser. label: (B,), of the batch. trace: counts evaluations."""

    def steer(self, denoise: Denoiser, label: Tensor, trace: Trace) -> Denoiser: ...


class Interval(NamedTuple):
    """The noise levels (low, high] at which a guidance acts (arXiv 2404.07724)."""

    low: float = 0.0
    high: float = math.inf

    def holds(self, sigma: Tensor) -> Tensor:
        """Whether each level lies in the interval, of sigma's shape."""
        return (sigma > self.low) & (sigma <= self.high)


class Pair(Protocol):
    """Two denoisers of the same states: (D_good, D_bad)."""

    def __call__(self, x: Tensor, sigma: Tensor, stage: str = "predictor") -> tuple[Tensor, Tensor]: ...


def in_turn(good: Denoiser, bad: Denoiser) -> Pair:
    """The pair of two networks, `good` evaluated last, so that the trace keeps its learned variance."""

    def pair(x: Tensor, sigma: Tensor, stage: str = "predictor") -> tuple[Tensor, Tensor]:
        base = bad(x, sigma, stage)
        return good(x, sigma, stage), base

    return pair


class LowScale(NamedTuple):
    """Another scale of a guidance at noise levels up to `sigma`, included."""

    scale: float
    sigma: float


def extrapolated(
    good: Denoiser,
    pair: Pair,
    scale: float,
    interval: Interval = Interval(),  # noqa: B008 (immutable)
    low: LowScale | None = None,
    channels: int | None = None,
) -> Denoiser:
    """D_bad + scale (D_good - D_bad) inside the interval, D_good alone elsewhere. pair: of `good` and the other one.

    Classifier-free guidance: conditional and unconditional (arXiv 2207.12598); 1 is the conditional model itself.
    channels: the first so many are guided, the others are D_good's (DiT and SiT: 3 of 4); None: all.
    """

    def denoise(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
        inside = interval.holds(sigma)
        if _is_false(inside):
            return good(x, sigma, stage)
        denoised, base = pair(x, sigma, stage)
        factor: float | Tensor = scale
        if low is not None:
            factor = rows_of(torch.where(sigma <= low.sigma, low.scale, scale).to(x.dtype), x)
        guided = base + factor * (denoised - base)
        if channels is not None:
            guided = torch.cat([guided[:, :channels], denoised[:, channels:]], dim=1)
        return _chosen(inside, guided, denoised)

    return denoise


def _is_false(inside: Tensor) -> bool:
    """Whether a condition is known to hold for no row; one on a GPU is not read, because that would wait."""
    return inside.device.type == "cpu" and not bool(inside.any())


def _chosen(inside: Tensor, changed: Tensor, unchanged: Tensor) -> Tensor:
    """`changed` where the condition holds, which is True or (B,)."""
    return changed if inside.ndim == 0 else torch.where(rows_of(inside, changed), changed, unchanged)


class Network(Protocol):
    """The denoiser of a further model, D(x; sigma, label)."""

    def denoise(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor: ...


class AutoGuide(NamedTuple):
    """D_bad + scale (D - D_bad), D_bad a worse version of the model (arXiv 2406.02507); 1 is the model itself.

    With an unconditional network for D_bad it is classifier-free guidance.
    """

    bad: Network
    scale: float
    interval: Interval = Interval()

    def steer(self, denoise: Denoiser, label: Tensor, trace: Trace) -> Denoiser:
        if self.scale == 1:
            return denoise

        def bad(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
            trace.nfe += 1
            return self.bad.denoise(x, sigma, label).to(x.dtype)

        return extrapolated(denoise, in_turn(denoise, bad), self.scale, self.interval)


class GradientGuide(NamedTuple):
    """D + w sigma^2 grad_x L(x / sqrt(1 + sigma^2), tau(sigma)): discriminator guidance (arXiv 2211.17091, eq. 8).

    DDPM's sampler takes the second term apart from D: its mean moves by Sigma w grad L, see `samplers.ancestral`.

    weight, weight_2nd: w of a step's predictor and of its corrector (the published runs leave the corrector unguided).
    time_min, time_max: w is 0 for samples whose VP time lies outside; from 1 on there is no upper end.
    decay: of w, see DECAYS; our choice, the paper gives none.
    boost: see `churn.Boost`; for discriminators only, since it reads L as a log-ratio.
    Where w is 0 for the whole batch the potential is not evaluated. L is not clipped: the published code clips the
    probability to [1e-5, 1 - 1e-5], which leaves samples beyond |L| = 11.5 without guidance.
    """

    potential: Potential
    weight: float = 1.0
    weight_2nd: float = 0.0
    time_min: float = 0.01
    time_max: float = 1.0
    decay: Decay = "constant"
    boost: Boost | None = None

    def steer(self, denoise: Denoiser, label: Tensor, trace: Trace) -> Denoiser:
        step = -1

        def guided(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
            nonlocal step
            is_predictor = stage == "predictor"
            step += is_predictor
            denoised = denoise(x, sigma, stage)
            t = vp_sde.time_of(sigma)  # one for all, or (B,)
            inside = self.holds(t)
            weight = self.weight if is_predictor else self.weight_2nd
            possible = trace.levels if is_predictor and sigma.ndim else None  # known to the CPU, unlike sigma itself
            if weight == 0 or _is_false(inside if possible is None else self.holds(vp_sde.time_of(possible))):
                if is_predictor and self.boost is not None:
                    trace.log_ratio = None
                return denoised
            trace.disc_nfe += 1
            value, direction = climb(self.potential, x, sigma, label)
            w = weight * DECAYS[self.decay](t.clamp(max=1))  # float64; t of ADM's noisiest steps is beyond 1
            if is_predictor and self.boost is not None:
                trace.log_ratio = _chosen(inside, value, torch.full_like(value, math.inf))
                if step % self.boost.weight_period == 0:
                    w = filled(w, x)
                    w = torch.where(trace.log_ratio < 0, self.boost.factor * w, w)
            added = rows_of(w, x).to(x.dtype) * direction
            if trace.keeps_climb:
                added = _chosen(inside, added, torch.zeros_like(added))
                trace.climb = added if trace.climb is None else trace.climb + added
                return denoised
            return _chosen(inside, denoised + added, denoised)

        return guided

    def weight_at(self, t: Tensor, stage: str) -> Tensor:
        """w at each time, 0 outside the window, float64 of t's shape; without boosting."""
        weight = self.weight if stage == "predictor" else self.weight_2nd
        return self.holds(t) * weight * DECAYS[self.decay](t.clamp(max=1))

    def holds(self, t: Tensor) -> Tensor:
        """Whether each time lies in the window, of t's shape.

        An end at 1 is open: times of a discrete model's noisiest steps lie beyond, 1.0034 for ADM's linear schedule,
        1.41 for the cosine one. But from infinite noise, where a flow model's samplers start, no gradient comes.
        """
        return (t >= self.time_min) & (t <= (self.time_max if self.time_max < 1 else INFINITE_NOISE))


class OnePass(NamedTuple):
    """A discriminator and a classifier on the same trunk: one forward and one backward pass for both.

    potentials: log-ratio and log p(label | x_vp), each (B,), of one evaluation. Outside the discriminator's window the
    classifier acts alone. Without boosting.
    """

    potentials: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    discriminator: GradientGuide
    classifier: GradientGuide

    def steer(self, denoise: Denoiser, label: Tensor, trace: Trace) -> Denoiser:
        alone = self.classifier.steer(denoise, label, trace)

        def guided(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
            t = vp_sde.time_of(sigma)
            weights = [guide.weight_at(t, stage) for guide in (self.discriminator, self.classifier)]
            if sigma.ndim == 0 and not bool(weights[0]):
                return alone(x, sigma, stage)

            def total(x_vp: Tensor, t: Tensor, label: Tensor) -> Tensor:
                log_ratio, log_probability = self.potentials(x_vp, t, label)
                return weights[0] * log_ratio + weights[1] * log_probability

            denoised = denoise(x, sigma, stage)
            trace.disc_nfe += 1
            _, added = climb(total, x, sigma, label)
            if trace.keeps_climb:
                trace.climb = added if trace.climb is None else trace.climb + added
                return denoised
            return denoised + added

        return guided


def potential_at(potential: Potential, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """L at a state, (B,), without its gradient. sigma: scalar or (B,)."""
    with torch.no_grad():
        x_vp = (rows_of(vp_sde.scale_of(sigma), x) * x).to(torch.float32)
        return potential(x_vp, filled(vp_sde.time_of(sigma), x), label)


def climb(potential: Potential, x: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """L (B,) and sigma^2 grad_x L, of x's shape and type. sigma: scalar or (B,).

    The chain rule's factor is m = 1 / sqrt(1 + sigma^2), since L sees m x. One backward pass, in float32 whatever the
    precision of sampling, since small gradients vanish in half precision; in the type of x where a caller
    differentiates through it (x then carries a graph).
    """
    differentiated = torch.is_grad_enabled() and x.requires_grad
    full = torch.autocast(x.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), full:  # the caller may have turned gradients off
        sigma = sigma.to(torch.float64)
        scale = rows_of(vp_sde.scale_of(sigma), x)
        t = filled(vp_sde.time_of(sigma), x).clone()
        x_vp = scale * x if differentiated else (scale * x).detach().to(torch.float32).clone().requires_grad_()
        value = potential(x_vp, t, label)
        (gradient,) = torch.autograd.grad(value.sum(), x_vp, create_graph=differentiated)
    factor = rows_of(sigma.square(), x) * scale
    return value.detach(), (factor * gradient).to(x.dtype)
