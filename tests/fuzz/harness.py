"""Calls a parser with one input after another, and counts what it must not do."""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings
from mutations import Files, Inputs
from rich.console import Console

from ddo_cli import console
from ddo_cli.errors import MOST_LINES, DdoError, longest

SECONDS = 5.0  # of the processor, for one input: a busy machine makes none slow
WAIT = 10  # times as long by the clock is a hang
MEGABYTES = 2048  # that one input may take
KEPT = 3  # inputs of one kind of failure that are written down
RAW = re.compile(r"<_io|<[\w.]+ object| at 0x[0-9a-f]{4}|Traceback")


class Target(NamedTuple):
    """A parser. inputs: makes the strategy; read: calls the program's public function on a directory of files."""

    name: str
    inputs: Callable[[], Inputs]
    read: Callable[[Path], object]


class HangError(BaseException):
    """Raised in a parser that takes too long; no `except Exception` may hide it."""


@dataclass
class Tally:
    """What a target has done so far."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    memory: float = 0.0  # megabytes beyond what the process had
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.refused += other.refused
        self.slowest, self.memory = max(self.slowest, other.slowest), max(self.memory, other.memory)
        self.failures.update(other.failures)


def fuzz(target: Target, number: int, first_seed: int, root: Path) -> Tally:
    """Tries `number` inputs. root: a directory for the files, with failures below root/failures."""
    tally, place = Tally(), root / "input"

    @seed(first_seed)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs())
    def each(contents: Files) -> None:
        write(place, contents)
        problem = attempt(target, place, tally)
        if problem is not None:
            tally.failures[problem.kind] += 1
            if tally.failures[problem.kind] <= KEPT:
                keep(root / "failures", target.name, place, problem)

    with _home(root / "home"):
        each()
    return tally


class Problem(NamedTuple):
    """What is wrong: in short, equal for equal faults; and in full."""

    kind: str
    text: str


def attempt(target: Target, place: Path, tally: Tally) -> Problem | None:
    """Calls the parser once; what is wrong with how it ended, if anything."""
    said: list[str] = []
    error: BaseException | None = None
    before, start = _peak(anew=True), time.process_time()
    with _quiet(said), _limited():
        try:
            target.read(place)
        except DdoError as refusal:
            error = refusal
            said.append(str(refusal))
        except (Exception, HangError) as fault:
            error = fault
    seconds, megabytes = time.process_time() - start, _peak() - before
    tally.inputs += 1
    tally.accepted += error is None
    tally.refused += isinstance(error, DdoError)
    tally.slowest, tally.memory = max(tally.slowest, seconds), max(tally.memory, megabytes)
    if error is not None and not isinstance(error, DdoError):
        return Problem(f"{type(error).__name__} {_where(error)}", "".join(traceback.format_exception(error)))
    if any(isinstance(inner, MemoryError) for inner in _contexts(error)):
        return Problem(f"MemoryError behind {error}", "".join(traceback.format_exception(error)))
    if seconds > SECONDS or megabytes > MEGABYTES:
        return Problem("too slow" if seconds > SECONDS else "too large", f"{seconds:.1f} s, {megabytes:.0f} MB")
    for message in said:
        if reason := wrong(message):
            return Problem(f"{reason}: {re.sub(r'[0-9]+', '0', message.replace(str(place), '@'))[:60]}", message)
    return None


def wrong(message: str) -> str | None:
    """What is wrong with a message, if anything."""
    lines = message.split("\n")
    problems = {
        "an empty message": not message.strip(),
        "a long message": any(len(line) > longest(line) + len("warning: ") for line in lines)
        or len(lines) > MOST_LINES,
        "an object in a message": bool(RAW.search(message)),
        "control characters": not all(line.isprintable() for line in lines),
    }
    return next((problem for problem, is_there in problems.items() if is_there), None)


def write(place: Path, contents: Files) -> None:
    """Makes `place` hold exactly these files."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, content in contents.items():
        file = place / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):  # one name within another
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def keep(failures: Path, name: str, place: Path, problem: Problem) -> Path:
    """Writes an input down, for `run.py --again`."""
    failures.mkdir(parents=True, exist_ok=True)
    number = len([*failures.glob(f"{name}-*")])
    kept = failures / f"{name}-{number}"
    shutil.copytree(place, kept / "input")
    (kept / "problem.txt").write_text(f"{problem.kind}\n\n{problem.text}\n", errors="backslashreplace")
    return kept


def _where(error: BaseException) -> str:
    """The last line of ours that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "ddo_cli" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _contexts(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raises HangError after twice the time that an input may take, and for one that waits."""

    def hang(*_: Any) -> None:
        raise HangError

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, 2 * SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAIT * SECONDS)
    )  # fmt: skip
    before = [signal.signal(number, hang) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet(said: list[str]) -> Iterator[None]:
    """Collects what would be printed."""
    printed = io.StringIO()
    with mock.patch.object(console, "_err", Console(file=printed, soft_wrap=True)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    said += printed.getvalue().splitlines()


@contextlib.contextmanager
def _home(place: Path) -> Iterator[None]:
    """Caches and the working directory are below `place`."""
    place.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(place)
    try:
        with mock.patch.dict(os.environ, {"DDO_CACHE": str(place / "cache")}):
            yield
    finally:
        os.chdir(before)


def _peak(anew: bool = False) -> float:
    """Largest resident memory in megabytes. anew: counted from now on, as Linux allows."""
    if sys.platform != "linux":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
    if anew:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) / 1024
