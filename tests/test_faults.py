"""Kills, full disks and I/O errors at file operations: a few of them here, all of them in `faults/campaign.py`."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_checkpoint
from faults.workloads import workloads

from ddo_cli import cli, files, ledger

CAMPAIGN = Path(__file__).parent / "faults" / "campaign.py"
SAMPLE = ("sample", "--ckpt", "m.safetensors", "--seeds", "0-11", "--format", "npz", "--out", "set")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a model and a user's own files; what a command does about signals is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(cli, "_signals", [])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    make_checkpoint(tmp_path / "m.safetensors")
    (tmp_path / ".tmpAbC123").write_text("mine")
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def content(place: Path) -> dict[str, bytes]:
    """Of every file but the ledger, to which a disturbed run adds more lines."""
    files = (path for path in place.rglob("*") if path.is_file() and path.name != ledger.LEDGER)
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def at(monkeypatch, function: str, number: int, act) -> None:
    """Does something before the n-th call of a function of os by the writer of files."""
    count, real = 0, getattr(os, function)

    def called(*arguments):
        nonlocal count
        count += 1
        if count == number:
            act()
        return real(*arguments)

    monkeypatch.setattr(files.os, function, called)


def fails_with(number: int):
    def act():
        raise OSError(number, os.strerror(number))

    return act


@pytest.mark.parametrize(
    ("function", "number", "act", "code", "said"),
    [
        ("fsync", 2, fails_with(errno.ENOSPC), 2, ": No space left on device; make room and run the same"),
        ("replace", 5, fails_with(errno.EIO), 2, ": Input/output error; check the disk and run the same"),
        ("replace", 4, lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "interrupted; the same command continues"),
        ("fsync", 4, lambda: os.kill(os.getpid(), signal.SIGINT), 130, "interrupted; the same command continues"),
    ],
)
def test_a_disturbed_command_says_one_thing_and_continues(place, ddo, monkeypatch, function, number, act, code, said):
    with monkeypatch.context() as patch:
        at(patch, function, number, act)
        done = ddo(*SAMPLE, code=code)
    assert said in " ".join(done.stderr.split())
    assert done.stderr.count("error:") == 1
    assert code > 2 or "error: set/" in done.stderr  # names the file
    assert not [path for path in place.rglob("*") if path.suffix in (".part", ".whole")]
    ddo(*SAMPLE)
    disturbed = content(place)
    for path in (place / "set", place / "set-grid.png"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ddo(*SAMPLE)
    assert content(place) == disturbed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
@pytest.mark.parametrize("half", [0, 1])
def test_every_command_ends_as_undisturbed(half):
    names = sorted(workloads(Path("inputs")))[half::2]
    done = subprocess.run(
        [sys.executable, CAMPAIGN, "--few", "--only", ",".join(names)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
