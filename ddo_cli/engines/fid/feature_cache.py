"""Features and accumulator states on disk, so that no image set passes through the same network twice.

An entry's name is a hash of the images and of the extractor's protocol, so it is never read for others. The entries
used longest ago make room for new ones; the directory may be emptied at any time.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddo_cli import console, npz
from ddo_cli.errors import reason
from ddo_cli.files import cache_directory, replacing

VERSION = 2  # of the entries: raised when a change of code changes the numbers of an unchanged protocol
# Our choice of limits, in bytes:
MAX_ENTRY = 1 << 30  # of one entry: the features of 131,072 images of 2048 features
MAX_TOTAL = 20 << 30  # of all entries of a part: moments of 600 sets of 2048 features
MARGIN = 1 << 30  # of the disk, left free
Part = Literal["features", "sets"]  # of the directory: features and states; digests of images


def key_of(identity: str, protocol: dict[str, Any], outputs: Sequence[str]) -> str:
    """Hex key of what is computed from these images by this protocol.

    identity: of the images, such as their `data.inspection.Inspection.digest`; protocol: all that determines the
    numbers (network, hash of its weights, resize rule, precision), as JSON; outputs: what is stored, in any order.
    """
    content = [VERSION, identity, protocol, sorted(outputs)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def load(key: str, part: Part = "features") -> dict[str, np.ndarray] | None:
    """The arrays stored under `key`; None if there are none or the cache is off, with a warning if they are damaged."""
    path = _path(key, part)
    if path is None or not path.is_file():
        return None
    try:
        arrays = {name: member.read().copy() for name, member in npz.members(path).items()}
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(path)  # the entries used longest ago are removed first
        return arrays
    except npz.DAMAGE:
        damaged(key, part)
        return None


def damaged(key: str, part: Part = "features") -> None:
    """Warns of an entry that cannot be used and removes it, so that this is said once; it is computed again."""
    console.warn(f"{_path(key, part)} is damaged and is computed again")
    with contextlib.suppress(OSError):  # a read-only cache
        forget(key, part)


def store(key: str, arrays: dict[str, np.ndarray], part: Part = "features") -> bool:
    """Keeps arrays for later runs; returns whether it could. Called by one process.

    Meant for moments (F^2 numbers, 34 MB for Inception's 2048 features), and for features of all images (N F) where a
    metric needs them. Above MAX_ENTRY nothing is kept. A cache that cannot be written is a warning, no error.
    """
    path, size = _path(key, part), sum(array.nbytes for array in arrays.values())
    if path is None or size > MAX_ENTRY:
        return False
    if any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError("arrays of objects are pickles and are not stored")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(path.parent, size)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
        return True
    except OSError as error:
        console.warn(
            f"features cannot be kept in {path.parent} ({reason(error)}) and will be computed again; make room, or set "
            "DDO_CACHE to another directory, or to off"
        )
        return False


def holds(key: str, part: Part = "features") -> bool:
    """Whether there is an entry."""
    path = _path(key, part)
    return path is not None and path.is_file()


def forget(key: str, part: Part = "features") -> None:
    """Removes an entry."""
    if path := _path(key, part):
        path.unlink(missing_ok=True)


def keys_below(parent: str, part: Part) -> Iterator[str]:
    """Keys of the entries whose key starts with `parent`/."""
    if directory := cache_directory():
        yield from (f"{parent}/{path.stem}" for path in sorted((directory / part / parent).glob("*.npz")))


def _path(key: str, part: Part) -> Path | None:
    parent = cache_directory()
    return None if parent is None else parent / part / f"{key}.npz"


def _make_room(directory: Path, size: int) -> None:
    """Removes the entries used longest ago, down to MAX_TOTAL. Raises OSError where the disk itself is too full."""
    entries = []
    for path in directory.glob("*.npz"):
        with contextlib.suppress(FileNotFoundError):  # another process may remove entries, too
            stat = path.stat()
            entries.append((stat.st_mtime_ns, stat.st_size, path))
    total = size + sum(held for _, held, _ in entries)
    for _, held, path in sorted(entries):
        if total <= MAX_TOTAL:
            break
        path.unlink(missing_ok=True)
        total -= held
    free = shutil.disk_usage(directory).free
    if free < size + MARGIN:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB to write, {free / 1e9:.1f} GB free, of which 1 stays free")
