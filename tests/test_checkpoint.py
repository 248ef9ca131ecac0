import json
import os

import pytest
import torch
from conftest import CPU, make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ddo_cli import checkpoint, files
from ddo_cli.errors import CheckpointError, RecipeError
from ddo_cli.models import registry


def test_equal_content_gives_equal_bytes(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(2)}
    header = {"kind": "model", "z": 1, "config": {"y": 2, "x": [1, 2]}}
    for name in ("one", "two"):
        checkpoint.save(tmp_path / name, tensors, header)
        header = dict(reversed(header.items()))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = checkpoint.load(tmp_path / "one", kind="model")
    assert torch.equal(found.tensors["b"], tensors["b"])
    assert found.header == header
    assert found.sha256 == files.sha256(tmp_path / "one")


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give the path of a weight file"):
        checkpoint.load(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="is a directory"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"embedded:nothing does not come with this program; known: embedded:"):
        checkpoint.load("embedded:nothing")
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="without this program's header"):
        checkpoint.load(tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        checkpoint.load(tmp_path / "text.safetensors")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_files_are_refused(tmp_path, share):
    path = tmp_path / "whole.safetensors"
    if not path.exists():
        checkpoint.save(path, {"a": torch.arange(100.0)}, {"kind": "model"})
    content = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        checkpoint.load(cut)


def test_kind_is_checked(tmp_path):
    checkpoint.save(tmp_path / "x", {}, {"kind": "extractor"})
    with pytest.raises(CheckpointError, match="kind 'extractor' where a 'model' is needed"):
        checkpoint.load(tmp_path / "x", kind="model")


def test_model_round_trip(tmp_path):
    path = make_checkpoint(tmp_path / "m.safetensors")
    model, file = registry.load_model(path, CPU)
    assert not model.training
    assert not file.tensors  # they are the model's now, and not held twice
    stored = checkpoint.load(path).tensors
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_tensors_that_do_not_fit_the_header(tmp_path):
    path = make_checkpoint(tmp_path / "m.safetensors")
    file = checkpoint.load(path)
    tensors = dict(list(file.tensors.items())[1:])
    checkpoint.save(tmp_path / "less.safetensors", tensors, file.header)
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        registry.load_model(tmp_path / "less.safetensors", CPU)


def test_a_file_with_the_old_name_of_label_dropout_is_refused(tmp_path):
    path = make_checkpoint(tmp_path / "old.safetensors")
    file = checkpoint.load(path)
    file.header["config"]["draw"]["label_drop"] = file.header["config"]["draw"].pop("label_dropout")
    checkpoint.save(tmp_path / "old.safetensors", file.tensors, file.header)
    with pytest.raises(CheckpointError, match=r"written before config\.draw\.label_drop became label_dropout; convert"):
        registry.load_model(path, CPU)


def test_embedded_files_have_no_old_keys():
    for name in checkpoint.embedded_names():
        header = checkpoint.read_header(f"embedded:{name}")
        for link in header.get("provenance", []):
            (link.get("recipe") or {}).pop("sampling", None)  # whose schedule is EDM's
        text = json.dumps(header)
        assert not [key for key in ("label_drop", "schedule", "recompute") if f'"{key}"' in text], name


def test_draw_options_can_be_replaced_but_not_misspelt(tmp_path):
    path = make_checkpoint(tmp_path / "m.safetensors")
    assert registry.load_model(path, CPU, {"p_std": 1.6}).model.draw_options.p_std == 1.6
    with pytest.raises(RecipeError, match=r"finetune\.draw\.p_sdt .*did you mean 'p_std'"):
        registry.load_model(path, CPU, {"p_sdt": 1.6})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_users_own_model(tmp_path):
    """The registry's docstring, as a user would follow it."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from ddo_cli.models.registry import register\n"
        "from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions\n"
        "from ddo_cli.codec import PixelCodec\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, channels, width):\n"
        "        super().__init__()\n"
        "        self.layers = torch.nn.Sequential(torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.SiLU(),\n"
        "                                          torch.nn.Conv2d(width, channels, 3, padding=1))\n"
        "    def forward(self, x, c_noise, label):\n"
        "        return self.layers(x) + c_noise.view(-1, 1, 1, 1)\n"
        "class Options(DiffusionOptions):\n"
        "    width: int = 4\n"
        "@register('my-net', Options, DiffusionDrawOptions)\n"
        "def build(shape, num_classes, options, draw_options):\n"
        "    net = Net(shape[0], options.width)\n"
        "    return DiffusionModel(net, PixelCodec(shape), num_classes, options, draw_options)\n"
    )
    with pytest.raises(RecipeError, match="my-net"):
        registry.find("my-net")
    registry.load_file(str(tmp_path / "mine.py"))
    config = registry.config_of("my-net", (3, 8, 8), 0, {"width": 6}, {})
    assert config["options"]["width"] == 6
    assert registry.build(config).codec.shape == (3, 8, 8)
    registry._catalog.entries.pop("my-net")


def test_user_files_that_fail(tmp_path):
    from ddo_cli.errors import UsageError

    with pytest.raises(UsageError, match="does not exist"):
        registry.load_file(str(tmp_path / "none.py"))
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        registry.load_file(str(tmp_path / "bad.py"))


# ---------------------------------------------------------------------------------------------------------------------
# Headers of the wrong shape

WRONG = {
    "kind": 3, "config": [1], "config.name": 5, "config.shape": [3, -1, 32], "config.shape ": "3x32x32",
    "config.shape  ": [3, 32, 32, 1, 1], "config.num_classes": 1.5, "config.options": [], "config.draw": "x",
    "sampling": [], "sampling.steps": -1, "sampling.nothing": 1, "provenance": {}, "provenance ": [3],
    "provenance  ": [{"recipe": {}}], "provenance   ": [{"command": "x", "recipe": []}], "step": "1",
    "config.options.widths": [10**12], "config.options.depths": [10**9], "config.options.depths ": [-3],
    "config.options.emb_width": 0, "config.options.patch": 7, "config.options.sigma_data": float("nan"),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_a_header_of_the_wrong_shape_is_one_message(tmp_path, ddo, key):
    """Whatever it says, nothing is built that its weights could not fill."""
    file = tmp_path / "m.safetensors"
    make_checkpoint(file)
    whole = checkpoint.load(file)
    header = json.loads(json.dumps(whole.header))
    *sections, last = key.strip().split(".")
    place = header
    for name in sections:
        place = place.setdefault(name, {})
    place[last] = WRONG[key]
    checkpoint.save(file, whole.tensors, header)
    done = ddo("sample", "--ckpt", file, "--num-images", 1, "--out", "set", code=None)
    if key.startswith("provenance") or key == "step":
        assert done.returncode == 2
        assert ddo("info", file, code=None).returncode == 2
    assert done.returncode == 2, key
    message = " ".join(done.stderr.split())
    assert message.startswith("error:")
    assert len(message) < 600


def test_a_step_of_provenance_without_settings_is_told(tmp_path, ddo):
    file = tmp_path / "m.safetensors"
    make_checkpoint(file)
    whole = checkpoint.load(file)
    header = {**whole.header, "provenance": [{"command": "pretrain", "recipe": {"name": "mine", "pretrain": 3}}]}
    checkpoint.save(file, whole.tensors, header)
    told = json.loads(ddo("info", file, "--json").stdout)
    assert told["provenance"] == [{"command": "pretrain", "recipe": "mine"}]


@pytest.mark.parametrize(
    ("raised", "said"),
    [  # what the library makes of an error of the disk, and of torch's when it opens the file once more
        (FileNotFoundError("No such file or directory: a.safetensors"), "Input/output error"),
        (
            RuntimeError("unable to open file <a.safetensors> in read-only mode: Too many open files (24)"),
            "Too many open",
        ),
    ],
)
def test_a_disk_error_keeps_its_reason(raised, said, tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    checkpoint.save(file, {"x": torch.zeros(2)}, {"kind": "model"})

    def fails(*_, **__):
        raise raised

    monkeypatch.setattr(checkpoint, "safe_open", fails)
    with pytest.raises(OSError, match=said) as error:
        checkpoint.load_tensors(file)
    assert error.value.filename == str(file)
    with pytest.raises(CheckpointError, match=rf"a\.safetensors is not a whole safetensors file \({said}"):
        checkpoint.load(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="No such file"):
        checkpoint.load_tensors(file)
