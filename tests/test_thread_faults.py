"""I/O errors in the threads of training, that of the state and that of the batches: as in the main one."""

import errno
import os
import threading

import pytest

from ddo_cli import files
from ddo_cli.recipe.load import load, to_yaml
from ddo_cli.training import feed, loop, state

TOY = ("model.options={width: 8, depth: 1}", "pretrain.images=48", "pretrain.batch=8", "pretrain.save_every=2",
       "pretrain.log_every=2", "pretrain.snapshot_every=16", "data.num=256", "metric.repeats=1")  # fmt: skip
EIO = os.strerror(errno.EIO)


def weights(run):
    return (run / "final.safetensors").read_bytes()


def writer_fails(patch):
    """The second file that the thread of the state writes."""
    count, replace = 0, os.replace

    def called(*arguments):
        nonlocal count
        count += threading.current_thread().name.startswith("state")
        if count == 2 and threading.current_thread().name.startswith("state"):
            raise OSError(errno.EIO, EIO, str(arguments[-1]))
        return replace(*arguments)

    patch.setattr(files.os, "replace", called)


def feed_fails(patch):
    """The fourth batch, whose image cannot be read."""

    def batches(*given):
        for number, batch in enumerate(feed.batches_of(*given)):
            if number == 3:
                raise OSError(errno.EIO, EIO, "out/images/7.png")
            yield batch

    patch.setattr(loop, "batches_of", lambda *given: feed.made_ahead(batches(*given)))


@pytest.mark.parametrize("fails", [writer_fails, feed_fails])
def test_an_error_in_a_thread_is_told_and_the_same_line_continues(tmp_path, ddo, monkeypatch, fails):
    (tmp_path / "toy.yaml").write_text(to_yaml(load("toy2d", TOY)))
    line = ("pretrain", "--recipe", "toy.yaml", "--out")
    ddo(*line, "undisturbed")
    monkeypatch.setattr(state, "_is_written_behind", lambda device, is_sharded: True)
    with monkeypatch.context() as patch:
        fails(patch)
        done = ddo(*line, "out", code=2)
    said = " ".join(done.stderr.split())
    assert "error: out/" in said
    assert f": {EIO}; check the disk and run the same command again, it continues" in said
    assert said.count("error:") == 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".whole")]
    ddo(*line, "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "undisturbed")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("state", "batches"))]
