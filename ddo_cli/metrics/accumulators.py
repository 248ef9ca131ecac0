"""Accumulators of features, fed in one pass over the images in any order and on any process.

The position of an image in the set determines its split, chunk or row, so that results do not depend on the order of
arrival, the batch, or the number of processes.
"""

import functools
import hashlib
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ddo_cli import dist
from ddo_cli.errors import DataError
from ddo_cli.metrics.stats import Moments
from ddo_cli.precision import Device

SEED = 2020  # of every split and subset, torch-fidelity's
# Our choices:
BUFFER = 512  # rows that a random part collects before its F x F sums are touched
MAX_STORE = 8 * 2**30  # bytes of features kept whole: 1,048,576 images of 2048 features
MAX_CLASSES = 4 * 2**30  # bytes of sums of squares by class: 128 classes of 2048 features

Kept = Literal["set", "rows", "order"]
State = dict[str, np.ndarray]


class Accumulator(Protocol):
    """needs: the output of the extractor that it reads ("pool", "logits", "spatial").

    kind: determines the state, together with images and extractor. kept: whether a state serves the same images in
    another order: "set": yes; "rows": yes, once its arrays, with a row per image, are reordered; "order": no.
    """

    needs: str
    kept: Kept

    @property
    def kind(self) -> str: ...

    def update(self, rows: np.ndarray, features: dict[str, Tensor]) -> None:
        """Adds features[needs] (B, ...) of the images at the positions `rows`, int64 (B,)."""

    def all_reduce(self) -> None:
        """Merges the processes' shares; afterwards equal on all. Collective; call it once."""

    def state(self) -> State:
        """Arrays for `restore`. After `all_reduce`."""

    def restore(self, state: State) -> None:
        """Restores the state of a whole set. Raises ValueError if it is not one."""


def checked(rows: np.ndarray, features: Tensor, name: str) -> Tensor:
    """`features` (B, F), one per row. Raises DataError naming the first image whose features are not finite."""
    if len(rows) != len(features):
        raise ValueError(f"{len(rows)} rows came with {len(features)} features")
    finite = torch.isfinite(features).flatten(1).all(1)  # (B,)
    if not finite.all():
        row = int(rows[int((~finite).nonzero()[0])])
        raise DataError(
            f"the {name} features of image {row} (counted from 0) hold NaN or infinity; check that image and the "
            f"extractor's weights, and use full precision"
        )
    return features


def features_of(needs: str) -> str:
    """`kind` of a FeatureStore of this output."""
    return f"features of {needs}"


def named(state: State, key: str, shape: tuple[int, ...] | None = None, dtype: Any = None) -> np.ndarray:
    """An array of a state. Raises ValueError if it is missing, not finite, or of another shape or type."""
    array = state.get(key)
    if array is None or (shape is not None and array.shape != shape) or (dtype is not None and array.dtype != dtype):
        content = None if array is None else (array.shape, array.dtype)
        raise ValueError(f"its array '{key}' is {content} instead of {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"its array '{key}' holds NaN or infinity")
    return array


def random_parts(num: int, parts: int, seed: int = SEED) -> np.ndarray:
    """A fixed random partition into almost equal parts: the part 0 .. parts - 1 of each of `num` rows, int32 (num,).

    Part i holds the places i num // parts .. (i + 1) num // parts of a permutation, as torch-fidelity's splits do.
    Random, because sets are often ordered by class: every tenth image may be of the same class.
    """
    order = np.random.RandomState(seed).permutation(num)
    sizes = np.diff([i * num // parts for i in range(parts + 1)])
    part = np.empty(num, dtype=np.int32)
    part[order] = np.repeat(np.arange(parts, dtype=np.int32), sizes)
    return part


class Seen:
    """Checks that each of `num` rows comes exactly once."""

    def __init__(self, num: int, device: Device = "cpu") -> None:
        self.counts = torch.zeros(num, dtype=torch.int32, device=device)  # (num,)

    def add(self, rows: np.ndarray) -> Tensor:
        """Counts the rows; returns them as an index tensor on the device. Raises ValueError if one is out of range."""
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(self.counts.device)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.counts)):
            raise ValueError(f"rows {rows.min()} .. {rows.max()} do not lie in a set of {len(self.counts)} images")
        self.counts.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        return index

    def check(self) -> None:
        """Raises ValueError unless each row came once."""
        if not bool((self.counts == 1).all()):
            row = int((self.counts != 1).nonzero()[0])
            raise ValueError(f"image {row} came {int(self.counts[row])} times in a pass over {len(self.counts)} images")


class PartMoments:
    """Mean and covariance of the features of each of several parts of the images.

    Memory: parts x (F^2 float64 + buffer x F float32) on `device`, and 8 bytes per image.
    """

    kept: Kept = "order"

    def __init__(
        self, part: np.ndarray, num_parts: int, num_features: int, needs: str, device: Device, buffer: int
    ) -> None:
        """part: that of each image, int (N,). buffer: rows that a part collects before its F x F sums are touched."""
        self.needs, self.part, self.buffer = needs, part, buffer
        self.seen = Seen(len(part), device)
        self._moments = [Moments(num_features, device) for _ in range(num_parts)]
        self._waiting: list[list[Tensor]] = [[] for _ in range(num_parts)]

    def update(self, rows: np.ndarray, features: dict[str, Tensor]) -> None:
        values = checked(rows, features[self.needs], self.needs)
        self.seen.add(rows)
        part = self.part[rows]
        for number in np.unique(part):
            members = torch.from_numpy(np.flatnonzero(part == number)).to(values.device)
            waiting = self._waiting[number]
            waiting.append(values.detach().index_select(0, members))
            if sum(map(len, waiting)) >= self.buffer:
                self._flush(number)

    def _flush(self, number: int) -> None:
        if self._waiting[number]:
            self._moments[number].update(torch.cat(self._waiting[number]))
            self._waiting[number] = []

    def all_reduce(self) -> None:
        for number in range(len(self._moments)):
            self._flush(number)
            self._moments[number] = self._moments[number].all_reduce()
        dist.all_reduce_sum(self.seen.counts)

    def state(self) -> State:
        self.seen.check()
        return {f"{i}.{key}": array for i, part in enumerate(self._moments) for key, array in part.state().items()}

    def restore(self, state: State) -> None:
        moments = [
            part.like({key: named(state, f"{i}.{key}") for key in part.KEYS}) for i, part in enumerate(self._moments)
        ]
        if [part.n for part in moments] != np.bincount(self.part, minlength=len(moments)).tolist():
            raise ValueError("moments of other numbers of images")
        self._moments = moments
        self.seen.counts += 1

    def result(self) -> list[Moments]:
        """Moments of each part, of which those of fewer than two images have no covariance. After `all_reduce`."""
        self.seen.check()
        for number in range(len(self._moments)):
            self._flush(number)  # where a single process did not reduce
        return list(self._moments)


class ChunkedMoments(PartMoments):
    """Mean and covariance of each of `chunks` random parts of the images, see `random_parts`."""

    def __init__(
        self, num: int, num_features: int, needs: str = "pool", chunks: int = 1, device: Device = "cpu"
    ) -> None:
        """num: images of the whole pass. Raises DataError if a chunk would have fewer than two."""
        if num < 2 * chunks:
            raise DataError(f"{num} images are too few for a covariance in {chunks} chunks; give at least {2 * chunks}")
        super().__init__(random_parts(num, chunks), chunks, num_features, needs, device, BUFFER)
        self.kept = "set" if chunks == 1 else "order"

    @property
    def kind(self) -> str:
        return f"moments of {self.needs} in {len(self._moments)} parts"

    def whole(self) -> "ChunkedMoments":
        """The moments of all images in one part. After `all_reduce`."""
        first = self._moments[0]
        whole = ChunkedMoments(len(self.part), first.mean.numel(), self.needs, 1, first.mean.device)
        whole._moments = [functools.reduce(Moments.merged, self.result())]
        whole.seen.counts += 1
        return whole


class ClassMoments(PartMoments):
    """Mean and covariance of the features of each class, for a Frechet distance per class."""

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        num_features: int,
        device: Device = "cpu",
        max_bytes: int = MAX_CLASSES,
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
        super().__init__(labels, num_classes, num_features, "pool", device, buffer=1)

    @property
    def kind(self) -> str:
        labels = hashlib.sha256(self.part.astype("<i8").tobytes()).hexdigest()
        return f"moments of {self.needs} by the {len(self._moments)} classes {labels}"


class RowStore:
    """A value or vector for each image, (N, ...), in the order of the images. array: its name in the state."""

    kept: Kept = "rows"
    array: str

    def __init__(self, values: Tensor, needs: str) -> None:
        """values: zeros, to be filled."""
        self._values, self.needs = values, needs
        self.seen = Seen(len(values), values.device)

    def value(self, features: Tensor) -> Tensor:
        """What is stored of features (B, F)."""
        return features

    def update(self, rows: np.ndarray, features: dict[str, Tensor]) -> None:
        values = self.value(checked(rows, features[self.needs], self.needs))
        self._values[self.seen.add(rows)] = values.detach().to(self._values)

    def all_reduce(self) -> None:
        dist.all_reduce_sum(self._values)  # exact: a row is zero on every process but one
        dist.all_reduce_sum(self.seen.counts)

    def state(self) -> State:
        return {self.array: self.values().cpu().numpy()}

    def restore(self, state: State) -> None:
        stored = named(state, self.array, tuple(self._values.shape), self._values.cpu().numpy().dtype)
        self._values.copy_(torch.from_numpy(stored))
        self.seen.counts += 1

    def values(self) -> Tensor:
        """(N, ...). After `all_reduce`."""
        self.seen.check()
        return self._values


class FeatureStore(RowStore):
    """The features of all images, float32 (N, F); for metrics of distances between images.

    Memory: 4 N F bytes on `device` of every process (410 MB for 50,000 images of 2048 features), at most `max_bytes`.
    """

    array = "features"

    def __init__(
        self, num: int, num_features: int, needs: str = "pool", device: Device = "cpu", max_bytes: int = MAX_STORE
    ) -> None:
        """Raises DataError above `max_bytes`."""
        if 4 * num * num_features > max_bytes:
            raise DataError(
                f"{num} images of {num_features} features take {4 * num * num_features / 2**30:.1f} GiB, more than "
                f"{max_bytes / 2**30:.1f} GiB; give at most {max_bytes // (4 * num_features)} images to KID, "
                f"precision, recall, density, coverage and nearest images"
            )
        super().__init__(torch.zeros(num, num_features, device=device), needs)

    @property
    def kind(self) -> str:
        return features_of(self.needs)

    def result(self) -> Tensor:
        """(N, F). After `all_reduce`."""
        return self.values()


class Spread(NamedTuple):
    """Mean and standard deviation (divided by n, not n - 1) over splits or subsets."""

    mean: float
    std: float
