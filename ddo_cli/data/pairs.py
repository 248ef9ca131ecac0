"""Which rows of which set make up a training batch: a function of the seed and the step, so nothing needs saving."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli.rng import permutation


class Examples(NamedTuple):
    """Items as on disk and their labels (-1: none), one row each."""

    items: Tensor
    label: Tensor


class Shuffled:
    """An endless stream over a set: epoch after epoch, each in its own random order.

    Position p of the stream is row order(p // n)[p % n]; any process can look up any position.
    """

    def __init__(self, items: np.ndarray, labels: np.ndarray, *key: int | str):
        self.items, self.labels, self.key = items, labels, key
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, start: int, stop: int) -> Examples:
        """Positions start..stop - 1 of the stream."""
        index = np.concatenate([self._slice(epoch, start, stop) for epoch in self._epochs(start, stop)])
        return Examples(torch.from_numpy(self.items[index]), torch.from_numpy(self.labels[index]))

    def _epochs(self, start: int, stop: int) -> range:
        return range(start // len(self), (stop - 1) // len(self) + 1)

    def _slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self), *self.key, "epoch", epoch).numpy()
        first = epoch * len(self)
        return self._order[max(start - first, 0) : min(stop - first, len(self))]


class Pairs(NamedTuple):
    """Real and fake examples of the same positions, paired one to one."""

    real: Shuffled
    fake: Shuffled

    def rows(self, start: int, stop: int) -> tuple[Examples, Examples]:
        """Real and fake examples of stream positions start..stop - 1."""
        return self.real.rows(start, stop), self.fake.rows(start, stop)
