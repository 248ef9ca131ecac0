"""Arrays of an .npz file one at a time: their shapes before their content, and long ones a batch at a time.

`numpy.load` reserves what a header claims and reads a whole array. Here a claim is held against the size of the file's
member first, and nothing that would need pickle is read.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

DAMAGE = (
    OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError, MemoryError,
    SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Member(NamedTuple):
    """One array: where it is, and what its header says."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool

    def read(self, most: int = 2**29) -> np.ndarray:
        """The whole array. most: bytes; a covariance of 8192 features has so many. Raises one of DAMAGE."""
        if math.prod(self.shape) * self.dtype.itemsize > most:
            raise ValueError(f"'{self.name}' of the shape {self.shape} is larger than any statistics")
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as stream:
            _header(stream)
            flat = np.frombuffer(self._exactly(stream, math.prod(self.shape)), self.dtype)
        return flat.reshape(self.shape, order="F" if self.is_fortran else "C")

    def rows(self, count: int) -> Iterator[np.ndarray]:
        """Arrays of up to `count` rows each, in order; memory for one. Raises one of DAMAGE."""
        if self.is_fortran:
            raise ValueError("its rows do not follow one another (Fortran order)")
        each = math.prod(self.shape[1:])
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as stream:
            _header(stream)
            for start in range(0, self.shape[0], count):
                num = min(count, self.shape[0] - start)
                yield np.frombuffer(self._exactly(stream, num * each), self.dtype).reshape(num, *self.shape[1:])

    def _exactly(self, stream: IO[bytes], count: int) -> bytes:
        raw = stream.read(count * self.dtype.itemsize)
        if len(raw) != count * self.dtype.itemsize:
            raise EOFError(f"'{self.name}' ends early")
        return raw


def members(path: Path) -> dict[str, Member]:
    """The arrays of an .npz by name. Raises one of DAMAGE if it is not a whole one, or holds an array of objects."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                continue
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as stream:
                (shape, is_fortran, dtype), begin = _header(stream), stream.tell()
            if dtype.hasobject:
                raise ValueError(f"'{name}' is an array of objects, which could run code")
            if math.prod(shape) * dtype.itemsize != entry.file_size - begin:
                raise ValueError(f"'{name}' claims the shape {shape} and has {entry.file_size - begin} bytes")
            found[name] = Member(path, name, shape, dtype, is_fortran)
    return found


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"an array of the format {version}")
    shape, is_fortran, dtype = _HEADERS[version](stream)
    return shape, is_fortran, dtype
