"""Folders of diffusers with a `DiTTransformer2DModel` -> our network, with the published time embedding.

The library's network is another function than DiT's on the same weights: its sinusoids divide by 127 where DiT divides
by 128, and the norms before its MLPs have an eps of 1e-5 and not 1e-6. Files on the hub are DiT's weights under other
names, so they are read as DiT's. Each block there has its own copy of the embeddings of time and label.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import CheckpointError, printable, reason
from ddo_cli.models.diffusers import files as diffusers_files
from ddo_cli.models.diffusers.files import Found
from ddo_cli.models.dit import files as dit_files
from ddo_cli.models.dit.transformer import positions

CLASS = "DiTTransformer2DModel"
_LARGEST = 256  # side of a state, or heads; our choice, so that a hostile file costs little
_CONFIG, _SCHEDULER = "config.json", "scheduler_config.json"
# Arguments that change the function, and their values in DiT.
_FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
_PROCESS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
_OF_STEPS = "beta_schedule"  # of every scheduler of discrete steps; those of flow matching and EDM lack it
_EMBEDDINGS = {  # of every block
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_LAYERS = {
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}
_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


class DitFolder(NamedTuple):
    """What a folder holds: configuration and tensors of our model, and what to tell the user."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: dict[str, str]


def find(folder: Path) -> Found | None:
    """The files of a pipeline with this network, or of its transformer folder; None: it is a folder of another kind."""
    inside = folder / "transformer" if (folder / "transformer" / _CONFIG).is_file() else folder
    if not (inside / _CONFIG).is_file() or diffusers_files.json_of(inside / _CONFIG).get("_class_name") != CLASS:
        return None
    places = [home / "scheduler" / _SCHEDULER for home in (folder, inside.resolve().parent)]
    scheduler = next((place for place in places if place.is_file()), None)
    return Found(inside / _CONFIG, scheduler, diffusers_files.weights_of(inside))


def read(folder: Path, found: Found) -> DitFolder:
    """The model of a folder. Raises CheckpointError for another network or noise schedule than DiT's."""
    config = diffusers_files.json_of(found.network)
    _check(config, _FIXED, found.network)
    left_out = {} if found.scheduler is None else _checked_scheduler(found.scheduler)
    tensors = {name: tensor for path in found.weights for name, tensor in diffusers_files.tensors_of(path).items()}
    heads, side = (_number(config, key, found.network) for key in ("num_attention_heads", "sample_size"))
    try:
        official = _official(tensors)
        width, _, patch, _ = official[dit_files.MARK].shape
        official["pos_embed"] = positions(width, side // patch)  # no part of such files
    except (KeyError, IndexError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder}: its tensors fit no {CLASS} ({reason(error)}); copy the folder again"
        ) from None
    file = dit_files.read(official, folder, dit_files.Told(arch="dit", heads=heads))
    notes = {
        **file.notes,
        "arch": f"dit ({CLASS}): {dit_files.MEANINGS['dit']}",
        "time": "as DiT trained it: diffusers' own network differs from DiT's on the same weights",
        **left_out,
        **({} if found.scheduler else {"schedule": "DiT's: the folder has no scheduler's configuration"}),
    }
    return DitFolder(file.config, file.tensors, notes)


def _checked_scheduler(path: Path) -> dict[str, str]:
    """What of a scheduler no sampler here does. Raises CheckpointError for another process than DiT's."""
    scheduler = diffusers_files.json_of(path)
    if _OF_STEPS not in scheduler:
        name = printable(str(scheduler.get("_class_name")), 60)
        raise CheckpointError(
            f"{path}: a {name} has no {_OF_STEPS}, and DiT's has: the network estimates something else than DiT's "
            "noise, such as a velocity; only DiT itself is read"
        )
    _check(scheduler, _PROCESS, path)
    clips = [key for key in ("clip_sample", "thresholding") if scheduler.get(key)]
    return {"left_out": f"{' and '.join(clips)}: DiT's samplers clip nothing"} if clips else {}


def _number(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise CheckpointError(f"{path}: {key} = {printable(repr(value), 40)} is no number from 1 to {_LARGEST}")
    return value


def _check(config: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> None:
    for key, value in known.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{path}: {key} = {printable(repr(config[key]), 60)}; DiT has {value!r}; only DiT itself is read"
            )


def _official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by DiT's names; each is used exactly once. Raises KeyError for one too many or too few."""
    rest = dict(tensors)
    made: dict[str, Tensor] = {}

    def take(theirs: str, ours: str) -> None:
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in rest:
                made[f"{ours}.{kind}"] = rest.pop(f"{theirs}.{kind}")

    for theirs, ours in _OUTER.items():
        take(theirs, ours)
    for block in sorted({int(m[1]) for name in tensors if (m := re.match(r"transformer_blocks\.(\d{1,4})\.", name))}):
        prefix, to = f"transformer_blocks.{block}.", f"blocks.{block}."
        for theirs, ours in _LAYERS.items():
            take(prefix + theirs, to + ours)
        for kind in ("weight", "bias"):
            made[f"{to}attn.qkv.{kind}"] = torch.cat([rest.pop(f"{prefix}attn1.to_{part}.{kind}") for part in "qkv"])
        for theirs, ours in _EMBEDDINGS.items():
            first = {name: made[name] for kind in ("weight", "bias") if (name := f"{ours}.{kind}") in made}
            take(prefix + theirs, ours)
            if odd := [name for name, tensor in first.items() if not torch.equal(tensor, made[name])]:
                raise ValueError(f"block {block} has another {odd[0]} than block 0: DiT has one for all")
    if rest:
        raise KeyError(f"unexpected {min(rest)}")
    return made
