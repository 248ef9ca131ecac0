"""Runs that end as if killed while they write, and go on."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ddo_cli import files


class KilledError(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


def without_times(path: Path) -> bytes:
    """The bytes of a file, of a report without its section of times and speeds."""
    return re.sub(rb'<section id="cost">.*?</section>', b"", path.read_bytes(), flags=re.DOTALL)


def until_done(act: Callable[[], object], every: int) -> None:
    """Calls `act` until it ends, killed at every so-many-th write: after its rename and before it, in turns."""
    count, kills, rename = 0, 0, os.replace

    def replace(source, target):
        nonlocal count, kills
        count += 1
        if count % every:
            return rename(source, target)
        kills += 1
        if kills % 2:
            rename(source, target)
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        while True:
            try:
                act()
                break
            except KilledError:
                assert kills < 100
    assert kills >= 3
