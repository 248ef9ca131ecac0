"""Averages, schedules, batches, logs and reports."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import CPU
from torch.testing import assert_close

from ddo_cli import dist, files
from ddo_cli.data.pairs import Pairs, Shuffled
from ddo_cli.engines.pretrain import extractor as train_extractor
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.errors import DataError, UsageError
from ddo_cli.metrics.extractors.select import load_extractor
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.training.ema import Averages, ema_decay
from ddo_cli.training.loop import local_rows
from ddo_cli.training.lr import learning_rate


def test_ema_halves_after_its_half_life():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    averages = Averages(model, TrainRecipe(batch=50, ema_half_life=500))
    torch.nn.init.zeros_(model.weight)
    for step in range(10):
        averages.update(50 * (step + 1))
    assert_close(averages.whole()["weight"].item(), 0.5)


def test_averages_of_a_list_are_those_one_by_one():
    """To the bit, for every decay, of layouts that differ."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(7, 11)).to(memory_format=torch.channels_last)
    averages = Averages(model, TrainRecipe(batch=1, ema_half_life=1))
    expected = averages.whole()
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    for half_life in (0.0, 0.3, 2.0, 1000.0):
        averages.recipe = TrainRecipe(batch=1, ema_half_life=half_life)
        averages.update(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                expected[name].lerp_(parameter, 1 - ema_decay(1, half_life, 1))
                parameter.add_(torch.randn_like(parameter))
        assert all(torch.equal(averages.whole()[name], tensor) for name, tensor in expected.items())


def test_ema_ramp_limits_the_half_life():
    assert ema_decay(100, 1e9, n_images=2000, ramp=0.05) == 0.5  # half-life 100 images
    assert ema_decay(100, 0, n_images=2000) == 0.0  # the weights themselves


def test_buffers_are_copied_not_averaged():
    model = torch.nn.BatchNorm1d(2)
    averages = Averages(model, TrainRecipe(batch=1, ema_half_life=1))
    model.running_mean.fill_(3.0)
    model.num_batches_tracked.fill_(7)
    averages.update(1)
    ema = averages.whole()
    assert ema["running_mean"].tolist() == [3.0, 3.0]
    assert ema["num_batches_tracked"].item() == 7


def test_learning_rates():
    recipe = TrainRecipe(lr=2.0, warmup=100)
    assert [learning_rate(recipe, n, 1000) for n in (50, 100, 1000)] == [1.0, 2.0, 2.0]
    recipe = TrainRecipe(lr=2.0, warmup=100, lr_schedule="cosine")
    assert learning_rate(recipe, 50, 300) == 1.0
    assert learning_rate(recipe, 200, 300) == pytest.approx(1.0)  # halfway down
    assert learning_rate(recipe, 300, 300) == pytest.approx(0.0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_a_batch_without_gap_or_overlap(monkeypatch, world):
    rows = []
    for rank in range(world):
        monkeypatch.setattr(dist, "world_size", lambda: world)
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        rows += [row for start, stop in local_rows(16, 2) for row in range(start, stop)]
    assert rows == list(range(16))


def test_batches_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    with pytest.raises(UsageError, match="batch = 16 cannot be shared by 3 processes; use a multiple of 3"):
        local_rows(16, None)


def test_every_epoch_sees_every_item_once_in_another_order():
    items = np.arange(10)
    stream = Shuffled(items, items, "key", 0)
    first, second = stream.rows(0, 10).items.tolist(), stream.rows(10, 20).items.tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    # Any position can be looked up alone, across an epoch's end, and in any order.
    assert stream.rows(7, 13).items.tolist() == first[7:] + second[:3]
    assert Shuffled(items, items, "key", 0).rows(12, 13).items.tolist() == second[2:3]
    assert Shuffled(items, items, "key", 1).rows(0, 10).items.tolist() != first


def test_pairs_keep_labels_beside_their_items():
    items = np.arange(6)
    pairs = Pairs(Shuffled(items, 10 * items, "r"), Shuffled(items + 100, items, "f"))
    real, fake = pairs.rows(2, 9)
    assert (real.label == 10 * real.items).all()
    assert (fake.label == fake.items - 100).all()


def test_pretrain_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    settings = ["model.options={width: 8, depth: 1}", "pretrain.images=640", "pretrain.batch=64"]
    recipe = load("toy2d", [*settings, "pretrain.save_every=2", "pretrain.log_every=3"])
    whole = pretrain.run(recipe, tmp_path / "whole", device=CPU)
    count, rename = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(recipe, tmp_path / "cut", device=CPU)
    cut = pretrain.run(recipe, tmp_path / "cut", device=CPU)
    assert (tmp_path / "cut" / "final.safetensors").read_bytes() == (
        tmp_path / "whole" / "final.safetensors"
    ).read_bytes()
    assert cut["score"] == whole["score"]
    losses = [
        [json.loads(x)["loss"] for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in ("cut", "whole")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4  # steps 3, 6, 9, 10
    assert not (tmp_path / "cut" / "train-state.safetensors").exists()


def test_pretraining_lowers_the_divergence(tmp_path):
    scores = []
    for images in (64, 40_000):
        recipe = load("toy2d", [f"pretrain.images={images}", "pretrain.batch=64", "pretrain.ema_half_life=500"])
        scores.append(pretrain.run(recipe, tmp_path / str(images), device=CPU)["score"])
    assert scores[1] < 0.8 * scores[0]


def test_extractor_learns_the_digits(tmp_path):
    out = tmp_path / "x.safetensors"
    found = train_extractor.run("embedded:digits8", out, held_out=None, images=12_800, seed=0, device=CPU)
    assert found["heldout_accuracy"] > 0.8  # chance is 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]
    assert load_extractor(str(out)).key == "fd_embedded"
    again = train_extractor.run("embedded:digits8", out, held_out=None, images=12_800, seed=0, device=CPU)
    assert again == found  # finished: nothing to do
    with pytest.raises(UsageError, match="holds something else"):
        train_extractor.run("embedded:digits8", out, held_out=None, images=12_800, seed=1, device=CPU)
    out = tmp_path / "y.safetensors"
    with pytest.raises(UsageError, match="is a directory"):
        train_extractor.run("embedded:digits8", tmp_path, held_out=None, images=64, seed=0, device=CPU)
    np.savez(tmp_path / "plain.npz", images=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="without a label"):
        train_extractor.run(str(tmp_path / "plain.npz"), out, held_out=None, images=64, seed=0, device=CPU)
