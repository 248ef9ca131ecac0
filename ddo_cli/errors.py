"""Errors of the user or the environment. `cli` prints each as one message and exits with code 2."""

import os
import re
import signal
from collections.abc import Sequence
from typing import Any

# Our choice of limits:
LONGEST = 300  # characters of a line of a message, of which each path counts for
LONGEST_PATH = 20  # at most: users' own paths may be long, and are needed in full
MOST_LINES = 21  # of a message that lists problems
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # that end a command
_OBJECT = re.compile(r"\s?<[^<>]* at 0x[0-9a-fA-F]+>|(?:Posix|Windows|Pure\w*)?Path\((['\"])(.*?)\1\)")


def printable(text: str, limit: int = 200) -> str:
    """`text` from a foreign file, safe for a message: one line, no control characters, cut at `limit`."""
    shown = visible(text[:limit])
    return shown if len(text) <= limit and len(shown) <= limit else f"{shown[:limit]}..."


def visible(text: str, kept: str = "") -> str:
    """`text` with characters that control a terminal or a page written out: escapes, line ends, marks of direction.

    kept: those that stay.
    """
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def reason(error: BaseException, limit: int = 120) -> str:
    """What another library's error says, for a message: short and on one line."""
    if isinstance(error, OSError) and error.strerror:
        name = os.path.basename(error.filename) if isinstance(error.filename, str) else ""
        return printable(f"{error.strerror}: {name}" if name else error.strerror, limit)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = _without_objects(" ".join(str(error).split())).removeprefix("Error(s) in loading state_dict for ")
    return printable(f"{text} is missing" if isinstance(error, KeyError) else text, limit) or type(error).__name__


def problem_of(error: Any) -> str:
    """The first problem of pydantic's ValidationError of a foreign file, for a message."""
    problem = error.errors()[0]
    return printable(f"{'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']}")


def longest(line: str) -> int:
    """The characters that this line of a message may have."""
    paths = (len(word) for word in line.split(" ") if "/" in word)
    return LONGEST + sum(length - LONGEST_PATH for length in paths if LONGEST_PATH < length < LONGEST)


def fitted(line: str) -> str:
    """A visible line of LONGEST characters at most, paths aside.

    What is cut first are the middles of long words that are no paths, and then that of the line: its beginning says
    where, its end what to do.
    """
    line = visible(line)
    limit = longest(line)
    words = {word for word in line.split(" ") if len(word) > 60 and "/" not in word} if len(line) > limit else ()
    for word in sorted(words, key=len, reverse=True):
        line = line.replace(word, _shortened(word, max(60, len(word) - len(line) + limit)))
    return _shortened(line, limit)


def _shortened(text: str, limit: int) -> str:
    """`text` without a part between its first three and its last two fifths."""
    end = (limit - 3) * 2 // 5
    return text if len(text) <= limit else f"{text[: limit - 3 - end]}...{text[len(text) - end :]}"


def _without_objects(text: str) -> str:
    """`text` without objects of Python, which libraries write into their messages."""
    return _OBJECT.sub(lambda match: match[2] or "", text)


class DdoError(Exception):
    """A mistake of the user or a problem of the environment. The message says what, where, and what to do.

    details: lines below the message. missing: the file that does not exist, as given, where the message begins with it.
    """

    code = 2  # of the process
    kind = "error"  # in the JSON of --json; of a subclass: its name without "Error"
    has_lines = False  # whether the message is a list of problems, one per line

    def __init__(self, message: str, details: Sequence[str] = (), missing: str | None = None):
        self.missing = missing
        lines = [*(message.split("\n") if self.has_lines else [message]), *(f"  {line}" for line in details)]
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], f"  ... and {len(lines) - MOST_LINES + 1} more"]
        super().__init__("\n".join(fitted(_without_objects(line)) for line in lines))

    def __init_subclass__(cls) -> None:
        cls.kind = cls.__name__.removesuffix("Error").lower()


class UsageError(DdoError):
    """A command-line value that cannot be used."""


class RecipeError(DdoError):
    """One or more problems of a recipe, one per line."""

    has_lines = True


class CheckpointError(DdoError):
    """A weight file that is missing, damaged or of another kind."""


class DataError(DdoError):
    """An image set that cannot be read or does not fit the model."""


class RunError(DdoError):
    """A run or sample directory that is in use, belongs to another run, or is damaged."""


class NumericsError(DdoError):
    """A loss that is not finite or that diverges. step: of training, where it was met in one."""

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


class StoppedError(DdoError):
    """Training that a signal has ended, with its state saved; exit code EX_TEMPFAIL: run the command again."""

    code = 75
