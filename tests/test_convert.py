"""`ddo convert`: published files -> ours, told apart, verified, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, make_checkpoint
from test_adm_encoder import TINY, tiny_classifier, tiny_discriminator
from test_foreign import network, official, official_tensors, persistent, random_model, write  # noqa: F401

from ddo_cli import checkpoint
from ddo_cli.engines import convert, guide_sample, sample
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models import discriminators


@pytest.fixture
def pickled(official, tmp_path):  # noqa: F811
    """An EDM pickle, and the model that it holds."""
    model = random_model()
    ema = network(official, official_tensors(model))
    return write(tmp_path / "edm.pkl", {"ema": ema, "augment_pipe": None}), model


def test_an_edm_pickle_is_converted_verified_and_sampled(pickled, tmp_path):
    path, model = pickled
    found = convert.run(path, tmp_path / "edm.safetensors", verify=True)
    assert (found["family"], found["kind"], found["shape"], found["verified"]) == ("edm", "model", [3, 8, 8], True)
    assert found["num_tensors"] == len(model.state_dict())
    assert found["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    header = checkpoint.read_header(tmp_path / "edm.safetensors", kind="model")
    assert header["sampling"] == {"sampler": "heun", "steps": 18}
    assert header["provenance"][0]["source"] == "edm.pkl"
    drawn = sample.run(str(tmp_path / "edm.safetensors"), range(2), tmp_path / "set", device=CPU)
    assert drawn["nfe"] == 35


def test_a_classifier_and_the_discriminator_on_it(tmp_path):
    options = {**TINY, "width": 64, "num_head_channels": 64}
    made = tiny_classifier(tmp_path / "c.safetensors", **options)
    torch.save(discriminators.load("classifier", made, CPU).network.state_dict(), tmp_path / "c.pt")
    found = convert.run(tmp_path / "c.pt", tmp_path / "classifier.safetensors", verify=True)
    assert (found["family"], found["kind"]) == ("adm", "classifier")
    trunk = str(tmp_path / "classifier.safetensors")
    _, made_network = tiny_discriminator(trunk, 0, width=64, num_head_channels=64)
    torch.save(made_network.head.state_dict(), tmp_path / "d.pt")
    with pytest.raises(UsageError, match="say with --model"):
        convert.run(tmp_path / "d.pt", tmp_path / "d.safetensors", trunk=trunk)
    model = make_checkpoint(tmp_path / "m.safetensors")
    found = convert.run(tmp_path / "d.pt", tmp_path / "d.safetensors", trunk=trunk, model=model, verify=True)
    assert (found["family"], found["kind"], found["num_classes"]) == ("dg", "discriminator", 0)
    header = checkpoint.read_header(tmp_path / "d.safetensors", kind="discriminator")
    assert header["trained_on"]["model_sha256"] == checkpoint.load(model).sha256
    assert header["guidance"]["dg_weight"] == 2.0
    if tuple(found["shape"]) == (3, 32, 32):
        drawn = guide_sample.run(str(tmp_path / "d.safetensors"), None, range(2), tmp_path / "set", device=CPU)
        assert drawn["disc_nfe"] > 0


def test_files_that_cannot_be_converted(pickled, tmp_path):
    path, _ = pickled
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"taken\.safetensors exists"):
        convert.run(path, tmp_path / "taken.safetensors")
    assert (tmp_path / "taken.safetensors").read_bytes() == b"precious"
    with pytest.raises(UsageError, match="does not exist"):
        convert.run(tmp_path / "none.pkl", tmp_path / "x.safetensors")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="junk"):
        convert.run(tmp_path / "junk.pt", tmp_path / "x.safetensors")
    assert convert.run(path, tmp_path / "x.safetensors", dry_run=True)["dry_run"]
    assert not (tmp_path / "x.safetensors").exists()


def test_a_hostile_pickle_runs_nothing_and_exits_with_2(tmp_path):
    marker = tmp_path / "ran"
    code = f"cos\nsystem\n(S'touch {marker}'\ntR."
    (tmp_path / "evil.pkl").write_bytes(code.encode())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ddo_cli", "convert", "evil.pkl", "--out", "x.safetensors", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert "os.system" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr
    assert not marker.exists()
