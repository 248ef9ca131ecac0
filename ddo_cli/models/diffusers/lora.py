"""Adapters of diffusers' networks as the library's pipelines read them, by `load_lora_weights`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddo_cli import checkpoint, console
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.files import replacing
from ddo_cli.models.adapters import NAME
from ddo_cli.models.diffusers import files, text_model, unet
from ddo_cli.models.diffusers.families import FAMILIES

FILE = "pytorch_lora_weights.safetensors"  # the library's own name


def _place(config: dict[str, Any]) -> tuple[str, str] | None:
    """What goes before the names of a network's tensors in our model, and the pipeline's part; None: not diffusers'."""
    if config["name"] == text_model.NAME:
        return text_model.PREFIX, FAMILIES[config["options"]["family"]].part
    return (files.PREFIX, "unet") if config["name"] == unet.NAME else None


def write_folder(file: Checkpoint, out: Path, dry_run: bool = False) -> dict[str, Any]:
    """Writes an adapter's checkpoint as a folder with the library's file; returns what `export` prints of it.

    Raises UsageError if `out` exists, CheckpointError for the adapter of a network that diffusers does not have.
    """
    tensors = _theirs(file)
    result = {
        "out": str(out),
        "family": "diffusers",
        "file": FILE,
        "checkpoint_sha256": file.sha256,
        "num_tensors": len(tensors),
    }
    if dry_run:
        return {**result, "verified": False, "dry_run": True}
    if out.exists():
        if not _holds(out, tensors):
            raise UsageError(f"--out {out} exists and holds something else; choose another name, or remove it")
        console.info(f"{out} is finished; nothing to do")
        return {**result, "verified": True}
    with replacing(out) as folder:
        checkpoint.write_tensors(folder / FILE, tensors, {"format": "pt"})
        if not _holds(folder, tensors):
            raise CheckpointError(f"{out}: what was written reads back different; it was removed, so try again")
    return {**result, "verified": True}


def _holds(folder: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether a folder has this file and nothing else."""
    if not folder.is_dir() or [path.name for path in folder.iterdir()] != [FILE]:
        return False
    held = checkpoint.load_tensors(folder / FILE)
    return held.keys() == tensors.keys() and all(torch.equal(held[name], tensors[name]) for name in held)


def _theirs(file: Checkpoint) -> dict[str, Tensor]:
    """The tensors by the library's names. B takes in alpha / rank, since readers without an alpha use the rank."""
    config, settings = file.header["config"], file.header["adapter"]
    if (place := _place(config)) is None:
        raise CheckpointError(
            f"{file.path} is an adapter of the network {config['name']}, which diffusers does not have; add "
            "--merge for a weight file of the whole network"
        )
    prefix, part = place
    scale = settings["alpha"] / settings["rank"]
    return {
        f"{part}.{key.removeprefix(prefix).replace(f'.{NAME}.', '.')}": tensor * scale if ".lora_B." in key else tensor
        for key, tensor in file.tensors.items()
    }
