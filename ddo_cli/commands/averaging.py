"""The command that makes averages of weights after training: `ema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddo_cli import console
from ddo_cli.commands.options import DryRun, Json, ModelFile, lines_of


def ema(
    sources: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="Snapshots of one run, or the directory that holds them.")
    ],
    std: Annotated[float, typer.Option(help="Relative standard deviation of the average, EDM2's sigma_rel.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    at: Annotated[
        int | None, typer.Option(min=1, help="Images of training at which it ends. Default: the last snapshot's.")
    ] = None,
    model_file: ModelFile = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Make averaged weights of any width from a run's snapshots, without training again."""
    console.use_json(json_)
    from ddo_cli.engines.weights import ema as engine
    from ddo_cli.models import registry

    registry.load_file(model_file)
    found = engine.run(sources, out, std=std, at=at, dry_run=dry_run)
    rows = [
        (str(one["file"]), f"{one['std']:.3f}", f"{one['images']:,}", f"{one['weight']:+.5f}")
        for one in found["snapshots"]
    ]
    table = console.table("Snapshots", ["file", "std", "images", "weight"], rows)
    console.result(found, lines_of({key: value for key, value in found.items() if key != "snapshots"}), table)
