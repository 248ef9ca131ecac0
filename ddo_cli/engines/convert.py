"""`ddo convert`: published weight files of other programs -> ours, without running the code inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli import checkpoint
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.files import sha256
from ddo_cli.models import dg_files, discriminators, foreign, registry
from ddo_cli.recipe import GuidanceRecipe

SMALL = 32  # side up to which EDM samples in 18 steps; 40 above (arXiv 2206.00364, table 2)


class Found(NamedTuple):
    """What a foreign file holds, under our names."""

    family: str
    header: dict[str, Any]
    tensors: dict[str, Tensor]


def run(
    source: Path,
    out: Path,
    *,
    model: str | None = None,
    trunk: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes `out` and returns what layout promises of `convert --json`.

    source: a .pkl of EDM's family (the averaged weights), or a .pt or .pth of an ADM classifier or a published
    discriminator. model, trunk: the model that a discriminator guides, and the converted classifier under it.
    verify: reads the written file again and compares every tensor. Raises CheckpointError if the file cannot be used.
    """
    if not source.is_file():
        raise UsageError(f"{source} does not exist; give a .pkl, .pt or .pth file")
    if out.exists() and not dry_run:
        raise UsageError(f"--out {out} exists; choose another name, or remove it")
    link = {"command": "convert", "source": source.name, "source_sha256": sha256(source)}
    found = _edm(source) if source.suffix == ".pkl" else _discriminator_guidance(source, model, trunk)
    kind = found.header["kind"]
    result = {
        "out": str(out),
        "family": found.family,
        "kind": kind,
        "network": found.header["config"]["name"],
        "shape": found.header["config"]["shape"],
        "num_classes": found.header["config"]["num_classes"],
        "num_tensors": len(found.tensors),
        "num_parameters": _num_parameters(kind, found.header["config"]),
    }
    if dry_run:
        return {**result, "dry_run": True}
    checkpoint.save(out, found.tensors, {**found.header, "provenance": [link]})
    if verify:
        _verify(out, found.tensors)
        result["verified"] = True
    return result


def _edm(source: Path) -> Found:
    config, tensors = foreign.edm_checkpoint(source)
    steps = 18 if config["shape"][-1] <= SMALL else 40
    return Found("edm", {"kind": "model", "config": config, "sampling": {"sampler": "heun", "steps": steps}}, tensors)


def _discriminator_guidance(source: Path, model: str | None, trunk: str | None) -> Found:
    """An ADM classifier, or a discriminator with what `guide-sample` needs to know of it."""
    header = {} if model is None else checkpoint.read_header(model, kind="model")
    num_classes = header["config"]["num_classes"] if header else 0
    file = dg_files.read(source, trunk=trunk, num_classes=num_classes)
    shared = {"kind": file.kind, "config": file.config, "process": discriminators.PROCESS}
    if file.kind == "classifier":
        return Found("adm", shared, file.tensors)
    if model is None:
        raise UsageError(f"{source} is a discriminator; say with --model which converted model it guides")
    trained_on = {"model": model, "model_sha256": sha256(checkpoint.resolve(model)), "sampling": None}
    # The published runs: weight 2, or with labels weight 1 and boosting.
    conditional = bool(file.config["num_classes"])
    guidance = GuidanceRecipe(dg_weight=1.0 if conditional else 2.0, boost=conditional)
    extra = {"trained_on": trained_on, "guidance": guidance.model_dump(mode="json")}
    return Found("dg", {**shared, **extra}, file.tensors)


def _num_parameters(kind: str, config: dict[str, Any]) -> int:
    if kind == "model":
        with torch.device("meta"):
            network: nn.Module = registry.build(config)
    else:  # built for real, since a discriminator reads its trunk from a file
        network = discriminators.build(kind, config)
    return sum(parameter.numel() for parameter in network.parameters())


def _verify(out: Path, tensors: dict[str, Tensor]) -> None:
    written = checkpoint.load(out).tensors
    if written.keys() != tensors.keys():
        raise CheckpointError(f"{out} holds other tensors than were converted; remove it and convert again")
    for name, tensor in tensors.items():
        if not torch.equal(written[name], tensor):
            raise CheckpointError(f"{out}: tensor {name} differs from what was converted; remove it and convert again")
