"""EDM preconditioning: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (arXiv 2206.00364, table 1)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in, c_noise; each of sigma's shape."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm(sigma: Tensor, sigma_data: float) -> Coefficients:
    """EDM's coefficients: network input and target have unit variance at every sigma."""
    total = sigma**2 + sigma_data**2
    return Coefficients(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=1 / total.sqrt(),
        c_noise=sigma.log() / 4,
    )


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2: the plain squared error of F."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
