"""Moments of each class's features, for a Frechet distance per class."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from ddo_cli.errors import DataError
from ddo_cli.metrics.accumulators import Kept, Seen, State, checked, named
from ddo_cli.metrics.stats import Moments

MAX_BYTES = 4 * 2**30  # of sums of squares: 128 classes of 2048 features; chosen by us


class ClassMoments:
    """Mean and covariance of the features of each class. Memory: 8 F^2 bytes per class (33 MB at F = 2048)."""

    kept: Kept = "order"

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        num_features: int,
        needs: str = "pool",
        device: torch.device | str = "cpu",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """labels: int64 (N,) of all images. Raises DataError for a label out of range or above `max_bytes`."""
        if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
            row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
            raise DataError(
                f"image {row} has the label {labels[row]}, which is none of {num_classes} classes; a distance per "
                f"class needs a set with labels"
            )
        size = 8 * num_features**2
        if num_classes * size > max_bytes:
            raise DataError(
                f"a distance per class of {num_classes} classes and {num_features} features takes "
                f"{num_classes * size / 2**30:.1f} GiB, more than {max_bytes / 2**30:.1f} GiB; score at most "
                f"{max_bytes // size} classes at a time"
            )
        self.needs, self.labels = needs, labels
        self.seen = Seen(len(labels), device)
        self._moments = [Moments(num_features, device) for _ in range(num_classes)]

    def update(self, rows: np.ndarray, features: dict[str, Tensor]) -> None:
        values = checked(rows, features[self.needs], self.needs)
        self.seen.add(rows)
        label = self.labels[rows]
        for number in np.unique(label):
            own = torch.from_numpy(np.flatnonzero(label == number)).to(values.device)
            self._moments[number].update(values.index_select(0, own))

    def all_reduce(self) -> None:
        self._moments = [moments.all_reduce() for moments in self._moments]
        self.seen.all_reduce()

    @property
    def kind(self) -> str:
        labels = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
        return f"moments of {self.needs} by the {len(self._moments)} classes {labels}"

    def state(self) -> State:
        self.seen.check()
        return {f"{i}.{key}": array for i, one in enumerate(self._moments) for key, array in one.state().items()}

    def restore(self, state: State) -> None:
        found = [one.like({key: named(state, f"{i}.{key}") for key in one.KEYS}) for i, one in enumerate(self._moments)]
        if [one.n for one in found] != np.bincount(self.labels, minlength=len(found)).tolist():
            raise ValueError("moments of other numbers of images")
        self._moments = found
        self.seen.add_all()

    def result(self) -> list[Moments]:
        """Moments of each class; a class of fewer than two images has no covariance. After `all_reduce`."""
        self.seen.check()
        return list(self._moments)
