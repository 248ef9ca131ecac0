"""ADM's published U-Nets: what their files do not say, and how a file of bare tensors is recognised by its shapes."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from ddo_cli.errors import CheckpointError, printable
from ddo_cli.models.adm.keys import Order
from ddo_cli.models.adm.unet import AdmUnet, AdmUnetOptions

Shapes = Mapping[str, tuple[int, ...]]
Schedule = Literal["iddpm", "ddpm"]  # of discrete steps: cosine, linear

_NEEDED = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight")


class Published(NamedTuple):
    """A released network. in_channels: more than the image's 3 where a condition is given beside the state.

    order: of the file's qkv channels. options: of `adm-unet`; dropout (0.1 for 64x64 and LSUN) stays off, since model
    and reference share their draw.
    """

    size: int
    num_classes: int
    order: Order
    options: dict[str, Any]
    in_channels: int = 3


def _openai(precond: Schedule, width: int, channel_mult: tuple[float, ...], **more: Any) -> dict[str, Any]:
    settings = {"precond": precond, "learned_variance": True, "width": width, "channel_mult": channel_mult}
    return {**settings, "num_blocks": 2, "attention": (32, 16, 8), **more}


_MULT_256 = (1, 1, 2, 2, 4, 4)
_IMAGENET64 = {"width": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attention": (32, 16, 8)}
# By file name; .pt: openai/guided-diffusion, model card; .pkl: EDM. lsun_bedroom, lsun_cat and lsun_horse are of the
# same kind as 256x256_diffusion_uncond, from which shapes cannot tell them.
PUBLISHED: dict[str, Published] = {
    "64x64_diffusion.pt": Published(64, 1000, "new", _openai("iddpm", 192, (1, 2, 3, 4), num_blocks=3)),
    "128x128_diffusion.pt": Published(128, 1000, "legacy", _openai("ddpm", 256, (1, 1, 2, 3, 4), num_heads=4)),
    "256x256_diffusion.pt": Published(256, 1000, "legacy", _openai("ddpm", 256, _MULT_256)),
    "256x256_diffusion_uncond.pt": Published(256, 0, "legacy", _openai("ddpm", 256, _MULT_256)),
    "512x512_diffusion.pt": Published(512, 1000, "legacy", _openai("ddpm", 256, (0.5, 1, 1, 2, 2, 4, 4))),
    "64_256_upsampler.pt": Published(256, 1000, "legacy", _openai("ddpm", 192, _MULT_256, num_heads=4), in_channels=6),
    "128_512_upsampler.pt": Published(
        512, 1000, "legacy", _openai("ddpm", 192, _MULT_256, attention=(32, 16)), in_channels=6
    ),
    "lsun_*.pt": Published(256, 0, "legacy", _openai("ddpm", 256, _MULT_256)),
    "edm-imagenet-64x64-cond-adm.pkl": Published(64, 1000, "interleaved", {**_IMAGENET64, "precond": "edm"}),
    "baseline-imagenet-64x64-cond-adm.pkl": Published(
        64, 1000, "interleaved", {**_IMAGENET64, "precond": "iddpm", "learned_variance": True}
    ),
}


class Described(NamedTuple):
    """What a .pt file of a U-Net holds. name: of the published one it is, or None; options: of `adm-unet`.

    A network with more input channels than image channels (`in_channels > channels`) is an upsampler, which is given a
    condition beside its state; `registry` builds no such model, `AdmUnet(in_channels=...)` does.
    """

    name: str | None
    in_channels: int
    channels: int
    size: int
    num_classes: int
    order: Order
    options: dict[str, Any]


def described(
    shapes: Shapes,
    where: str,
    *,
    size: int | None = None,
    order: Order | None = None,
    precond: Schedule | None = None,
    num_heads: int | None = None,
) -> Described:
    """The network of a .pt file in OpenAI's names, from the shapes of its tensors (without a prefix).

    Width, levels, blocks, attention, classes and the learned variance are read off; side, qkv order, schedule and heads
    are those of the published network of these shapes. What the caller tells replaces that, and must be told where no
    published one has these shapes: size, order and precond (num_heads: None = 64 channels per head).
    where: the file, for messages. Raises CheckpointError if this is no such U-Net, or something must be told.
    """
    layout = _layout(shapes, where)
    name = next((name for name, entry in PUBLISHED.items() if _matches(layout, entry)), None)
    if name is not None:
        entry = PUBLISHED[name]
        size, order = size or entry.size, order or entry.order
        precond, num_heads = precond or entry.options["precond"], num_heads or entry.options.get("num_heads")
    missing = {
        "the side of its images": size,
        "the order of its qkv channels (legacy or new)": order,
        "its noise schedule (iddpm, cosine, or ddpm, linear)": precond,
    }
    untold = [what for what, value in missing.items() if value is None]
    if size is None or order is None or precond is None:
        raise CheckpointError(
            f"{where} has the shapes of no published ADM U-Net, and they do not tell {', '.join(untold)}: tell them, "
            "and the number of heads unless heads have 64 channels; a wrong order or schedule goes unnoticed and gives "
            "noise"
        )
    if size % 2 ** (len(layout.channel_mult) - 1):
        raise CheckpointError(
            f"{where} halves its images {len(layout.channel_mult) - 1} times: {size} cannot be their side"
        )
    options = {
        "precond": precond,
        "learned_variance": layout.learned_variance,
        "width": layout.width,
        "channel_mult": layout.channel_mult,
        "num_blocks": layout.num_blocks,
        "attention": tuple(size >> level for level in layout.attending),
        **({"num_heads": num_heads} if num_heads else {}),
    }
    network = Described(name, layout.in_channels, layout.channels, size, layout.num_classes, order, options)
    _check(network, layout, shapes, where)
    return network


class _Layout(NamedTuple):
    in_channels: int
    channels: int  # of the image
    learned_variance: bool
    num_classes: int
    width: int
    channel_mult: tuple[float, ...]
    num_blocks: int
    attending: tuple[int, ...]  # levels, finest first


def _layout(shapes: Shapes, where: str) -> _Layout:
    """What the shapes say. The doublings, one per level but the finest, are the second residual blocks of a block."""
    missing = [key for key in _NEEDED if key not in shapes]
    if missing:
        raise CheckpointError(f"{where} is no ADM U-Net: it lacks {', '.join(missing)}")
    try:
        inputs = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"input_blocks\.(\d+)\.", key)))
        doublings = [key for key in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", key)]
        if inputs > len(shapes):
            raise KeyError(f"input_blocks.{inputs - 2}")  # and building so many blocks could take hours
        levels = 1 + len(doublings)
        num_blocks = inputs // levels - 1
        firsts = [f"input_blocks.{level * (num_blocks + 1) + 1}" for level in range(levels)]
        width, in_channels = shapes["time_embed.0.weight"][1], shapes["input_blocks.0.0.weight"][1]
        outputs = shapes["out.2.weight"][0]
        mults = [shapes[f"{first}.0.in_layers.2.weight"][0] / width for first in firsts]
        # Twice an image's channels come out with a variance. The upsampler takes two images and gives one and that.
        learned_variance = outputs == 2 * in_channels or (in_channels, outputs) == (6, 6)
        return _Layout(
            in_channels=in_channels,
            channels=outputs // 2 if learned_variance else outputs,
            learned_variance=learned_variance,
            num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else 0,
            width=width,
            channel_mult=tuple(int(mult) if mult == int(mult) else mult for mult in mults),
            num_blocks=num_blocks,
            attending=tuple(level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in shapes),
        )
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: its tensors fit no ADM U-Net ({type(error).__name__}: {error})") from None


def _matches(layout: _Layout, entry: Published) -> bool:
    """Whether a published .pt file has this layout."""
    options = entry.options
    levels = range(len(options["channel_mult"]))
    return entry.order != "interleaved" and layout == _Layout(
        in_channels=entry.in_channels,
        channels=3,
        learned_variance=True,
        num_classes=entry.num_classes,
        width=options["width"],
        channel_mult=options["channel_mult"],
        num_blocks=options["num_blocks"],
        attending=tuple(level for level in levels if entry.size >> level in options["attention"]),
    )


def _check(network: Described, layout: _Layout, shapes: Shapes, where: str) -> None:
    """Raises CheckpointError unless the network has exactly these tensors."""
    options = AdmUnetOptions.model_construct(**network.options)  # unchecked, so that the network's own checks speak
    outputs = network.channels * (2 if layout.learned_variance else 1)
    try:
        with torch.device("meta"):
            net = AdmUnet(network.in_channels, outputs, network.size, network.num_classes, options)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: its tensors fit no ADM U-Net ({error})") from None
    expected = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    odd = sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key))
    if odd:
        listed = printable(", ".join(odd[:5]), 160)
        raise CheckpointError(
            f"{where}: {len(odd)} tensors do not fit the ADM U-Net that the others describe: {listed}"
        )
