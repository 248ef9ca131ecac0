"""Decoded images kept on disk as one uint8 array, which every later run maps into memory instead of decoding again.

An entry is never read for another source: its name holds a hash of what it was decoded from. Entries are never removed;
the directory may be emptied at any time when nothing runs.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from ddo_cli import console
from ddo_cli.files import cache_directory as directory
from ddo_cli.files import replacing

VERSION = 1  # of the entries: raised when images are decoded to other numbers
MARGIN = 1 << 30  # bytes of the disk that an entry leaves free, chosen by us


def key_of(path: Path, files: Iterable[Path], names: Iterable[str] = ()) -> str | None:
    """Hex hash of a source's absolute path, the sizes and times of its files, and the names in it.

    None if a file cannot be looked at: decoding says it better.
    """
    found = hashlib.sha256(repr((VERSION, os.path.abspath(path))).encode())
    try:
        for file in files:
            stat = file.stat()
            found.update(b"%d %d\n" % (stat.st_size, stat.st_mtime_ns))
    except OSError:
        return None
    for name in names:
        found.update(repr(name).encode() + b"\n")
    return found.hexdigest()


def existing(source: str, key: str, num: int) -> Path | None:
    """The entry of the source's `num` images, an .npy of uint8 (num, C, H, W), if an earlier run has kept one."""
    path = _entry(source, key)
    return path if path is not None and _mapped(path, num) is not None else None


def _entry(source: str, key: str) -> Path | None:
    parent = directory()
    stem = re.sub(r"[^\w.-]", "_", os.path.basename(os.path.abspath(source)))[:40]
    return None if parent is None else parent / f"{stem}-{key[:32]}.npy"


def kept(
    source: str, key: str, num: int, shape: Callable[[], Sequence[int]], fill: Callable[[np.ndarray], None]
) -> np.ndarray | None:
    """The `num` images that `fill` writes into an array (num, *shape()): read-only, from the cache or through it.

    None, with a warning where something is wrong, if the cache cannot hold them. What `fill` raises passes through,
    but it must not raise OSError.
    """
    path = _entry(source, key)
    if path is None:
        return None
    parent = path.parent
    found = _mapped(path, num)
    if found is not None:
        console.info(f"{source}: decoded images taken from {path}")
        return found
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _alone(source, path):
            found = _mapped(path, num)  # by the process that this one has waited for
            if found is None:
                _write(path, (num, *shape()), fill)
                console.info(f"{source}: decoded images kept in {path} for later runs (data.cache)")
                found = _mapped(path, num)
        return found
    except (OSError, NotImplementedError) as error:  # the latter from filelock, on a file system without locks
        _warn_once(
            f"{source}: its decoded images cannot be kept in {parent} ({error}) and are held in memory; make room, or "
            "set DDO_CACHE to another directory, or to off"
        )
        return None


@contextlib.contextmanager
def _alone(source: str, path: Path) -> Iterator[None]:
    """One process of a run decodes; the others wait, and share its entry."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.info(f"{source}: another process is decoding its images; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _mapped(path: Path, num: int) -> np.ndarray | None:
    """An entry, uint8 (num, C, H, W) and read-only; None if there is none, or it is damaged."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(found, np.memmap) or found.dtype != np.uint8 or found.ndim != 4 or len(found) != num:
        return None
    return np.asarray(found)  # a plain array over the map: rows picked from it are plain arrays too


def _write(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
    size, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if free < size + MARGIN:
        raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free, of which 1 stays free")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):  # by a killed process: the lock is ours
        left.unlink(missing_ok=True)
    with replacing(path) as temporary:
        items = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):
            # The map is a file with a hole: on a disk that fills up meanwhile, writing to it would kill the process.
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        fill(items)
        items.flush()


@functools.cache
def _warn_once(message: str) -> None:
    console.warn(message)
