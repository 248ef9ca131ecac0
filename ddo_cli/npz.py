"""Arrays of an .npz file one at a time: their shapes before their content, and long ones a batch at a time.

`numpy.load` reserves what a header claims and reads a whole array. Here a claim is compared with the size of the zip
member first, and nothing that would need pickle is read.
"""

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
    """One array: where it is, and what its header says.

    offset: of its numbers in the .npz, None where they are compressed or encrypted.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    offset: int | None

    def read(self) -> np.ndarray:
        """The whole array. Raises one of DAMAGE."""
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as stream:
            read_header(stream)
            numbers = self._exactly(stream, math.prod(self.shape))
        return numbers.reshape(self.shape, order="F" if self.is_fortran else "C")

    def rows(self, count: int) -> Iterator[np.ndarray]:
        """Arrays of up to `count` rows each, in order; memory for one. Raises one of DAMAGE."""
        if self.is_fortran:
            raise ValueError("its rows do not follow one another (Fortran order)")
        row_size = math.prod(self.shape[1:])
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as stream:
            read_header(stream)
            for start in range(0, self.shape[0], count):
                num = min(count, self.shape[0] - start)
                yield self._exactly(stream, num * row_size).reshape(num, *self.shape[1:])

    def _exactly(self, stream: IO[bytes], count: int) -> np.ndarray:
        raw = stream.read(count * self.dtype.itemsize)
        if len(raw) != count * self.dtype.itemsize:
            raise EOFError(f"'{self.name}' ends early")
        return np.frombuffer(raw, self.dtype)


def names(path: Path) -> set[str]:
    """Names of the arrays of an .npz. Raises one of DAMAGE."""
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def members(path: Path, *wanted: str) -> dict[str, Member]:
    """The arrays of an .npz by name: those `wanted`, or all.

    Raises one of DAMAGE if the file is not a whole one, or if one of these arrays holds objects.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name == entry.filename or (wanted and name not in wanted):
                continue
            with archive.open(entry) as stream:
                (shape, is_fortran, dtype), header_size = read_header(stream), stream.tell()
            if dtype.hasobject:
                raise ValueError(f"'{name}' is an array of objects, which could run code")
            if math.prod(shape) * dtype.itemsize != entry.file_size - header_size:
                raise ValueError(f"'{name}' claims the shape {shape} and has {entry.file_size - header_size} bytes")
            offset = None
            if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1:  # bit 0: encrypted
                with open(path, "rb") as file:
                    file.seek(entry.header_offset)
                    offset = entry.header_offset + local_header_size(file.read(30)) + header_size
            arrays[name] = Member(path, name, shape, dtype, is_fortran, offset)
    return arrays


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of an .npy; `stream` is left where the numbers begin."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"an array of the format {version}")
    shape, is_fortran, dtype = _HEADERS[version](stream)
    return shape, is_fortran, dtype


def local_header_size(start: bytes) -> int:
    """Bytes of the local header of a zip member, given its first 30 (APPNOTE.TXT, 4.3.7). Raises BadZipFile."""
    if start[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no member begins where the directory says")
    # The lengths of name and extra field are those of this header; the directory's may differ.
    return 30 + int.from_bytes(start[26:28], "little") + int.from_bytes(start[28:30], "little")
