"""Rows of a training batch: a function of seed and step, so that resuming needs no saved state."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli.errors import DataError
from ddo_cli.recipe.training import ObjectiveName
from ddo_cli.rng import coins, permutation


class Examples(NamedTuple):
    """A batch of items as on disk, and their labels (-1: none)."""

    items: Tensor
    label: Tensor


class Shuffled:
    """An endless stream over a set: epoch after epoch, each in its own random order.

    Position p of the stream is row order(p // n)[p % n], so that any process can look up any position.
    only: the rows to use; None: all.
    hflip: whether each image is mirrored (left to right) with probability 1/2, drawn anew in each epoch. Only for
    training on real images: held-out rows and the reference of a metric stay as they are, and a model trained on
    mirrored data draws mirrored images by itself; mirroring those would put images on the fake side that it never drew.
    """

    def __init__(
        self,
        items: np.ndarray,
        labels: np.ndarray,
        *key: int | str,
        only: np.ndarray | None = None,
        hflip: bool = False,
    ):
        self.items, self.labels, self.key, self.only, self.hflip = items, labels, key, only, hflip
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._mirrored = np.empty(0, dtype=bool)  # by position in the epoch

    def __len__(self) -> int:
        return len(self.items if self.only is None else self.only)

    def rows(self, start: int, stop: int) -> Examples:
        """Positions start..stop - 1 of the stream."""
        index, mirrored = self._index(start, stop)
        items = self.items[index]  # a copy, (stop - start, C, H, W)
        if self.hflip:
            items[mirrored] = items[mirrored][..., ::-1]
        return Examples(torch.from_numpy(items), torch.from_numpy(self.labels[index]))

    def row_numbers(self, start: int, stop: int) -> np.ndarray:
        """Which rows of the set lie at these positions."""
        return self._index(start, stop)[0]

    def _index(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the set at these positions, and which of them are mirrored (empty without hflip)."""
        epochs = range(start // len(self), (stop - 1) // len(self) + 1)
        parts = [self._slice(epoch, start, stop) for epoch in epochs]
        index = np.concatenate([order for order, _ in parts])
        return index if self.only is None else self.only[index], np.concatenate([flags for _, flags in parts])

    def _slice(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's part of these positions: rows, and which of them are mirrored (empty without hflip)."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self), *self.key, "epoch", epoch).numpy()
            if self.hflip:
                self._mirrored = coins(len(self), *self.key, "hflip", epoch).numpy()
        first = epoch * len(self)
        part = slice(max(start - first, 0), min(stop - first, len(self)))
        return self._order[part], self._mirrored[part]


class Pairs(NamedTuple):
    """Real and fake examples of the same positions, paired one to one."""

    real: Shuffled
    fake: Shuffled

    def rows(self, start: int, stop: int) -> tuple[Examples, Examples]:
        """Real and fake examples of stream positions start..stop - 1."""
        return self.real.rows(start, stop), self.fake.rows(start, stop)


class Relabelled(NamedTuple):
    """Real examples, and their items again under the label of the example that follows in the stream: CCA's negatives.

    The official code shifts the labels of a batch by one; along the stream no row depends on how batches are cut.
    """

    real: Shuffled

    def rows(self, start: int, stop: int) -> tuple[Examples, tuple[None, Tensor]]:
        """Real examples of stream positions start..stop - 1, and their other labels."""
        following = self.real.row_numbers(start + 1, stop + 1)
        return self.real.rows(start, stop), (None, torch.from_numpy(self.real.labels[following]))


class OfOneClass:
    """Real and fake examples in pairs of one class; each class's fake examples come in random order, epoch by epoch."""

    def __init__(self, real: Shuffled, fake: np.ndarray, labels: np.ndarray, *key: int | str):
        """fake, labels: the fake set. Raises DataError for a class that has real items only."""
        self.real, self.items, self.labels = real, fake, labels
        self.classes, self.counts = np.unique(real.labels, return_counts=True)
        if missing := set(self.classes.tolist()) - set(labels.tolist()):
            raise DataError(
                f"no generated image has class {min(missing)}, which real images have; raise finetune.num_fake, or set "
                "sampling.labels = balanced"
            )
        self.streams = [
            Shuffled(fake, labels, *key, int(number), only=np.flatnonzero(labels == number)) for number in self.classes
        ]
        self._epoch, self._partners = -1, np.empty(0, dtype=np.int64)

    def rows(self, start: int, stop: int) -> tuple[Examples, Examples]:
        """Real and fake examples of stream positions start..stop - 1."""
        positions = np.arange(start, stop)
        epochs = positions // len(self.real)
        index = np.concatenate(
            [self._of_epoch(epoch)[positions[epochs == epoch] % len(self.real)] for epoch in np.unique(epochs)]
        )
        fake = Examples(torch.from_numpy(self.items[index]), torch.from_numpy(self.labels[index]))
        return self.real.rows(start, stop), fake

    def _of_epoch(self, epoch: int) -> np.ndarray:
        """The fake row beside each position of an epoch of real ones."""
        if epoch != self._epoch:
            first, size = epoch * len(self.real), len(self.real)
            labels = self.real.labels[self.real.row_numbers(first, first + size)]
            by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(self.counts)[:-1])  # positions
            partners = np.empty(size, dtype=np.int64)
            for places, stream, count in zip(by_class, self.streams, self.counts.tolist(), strict=True):
                partners[places] = stream.row_numbers(epoch * count, (epoch + 1) * count)
            self._epoch, self._partners = epoch, partners
        return self._partners


def compared(
    objective: ObjectiveName,
    images: Shuffled,
    other: tuple[np.ndarray, np.ndarray] | None,
    num_classes: int,
    *key: int | str,
) -> Pairs | Relabelled | OfOneClass:
    """What an objective of `finetune-ddo` compares, row by row.

    images: the real ones. other: items and labels of generated or rejected ones, which cca does without. num_classes:
    of the model.
    """
    if objective == "cca":
        return Relabelled(images)
    assert other is not None, "given for the others"
    if objective == "dpo":  # the same order and the same mirroring: the other half of each pair
        return Pairs(images, Shuffled(*other, *images.key, hflip=images.hflip))
    if objective == "spin" and num_classes:
        return OfOneClass(images, *other, "fake", *key)
    return Pairs(images, Shuffled(*other, "fake", *key))


class Split(NamedTuple):
    """Rows to train on and rows held out, in random but fixed order."""

    train: np.ndarray
    held_out: np.ndarray


def split(num: int, held_out: int, side: str, seed: int) -> Split:
    """The rows of a side, "real" or "fake": a function of the arguments, so that every command gets the same rows."""
    order = permutation(num, "held-out", side, seed).numpy()
    return Split(order[held_out:], order[:held_out])
