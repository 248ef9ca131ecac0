"""States that a thread writes while training goes on, as on a GPU."""

import errno
import threading

import pytest
import torch
from conftest import CPU, Positions

from ddo_cli import checkpoint, ledger
from ddo_cli.errors import NumericsError, RunError
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.trainable import Loss, Objective, Trainable
from ddo_cli.training import loop, state
from ddo_cli.training.meter import Meter
from ddo_cli.transfer import snapshot


class Net(Trainable):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(x)


def events(path, factor=lambda step: 1.0, steps=6, save_every=2, evaluate_at=()):
    """Of a short training, one by one."""

    def loss(model, batch):
        positions, rng = batch
        return Loss(model(positions[:, None] * torch.ones(2)).square().mean() * factor(rng.step), {})

    plan = loop.Plan(
        "x", steps, TrainRecipe(lr=0.1, batch=2, log_every=100, save_every=save_every), (0,), path / "state", "",
        lambda: "none", frozenset(evaluate_at),
    )  # fmt: skip
    objective = Objective(lambda positions, rng: (positions, rng), loss)
    return loop.fit(Net(), objective, Positions(), plan, Meter(path / "log", {}, 2, CPU))


@pytest.fixture
def behind(monkeypatch):
    monkeypatch.setattr(state, "_is_written_behind", lambda device, is_sharded: True)


@pytest.fixture
def held(behind, monkeypatch):
    """Writes wait until this is set; names of the threads that write."""
    may_write, save, threads = threading.Event(), checkpoint.save, []

    def saved(path, tensors, header, previous):
        threads.append(threading.current_thread().name)
        assert may_write.wait(10)
        save(path, tensors, header, previous)

    monkeypatch.setattr(checkpoint, "save", saved)
    return may_write, threads


def saved_step(path) -> int:
    return checkpoint.read_header(path / "state")["step"]


def test_training_goes_on_during_a_write_which_holds_the_state_of_its_step(tmp_path, held, monkeypatch):
    may_write, threads = held
    running = events(tmp_path)
    assert [next(running).step for _ in range(4)] == [1, 2, 3, 4]  # the fourth is to be saved next
    assert not (tmp_path / "state").exists()
    threading.Timer(0.05, may_write.set).start()
    assert next(running).step == 5  # the second write has waited for the first
    running.close()  # and the end of training for the second
    assert saved_step(tmp_path) == 4
    assert all(name.startswith("state") for name in threads)
    (tmp_path / "plain").mkdir()
    monkeypatch.undo()
    plain = events(tmp_path / "plain")
    assert [next(plain).step for _ in range(5)] == [1, 2, 3, 4, 5]
    assert (tmp_path / "plain" / "state").read_bytes() == (tmp_path / "state").read_bytes()


def test_an_evaluation_and_the_end_find_the_state_on_disk(tmp_path, held):
    may_write, _ = held
    threading.Timer(0.05, may_write.set).start()
    found = [(type(event).__name__, event.step, saved_step(tmp_path)) for event in events(tmp_path, evaluate_at=[3])
             if not isinstance(event, loop.Stepped)]  # fmt: skip
    assert found == [("Evaluate", 3, 3), ("Finished", 6, 6)]


def test_a_write_that_fails_stops_training_at_the_next_step(tmp_path, behind, monkeypatch):
    failed = threading.Event()

    def full(path, tensors, header, previous):
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save", full)
    running = events(tmp_path, save_every=2, steps=9)
    assert [next(running).step for _ in range(3)] == [1, 2, 3]
    assert failed.wait(10)
    with pytest.raises(OSError, match="No space left on device"):
        list(running)


def test_an_error_of_training_waits_for_the_write(tmp_path, held):
    may_write, _ = held
    threading.Timer(0.05, may_write.set).start()
    with pytest.raises(NumericsError, match="step 3 is not finite"):
        list(events(tmp_path, factor=lambda step: torch.inf if step == 3 else 1.0))
    assert saved_step(tmp_path) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("state")]


def _damaged(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_the_state_before_is_used_if_the_newest_is_damaged_to_the_same_end(tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    list(events(tmp_path / "whole"))
    with ledger.kept(tmp_path):
        running = events(tmp_path)
        assert [next(running).step for _ in range(5)] == [1, 2, 3, 4, 5]  # saved after 2 and 4
        running.close()
        assert checkpoint.read_header(tmp_path / "state-before")["step"] == 2
        _damaged(tmp_path / "state")
        again = events(tmp_path)
        assert next(again).step == 3
        said = " ".join(capsys.readouterr().err.split())
        assert "state is damaged (other content); training goes on from the state before" in said
        list(again)
        for name in ("state", "state-before"):
            assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        for name in ("state", "state-before"):
            _damaged(tmp_path / name)
        with pytest.raises(RunError, match=r"state is damaged .* and .*state-before is damaged .* remove both"):
            next(events(tmp_path))
        (tmp_path / "state").unlink()
        (tmp_path / "state-before").unlink()
        assert next(events(tmp_path)).step == 1


def test_a_snapshot_does_not_follow_its_tensors():
    given = {"a": torch.ones(3, 2).T, "b": torch.zeros(())}
    copies, wait = snapshot(given)
    for tensor in given.values():
        tensor.add_(5)
    wait()
    assert [copies["a"].tolist(), copies["b"].item()] == [[[1.0] * 3] * 2, 0.0]
