"""Arrays of .npy and .npz files: their shapes before their content, and long ones a batch at a time.

`numpy.load` evaluates a header with its own parser, reserves what it claims and reads a whole array. Here a header is a
literal of a few plain values, its claim is compared with the size of the file or zip member before anything is
reserved, and nothing that would need pickle is read.
"""

import ast
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

DAMAGE = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, OverflowError,
    struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
MAGIC = b"\x93NUMPY"
MAX_HEADER = 4096  # bytes; numpy writes 128 for arrays of numbers
# Of a member that is taken although it is packed more than MOST_PACKED to one, which only constant arrays are; our
# choice. Images are packed by less than 20.
LARGE, MOST_PACKED = 256 << 20, 200
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}  # of the header's length, by major version (NEP 1)
_PLAIN = re.compile(r"[<>|=]?(?:[iu][1248]|f[248]|c(?:8|16)|b1|\?|[US]\d{1,6})")


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

    Raises one of DAMAGE if the file is not a whole one, or if one of these arrays holds objects or records.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name == entry.filename or (wanted and name not in wanted):
                continue
            with archive.open(entry) as stream:
                (shape, is_fortran, dtype), header_size = read_header(stream), stream.tell()
            _check_size(f"'{name}'", shape, dtype, entry.file_size - header_size)
            if entry.file_size > max(LARGE, MOST_PACKED * entry.compress_size):
                raise ValueError(f"'{name}' unpacks to {entry.file_size >> 20:,} MB of nearly nothing")
            offset = None
            if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1:  # bit 0: encrypted
                with open(path, "rb") as file:
                    file.seek(entry.header_offset)
                    offset = entry.header_offset + local_header_size(file.read(30)) + header_size
            arrays[name] = Member(path, name, shape, dtype, is_fortran, offset)
    return arrays


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of an .npy; `stream` is left where the numbers begin.

    Raises ValueError for anything but an array of numbers or texts. The claimed size is not checked: the caller knows
    that of the file.
    """
    start = stream.read(8)
    size_bytes = _LENGTH_BYTES.get(start[6]) if len(start) == 8 and start.startswith(MAGIC) else None
    if size_bytes is None:
        raise ValueError("it does not begin as an .npy file of numpy does")
    length = int.from_bytes(stream.read(size_bytes), "little")
    text = stream.read(length) if length <= MAX_HEADER else b""
    if len(text) != length or not length:
        raise ValueError(f"the header of its array claims {length} bytes")
    try:
        header = ast.literal_eval(text.decode("ascii").strip())
        shape, is_fortran, kind = header["shape"], header["fortran_order"], header["descr"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError("the header of its array is damaged") from None
    if type(shape) is not tuple or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError("the header of its array has no valid shape")
    if type(kind) is not str or not _PLAIN.fullmatch(kind) or type(is_fortran) is not bool:
        what = "objects, which could run code" if "O" in str(kind)[:3] else "something else than numbers or texts"
        raise ValueError(f"an array of {what}")
    return shape, is_fortran, np.dtype(kind)


def read_array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of an .npy of `size` bytes. Raises ValueError unless the array fills it exactly."""
    shape, is_fortran, dtype = read_header(stream)
    _check_size("the array", shape, dtype, size - stream.tell())
    numbers = np.frombuffer(stream.read(), dtype)
    return numbers.reshape(shape, order="F" if is_fortran else "C")


def _check_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> None:
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} claims the shape {str(shape)[:80]} and has {size} bytes")


def local_header_size(start: bytes) -> int:
    """Bytes of the local header of a zip member, given its first 30 (APPNOTE.TXT, 4.3.7). Raises BadZipFile."""
    if start[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no member begins where the directory says")
    # The lengths of name and extra field are those of this header; the directory's may differ.
    return 30 + int.from_bytes(start[26:28], "little") + int.from_bytes(start[28:30], "little")
