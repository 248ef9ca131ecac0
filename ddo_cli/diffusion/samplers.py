"""Samplers: functions of a denoiser, a state and decreasing noise levels. Adding one touches this file only.

State and noise levels are float64, as in EDM's reference sampler, so that the number of steps is limited by the
network's accuracy and not by the integrator's rounding; or float32, as in EDM2's. The denoiser casts for its network.

Torch is imported for its types only, because recipes and `--help` read the table and must start quickly. A sampler
that needs a function of torch imports it in its body.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from ddo_cli.diffusion import flow_samplers as flow
from ddo_cli.diffusion.trace import Denoiser, Trace, rows_of
from ddo_cli.diffusion.vp_samplers import euler_maruyama

if TYPE_CHECKING:
    from torch import Tensor

    from ddo_cli.diffusion.churn import Churn

DPM_V3_GRID = 250  # intervals of dpm-v3's grid of levels, those of DDO's authors


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None, order: int = 2) -> Tensor:
    """EDM's algorithm 2 for dx/dsigma = (x - D) / sigma (arXiv 2206.00364): second order, 2 n - 1 evaluations.

    order 1: Euler's steps, without the corrector.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma = churn(x, sigma, len(sigmas) - 1) if churn else (x, sigma)
        level = rows_of(sigma, x)
        slope = (x - denoise(x, sigma)) / level
        x_next = x + (sigma_next - level) * slope
        if order == 2 and sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next, stage="corrector")) / sigma_next
            x_next = x + (sigma_next - level) * (slope + slope_next) / 2
        x = x_next
    return x


euler = partial(heun, order=1)


def ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None, eta: float = 0.0) -> Tensor:
    """DDIM (eta 0, arXiv 2010.02502) and DDPM (eta 1, arXiv 2006.11239).

    In the variance-exploding frame x_t / sqrt(alpha_bar_t) the mean of either is an Euler step to sigma_down, and
    sigma_down^2 + sigma_up^2 = sigma_next^2 with sigma_up = eta sigma_next sqrt(1 - sigma_next^2 / sigma^2). This is
    the smaller of DDPM's variances; a network with learned variance says where between it and the larger one the noise
    of eta = 1 lies (arXiv 2102.09672, eq. 15), and `trace.larger_variance` asks for the larger one.

    Guides by a gradient change D, as in DDIM (arXiv 2105.05233, algorithm 2), but in DDPM the mean: mu + Sigma grad L,
    Sigma the variance of the step's noise (ibid., algorithm 1, of classifiers; DG's code for DiT does the same with its
    discriminator, and nothing is published of DG on ADM). Here sqrt(1 + sigma^2) grad_x L is the gradient in x_t, and
    Sigma = deviation^2 / (1 + sigma_next^2), so the mean moves by
    deviation^2 sqrt((1 + sigma^2) / (1 + sigma_next^2)) grad_x L.
    """
    trace, is_ddpm = (churn.trace if churn else Trace()), eta == 1
    trace.keeps_climb = is_ddpm
    before = sigmas.new_tensor(math.inf)  # level of the step before
    for sigma, sigma_next in pairwise(sigmas):
        up = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
        down = (sigma_next**2 - up**2).clamp(min=0).sqrt()
        trace.climb = None
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (down - sigma) * slope
        v, deviation = trace.variance, up
        if trace.larger_variance:
            v = sigmas.new_tensor(1.0 if up > 0 else -1.0)  # the last step's is that of the step before, as published
        if is_ddpm and v is not None and (up > 0 or trace.climb is not None):
            deviation = _learned_deviation(v.to(x) if v.ndim else v, sigma, sigma_next, before)
        if trace.climb is not None:
            shift = ((1 + sigma**2) / (1 + sigma_next**2)).sqrt() / sigma**2
            x_next = x_next + deviation**2 * shift * trace.climb
        if up > 0:
            assert churn is not None, "eta > 0 needs a source of noise"
            x_next = x_next + deviation * churn.eps(x)
        x, before = x_next, sigma
    return x


def _learned_deviation(v: Tensor, sigma: Tensor, sigma_next: Tensor, before: Tensor) -> Tensor:
    """Deviation of DDPM's noise whose log variance lies at v in [-1, 1] between its bounds, of v's shape.

    In the variance-exploding frame beta~ reads sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2, and beta
    (1 + sigma_next^2) (sigma^2 - sigma_next^2) / (1 + sigma^2). The last step's beta~ would be 0; it has that of the
    step before (from level `before` to sigma, in DDPM's frame), as published.
    """
    difference = sigma**2 - sigma_next**2
    if sigma_next > 0:
        smaller = (sigma_next**2 * difference / sigma**2).log()
    else:
        smaller = (sigma**2 * (1 - (sigma / before) ** 2) / (1 + sigma**2)).log()
    larger = ((1 + sigma_next**2) * difference / (1 + sigma**2)).log()
    share = (v + 1) / 2
    return ((share * larger + (1 - share) * smaller) / 2).exp()


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """DPM-Solver++(2M), data prediction (arXiv 2211.01095, algorithm 2).

    With lambda = -log sigma and h = lambda_next - lambda, in the variance-exploding frame (alpha = 1):
    x <- (sigma_next / sigma) x + (1 - e^-h) ((1 + 1 / 2r) D - (1 / 2r) D_last),  r = h_last / h.
    """
    last: tuple[Tensor, Tensor] | None = None  # D and h of the step before
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised  # h is infinite: the first-order step lands on D
        h = sigma.log() - sigma_next.log()
        direction = denoised
        if last is not None:
            denoised_last, h_last = last
            half_ratio = h / (2 * h_last)
            direction = (1 + half_ratio) * denoised - half_ratio * denoised_last
        x = sigma_next / sigma * x - (-h).expm1() * direction
        last = denoised, h
    return x


def dpm_v3(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """DPM-Solver-v3 without its empirical model statistics (arXiv 2310.13268), as DDO's authors sample EDM2.

    Predictor and corrector of second order, one evaluation a step; ends at the last level, which is above 0. A step is
    an exponential integrator in lambda = -log sigma. With the statistics' neutral values l = 1, s = b = 0, in the
    variance-exploding frame (alpha = 1), a step from node i to node j reads

        x_j = e^-h (x_i + E_0 D_i + E_1 (D_o - D_i) / (lambda_o - lambda_i)),   h = lambda_j - lambda_i
        E_n = int_0^h e^u u^n / n! du

    with a further node o, and without the last term at first order. The predictor's o is the node before i; the
    corrector's is j itself, whose D it does not evaluate anew.

    sigmas: (n + 1,), from `schedules.snapped_sigmas`: the integrals are sums over its grid's nodes, as in the published
    code, and a step between other levels takes as many nodes as the grid has on its length.
    """
    lambdas = [-math.log(sigma) for sigma in sigmas.tolist()]
    n = len(lambdas) - 1
    per_unit = DPM_V3_GRID / (lambdas[n] - lambdas[0])  # grid intervals per unit of lambda
    denoised: list[Tensor] = []  # D_0, D_1, ...

    def moved(x: Tensor, i: int, j: int, other: int | None) -> Tensor:
        """x_i -> x_j."""
        h = lambdas[j] - lambdas[i]
        e_0, e_1 = _integrals(h, max(round(h * per_unit), 1))
        increment = e_0 * denoised[i]
        if other is not None:
            increment = increment + e_1 / (lambdas[other] - lambdas[i]) * (denoised[other] - denoised[i])
        return math.exp(-h) * (x + increment)

    x_last, order = x, 1
    for i in range(n):
        denoised.append(denoise(x, sigmas[i]))
        if order == 2:
            x = moved(x_last, i - 1, i, other=i)
        order = min(2, i + 1, n - i)  # the first step has no history, the last one is kept low for stability
        x_last, x = x, moved(x, i, i + 1, other=i - 1 if order == 2 else None)
    return x


def _integrals(h: float, intervals: int) -> tuple[float, float]:
    """E_0 and E_1 of a step of length h, by the trapezoidal rule.

    Not in closed form: it differs from E_0 = e^h - 1 by some 1e-4 of it, and the published samples are made with these.
    """
    u = [h * k / intervals for k in range(intervals + 1)]
    weights = [h / intervals * (0.5 if k in (0, intervals) else 1.0) for k in range(intervals + 1)]
    terms = [(w * math.exp(v), v) for w, v in zip(weights, u, strict=True)]
    return sum(term for term, _ in terms), sum(term * v for term, v in terms)


# ---------------------------------------------------------------------------------------------------------------------
# The table

Integrator = Callable[..., "Tensor"]  # (denoise, x, sigmas, churn) and its `choices` by name


class Sampler(NamedTuple):
    """A sampler, and what recipes, noise levels and guides have to know of it."""

    name: str
    integrate: Integrator
    # Network evaluations per step. 2: a predictor and a corrector, but one in a step to level 0; 6: dopri5's.
    evaluations: int = 1
    steps: int = 18  # default number; EDM's for 32x32 images. Of an adaptive solver about what it takes
    # Spacing of levels where the recipe gives none. steps: those that a discrete model was trained at, vp for other
    # models. snapped, flow, sde: the sampler takes no other spacing; snapped levels end in sigma_min, all others in 0.
    spacing: Literal["karras", "steps", "snapped", "flow", "sde"] = "karras"
    sigma_min: float | None = None  # default smallest level; None: that of model and spacing
    churns: bool = False  # reads s_churn, and takes part in boosting
    generalised: bool = False  # a special case of EDM's generalised sampler
    ode: Integrator | None = None  # solver of its probability-flow ODE; None: `integrate`
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # values of the recipe keys that it alone reads
    is_adaptive: bool = False  # chooses its steps by the recipe's tolerance

    @property
    def has_corrector(self) -> bool:
        """Whether a step has evaluations of the stage "corrector"."""
        return self.evaluations == 2


flow_euler = partial(flow.ode, order=1)
SDE_CHOICES = {"diffusion_form": ("sigma", "decreasing"), "last_step": ("mean", "euler")}  # the first is the default
SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("heun", heun, evaluations=2, churns=True, generalised=True),
        Sampler("euler", euler, churns=True, generalised=True),
        Sampler("dpmpp-2m", dpmpp_2m),
        Sampler("dpm-v3", dpm_v3, steps=25, spacing="snapped"),  # steps: DDO's for 512x512 images
        Sampler("ddim", partial(ancestral, eta=0.0), spacing="steps", ode=euler),
        Sampler("ddpm", partial(ancestral, eta=1.0), spacing="steps", ode=euler),  # has no ODE; euler is that of ddim
        Sampler("euler-maruyama", euler_maruyama, steps=1000, spacing="sde", ode=euler),
        # Default steps: SiT's, 250 evaluations.
        Sampler("flow-euler", flow_euler, steps=250, spacing="flow"),
        Sampler("flow-heun", flow.ode, 2, steps=125, spacing="flow", choices={"last_step": ("heun", "euler")}),
        Sampler("flow-dopri5", flow.adaptive, evaluations=6, steps=20, spacing="flow", is_adaptive=True),
        Sampler("flow-sde", flow.sde, 1, 250, "flow", flow.SDE_LAST_SIGMA, ode=flow_euler, choices=SDE_CHOICES),
        Sampler(
            "flow-sde-heun",
            partial(flow.sde, order=2),
            evaluations=2,
            steps=125,
            spacing="flow",
            sigma_min=flow.SDE_LAST_SIGMA,
            ode=flow_euler,
            choices=SDE_CHOICES,
        ),
    )
}
DEFAULT = "heun"
CHOICES = tuple(sorted({key for sampler in SAMPLERS.values() for key in sampler.choices}))  # recipe keys


def find(name: str | None) -> Sampler:
    """The sampler that a recipe names."""
    return SAMPLERS[name or DEFAULT]


def names(which: Callable[[Sampler], bool]) -> str:
    """Names of some samplers, for messages: "heun or euler"."""
    return " or ".join(sampler.name for sampler in SAMPLERS.values() if which(sampler))
