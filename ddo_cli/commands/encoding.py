"""The command that prepares data for models of latents or tokens: `encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddo_cli import console
from ddo_cli.commands.options import Device, DryRun, Json, ModelFile, choice, device_of, lines_of


def encode(
    data: Annotated[str, typer.Argument(help="Images: a folder, zip, npz, sample set, or embedded:<name>.")],
    ckpt: Annotated[str, typer.Option(help="A model of latents or tokens, whose encoder is used.")],
    out: Annotated[Path, typer.Option(help="Directory of the set, for data.source.")],
    num: Annotated[int | None, typer.Option("--num-images", min=1, help="Use so many images, always the same.")] = None,
    shard: Annotated[int, typer.Option(min=1, help="Images per file.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="float16 halves the size of latents. Default: as the encoder makes them.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, max=64, help="Processes that decode. Default: as suits the machine.")
    ] = None,
    model_file: ModelFile = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Encode an image set once, into the latents or tokens that a model is trained on."""
    console.use_json(json_)
    choice("--dtype", dtype, ("float32", "float16"))
    from ddo_cli.engines import encode as engine
    from ddo_cli.models import registry

    registry.load_file(model_file)
    found = engine.run(
        data, ckpt, out, num=num, shard=shard, batch=batch, dtype=dtype, workers=workers, device=device_of(device),
        dry_run=dry_run,
    )  # fmt: skip
    console.result(found, lines_of(found))
