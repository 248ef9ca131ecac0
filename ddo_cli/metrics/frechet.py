"""Frechet distance between Gaussians, in float64: d^2 = |m - m_r|^2 + tr(C + C_r - 2 (C C_r)^{1/2}).

Dowson and Landau, J. Multivariate Analysis 12 (1982); as a metric of images: Heusel et al., arXiv 1706.08500, eq. 6.
C C_r is not symmetric, and a general matrix root of it has spurious imaginary parts. With C_r = R^T R its non-zero
eigenvalues are those of the symmetric R C R^T, so that a symmetric eigensolve gives the trace of the root.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Our choice: a covariance stored in float32 has a spectral error below 2^-24 of its trace.
TOLERANCE = 1e-6


class Reference(NamedTuple):
    """The Gaussian that is compared with: mean (F,), trace of its covariance, and R (rank, F) where cov = R^T R."""

    mean: Tensor
    trace: float
    root: Tensor


def reference(mean: Tensor, cov: Tensor, device: torch.device | str = "cpu") -> Reference:
    """The reference with its factor, computed once for all distances from it. mean: (F,); cov: (F, F).

    device: where distances are computed; the CPU by default, since many GPUs are slow in float64 or lack it.
    Raises ValueError if a value is not finite, or if cov is not symmetric or clearly not positive semidefinite.
    """
    mean, cov = checked(mean, cov, device)
    values, vectors = torch.linalg.eigh(cov)  # (F,), (F, F)
    # Eigenvalues below the eigensolve's error are zero: the covariance of fewer images than features. Leaving them out
    # makes the factor thin, and keeps their roots (1e-8 of the others) out of the sum.
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    root = values[kept].sqrt()[:, None] * vectors[:, kept].T  # (rank, F)
    return Reference(mean, float(cov.trace()), root)


def distance_to(ref: Reference, mean: Tensor, cov: Tensor) -> float:
    """Squared Frechet distance of the Gaussian (mean (F,), cov (F, F)) from `ref`. Costs one eigensolve.

    Raises ValueError as `reference` does, or if the two have different F.
    """
    mean, cov = checked(mean, cov, ref.root.device)
    if mean.shape != ref.mean.shape:
        raise ValueError(f"{mean.numel()} features cannot be compared with a reference of {ref.mean.numel()}")
    product = ref.root @ cov @ ref.root.T  # (rank, rank), symmetric, the non-zero eigenvalues of cov @ ref_cov
    values = torch.linalg.eigvalsh((product + product.T) / 2)  # (rank,)
    trace_of_root = float(values.clamp(min=0).sqrt().sum())
    offset = float((mean - ref.mean).square().sum())
    return max(offset + float(cov.trace()) + ref.trace - 2 * trace_of_root, 0.0)  # below 0 by rounding only


def frechet_distance(
    mean: Tensor, cov: Tensor, ref_mean: Tensor, ref_cov: Tensor, device: torch.device | str = "cpu"
) -> float:
    """Squared Frechet distance between two Gaussians, means (F,), covariances (F, F), computed on `device`.

    Raises ValueError as `reference` and `distance_to` do.
    """
    return distance_to(reference(ref_mean, ref_cov, device), mean, cov)


def checked(mean: Tensor, cov: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Both in float64 on the device, cov exactly symmetric. Raises ValueError as `reference` does, at less cost."""
    mean, cov = mean.detach().to(device, torch.float64), cov.detach().to(device, torch.float64)
    features = mean.numel()
    if mean.ndim != 1 or features == 0 or cov.shape != (features, features):
        raise ValueError(f"mean {tuple(mean.shape)} and covariance {tuple(cov.shape)} must be (F,) and (F, F), F >= 1")
    if not (torch.isfinite(mean).all() and torch.isfinite(cov).all()):
        raise ValueError("mean or covariance holds a value that is not finite")
    if float((cov - cov.T).abs().max()) > TOLERANCE * float(cov.abs().max()):
        raise ValueError("the covariance is not symmetric")
    cov = (cov + cov.T) / 2
    # Cholesky succeeds if every eigenvalue exceeds -shift, at a fraction of an eigensolve's cost.
    # The smallest normal number lets a covariance of zeros pass.
    shift = TOLERANCE * max(float(cov.trace()), 0.0) + torch.finfo(torch.float64).tiny
    shifted = cov.clone()
    shifted.diagonal().add_(shift)
    if int(torch.linalg.cholesky_ex(shifted).info):
        raise ValueError("the covariance is not positive semidefinite")
    return mean, cov
