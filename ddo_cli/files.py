"""Atomic files: written under a temporary name, then renamed. Readers see the old or the new content, never a part."""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddo_cli.errors import RunError

LOCK = ".lock"  # in a directory that one process at a time may write to
# Exactly the temporary names of `replacing`, and those of safetensors while it writes into one of them: users may have
# other hidden files.
_TEMPORARY = re.compile(r"\..+\.\d+\.part|\.tmp[A-Za-z0-9]{6}")

UMASK = os.umask(0o077)  # can only be read by setting it
os.umask(UMASK)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to `path` when the block ends and removed if it fails.

    An OSError of the block, such as a full disk, names `path`, unless it is about another file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers apart. `sweep` removes the leftovers of a killed process.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # some writers make files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        # errno carries no file name: report the target, not the temporary.
        if error.filename is None or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sweep(directory: Path, *, below: bool = False) -> None:
    """Removes temporary files of killed writers. Only for a directory of ours whose lock is held.

    below: also in subdirectories, except those with their own lock, where another process may be writing.
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
    """The content of a JSON file of a run. Raises RunError if it is missing, damaged or of another type."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; is its directory one that ddo wrote?") from None
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise RunError(f"{path} is damaged ({error}); remove its directory and start again") from None


_SETTLED = 2.0  # seconds after which a change of a file shows in its time of change, on network file systems too
_hashes: dict[tuple[str, int, int, int, int], str] = {}  # of this process, by `_state`


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes. Read once in a process, unless the file changes."""
    state = _state(path)
    if state in _hashes:
        return _hashes[state]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    changed = max(state[3:]) / 1e9
    if _state(path) == state and time.time() - changed > _SETTLED:
        _hashes[state] = digest.hexdigest()
    return digest.hexdigest()


def _state(path: Path) -> tuple[str, int, int, int, int]:
    """What changes with the content of a file."""
    status = path.stat()
    return str(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def cache_directory() -> Path | None:
    """$DDO_CACHE, else $XDG_CACHE_HOME/ddo, else ~/.cache/ddo; None if DDO_CACHE is "off" or empty."""
    chosen = os.environ.get("DDO_CACHE")
    if chosen is not None:
        return None if chosen in ("", "off") else Path(chosen)
    parent = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(parent) if parent else Path.home() / ".cache") / "ddo"
    except RuntimeError:  # a user without a home
        return None
