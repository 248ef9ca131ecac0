"""Published classifiers (OpenAI's, DG's) and DG discriminators, from their .pt files: bare state dicts of ADM encoders.

The files hold no configuration: it is read off the shapes. Two different classifiers are called 32x32_classifier.pt,
one of images and one of latents; the first convolution's input channels tell them apart.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli import checkpoint
from ddo_cli.diffusion.precond import NUM_STEPS
from ddo_cli.errors import CheckpointError
from ddo_cli.models import pt_files
from ddo_cli.models.adm.published import QUESTIONS, Told, check_told, has_scale_shift
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.discriminators.adm_encoder import PUBLISHED, AdmEncoder

Shapes = Mapping[str, tuple[int, ...]]

_HEAD_CHANNELS = 64  # of all files that the official code makes; shapes do not tell it
_NEEDED = ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.positional_embedding", "out.2.c_proj.weight")
_EXPECTED = "this program reads the published ADM classifiers and DG discriminators"


class Published(NamedTuple):
    """kind: "classifier" or "discriminator", config: as `discriminators.build` takes it, and the tensors it loads.

    assumed: what neither the file nor the caller tells, by keys of `Told`.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    assumed: dict[str, Any]


def read(
    path: str | Path,
    *,
    trunk: str | None = None,
    num_classes: int = 0,
    told: Told = Told(),  # noqa: B008 (immutable)
) -> Published:
    """The network of a published file.

    trunk: for a discriminator, this program's file of the classifier whose features it reads (`read` that one first).
    num_classes: for a conditional discriminator, the classes of the model it guides; the file's 1000 rows do not tell.
    told: head_channels, and of a classifier schedule and steps; the rest is read off the shapes.
    Raises CheckpointError if the file holds anything else, contradicts what is told, or does not fit the trunk.
    """
    tensors = _tensors(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    layout = _layout(shapes, told.head_channels or _HEAD_CHANNELS, path)
    labels = layout.pop("num_labels")
    channels, side, outputs = (layout.pop(key) for key in ("in_channels", "size", "num_outputs"))
    _check_told(told, layout, side, is_classifier=outputs != 1, path=path)
    assumed: dict[str, Any] = {} if told.head_channels else {"head_channels": _HEAD_CHANNELS}
    if outputs != 1:
        if labels:
            raise CheckpointError(f"{path} is a classifier that is told labels; {_EXPECTED}")
        usual = {"schedule": PUBLISHED.get((channels, side), {}).get("time", "linear"), "steps": NUM_STEPS}
        assumed |= {key: value for key, value in usual.items() if getattr(told, key) is None}
        if told.steps not in (None, NUM_STEPS) and told.rescale is None:
            raise CheckpointError(f"{path} does not tell {QUESTIONS['rescale']}; add it behind the file")
        layout["rescaled_steps"] = bool(told.rescale)
        layout |= {"time": told.schedule or usual["schedule"], "steps": told.steps or usual["steps"]}
        config = discriminators.config_of("classifier", "adm-classifier", (channels, side, side), outputs, layout)
        return Published("classifier", config, tensors, assumed)
    if trunk is None:
        raise CheckpointError(
            f"{path} is a discriminator of features with {channels} channels; name with --trunk the classifier "
            f"that makes them, converted before ({_trunks(channels)})"
        )
    header = checkpoint.read_header(trunk, kind="classifier")
    _check_trunk(header["config"], channels, side, path, trunk)
    if labels and not 1 <= num_classes <= labels:
        raise CheckpointError(
            f"{path} is told labels (up to {labels} classes), and the model has {num_classes} classes"
        )
    options = {"trunk": trunk, **layout, **({"label_rows": labels} if labels else {})}
    shape = tuple(header["config"]["shape"])
    config = discriminators.config_of(
        "discriminator", "adm-discriminator", shape, num_classes if labels else 0, options
    )
    return Published("discriminator", config, {f"head.{key}": tensor for key, tensor in tensors.items()}, assumed)


def _check_told(told: Told, layout: dict[str, Any], side: int, *, is_classifier: bool, path: str | Path) -> None:
    """Raises CheckpointError for what is not of such a network, or contradicts its shapes."""
    asked = {"head_channels"} | (
        {"schedule", "steps", "rescale", "size", "updown", "scale_shift"} if is_classifier else set()
    )
    if odd := [key for key, value in told._asdict().items() if value is not None and key not in asked]:
        kind = "classifier" if is_classifier else "discriminator"
        raise CheckpointError(
            f"{path} is a {kind}, of which {', '.join(sorted(asked))} can be told; leave {', '.join(odd)} out"
        )
    updown = layout["updown"] if len(layout["channel_mult"]) > 1 else None
    check_told(told, {"size": side, "updown": updown, "scale_shift": layout["scale_shift"]}, str(path))


def _tensors(path: str | Path) -> dict[str, Tensor]:
    """The content of a .pt file, in float32."""
    content = pt_files.read(path, _EXPECTED, ("input_blocks.0.0.weight",)).tensors
    if any(tensor.dtype != torch.float32 for tensor in content.values()):  # the copies could be larger than memory
        pt_files.check_size(content.values(), path)
    return {key: tensor.float() for key, tensor in content.items()}


def _layout(shapes: Shapes, head_channels: int, path: str | Path) -> dict[str, Any]:
    """Arguments of AdmEncoder, without its time and steps."""
    missing = [key for key in _NEEDED if key not in shapes]
    if missing:
        raise CheckpointError(
            f"{path} is no ADM encoder with an attention-pooling head: it lacks {', '.join(missing)}; {_EXPECTED}"
        )
    blocks = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"input_blocks\.(\d+)\.", key)))
    if blocks > len(shapes):  # looking for layouts of so many could take hours
        raise CheckpointError(f"{path}: its tensors fit no configuration of an ADM encoder; {_EXPECTED}")
    # Each level: `depth` blocks, and the one before them.
    divisors = [levels for levels in range(1, blocks) if blocks % levels == 0]
    candidates = [_candidate(shapes, levels, blocks // levels - 1) for levels in divisors]
    fitting = [each for each in candidates if each is not None and _fits({**each, "num_head_channels": 1}, shapes)]
    if len(fitting) != 1:
        what = "fit no configuration of an ADM encoder" if not fitting else "fit more than one configuration"
        raise CheckpointError(f"{path}: its tensors {what}; {_EXPECTED}")
    layout = {**fitting[0], "num_head_channels": head_channels}
    if not _fits(layout, shapes):
        raise CheckpointError(
            f"{path}: channels of its attention are no multiples of head_channels={head_channels}; tell the "
            "head_channels that it was trained with"
        )
    return layout


def _candidate(shapes: Shapes, levels: int, depth: int) -> dict[str, Any] | None:
    """What the shapes say, but the heads, if there are so many levels; None if they contradict it at once."""
    try:
        width = shapes["time_embed.0.weight"][1]
        side = math.isqrt(shapes["out.2.positional_embedding"][1] - 1)  # of the features
        firsts = [f"input_blocks.{level * (depth + 1) + 1}" for level in range(levels)]
        return {
            "in_channels": shapes["input_blocks.0.0.weight"][1],
            "size": side * 2 ** (levels - 1),
            "num_outputs": shapes["out.2.c_proj.weight"][0],
            "width": width,
            "depth": depth,
            "channel_mult": [shapes[f"{first}.0.in_layers.2.weight"][0] / width for first in firsts],
            "attention": [
                side * 2 ** (levels - 1 - level)
                for level, first in enumerate(firsts)
                if f"{first}.1.qkv.weight" in shapes
            ],
            "updown": not any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", key) for key in shapes),
            "scale_shift": has_scale_shift(shapes),
            "num_labels": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else 0,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError):  # ValueError: the root of a negative number
        return None


def _fits(layout: dict[str, Any], shapes: Shapes) -> bool:
    try:
        with torch.device("meta"):
            expected = AdmEncoder(**layout).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError):
        return False
    return {key: tuple(tensor.shape) for key, tensor in expected.items()} == dict(shapes)


def _check_trunk(config: dict[str, Any], channels: int, side: int, path: str | Path, trunk: str) -> None:
    """Other classifiers than `adm-classifier` are checked when the discriminator is built."""
    if config["name"] != "adm-classifier":
        return
    options = config["options"]
    made = round(options["channel_mult"][-1] * options["width"])
    made_side = config["shape"][1] // 2 ** (len(options["channel_mult"]) - 1)
    if (made, made_side) != (channels, side):
        raise CheckpointError(
            f"{path} reads features of shape {(channels, side, side)}, the classifier {trunk} makes "
            f"{(made, made_side, made_side)}; give another ({_trunks(channels)})"
        )


def _trunks(channels: int) -> str:
    """The published classifiers with this many feature channels, as text."""
    classifiers = [
        f"{side}x{side} of {in_channels} channels"
        for (in_channels, side), settings in PUBLISHED.items()
        if settings["channel_mult"][-1] * 128 == channels  # all have width 128
    ]
    return f"published ones: {', '.join(classifiers)}" if classifiers else "no published one fits"
