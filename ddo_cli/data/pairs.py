"""Which rows of which set make up a training batch: a function of the seed and the step, so nothing needs saving."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli.rng import coins, permutation


class Examples(NamedTuple):
    """Items as on disk and their labels (-1: none), one row each."""

    items: Tensor
    label: Tensor


class Shuffled:
    """An endless stream over a set: epoch after epoch, each in its own random order.

    Position p of the stream is row order(p // n)[p % n]; any process can look up any position.
    only: the rows to use; None: all.
    hflip: whether the images of half of the positions are mirrored (left to right), drawn anew for each epoch. For
    training rows of real images only. Held-out rows and the metrics' reference stay the data themselves, and generated
    rows need none: a model that learns mirrored data draws mirrored images, so to mirror them again would put images
    into the fake side that the model did not draw.
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
        parts = [self._slice(epoch, start, stop) for epoch in self._epochs(start, stop)]
        index = np.concatenate([order for order, _ in parts])
        index = index if self.only is None else self.only[index]
        items = self.items[index]  # a copy, (stop - start, C, H, W)
        if self.hflip:
            mirrored = np.concatenate([flags for _, flags in parts])
            items[mirrored] = items[mirrored][..., ::-1]
        return Examples(torch.from_numpy(items), torch.from_numpy(self.labels[index]))

    def _epochs(self, start: int, stop: int) -> range:
        return range(start // len(self), (stop - 1) // len(self) + 1)

    def _slice(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's part of these positions: rows, and which of them are mirrored (empty without hflip)."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self), *self.key, "epoch", epoch).numpy()
            if self.hflip:
                self._mirrored = coins(len(self), *self.key, "hflip", epoch).numpy()
        first = epoch * len(self)
        own = slice(max(start - first, 0), min(stop - first, len(self)))
        return self._order[own], self._mirrored[own]


class Pairs(NamedTuple):
    """Real and fake examples of the same positions, paired one to one."""

    real: Shuffled
    fake: Shuffled

    def rows(self, start: int, stop: int) -> tuple[Examples, Examples]:
        """Real and fake examples of stream positions start..stop - 1."""
        return self.real.rows(start, stop), self.fake.rows(start, stop)


class Split(NamedTuple):
    """Rows to train on and rows held out, in random but fixed order."""

    train: np.ndarray
    held_out: np.ndarray


def split(num: int, held_out: int, side: str, seed: int) -> Split:
    """The rows of one side, "real" or "fake". A function of its arguments, so other commands find the same rows."""
    order = permutation(num, "held-out", side, seed).numpy()
    return Split(order[held_out:], order[:held_out])
