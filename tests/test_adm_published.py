"""ADM's published U-Nets: their names and shapes, and how a file is recognised by them.

Origin of the tables: the state dicts that openai/guided-diffusion at 22e0df8 builds from the published flags.
"""

import pytest
import torch
from test_adm_encoder import table_of
from test_adm_unet import tiny, unet

from ddo_cli.errors import CheckpointError
from ddo_cli.models.adm.published import PUBLISHED, described
from ddo_cli.models.adm.unet import AdmUnet, AdmUnetOptions

# file -> keys, parameters, digest of the official state dict
TABLE = {
    "64x64_diffusion.pt": (541, 295_904_454, "40271b72ad5de28c"),
    "128x128_diffusion.pt": (493, 421_529_606, "acf0fda1a78ff280"),
    "256x256_diffusion.pt": (567, 553_838_086, "d861e8fba1572652"),
    "256x256_diffusion_uncond.pt": (566, 552_814_086, "fe93167087f7317b"),
    "512x512_diffusion.pt": (645, 558_997_638, "1e27698a1c14eeff"),
    "64_256_upsampler.pt": (567, 311_795_910, "49f2f641e45d36d2"),
    "128_512_upsampler.pt": (537, 308_835_270, "24589324a586c004"),
    "lsun_*.pt": (566, 552_814_086, "fe93167087f7317b"),
}
# What these files do not tell, from the published flags: order of the qkv channels, schedule, heads (None: 64 channels)
FLAGS = {
    "64x64_diffusion.pt": ("new", "iddpm", None),
    "128x128_diffusion.pt": ("legacy", "ddpm", 4),
    "256x256_diffusion.pt": ("legacy", "ddpm", None),
    "256x256_diffusion_uncond.pt": ("legacy", "ddpm", None),
    "512x512_diffusion.pt": ("legacy", "ddpm", None),
    "64_256_upsampler.pt": ("legacy", "ddpm", 4),
    "128_512_upsampler.pt": ("legacy", "ddpm", None),
    "lsun_*.pt": ("legacy", "ddpm", None),
}


def published(name: str) -> AdmUnet:
    """A published .pt file's network, without weights."""
    entry = PUBLISHED[name]
    with torch.device("meta"):
        return unet(
            entry.options,
            in_channels=entry.in_channels,
            out_channels=6,
            size=entry.size,
            num_classes=entry.num_classes,
        )


@pytest.mark.parametrize("name", TABLE)
def test_published_networks_have_the_published_names_and_are_recognised(name):
    net, entry = published(name), PUBLISHED[name]
    assert table_of(net) == TABLE[name]
    found = described({key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}, name)
    if name == "lsun_*.pt":
        assert found.name == "256x256_diffusion_uncond.pt"  # of the same kind
    else:
        assert found.name == name
    assert found[1:6] == (entry.in_channels, 3, entry.size, entry.num_classes, entry.order)
    assert found.options == entry.options
    assert (found.order, found.options["precond"], found.options.get("num_heads")) == FLAGS[name]


def shapes_of(net):
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


def test_what_shapes_do_not_tell_must_be_told():
    with torch.device("meta"):
        shapes = shapes_of(tiny(num_classes=0, num_blocks=2))
    with pytest.raises(
        CheckpointError, match=r"f\.pt .*side of its images, the order .*legacy or new.*, its noise sch"
    ):
        described(shapes, "f.pt")
    with pytest.raises(CheckpointError, match="do not tell its noise schedule"):
        described(shapes, "f.pt", size=16, order="new")
    found = described(shapes, "f.pt", size=16, order="new", precond="iddpm", num_heads=4)
    assert found[:6] == (None, 3, 3, 16, 0, "new")
    options = AdmUnetOptions.model_validate(found.options)
    assert (options.width, options.channel_mult, options.num_blocks, options.attention) == (32, (1, 2), 2, (8,))
    assert (options.num_heads, options.precond, options.learned_variance) == (4, "iddpm", True)
    with pytest.raises(CheckpointError, match="halves its images 1 times"):
        described(shapes, "f.pt", size=15, order="new", precond="iddpm")
    with pytest.raises(CheckpointError, match="multiples of num_heads"):
        described(shapes, "f.pt", size=16, order="new", precond="iddpm", num_heads=3)


def test_what_is_told_goes_before_what_is_published():
    shapes = shapes_of(published("64x64_diffusion.pt"))
    found = described(shapes, "f.pt", order="legacy", precond="ddpm")
    assert (found.order, found.options["precond"], found.size) == ("legacy", "ddpm", 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_blocks.1.0.in_layers.2.bias": None},
            r"1 tensors do not fit .*: input_blocks\.1\.0\.in_layers\.2\.bias",
        ),
        ({"input_blocks.99999999.0.weight": (3,)}, "fit no ADM U-Net"),
        ({"extra.weight": (3,)}, r"do not fit .*: extra\.weight"),
        ({"out.0.bias": (31,)}, r"do not fit .*: out\.0\.bias"),
        ({"time_embed.0.weight": None}, r"is no ADM U-Net: it lacks time_embed\.0\.weight"),
        ({"time_embed.0.weight": (4,)}, "fit no ADM U-Net"),
        ({"time_embed.0.weight": (128, 0)}, "fit no ADM U-Net"),
        ({"input_blocks.3.0.in_layers.2.weight": None}, "fit no ADM U-Net"),
        ({"out.2.weight": (5, 32, 3, 3)}, "do not fit"),
        ({"output_blocks.1.2.in_layers.0.weight": None}, "fit"),
    ],
)
def test_files_that_are_no_unet_are_refused(change, message):
    with torch.device("meta"):
        shapes = {**shapes_of(tiny()), **change}
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    with pytest.raises(CheckpointError, match=rf"f\.pt.*{message}"):
        described(shapes, "f.pt", size=16, order="legacy", precond="ddpm", num_heads=2)
