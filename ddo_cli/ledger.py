"""What a directory's own files must hold: a ledger of size and SHA-256 of every file that was written into it.

`.files.jsonl`, one line for each write, appended before the file gets its name. So after a kill at any moment a file is
what its last line says or the one before it. While a directory is claimed (`rundir.locked`), `files.replacing` and
`files.remove` keep its ledger; files of others are not in it and never looked at.
"""

import contextlib
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ddo_cli import files
from ddo_cli.files import sha256

LEDGER = ".files.jsonl"
SMALL = 1 << 20  # bytes up to which contents are always compared; our choice
_LEVELS = 5  # directories from a file up to its ledger: run/round-01/nodes/alpha.../checkpoints


class Entry(NamedTuple):
    """Size and hash of a file, or of what it begins with if it grows."""

    size: int
    sha256: str
    grows: bool = False


class Ledger:
    """The ledger of a directory. It is read anew by each question, since several processes add to it."""

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        self.file = self.directory / LEDGER
        self._lock = threading.Lock()
        self._noted: dict[str, Entry] = {}  # by this process

    # --- Writing, see `files.Recorder`

    def note(self, contents: Mapping[Path, Path], is_new: bool) -> None:
        """Appends what files with these names (keys) are about to hold."""
        lines = {}
        if self.file in map(Path.absolute, contents):  # by `renew`
            return
        for path, source in contents.items():
            # A file that is moved keeps its entry: one that is damaged by now must not become right by that.
            known = self._last(source) if source in contents and source != path else None
            lines[self._name(path)] = known or Entry(source.stat().st_size, _hash_now(source))
        self._append([{"name": name, **_without_default(entry)} for name, entry in lines.items()], not is_new)
        self._noted |= lines

    def void(self, names: Iterable[Path]) -> None:
        """Takes lines back whose files did not get their names."""
        lines = {self._name(path): {"name": self._name(path), "void": True} for path in names}
        self._noted = {name: entry for name, entry in self._noted.items() if name not in lines}
        self._append(lines.values(), True)

    def forget(self, path: Path) -> None:
        """Takes a file off the list, or a directory's files."""
        name = self._name(path)
        self._noted = {key: entry for key, entry in self._noted.items() if not _is_within(key, name)}
        self._append([{"name": name, "gone": True}], True)

    def note_moved(self, source: Path, target: Path, contents: Mapping[str, Entry]) -> None:
        """A directory that is about to get another name, with these files."""
        self.forget(source)
        names = {self._name(target / name): entry for name, entry in contents.items()}
        self._append([{"name": name, **_without_default(entry)} for name, entry in names.items()], True)

    def note_start(self, path: Path) -> None:
        """Appends what a growing file begins with: all that it holds now."""
        entry = Entry(path.stat().st_size, _hash_now(path), True)
        self._append([{"name": self._name(path), **_without_default(entry)}], False)

    def _last(self, path: Path) -> Entry | None:
        name = self._name(path)
        return self._noted.get(name) or self._entries().get(name, [None])[-1]

    def _append(self, lines: Iterable[dict[str, Any]], is_synced: bool) -> None:
        """Synced where a name is taken again: without its line, the new content would seem to be damage."""
        with self._lock, open(self.file, "ab", buffering=0) as file:
            start = file.tell()
            try:
                file.write("".join(map(_spelt, lines)).encode())
            except OSError:  # a full disk
                file.truncate(start)
                raise
            if is_synced:
                os.fsync(file.fileno())

    def renew(self) -> str | None:
        """Puts a ledger that is missing or damaged in order, and shortens a long one; returns what was wrong.

        Of files whose lines are left the present content is taken for right. Takes back lines of files that a killed
        process did not rename. Only with the directory's lock, and before `files.sweep`.
        """
        problem, entries = self.own_problem(), self._entries()
        for path in files.unfinished(self.directory):
            known = entries.get(self._name(path), [])
            if known and (not path.is_file() or _hash_now(path) != known[-1].sha256):
                self.void([path])
                known.pop()
        entries = {name: own for name, own in entries.items() if own}
        if problem is not None:
            entries = {
                name: [Entry(path.stat().st_size, _hash_now(path))]
                for name in entries
                if (path := self.directory / name).is_file()
            }
        kept = {name: [*own[:1], *own[1:][-2:]] for name, own in entries.items()}
        if problem is not None or sum(1 for _ in _lines(self.file)) > 2 * sum(map(len, kept.values())) + 64:
            lines = ({"name": name, **_without_default(entry)} for name, own in kept.items() for entry in own)
            files.write_text(self.file, "".join(map(_spelt, lines)) or "\n")
        return problem

    # --- Reading

    def problems(self, below: Path | None = None, is_read: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
        """What is wrong with the listed files, by name: "is missing", "is damaged (...)".

        below: only with this file, or the files of this directory. is_read: of which names contents are compared if
        they are large, too, which takes 1 to 2 s per GB.
        """
        if self.own_problem() is not None:  # nothing to compare with
            return {}
        found = {}
        within = None if below is None else self._name(below)
        for name, entries in self._entries().items():
            if within is None or _is_within(name, within):
                problem = _problem(self.directory / name, entries, is_read(name))
                if problem is not None:
                    found[name] = problem
        return found

    def problem(self, path: Path) -> str | None:
        """What is wrong with a file, its content compared; None if nothing, or if it is not listed."""
        return self.problems(path).get(self._name(path))

    def is_good(self, path: Path) -> bool:
        """Whether a file is there and nothing is known to be wrong with it."""
        return path.is_file() and self.problem(path) is None

    def is_listed(self, path: Path) -> bool:
        """Whether there should be this file."""
        return self._name(path) in self._entries()

    def has_been(self, path: Path, text: str) -> bool:
        """Whether a file held this text."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        return any(entry.sha256 == digest for entry in self._entries().get(self._name(path), ()))

    def _name(self, path: Path) -> str:
        return os.path.relpath(path.absolute(), self.directory)

    def own_problem(self) -> str | None:
        """What is wrong with the ledger itself; then it tells of no file."""
        if not self.file.is_file():
            return "is missing: damage of other files cannot be seen"
        is_whole = self.file.read_bytes().endswith(b"\n") and all(line is not None for line in _lines(self.file))
        return None if is_whole else "is damaged: damage of other files cannot be seen"

    def _entries(self) -> dict[str, list[Entry]]:
        """All entries of each file that should be there, in the order of writing."""
        found: dict[str, list[Entry]] = {}
        for line in _lines(self.file):
            if line is None:
                continue
            name = line["name"]
            if "gone" in line:
                found = {key: entries for key, entries in found.items() if not _is_within(key, name)}
            elif "void" in line:
                if found.get(name, []):
                    found[name].pop()
                if not found.get(name, [1]):
                    del found[name]
            else:
                found.setdefault(name, []).append(Entry(line["size"], line["sha256"], line.get("grows", False)))
        return found


def entries(paths: Iterable[Path]) -> dict[str, Entry]:
    """What files hold, by their names."""
    return {path.name: Entry(path.stat().st_size, _hash_now(path)) for path in paths}


def _without_default(entry: Entry) -> dict[str, Any]:
    return {"size": entry.size, "sha256": entry.sha256, **({"grows": True} if entry.grows else {})}


def _spelt(line: dict[str, Any]) -> str:
    return json.dumps({**line, "check": zlib.crc32(json.dumps(line, sort_keys=True).encode())}, sort_keys=True) + "\n"


def _lines(file: Path) -> Iterator[dict[str, Any] | None]:
    """The lines; None for a damaged one."""
    for text in file.read_bytes().splitlines() if file.is_file() else ():
        if not text:
            continue  # of a ledger that lists nothing
        line = None
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            content = files.parse_json(text)
            check = content.pop("check", None)
            line = content if check == zlib.crc32(json.dumps(content, sort_keys=True).encode()) else None
        yield line


def _is_within(name: str, directory: str) -> bool:
    return directory == "." or name == directory or name.startswith(f"{directory}/")


def _problem(path: Path, entries: list[Entry], is_read: bool) -> str | None:
    """What is wrong with a file. It may be the one of the last entry but one: see the head of this module."""
    possible = entries[-1:] if entries[-1].grows else entries[-2:]  # a growing file is noted after it has grown
    try:
        size = path.stat().st_size
    except OSError:
        return None if files.is_being_written(path) else "is missing"
    fitting = [entry for entry in possible if size == entry.size or (entry.grows and size > entry.size)]
    if not fitting:
        return f"is damaged ({size} bytes in place of {possible[-1].size})"
    if not is_read and size > SMALL:
        return None
    return None if any(_content(path, entry) == entry.sha256 for entry in fitting) else "is damaged (other content)"


def _content(path: Path, entry: Entry) -> str:
    if not entry.grows:
        return sha256(path)
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(entry.size)).hexdigest()


def _hash_now(path: Path) -> str:
    """Without asking what the file held before: it is new."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def kept(directory: Path) -> Iterator[Ledger]:
    """Keeps the ledger of a directory meanwhile, unless one above it is kept already, which then has these files."""
    above = of(directory)
    if above is not None:
        yield above
        return
    own = Ledger(directory)
    files.recorders.append(own)
    try:
        yield own
    finally:
        files.recorders.remove(own)


def of(path: Path) -> Ledger | None:
    """The ledger that this process keeps for a file or directory."""
    places = (path.absolute(), *path.absolute().parents)
    return next((one for one in files.recorders if isinstance(one, Ledger) and one.directory in places), None)


def near(directory: Path) -> Ledger:
    """The ledger that lists the files of a directory: its own, or that of the run it belongs to."""
    places = (directory.absolute(), *directory.absolute().parents[:_LEVELS])
    return of(directory) or next((Ledger(place) for place in places if (place / LEDGER).is_file()), Ledger(directory))


def damage(path: Path) -> str | None:
    """What is wrong with a file that a command has written, its content compared; None if nothing is known."""
    return near(path.parent).problem(path)
