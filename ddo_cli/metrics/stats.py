"""Mean and covariance of features: accumulated in float64 over batches and processes, stored in .npz files."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli import dist, npz
from ddo_cli.errors import DataError, printable, reason
from ddo_cli.metrics import frechet
from ddo_cli.precision import Device

_MAX_BYTES = 2**29  # of an array of statistics: the covariance of 8192 features


class Statistics(NamedTuple):
    """Final moments: mean (F,) and cov (F, F), float64; number of images and name of the extractor, if known."""

    mean: Tensor
    cov: Tensor
    num_images: int | None = None
    extractor: str | None = None


class Moments:
    """Streaming mean and covariance of feature vectors, float64.

    Batches are merged by Chan, Golub and LeVeque 1979, eqs. 2.1: squares are summed about the running mean, so that
    features far from zero lose no digits.
    """

    KEYS = ("n", "mean", "scatter")  # of a state

    def __init__(self, num_features: int, device: Device = "cpu") -> None:
        self.n = 0
        self._mean = torch.zeros(num_features, dtype=torch.float64, device=device)  # (F,)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)  # about the mean

    def update(self, features: Tensor) -> None:
        """Adds the rows of `features` (B, F)."""
        if features.ndim != 2 or features.shape[1] != self._mean.numel():
            raise ValueError(f"features {tuple(features.shape)} must be (B, {self._mean.numel()})")
        if len(features) == 0:
            return
        rows = features.detach().to(self._mean.device, torch.float64)
        mean = rows.mean(0)
        centred = rows - mean
        delta = mean - self._mean
        total = self.n + len(rows)
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self.n * len(rows) / total)
        self._mean += delta * (len(rows) / total)
        self.n = total

    def all_reduce(self) -> "Moments":
        """The moments of all processes' rows, as a new object."""
        sums = dist.all_reduce_sum(torch.cat([self._mean.new_tensor([self.n]), self.n * self._mean]))  # (1 + F,)
        n = round(float(sums[0]))
        mean = sums[1:] / max(n, 1)
        delta = self._mean - mean
        return self._of(n, mean, dist.all_reduce_sum(self._scatter + torch.outer(delta, delta) * self.n))

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for `like`."""
        return {"n": np.array(self.n), "mean": self._mean.cpu().numpy(), "scatter": self._scatter.cpu().numpy()}

    def like(self, state: dict[str, np.ndarray]) -> "Moments":
        """Moments from a state. Raises ValueError unless it has as many features as these."""
        n, mean, scatter = (state[key] for key in self.KEYS)
        shapes = n.shape, mean.shape, scatter.shape
        if shapes != ((), self._mean.shape, self._scatter.shape) or {mean.dtype, scatter.dtype} != {np.dtype("f8")}:
            raise ValueError(f"moments of shapes {shapes} instead of {self._mean.numel()} features")
        return self._of(int(n), *(torch.tensor(array, device=self._mean.device) for array in (mean, scatter)))

    @staticmethod
    def _of(n: int, mean: Tensor, scatter: Tensor) -> "Moments":
        moments = Moments(0)
        moments.n, moments._mean, moments._scatter = n, mean, scatter
        return moments

    def merged(self, other: "Moments") -> "Moments":
        """The moments of the rows of both, as a new object."""
        n, delta = self.n + other.n, other._mean - self._mean
        share = other.n / max(n, 1)
        scatter = self._scatter + other._scatter + torch.outer(delta, delta) * (self.n * share)
        return self._of(n, self._mean + delta * share, scatter)

    def without(self, part: "Moments") -> "Moments":
        """The moments of the rows outside `part`, a subset of the rows; the inverse of `merged`."""
        if part.n >= self.n:
            raise ValueError(f"{self.n} rows without {part.n} of them leave none")
        n = self.n - part.n
        mean = self._mean + (self._mean - part._mean) * (part.n / n)
        delta = part._mean - mean
        return self._of(n, mean, self._scatter - part._scatter - torch.outer(delta, delta) * (n * part.n / self.n))

    @property
    def mean(self) -> Tensor:
        """(F,). Raises ValueError without rows."""
        if self.n < 1:
            raise ValueError("the mean of no rows is not defined")
        return self._mean

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (divided by n - 1, as in EDM), (F, F). Raises ValueError below two rows."""
        if self.n < 2:
            raise ValueError(f"the covariance of {self.n} rows is not defined")
        return self._scatter / (self.n - 1)

    def statistics(self, extractor: str | None = None) -> Statistics:
        """The final moments. extractor: its name."""
        return Statistics(self.mean.cpu(), self.cov.cpu(), self.n, extractor)


# --- Files: arrays `mu` (F,) and `sigma` (F, F), as EDM's; ours also `num_images` and `extractor`


def holds_statistics(path: Path) -> bool:
    """Whether a file is a readable .npz with `mu` and `sigma`."""
    try:
        return npz.members(path).keys() >= {"mu", "sigma"}
    except npz.DAMAGE:
        return False


def read_npz(path: Path, mu: str = "mu", sigma: str = "sigma") -> Statistics:
    """The statistics in the arrays `mu` and `sigma` of an .npz, unchecked. Raises DataError if there are none."""
    try:
        members = npz.members(path)
        arrays = {}
        for name in {mu, sigma, "num_images", "extractor"} & members.keys():
            if math.prod(members[name].shape) * members[name].dtype.itemsize > _MAX_BYTES:
                raise ValueError(f"'{name}' of the shape {members[name].shape} is larger than any statistics")
            arrays[name] = members[name].read()
        mean, cov = arrays[mu], arrays[sigma]
        num_images = int(arrays["num_images"]) if "num_images" in arrays else None
        made_by = str(arrays["extractor"]) if "extractor" in arrays else None
        if num_images is not None and num_images < 2:
            raise ValueError(f"num_images = {num_images}")
    except npz.DAMAGE as error:
        raise DataError(
            f"{path} is not an .npz of statistics ({reason(error)}); it needs the arrays '{mu}' and '{sigma}', "
            "or give images"
        ) from None
    return of_arrays(str(path), mean, cov, num_images, made_by)


def of_arrays(
    where: str, mean: np.ndarray, cov: np.ndarray, num_images: int | None = None, extractor: str | None = None
) -> Statistics:
    """Statistics read from a file. Raises DataError unless they are real numbers of single or double precision.

    where: the file, for messages. float16 is refused because its rounding alone adds to a distance.
    """
    for array in (mean, cov):
        if array.dtype.kind != "f" or array.dtype.itemsize < 4:
            raise DataError(
                f"{where}: mu is {mean.dtype} and sigma {cov.dtype}; they must be float32 or float64. The file is "
                "damaged or cut to another precision, compute the statistics again from images"
            )
    tensors = [torch.from_numpy(array.astype(np.float64)) for array in (mean, cov)]
    return Statistics(tensors[0], tensors[1], num_images, extractor)


def fits(where: str, statistics: Statistics, num_features: int, extractor: str) -> None:
    """Raises DataError unless these are a mean and a covariance of `num_features` features of this extractor."""
    mean, cov, _, made_by = statistics
    if made_by is not None and made_by != extractor:
        raise DataError(
            f"{where} holds statistics of the extractor '{printable(made_by)}', which cannot be compared with those of "
            f"'{extractor}'; give statistics of the same extractor, or images"
        )
    if mean.shape != (num_features,) or cov.shape != (num_features, num_features):
        raise DataError(
            f"{where}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} must be ({num_features},) and "
            f"({num_features}, {num_features}), the features of '{extractor}'; give statistics of that extractor, or "
            "images"
        )
    try:
        frechet.checked(mean, cov)
    except ValueError as error:
        raise DataError(f"{where}: {error}; the file is damaged, compute the statistics again from images") from None
