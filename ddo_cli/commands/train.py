"""Commands that train: `finetune-ddo`, `train-disc`, `pretrain`, `train-classifier`, `train-extractor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddo_cli import console
from ddo_cli.commands.options import (
    Data,
    Device,
    DryRun,
    Json,
    ModelFile,
    Out,
    Overrides,
    RecipeName,
    coefficient,
    device_of,
    lines_of,
    recipe_of,
)
from ddo_cli.errors import UsageError


def finetune_ddo(
    recipe: RecipeName = "quickstart",
    ckpt: Annotated[
        str | None,
        typer.Option(help="Reference to improve: a safetensors file or embedded:<name>."),
    ] = None,
    data: Data = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of self-play.")] = None,
    alpha: Annotated[str | None, typer.Option(help="Weight of the fake term; 1,2,4 sweeps it in each round.")] = None,
    beta: Annotated[str | None, typer.Option(help="Scale of the log-ratio; 0.02,0.05 sweeps it, too.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Real images per step, over all processes.")] = None,
    images_per_round: Annotated[int | None, typer.Option(help="Real images per round.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Images between candidates.")] = None,
    num_fake: Annotated[int | None, typer.Option(help="Samples of the reference per round.")] = None,
    eval_num: Annotated[int | None, typer.Option(help="Images per score of the metric.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, tf32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Out = None,
    model_file: ModelFile = None,
    overrides: Overrides = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Finetune a model in rounds of self-play with the DDO loss. Run again to continue."""
    console.use_json(json_)
    given = {
        "seed": seed, "data.source": data, "model.ckpt": ckpt, "model.file": model_file,
        "finetune.rounds": rounds, "finetune.alpha": coefficient("--alpha", alpha),
        "finetune.beta": coefficient("--beta", beta), "finetune.lr": lr,
        "finetune.batch": batch, "finetune.images_per_round": images_per_round, "finetune.eval_every": eval_every,
        "finetune.num_fake": num_fake, "finetune.precision": precision, "metric.num_images": eval_num,
    }  # fmt: skip
    from ddo_cli import rundir
    from ddo_cli.engines import estimate
    from ddo_cli.engines.ddo import finetune as engine
    from ddo_cli.engines.ddo import report as finetune_report

    settings = recipe_of(recipe, overrides, given)
    found = engine.run(settings, out or Path("runs") / settings.name, device=device_of(device), dry_run=dry_run)
    if dry_run:
        by_round = found.get("settings_by_round")
        lines = lines_of({key: value for key, value in estimate.shown(found).items() if key != "settings_by_round"})
        console.result(found, lines, console.table(*finetune_report.settings_table(by_round)) if by_round else None)
        return
    columns, rows = finetune_report.table_of(rundir.RunDir(Path(found["out"])), found["metric"])
    counted = f" of {found['metric_images']:,} images" if found["metric_images"] else ""
    title = f"DDO by round: {found['metric']}{counted} (lower is better)"
    shown_figures = [f"{one['method']} {one['value']:g} (arXiv {one['arxiv']})" for one in found.get("published", [])]
    shown = {
        "final": found["final"],
        **({"published": ", ".join(shown_figures)} if shown_figures else {}),
        "report": str(Path(found["out"]) / "report.html"),
    }
    if "sweep_cost" in found:
        shown["sweep cost"] = f"{found['sweep_cost']:.2f} of the full grid"
    console.result(found, lines_of(shown), console.table(title, columns, rows))


def train_disc(
    recipe: RecipeName = "quickstart",
    ckpt: Annotated[
        str | None,
        typer.Option(help="Model to guide later: a safetensors file or embedded:<name>."),
    ] = None,
    data: Data = None,
    fake: Annotated[
        str | None,
        typer.Option(help="Samples of the model, as `ddo sample` drew them. Default: drawn here, and kept."),
    ] = None,
    num_fake: Annotated[int | None, typer.Option(help="Samples to draw.")] = None,
    images: Annotated[int | None, typer.Option(help="Real images at most, repeats counted.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Images between checkpoints.")] = None,
    eval_num: Annotated[int | None, typer.Option(help="With --select fid: images per score of a checkpoint.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Real images per step, over all processes.")] = None,
    select: Annotated[
        str | None, typer.Option(help="Final checkpoint by held-out bce, or fid of guided samples.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32, tf32, bf16 or fp16.")] = None,
    conditional: Annotated[
        bool | None, typer.Option("--conditional/--unconditional", help="Whether it sees labels.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the run. Default: runs/<recipe>-disc, with --ckpt and its hash."),
    ] = None,
    model_file: ModelFile = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Use a --fake set of another model.")] = False,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Train a discriminator of real against generated images, for `ddo guide-sample`. Run again to continue."""
    console.use_json(json_)
    given = {
        "seed": seed, "data.source": data, "model.ckpt": ckpt, "model.file": model_file, "discriminator.fake": fake,
        "discriminator.num_fake": num_fake, "discriminator.images": images, "discriminator.lr": lr,
        "discriminator.batch": batch, "discriminator.select": select, "discriminator.conditional": conditional,
        "discriminator.eval_every": eval_every, "discriminator.precision": precision, "metric.num_images": eval_num,
    }  # fmt: skip
    from ddo_cli.engines.discriminator import train as engine

    settings = recipe_of(recipe, overrides, given)
    if eval_num is not None and settings.discriminator.select != "fid":
        raise UsageError(f"--eval-num {eval_num} has no effect without scores of checkpoints; add --select fid")
    out = out or engine.default_out(settings, ckpt)
    found = engine.run(settings, out, device=device_of(device), force=force, dry_run=dry_run)
    if dry_run:
        console.result(found, lines_of(found))
        return
    columns, rows = engine.table_of(Path(found["out"]))
    shown = {**found, "report": str(Path(found["out"]) / "report.html")}
    console.result(found, lines_of(shown), console.table("Held-out images by noise level", columns, rows))


def pretrain(
    recipe: RecipeName = "quickstart",
    data: Data = None,
    images: Annotated[int | None, typer.Option(help="Images to train on, repeats counted.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, tf32, bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the run. Default: runs/<recipe>-pretrain."),
    ] = None,
    model_file: ModelFile = None,
    overrides: Overrides = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Train a model by maximum likelihood, to have a reference. Run again to continue."""
    console.use_json(json_)
    given = {
        "seed": seed, "data.source": data, "model.file": model_file, "pretrain.images": images, "pretrain.lr": lr,
        "pretrain.batch": batch, "pretrain.precision": precision,
    }  # fmt: skip
    from ddo_cli.engines import estimate
    from ddo_cli.engines.pretrain import model as engine

    settings = recipe_of(recipe, overrides, given, own_model=True)
    out = out or Path("runs") / f"{settings.name}-pretrain"
    found = engine.run(settings, out, device=device_of(device), dry_run=dry_run)
    console.result(found, lines_of(estimate.shown(found) if dry_run else found))


def train_classifier(
    recipe: RecipeName = "quickstart",
    ckpt: Annotated[
        str | None,
        typer.Option(help="Model to guide later: a safetensors file or embedded:<name>."),
    ] = None,
    data: Data = None,
    images: Annotated[int | None, typer.Option(help="Images to train on, repeats counted.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the run. Default: runs/<recipe>-classifier."),
    ] = None,
    model_file: ModelFile = None,
    overrides: Overrides = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Train a classifier of noisy images, for classifier guidance or under a discriminator. Run again to continue."""
    console.use_json(json_)
    given = {
        "seed": seed, "data.source": data, "model.ckpt": ckpt, "model.file": model_file, "classifier.images": images,
        "classifier.lr": lr, "classifier.batch": batch,
    }  # fmt: skip
    from ddo_cli.engines.discriminator import classifier as engine

    settings = recipe_of(recipe, overrides, given)
    out = out or Path("runs") / f"{settings.name}-classifier"
    found = engine.run(settings, out, device=device_of(device), dry_run=dry_run)
    console.result(found, lines_of(found))


def train_extractor(
    data: Annotated[str, typer.Option(help="Labelled images: a folder, zip, npz, or embedded:<name>.")],
    out: Annotated[Path, typer.Option(help="The weight file to write.")],
    held_out: Annotated[
        str | None,
        typer.Option(help="Images for the accuracy. Default: a tenth of the data."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to train on, repeats counted.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Train a small classifier whose features measure a Fréchet distance where Inception does not fit."""
    console.use_json(json_)
    from ddo_cli.engines.pretrain import extractor as engine

    found = engine.run(
        data, out, held_out=held_out, images=images, seed=seed, device=device_of(device), dry_run=dry_run
    )
    console.result(found, lines_of(found))
