"""Errors of the user or the environment. `cli` prints each as one message and exits with code 2."""

import re

_OBJECT = re.compile(r"\s?<[^<>]* at 0x[0-9a-fA-F]+>|(?:Posix|Windows|Pure\w*)?Path\((['\"])(.*?)\1\)")


def printable(text: str, limit: int = 200) -> str:
    """`text` from a foreign file, safe for a message: one line, no control characters, cut at `limit`."""
    shown = visible(text[:limit])
    return shown if len(text) <= limit else f"{shown}..."


def visible(text: str, kept: str = "") -> str:
    """`text` with characters that control a terminal or a page written out: escapes, line ends, marks of direction.

    kept: those that stay.
    """
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


class DdoError(Exception):
    """A mistake of the user or a problem of the environment. The message says what, where, and what to do."""

    kind = "error"  # in the JSON of --json; of a subclass: its name without "Error"

    def __init__(self, message: str):
        # Libraries write objects of Python into their messages.
        super().__init__(_OBJECT.sub(lambda match: match[2] or "", message))

    def __init_subclass__(cls) -> None:
        cls.kind = cls.__name__.removesuffix("Error").lower()


class UsageError(DdoError):
    """A command-line value that cannot be used."""


class RecipeError(DdoError):
    """One or more problems of a recipe, one per line."""


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
