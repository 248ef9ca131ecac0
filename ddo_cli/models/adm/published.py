"""ADM's published U-Nets: what their files do not say, and how a file of bare tensors is recognised by its shapes."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from ddo_cli.diffusion.precond import NUM_STEPS
from ddo_cli.errors import CheckpointError, printable, reason
from ddo_cli.models.adm.keys import Order
from ddo_cli.models.adm.unet import AdmUnet, AdmUnetOptions

Shapes = Mapping[str, tuple[int, ...]]
Schedule = Literal["cosine", "ddpm"]  # of discrete steps; ddpm: the linear one

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
    "64x64_diffusion.pt": Published(64, 1000, "new", _openai("cosine", 192, (1, 2, 3, 4), num_blocks=3)),
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

    assumed: what neither the file nor the caller tells, as KEY=VALUE.
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
    assumed: dict[str, Any]


class Told(NamedTuple):
    """What a caller tells of a file; None: nothing. The fields are keys of `ddo convert`."""

    size: int | None = None  # side of the images
    qkv: Order | None = None
    schedule: Literal["linear", "cosine"] | None = None
    steps: int | None = None  # of the schedule
    rescale: bool | None = None  # whether a step's number is told as one of 1000 (rescale_timesteps)
    heads: int | None = None
    head_channels: int | None = None
    updown: bool | None = None  # resblock_updown
    scale_shift: bool | None = None  # use_scale_shift_norm


UNASKED = {"predict_xstart": False, "num_heads_upsample": -1}  # of that code, at its defaults; there is no key for them


def described(shapes: Shapes, where: str, told: Told = Told()) -> Described:  # noqa: B008 (immutable)
    """The network of a .pt file in OpenAI's names, from the shapes of its tensors (without a prefix).

    Width, levels, blocks, attention, kinds of blocks, classes and the learned variance are read off; side, qkv order,
    schedule and heads are those of the published network of these shapes. What the caller tells replaces that, and must
    be told where no published one has these shapes. 1000 steps are assumed.
    where: the file, for messages. Raises CheckpointError if this is no such U-Net, something must be told, or what is
    told contradicts the shapes.
    """
    layout = _layout(shapes, where)
    check_told(told, {"updown": layout.updown, "scale_shift": layout.scale_shift}, where)
    name = next((name for name, entry in PUBLISHED.items() if _matches(layout, entry)), None)
    if told.heads and told.head_channels:
        raise CheckpointError(f"{where}: heads={told.heads} and head_channels={told.head_channels}: tell one of them")
    given = {key: value for key, value in told._asdict().items() if value is not None}
    replaced = given.keys() | ({"heads", "head_channels"} if told.heads or told.head_channels else set())
    assumed = {key: value for key, value in ({"steps": NUM_STEPS} | _known(name)).items() if key not in replaced}
    facts = assumed | given
    if facts["steps"] == NUM_STEPS:
        facts["rescale"] = False  # no difference
    if untold := [text for key, text in QUESTIONS.items() if not facts.keys() & set(key.split("|"))]:
        raise CheckpointError(
            f"{where}{' is none of the published ADM U-Nets' if name is None else ''}: its tensors do not tell "
            f"{', '.join(untold)}; add them behind it (a wrong one goes unnoticed and gives noise)"
        )
    size, order = facts["size"], facts["qkv"]
    if size % 2 ** (len(layout.channel_mult) - 1):
        raise CheckpointError(
            f"{where} halves its images {len(layout.channel_mult) - 1} times: size={size} cannot be their side"
        )
    options = {
        "precond": {"linear": "ddpm", "cosine": "cosine"}[facts["schedule"]],
        "learned_variance": layout.learned_variance,
        "width": layout.width,
        "channel_mult": layout.channel_mult,
        "num_blocks": layout.num_blocks,
        "attention": tuple(size >> level for level in layout.attending),
        **({"num_heads": facts["heads"]} if "heads" in facts else {}),
        **({"num_head_channels": facts["head_channels"]} if facts.get("head_channels", 64) != 64 else {}),
        **({"updown": False} if layout.updown is False else {}),
        **({"scale_shift": False} if not layout.scale_shift else {}),
        **({"num_steps": facts["steps"]} if facts["steps"] != NUM_STEPS else {}),
        **({"rescaled_steps": True} if facts["rescale"] else {}),
    }
    network = Described(
        name, layout.in_channels, layout.channels, size, layout.num_classes, order, options, assumed | UNASKED
    )
    _check(network, layout, shapes, where)
    return network


QUESTIONS = {  # key of `Told`, or one of two: what to tell
    "size": "size=<side>",
    "qkv": "qkv=legacy|new",
    "schedule": "schedule=linear|cosine",
    "heads|head_channels": "heads=<number> or head_channels=<width>",
    "rescale": "rescale=true|false (whether steps are told as of 1000)",
}


def _known(name: str | None) -> dict[str, Any]:
    """What a published network's file does not tell, by keys of `Told`."""
    if name is None:
        return {}
    entry = PUBLISHED[name]
    heads = entry.options.get("num_heads")
    return {
        "size": entry.size,
        "qkv": entry.order,
        "schedule": {"ddpm": "linear", "cosine": "cosine"}[entry.options["precond"]],
        **({"heads": heads} if heads else {"head_channels": AdmUnetOptions.model_fields["num_head_channels"].default}),
    }


def check_told(told: Told, found: dict[str, Any], where: str) -> None:
    """Raises CheckpointError where something told is not what a file's shapes say. found: None where they do not."""
    for key, value in found.items():
        if value is not None and getattr(told, key) not in (None, value):
            raise CheckpointError(
                f"{where}: {key}={str(getattr(told, key)).lower()} contradicts its tensors, which have "
                f"{key}={str(value).lower()}; leave it out"
            )


class _Layout(NamedTuple):
    in_channels: int
    channels: int  # of the image
    learned_variance: bool
    num_classes: int
    width: int
    channel_mult: tuple[float, ...]
    num_blocks: int
    attending: tuple[int, ...]  # levels, finest first
    updown: bool | None  # None: one level, which nothing leaves
    scale_shift: bool


def _layout(shapes: Shapes, where: str) -> _Layout:
    """What the shapes say. The doublings, one per level but the finest, are the last layers of a block."""
    missing = [key for key in _NEEDED if key not in shapes]
    if missing:
        raise CheckpointError(f"{where} is no ADM U-Net: it lacks {', '.join(missing)}")
    try:
        inputs = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"input_blocks\.(\d+)\.", key)))
        kinds = r"output_blocks\.\d+\.[12]\.(in_layers\.0|conv)\.weight"
        doublings = [match[1] for key in shapes if (match := re.fullmatch(kinds, key))]
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
            updown="conv" not in doublings if doublings else None,
            scale_shift=has_scale_shift(shapes),
        )
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: its tensors fit no ADM U-Net ({reason(error)})") from None


def has_scale_shift(shapes: Shapes) -> bool:
    """Whether the first residual block's embedding has two numbers for each channel, or one."""
    block = "input_blocks.1.0"
    return shapes[f"{block}.emb_layers.1.weight"][0] != shapes[f"{block}.in_layers.2.weight"][0]


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
        updown=True,
        scale_shift=True,
    )


def _check(network: Described, layout: _Layout, shapes: Shapes, where: str) -> None:
    """Raises CheckpointError unless the network has exactly these tensors."""
    options = AdmUnetOptions.model_construct(**network.options)  # unchecked, so that the network's own checks speak
    channels = sorted({round(layout.width * layout.channel_mult[level]) for level in (*layout.attending, -1)})
    key, divisor = ("heads", options.num_heads) if options.num_heads else ("head_channels", options.num_head_channels)
    if any(each % divisor for each in channels):  # that code refuses them
        raise CheckpointError(
            f"{where}: {key}={divisor} does not divide the {' or '.join(map(str, channels))} channels that attend; "
            "tell the heads or head_channels that it was trained with"
        )
    outputs = network.channels * (2 if layout.learned_variance else 1)
    try:
        with torch.device("meta"):
            net = AdmUnet(network.in_channels, outputs, network.size, network.num_classes, options)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: its tensors fit no ADM U-Net ({reason(error)})") from None
    expected = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    odd = sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key))
    if odd:
        listed = printable(", ".join(odd[:5]), 160)
        raise CheckpointError(
            f"{where}: {len(odd)} tensors do not fit the ADM U-Net that the others describe: {listed}"
        )
