"""Messages about foreign files, and the two readers of foreign text, JSON and YAML."""

import json
import struct
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import CPU
from test_foreign import OWN

from ddo_cli import checkpoint, console, files, npz, rundir
from ddo_cli.data import readers
from ddo_cli.data.images import open_images
from ddo_cli.data.stream import open_stream
from ddo_cli.engines.weights import info
from ddo_cli.errors import LONGEST, MOST_LINES, CheckpointError, DataError, RecipeError, RunError, longest, reason
from ddo_cli.files import parse_json, read_json
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.recipe.load import load
from ddo_cli.training.state import read_state

UGLY = "a\x1b[2J\u202e\x07"


def test_a_message_is_short_and_keeps_its_beginning_and_end():
    path = f"/{'dir/' * 40}a.npz"
    message = str(DataError(f"{path} holds {'x' * 5000}; copy it again"))
    assert len(message) <= LONGEST + len(path)
    assert message.startswith(path)
    assert message.endswith("x; copy it again")
    words = str(DataError("set.npz: " + "word " * 500 + "; copy it again"))
    assert (len(words), words[:8], words[-15:]) == (LONGEST, "set.npz:", "; copy it again")
    lines = str(RecipeError("\n".join(f"line {i}" for i in range(1000)))).split("\n")
    assert (len(lines), lines[-1]) == (MOST_LINES, "  ... and 980 more")


def test_a_message_has_no_control_characters(capsys):
    assert str(DataError(f"{UGLY}\tx")) == r"a\x1b[2J\u202e\x07\tx"
    for say in (console.warn, console.info, lambda text: console.error("data", text)):
        say(f"{UGLY}{'y' * 9000}")
    for line in capsys.readouterr().err.splitlines():
        assert line.isprintable()
        assert len(line) < LONGEST + 20


def test_reasons():
    class Odd(Exception):
        pass

    assert reason(ValueError(f"cannot read {object()} of <_io.BytesIO object at 0x7f00aa>")) == "cannot read of"
    assert reason(KeyError("labels")) == "'labels' is missing"
    assert reason(FileNotFoundError(2, "No such file or directory", "/a/b.npz")) == "No such file or directory: b.npz"
    assert reason(Odd()) == "Odd"
    assert reason(Odd("a\n b\x1b")) == r"a b\x1b"
    assert reason(RecursionError("maximum recursion depth exceeded")) == "it is nested too deeply"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested"), ('{"a": ' * 100_000, "nested"), ("9" * 5000, "digits"), (b"\xff", "decode"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ("{", "Expecting"), ('{"b": {"labels": 1, "x": 0, "labels": 2}}', "'labels' twice"),
    ],
)  # fmt: skip
def test_json_that_is_refused(text, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        parse_json(text)
    (tmp_path / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError, match=r"state\.json is damaged"):
        read_json(tmp_path / "state.json")


BOMB = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{chr(ord(c) - 1)}, *{chr(ord(c) - 1)}]\n" for c in "bcdefghijklmnopqr")


def test_brackets_cost_no_time():
    """PyYAML looks 1,024 characters ahead, and its time grows with the square of the depth."""
    for text in ("x: " + "[" * 3000, "x: " + "{a: " * 3000, "- " * 3000, BOMB):
        start = time.process_time()
        with pytest.raises(RecipeError, match=r"values within another|more than 10,000 values|Recursion"):
            load(overrides=[f"finetune={text}"])
        assert time.process_time() - start < 1


def test_a_recipe_value_that_is_long_is_cut():
    with pytest.raises(RecipeError) as caught:
        load(overrides=[f"data.source.{'x' * 5000}=1", f"finetune.lr={'y' * 5000}"])
    assert max(map(len, str(caught.value).split("\n"))) <= LONGEST


@pytest.mark.parametrize(
    "changed",
    [{"rounds": 3}, {"rounds": [3]}, {"rounds": [{"round": "1", "score": 1.0, "promoted": True}]}, {"reference": [1]},
     {"command": 3}, {"reference": {"score": None}}],
)  # fmt: skip
def test_a_state_of_the_wrong_shape(tmp_path, changed):
    (tmp_path / "state.json").write_text(json.dumps({"command": "finetune-ddo", **changed}))
    for read in (lambda: rundir.RunDir(tmp_path).state(), lambda: info.run(str(tmp_path))):
        with pytest.raises(RunError, match=rf"state\.json is damaged \({next(iter(changed))}"):
            read()


def test_a_damaged_recipe_of_a_run(tmp_path):
    for text in ("x: [", BOMB, "- 1"):
        (tmp_path / "recipe.yaml").write_text(text)
        (tmp_path / "state.json").write_text("{}")
        with pytest.raises(RunError, match=r"recipe\.yaml is damaged"):
            rundir.RunDir(tmp_path).check("finetune-ddo", load())


def test_a_header_of_endless_layers(tmp_path):
    config = registry.config_of("edm-unet", (3, 8, 8), 0, {**OWN, "num_blocks": 5000}, {})
    checkpoint.save(tmp_path / "m.safetensors", {"x": torch.zeros(70_000)}, {"kind": "model", "config": config})
    with pytest.raises(RecipeError, match=r"edm-unet .*: more than 1002 parameters"):
        registry.load_model(tmp_path / "m.safetensors", CPU)


def test_manifests_that_count_without_end(tmp_path):
    for form, told in (("shards", {"num": 2**62, "batch": 1}), ("png", {"seeds": "0-4294967295", "labels": [1]})):
        (tmp_path / "manifest.json").write_text(json.dumps({"format": form, "complete": True, **told}))
        with pytest.raises(DataError, match=r"has no shard-000000|more than 5,000,000 seeds"):
            open_images(str(tmp_path))


def test_names_that_are_no_texts():
    with pytest.raises(RecipeError, match=r"sampler"):
        load(overrides=["sampling.sampler=[heun]"])


def test_info_of_odd_manifests(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "latents", "shards": 3}')
    assert info.run(str(tmp_path))["holds"] == "encoded set"
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "a.json").write_text('{"analysis": {"a": 1}, "x": 2}')
    (tmp_path / "b.json").write_text("[1]")  # of another program
    assert info.run(str(tmp_path))["holds"] == "analyses"
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(RunError, match=r"is damaged \(it holds a list\); if ddo wrote it, restore it from a copy$"):
        info.run(str(tmp_path))


def test_headers_that_lack_what_is_needed(tmp_path):
    config = {"name": "time-mlp", "shape": [2], "num_classes": 0, "options": {}}
    whole = {"kind": "discriminator", "config": config, "process": discriminators.PROCESS, "guidance": {}}
    told = {"model": "x", "model_sha256": "y"}
    for header, missing in (
        ({**whole, "config": {"name": "time-mlp"}, "trained_on": told}, "config.shape"),
        (whole, "trained_on.model"),
        ({**whole, "trained_on": {**told, "model_sha256": 3}}, "trained_on.model_sha256"),
    ):
        checkpoint.save(tmp_path / "d.safetensors", {}, header)
        with pytest.raises(CheckpointError, match=missing):
            discriminators.load("discriminator", tmp_path / "d.safetensors", CPU)
    checkpoint.save(tmp_path / "s.safetensors", {}, {"kind": "train-state", "step": 3})
    with pytest.raises(RunError, match="another run"):
        read_state(tmp_path / "s.safetensors", "x")


def test_long_class_names_and_raw_objects(tmp_path, capsys):
    for name in ("a" * 200, "b" * 200, UGLY):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        open_images(str(tmp_path / "set"))
    assert "BytesIO" not in str(caught.value)
    for line in (str(caught.value), *capsys.readouterr().err.splitlines()):
        assert line.isprintable()
        assert len(line) <= longest(line)


# --- Small files that would take much memory


def black(width: int, height: int) -> bytes:
    """A grey PNG of one bit a pixel: 100 MB unpacked fit into 12 kB."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + width // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        ({"a.png": black(8000, 8000)}, "8000x8000 pixels, more than a model draws"),
        ({"a.png": black(16, 16), "dataset.json": b'{"labels": ' + b"[" * (3 << 20)}, "3 MB for 1 images"),
        ({"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, "none of PNG"), ({"a.png": b"%PDF-1.7\n"}, "none of PNG"),
    ],
)  # fmt: skip
def test_what_a_set_may_hold(held, problem, tmp_path):
    for name, content in held.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in held.items():
            archive.writestr(name, content)
    for source in (tmp_path, tmp_path / "set.zip"):
        with pytest.raises(DataError, match=problem):
            open_images(str(source))


def test_arrays_of_nearly_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "LARGE", 1 << 20)
    np.savez_compressed(tmp_path / "zeros.npz", images=np.zeros((800, 32, 32, 3), np.uint8))
    for read in (open_images, open_stream):
        with pytest.raises(DataError, match="'images' unpacks to 2 MB of nearly nothing"):
            read(str(tmp_path / "zeros.npz"))
    np.savez_compressed(
        tmp_path / "noise.npz", images=np.random.default_rng(0).integers(0, 9, (800, 32, 32, 3), np.uint8)
    )
    assert len(open_images(str(tmp_path / "noise.npz")).items) == 800


def test_large_files_are_not_read(tmp_path):
    for name, size in (("manifest.json", files.MAX_JSON), ("img-mean-std-00000000.npy", readers.MAX_MEMBER)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size + 1)  # takes no disk
    with pytest.raises(RunError, match=r"manifest\.json is damaged \(it has 32 MB\)"):
        read_json(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="256 MB"):
        open_images(str(tmp_path))


def test_an_archive_of_latents_without_any(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("img-mean-std-00000000.txt", b"x")
    with pytest.raises(DataError, match=r"holds no img-mean-std-\*\.npy"):
        open_images(str(tmp_path / "set.zip"))


def test_a_manifest_of_encoded_items_of_the_wrong_shape(tmp_path):
    told = {"format": "latents", "encoder": "x", "image_shape": [3, 8, 8], "num_classes": 2, "complete": True}
    for changed in ({"num_classes": 1e400}, {"image_shape": 3}, {"shards": {}}, {"shards": [{"sha256": 3}]}):
        text = json.dumps({**told, "shards": [{"sha256": "x"}], **changed})
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=rf"manifest\.json is damaged \({next(iter(changed))}"):
            open_images(str(tmp_path))
