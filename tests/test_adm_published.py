"""ADM's published U-Nets: their names and shapes, and how a file is recognised by them.

Origin of the tables: the state dicts that openai/guided-diffusion at 22e0df8 builds from the published flags.
"""

import pytest
import torch
from test_adm_encoder import table_of
from test_adm_unet import tiny, unet

from ddo_cli.errors import CheckpointError
from ddo_cli.models.adm.published import PUBLISHED, UNASKED, Told, described
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
    "64x64_diffusion.pt": ("new", "cosine", None),
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


ALL = Told(size=16, qkv="new", schedule="cosine", heads=4)


def test_what_shapes_do_not_tell_must_be_told():
    with torch.device("meta"):
        shapes = shapes_of(tiny(num_classes=0, num_blocks=2))
    with pytest.raises(
        CheckpointError, match=r"f\.pt is none of the published ADM U-Nets: its tensors do not tell"
    ) as error:
        described(shapes, "f.pt")
    for key in ("size=", "qkv=legacy|new", "schedule=linear|cosine", "heads=<number> or head_channels=<width>"):
        assert key in str(error.value)
    assert len(str(error.value)) < 290
    with pytest.raises(CheckpointError, match=r"do not tell schedule=linear\|cosine; add"):
        described(shapes, "f.pt", ALL._replace(schedule=None))
    with pytest.raises(CheckpointError, match=r"do not tell heads=<number> or head_channels=<width>; add"):
        described(shapes, "f.pt", ALL._replace(heads=None))
    found = described(shapes, "f.pt", ALL)
    assert found[:6] == (None, 3, 3, 16, 0, "new")
    assert found.assumed == {"steps": 1000, **UNASKED}
    options = AdmUnetOptions.model_validate(found.options)
    assert (options.width, options.channel_mult, options.num_blocks, options.attention) == (32, (1, 2), 2, (8,))
    assert (options.num_heads, options.precond, options.learned_variance) == (4, "cosine", True)
    by_width = described(shapes, "f.pt", ALL._replace(heads=None, head_channels=16))
    assert AdmUnetOptions.model_validate(by_width.options).num_head_channels == 16
    for told, message in (
        ({"size": 15}, "halves its images 1 times"),
        ({"heads": 3}, "heads=3 does not divide the 64 channels"),
        ({"heads": None, "head_channels": 48}, "head_channels=48 does not divide the 64 channels"),
        ({"head_channels": 16}, "heads=4 and head_channels=16: tell one"),
        ({"steps": 4000}, r"do not tell rescale=true\|false"),
        ({"steps": 400, "rescale": False}, None),
        ({"updown": False}, "updown=false contradicts its tensors, which have updown=true"),
        ({"scale_shift": False}, "scale_shift=false contradicts its tensors"),
        ({"updown": True, "scale_shift": True}, None),
    ):
        if message is None:
            described(shapes, "f.pt", ALL._replace(**told))
        else:
            with pytest.raises(CheckpointError, match=message):
                described(shapes, "f.pt", ALL._replace(**told))


@pytest.mark.parametrize("attention", [(), (8,), (16, 8)])
@pytest.mark.parametrize(("updown", "scale_shift"), [(False, True), (True, False), (False, False)])
def test_other_kinds_of_blocks_are_read_off(attention, updown, scale_shift):
    kinds = {"updown": updown, "scale_shift": scale_shift}
    with torch.device("meta"):
        shapes = shapes_of(tiny(attention=attention, channel_mult=(1, 2, 2), num_blocks=2, **kinds))
    found = AdmUnetOptions.model_validate(described(shapes, "f.pt", ALL).options)
    assert (found.updown, found.scale_shift, found.attention, found.num_blocks) == (updown, scale_shift, attention, 2)
    for key, value in kinds.items():
        with pytest.raises(CheckpointError, match=f"{key}={str(not value).lower()} contradicts its tensors"):
            described(shapes, "f.pt", ALL._replace(**{key: not value}))


def test_what_is_told_goes_before_what_is_published():
    shapes = shapes_of(published("64x64_diffusion.pt"))
    found = described(shapes, "f.pt", Told(qkv="legacy", schedule="linear"))
    assert (found.order, found.options["precond"], found.size) == ("legacy", "ddpm", 64)
    assert found.assumed == {"size": 64, "head_channels": 64, "steps": 1000, **UNASKED}
    found = described(shapes, "f.pt", Told(heads=4, steps=4000, rescale=True))
    assert found.assumed == {"size": 64, "qkv": "new", "schedule": "cosine", **UNASKED}
    options = AdmUnetOptions.model_validate(found.options)
    assert (options.num_heads, options.num_steps, options.rescaled_steps) == (4, 4000, True)


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
        described(shapes, "f.pt", ALL)
