"""Networks of other programs: what a weight file holds that this program does not read, by names of tensors in it."""

import zipfile
from pathlib import Path

HEAD = 4 << 20  # bytes that are searched: names stand at the start of every format
_NONE = "which draws no images"
# Names of tensors, or parts of them, that are all in a file of this kind; the first that fits.
_NETWORKS = (
    (("lora_",), "a LoRA"),
    (("model.diffusion_model.",), "a single file of Stable Diffusion"),
    (("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",), "the network of Stable Diffusion"),
    (("time_embedding.linear_1.weight",), "a network of diffusers (give its folder)"),
    (("map_layer0.weight",), "EDM's tensors without their configuration (give its network-snapshot-*.pkl)"),
    (("emb_fourier.freqs",), "EDM2's tensors without their configuration (give its network-snapshot-*.pkl)"),
    (("Conv2d_1a_3x3.conv.weight",), "an Inception network, which scores images (`ddo fid --weights`) and draws none"),
    (("visual.transformer.resblocks.0.",), f"a CLIP, {_NONE}"),
    (("vision_model.encoder.layers.0.",), f"a CLIP, {_NONE}"),
    (("cls_token", "mask_token", "patch_embed.proj.weight"), f"a DINOv2, {_NONE}"),
    (("cls_token", "patch_embed.proj.weight"), f"a vision transformer as of timm, {_NONE}"),
    (("class_token", "conv_proj.weight"), f"a vision transformer of torchvision, {_NONE}"),
    (("layer1.0.conv1.weight",), f"a ResNet of timm or torchvision, {_NONE}"),
    (("relative_position_bias_table",), f"a Swin transformer of timm or torchvision, {_NONE}"),
    (("conv_stem.weight",), f"an EfficientNet or MobileNet of timm, {_NONE}"),
    (("stages.0.blocks.0.",), f"a ConvNeXt or RegNet of timm, {_NONE}"),
    (("features.0.0.weight",), f"a ConvNeXt, EfficientNet or MobileNet of torchvision, {_NONE}"),
    (("features.0.weight", "classifier."), f"a VGG or AlexNet of torchvision, {_NONE}"),
    (('"conv_in.',), "a file of a diffusers folder (give that)"),
)  # fmt: skip


def network_of(file: Path) -> str | None:
    """What network a safetensors file, or one of `torch.save`, holds; None if that cannot be told. Runs no code."""
    try:
        head = _head(file)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None  # its reader says what is wrong
    return next((what for marks, what in _NETWORKS if all(mark.encode() in head for mark in marks)), None)


def _head(file: Path) -> bytes:
    with open(file, "rb") as stream:
        start = stream.read(HEAD)
    if not start.startswith(b"PK\3\4"):
        return start
    with zipfile.ZipFile(file) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if name is None:
            return b""
        with archive.open(name) as pickled:
            return pickled.read(HEAD)
