"""DPM-Solver-v3 without its empirical model statistics (arXiv 2310.13268), as DDO's authors sample EDM2.

A step of the probability-flow ODE is an exponential integrator in lambda = -log sigma. With the statistics' neutral
values l = 1, s = b = 0, in the variance-exploding frame (alpha = 1), a step from node i to node j reads

    x_j = e^-h (x_i + E_0 D_i + E_1 (D_o - D_i) / (lambda_o - lambda_i)),   h = lambda_j - lambda_i
    E_n = int_0^h e^u u^n / n! du

with a further node o, and without the last term at first order. The predictor's o is the node before i; the
corrector's is j itself, whose D it does not evaluate anew.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from ddo_cli.diffusion.schedules import GRID

if TYPE_CHECKING:
    from ddo_cli.diffusion.samplers import Churn, Denoiser


def dpm_v3(denoise: Denoiser, x: Tensor, sigmas: Tensor, churn: Churn | None = None) -> Tensor:
    """Predictor and corrector of second order, one evaluation a step; ends at the last level, which is above 0.

    sigmas: (n + 1,), to be taken from `schedules.snapped_sigmas`: the integrals are sums over its grid's nodes, as in
    the published code, and a step between other levels takes as many nodes as the grid has on its length.
    """
    lambdas = [-math.log(sigma) for sigma in sigmas.tolist()]
    n = len(lambdas) - 1
    per_unit = GRID / (lambdas[n] - lambdas[0])  # grid intervals per unit of lambda
    denoised: list[Tensor] = []  # D_0, D_1, ...

    def moved(x: Tensor, i: int, j: int, other: int | None) -> Tensor:
        """x_i -> x_j."""
        h = lambdas[j] - lambdas[i]
        e_0, e_1 = integrals(h, max(round(h * per_unit), 1))
        along = e_0 * denoised[i]
        if other is not None:
            along = along + e_1 / (lambdas[other] - lambdas[i]) * (denoised[other] - denoised[i])
        return math.exp(-h) * (x + along)

    x_last, order = x, 1
    for i in range(n):
        denoised.append(denoise(x, sigmas[i]))
        if order == 2:
            x = moved(x_last, i - 1, i, other=i)
        order = min(2, i + 1, n - i)  # the first step has no history, the last one is kept low for stability
        x_last, x = x, moved(x, i, i + 1, other=i - 1 if order == 2 else None)
    return x


def integrals(h: float, intervals: int) -> tuple[float, float]:
    """E_0 and E_1 of a step of length h, by the trapezoidal rule.

    Not in closed form: E_0 = e^h - 1 is smaller by some 1e-4 of itself, and the published samples are made with these.
    """
    u = [h * k / intervals for k in range(intervals + 1)]
    weights = [h / intervals * (0.5 if k in (0, intervals) else 1.0) for k in range(intervals + 1)]
    e_0 = sum(w * math.exp(v) for w, v in zip(weights, u, strict=True))
    e_1 = sum(w * math.exp(v) * v for w, v in zip(weights, u, strict=True))
    return e_0, e_1
