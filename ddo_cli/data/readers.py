"""Readers: items of a set by row, out of image files, zip members, and arrays inside .npz, .npy and safetensors files.

A reader holds names and offsets but no items (except `Memory`), and no open file whose position forked processes share.
"""

import functools
import io
import itertools
import json
import lzma
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError

from ddo_cli.checkpoint import open_tensors
from ddo_cli.data.items import Encoded
from ddo_cli.errors import DataError, reason
from ddo_cli.npz import local_header_size, read_header

ZIP_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, OverflowError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip
TENSOR_ERRORS = (SafetensorError, OSError, ValueError, KeyError, TypeError, EOFError)
MAX_MEMBER = 256 << 20  # bytes of an image in a zip; our choice: more pixels than Pillow reads
_DTYPES = {"U8": "u1", "I16": "i2", "I32": "i4", "I64": "i8", "F16": "f2", "F32": "f4", "F64": "f8"}


class Reader(Protocol):
    """`num` items of one shape and type, in a fixed order.

    decodes: whether reading is slow enough that worker processes help.
    """

    num: int
    dtype: np.dtype[Any]
    decodes: bool

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The items `rows` (b,), a new array (b, *shape). Raises DataError naming the first that cannot be used."""


class Contents(NamedTuple):
    """What a source holds: all items, labels int64 (N,), -1 = none, and the number of classes.

    key: hash of names, sizes and times of the files; None for image files (of which only a part may be used), latents,
    and embedded sets. encoded: where latents come from. notes: what is assumed or left out, for people; warnings: what
    speaks against comparing the set's scores; classes: names by class number, where folders have given the labels;
    captions: of each item, or (); with them an item's label is the number of its caption, which is its place.
    """

    reader: Reader
    labels: np.ndarray
    num_classes: int
    key: str | None = None
    encoded: Encoded | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    classes: Mapping[str, str] = MappingProxyType({})
    captions: tuple[str, ...] = ()


class Memory:
    """Items that are in memory: (N, ...)."""

    decodes = False

    def __init__(self, items: np.ndarray):
        self.items, self.num, self.shape, self.dtype = items, len(items), tuple(items.shape[1:]), items.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.items[rows])


class Lazy:
    """Rows of a reader as an array: length, shape, and indexing, which reads the rows."""

    def __init__(self, reader: Reader, rows: np.ndarray):
        self._reader, self._rows = reader, rows
        self.shape, self.dtype, self.ndim = (len(rows), *reader.shape), reader.dtype, 1 + len(reader.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        rows = self._rows[index]
        items = self._reader.read(np.atleast_1d(rows))
        return items if np.ndim(rows) else items[0]


class Joined:
    """The concatenation of readers of one shape and type."""

    def __init__(self, parts: Sequence[Reader]):
        self.parts = parts
        self.ends = np.cumsum([part.num for part in parts])
        self.num, self.shape, self.dtype = int(self.ends[-1]), parts[0].shape, parts[0].dtype
        self.decodes = any(part.decodes for part in parts)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Each part is read once, in the order of `rows` within it."""
        part_of = np.searchsorted(self.ends, rows, side="right")
        items = np.empty((len(rows), *self.shape), dtype=self.dtype)
        order = np.argsort(part_of, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(part_of[order])) + 1):
            if len(places):
                number = int(part_of[places[0]])
                first = self.ends[number] - self.parts[number].num
                items[places] = self.parts[number].read(rows[places] - first)
        return items


# --- One array per file


class ArrayFile:
    """A C-ordered array (N, ...) at an offset of a file.

    Rows are read, not mapped, because mapped pages count as memory of the process. The file is opened for each read,
    because ImageNet has more shards than a process may keep open.
    channels_last: whether the array is (N, H, W, C), read as (N, C, H, W).
    """

    decodes = False

    def __init__(
        self,
        source: str,
        path: Path,
        offset: int,
        shape: tuple[int, ...],
        dtype: Any = np.uint8,
        channels_last: bool = False,
    ):
        self.source, self.path, self.offset, self.channels_last = source, path, offset, channels_last
        self.num, self.stored, self.dtype = shape[0], shape[1:], np.dtype(dtype)
        self.shape = (shape[3], *shape[1:3]) if channels_last else shape[1:]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """One system call per run of neighbouring rows."""
        items = np.empty((len(rows), *self.stored), self.dtype)
        content = items.reshape(len(rows), int(np.prod(self.stored))).view(np.uint8)  # (b, bytes of an item)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()  # of stretches that increase by one
        try:
            with open(self.path, "rb") as file:
                for start, end in itertools.pairwise([*starts, len(rows)]):
                    file.seek(self.offset + int(rows[start]) * content.shape[1])
                    if file.readinto(content[start:end].data) != content[start:end].nbytes:
                        raise EOFError("it has become shorter")
        except (OSError, EOFError) as error:
            raise DataError(
                f"{self.source} has changed since it was opened ({reason(error)}); run the command again"
            ) from None
        return np.ascontiguousarray(items.transpose(0, 3, 1, 2)) if self.channels_last else items


def npy(source: str, path: Path) -> ArrayFile:
    """The images uint8 (N, C, H, W) of an .npy file that numpy wrote in C order."""
    with open(path, "rb") as file:
        shape, _, _ = read_header(file)
        return ArrayFile(source, path, file.tell(), shape)


def join_tensors(files: Sequence[Path], key: str) -> Joined:
    """The tensors `key` of safetensors files, one after another. Raises one of TENSOR_ERRORS."""
    parts = [_tensor(file, key) for file in files]
    for file, part in zip(files, parts, strict=True):
        if (part.shape, part.dtype) != (parts[0].shape, parts[0].dtype):
            raise ValueError(
                f"{file} holds {part.dtype} {part.shape} where the first shard holds {parts[0].dtype} {parts[0].shape}"
            )
    return Joined(parts)


def _tensor(path: Path, key: str) -> ArrayFile:
    with open_tensors(path, "np"):  # checks that the file is as long as its header says
        pass
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_size))[key]
    offset = 8 + header_size + entry["data_offsets"][0]
    return ArrayFile(str(path), path, offset, tuple(entry["shape"]), _DTYPES[entry["dtype"]])


# --- One item per file


class Content(Protocol):
    """The bytes of image files, by row."""

    def __call__(self, row: int) -> bytes: ...

    def open(self, row: int) -> IO[bytes]: ...

    def files(self, rows: Iterable[int]) -> Iterable[Path]:
        """The files on disk that hold these rows."""


class FolderBytes:
    """The bytes of files below a folder, by row."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self.names = path, names

    def __call__(self, row: int) -> bytes:
        with self.open(row) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_MEMBER:
                raise ValueError(f"it has {size >> 20:,} MB, which no image has")
            return file.read()

    def open(self, row: int) -> IO[bytes]:
        """The file of a row, of which only a part may be read."""
        path = self.path / self.names[row]
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe could take for ever, and a device has no end
            raise ValueError("it is no file with content")
        return open(path, "rb")

    def files(self, rows: Iterable[int]) -> Iterable[Path]:
        """One for each row."""
        return (self.path / self.names[row] for row in rows)


class ZipBytes:
    """The bytes of members of a zip, by row.

    Only five numbers per member are kept, since the `ZipInfo`s of ImageNet take a GB: members that are stored or
    deflated are read at their offset, others through zipfile. Positional reads let threads and forked processes share
    the open file.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, names: Sequence[str]):
        self.path, self.names = path, names
        infos = [archive.getinfo(name) for name in names]
        plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        # -1: encrypted (bit 0), or of a method that only zipfile knows
        methods = [
            -1 if info.flag_bits & 1 or info.compress_type not in plain else info.compress_type for info in infos
        ]
        self.methods = np.array(methods, dtype=np.int8)
        self.places = np.array(
            [(info.header_offset, info.compress_size, info.CRC, info.file_size) for info in infos], dtype=np.int64
        ).reshape(-1, 4)
        self._file: IO[bytes] | None = None
        self._archive: tuple[int, zipfile.ZipFile] | None = None

    def __call__(self, row: int) -> bytes:
        offset, size, crc, unpacked = self.places[row].tolist()
        if max(size, unpacked) > MAX_MEMBER:
            raise zipfile.BadZipFile(f"it claims {max(size, unpacked) >> 20:,} MB, which no image has")
        if self.methods[row] < 0:
            if self._archive is None or self._archive[0] != os.getpid():  # its position must not be shared by a fork
                self._archive = os.getpid(), zipfile.ZipFile(self.path)
            return self._archive[1].read(self.names[row])
        content = self._at(offset + local_header_size(self._at(offset, 30)), size)
        if self.methods[row] == zipfile.ZIP_DEFLATED:
            # Not more than the directory says: a small member could unpack to any size.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, unpacked + 1)
        if zlib.crc32(content) != crc:
            raise zipfile.BadZipFile("bad CRC-32: its bytes have changed")
        return content

    def open(self, row: int) -> IO[bytes]:
        """The member of a row as a file, in memory."""
        return io.BytesIO(self(row))

    def files(self, rows: Iterable[int]) -> Iterable[Path]:
        """The archive."""
        return [self.path]

    def _at(self, offset: int, size: int) -> bytes:
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) != size:
            raise EOFError(f"it ends {size - len(content)} bytes early")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_archive": None}


class ItemFiles(ABC):
    """One item per file; subclasses decode it."""

    decodes = True
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, source: str, names: Sequence[str], content: Content, first: int = 0):
        """content: reads the bytes of a row's file; first: the row that defines the shape."""
        self.source, self.names, self.content, self.first, self.num = source, names, content, first, len(names)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first item, which is decoded for it."""
        return self.item(self.first).shape

    @abstractmethod
    def item(self, row: int) -> np.ndarray:
        """The item of a row. Raises DataError."""

    @abstractmethod
    def mismatch(self, row: int, item: np.ndarray) -> DataError:
        """The error to raise for an item that is not like the first."""

    def read(self, rows: np.ndarray) -> np.ndarray:
        items = np.empty((len(rows), *self.shape), self.dtype)
        for place, row in enumerate(rows.tolist()):
            item = self.item(row)
            if item.shape != self.shape or item.dtype != self.dtype:
                raise self.mismatch(row, item)
            items[place] = item
        return items
