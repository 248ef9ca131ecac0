"""Weight files of other programs: what they are, and what to give, in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ddo_cli import checkpoint
from ddo_cli.engines.weights import convert
from ddo_cli.errors import CheckpointError, UsageError

PUBLISHED = "no file of published weights; give a .pkl, .pt or .pth file, or a folder of diffusers"
FILES = {
    "sd.safetensors": ("model.diffusion_model.input_blocks.0.0.weight", "a single file of Stable Diffusion, "),
    "kohya.safetensors": ("lora_unet_mid_block_proj_in.lora_up.weight", "a LoRA, "),
    "diffusion_pytorch_model.safetensors": (
        "conv_in.weight",
        "a file of a diffusers folder (give that), ",
    ),
    "timm.safetensors": ("layer1.0.conv1.weight", "a safetensors file of another program, "),
    "v1-5.ckpt": ("x", "a checkpoint of PyTorch Lightning or TensorFlow by its name, "),
    "pytorch_model.bin": ("x", "weights of a transformers or diffusers folder by its name, "),
}


@pytest.mark.parametrize("name", FILES)
def test_convert_says_what_a_file_of_another_program_is(tmp_path, name):
    key, what = FILES[name]
    save_file({key: torch.zeros(2)}, tmp_path / name)
    with pytest.raises(UsageError) as caught:
        convert.run(tmp_path / name, tmp_path / "out.safetensors")
    assert str(caught.value) == f"{tmp_path / name} is {what}{PUBLISHED}"
    assert not (tmp_path / "out.safetensors").exists()


def test_convert_knows_its_own_files(tmp_path):
    checkpoint.save(tmp_path / "m.safetensors", {"x": torch.zeros(2)}, {"kind": "model"})
    with pytest.raises(UsageError, match="a file that ddo wrote and needs no conversion"):
        convert.run(tmp_path / "m.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "x.bin", "x.safetensors"])
def test_a_foreign_ckpt_is_sent_to_convert(tmp_path, name):
    if name == "x.safetensors":
        save_file({"conv_in.weight": torch.zeros(2)}, tmp_path / name)
    else:
        torch.save({"x": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"`ddo convert`.* of published weights"):
        checkpoint.load(tmp_path / name)


@pytest.mark.parametrize("config", ["model_index.json", "config.json"])
def test_a_folder_of_diffusers_is_sent_to_convert(tmp_path, config):
    (tmp_path / config).write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match="is a folder of diffusers; give the file that `ddo convert` makes of it"):
        checkpoint.resolve(tmp_path)
