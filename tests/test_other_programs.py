"""Weight files of other programs: what they are, and what to give, in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ddo_cli import checkpoint
from ddo_cli.engines.weights import convert
from ddo_cli.errors import CheckpointError, UsageError

PUBLISHED = "no file of published weights; give a .pkl, .pt or .pth file, or a folder of diffusers"
RESNET = "a ResNet of timm or torchvision, which draws no images"
FILES = {
    "sd.safetensors": ("model.diffusion_model.input_blocks.0.0.weight", "a single file of Stable Diffusion, "),
    "kohya.safetensors": ("lora_unet_mid_block_proj_in.lora_up.weight", "a LoRA, "),
    "diffusion_pytorch_model.safetensors": (
        "conv_in.weight",
        "a file of a diffusers folder (give that), ",
    ),
    "timm.safetensors": ("layer1.0.conv1.weight", f"{RESNET}, "),
    "x.safetensors": ("x", "a safetensors file of another program, "),
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


NETWORKS = {  # some tensors of each
    RESNET: ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"],
    "a vision transformer as of timm, which draws no images": ["cls_token", "pos_embed", "patch_embed.proj.weight"],
    "a DINOv2, which draws no images": ["cls_token", "mask_token", "patch_embed.proj.weight"],
    "a vision transformer of torchvision, which draws no images": ["class_token", "conv_proj.weight"],
    "a VGG or AlexNet of torchvision, which draws no images": ["features.0.weight", "classifier.1.weight"],
    "an Inception network, which scores images (`ddo fid --weights`) and draws none": ["Conv2d_1a_3x3.conv.weight"],
}


@pytest.mark.parametrize("what", NETWORKS)
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "trained"])
def test_networks_that_draw_nothing(tmp_path, ddo, what, form):
    tensors = {name: torch.zeros(2, 3, 4, 4) for name in NETWORKS[what]}
    file = tmp_path / f"net.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(tensors, file, metadata={"format": "pt"})
    elif form == "trained":
        optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        torch.save({"epoch": 3, "arch": "resnet50", "state_dict": tensors, "optimizer": optimizer}, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form == "zip")
    said = [
        ddo("convert", file.name, "--out", "out.safetensors", code=2).stderr,
        ddo("sample", "--ckpt", file.name, "--seeds", "0", "--out", "set", code=2).stderr,
    ]
    for text in said:
        line = " ".join(text.split())
        assert f"error: {file.name} {'is' if '.safetensors is' in line else 'holds'} {what}" in line
        assert len(line) <= 300
    assert "no file of published weights" in said[0] or "this program reads the published" in said[0]
    assert "give a file that ddo wrote, such as by `ddo convert` of published weights" in " ".join(said[1].split())


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
