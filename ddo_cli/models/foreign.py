"""Published weight files of others -> a configuration of `registry` and tensors under our names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import CheckpointError, RecipeError
from ddo_cli.models import edm_keys, registry
from ddo_cli.models.inert_pickle import Record, read_pickle

__all__ = ["Converted", "edm_checkpoint", "read_pickle"]

_EDM_OPTIONS = {  # SongUNet's constructor: its argument, ours, its default
    "model_channels": ("channels", 128),
    "channel_mult": ("channel_mult", [1, 2, 2, 2]),
    "channel_mult_emb": ("channel_mult_emb", 4),
    "num_blocks": ("num_blocks", 4),
    "attn_resolutions": ("attn_resolutions", [16]),
    "embedding_type": ("embedding", "positional"),
    "channel_mult_noise": ("channel_mult_noise", 1),
    "encoder_type": ("encoder", "standard"),
    "resample_filter": ("resample_filter", [1, 1]),
    "augment_dim": ("augment_dim", 0),
}
# Read apart or of no use here: dropout stays off, since model and reference share their draw; half precision is the
# caller's choice; the noise range of the file is 0 to infinity, and ours are the sampler's defaults.
_EDM_READ = {
    "img_resolution", "img_channels", "label_dim", "model_type", "label_dropout", "decoder_type", "sigma_data",
    "dropout", "use_fp16", "sigma_min", "sigma_max",
}  # fmt: skip


class Converted(NamedTuple):
    """The configuration that `registry.build` takes, and the tensors of that model's state dict."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def edm_checkpoint(path: str | Path) -> Converted:
    """The averaged network (`ema`) of an EDM .pkl: EDM preconditioning around DDPM++ or NCSN++, float32.

    Raises CheckpointError if the file is missing, damaged, refused by `read_pickle`, or holds another network.
    """
    content = read_pickle(path)
    precond = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(precond, Record):
        raise CheckpointError(f"{path} holds no averaged network under the key 'ema'; give a network-snapshot of EDM")
    try:
        config = _edm_config(precond, path)
        found = dict(_tensors(precond, "", set()))
        size = config["shape"][1]
        tensors = {edm_keys.own_name(key): tensor.to(torch.float32) for key, tensor in found.items()}
        odd = [key for key in found if edm_keys.official_name(edm_keys.own_name(key), size) != key]
        if len(config["options"]["channel_mult"]) * config["options"]["num_blocks"] > len(found):
            raise ValueError(f"{len(found)} tensors are too few")  # and building so many blocks could take hours
        with torch.device("meta"):
            expected = registry.build(config).state_dict()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecipeError) as error:
        raise CheckpointError(
            f"{path}: the network does not fit its description ({type(error).__name__}: {error}); download it again"
        ) from None
    problems = [f"unexpected {key}" for key in odd]
    problems += [f"missing {edm_keys.official_name(key, size)}" for key in expected.keys() - tensors.keys()]
    problems += [f"unexpected {edm_keys.official_name(key, size)}" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{edm_keys.official_name(key, size)} of shape {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:5])
        raise CheckpointError(f"{path}: {len(problems)} tensors do not fit the network it describes: {listed}")
    return Converted(config, {key: tensors[key].clone(memory_format=torch.contiguous_format) for key in expected})


def _edm_config(precond: Record, path: str | Path) -> dict[str, Any]:
    """The configuration of a preconditioned network, from the arguments it was made with."""
    state = precond.state or {}
    given: dict[str, Any] = dict(state["_init_kwargs"])
    network = state["_modules"]["model"]
    if (precond.class_name, network.class_name) != ("EDMPrecond", "SongUNet"):
        raise CheckpointError(
            f"{path} holds a {precond.class_name} around a {network.class_name}; only EDMPrecond around SongUNet "
            "(the edm-cifar10, edm-ffhq and edm-afhqv2 files) can be converted"
        )
    if unknown := sorted(given.keys() - _EDM_OPTIONS.keys() - _EDM_READ):
        raise CheckpointError(f"{path}: the network was made with arguments that are not known: {', '.join(unknown)}")
    if state["_init_args"] or given.get("decoder_type", "standard") != "standard":
        raise CheckpointError(f"{path}: the network has a decoder or arguments that no published EDM file has")
    options = {ours: given.get(theirs, default) for theirs, (ours, default) in _EDM_OPTIONS.items()}
    side = state["img_resolution"]
    return registry.config_of(
        "edm-unet",
        (state["img_channels"], side, side),
        state["label_dim"],
        {**options, "sigma_data": state["sigma_data"]},
        {"label_drop": given.get("label_dropout", 0)},  # a dropped label is a row of zeros there as here
    )


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module in the order of its state dict: parameters, buffers, then children."""
    if not isinstance(module, Record) or id(module) in seen:  # twice: a file of cycles would never end
        raise ValueError(f"'{prefix.rstrip('.')}' is not a module of its own")
    seen.add(id(module))
    state = module.state or {}
    for name, tensor in (*state["_parameters"].items(), *state["_buffers"].items()):
        if tensor is not None:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"'{prefix}{name}' is not a tensor of floating-point numbers")
            yield prefix + name, tensor
    for name, child in state["_modules"].items():
        yield from _tensors(child, f"{prefix}{name}.", seen)
