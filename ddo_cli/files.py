"""Files are written to a temporary name and renamed, so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddo_cli.errors import RunError

LOCK = ".lock"  # in a directory that one process at a time writes
# What `replacing` calls its temporary files, and nothing else: people have hidden files that end in .part, too.
_TEMPORARY = re.compile(r"\..+\.\d+\.part")

UMASK = os.umask(0o077)  # reading it means setting it
os.umask(UMASK)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to it when the block ends, removed when the block fails.

    An OSError of the block, such as a full disk's, names `path`, unless it is of another file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number keeps two writers apart. Leftovers of a killed process are overwritten or swept by `sweep`.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # some writers make files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        # A failed write names no file, and the temporary name says nothing to who reads it.
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sweep(directory: Path, *, below: bool = False) -> None:
    """Removes what killed writers left in `directory`. Only for one that is known as ours, and whose lock is held.

    below: in its directories, too, but for those with a lock of their own: another process may be writing there.
    """
    for path in directory.iterdir():
        if path.is_symlink():
            continue
        if below and path.is_dir() and not (path / LOCK).exists():
            sweep(path, below=True)
        elif _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file of a run. Raises RunError if it is missing, damaged, or not of this kind."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; is its directory one that ddo wrote?") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}); remove its directory and start again") from None


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def cache_directory() -> Path | None:
    """$DDO_CACHE, else $XDG_CACHE_HOME/ddo, else ~/.cache/ddo; None where DDO_CACHE is "off" or empty."""
    chosen = os.environ.get("DDO_CACHE")
    if chosen is not None:
        return None if chosen in ("", "off") else Path(chosen)
    parent = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(parent) if parent else Path.home() / ".cache") / "ddo"
    except RuntimeError:  # a user without a home
        return None
