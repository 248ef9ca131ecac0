"""Directories that commands write: what is refused before anything is written or deleted, dry run or not."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, make_discriminator, tiny_disc_recipe, tiny_recipe
from PIL import Image
from toy_latent import make_toy

from ddo_cli import checkpoint, files, rundir
from ddo_cli.engines import encode
from ddo_cli.engines.analysis import analyze
from ddo_cli.engines.analysis.subject import Settings
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.discriminator import classifier as train_classifier
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.edit import edit
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.engines.sampling import guide_sample, sample
from ddo_cli.engines.weights import ema
from ddo_cli.errors import RunError
from ddo_cli.recipe.load import load
from ddo_cli.report import pictures
from ddo_cli.rundir import RunDir

DATA = "embedded:digits32"
FEW = Settings(steps_list=(2,), num=16, regenerations=3)
CLASSIFIER = ["data={source: embedded:digits32, num: 64}", "classifier={images: 8, batch: 4, held_out: 16}"]
PRETRAIN = [
    "model={name: patch-unet, options: {patch: 4, widths: [16], depths: [1], emb_width: 16}}",
    "data={source: embedded:digits32, num: 64}",
    "sampling={sampler: euler, steps: 2, batch: 8}",
    "metric={num_images: 32}",
    "pretrain={batch: 4, images: 8}",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    ckpt = make_checkpoint(path / "m.safetensors")
    make_discriminator(path / "d.safetensors", ckpt)
    make_toy(path / "toy.safetensors", std=0.25)
    return path


def _drawn(p, out, **more):
    return sample.run(str(p / "m.safetensors"), range(2), out, device=CPU, **more)


def _guided(p, out, **more):
    return guide_sample.run(str(p / "d.safetensors"), None, range(2), out, device=CPU, **more)


def _edited(p, out, **more):
    options = {"num": 2, "ckpt": str(p / "m.safetensors"), "use_guidance": False, "ref": "embedded:digits8", **more}
    return edit.run(DATA, out, [1.0], device=CPU, **options)


def _analyzed(p, out, disc="d.safetensors", **more):
    return analyze.run(str(p / disc), None, out, what="gain", settings=FEW, device=CPU, **more)


def _encoded(p, out, **more):
    return encode.run(DATA, str(p / "toy.safetensors"), out, num=8, batch=8, device=CPU, **more)


def _finetuned(p, out, **more):
    return finetune.run(tiny_recipe(str(p / "m.safetensors")), out, device=CPU, **more)


def _pretrained(p, out, **more):
    return pretrain.run(load("quickstart", PRETRAIN), out, device=CPU, **more)


def _disc_trained(p, out, **more):
    return train_disc.run(tiny_disc_recipe(str(p / "m.safetensors")), out, device=CPU, **more)


def _classifier_trained(p, out, **more):
    recipe = load("quickstart", CLASSIFIER, {"model.ckpt": str(p / "m.safetensors")})
    return train_classifier.run(recipe, out, device=CPU, **more)


COMMANDS = {
    "sample": _drawn,
    "guide-sample": _guided,
    "edit": _edited,
    "analyze": _analyzed,
    "encode": _encoded,
    "finetune-ddo": _finetuned,
    "pretrain": _pretrained,
    "train-disc": _disc_trained,
    "train-classifier": _classifier_trained,
}


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below, hidden files and locks included."""
    return {str(e.relative_to(path)): e.read_bytes() if e.is_file() else None for e in sorted(path.rglob("*"))}


def foreign(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text('{"precious": 1}')
    return path


def refused(act, path, match):
    """A dry run and a run are refused alike, and leave everything as it was."""
    before = tree(path)
    for is_dry in (True, False):
        with pytest.raises(RunError, match=match):
            act(dry_run=is_dry)
        assert tree(path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_foreign_directories_are_left_as_they_are(place, tmp_path, command):
    act = COMMANDS[command]
    full = foreign(tmp_path / "f", ".movie.part", ".film.123.part", "sub/.other.123.part", "t.txt")
    refused(lambda **more: act(place, full, **more), full, "not empty and holds no")
    # Names that a directory of ours has, too.
    for name in ("state.json", "manifest.json", "gain.png"):
        own = foreign(tmp_path / name.replace(".", "-"), name)
        refused(lambda own=own, **more: act(place, own, **more), own, "not empty and holds no")
    for name, words in (("recipe.yaml", "belongs to another run|not empty"), ("edit.json", "other edited|not empty")):
        own = foreign(tmp_path / name.replace(".", "-"), name)
        refused(lambda own=own, **more: act(place, own, **more), own, words)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(lambda out=out, **more: act(place, out, **more), tmp_path, "is a file; choose another --out")


def test_the_process_ends_with_2_and_deletes_nothing(ddo, place, tmp_path):
    full = foreign(tmp_path / "f", ".film.123.part", "t.txt")
    before = tree(full)
    given = ["--ckpt", place / "m.safetensors", "--num-images", 2, "--out", full, "--device", "cpu"]
    done = ddo("sample", *given, "--dry-run", "--json", code=2)
    assert json.loads(done.stdout)["error"]["kind"] == RunError.kind
    assert tree(full) == before


# ---------------------------------------------------------------------------------------------------------------------
# Directories of ours, of something else


def test_another_making_is_refused_by_the_dry_run_too(place, tmp_path):
    """The directory of one command, given to another, or to the same with other settings."""
    _drawn(place, tmp_path / "set")
    refused(lambda **more: _drawn(place, tmp_path / "set", sampling={"steps": 4}, **more), tmp_path, "steps: 3 -> 4")
    refused(lambda **more: _guided(place, tmp_path / "set", **more), tmp_path, "guidance")
    refused(lambda **more: _finetuned(place, tmp_path / "set", **more), tmp_path, "holds no run")
    assert _drawn(place, tmp_path / "set", dry_run=True)["dry_run"]
    _edited(place, tmp_path / "e")
    refused(lambda **more: _edited(place, tmp_path / "e", seed=1, **more), tmp_path, "seed: 0 -> 1")
    assert _edited(place, tmp_path / "e", dry_run=True)["dry_run"]
    for name in ("edit.json", ".files.jsonl"):
        (tmp_path / "e" / name).unlink()
    refused(lambda **more: _edited(place, tmp_path / "e", **more), tmp_path, "holds no edited images")
    _encoded(place, tmp_path / "latents")
    refused(lambda **more: _encoded(place, tmp_path / "latents", shard=4, **more), tmp_path, "shard: 1024 -> 4")
    assert _encoded(place, tmp_path / "latents", dry_run=True)["dry_run"]


def test_a_run_is_refused_by_the_dry_run_of_another(place, tmp_path):
    recipe = load("quickstart", CLASSIFIER, {"model.ckpt": str(place / "m.safetensors")})
    identity = {"data_sha256": "x", "model_sha256": "y"}
    RunDir(tmp_path).claim("train-classifier", recipe, **identity)
    refused(lambda **more: _classifier_trained(place, tmp_path, **more), tmp_path, "data_sha256: x -> ")
    refused(lambda **more: _finetuned(place, tmp_path, **more), tmp_path, "command: train-classifier -> finetune-ddo")
    RunDir(tmp_path).check("train-classifier", recipe, **identity)


def test_what_may_change_when_a_run_goes_on(tmp_path):
    """... and for the rest a way out. RunDir decides it from the recipes alone."""

    def recipe(*keys):
        return load("quickstart", keys)

    identity = {"data_sha256": "x", "precision": {"training": "float32", "sampling": "float32"}}
    run_dir = RunDir(tmp_path)
    run_dir.claim("pretrain", recipe(), **identity)
    fewer = recipe("metric={num_images: 64, repeats: 1}", "pretrain={log_every: 1, save_every: 1, precision: float32}",
                   "sampling.precision=float32")  # fmt: skip
    run_dir.check("pretrain", fewer, **identity)
    moved = {**identity, "precision": {"training": "tf32", "sampling": "float32"}}
    with pytest.raises(
        RunError, match=r"keys named precision to float32\. Differences .*\n  precision\.training: float"
    ):
        run_dir.check("pretrain", recipe(), **moved)
    with pytest.raises(
        RunError, match=r"choose another --out, or give the same .*\n  pretrain\.lr: .*\n  seed: 0 -> 1"
    ):
        run_dir.check("pretrain", recipe("pretrain.lr=1.0", "seed=1"), **identity)
    run_dir.advance(finished=True)
    with pytest.raises(RunError, match=r"`ddo fid .*` scores its result .*\n  metric\.num_images: 4096 -> 64"):
        run_dir.check("pretrain", fewer, **identity)
    RunDir(tmp_path / "ddo").claim("finetune-ddo", recipe(), **identity)
    with pytest.raises(RunError, match=r"metric\.num_images: 4096 -> 64"):
        RunDir(tmp_path / "ddo").check("finetune-ddo", fewer, **identity)


def test_a_claim_that_was_killed_half_way_is_continued_and_no_other_state_overwritten(tmp_path):
    recipe, identity = load("quickstart", []), {"data_sha256": "x"}
    state = tmp_path / "state.json"
    half = {"command": "pretrain", **identity}
    for content in ('{"precious": 1}', "[]", "{", '{"command": "pretrain"}', '{"command": "x", "data_sha256": "x"}',
                    json.dumps({**half, "precious": 1})):  # fmt: skip
        state.write_text(content)
        with pytest.raises(RunError, match=r"not empty and holds no run: there is state\.json"):
            RunDir(tmp_path).claim("pretrain", recipe, **identity)
        assert state.read_text() == content
    state.write_text(json.dumps(half))
    assert RunDir(tmp_path).claim("pretrain", recipe, **identity) == half
    assert RunDir(tmp_path).recipe_file.is_file()


def test_figures_of_two_discriminators_are_never_mixed(place, tmp_path):
    _analyzed(place, tmp_path / "a")
    shutil.copy(place / "d.safetensors", place / "copy.safetensors")
    _analyzed(place, tmp_path / "a", "copy.safetensors")  # the same one by another name
    make_discriminator(place / "other.safetensors", str(place / "m.safetensors"), seed=1)
    out = tmp_path / "a"
    refused(lambda **more: _analyzed(place, out, "other.safetensors", **more), out, "discriminator_sha256: ")
    refused(lambda **more: _analyzed(place, out, guidance={"dg_weight": 1.0}, **more), out, "dg_weight: 2.0 -> 1.0")
    refused(lambda **more: _analyzed(place, out, sampling={"steps": 5}, **more), out, "steps: 3 -> 5")
    refused(lambda **more: _analyzed(place, out, data="embedded:digits32-b", **more), out, "data_sha256: ")
    foreign(out, "gain.json")
    refused(lambda **more: _analyzed(place, out, **more), out, "gain.json holds figures of something else")


# ---------------------------------------------------------------------------------------------------------------------
# Leftovers


OURS = (
    ".shard-000000.safetensors.m-123.whole",
    "..part-shard-000000.safetensors.my_host-1.part/x",
    ".x.-7.part/.tmpaB3dE6",
)
NOT_OURS = (
    ".tmp",
    ".tmpaB3dE6",
    ".movie.part",
    ".film.123.part",
    ".host-123.part",
    ".film.my host-1.part",
    ".film.host-12a.part",
    "film.host-123.part",
    ".film.host-123.part.bak",
)


def test_only_what_killed_writers_left_is_swept(tmp_path):
    foreign(tmp_path, *OURS, *NOT_OURS, "sub/.x.json.m-1.part", "busy/.lock", "busy/.x.json.m-1.part")
    (tmp_path / "link").symlink_to(tmp_path / "busy")
    files.sweep(tmp_path)
    left = {*NOT_OURS}
    assert {e.name for e in tmp_path.iterdir()} == left | {"sub", "busy", "link"}
    assert (tmp_path / "sub" / ".x.json.m-1.part").is_file()
    files.sweep(tmp_path, below=True)
    assert {e.name for e in tmp_path.iterdir()} == left | {"sub", "busy", "link"}
    assert not (tmp_path / "sub" / ".x.json.m-1.part").exists()
    assert (tmp_path / "busy" / ".x.json.m-1.part").is_file()  # a set that another process may be writing


def test_a_temporary_file_has_the_name_that_is_swept(tmp_path):
    with files.replacing(tmp_path / ".part-x.json") as temporary:
        temporary.write_text("")
    assert [e.name for e in tmp_path.iterdir()] == [".part-x.json"]
    temporary.parent.mkdir()
    temporary.write_text("")  # as if the process had been killed
    temporary.parent.with_suffix(".whole").write_text("")
    files.sweep(tmp_path)
    assert [e.name for e in tmp_path.iterdir()] == [".part-x.json"]


def test_the_next_writer_of_a_file_removes_what_killed_ones_left_beside_it(tmp_path):
    """In a user's directory, where there is no lock: only of the same file, and of processes known to have ended."""
    with files.replacing(tmp_path / "x") as temporary:
        ours = temporary.parent.name
        temporary.write_text("")
    files._abandoned.cache_clear()
    machine, ended = ours.split(".")[2].split("-")[0], subprocess.Popen(["true"])
    ended.wait()
    stays = (
        ".x.elsewhere-1.part/x",
        f".x.{machine}-{os.getppid()}.part/x",
        f".y.{machine}-{ended.pid}.part/y",
        ".tmpaB3dE6",
    )
    goes = (f".x.{machine}-{ended.pid}.part/.tmpaB3dE6", f".x.{machine}-{ended.pid}.whole", ".x.elsewhere-2.whole")
    foreign(tmp_path, *stays, *goes)
    os.utime(tmp_path / goes[2], (0, 0))
    with files.replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert {str(e.relative_to(tmp_path)) for e in tmp_path.rglob("*") if e.is_file()} == {*stays, "x"}
    with pytest.raises(TypeError), files.replacing(tmp_path / "x") as temporary:
        temporary.write_text(b"no text")
    assert (tmp_path / "x").read_text() == "new"
    assert not list(tmp_path.glob(f".x.{machine}-{os.getpid()}.*"))


def test_sets_and_runs_are_swept_once_they_are_claimed(place, tmp_path):
    _drawn(place, tmp_path / "set")
    foreign(tmp_path / "set", *OURS, "sub/.x.json.m-1.part")
    _drawn(place, tmp_path / "set")
    assert not any((tmp_path / "set" / name).exists() for name in OURS)
    assert (tmp_path / "set" / "sub" / ".x.json.m-1.part").is_file()
    foreign(tmp_path / "run", *OURS, "round-01/.x.json.m-1.part")
    (tmp_path / "run" / "round-01" / ".x.json.m-1.part").rename(tmp_path / "run" / ".y.json.m-1.part")
    (tmp_path / "run" / "round-01").rmdir()
    RunDir(tmp_path / "run").claim("pretrain", load("quickstart", []))
    assert {e.name for e in (tmp_path / "run").iterdir()} == {"recipe.yaml", "state.json", "state.previous.json"}


# ---------------------------------------------------------------------------------------------------------------------
# Full disks and pictures


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        for act in (
            lambda path: files.write_text(path, "x"),
            lambda path: checkpoint.write_tensors(path, {"a": torch.zeros(1)}),
            lambda path: pictures.contact_sheet(np.zeros((1, 1, 8, 8), np.uint8), path),
        ):
            with pytest.raises(OSError, match="No space") as caught:
                act(tmp_path / "x")
            assert caught.value.filename == str(tmp_path / "x")
    (tmp_path / "x").mkdir()
    with pytest.raises(IsADirectoryError) as caught:  # os.replace names the temporary file
        files.write_text(tmp_path / "x", "x")
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(FileNotFoundError) as caught, files.replacing(tmp_path / "y"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")  # another file's error stays its own
    assert [e.name for e in tmp_path.iterdir()] == ["x"]


def test_a_user_s_picture_beside_a_new_set_is_not_overwritten(real_pictures, place, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "set-grid.png")
    refused(lambda **more: _drawn(place, tmp_path / "set", **more), tmp_path, "set-grid.png would be replaced")
    (tmp_path / "set-grid.png").write_text("no picture")
    refused(lambda **more: _drawn(place, tmp_path / "set", **more), tmp_path, "set-grid.png would be replaced")
    (tmp_path / "set-grid.png").unlink()
    _drawn(place, tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    _drawn(place, tmp_path / "set")  # over the grid of the set before
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(RunError, match=r"x\.png would be replaced"):
        ema.run([tmp_path / "none"], tmp_path / "x.safetensors", std=0.1)
    for draw in (
        lambda path: pictures.contact_sheet(np.zeros((2, 2)), path),
        lambda path: pictures.curves({"a": [pictures.Curve("b", [0, 1], [0, 1])]}, path, "x"),
    ):
        draw(tmp_path / "own.png")
        pictures.check_replaceable(tmp_path / "own.png")


def test_a_lock_is_no_claim(tmp_path):
    """What a killed process left before it wrote anything is taken as empty."""
    with rundir.locked(tmp_path / "a"):
        pass
    rundir.check_free(tmp_path / "a", "run")
    assert [e.name for e in (tmp_path / "a").iterdir()] == [files.LOCK]
