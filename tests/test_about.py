"""Commands about the program itself: `ddo recipes NAME`, `ddo doctor`, `ddo --version`."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.main import get_command

from ddo_cli import __version__, cli
from ddo_cli.engines import doctor
from ddo_cli.metrics.extractors import weights
from ddo_cli.recipe.load import load, recipe_names


def test_version(ddo):
    assert ddo("--version").stdout == f"ddo {__version__}\n"


def test_a_recipe_is_printed_as_its_file_and_as_json(ddo):
    text = recipe_names()["toy2d"].read_text(encoding="utf-8")
    assert ddo("recipes", "toy2d").stdout == text
    found = json.loads(ddo("recipes", "toy2d", "--json").stdout)
    assert found["recipe"] == load("toy2d").model_dump(mode="json")
    assert "did you mean 'toy2d'?" in ddo("recipes", "toy2", code=2).stderr


def test_a_recipe_is_copied_and_nothing_is_overwritten(ddo, tmp_path):
    ddo("recipes", "toy2d", "--copy", "new/mine.yaml")
    mine = tmp_path / "new" / "mine.yaml"
    assert load(str(mine)) == load("toy2d")
    mine.write_text("name: changed\n")
    assert "there is such a file already" in ddo("recipes", "toy2d", "--copy", mine, code=2).stderr
    assert mine.read_text() == "name: changed\n"
    assert ddo("recipes", mine).stdout == "name: changed\n"
    for given, message in (
        (["toy2d", "--copy", "."], "is not the name of a YAML file"),
        (["--copy", "a.yaml"], "needs the name of a recipe"),
        (["toy2d", "--keys"], "not of toy2d; leave one of them out"),
    ):
        assert message in ddo("recipes", *given, code=2).stderr


def fits(screen: str) -> bool:
    lines = screen.splitlines()
    return len(lines) <= 22 and all(len(line) <= 80 for line in lines)  # the command and the prompt are two more


def test_doctor_fits_a_screen_and_finds_weights(ddo, tmp_path, monkeypatch):
    file = tmp_path / "a-name-of-weights-of-one-s-own-that-is-as-long-as-they-come.pth"
    file.write_bytes(b"x")
    monkeypatch.setenv("DDO_INCEPTION_WEIGHTS", str(file))
    shown = ddo("doctor").stdout
    assert fits(shown), shown
    assert f"torch        {torch.__version__}" in shown
    assert "PROBLEM" not in shown
    found = json.loads(ddo("doctor", "--json").stdout)
    assert found["weights"]["fid"]["path"] == str(file)
    assert not found["weights"]["fid"]["is_published"]
    assert len(found["weights"]["fd_embedded"]["sha256"]) == 64
    assert found["weights"]["fd_clip"] is None
    assert found["environment"]["DDO_INCEPTION_WEIGHTS"] == str(file)
    assert found["disk"]["free_gib"] > 0


def test_doctor_names_what_is_damaged(ddo, tmp_path, monkeypatch):
    weights.cache().mkdir(parents=True, exist_ok=True)
    damaged = weights.cache() / weights.PUBLISHED["fd_dinov2"].names[0]
    damaged.write_bytes(b"half")
    shown = [ddo("doctor").stdout]
    damaged.unlink()
    monkeypatch.setenv("DDO_DINOV2_WEIGHTS", str(tmp_path / "missing.pth"))
    shown += [ddo("doctor").stdout]
    for text, problem in zip(shown, ("has the wrong hash", "missing.pth does not exist"), strict=True):
        assert problem in " ".join(text.split())
        assert all(len(line) <= 80 for line in text.splitlines() if "/" not in line)  # an address is kept whole


@pytest.mark.parametrize(("major", "precisions"), [(7, ["float32", "fp16"]), (9, ["float32", "tf32", "bf16", "fp16"])])
def test_doctor_lists_gpus_with_the_precisions_of_their_hardware(monkeypatch, major, precisions):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79 * doctor.GIB, 80 * doctor.GIB))
    found = doctor.run()
    assert found["devices"][7]["precisions"] == precisions
    shown = doctor.screen(found)
    assert fits(shown), shown
    assert "H100 80GB HBM3" in shown
    assert "8 in all" in shown


def test_help_shows_what_the_default_recipe_has():
    shown = {p.name: p.show_default for p in get_command(cli.app).commands["finetune-ddo"].whole.params}
    assert shown["lr"] == f"recipe, {load('quickstart').finetune.lr:g} in quickstart"
    assert shown["ckpt"] == "recipe, embedded:digits16 in quickstart"
    assert shown["control"] == "recipe, false in quickstart"
    assert shown["model_file"] == "recipe"  # which has none


@pytest.mark.parametrize(
    ("line", "section", "keys"),
    [
        (["finetune-ddo", "--no-measure", "--alpha", "3"], "finetune", ("alpha", "beta", "lr")),
        (["pretrain", "--no-measure"], "pretrain", ("lr",)),
        (["train-disc"], "discriminator", ("lr",)),
        (["train-classifier"], "classifier", ("lr",)),
    ],
)
def test_a_dry_run_shows_the_coefficients_and_the_recipe(ddo, line, section, keys):
    small = ["data.num=200", f"{section}.lr=0.0025", "--dry-run"]
    small[2:2] = [f"{section}.held_out=50"] if section in ("discriminator", "classifier") else []
    small[2:2] = ["discriminator.num_fake=200"] if section == "discriminator" else []
    found = json.loads(ddo(*line, *small, "--json").stdout)
    given = {"finetune.alpha": 3.0} if section == "finetune" else {}
    assert found["recipe"] == load("quickstart", small[:-1], given).model_dump(mode="json")
    shown = ddo(*line, *small).stdout
    for key in keys:
        assert f"\n{key:<18} {found[key]:g}" in shown
    assert "recipe" not in shown
