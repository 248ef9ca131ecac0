"""Batches made ahead by a thread: the same ones, errors that arrive, threads that end."""

import threading
import time
import traceback

import pytest
import torch
from conftest import CPU, Positions, fit_events

from ddo_cli.errors import DataError
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.trainable import Loss, Trainable, map_tensors
from ddo_cli.training import feed, loop


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_items_come_in_order_from_another_thread():
    found = list(feed.made_ahead((number, threading.current_thread()) for number in range(20)))
    assert [number for number, _ in found] == list(range(20))
    assert {thread.name for _, thread in found} == {"batches"}
    assert threads() == []


def test_no_more_are_made_than_asked_for():
    made = []
    ahead = feed.made_ahead((made.append(number) or number for number in range(20)), most=3)
    for number in range(5):
        assert next(ahead) == number
        time.sleep(0.02)  # the thread makes what it may
        assert len(made) == number + 1 + 3
    ahead.close()
    assert threads() == []  # it waited for room, and ends with its user


def failing():
    yield 1
    raise DataError("the second row cannot be read")


def test_an_error_of_the_thread_arrives_with_its_traceback():
    ahead = feed.made_ahead(failing())
    assert next(ahead) == 1
    with pytest.raises(DataError, match="the second row") as caught:
        next(ahead)
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert threads() == []


class Net(Trainable):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(x)


def loss(model, positions, rng):
    return Loss(model(positions[:, None] + rng("x").randn((2,))).square().mean(), {})


def ahead_on_cpu(monkeypatch):
    """Training whose batches a thread makes, as on a GPU."""
    monkeypatch.setattr(loop, "batches_of", lambda *given: feed.made_ahead(feed.batches_of(*given)))


def test_interrupted_training_leaves_no_thread(tmp_path, monkeypatch):
    """An error in a step, and a caller who stops early."""
    ahead_on_cpu(monkeypatch)
    settings = TrainRecipe(batch=2, log_every=1, save_every=100)

    def interrupted(model, positions, rng):
        assert len(threads()) == 1
        if rng.step == 3:
            raise KeyboardInterrupt
        return loss(model, positions, rng)

    with pytest.raises(KeyboardInterrupt):
        fit_events(Net(), interrupted, tmp_path, settings, steps=8)
    assert threads() == []


def test_what_a_thread_makes_trains_the_same_weights(tmp_path, monkeypatch):
    settings, found = TrainRecipe(lr=0.1, batch=4, micro_batch=2, log_every=2, save_every=3), []
    for name in ("plain", "ahead"):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        net = Net()
        fit_events(net, loss, tmp_path / name, settings, steps=7, evaluate_at=[2, 7])
        found.append((net.linear.weight.tolist(), (tmp_path / name / "state").read_bytes()))
        ahead_on_cpu(monkeypatch)
    assert found[0] == found[1]


def test_a_gpu_gets_the_batches_of_a_cpu(monkeypatch):
    """Pinned by the thread, which works on this process's GPU, and copied without waiting; none is made in a pause."""
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("device", device)))
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: done.append(("pin", threading.current_thread())) or tensor
    )
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *a, **more: done.append((a, more)) or tensor)
    gpu, pieces, made = torch.device("cuda:3"), [(0, 2), (2, 4)], []

    def make(positions, rng):
        made.append(rng.step)
        return rng("x").randn((2,)), None, rng

    def batches(device):
        return feed.batches_of(make, Positions(), ("key",), range(1, 9), {3, 8}, pieces, 4, device)

    expected, made[:] = list(batches(CPU)), []
    assert len(expected) == 16
    found = batches(gpu)
    first = [next(found) for _ in range(4)]
    time.sleep(0.02)
    assert made == [1, 1, 2, 2]  # 3 is due for evaluation first
    for ours, theirs in zip([*first, *found], expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    assert done.count(("device", gpu)) == 3  # a thread to each pause, and to the end
    assert {thread.name for what, thread in done if what == "pin"} == {"batches"}
    assert [entry for entry in done if entry == ((gpu,), {"non_blocking": True})] == [
        ((gpu,), {"non_blocking": True})
    ] * 16


def test_tensors_of_nested_tuples_are_mapped():
    given = (torch.ones(2), (None, 3, torch.zeros(1)))
    found = map_tensors(lambda tensor: tensor + 1, given)
    assert found[0].tolist() == [2, 2]
    assert found[1][:2] == (None, 3)
    assert found[1][2].tolist() == [1]
