"""Atomic files: written in a temporary directory, then moved. Readers see the old or the new content, never a part."""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from filelock import AcquireReturnProxy, FileLock, Timeout

from ddo_cli import console
from ddo_cli.errors import RunError, reason
from ddo_cli.places import of_environment

LOCK = ".lock"  # in a directory that one process at a time may write to
# Beside a file: the directory in which it is written, whatever names a library uses in it, .NAME.MACHINE-PROCESS.part,
# and the file before it gets its name, .NAME.MACHINE-PROCESS.whole.
_MACHINE = re.sub(r"\W", "_", platform.node().partition(".")[0])[-20:]
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<machine>\w*)-(?P<process>\d+)\.(part|whole)", re.DOTALL)
_ABANDONED = 86_400.0  # seconds after which a directory of another machine's process, which cannot be asked, is one

DAMAGED = (
    "restore it from a copy, or remove its directory and start again"  # the way out of a damaged JSON file of ours
)

UMASK = os.umask(0o077)  # can only be read by setting it
os.umask(UMASK)


class Recorder(Protocol):
    """Is told of every file below its directory before the file gets its name, and before it is removed."""

    directory: Path

    def note(self, contents: Mapping[Path, Path], is_new: bool) -> None:
        """Files that are about to get these names (the keys). is_new: none of the names is taken yet."""

    def void(self, names: Iterable[Path]) -> None:
        """Their renaming has failed."""

    def forget(self, path: Path) -> None:
        """A file, or a directory with all files below it, is about to be removed."""

    def note_start(self, path: Path) -> None:
        """A file that grows has come so far."""


recorders: list[Recorder] = []  # of the directories that this process fills; `ledger` adds them


def recorder_of(path: Path) -> Recorder | None:
    """Who records this file."""
    above = path.absolute().parents
    return next((recorder for recorder in recorders if recorder.directory in above), None)


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A temporary place of the same name, for a file or a directory, moved to `path` when the block ends and removed if
    it fails. First removes what a killed process has left of writing `path`.

    previous: where a file that is there already is kept.
    An OSError of the block, such as a full disk, names `path`, unless it is about another file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    # Machine and process keep two writers apart.
    stem = f".{path.name}.{_MACHINE}-{os.getpid()}."
    directory, whole = path.with_name(f"{stem}part"), path.with_name(f"{stem}whole")
    temporary = directory / path.name
    recorder, moves, is_noted = recorder_of(path), {path: whole}, False
    try:
        directory.mkdir(exist_ok=True)
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~UMASK)  # some writers make files that only their owner can read
        os.replace(temporary, whole)
        _remove(directory)
        if previous is not None and path.is_file():
            moves = {previous: path, path: whole}
        if recorder is not None and whole.is_file():
            recorder.note(moves, is_new=not path.exists())
            is_noted = True
        for target, source in moves.items():
            os.replace(source, target)  # the last step, after which a kill leaves nothing
        is_noted = False
    except OSError as error:
        # errno carries no file name: report the target, not the temporary.
        if error.filename is None or str(error.filename).startswith(str(path.with_name(stem))):
            error.filename = str(path)
        raise
    finally:
        if is_noted and recorder is not None:
            recorder.void([target for target, source in moves.items() if source.exists()])
        _remove(directory)
        _remove(whole)


def system_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind that of a library, or behind a message of ours."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def raise_disk_error(error: BaseException) -> None:
    """Raises the error of the system behind this one, unless there is none or it says that no file is there."""
    failed = system_error(error)
    if failed is not None and failed.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise failed from None


def _remove(place: Path) -> None:
    """Removes a file or directory of ours, where there is one."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes a file, or a directory with all below it, if it is there. One that cannot be removed is told."""
    if (recorder := recorder_of(path)) is not None:
        recorder.forget(path)
    _remove(path)
    if os.path.lexists(path):
        console.warn(f"{path} could not be removed; it is not needed any more: check the disk, and remove it")


def unfinished(directory: Path) -> list[Path]:
    """The names that temporary files of killed writers were to get, in all subdirectories."""
    found = ((place, _TEMPORARY.fullmatch(place.name)) for place in directory.rglob(".*.whole"))
    return [place.with_name(match["name"]) for place, match in found if match]


def is_being_written(path: Path) -> bool:
    """Whether a killed process has left a temporary file that was to get this name."""
    return any(_TEMPORARY.fullmatch(place.name) for place in path.parent.glob(f".{glob.escape(path.name)}.*.whole"))


def remove_abandoned(path: Path) -> None:
    """Removes what killed processes have left of writing `path`."""
    for place in _abandoned(path.parent).get(path.name, ()):
        _remove(place)


@functools.cache
def _abandoned(directory: Path) -> dict[str, list[Path]]:
    """What killed processes left, by the name that they were for. Looked for once in a process."""
    found: dict[str, list[Path]] = {}
    with contextlib.suppress(OSError):  # a directory that may be written to but not listed
        for place in directory.iterdir():
            match = _TEMPORARY.fullmatch(place.name)
            if match and _is_abandoned(place, match["machine"], int(match["process"])):
                found.setdefault(match["name"], []).append(place)
    return found


def _is_abandoned(place: Path, machine: str, process: int) -> bool:
    if machine != _MACHINE or os.name != "posix":
        return time.time() - place.stat().st_mtime > _ABANDONED
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    return False


def sweep(directory: Path, *, below: bool = False, name: str | None = None) -> None:
    """Removes what killed writers left. Only for a directory of ours whose lock is held.

    below: also in subdirectories, except those with their own lock, where another process may be writing. name: of the
    only file whose lock is held.
    """
    for path in directory.iterdir():
        if path.is_symlink():
            continue
        if match := _TEMPORARY.fullmatch(path.name):
            if name in (None, match["name"]):
                _remove(path)
        elif below and path.is_dir() and not (path / LOCK).exists():
            sweep(path, below=True)


def append_text(path: Path, text: str) -> None:
    """Adds to a text file. An OSError names it."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        error.filename = str(path)
        raise


def write_text(path: Path, text: str, previous: Path | None = None) -> None:
    """Replaces a text file. previous: where the one before is kept."""
    with replacing(path, previous) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(content: Any) -> str:
    """As `write_json` writes it."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def write_json(path: Path, content: Any, previous: Path | None = None) -> None:
    """Replaces a JSON file. previous: where the one before is kept."""
    write_text(path, json_text(content), previous)


MAX_JSON = 32 << 20  # bytes of a JSON file of ours; our choice, a manifest of five million labels


def read_bounded(path: Path) -> bytes:
    """The bytes of a JSON file. Raises ValueError for more of them than any of ours has."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"it has {size >> 20:,} MB")
    return path.read_bytes()


def parse_json(text: str | bytes) -> Any:
    """A JSON text of any origin. Raises ValueError, also where it is nested too deeply or gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict[str, Any]()
    for key, value in pairs:
        if key in content:  # of the two, Python's reader would keep the last
            raise ValueError(f"it gives '{key}' twice")
        content[key] = value
    return content


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file of a run. Raises RunError if it is missing, damaged or of another type."""
    try:
        content = parse_json(read_bounded(path))
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; is its directory one that ddo wrote?") from None
    except ValueError as error:
        raise RunError(f"{path} is damaged ({reason(error)}); {DAMAGED}") from None


def lock(path: Path, timeout: float = -1) -> AcquireReturnProxy:
    """A lock between processes, for `with`. timeout: in seconds, -1 for none.

    Raises filelock.Timeout if another process holds it, and OSError with the file's name if it cannot be had at all.
    """
    try:
        return FileLock(path).acquire(timeout=timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        number = getattr(error, "errno", None) or errno.ENOLCK
        raise OSError(number, os.strerror(number), str(path)) from None


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
    chosen = of_environment("DDO_CACHE")
    if chosen is not None:
        return None if chosen in ("", "off") else Path(chosen)
    parent = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(parent) if parent else Path.home() / ".cache") / "ddo"
    except RuntimeError:  # a user without a home
        return None
