"""File systems without locks, and a clock that is set back."""

import errno
import fcntl
import os
import re

import pytest
from conftest import make_checkpoint

from ddo_cli import console, files
from ddo_cli.data import cache
from ddo_cli.engines.fid import report


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP])
def no_locks(monkeypatch, request):
    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    return os.strerror(request.param)


def test_a_run_without_locks_is_refused_in_one_line(tmp_path, ddo, no_locks):
    make_checkpoint(tmp_path / "m.safetensors")
    done = ddo("sample", "--ckpt", "m.safetensors", "--seeds", "0-3", "--out", "set", code=2)
    said = " ".join(done.stderr.split())
    assert f"set/.lock: {no_locks}; its file system has no locks; choose a place on another" in said
    assert said.count("error:") == 1


def test_csv_without_locks_names_the_lock(tmp_path, no_locks):
    with pytest.raises(OSError, match=no_locks) as caught:
        report.append(tmp_path / "scores.csv", {})
    assert caught.value.filename == str(tmp_path / ".scores.csv.lock")


def test_the_cache_without_locks_holds_images_in_memory(tmp_path, monkeypatch, no_locks):
    lines: list[str] = []
    monkeypatch.setattr(console, "warn", lines.append)
    monkeypatch.setenv("DDO_CACHE", str(tmp_path))
    cache._warn_once.cache_clear()
    assert cache.kept("x", "0" * 64, 1, lambda: (3, 2, 2), lambda _: None) is None
    assert [re.sub(r".* \((.*)\).*", r"\1", line) for line in lines] == [f"{no_locks}: .x-{'0' * 32}.npy.lock"]


def test_a_clock_set_back_shows_no_old_hash(tmp_path, monkeypatch):
    path = tmp_path / "x"
    found = set()
    for now in (2e9, 1e9, 0.0):  # the file's own time is of the real clock, later than the last two
        monkeypatch.setattr(files.time, "time", lambda now=now: now)
        path.write_text(str(now))
        found.add(files.sha256(path))
    assert len(found) == 3
