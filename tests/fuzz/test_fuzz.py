"""A few hundred mutated inputs over all parsers; `make fuzz` tries many more."""

import sys
import time

import harness
import pytest
from harness import Tally, Target
from mutations import files
from targets import TARGETS

from ddo_cli.errors import DataError

INPUTS = 12  # of each parser
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")


LARGE = ("edm", "edm-adm", "adm", "classifier")  # whose networks cannot be small
OF_ALL = [pytest.param(each, id=each.name, marks=[pytest.mark.slow] * (each.name in LARGE)) for each in TARGETS]


@pytest.mark.parametrize("target", OF_ALL)
def test_what_is_near_valid_is_read_or_refused(target, tmp_path):
    tally = harness.fuzz(target, INPUTS, 0, tmp_path)
    assert not tally.failures, f"{tally.failures}; inputs and tracebacks are in {tmp_path / 'failures'}"
    assert tally.inputs >= INPUTS
    assert tally.accepted >= 1  # the simplest input is a valid one


def test_names_are_distinct():
    assert len({target.name for target in TARGETS}) == len(TARGETS) >= 25


def _compute(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    raise DataError("late")


FAULTS = {
    "ValueError": lambda: int("x"),
    "HangError": lambda: _compute(9),
    "HangError that waits": lambda: time.sleep(9),
    "too slow": lambda: _compute(0.3),
    "too large": lambda: bytearray(200 << 20),
    "MemoryError behind": lambda: _refuse(lambda: bytearray(1 << 62), "x is damaged"),
    "an object in a message": lambda: _refuse(None, "x is damaged (<_io.BytesIO object>)"),
    "an empty message": lambda: _refuse(None, ""),
}


def _refuse(act, message):
    try:
        if act is not None:
            act()
    except MemoryError:
        raise DataError(message) from None
    raise DataError(message)


@pytest.mark.parametrize("kind", FAULTS)
def test_every_kind_of_fault_is_noticed(kind, tmp_path, monkeypatch):
    seconds = 0.1 if "slow" in kind or "Hang" in kind else 5.0
    monkeypatch.setattr(harness, "SECONDS", 0.2 if kind == "too slow" else seconds)
    monkeypatch.setattr(harness, "MEGABYTES", 100)
    target = Target("x", lambda: files(a=b"x"), lambda place: FAULTS[kind]())
    tally = harness.fuzz(target, 1, 0, tmp_path)
    assert [name.startswith(kind.removesuffix(" that waits")) for name in tally.failures] == [True]
    assert (tmp_path / "failures" / "x-0" / "input" / "a").read_bytes() == b"x"


def test_messages():
    assert harness.wrong("a.npz is damaged; copy it again") is None
    assert harness.wrong("x" * 310) == "a long message"
    assert harness.wrong("x\n" * 30) == "a long message"
    assert harness.wrong("a\x1b[2J") == "control characters"


def test_tallies_add_up():
    total = Tally()
    total.add(Tally(3, 1, 2, 0.5, 9.0))
    total.add(Tally(2, 2, 0, 0.1, 12.0))
    assert (total.inputs, total.accepted, total.refused, total.slowest, total.memory) == (5, 3, 2, 0.5, 12.0)
