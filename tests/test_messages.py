"""Messages about foreign files, and the two readers of foreign text, JSON and YAML."""

import json
import time

import pytest
from conftest import CPU

from ddo_cli import checkpoint, console, rundir
from ddo_cli.data.images import open_images
from ddo_cli.engines.weights import info
from ddo_cli.errors import LONGEST, MOST_LINES, CheckpointError, DataError, RecipeError, RunError, reason
from ddo_cli.files import parse_json, read_json
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.recipe.load import load
from ddo_cli.training.state import read_state

UGLY = "a\x1b[2J\u202e\x07"


def test_a_message_is_short_and_keeps_its_beginning_and_end():
    path = f"/{'dir/' * 40}a.npz"
    message = str(DataError(f"{path} holds {'x' * 5000}; copy it again"))
    assert len(message) <= LONGEST
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


def test_manifests_that_count_without_end(tmp_path):
    for form, told in (("shards", {"num": 2**62, "batch": 1}), ("png", {"seeds": "0-4294967295", "labels": [1]})):
        (tmp_path / "manifest.json").write_text(json.dumps({"format": form, "complete": True, **told}))
        with pytest.raises(DataError, match=r"has no shard-000000|more than 10,000,000 seeds"):
            open_images(str(tmp_path))


def test_names_that_are_no_texts():
    with pytest.raises(RecipeError, match=r"sampler"):
        load(overrides=["sampling.sampler=[heun]"])


def test_info_of_odd_manifests(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "latents", "shards": 3}')
    assert info.run(str(tmp_path))["holds"] == "encoded set"
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "a.json").write_text('{"analysis": {"a": 1}, "x": 2}')
    assert info.run(str(tmp_path))["holds"] == "analyses"


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
    assert len(str(caught.value)) <= LONGEST
    assert all(line.isprintable() and len(line) <= LONGEST for line in capsys.readouterr().err.splitlines())
