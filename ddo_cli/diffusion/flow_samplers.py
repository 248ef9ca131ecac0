"""Samplers in flow matching's time, as SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940) draw.

Their state is y = (1 - n) x0 + n eps, n the share of noise: y = x / (1 + sigma) of EDM's frame, sigma = n / (1 - n).
The velocity dy/dn = (y - D) / n holds all that they need: the noise is y + (1 - n) dy/dn, the score -1 / n times that.
A step of Euler over sigma is one over n, but those of second order and with noise differ. And n = 1 is sigma =
infinity: the first level, 1e8, is that up to float32's rounding.

Torch is imported for its types only; see `samplers`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from ddo_cli.diffusion.trace import Denoiser, rows_of
from ddo_cli.errors import NumericsError
from ddo_cli.extras import imported

if TYPE_CHECKING:
    from torch import Tensor

    from ddo_cli.diffusion.churn import Churn

LastStep = Literal["heun", "euler", "mean"]
DiffusionForm = Literal["sigma", "decreasing"]
NO_NOISE = 1e-8  # the level in place of 0 at which a velocity is asked for
SDE_LAST_SIGMA = 0.04 / 0.96  # the SDE's last step is from n = 0.04
TOLERANCE = 1e-3  # of the adaptive solver, relative; SiT's, and its absolute one is 1e-6
MAX_STEPS = 10_000  # of a row; our choice, where networks take 10 to 100


def _velocity(denoise: Denoiser, y: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
    """dy/dn, of y's shape."""
    level = rows_of(sigma, y)
    return (y - denoise((1 + level) * y, sigma, stage=stage)) * (1 + level) / level


def ode(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    churn: Churn | None = None,
    order: int = 2,
    last_step: LastStep = "heun",
) -> Tensor:
    """Heun's rule over n (order 1: Euler's), 2 evaluations a step.

    last_step: heun evaluates the velocity of clean images, as torchdiffeq does for SiT; euler spares that, as REPA.
    """
    y = x / (1 + sigmas[0])
    for sigma, sigma_next in pairwise(sigmas):
        step = sigma_next / (1 + sigma_next) - sigma / (1 + sigma)
        v = _velocity(denoise, y, sigma)
        y_next = y + step * v
        if order == 2 and (sigma_next > 0 or last_step == "heun"):
            v = (v + _velocity(denoise, y_next, sigma_next.clamp(min=NO_NOISE), "corrector")) / 2
        y = y + step * v
    return (1 + sigmas[-1]) * y


def adaptive(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None, tolerance: float = TOLERANCE
) -> Tensor:
    """Dormand and Prince's method of fifth order over n, from the first level to the last: SiT's `dopri5`.

    Every row has a step size of its own (torchode, arXiv 2210.12375), so that an image does not depend on those that
    are drawn beside it; SiT's library, torchdiffeq, has one for the batch. tolerance: relative error of a step, and a
    thousandth of it the absolute one. An evaluation is of all rows, until the last one has arrived.
    Raises NumericsError where a row does not arrive.
    """
    import torch

    torchode = imported("the sampler flow-dopri5 needs", "torchode", "ode")

    def backwards(t: Tensor, y: Tensor) -> Tensor:
        """dy/dt at t = 1 - n (B,), which float64 resolves near n = 1; y: (B, d)."""
        sigma = ((1 - t) / t).clamp(min=NO_NOISE)
        return -_velocity(denoise, y.view_as(x), sigma).flatten(1)

    term = torchode.ODETerm(backwards)
    control = torchode.IntegralController(atol=tolerance / 1000, rtol=tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control, max_steps=MAX_STEPS)
    start, end = (x.new_full((len(x),), float(1 / (1 + sigmas[i]))) for i in (0, -1))
    with torch.no_grad():
        found = solver.solve(
            torchode.InitialValueProblem(y0=(x / (1 + sigmas[0])).flatten(1), t_start=start, t_end=end)
        )
    if bool(found.status.any()):
        raise NumericsError(
            f"flow-dopri5 does not reach clean images within {MAX_STEPS} steps at sampling.tolerance = {tolerance:g}; "
            "raise it, or use flow-heun"
        )
    return (1 + sigmas[-1]) * found.ys[:, -1].view_as(x)


def sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    churn: Churn | None = None,
    order: int = 1,
    last_step: LastStep = "mean",
    diffusion_form: DiffusionForm = "sigma",
) -> Tensor:
    """Euler-Maruyama over n, with a last step without noise; order 2: noise, then Heun's rule (SiT's two SDE samplers).

    dy = (dy/dn - w s) dn + sqrt(2 w) dB with score s, n decreasing. diffusion_form: w = n (sigma, for the linear path
    also SiT's linear; REPA) or sin(pi n / 2)^4 (decreasing).
    last_step: mean has the drift of all others; euler that of the ODE, and lands on D, where SiT's Tweedie lands, too.
    """
    assert churn is not None, "it needs a source of noise"

    def drift(y: Tensor, sigma: Tensor, w: float, stage: str = "predictor") -> Tensor:
        v = _velocity(denoise, y, sigma, stage)
        return v + w * (y + v / (1 + sigma)) * (1 + sigma) / sigma

    def half_diffusion(n: float) -> float:
        return n if diffusion_form == "sigma" else math.sin(math.pi * n / 2) ** 4

    y = x / (1 + sigmas[0])
    for sigma, sigma_next in pairwise(sigmas):
        n, n_next = float(sigma / (1 + sigma)), float(sigma_next / (1 + sigma_next))
        w, step = half_diffusion(n), n_next - n
        if sigma_next == 0:
            return y + step * drift(y, sigma, w if last_step == "mean" else 0.0)
        noise = math.sqrt(2 * w * -step) * churn.eps(y)
        if order == 2:
            y = y + noise
        slope = drift(y, sigma, w)
        if order == 2:
            slope_next = drift(y + step * slope, sigma_next, half_diffusion(n_next), "corrector")
            y = y + step * (slope + slope_next) / 2
        else:
            y = y + step * slope + noise
    return (1 + sigmas[-1]) * y
