"""Random numbers that depend on seeds only: not on the number of processes, the batch size or the order."""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import UsageError


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

    def of(self, rows: Tensor) -> "RowRng":
        """The same generators, of some rows (b,) only; the others draw nothing meanwhile."""
        assert self.rows_per_seed == 1, "rows share generators"
        some = RowRng(())
        some.generators = [self.generators[row] for row in rows.tolist()]
        return some

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


def seeded(seeds: Sequence[int], kind: str | None) -> RowRng:
    """The generators of samples, one per seed. kind: value of `sampling.rng`; None: cpu."""
    return CudaRng(seeds) if kind == "cuda" else RowRng(seeds)


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


# --- Torch's CUDA generator

# A kernel of torch on an A100 has so many threads (864 blocks of 256). Up to here every number comes from a thread of
# its own, the same one on every GPU that has as many: A100, H100 and later ones, but not a V100 beyond 163,840.
MOST_NUMBERS = 256 * 864

_MASK = 0xFFFFFFFF


class CudaRng(RowRng):
    """What torch's CUDA generators of these seeds draw, computed on the CPU, whatever GPU there is.

    Integers and uniform numbers are equal; normal ones up to the rounding of the GPU's logarithm and sine (1e-5).
    """

    def __init__(self, seeds: Sequence[int]):
        super().__init__(())
        self.seeds = torch.tensor([int(seed) % 2**32 for seed in seeds])[:, None]  # (B, 1)
        self.calls = 0

    def randn(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        return self._next(shape, philox_normal_double if dtype == torch.float64 else philox_normal).to(dtype)

    def rand(self, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        return self._next(shape, philox_uniform_double if dtype == torch.float64 else philox_uniform).to(dtype)

    def randint(self, high: int) -> Tensor:
        assert high < 2**28, "torch draws more bits for larger ranges"
        return self._next((), lambda words: words[0] % high)

    def _next(self, shape: Sequence[int], numbers_of: Callable[["Words"], Tensor]) -> Tensor:
        """(B, *shape) from the words of one call."""
        size = math.prod(shape)
        if size > MOST_NUMBERS:
            raise UsageError(
                f"sampling.rng = cuda: a sample takes {size} numbers at once, and beyond {MOST_NUMBERS} they depend on "
                "the GPU's number of threads; use rng = cpu"
            )
        numbers = numbers_of(philox(self.seeds, torch.arange(size), self.calls))
        self.calls += 1
        return numbers.view(len(self.seeds), *shape)


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: Tensor, thread: Tensor, counter: int) -> Words:
    """Philox 4x32-10 (Salmon et al. 2011): four words of 32 bits, int64 of the shape of key and thread together.

    As cuRAND numbers its states: key is the seed, thread the subsequence, counter counts the calls of a generator.
    """
    key, thread = torch.broadcast_tensors(key, thread)
    x = (
        torch.full_like(thread, counter & _MASK),
        torch.full_like(thread, counter >> 32),
        thread & _MASK,
        thread >> 32 & _MASK,
    )
    low, high = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        # The product of two words is exact modulo 2^64; the shift copies its sign bit, which the mask takes off.
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = ((b >> 32 & _MASK) ^ x[1] ^ low, b & _MASK, (a >> 32 & _MASK) ^ x[3] ^ high, a & _MASK)
        low, high = (low + 0x9E3779B9) & _MASK, (high + 0xBB67AE85) & _MASK
    return x


# Each element takes the first of the two or four numbers that cuRAND makes of a thread's words.


def philox_uniform(words: Words) -> Tensor:
    """[0, 1), float32: torch turns cuRAND's 1 into 0."""
    u = words[0].to(torch.float32) * 2**-32 + 2**-33
    return torch.where(u == 1, 0, u)


def philox_uniform_double(words: Words) -> Tensor:
    """[0, 1), float64."""
    u = _53_bits(*words[:2]) * 2**-53 + 2**-54
    return torch.where(u == 1, 0, u)


def philox_normal(words: Words) -> Tensor:
    """Box and Muller's sqrt(-2 log u) sin v, float32."""
    u = words[0].to(torch.float32) * 2**-32 + 2**-33
    two_pi = torch.tensor(2 * math.pi, dtype=torch.float32)  # as cuRAND rounds it; a fused product and sum
    v = (words[1].to(torch.float32).to(torch.float64) * 2**-32 * two_pi + 2**-33 * two_pi).to(torch.float32)
    return (-2 * u.log()).sqrt() * v.sin()


def philox_normal_double(words: Words) -> Tensor:
    """The same in float64, of all four words."""
    u = _53_bits(*words[:2]) * 2**-53 + 2**-54
    v = _53_bits(*words[2:]) * 2**-52 + 2**-53
    return (-2 * u.log()).sqrt() * (math.pi * v).sin()


def _53_bits(low: Tensor, high: Tensor) -> Tensor:
    return (low ^ (high << 21)).to(torch.float64)
