"""Power-function averages of weights, and their reconstruction after training (EDM2, arXiv 2312.02696, section 3).

At time t such an average weighs the weights of time tau by p(tau) = (gamma + 1) / t * (tau / t)^gamma. Its width is
told by the standard deviation of p relative to t, which does not depend on t. Numbers only: no tensor, no file.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddo_cli.recipe.training import MAX_STD


class Profile(NamedTuple):
    """An average of relative standard deviation `std` at `images` images."""

    std: float
    images: float


class Fit(NamedTuple):
    """How a profile is made of others."""

    weights: np.ndarray  # (N,), float64, sum 1
    residual: float  # of the profile, in the L2 norm, relative to its own norm; 0 = exact
    gain: float  # sum of |weights|: how much rounding noise of the snapshots is amplified


def gamma_of(std: float) -> float:
    """The exponent of a relative standard deviation in (0, 0.289).

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (eq. 123) is a cubic in gamma; its largest root (eq. 126).
    """
    if not 0 < std < MAX_STD:
        raise ValueError(f"a relative standard deviation lies between 0 and {MAX_STD}, not at {std:g}")
    inverse = std**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_decay(batch: int, std: float, n_images: int) -> float:
    """What the average keeps of itself in a step (eq. 127): (1 - batch / n)^(gamma + 1), n counting the step.

    0 in the first step: the average does not contain the weights that training began with.
    """
    return float((1 - batch / n_images) ** (gamma_of(std) + 1))


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of p_a p_b over tau, times the later of the two times (eq. 151)."""
    early, late = sorted((a, b), key=lambda profile: profile.images)
    first, second = gamma_of(early.std), gamma_of(late.std)
    return float((first + 1) * (second + 1) / (first + second + 1) * (early.images / late.images) ** second)


def fit(profiles: Sequence[Profile], target: Profile) -> Fit:
    """The combination of `profiles` that comes nearest to `target` (algorithm 3), scaled to a sum of 1.

    Raises ValueError if two profiles are so alike that the combination is not determined.
    """
    pairs = [[inner_product(a, b) / max(a.images, b.images) for b in profiles] for a in profiles]
    gram = np.array(pairs, dtype=np.float64) * target.images  # (N, N), of order 1
    with_target = np.array([inner_product(a, target) / max(a.images, target.images) for a in profiles])
    with_target = with_target * target.images  # (N,)
    try:
        weights = np.linalg.solve(gram, with_target)
    except np.linalg.LinAlgError:
        raise ValueError("two of the averages are the same") from None
    weights = weights / weights.sum()
    norm = inner_product(target, target)
    error = norm - 2 * weights @ with_target + weights @ gram @ weights
    return Fit(weights, math.sqrt(max(float(error), 0.0) / norm), float(np.abs(weights).sum()))


def density(profile: Profile, times: np.ndarray) -> np.ndarray:
    """p(tau) at the given times, 0 beyond the profile's own."""
    gamma = gamma_of(profile.std)
    inside = np.clip(times / profile.images, 0, None)
    return np.where(inside <= 1, (gamma + 1) / profile.images * np.minimum(inside, 1) ** gamma, 0.0)
