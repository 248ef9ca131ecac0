"""Kernel Inception Distance: the unbiased MMD^2 with a polynomial kernel, over random subsets (arXiv 1801.01401)."""

import numpy as np
import torch
from torch import Tensor

from ddo_cli.errors import DataError
from ddo_cli.metrics.accumulators import SEED, Spread

DEGREE, COEF0 = 3, 1.0  # the paper's kernel (x.y / F + 1)^3


def kernel_distance(features: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000) -> Spread:
    """Mean and standard deviation over subsets of MMD^2 between rows of (N, F) and of (M, F), on the features' device.

    The subsets are torch-fidelity's: numpy's RandomState(2020) draws rows of `features`, then of `reference`, without
    replacement, `subsets` times. A mean slightly below 0 is normal for equal distributions, since the estimate
    is unbiased. Memory beside the features: a few matrices of subset_size^2 float64 and two subsets.
    Raises DataError if a set has fewer rows than a subset, or the two have different F.
    """
    if features.shape[1] != reference.shape[1]:
        raise DataError(
            f"{features.shape[1]} features cannot be compared with a reference of {reference.shape[1]}; use one "
            f"extractor for both"
        )
    fewest = min(len(features), len(reference))
    if subset_size < 2 or fewest < subset_size:
        raise DataError(
            f"KID draws subsets of {subset_size} from {len(features)} images and {len(reference)} of the reference; "
            f"give at least {subset_size} of each, or a subset size of 2 to {fewest}"
        )
    rng = np.random.RandomState(SEED)
    estimates = np.empty(subsets)
    for i in range(subsets):
        x, y = (
            rows[torch.from_numpy(rng.choice(len(rows), subset_size, replace=False)).to(rows.device)].to(torch.float64)
            for rows in (features, reference)
        )
        estimates[i] = mmd2(x, y)
    return Spread(float(estimates.mean()), float(estimates.std()))


def mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased MMD^2 of x and y, (m, F) each: E k(x, x') + E k(y, y') - 2 E k(x, y), x' another row.

    In float64, being a small difference of large means.
    """
    m = len(x)
    within = sum(_kernel(rows, rows).fill_diagonal_(0).sum() for rows in (x, y)) / (m * (m - 1))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(m, m)."""
    return (x @ y.T / x.shape[1] + COEF0) ** DEGREE
