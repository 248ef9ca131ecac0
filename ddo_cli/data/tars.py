"""Image sets in tar archives, read where they lie: shards of webdataset, `000.jpg` with `000.txt`, or any others.

A tar is taken for a folder of its files, as a zip is: sorted by name, with the same captions and labels. The library
webdataset reads a tar as a stream, so that neither numbers of items nor their order are known before the end.
"""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ddo_cli.data.image_files import Listing, check_size, listing
from ddo_cli.data.readers import MAX_MEMBER
from ddo_cli.errors import DataError, printable, reason

SUFFIX = ".tar"
# What the reader of tars raises for damaged bytes, RecursionError (a RuntimeError) for headers about headers.
DAMAGE = (
    OSError, EOFError, ValueError, LookupError, OverflowError, RuntimeError, MemoryError, zlib.error, struct.error,
    tarfile.TarError,
)  # fmt: skip


class Place(NamedTuple):
    """Where a file's content lies: offset and size in bytes."""

    offset: int
    size: int


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """What the archive holds, wherever names point: it is read, and nothing is written.

    Raises ReadError if a header does not lie behind the one before: one that sends back would be read for ever.
    """
    end = -1
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined] # which would keep a kB of each
        if member.offset <= end or member.size < 0:
            raise tarfile.ReadError("its headers do not follow one another")
        end = member.offset
        yield member


def index(path: Path) -> dict[str, Place]:
    """The files of an archive that is not compressed. Raises DataError for a damaged one, and for other than files."""
    found = dict[str, Place]()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in members(archive):
                name = printable(member.name, 80)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    kind = "link" if member.issym() or member.islnk() else "device or a sparse file"
                    raise DataError(f"{path}: {name} is a {kind}; pack the files themselves (tar --dereference --hard-"
                                    "dereference)")  # fmt: skip
                if member.name in found:  # as when an archive is appended to
                    raise DataError(f"{path} holds {name} more than once; unpack it, and pack the folder")
                found[member.name] = Place(member.offset_data, member.size)
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a whole tar ({reason(error, 100)}); copy it again") from None
    return found


def entries(
    source: str, shards: Mapping[str, Path], found: Sequence[Mapping[str, Place]], folders_are_classes: bool
) -> tuple[Listing, "TarBytes"]:
    """The images of archives as one set. shards: by name, "" for a single one; found: the `index` of each.

    Raises DataError.
    """
    places = dict[str, tuple[int, int, int]]()
    for number, (shard, files) in enumerate(zip(shards, found, strict=True)):
        places.update((f"{shard}/{name}" if shard else name, (number, *place)) for name, place in files.items())
    paths = list(shards.values())

    def read(name: str, num: int) -> bytes | None:
        if name not in places:
            return None
        number, *place = places[name]
        check_size(f"{source}: {name}", place[1], num)
        return _content(paths[number], *place)

    told = listing(source, [*places], read, folders_are_classes)
    return told, TarBytes(paths, told.names, np.array([places[name] for name in told.names], dtype=np.int64))


class TarBytes:
    """The bytes of members of tars, by row. places: int64 (N, 3): the archive, offset and size."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str], places: np.ndarray):
        self.paths, self.names, self.places = paths, names, places

    def __call__(self, row: int) -> bytes:
        number, offset, size = self.places[row].tolist()
        if size > MAX_MEMBER:
            raise ValueError(f"it has {size >> 20:,} MB, which no image has")
        return _content(self.paths[number], offset, size)

    def open(self, row: int) -> IO[bytes]:
        """The member of a row as a file, in memory."""
        return io.BytesIO(self(row))

    def files(self, rows: Iterable[int]) -> Iterable[Path]:
        """The archives."""
        return self.paths


def _content(path: Path, offset: int, size: int) -> bytes:
    """The archive is opened each time: a set may have more of them than a process may keep open."""
    with open(path, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise EOFError(f"{path.name} ends {size - len(content)} bytes early")
    return content
