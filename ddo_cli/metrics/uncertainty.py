"""Uncertainty of a Frechet distance: jackknife standard error, and extrapolation to infinitely many images.

Both come from the moments of equal random chunks of the images (`accumulators.ChunkedMoments`), without another pass.
And means over ranges of seeds, with the difference of two models in pairs.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from ddo_cli.errors import DataError
from ddo_cli.metrics import frechet
from ddo_cli.metrics.stats import Moments
from ddo_cli.report.numbers import readable


class Mean(NamedTuple):
    """A mean over ranges of seeds and its standard error, which one range does not tell."""

    value: float
    std_error: float | None

    def __str__(self) -> str:
        """With two digits of the error, or as many decimals as four digits of the value have."""
        if not self.std_error or not self.value or not math.isfinite(self.std_error):
            return readable(self.value)
        decimals = max(min(1 - _exponent(self.std_error), 3 - _exponent(self.value)), 0)
        grouped = "," if abs(self.value) >= 10_000 else ""
        return f"{self.value:{grouped}.{decimals}f} ± {self.std_error:{grouped}.{decimals}f}"

    @property
    def as_improvement(self) -> str:
        """ "better by 1.2 ± 0.3", of what `improvement` returns."""
        return f"{'worse' if self.value < 0 else 'better'} by {self._replace(value=abs(self.value))}"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def mean(scores: Sequence[float]) -> Mean:
    """Mean of scores, one of each range of seeds; standard error s / sqrt(n), s^2 with n - 1."""
    n = len(scores)
    return Mean(sum(scores) / n, float(np.std(scores, ddof=1)) / math.sqrt(n) if n > 1 else None)


def improvement(before: Sequence[float], after: Sequence[float]) -> Mean:
    """By how much scores, of which the lower is better, fell. Both are of the same ranges of seeds, in the same order.

    The images of a seed are much alike for related models, so differences in pairs scatter less than the scores.
    """
    return mean([one - other for one, other in zip(before, after, strict=True)])


class Point(NamedTuple):
    """value: mean distance over disjoint sets of `num` images each."""

    num: float
    value: float


class Uncertainty(NamedTuple):
    """value: the distance of all images. std_error: of `value` over draws of as many images, the reference held fixed.

    infinity: value extrapolated to 1/N = 0; points: of the fitted line; None and () if chunks are too small.
    """

    value: float
    std_error: float
    infinity: float | None
    points: tuple[Point, ...]


def merged(chunks: Sequence[Moments]) -> Moments:
    """The moments of all chunks' rows."""
    return reduce(Moments.merged, chunks)


def uncertainty(ref: frechet.Reference, chunks: Sequence[Moments], extrapolate: bool = True) -> Uncertainty:
    """Standard error and limit of the distance of all chunks' images from `ref`.

    Costs one distance per chunk and one more, and about eight to extrapolate (ten chunks).
    Raises DataError below two chunks.
    """
    if len(chunks) < 2:
        raise DataError(f"a standard error needs at least 2 chunks of images, not {len(chunks)}; use the default, 10")
    whole = merged(chunks)
    value = _distance(ref, whole)
    # Delete-one-chunk jackknife: var = (K - 1)/K sum_k (d_k - mean d)^2. The bias in 1/N is the same for each d_k.
    left_out = np.array([_distance(ref, whole.without(chunk)) for chunk in chunks])
    std_error = float(np.sqrt((len(chunks) - 1) * left_out.var()))
    points = extrapolation_points(ref, chunks, value) if extrapolate else ()
    if len(points) < 2:
        return Uncertainty(value, std_error, None, points)
    # Value at 1/N = 0 of the least-squares line through (1/N, value). May be slightly below 0 for equal sets.
    inverse, values = 1 / np.array([point.num for point in points]), np.array([point.value for point in points])
    _, intercept = np.polyfit(inverse / inverse.max(), values, 1)
    return Uncertainty(value, std_error, float(intercept), points)


def extrapolation_points(ref: frechet.Reference, chunks: Sequence[Moments], value: float) -> tuple[Point, ...]:
    """Mean distance of unions of 1, 2, ... chunks, for each number that divides the number of chunks.

    The distance is linear in 1/N (arXiv 1911.07023, eq. 6). Every point uses each image once, so that the sampling
    error of the images shifts all points alike and leaves the slope. Sets of fewer than 2 F images are left out: their
    covariance is nearly singular and the distance not linear (the paper starts at 2.4 F).
    value: the distance of all.
    """
    points = []
    for size in range(1, len(chunks)):
        unions = [chunks[i : i + size] for i in range(0, len(chunks), size)]
        if len(chunks) % size == 0 and min(sum(part.n for part in union) for union in unions) >= 2 * len(ref.mean):
            distances = [_distance(ref, merged(union)) for union in unions]
            points.append(Point(sum(part.n for part in chunks) / len(unions), float(np.mean(distances))))
    return (*points, Point(sum(part.n for part in chunks), value))


def _distance(ref: frechet.Reference, moments: Moments) -> float:
    return frechet.distance_to(ref, moments.mean, moments.cov)
