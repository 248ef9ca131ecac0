"""The embedded files, made again by what `make assets` runs."""

import pytest
import torch

from ddo_cli import checkpoint
from ddo_cli.assets import build
from ddo_cli.places import ASSETS

RECIPES = {"digits16": "quickstart", "digits32": "quickstart-few-steps", "digits8": "digits8-ar", "toy2d": "toy2d"}


@pytest.fixture
def threads():
    """Their number afterwards is that of before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["digits.npz", "toy2d-wrong.safetensors"])
def test_what_is_not_trained_comes_back_byte_for_byte(tmp_path, threads, name):
    pytest.importorskip("sklearn")
    build.make(name, tmp_path / name)
    assert build.difference(tmp_path / name, ASSETS / name) == "same bytes"


@pytest.mark.slow
def test_the_cheapest_reference_comes_back_up_to_rounding(tmp_path, threads):
    """Bit for bit on the CPU that made it; on others 1.5e-4 of its weights were rounding. The small networks of digits
    are no such test, since training amplifies rounding in them to percents.
    """
    build.make("toy2d.safetensors", tmp_path / "toy2d.safetensors")
    made, own = (checkpoint.load(folder / "toy2d.safetensors") for folder in (tmp_path, ASSETS))
    assert made.header == own.header
    assert made.tensors.keys() == own.tensors.keys()
    for name, tensor in own.tensors.items():
        assert float((made.tensors[name] - tensor).norm()) < 2e-3 * float(tensor.norm()), name


def test_all_files_are_made_and_take_at_most_4_mb():
    files = [path for path in ASSETS.iterdir() if path.suffix in (".npz", ".safetensors")]
    assert {path.name for path in files} == build.MAKERS.keys()
    assert sum(path.stat().st_size for path in files) <= 4e6


def test_what_a_file_made_again_changes_is_told(tmp_path):
    own, made = tmp_path / "own.safetensors", tmp_path / "made.safetensors"
    tensors, header = {"a": torch.ones(4), "b": torch.zeros(2)}, {"kind": "model"}
    assert (checkpoint.save(made, tensors, header), build.difference(made, own))[1] == "changed"
    checkpoint.save(own, tensors, header)
    assert build.difference(made, own) == "same bytes"
    checkpoint.save(own, tensors, {**header, "step": 1})
    assert build.difference(made, own) == "changed: the header, same weights"
    checkpoint.save(own, {**tensors, "a": torch.ones(4) * 0.8}, header)
    assert build.difference(made, own) == "changed: weights 2.5e-01 apart"
    checkpoint.save(own, {"a": torch.ones(4)}, header)
    assert build.difference(made, own) == "changed: tensors of other names or shapes"
