"""Cache of large arrays, which later runs map into memory: decoded images, and features to train on.

The file name holds a hash of the source, so an entry is never read for another one. Entries are never removed; the
directory may be emptied whenever nothing runs.
"""

import errno
import functools
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from filelock import AcquireReturnProxy, Timeout

from ddo_cli import console, npz
from ddo_cli.errors import reason
from ddo_cli.files import cache_directory as directory
from ddo_cli.files import lock, replacing, sweep

VERSION = 2  # of the entries: raised when images are decoded to other numbers
MARGIN = 1 << 30  # bytes of the disk that an entry must leave free; our choice


def key_of(path: Path, files: Iterable[Path], names: Iterable[str] = ()) -> str | None:
    """Hex hash of a source's absolute path, the sizes and times of its files, and the names in it.

    None if a file cannot be looked at; decoding then reports it.
    """
    key = hashlib.sha256(repr((VERSION, os.path.abspath(path))).encode())
    try:
        for file in files:
            stat = file.stat()
            key.update(b"%d %d\n" % (stat.st_size, stat.st_mtime_ns))
    except OSError:
        return None
    for name in names:
        key.update(repr(name).encode() + b"\n")
    return key.hexdigest()


def existing(source: str, key: str, num: int) -> Path | None:
    """The entry of the source's `num` images, an .npy of uint8 (num, C, H, W); None if no earlier run wrote one."""
    path = _entry(source, key)
    return path if path is not None and _mapped(path, num) is not None else None


def _entry(source: str, key: str) -> Path | None:
    parent = directory()
    stem = re.sub(r"[^\w.-]", "_", os.path.basename(os.path.abspath(source)))[:40]
    return None if parent is None else parent / f"{stem}-{key[:32]}.npy"


def kept(
    source: str, key: str, num: int, shape: Callable[[], Sequence[int]], fill: Callable[[np.ndarray], None]
) -> np.ndarray | None:
    """The `num` images of a source, read-only: the entry, which `fill` writes into an array (num, *shape()) if missing.

    None if the cache is off, or, with a warning, if it cannot hold them. Errors of `fill` pass through; it must not
    raise OSError.
    """
    try:
        return array(source, key, num, shape, fill, "decoded images", "data.cache")
    except OSError as error:  # such as a full disk, or a file system without locks
        path = _entry(source, key)
        assert path is not None, "without a cache nothing is written"
        _warn_once(
            f"{source}: its decoded images cannot be kept in {path.parent} ({reason(error)}) and are held in memory; "
            "make room, or set DDO_CACHE to another directory, or to off"
        )
        return None


def array(
    source: str,
    key: str,
    num: int,
    shape: Callable[[], Sequence[int]],
    fill: Callable[[np.ndarray], None],
    what: str,
    setting: str,
    dtype: type[np.generic] = np.uint8,
) -> np.ndarray | None:
    """The entry of any four-dimensional array (num, *shape()), as `kept`; None if the cache is off.

    what, setting: its content and the recipe key behind it, for people. Raises OSError where it cannot be written.
    """
    path = _entry(source, key)
    if path is None:
        return None
    items = _mapped(path, num, dtype)
    if items is not None:
        console.info(f"{source}: {what} taken from {path}")
        return items
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(source, path, what):
        items = _mapped(path, num, dtype)  # written by the process that held the lock
        if items is None:
            _write(path, (num, *shape()), fill, dtype)
            console.info(f"{source}: {what} kept in {path} for later runs ({setting})")
            items = _mapped(path, num, dtype)
    return items


def _alone(source: str, path: Path, what: str) -> AcquireReturnProxy:
    """Lock of an entry, for `with`: one process of a run makes it, the others wait and share the result."""
    place = path.with_name(f".{path.name}.lock")
    try:
        return lock(place, timeout=0)
    except Timeout:
        console.info(f"{source}: another process makes its {what}; waiting for it")
        return lock(place)


def _mapped(path: Path, num: int, dtype: type[np.generic] = np.uint8) -> np.ndarray | None:
    """An entry (num, C, H, W), read-only; None if missing or, with a warning, damaged."""
    try:
        with open(path, "rb") as file:
            shape, is_fortran, found = npz.read_header(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
        if is_fortran or found != dtype or len(shape) != 4 or shape[0] != num:
            raise ValueError("another array")
        if offset + math.prod(shape) * found.itemsize != size:
            raise ValueError("cut off")
        # asarray: without the subclass memmap, which indexing would pass on
        return np.asarray(np.memmap(path, dtype, "r", offset, shape))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        _warn_once(f"{path} is damaged and is made again")
        return None


def _write(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None], dtype: type[np.generic]) -> None:
    size, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
    if free < size + MARGIN:
        raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free, of which 1 stays free")
    sweep(path.parent, name=path.name)
    with replacing(path) as temporary:
        items = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # The mapped file is sparse: if the disk filled up meanwhile, writing to it would kill the process.
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        fill(items)
        items.flush()


@functools.cache
def _warn_once(message: str) -> None:
    console.warn(message)
