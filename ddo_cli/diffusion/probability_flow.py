"""Exact log-densities by the probability-flow ODE (arXiv 2011.13456, eq. 39)."""

import math

import torch
from torch import Tensor

from ddo_cli.diffusion import precond
from ddo_cli.diffusion.trace import Denoiser

STEPS = 16  # of `log_density`, 4 evaluations each; our choice, see there


@torch.inference_mode(False)  # a caller's inference mode would forbid the derivatives
@torch.no_grad()
def log_density(denoise: Denoiser, x: Tensor, low: float, high: float, sigma_data: float) -> Tensor:
    """log p(x) in nats, (B,) float64, with the exact divergence.

    The density that a sampler without churn approaches with more and more steps, from noise level `low` up to a normal
    of deviation `high`. For low dimensions only: it takes a backward pass per dimension.

    With F of EDM's preconditioning, y = x / sqrt(sigma^2 + sigma_data^2) and the angle sigma = sigma_data tan(theta),
    the ODE dx/dsigma = (x - D) / sigma reads dy/dtheta = -F(y; theta): bounded, and smooth at both ends. It is solved
    by fourth-order Runge-Kutta steps, evenly spaced in theta^(1/3) because the data's detail lies at small angles.
    On `mixture.toy2d` the mean error of log p is below 1e-3.
    """
    first, last = (math.atan(sigma / sigma_data) ** (1 / 3) for sigma in (low, high))
    h = (last - first) / STEPS

    def slope(state: tuple[Tensor, Tensor], u: float) -> tuple[Tensor, Tensor]:
        f, trace = _f_and_trace(state[0], sigma_data * math.tan(u**3), denoise, sigma_data)
        return -3 * u**2 * f, -3 * u**2 * trace  # dtheta = 3 u^2 du

    def moved(state: tuple[Tensor, Tensor], h: float, slope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state[0] + h * slope[0], state[1] + h * slope[1]

    start, end = math.hypot(low, sigma_data), math.hypot(high, sigma_data)
    state = x.to(torch.float64) / start, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i in range(STEPS):
        u = first + i * h
        k1 = slope(state, u)
        k2 = slope(moved(state, h / 2, k1), u + h / 2)
        k3 = slope(moved(state, h / 2, k2), u + h / 2)
        k4 = slope(moved(state, h, k3), u + h)
        for weight, k in ((1, k1), (2, k2), (2, k3), (1, k4)):
            state = moved(state, h * weight / 6, k)
    y, log_det = state
    dim = y.flatten(1).shape[1]
    log_prior = -(y * end / high).flatten(1).square().sum(1) / 2 - dim * (math.log(high) + math.log(2 * math.pi) / 2)
    return log_prior + log_det + dim * math.log(end / start)


def _f_and_trace(y: Tensor, sigma: float, denoise: Denoiser, sigma_data: float) -> tuple[Tensor, Tensor]:
    """F at x = y sqrt(sigma^2 + sigma_data^2), of y's shape, and the trace of its Jacobian dF/dy, (B,)."""
    level = torch.tensor(sigma, dtype=torch.float64)  # on the CPU: see `Denoiser`
    c = precond.Edm(sigma_data).coefficients(level)
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        x = y / c.c_in
        denoised = denoise(x, level)
        f = ((denoised - c.c_skip * x) / c.c_out).flatten(1)  # (B, d)
        trace = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        for i in range(f.shape[1]):
            (gradient,) = torch.autograd.grad(f[:, i].sum(), y, retain_graph=i + 1 < f.shape[1])
            trace = trace + gradient.flatten(1)[:, i]
    return f.detach().view_as(y), trace.detach()
