"""Features and their statistics kept on disk, so that a reference is not computed again for each set scored against it.

An entry's name is a hash of the images' identity and of the extractor's protocol, so it is never read for others.
Entries are never removed; the directory may be emptied at any time.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddo_cli import console
from ddo_cli.files import cache_directory, replacing

VERSION = 1  # of the entries: raised when the same protocol comes to give other numbers
_DAMAGE = (OSError, ValueError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def key_of(identity: str, protocol: dict[str, Any], outputs: Sequence[str]) -> str:
    """Hex key of what is computed from these images by this protocol.

    identity: of the source, as `data.stream.ImageStream.identity` gives it; protocol: all that decides the numbers
    (network, hash of its weights, resize rule, precision), as JSON can hold it; outputs: what is stored, in any order.
    """
    content = [VERSION, identity, protocol, sorted(outputs)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def load(key: str) -> dict[str, np.ndarray] | None:
    """The arrays stored under `key`; None if there are none, they are damaged, or the cache is off."""
    path = _path(key)
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except _DAMAGE:
        return None  # computed again, and replaced


def store(key: str, arrays: dict[str, np.ndarray]) -> bool:
    """Keeps arrays for later runs; returns whether it could. Called by one process.

    Meant for moments (F^2 numbers, 34 MB for Inception's 2048 features); features of all images (N F) only where a user
    asks for them. A cache that cannot be written is a warning, no error.
    """
    path = _path(key)
    if path is None:
        return False
    if any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError("arrays of objects are pickles and are not stored")
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
        return True
    except OSError as error:
        console.warn(
            f"features cannot be kept in {path.parent} ({error}) and will be computed again; make room, or set "
            "DDO_CACHE to another directory, or to off"
        )
        return False


def _path(key: str) -> Path | None:
    parent = cache_directory()
    return None if parent is None else parent / "features" / f"{key}.npz"
