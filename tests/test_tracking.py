"""Trackers: what they get, once each; a run that is killed and continued; trackers that fail."""

import csv
import json
import struct
import time

import numpy as np
import pytest
from conftest import CPU
from kills import KilledError
from PIL import Image

from ddo_cli import tracking
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.errors import UsageError
from ddo_cli.recipe.load import load
from ddo_cli.tracking import Tracking

OWN = """
import csv


class Tracker:
    def __init__(self, run):
        self.file = open(run.place / "mine.csv", "a")

    def figures(self, figures, images, number):
        csv.writer(self.file).writerows([number, images, name, value] for name, value in figures.items())
        self.file.flush()

    def picture(self, name, file, images, number): ...

    def close(self):
        self.file.close()


tracker = Tracker
"""


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.full((4, 6), 200, np.uint8)).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def launch(name, place, picture, steps):
    """One launch of a run, which sends these steps and a picture at the last of them."""
    sender = Tracking([name], place, {"seed": 3})
    for step in steps:
        sender.figures("train", {"loss": 1.0 / step, "tag": "text"}, step * 10)
    sender.picture("score/samples", picture, steps[-1] * 10)
    sender.close()


def test_tensorboard_reads_one_run_without_repeated_steps(tmp_path, picture):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    launch("tensorboard", tmp_path, picture, [1, 2, 3])
    launch("tensorboard", tmp_path, picture, [2, 3, 4])  # continued from the state of step 1
    launch("tensorboard", tmp_path, picture, [4])  # nothing new
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, round(event.value, 4)) for event in read.Scalars("train/loss")] == [
        (10, 1.0), (20, 0.5), (30, 0.3333), (40, 0.25)
    ]  # fmt: skip
    images = read.Images("score/samples")
    assert [(image.step, image.width, image.height) for image in images] == [(30, 6, 4), (40, 6, 4)]
    assert '"seed": 3' in read.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def records_of(content):
    """The records of W&B's transaction log: 7 bytes, then LevelDB's blocks of 32 KiB with (crc, length, type) before
    each piece; types 1 whole, 2 first, 3 middle, 4 last.
    """
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def is_whole(file):
    from wandb.proto.wandb_internal_pb2 import Record

    return any(Record.FromString(data).HasField("exit") for data in records_of(file.read_bytes()))


@pytest.mark.slow
def test_wandb_keeps_one_offline_run_without_repeated_steps(tmp_path, picture, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    launch("wandb", tmp_path, picture, [1, 2, 3])
    launch("wandb", tmp_path, picture, [2, 3, 4])
    ids, steps, losses = set(), [], []
    written, until = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")), time.monotonic() + 60
    while not all(is_whole(file) for file in written) and time.monotonic() < until:
        time.sleep(0.1)  # a process of W&B's own writes them
    for file in written:
        for data in records_of(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert "seed" in {item.key for item in record.run.config.update}
            if record.HasField("history"):
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                steps.append(record.history.step.num)
                losses += [(values["images"], values["train/loss"])] if "train/loss" in values else []
    assert ids == {json.loads((tmp_path / "tracking.json").read_text())["wandb"]["id"]}
    assert steps == list(range(len(steps)))
    assert losses == [(10, 1.0), (20, 0.5), (30, pytest.approx(1 / 3)), (40, 0.25)]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 2


@pytest.fixture
def recipe():
    settings = ["model.options={patch: 4, widths: [8], depths: [1], emb_width: 8}", "pretrain.images=96"]
    settings += ["pretrain.batch=16", "pretrain.log_every=1", "pretrain.save_every=2", "pretrain.snapshot_every=48"]
    return load(
        "quickstart", [*settings, "data.num=64", "metric.num_images=16", "metric.repeats=1", "sampling.steps=2"]
    )


def test_a_user_s_tracker_gets_a_killed_run_once(tmp_path, recipe, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    names = tracking.parse(str(tmp_path / "mine.py"))
    keep = pretrain._Snapshots.keep

    def killed(snapshots, event):
        raise KilledError

    monkeypatch.setattr(pretrain._Snapshots, "keep", killed)
    with pytest.raises(KilledError):
        pretrain.run(recipe, tmp_path / "run", device=CPU, log_to=names)
    monkeypatch.setattr(pretrain._Snapshots, "keep", keep)
    pretrain.run(recipe, tmp_path / "run", device=CPU, log_to=names)
    rows = list(csv.reader((tmp_path / "run" / "mine.csv").open()))
    loss = [(int(number), int(images)) for number, images, name, _ in rows if name == "train/loss"]
    assert loss == [(number, 16 * (number + 1)) for number in range(6)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {name for *_, name, _ in rows} == {f"train/{key}" for key in lines[0]} | {"score/fd_embedded"}
    sent = {(int(images), name): float(value) for _, images, name, value in rows}
    assert all(sent[line["n_images"], "train/loss"] == line["loss"] for line in lines)


def test_a_failing_tracker_is_told_of_once_and_the_run_goes_on(tmp_path, recipe, capsys):
    (tmp_path / "bad.py").write_text(OWN.replace("self.file.flush()", "raise RuntimeError('no space')"))
    pretrain.run(recipe, tmp_path / "run", device=CPU, log_to=[str(tmp_path / "bad.py")])
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("bad.py: RuntimeError: no space; the run goes on without it") == 1
    assert (tmp_path / "run" / "final.safetensors").is_file()


def test_only_trackers_that_can_be_had_are_taken(tmp_path, monkeypatch):
    assert tracking.parse("none") == ()
    assert tracking.parse("tensorboard, wandb") == ("tensorboard", "wandb")
    with pytest.raises(UsageError, match=r"--log-to tensorbord is not known \(did you mean 'tensorboard'\?\); use"):
        tracking.parse("tensorbord")
    with pytest.raises(UsageError, match=r"mine\.py does not exist; give a Python file with a function `tracker`"):
        tracking.parse("mine.py")
    with pytest.raises(UsageError, match="names wandb twice"):
        tracking.parse("wandb,wandb")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ddo-cli\[wandb\]'"):
        tracking.parse("wandb")
