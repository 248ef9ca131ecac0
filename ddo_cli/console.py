"""All output: results on stdout, progress and messages on stderr, from rank 0 only."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from ddo_cli.errors import RunError, fitted, visible

_out = Console(highlight=False, emoji=False)
if not _out.is_terminal:
    _out = Console(highlight=False, emoji=False, width=120)  # a log or a pipe has no width
_err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
_json_only = False
_is_answered = False  # whether the one JSON object has been printed
_active: "_Screen | None" = None
PLAIN_INTERVAL = 10.0  # seconds between progress lines where stderr is not a terminal


def use_json(only_json: bool) -> None:
    """With True, `result` prints one JSON object and nothing else."""
    global _json_only, _is_answered
    _json_only, _is_answered = only_json, False


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def info(message: str) -> None:
    """A line of progress on stderr."""
    if _is_main():
        _err.print(Text(fitted(message)))


def warn(message: str) -> None:
    """A warning on stderr."""
    if _is_main():
        _err.print(Text.assemble(("warning:", "yellow"), " ", fitted(message)))


def error(kind: str, message: str) -> None:
    """An error on stderr; with --json also on stdout, unless the result is already there.

    Problems of a recipe have a line each, and differences of runs; elsewhere a line's end is part of a name.
    """
    lines = message.split("\n") if kind in ("recipe", "run") else [message]
    message = "\n".join(map(fitted, lines))
    if _json_only and _is_main() and not _is_answered:
        with contextlib.suppress(RunError):  # stdout is full or closed: stderr remains
            _print_json({"error": {"kind": kind, "message": message}})
    _err.print(Text.assemble(("error:", "red"), " ", message))


def result(content: Mapping[str, Any], summary: str | None = None, table: Table | None = None) -> None:
    """Prints a command's result: one JSON object with --json, else the table and the summary.

    Raises RunError if stdout is full or closed.
    """
    if not _is_main():
        return
    if _json_only:
        _print_json(content)
        return
    with _to_stdout():
        if table is not None:
            _out.print(table)
        if summary is not None:
            _out.print(Text(visible(summary, "\n\t")), soft_wrap=True)


def show(table: Table) -> None:
    """A table on stderr, during a run."""
    if _is_main():
        _err.print(table, width=None if _err.is_terminal else 120)


def _print_json(content: Mapping[str, Any]) -> None:
    # Not through Rich, which would wrap and highlight.
    global _is_answered
    with _to_stdout():
        sys.stdout.write(json.dumps(_finite(content), allow_nan=False) + "\n")
    _is_answered = True


def _finite(value: Any) -> Any:
    """`value` with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _to_stdout() -> Iterator[None]:
    """Raises RunError if stdout is full or closed."""
    try:
        yield
        sys.stdout.flush()
    except OSError as problem:
        release_stdout()
        raise RunError(
            f"stdout: {problem.strerror}; the result could not be printed. What the command wrote to disk is whole: "
            "send stdout elsewhere, and run it again to see the result"
        ) from None


def release_stdout() -> None:
    """Discards buffered output of a full or closed stdout; Python would try to write it again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts; the first column is left-aligned, the others right-aligned."""
    built = Table(title=Text(visible(title), style="bold"), title_justify="left")
    for number, column in enumerate(columns):
        built.add_column(Text(visible(column)), justify="left" if number == 0 else "right")
    for row in rows:
        built.add_row(*(Text(visible(cell, "\n")) for cell in row))
    return built


# --- Progress


class Bar(Protocol):
    """A progress bar. fields: a short text beside it."""

    def advance(self, count: int = 1, fields: str | None = None) -> None: ...


class _Silent:
    def advance(self, count: int = 1, fields: str | None = None) -> None: ...


class _Count(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} {task.fields['unit']}")


class _Speed(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else _speed(speed, task.fields["unit"]))


def _speed(speed: float, unit: str) -> str:
    """ "142 images/s", or "3.1 s/batch" of slow things."""
    one = {"batches": "batch"}.get(unit, unit.removesuffix("s"))
    return f"{speed:,.0f} {unit}/s" if speed >= 1 else f"{1 / speed:,.1f} s/{one}"


def clock(seconds: float) -> str:
    """ "1:02:03", or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Screen:
    """Bars, below each of their figures one line that is never wrapped, so that no resize breaks it, and a panel."""

    def __init__(self, panel: Callable[[], Sequence[str]] = tuple) -> None:
        self.panel = panel
        title = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        whole = [Column(no_wrap=True, justify="right") for _ in range(3)]
        numbers = _Count(whole[0]), _Speed(whole[1]), TimeRemainingColumn(compact=True, table_column=whole[2])
        columns = title, BarColumn(10), *numbers
        self.progress = Progress(*columns, console=_err)
        self.figures: dict[Any, str] = {}
        self.width = _err.width

    def render(self) -> Group:
        """What is shown now."""
        if _err.width != self.width:  # the terminal has wrapped the lines of before, and only it knows where
            self.width = _err.width
            _err.clear()
        shown = [f"  {text}" for text in list(self.figures.values()) if text] + list(self.panel())
        lines = [Text(text, no_wrap=True, overflow="ellipsis") for text in shown]
        return Group(self.progress.get_renderable(), *lines) if self.progress.tasks else Group(*lines)


class _Live:
    def __init__(self, screen: _Screen, task: Any):
        self.screen, self.task = screen, task

    def advance(self, count: int = 1, fields: str | None = None) -> None:
        self.screen.progress.update(self.task, advance=count)
        if fields is not None:
            self.screen.figures[self.task] = visible(fields)


class _Plain:
    """A line every PLAIN_INTERVAL seconds, for logs."""

    def __init__(self, title: str, total: int, done: int, unit: str):
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self.start, self.first, self.fields = time.monotonic(), done, ""
        self.last = self.start

    def advance(self, count: int = 1, fields: str | None = None) -> None:
        self.done += count
        self.fields = self.fields if fields is None else fields
        now = time.monotonic()
        if now - self.last >= PLAIN_INTERVAL:
            self.last = now
            speed = (self.done - self.first) / (now - self.start)
            left = f", {clock((self.total - self.done) / speed)} left" if speed else ""
            told = f"{_speed(speed, self.unit) if speed else 'none yet'}{left}"
            info(f"{self.title}: {self.done:,}/{self.total:,} {self.unit} ({told}) {self.fields}".rstrip())


@contextlib.contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """A progress bar with speed and time left; plain lines if stderr is no terminal; nothing on other ranks."""
    title = visible(title)
    if not _is_main():
        yield _Silent()
    elif not _err.is_terminal:
        yield _Plain(title, total, done, unit)
    elif _active is not None:  # below a panel; or a stage within another: one more line
        with _bar(_active, f"  {title}" if _active.progress.tasks else title, total, done, unit) as bar:
            yield bar
    else:
        with _live(_Screen()) as screen, _bar(screen, title, total, done, unit) as bar:
            yield bar


@contextlib.contextmanager
def panel(lines: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Shows these lines below the bars of all stages inside; only where stderr is a terminal. Called in any thread."""
    if not _is_main() or not _err.is_terminal or _active is not None:
        yield
        return
    with _live(_Screen(lambda: [visible(line) for line in lines()])):
        yield


@contextlib.contextmanager
def _live(screen: _Screen) -> Iterator[_Screen]:
    global _active
    _active = screen
    try:
        with Live(get_renderable=screen.render, console=_err, transient=True, vertical_overflow="crop"):
            yield screen
    finally:
        _active = None


@contextlib.contextmanager
def _bar(screen: _Screen, title: str, total: int, done: int, unit: str) -> Iterator[Bar]:
    task = screen.progress.add_task(title, total=total, completed=done, unit=unit)
    try:
        yield _Live(screen, task)
    finally:  # also where training ends before its last step
        screen.progress.remove_task(task)
        screen.figures.pop(task, None)
