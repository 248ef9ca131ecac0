"""DDPM++ in files of score_sde's program and of Soft Truncation's, which grew out of it: flat names, nameless averages.

A training checkpoint holds `model`, tensors by names `all_modules.N.*` in the order in which the network was made, and
`ema`, whose `shadow_params` are the averaged parameters as a list in that order. The network is that of `edm-unet`
under other names: q, k and v lie apart, and their matrices are transposed.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import CheckpointError, RecipeError, printable, reason
from ddo_cli.models import pt_files, registry
from ddo_cli.models.edm.unet import Block, EdmUnet, EdmUnetOptions, ResampledConv

MARK = "all_modules.0.weight"  # a tensor of every file of this kind
ATTENDING_SIDE = 16  # of every published configuration; the level that attends tells the images' side by it
# Soft Truncation, FID of CelebA (arXiv 2106.05527): 1000 steps and a last one without noise.
SAMPLING = {"sampler": "euler-maruyama", "steps": 1000}
_SIGMAS = "sigmas"  # a buffer that this network does not read
_BLOCK = {
    "norm0": "GroupNorm_0", "conv0": "Conv_0", "affine": "Dense_0", "norm1": "GroupNorm_1", "conv1": "Conv_1",
    "skip": "Conv_2",
}  # fmt: skip


class Told(NamedTuple):
    """What a caller tells of a file; None: nothing. The fields are keys of `ddo convert`."""

    size: int | None = None  # side of the images
    unbounded: bool | None = None  # unbounded_parametrization of its training: how the network is told the time


class ScoreSdeFile(NamedTuple):
    """A file as it was read. tensors: of our model, float32, averaged where the file has averages."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: dict[str, str]


def is_score_sde(tensors: Mapping[str, Any]) -> bool:
    """Whether the tensors are those of a network of this kind, or of a relative."""
    return MARK in tensors


def read(weights: pt_files.Weights, path: str | Path, told: Told = Told()) -> ScoreSdeFile:  # noqa: B008 (immutable)
    """The model of a file. Raises CheckpointError for other networks, and for averages that do not fit."""
    stored = {name: tensor for name, tensor in weights.tensors.items() if name != _SIGMAS}
    config, assumed = _config({name: tuple(tensor.shape) for name, tensor in stored.items()}, path, told)
    options = EdmUnetOptions.model_validate(config["options"])
    channels, side, _ = config["shape"]
    with torch.device("meta"):
        net = EdmUnet(channels, channels, side, 0, options)
    expected = to_official(net, {name: tensor for name, tensor in net.state_dict().items()})
    if problems := pt_files.misfits(expected, stored):
        listed = printable("; ".join(problems), 140)
        raise CheckpointError(f"{path}: {len(problems)} tensors differ from those of DDPM++: {listed}")
    notes = {"assumed": ", ".join(assumed)} if assumed else {}
    if weights.averages is not None:
        pt_files.check_size(weights.averages, path)
        shapes = [tuple(tensor.shape) for tensor in weights.averages]
        if shapes != [tuple(tensor.shape) for tensor in expected.values()]:
            raise CheckpointError(
                f"{path}: its {len(shapes)} averaged tensors (ema) are not those of its {len(expected)} parameters in "
                "their order; save the averages by name"
            )
        stored, notes["weights"] = dict(zip(expected, weights.averages, strict=True)), "ema.shadow_params, by order"
    tensors = from_official(net, {name: tensor.to(torch.float32) for name, tensor in stored.items()})
    taps = ResampledConv(1, 1, 1, "down", options.resample_filter).resample_filter  # fixed, and not in such a file
    tensors |= {f"net.{name}": taps.clone() for name, _ in net.named_buffers()}
    return ScoreSdeFile(config, tensors, notes)


# --- Names


def _layers(net: EdmUnet) -> Iterator[tuple[str, str]]:
    """Our name of each layer and the published one without its tensor, in the published order."""
    flat = [("emb0", ""), ("emb1", "")]
    for half in ("encoder", "decoder"):
        for side, parts in getattr(net, half).items():
            for part, module in parts.items():
                place = f"{half}.{side}.{part}"
                flat.append((place, "block" if isinstance(module, Block) else ""))
                if isinstance(module, Block) and module.attention is not None:
                    flat.append((f"{place}.attention", "attention"))
    flat += [("head_norm", ""), ("head", "")]
    for number, (place, kind) in enumerate(flat):
        theirs = f"all_modules.{number}"
        if kind == "block":
            module = net.get_submodule(place)
            for ours, name in _BLOCK.items():
                if getattr(module, ours) is not None:
                    yield f"{place}.{ours}", f"{theirs}.{name}"
        elif kind == "attention":
            yield f"{place}.norm", f"{theirs}.GroupNorm_0"
            yield f"{place}.qkv", f"{theirs}.NIN_0 {theirs}.NIN_1 {theirs}.NIN_2"
            yield f"{place}.proj", f"{theirs}.NIN_3"
        else:
            yield place, theirs


def to_official(net: EdmUnet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors of ours (without "net."), in the published order. Buffers are left out."""
    official: dict[str, Tensor] = {}
    for ours, theirs in _layers(net):
        weight, bias = tensors[f"{ours}.weight"], tensors[f"{ours}.bias"]
        if "NIN" not in theirs:
            official |= {f"{theirs}.weight": weight, f"{theirs}.bias": bias}
            continue
        names = theirs.split()  # output channel 3 c + {0: query, 1: key, 2: value} of ours
        for part, name in enumerate(names):
            official |= {f"{name}.W": weight[part :: len(names), :, 0, 0].T, f"{name}.b": bias[part :: len(names)]}
    return official


def from_official(net: EdmUnet, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_official`, under the names of a model."""
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _layers(net):
        if "NIN" in theirs:
            names = theirs.split()
            weight = torch.stack([official[f"{name}.W"].T for name in names], dim=1).flatten(0, 1)[..., None, None]
            bias = torch.stack([official[f"{name}.b"] for name in names], dim=1).flatten()
        else:
            weight, bias = official[f"{theirs}.weight"], official[f"{theirs}.bias"]
        tensors |= {f"net.{ours}.weight": weight.contiguous(), f"net.{ours}.bias": bias.contiguous()}
    return tensors


# --- Configuration


class _Layout(NamedTuple):
    nf: int
    channels: int  # of the image
    mults: list[int]
    num_blocks: int
    attending: list[int]  # levels, finest first


def _layout(shapes: Mapping[str, Sequence[int]]) -> _Layout:
    """What the shapes say; all of them are compared with a network's later. Raises LookupError or ValueError."""
    nf, channels = shapes["all_modules.2.weight"][:2]
    place = "all_modules.{}.{}"
    blocks = [number for number in range(3, len(shapes)) if place.format(number, "Conv_0.weight") in shapes]

    def resamples(number: int) -> bool:
        out_width, in_width = shapes[place.format(number, "Conv_0.weight")][:2]
        return out_width == in_width and place.format(number, "Conv_2.weight") in shapes

    def attends(number: int) -> bool:
        return place.format(number + 1, "NIN_0.W") in shapes

    resampling = [number for number in blocks if resamples(number)]  # halvings on the way down, doublings on the way up
    levels = 1 + len(resampling) // 2
    num_blocks = blocks.index(resampling[0]) if resampling else (len(blocks) - 3) // 2
    firsts = [blocks[level * (num_blocks + 1)] for level in range(levels)]
    widths = [shapes[place.format(number, "Conv_0.weight")][0] for number in firsts]
    if any(width % nf for width in widths):
        raise ValueError(f"channels {widths} of its levels are no multiples of {nf}")
    attending = [level for level, number in enumerate(firsts) if attends(number)]
    return _Layout(nf, channels, [width // nf for width in widths], num_blocks, attending)


def _config(shapes: Mapping[str, Sequence[int]], path: str | Path, told: Told) -> tuple[dict[str, Any], list[str]]:
    """The configuration that the shapes tell, and what is assumed."""
    try:
        layout = _layout(shapes)
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} is no DDPM++ of score_sde's program ({reason(error)}); its NCSN++ and other networks are not read"
        ) from None
    if told.size is None and len(layout.attending) != 1:
        raise CheckpointError(f"{path} does not tell the side of its images; add size=<side>")
    size = told.size or ATTENDING_SIDE << layout.attending[0]
    assumed = [] if told.size else [f"size={size}, as attention is at {ATTENDING_SIDE}x{ATTENDING_SIDE}"]
    assumed += [] if told.unbounded is not None else ["unbounded=false"]
    options = {
        "precond": "vp-unbounded" if told.unbounded else "vp",
        "channels": layout.nf,
        "channel_mult": layout.mults,
        "num_blocks": layout.num_blocks,
        "attn_resolutions": [size >> level for level in layout.attending],
        "augment_dim": 0,
    }
    try:
        return registry.config_of("edm-unet", (layout.channels, size, size), 0, options, {}), assumed
    except RecipeError as error:
        raise CheckpointError(f"{path}: its tensors fit no DDPM++ ({reason(error)})") from None
