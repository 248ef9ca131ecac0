"""Directories of runs given in place of weight files, and in place of images."""

import json
from pathlib import Path

import pytest
from conftest import make_checkpoint, make_discriminator
from PIL import Image

from ddo_cli import checkpoint
from ddo_cli.data.images import open_images
from ddo_cli.errors import CheckpointError, DataError


@pytest.fixture
def run(tmp_path) -> Path:
    """What an unfinished `ddo finetune-ddo` leaves: two rounds, of which the first was promoted."""
    place = tmp_path / "runs" / "x"
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text("name: x\n")
    for number in (1, 2):
        (place / f"round-{number:02d}").mkdir()
        make_checkpoint(place / f"round-{number:02d}" / "best.safetensors", seed=number)
    rounds = [{"round": number, "score": 1.0, "promoted": number == 1} for number in (1, 2)]
    (place / "state.json").write_text(json.dumps({"command": "finetune-ddo", "rounds": rounds}))
    Image.new("RGB", (32, 32)).save(place / "reference.png")
    Image.new("RGB", (32, 32)).save(place / "grid.png")
    return place


def test_a_finished_run_is_its_final_weights(ddo, run, tmp_path):
    final = make_checkpoint(run / "final.safetensors")
    assert checkpoint.resolve(run) == Path(final)
    digest = checkpoint.load(final).sha256
    drawn = json.loads(ddo("sample", "--ckpt", "runs/x", "--num-images", "2", "--json").stdout)
    assert drawn["checkpoint_sha256"] == digest
    disc = tmp_path / "runs" / "d"
    disc.mkdir()
    make_discriminator(disc / "final.safetensors", "runs/x")
    guided = ["guide-sample", "--disc", "runs/d", "--num-images", "2", "--out", "g", "--json"]
    assert json.loads(ddo(*guided).stdout)["checkpoint_sha256"] == digest
    plan = ddo("finetune-ddo", "--ckpt", "runs/x", "--data", "embedded:digits32", "--dry-run", "--no-measure", "--json")
    assert json.loads(plan.stdout)["reference_sha256"] == digest


@pytest.mark.parametrize("line", [["fid", "runs/x"], ["sample", "--ckpt", "runs/x"], ["edit", "x", "--ckpt", "runs/x"]])
def test_of_an_unfinished_run_the_newest_promoted_weights_are_named(ddo, run, line):
    message = ddo(*line, code=2).stderr
    assert (
        "runs/x is an unfinished run of finetune-ddo; its newest promoted weights are runs/x/round-01/best" in message
    )


def test_unfinished_runs_without_promoted_weights(run, tmp_path):
    (run / "state.json").write_text(json.dumps({"command": "pretrain"}))
    with pytest.raises(CheckpointError, match="unfinished run of pretrain; it has no weights yet"):
        checkpoint.resolve(run)
    make_checkpoint(run / "checkpoints" / "step-000012.safetensors")
    with pytest.raises(CheckpointError, match=r"newest checkpoint weights are .*step-000012\.safetensors: give these"):
        checkpoint.resolve(run)
    with pytest.raises(CheckpointError, match=r"is a directory without final\.safetensors"):
        checkpoint.resolve(tmp_path)


def test_the_pictures_of_a_run_are_no_image_set(ddo, run):
    with pytest.raises(DataError, match="is the directory of a run, not of images; draw some with `ddo sample --ckpt"):
        open_images(str(run))
    assert "directory of a run" in ddo("fid", "embedded:digits32", "--ref", "runs/x", code=2).stderr
