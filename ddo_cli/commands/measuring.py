"""Commands that measure, describe and convert: `fid`, `analyze`, `convert`, `export`, `info`, `recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ddo_cli import console
from ddo_cli.commands.options import (
    Batch,
    CfgScale,
    Churn,
    Device,
    DgWeight,
    DgWeight2nd,
    Disc,
    DryRun,
    Force,
    GuidedCkpt,
    Json,
    ModelFile,
    Sampler,
    SamplingKeys,
    Steps,
    TimeMax,
    TimeMin,
    device_of,
    lines_of,
    numbers,
    parsed,
)

FileSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="What an ADM .pt does not tell: qkv=legacy|new, schedule=linear|cosine, size=, num_heads=.",
        show_default=False,
    ),
]


def fid(
    source: Annotated[str, typer.Argument(help="Images: a folder, zip, npz, or sample set.")],
    ref: Annotated[
        str | None,
        typer.Option(help="Reference images, or .npz with mu and sigma. Default: embedded:digits32."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Inception-v3 weights of torch-fidelity. Without: the embedded extractor."),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="An extractor of `ddo train-extractor`, instead of Inception."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 256,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Fréchet distance between a set of images and a reference."""
    console.use_json(json_)
    from ddo_cli.engines import fid as engine

    metric: Any = "fd_embedded" if extractor else "fid"
    found = engine.run(source, ref, metric, weights=weights, extractor=extractor, batch=batch, device=device_of(device))
    console.result(found, lines_of(found))


def analyze(
    disc: Disc = None,
    ckpt: GuidedCkpt = None,
    what: Annotated[
        str | None,
        typer.Option(help="Some of gain, trajectory, nfe, regeneration, density, or all. Default: the quick ones."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Real images not trained on. Default: those that the discriminator's training held out."),
    ] = None,
    dg_weight: DgWeight = None,
    dg_weight_2nd: DgWeight2nd = None,
    time_min: TimeMin = None,
    time_max: TimeMax = None,
    num: Annotated[int, typer.Option("--num", "--num-images", min=2, help="nfe: images per score.")] = 1024,
    steps_list: Annotated[str, typer.Option(help="nfe: numbers of sampling steps.")] = "4,6,8,12,18",
    noise_level: Annotated[float, typer.Option(help="regeneration: deviation of the noise that is added.")] = 1.0,
    regenerations: Annotated[int, typer.Option(min=1, help="regeneration: how many of each image.")] = 100,
    sampler: Sampler = None,
    steps: Steps = None,
    s_churn: Churn = None,
    cfg_scale: CfgScale = None,
    batch: Batch = None,
    out: Annotated[Path, typer.Option(help="Directory of the pictures and figures.")] = Path("analysis"),
    model_file: ModelFile = None,
    overrides: SamplingKeys = None,
    force: Force = False,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Measure what a discriminator's guidance does to a model: its gain in nats, trajectories, regenerated images."""
    console.use_json(json_)
    counts = parsed("--steps-list", steps_list, numbers, "write numbers of steps such as 4,8,18")
    from ddo_cli.engines import analyze as engine
    from ddo_cli.models import registry
    from ddo_cli.recipe import parse_sampling

    flags = {"sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale, "batch": batch}
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    guidance = {"dg_weight": dg_weight, "dg_weight_2nd": dg_weight_2nd, "time_min": time_min, "time_max": time_max}
    found = engine.run(
        disc, ckpt, out, what=what, data=data, settings=engine.Settings(tuple(counts), num, noise_level, regenerations),
        sampling=sampling, guidance=guidance, force=force, device=device_of(device), dry_run=dry_run,
    )  # fmt: skip
    table = None
    if "gain" in found:
        table = console.table("Gain by noise level", *engine.table_of(Path(found["out"])))
    console.result(found, lines_of(found), table)


def convert(
    source: Annotated[
        Path, typer.Argument(help="EDM .pkl; ADM diffusion model, ADM classifier or DG .pt; diffusers folder.")
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    settings: FileSettings = None,
    model: Annotated[str | None, typer.Option(help="Of a discriminator: the converted model that it guides.")] = None,
    trunk: Annotated[
        str | None, typer.Option(help="Of a discriminator: the converted classifier that it stands on.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the file again and compare every tensor.")] = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Convert published weights to safetensors, without running the code inside them."""
    console.use_json(json_)
    from ddo_cli.engines import convert as engine

    found = engine.run(
        source, out, model=model, trunk=trunk, settings=settings or (), verify=verify, dry_run=dry_run
    )  # fmt: skip
    console.result(found, lines_of(found))


def export(
    ckpt: Annotated[str, typer.Argument(help="A converted or finetuned model.")],
    out: Annotated[Path, typer.Option(help="The file to write like ORIGINAL; without one, a folder for diffusers.")],
    like: Annotated[
        Path | None, typer.Option(help="ORIGINAL: the published .pkl, .pt or .pth that the model comes from.")
    ] = None,
    settings: FileSettings = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Write a model as the published file it was converted from, or without --like as a folder of diffusers."""
    console.use_json(json_)
    from ddo_cli.engines import export as engine

    found = engine.run(ckpt, out, like=like, settings=settings or (), dry_run=dry_run)
    console.result(found, lines_of(found))


def info(
    path: Annotated[str, typer.Argument(help="A weight file, sample set, run directory, or embedded:<name>.")],
    json_: Json = False,
) -> None:
    """What a checkpoint, sample set or run holds: model, provenance, hashes."""
    console.use_json(json_)
    from ddo_cli.engines import info as engine

    found = engine.run(path)
    console.result(found, lines_of(found))


def recipes(json_: Json = False) -> None:
    """The recipes that come with the program."""
    console.use_json(json_)
    from ddo_cli.recipe import recipe_names

    found = {
        name: next((line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")), "")
        for name, path in recipe_names().items()
    }
    console.result(found, lines_of(found))
