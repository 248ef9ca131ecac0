"""The command line as users meet it: one message, exit code 2, JSON on stdout, nothing lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import make_checkpoint
from launch import launch
from PIL import Image
from safetensors import SafetensorError

from ddo_cli import checkpoint, files

ROOT = Path(__file__).parent.parent


def program(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A process of its own; the fixture `ddo` runs a command line in this one."""
    done = launch("-m", "ddo_cli", *arguments, cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "m.safetensors")


def test_help_does_not_import_torch(tmp_path):
    code = "import sys; sys.argv=['ddo','--help']\nfrom ddo_cli.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'pydantic', 'matplotlib', 'numpy'} & set(sys.modules), 'a slow import'"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = (
        "sample finetune-ddo train-disc guide-sample edit analyze pretrain train-classifier fid info recipes convert"
    )
    for command in [*names.split(), "train-extractor"]:
        assert command in done.stdout


def test_sample_then_info_and_fid(ckpt, tmp_path):
    found = json.loads(program("sample", "--ckpt", ckpt, "--num-images", "6", "--json", cwd=tmp_path).stdout)
    assert {"out", "num_images", "nfe", "images_per_second", "checkpoint_sha256", "seeds"} <= found.keys()
    assert found["seeds"] == "0-5"
    assert Image.open(tmp_path / "samples" / "000005.png").mode == "RGB"
    held = json.loads(program("info", "samples", "--json", cwd=tmp_path).stdout)
    assert held["holds"] == "sample set"
    assert held["checkpoint_sha256"] == found["checkpoint_sha256"]
    done = program("fid", "samples/", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["num_images"] == 6
    assert "not an FID" in done.stderr  # the fallback names itself
    assert "rank-deficient" in done.stderr


BAD = {
    "missing": (["sample", "--ckpt", "none.safetensors"], "none.safetensors does not exist"),
    "classes": (["sample", "--ckpt", "CKPT", "--classes", "3,12"], "--classes 12 is out of range"),
    "letters": (["sample", "--ckpt", "CKPT", "--classes", "a"], "--classes a cannot be read"),
    "sampler": (["sample", "--ckpt", "CKPT", "--sampler", "hein"], "sampler = 'hein'"),
    "type": (["sample", "--num-images", "many"], "Invalid value for '--num-images'"),
    "option": (["sample", "--nun", "3"], "--nun"),
    "format": (["sample", "--ckpt", "CKPT", "--format", "gif"], "'--format': 'gif' is not one of 'png'"),
    "alpha": (["finetune-ddo", "--ckpt", "CKPT", "--alpha", "-1"], "finetune.alpha = -1.0"),
    "beta": (["finetune-ddo", "--ckpt", "CKPT", "--beta", "0"], "finetune.beta = 0.0"),
    "key": (["finetune-ddo", "--ckpt", "CKPT", "finetune.roundz=3"], "did you mean 'finetune.rounds'?"),
    "draw": (["finetune-ddo", "--ckpt", "CKPT", "finetune.draw={p_men: 1}"], "did you mean 'p_mean'?"),
    "recipe": (["finetune-ddo", "--recipe", "quickstrat"], "did you mean 'quickstart'?"),
    "kind": (["sample", "--ckpt", "embedded:extractor-digits32"], "kind 'extractor' where a 'model' is needed"),
    "model option": (["pretrain", "model.options={widht: [8]}"], "model.options.widht"),
    "device": (["sample", "--ckpt", "CKPT", "--device", "tpu"], "--device tpu is not known"),
    "nothing there": (["fid", "nowhere"], "nowhere"),
    "null section": (["finetune-ddo", "--ckpt", "CKPT", "finetune=5", "--rounds", "2"], "is a value, not a section"),
    "yaml": (["sample", "--ckpt", "CKPT", "steps=["], "not YAML"),
    "bounds": (["sample", "--ckpt", "CKPT", "sigma_min=100"], "must be below"),
    "seed": (["sample", "--ckpt", "CKPT", "--seed", "18446744073709551616"], "--seed"),
    "seeds": (["sample", "--ckpt", "CKPT", "--seeds", "0-18446744073709551616"], "seeds end at"),
    "long": (["sample", "--ckpt", "CKPT", "--out", "x" * 300], "File name too long"),
    "widths": (["pretrain", "model.options={widths: [-4, 8]}"], "model.options.widths"),
    "extractor": (["pretrain", "metric.extractor=nope.safetensors"], "nope.safetensors does not exist"),
    "no run": (["info", "."], "ddo did not write it"),
    "no model file": (["finetune-ddo", "--ckpt", "CKPT", "--model-file", "mine.py"], "mine.py does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_get_one_message_and_exit_code_2(ddo, ckpt, tmp_path, case):
    arguments, message = BAD[case]
    done = ddo(*(ckpt if part == "CKPT" else part for part in arguments), "--json", code=2)
    assert message in done.stderr.replace("\n", " ")
    assert message in json.loads(done.stdout)["error"]["message"]
    assert not list(tmp_path.iterdir())  # nothing was written


def test_truncated_checkpoint(ddo, ckpt, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(Path(ckpt).read_bytes()[:5000])
    assert "not a whole safetensors file" in ddo("sample", "--ckpt", "cut.safetensors", code=2).stderr


def test_wrong_image_inside_a_zip_is_named(ddo, ckpt, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name, size in (("a.png", 32), ("b.png", 31)):
            Image.fromarray(np.zeros((size, size, 3), dtype=np.uint8)).save(tmp_path / name)
            archive.write(tmp_path / name, name)
    done = ddo("finetune-ddo", "--ckpt", ckpt, "--data", "data.zip", code=2)
    assert "b.png" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_data_that_does_not_fit_the_model(ddo, ckpt):
    done = ddo("finetune-ddo", "--ckpt", ckpt, "--data", "embedded:digits8", code=2)
    assert "embedded:digits8" in done.stderr


def test_a_bare_section_and_a_plain_exponent(ddo, ckpt, tmp_path):
    """YAML as people write it: `finetune:` without keys, and 1e-4 without a point."""
    (tmp_path / "mine.yaml").write_text("name: mine\nfinetune:\npretrain:\n  lr: 1e-4\n")
    given = ["--recipe", "mine.yaml", "--ckpt", ckpt, "--data", "embedded:digits32", "--rounds", "1"]
    done = ddo("finetune-ddo", *given, "--dry-run", "--json")
    assert json.loads(done.stdout)["rounds"] == 1


def test_interruption_says_so(ckpt, tmp_path):
    command = [sys.executable, "-m", "ddo_cli", "sample", "--ckpt", ckpt, "--num-images", "100000", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
        # A shell's background jobs ignore the signal, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / "samples" / "000000.png").is_file():
        assert started.poll() is None
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert json.loads(out)["error"]["kind"] == "interrupted"
    assert "the same command continues" in err
    assert "Traceback" not in err


def test_ctrl_c_while_the_program_is_imported():
    code = """
import sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "ddo_cli.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from ddo_cli.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (130, "error: interrupted\n", "")


def test_names_reach_json_unchanged(ddo, ckpt):
    done = ddo("sample", "--ckpt", ckpt, "--num-images", "1", "--out", ":fire: [x]", "--json")
    assert json.loads(done.stdout)["out"] == ":fire: [x]"


@pytest.mark.parametrize("form", ["png", "shards"])
def test_a_full_disk_below_the_library(ddo, ckpt, monkeypatch, form):
    """safetensors wraps the system's error in one of its own."""

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    done = ddo("sample", "--ckpt", ckpt, "--num-images", "2", "--format", form, code=2)
    assert "No space left on device; make room" in done.stderr


def test_no_space_left(ddo, ckpt, monkeypatch, tmp_path):
    """A full device: the message says so, and nothing takes its final name."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/shard")

    monkeypatch.setattr(files.os, "fsync", full)
    done = ddo("sample", "--ckpt", ckpt, "--num-images", "2", code=2)
    assert "No space left on device; make room and run the same command again" in done.stderr
    assert not [path for path in (tmp_path / "samples").iterdir() if path.name != ".lock"]


def test_a_user_s_model_from_file_to_samples(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from ddo_cli.models.registry import register\n"
        "from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions\n"
        "from ddo_cli.codec import Codec\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(2, 2)\n"
        "    def forward(self, x, c_noise, label):\n"
        "        return self.layer(x)\n"
        "@register('mine', DiffusionOptions, DiffusionDrawOptions)\n"
        "def build(shape, num_classes, options, draw):\n"
        "    return DiffusionModel(Net(), Codec(shape), num_classes, options, draw)\n"
    )
    settings = ["model={name: mine}", "pretrain.images=512", "pretrain.batch=64"]
    done = program("pretrain", "--recipe", "toy2d", "--model-file", "mine.py", "--json", *settings, cwd=tmp_path)
    final = json.loads(done.stdout)["final"]
    sample = ["sample", "--ckpt", final, "--format", "npz", "--num-images", "10"]
    assert "model.file" in program(*sample, cwd=tmp_path, code=2).stderr  # the remedy
    program(*sample, "--model-file", "mine.py", cwd=tmp_path)
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (10, 2)
