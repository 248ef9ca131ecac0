"""What a new user meets: files that are missing, other networks, other data, and figures as people read them."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import CPU

from ddo_cli import __version__
from ddo_cli.data.images import open_images
from ddo_cli.engines import pages
from ddo_cli.engines.fid import report as fid_report
from ddo_cli.engines.scoring import Scoring
from ddo_cli.metrics.uncertainty import Mean
from ddo_cli.recipe.keys import described
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report.numbers import readable

ROOT = Path(__file__).parent.parent
MISSING = {
    "sample --ckpt no.safetensors": "--ckpt no.safetensors does not exist; give the path of a weight file (`ddo pre",
    "finetune-ddo model.ckpt=no.safetensors": "model.ckpt no.safetensors does not exist",
    "finetune-ddo --recipe cifar10-uncond": "model.ckpt edm-cifar10-32x32-uncond-vp.safetensors does not exist",
    "guide-sample --disc no.st": "--disc no.st does not exist; give the path of a weight file (`ddo train-disc`",
    "finetune-ddo --data no": "--data no does not exist; give a folder",
    "pretrain metric.extractor=no.st": "metric.extractor no.st does not exist; give the path of a weight file (`ddo tr",
    "fid embedded:digits8 --ref no": "--ref no does not exist; give a folder",
    "fid no": "error: no does not exist; give a folder",
    "sample --model-file no.py": "--model-file (model.file) no.py does not exist",
}


@pytest.mark.parametrize("line", MISSING)
def test_a_missing_file_is_named_with_its_option_or_key(ddo, line):
    assert MISSING[line] in ddo(*line.split(), code=2).stderr


@pytest.mark.parametrize("given", [["model.name=mlp"], ["model={name: mlp}"], ["model.draw.p_std=2", "model.name=mlp"]])
def test_options_belong_to_their_model(given):
    """The quickstart's widths are none of another network's."""
    model = load("quickstart", [*given, "model.options.width=8"]).model
    assert (model.name, model.options) == ("mlp", {"width": 8})
    assert model.draw == ({"p_std": 2} if len(given) == 2 else {})
    same = load("quickstart", ["model.name=patch-unet"]).model
    assert same == load("quickstart").model
    assert load("toy2d-dg", ["discriminator.name=time-encoder"]).discriminator.options == {}


def scoring_of(source: str, *settings: str) -> Scoring:
    recipe: Recipe = load("quickstart", [f"data.source={source}", *settings])
    return Scoring(recipe, open_images(source), recipe.sampling, CPU)


def test_digit_features_of_other_images_are_warned_of(tmp_path, capsys):
    images = np.random.default_rng(0).integers(256, size=(300, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez(tmp_path / "labelled.npz", arr_0=images, arr_1=np.arange(300) % 10)
    scoring_of(str(tmp_path / "plain.npz"))
    told = capsys.readouterr().err
    assert (
        "plain.npz is scored by features of a digit classifier, which mean little here; set metric.name to fid" in told
    )
    scoring_of(str(tmp_path / "labelled.npz"))
    assert "give one made by `ddo train-extractor` as metric.extractor, or set metric.name" in capsys.readouterr().err
    scoring_of("embedded:digits8")
    assert "digit classifier" not in capsys.readouterr().err


def test_large_figures_have_no_exponent_and_empty_columns_are_left_out():
    assert [readable(value) for value in (52351.2, 1.5, 0.000123456, 7)] == ["52,351", "1.5", "0.0001235", "7"]
    columns, rows = fid_report.table({"kid_embedded": 52351.2, "kid_embedded_std": 20123.4})
    assert (columns, rows) == (["metric", "value", "better"], [("kid_embedded", "52,351 ± 20,123", "lower")])
    assert [str(Mean(52351.2, error)) for error in (None, 20123.4)] == ["52,351", "52,351 ± 20,123"]
    line = {"images": 1, "n_images": 1, "images_per_second": 1e-7}
    assert pages.cost([[line]]).blocks[0].tiles[0][1] == "2,778"  # hours
    row = fid_report.markdown({"source": "s", "num_images": 4096, "kid_embedded": 52351.2}).splitlines()[2]
    assert row == "| s | 4096 | 52,351 |"
    figure = {"metric": "kid_embedded", "method": "EDM", "value": 1.9, "arxiv": "2206.00364", "nfe": 35}
    columns, rows = fid_report.table({"kid_embedded": 2.0, "published": {"figures": [figure]}})
    assert columns[3] == "published"
    assert rows[0][3] == "EDM 1.9 (arXiv 2206.00364, 35 evaluations)"


def test_what_the_package_says_of_itself():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'license = "Apache-2.0 AND CC-BY-4.0"' in settings  # the embedded digits are CC BY 4.0
    assert (ROOT / "ddo_cli" / "py.typed").is_file()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert [entry["url"][-10:] for entry in citation["references"]] == ["2503.01103", "2211.17091"]
    assert "source $(BIN)/activate" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_help_tells_units():
    """Images or steps, noise levels, VP times, nats."""
    for key in described():
        last = key.name.rpartition(".")[2]
        if last.endswith(("images", "_every", "num_fake", "held_out", "batch", "warmup", "half_life")):
            assert re.search("[Ii]mages|[Ss]teps", key.meaning), key
        if last in ("sigma_min", "sigma_max", "s_min", "s_max"):
            assert re.search(r"\[-1, 1\]|as sigma_min", key.meaning), key
        if last.startswith(("t_min", "time_")):
            assert "VP time" in key.meaning, key
    assert "(nats)" in next(key.meaning for key in described() if key.name == "finetune.beta")
