"""Files of DiT, SiT and REPA: the names of their tensors, and what tells the three apart.

All three write the same names, and a file of DiT-XL/2 and one of SiT-XL/2 have the same shapes, too. The wrong choice
gives noise and no error, so what a file does not tell is asked for.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import CheckpointError, RecipeError, printable, reason
from ddo_cli.models import pt_files, registry
from ddo_cli.models.dit.transformer import SIZES, DitOptions
from ddo_cli.models.vae_codec import CHANNELS, FACTOR

MARK = "x_embedder.proj.weight"  # a tensor of every file of this kind, see `pt_files.read`
Arch = Literal["dit", "sit", "repa"]
MEANINGS: dict[Arch, str] = {
    "dit": "noise at steps 0 to 999",
    "sit": "velocity at times from 0 = noise to 1 = data",
    "repa": "velocity at times from 0 = data to 1 = noise",
}
NAMES: dict[Arch, str] = {"dit": "DiT", "sit": "SiT", "repa": "REPA's SiT"}
_LABEL_DROPOUT = 0.1  # of all three trainings
_UNIFORM_STEPS = {"p_mean": 1.35, "p_std": 1.94}  # mean and deviation of ln sigma over the linear schedule's steps
_UNIFORM_TIMES = {"p_mean": 0.0, "p_std": 1.0, "distribution": "logistic"}
_DRAWS: dict[Arch, dict[str, Any]] = {"dit": _UNIFORM_STEPS, "sit": _UNIFORM_TIMES, "repa": _UNIFORM_TIMES}
_PRECONDS: dict[Arch, str] = {"dit": "ddpm", "sit": "flow", "repa": "flow-reversed"}
# The figures that their papers are cited for: FID 2.27, 2.06 and 1.42, of 250 steps each.
SAMPLING: dict[Arch, dict[str, Any]] = {
    "dit": {"sampler": "ddpm", "steps": 250, "cfg_scale": 1.5, "cfg_channels": 3},
    "sit": {"sampler": "flow-sde", "steps": 250, "cfg_scale": 1.5, "cfg_channels": 3},
    "repa": {"sampler": "flow-sde", "steps": 250, "cfg_scale": 1.8, "cfg_sigma_max": 0.7 / 0.3},  # up to its t = 0.7
}
_NEEDED = (
    MARK, "pos_embed", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight",
    "final_layer.linear.weight",
)  # fmt: skip
_OURS, _LAST, _VARIANCE = "net.", "final_layer.linear", "final_layer.variance"


class Told(NamedTuple):
    """What a caller tells of a file; None: nothing. The fields are keys of `ddo convert`."""

    arch: Arch | None = None
    heads: int | None = None


class DitFile(NamedTuple):
    """A file as it was read. tensors: of our model, float32; notes: for people."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    arch: Arch
    notes: dict[str, str]


def is_dit(tensors: Mapping[str, Any]) -> bool:
    """Whether the tensors are those of a network of this kind, or of a relative."""
    return MARK in tensors


def options_of(config: dict[str, Any]) -> DitOptions:
    """The options of a configuration, checked."""
    return DitOptions.model_validate(config["options"])


def read(
    stored: Mapping[str, Tensor],
    path: str | Path,
    told: Told = Told(),  # noqa: B008 (immutable)
    settings: Mapping[str, Any] | None = None,
) -> DitFile:
    """The model of a file's tensors, which must be of honest size (`pt_files.check_size`).

    settings: of the trainer that wrote the file, which name the network. Raises CheckpointError for other tensors,
    where something must be told, and where what is told contradicts the file.
    """
    official = _renamed(stored)
    layout = _layout({name: tuple(tensor.shape) for name, tensor in official.items()}, path)
    arch, by = _arch(layout, Path(path), told, settings or {})
    size, heads = _size(layout, path, told)
    options: dict[str, Any] = {
        "precond": _PRECONDS[arch],
        "sigma_data": 1.0,  # which the latents' scale makes it
        "learned_variance": arch == "dit" and layout.has_variance,
        "unused_variance": arch != "dit" and layout.has_variance,
        "width": layout.width,
        "depth": layout.depth,
        "heads": heads,
        "patch": layout.patch,
        "projectors": layout.projectors,
    }
    shape = (3, FACTOR * layout.side, FACTOR * layout.side)
    draw = {**_DRAWS[arch], "label_dropout": _LABEL_DROPOUT}
    try:
        config = registry.config_of("dit", shape, layout.num_classes, options, draw)
        with torch.device("meta"):
            expected = registry.build(config).state_dict()
    except RecipeError as error:
        raise CheckpointError(f"{path}: its tensors fit no DiT or SiT ({reason(error)})") from None
    checked = options_of(config)
    if problems := pt_files.misfits(to_official(expected, checked), official):
        listed = printable("; ".join(problems), 140)
        raise CheckpointError(f"{path}: {len(problems)} tensors differ from a DiT's or SiT's: {listed}")
    tensors = from_official({name: tensor.to(torch.float32) for name, tensor in official.items()}, checked)
    name = f"{NAMES[arch]}-{size}/{layout.patch} at {shape[1]} px" if size else "no published size"
    notes = {
        "arch": f"{arch} ({by}): {MEANINGS[arch]}",
        "published_as": name,
        "assumed": f"the last of {layout.num_classes + 1} label rows means no label"
        + ("" if told.heads else f", heads={heads}"),
    }
    return DitFile(config, tensors, arch, notes)


# --- Names


def from_official(official: Mapping[str, Tensor], options: DitOptions) -> dict[str, Tensor]:
    """Our tensors of a published file's: the last layer's rows of F and of a variance lie apart.

    Rows of the published layer belong to (pixel of the patch, channel), F's channels before the variance's.
    """
    tensors = {_OURS + name: tensor for name, tensor in official.items()}
    if options.learned_variance or options.unused_variance:
        for kind in ("weight", "bias"):
            both = tensors.pop(f"{_OURS}{_LAST}.{kind}").unflatten(0, (options.patch**2, 2, -1))
            for i, layer in enumerate((_LAST, _VARIANCE)):
                tensors[f"{_OURS}{layer}.{kind}"] = both[:, i].flatten(0, 1).contiguous()
    return tensors


def to_official(tensors: Mapping[str, Tensor], options: DitOptions) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    official = {name.removeprefix(_OURS): tensor for name, tensor in tensors.items()}
    if options.learned_variance or options.unused_variance:
        for kind in ("weight", "bias"):
            parts = [official.pop(f"{layer}.{kind}") for layer in (_LAST, _VARIANCE)]
            pixels = [part.unflatten(0, (options.patch**2, -1)) for part in parts]
            official[f"{_LAST}.{kind}"] = torch.stack(pixels, dim=1).flatten(0, 2)
    return official


def _renamed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by today's names: REPA's first files count the blocks after the projected one as decoder_blocks."""
    first = 1 + max((int(m[1]) for name in stored if (m := re.match(r"blocks\.(\d{1,4})\.", name))), default=-1)

    def name_of(name: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d{1,4})\.", lambda m: f"blocks.{first + int(m[1])}.", name)

    return {name_of(name): tensor for name, tensor in stored.items()}


# --- Configuration


class _Layout(NamedTuple):
    width: int
    depth: int
    patch: int
    side: int  # of the state
    num_classes: int
    has_variance: bool
    projectors: tuple[tuple[int, int], ...]


def _layout(shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> _Layout:
    """What the shapes say; all of them are compared with a network's later."""
    if missing := [name for name in _NEEDED if name not in shapes]:
        raise CheckpointError(
            f"{path} is no DiT or SiT: it lacks {', '.join(missing[:3])}; relatives of theirs (LightningDiT, PixArt, "
            "SD3 and others) are other networks, which this program does not have"
        )
    try:
        (width, channels, patch, _), (_, tokens, _) = shapes[MARK], shapes["pos_embed"]
        depth = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,4})\.", name)))
        outputs, grid = shapes["final_layer.linear.weight"][0], math.isqrt(tokens)
        per_pixel = outputs / patch**2
        ends = [number for number in range(len(shapes)) if f"projectors.{number}.4.weight" in shapes]
        if depth > len(shapes):  # and building so many could take hours
            raise ValueError(f"block {depth - 1} in {len(shapes)} tensors")
        if channels != CHANNELS:
            raise ValueError(f"{channels} channels, where the autoencoder's latents have {CHANNELS}")
        if grid**2 != tokens:
            raise ValueError(f"{tokens} positions, which are no square")
        if per_pixel not in (channels, 2 * channels):
            raise ValueError(f"{outputs} rows of its last layer, which are no image")
        return _Layout(
            width=width,
            depth=depth,
            patch=patch,
            side=grid * patch,
            num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
            has_variance=per_pixel == 2 * channels,
            projectors=tuple(
                (shapes[f"projectors.{number}.0.weight"][0], shapes[f"projectors.{number}.4.weight"][0])
                for number in ends
            ),
        )
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its tensors fit no DiT or SiT ({reason(error)})") from None


def _arch(layout: _Layout, path: Path, told: Told, settings: Mapping[str, Any]) -> tuple[Arch, str]:
    """Which of the three a file is, and what says so."""
    if layout.projectors:
        possible: tuple[Arch, ...] = ("repa",)
    else:
        possible = ("dit", "sit") if layout.has_variance else ("sit", "repa", "dit")
    found, by = _trained_as(settings, path), "its trainer's settings"
    if layout.projectors and found is None:
        found, by = "repa", "its projectors"
    for one in (told.arch, found):
        if one is not None and (one not in possible or found not in (one, None)):
            is_fact = found is not None and one is not found
            why = by if is_fact else "its projectors" if layout.projectors else "its last layer"
            raise CheckpointError(
                f"{path}: arch={one} contradicts {why}, which {'are' if why.endswith('s') else 'is'} that of "
                f"arch={found if is_fact else '|'.join(possible)}; leave it out"
            )
    if found is not None:
        return found, by
    if told.arch is not None:
        return told.arch, "as you told"
    name = next((arch for arch in ("dit", "sit", "repa") if arch in path.name.lower()), None)
    hint = f"; its name suggests arch={name}" if name in possible else ""
    choices = ", or ".join(f"arch={arch} ({MEANINGS[arch]})" for arch in possible[:2])
    raise CheckpointError(
        f"{path.name} does not tell what its network estimates: add {choices}; the wrong one gives noise{hint}"
    )


def _trained_as(settings: Mapping[str, Any], path: Path) -> Arch | None:
    """What the settings of a trainer of the three say. Raises CheckpointError for other paths and predictions."""
    model = settings.get("model")
    if type(model) is not str or model[:4] not in ("DiT-", "SiT-"):
        return None
    if model.startswith("DiT-"):
        return "dit"
    for key, known in (("path_type", ("linear",)), ("prediction", ("velocity", "v"))):
        if str(value := settings.get(key, known[0])).lower() not in known:
            raise CheckpointError(
                f"{path}: trained with {key}={printable(str(value), 40)}; this program has the linear path and its "
                "velocity, which the published networks have"
            )
    return "repa" if settings.keys() & {"enc_type", "proj_coeff"} else "sit"


def _size(layout: _Layout, path: str | Path, told: Told) -> tuple[str | None, int]:
    """The letter of a published size, and the number of heads, which no shape tells."""
    size = next((size for size, known in SIZES.items() if known[:2] == (layout.width, layout.depth)), None)
    heads = told.heads or (SIZES[size][2] if size else None)
    if heads is None:
        raise CheckpointError(
            f"{path}: width {layout.width} and {layout.depth} blocks are no published size; add heads=<number>, which "
            "its tensors do not tell (a wrong one gives noise)"
        )
    if layout.width % heads:
        raise CheckpointError(f"{path}: heads={heads} does not divide its width {layout.width}; tell another number")
    return size, heads
