"""Random numbers that depend on seeds only: not on the number of processes, the batch size or the order."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


def seed_from(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, e.g. ("finetune", seed, round, step, row)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


BLOCK = 32  # training rows that share a generator


class RowRng:
    """Random numbers of the rows of a batch. Those of a row depend on its own seed or number only.

    They are drawn on the CPU, so that they are the same for every accelerator. Torch's CPU generator uses 32 bits of a
    seed, as EDM's per-image generators do.
    """

    def __init__(self, seeds: Sequence[int], rows_per_seed: int = 1, rows: slice = slice(None)):
        """One generator per seed, for `rows_per_seed` consecutive rows each; `rows` picks from all of them."""
        self.generators = [torch.Generator().manual_seed(int(seed) % 2**32) for seed in seeds]
        self.rows_per_seed, self.rows = rows_per_seed, rows

    @classmethod
    def for_rows(cls, *key: int | str, rows: range) -> "RowRng":
        """Numbers of training rows. key: stream and step; rows: consecutive row numbers within the global batch.

        Each block of BLOCK rows has a generator: cheaper than one per row, and still independent of how the batch is
        split into processes and micro-batches.
        """
        first = rows.start // BLOCK
        blocks = range(first, (rows.stop - 1) // BLOCK + 1)
        within = slice(rows.start - first * BLOCK, rows.stop - first * BLOCK)
        return cls([seed_from(*key, block) for block in blocks], BLOCK, within)

    def randn(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, (B, *shape)."""
        return self._draw(torch.randn, shape, dtype)

    def rand(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape)."""
        return self._draw(torch.rand, shape, dtype)

    def randint(self, high: int) -> Tensor:
        """Uniform integers from 0 to high - 1, (B,) int64."""
        return self._draw(partial(torch.randint, high), (), torch.int64)

    def _draw(self, draw: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = (self.rows_per_seed, *shape)
        return torch.cat([draw(size, generator=g, dtype=dtype) for g in self.generators])[self.rows]


class StepRng(NamedTuple):
    """Generators of one forward pass of training, by purpose: `rng("ddo").randn()` has one number for each row.

    key: (seed, ...) of the run or round. rows: global row numbers in the batch of step `step`.
    """

    key: tuple[int | str, ...]
    step: int
    rows: range

    def __call__(self, purpose: str) -> RowRng:
        return RowRng.for_rows(purpose, *self.key, self.step, rows=self.rows)


def permutation(n: int, *key: int | str) -> Tensor:
    """A random order of range(n), (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_from(*key) % 2**32))


def coins(n: int, *key: int | str) -> Tensor:
    """Tosses of a fair coin, bool (n,)."""
    generator = torch.Generator().manual_seed(seed_from(*key) % 2**32)
    return torch.randint(0, 2, (n,), generator=generator).to(torch.bool)
