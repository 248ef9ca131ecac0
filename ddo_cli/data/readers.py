"""Rows of an image set read when they are asked for: image files, arrays inside .npz and .npy files, shards.

A reader holds names and places, no pixels and no open files that a forked or spawned process could trip over: files are
opened by each process for itself.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from ddo_cli.data import arrays, image_files
from ddo_cli.errors import DataError

CHUNK = 1 << 22  # bytes that are decompressed at a time


class Reader(Protocol):
    """Images of one shape. `decodes`: whether reading them costs enough for worker processes to pay."""

    num: int
    shape: tuple[int, ...]  # (C, H, W)
    decodes: bool

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The images `rows` (b,), uint8 (b, C, H, W). Raises DataError naming the first that cannot be used."""
        ...


class Memory:
    """Images that are in memory: uint8 (N, C, H, W)."""

    decodes = False

    def __init__(self, items: np.ndarray):
        self.items, self.num, self.shape = items, len(items), tuple(items.shape[1:])

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Raises IndexError only."""
        return np.ascontiguousarray(self.items[rows])


# ---------------------------------------------------------------------------------------------------------------------
# Files


class OwnFile:
    """A file opened by each process for itself: a fork shares the position of what its parent had opened."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, IO[bytes]] | None = None

    def at(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size). Raises OSError, and EOFError where the file has become shorter."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open(self.path, "rb", buffering=0)  # noqa: SIM115
        file = self._opened[1]
        file.seek(offset)
        blocks, left = [], size
        while left and (block := file.read(left)):  # one system call returns 2 GB at most
            blocks.append(block)
            left -= len(block)
        if left:
            raise EOFError(f"it ends {left} bytes early")
        return b"".join(blocks)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}


class FolderBytes:
    """The bytes of files below a folder, by row."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self.names = path, names

    def __call__(self, row: int) -> bytes:
        return (self.path / self.names[row]).read_bytes()


class ZipBytes:
    """The bytes of members of a zip, by row.

    Of the directory only four numbers per member are kept, not `ZipInfo`s (a GB for ImageNet, and as much work for each
    process to parse): members that are stored or deflated are read at their place, others through zipfile.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, names: Sequence[str]):
        self.file, self.names = OwnFile(path), names
        infos = [archive.getinfo(name) for name in names]
        plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        # -1: encrypted (bit 0), or of a method that only zipfile knows
        methods = [
            -1 if info.flag_bits & 1 or info.compress_type not in plain else info.compress_type for info in infos
        ]
        self.methods = np.array(methods, dtype=np.int8)
        self.places = np.array([(info.header_offset, info.compress_size, info.CRC) for info in infos], dtype=np.int64)

    def __call__(self, row: int) -> bytes:
        if self.methods[row] < 0:
            with zipfile.ZipFile(self.file.path) as archive:
                return archive.read(self.names[row])
        offset, size, crc = self.places[row].tolist()
        content = self.file.at(_member_start(self.file, offset), size)
        if self.methods[row] == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, -zlib.MAX_WBITS)
        if zlib.crc32(content) != crc:
            raise zipfile.BadZipFile("bad CRC-32: its bytes have changed")
        return content


def _member_start(file: OwnFile, offset: int) -> int:
    """Where the content of the zip member begins whose local header is at `offset` (APPNOTE.TXT, 4.3.7)."""
    header = file.at(offset, 30)
    if header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no member begins where the directory says")
    # The lengths of name and extra field are those of this header; the directory's may differ.
    return offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class Files:
    """One image file per row. content: the bytes of a row's file."""

    decodes = True

    def __init__(self, source: str, names: Sequence[str], content: FolderBytes | ZipBytes, rows: np.ndarray):
        """rows: those that will be read; the first of them gives the shape."""
        self.source, self.names, self.content, self.num = source, names, content, len(names)
        self.first = int(rows[0])
        self.shape = tuple(self._decode(self.first).shape)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Decodes the rows in order."""
        found = np.empty((len(rows), *self.shape), dtype=np.uint8)
        for image, row in zip(found, rows.tolist(), strict=True):
            decoded = self._decode(row)
            image_files.check_same(self.source, self.names[row], decoded.shape, self.names[self.first], self.shape)
            image[...] = decoded
        return found

    def _decode(self, row: int) -> np.ndarray:
        return image_files.decode(f"{self.source}: {self.names[row]}", lambda: self.content(row))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


class ArrayFile:
    """A C-ordered uint8 array at an offset of a file.

    Rows are read, not mapped: the pages of a map count as the memory of who touched them.
    """

    decodes = False

    def __init__(self, source: str, path: Path, offset: int, shape: tuple[int, ...], channels_last: bool = False):
        """shape: of the array, (N, H, W, C) or (N, C, H, W)."""
        self.source, self.file, self.offset, self.channels_last = source, OwnFile(path), offset, channels_last
        self.num, self.stored = shape[0], shape[1:]
        self.shape = (shape[3], *shape[1:3]) if channels_last else shape[1:]
        self.size = int(np.prod(self.stored))
        self.temporary: object = None  # what keeps a temporary file alive

    def read(self, rows: np.ndarray) -> np.ndarray:
        """One system call per run of neighbouring rows."""
        found = np.empty((len(rows), self.size), dtype=np.uint8)
        try:
            for start, end in _runs(rows):
                content = self.file.at(self.offset + int(rows[start]) * self.size, (end - start) * self.size)
                found[start:end] = np.frombuffer(content, np.uint8).reshape(end - start, self.size)
        except (OSError, EOFError) as error:
            raise DataError(f"{self.source} has changed since it was opened ({error}); run the command again") from None
        images = found.reshape(len(rows), *self.stored)
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if self.channels_last else images


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, end) of the longest stretches of `rows` that increase by one."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return ((start, end) for start, end in itertools.pairwise(cuts) if end > start)


def npy(source: str, path: Path) -> ArrayFile:
    """The images uint8 (N, C, H, W) of an .npy file that numpy wrote in C order."""
    with open(path, "rb") as file:
        shape, _, _ = _npy_header(file)
        return ArrayFile(source, path, file.tell(), shape)


def npz(source: str, path: Path) -> tuple[Reader, np.ndarray, int, set[str]]:
    """Reader, labels int64 (N,), number of classes, and names of the arrays of an .npz. Raises DataError."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            keys = {name.removesuffix(".npy") for name in names}
            key = next((key for key in arrays.NPZ_ITEMS if f"{key}.npy" in names), None)
            if key is None:
                raise arrays.without_items(source, keys)
            reader = _npz_member(source, path, archive, key)
        label_key = next((key for key in arrays.NPZ_LABELS if key in keys), None)
        if label_key is None:
            return reader, np.full(reader.num, -1), 0, keys
        with np.load(path, allow_pickle=False) as content:
            labels = content[label_key]
    except (*arrays.NPZ_ERRORS, RuntimeError) as error:  # the last for encrypted members
        raise DataError(f"{source} is not a whole .npz of arrays ({error}); copy it again") from None
    return reader, *arrays.label_classes(f"{source}: {label_key}", labels, reader.num), keys


def _npz_member(source: str, path: Path, archive: zipfile.ZipFile, key: str) -> Reader:
    info, where = archive.getinfo(f"{key}.npy"), f"{source}: {key}"
    with archive.open(info) as member:
        shape, fortran, dtype = _npy_header(member)
        start = member.tell()
        if dtype.kind == "f" and len(shape) == 4:
            raise DataError(
                f"{where} is {dtype} {shape}; images are uint8 0..255: round and store them as such (from [-1, 1]: "
                "127.5 (x + 1), from [0, 1]: 255 x), since the rounding is part of every published FID"
            )
        if dtype.kind == "f":
            raise DataError(f"{where} is {dtype} {shape}: points or features, not images; give uint8 images")
        channels_last = arrays.are_channels_last(where, dtype, shape)
        size = int(np.prod(shape, dtype=object))
        if info.file_size != start + size:
            raise ValueError(f"{info.file_size - start} bytes of {key} where its shape needs {size}")
        if fortran:  # its rows are spread over the file; numpy does not write images like this by itself
            return Memory(arrays._read(source, path).items)
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            begin = _member_start(OwnFile(path), info.header_offset)
            return ArrayFile(where, path, begin + start, shape, channels_last)
        return _unpacked(where, member, size, shape, channels_last)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, is Fortran order, dtype; `file` is left where the numbers begin. Raises ValueError."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"an .npy of version {version}, which arrays of numbers do not need")


def _unpacked(where: str, member: IO[bytes], size: int, shape: tuple[int, ...], channels_last: bool) -> ArrayFile:
    """A compressed array, from where `member` stands, in a temporary file that goes with the reader."""
    directory = tempfile.gettempdir()
    if shutil.disk_usage(directory).free < size + CHUNK:
        raise DataError(
            f"{where} is compressed, and unpacked takes {size / 1e9:.1f} GB, more than {directory} has free; set "
            "TMPDIR to a larger disk, or store it with np.savez"
        )
    with tempfile.NamedTemporaryFile(prefix="ddo-", suffix=".raw", delete=False) as file:
        reader = ArrayFile(where, Path(file.name), 0, shape, channels_last)
        keeper = _Keeper()
        weakref.finalize(keeper, _remove, file.name, os.getpid())
        reader.temporary = keeper
        left = size
        while left and (block := member.read(min(left, CHUNK))):
            file.write(block)
            left -= len(block)
        member.read(1)  # the end, where zipfile compares the checksum
    if left:
        raise EOFError(f"{left} bytes are missing")
    return reader


class _Keeper:
    """Removes a temporary file when the last reader of this process is gone."""


def _remove(name: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker has a copy of the reader, not of the file
        Path(name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Several files


class Shard:
    """`items` of one safetensors file of a sample set."""

    decodes = False

    def __init__(self, path: Path):
        """Raises SafetensorError, OSError, or DataError where it holds no images."""
        self.path = path
        with safe_open(path, framework="np") as file:
            items = file.get_slice("items")
            shape, dtype = tuple(items.get_shape()), items.get_dtype()
        if dtype != "U8" or len(shape) != 4:
            raise DataError(f"{path} holds points ({dtype} {shape}), not images; give a sample set of images")
        self.num = shape[0]
        self.shape: tuple[int, ...] = shape[1:]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The file is opened for this read only: it is mapped, and its pages are given back."""
        found = np.empty((len(rows), *self.shape), dtype=np.uint8)
        try:
            with safe_open(self.path, framework="np") as file:
                items = file.get_slice("items")
                for start, end in _runs(rows):
                    found[start:end] = items[int(rows[start]) : int(rows[end - 1]) + 1]
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{self.path} has changed since it was opened ({error}); run the command again") from None
        return found


class Joined:
    """The concatenation of readers of one shape."""

    def __init__(self, parts: Sequence[Reader]):
        self.parts = parts
        self.ends = np.cumsum([part.num for part in parts])
        self.num, self.shape, self.decodes = int(self.ends[-1]), parts[0].shape, any(part.decodes for part in parts)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Each part is read once, in the order of `rows` within it."""
        owner = np.searchsorted(self.ends, rows, side="right")
        found = np.empty((len(rows), *self.shape), dtype=np.uint8)
        for number in np.unique(owner).tolist():
            mine = owner == number
            found[mine] = self.parts[number].read(rows[mine] - (self.ends[number] - self.parts[number].num))
        return found
