"""The commands: thin functions that read options, import an engine, and show what it returns."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddo_cli import __version__, console
from ddo_cli.errors import DdoError, UsageError

if TYPE_CHECKING:
    import torch

    from ddo_cli.recipe import Recipe

# Newer Typer carries its own copy of click, older ones import it: either way this is what a bad option raises.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Improve trained image models: finetune with Direct Discriminative Optimization (DDO), or guide the sampling "
    "with a discriminator (DG).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = "interrupted; the same command continues where it can"
MAX_SEED = 2**32 - 1  # generators keep 32 bits

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")]
ModelFile = Annotated[str | None, typer.Option(help="Python file that registers your own model.")]
RecipeName = Annotated[str, typer.Option(help="A recipe by name (see `ddo recipes`) or a YAML file.")]
Data = Annotated[
    str | None,
    typer.Option(help="Real images: a folder, zip, npz, or embedded:<name>."),
]
Out = Annotated[Path | None, typer.Option(help="Directory of the run. Default: runs/<recipe>.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any recipe key, e.g. finetune.ema_half_life=500."),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"ddo {__version__}")
        raise typer.Exit


Num = Annotated[int, typer.Option("--num", "--num-images", min=1, help="How many.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="First seed.")]
Seeds = Annotated[str | None, typer.Option(help="Seeds such as 0-49999 or 3,7,10-20.")]
Classes = Annotated[str | None, typer.Option(help="Only these classes, e.g. 3,5. Default: all, balanced.")]
Sampler = Annotated[str | None, typer.Option(help="euler, heun (EDM), dpmpp-2m, ddim or ddpm.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps.")]
Churn = Annotated[float | None, typer.Option(help="EDM's stochasticity.")]
CfgScale = Annotated[float | None, typer.Option(help="Classifier-free guidance, 1 = off.")]
Batch = Annotated[int | None, typer.Option(help="Images per network pass.")]
Form = Annotated[str, typer.Option("--format", help="png, npz or shards.")]
SamplingKeys = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Other sampling keys, e.g. sigma_max=20 top_k=5."),
]
GuideCkpt = Annotated[str | None, typer.Option(help="Autoguidance: a worse version of the model.")]
Guidance = Annotated[float, typer.Option(help="Scale of autoguidance, 1 = off.")]
Disc = Annotated[
    str | None,
    typer.Option(help="Discriminator of `ddo train-disc`. Default: the newest below runs/."),
]
GuidedCkpt = Annotated[
    str | None, typer.Option(help="Model to guide. Default: the one that the discriminator was trained against.")
]
DgWeight = Annotated[
    float | None,
    typer.Option(help="Weight of the guidance in a step's predictor, 0 = off. Default: the recipe's."),
]
DgWeight2nd = Annotated[float | None, typer.Option("--dg-weight-2nd", help="Weight in its corrector (heun).")]
TimeMin = Annotated[float | None, typer.Option(help="Guide only at VP times from here on, in [0, 1].")]
TimeMax = Annotated[float | None, typer.Option(help="Guide only at VP times up to here, in [0, 1].")]
Force = Annotated[bool, typer.Option("--force", help="Use a discriminator that was trained for another model.")]


@app.command()
def sample(
    ckpt: Annotated[str, typer.Option(help="Weights: a safetensors file or embedded:<name>.")] = "embedded:digits32",
    # torchrun takes --num for an abbreviation of an option of its own; the longer name passes.
    num: Num = 64,
    seed: Seed = 0,
    seeds: Seeds = None,
    classes: Classes = None,
    sampler: Sampler = None,
    steps: Steps = None,
    s_churn: Churn = None,
    cfg_scale: CfgScale = None,
    guide_ckpt: GuideCkpt = None,
    guidance: Guidance = 1.0,
    batch: Batch = None,
    out: Annotated[Path, typer.Option(help="Directory of the sample set.")] = Path("samples"),
    form: Form = "png",
    model_file: ModelFile = None,
    overrides: SamplingKeys = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Draw samples: each image depends on its own seed only. Run again to continue."""
    console.use_json(json_)
    form_ = _choice("--format", form, ("png", "npz", "shards"))
    from ddo_cli.engines import guides
    from ddo_cli.engines import sample as engine
    from ddo_cli.models import registry
    from ddo_cli.recipe import parse_sampling

    flags = {"sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale, "batch": batch}
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    device_ = _device(device)
    others = guides.Others(guide_ckpt, guidance)
    made = guides.of_plain_sampling(others, ckpt, device_)
    found = engine.run(
        ckpt,
        _seeds(seeds, seed, num),
        out,
        form=form_,
        classes=_classes(classes),
        sampling=sampling,
        guides=made.guides,
        guidance=made.record,
        device=device_,
        dry_run=dry_run,
    )
    console.result(found, _lines(found))


@app.command("train-disc")
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
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Real images per step, over all processes.")] = None,
    select: Annotated[
        str | None, typer.Option(help="Final checkpoint by held-out bce, or fid of guided samples.")
    ] = None,
    conditional: Annotated[
        bool | None, typer.Option("--conditional/--unconditional", help="Whether it sees labels.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the run. Default: runs/<recipe>-disc."),
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
        "discriminator.eval_every": eval_every,
    }  # fmt: skip
    from ddo_cli.engines import train_disc as engine

    settings = _recipe(recipe, overrides, given)
    out = out or engine.default_out(settings, ckpt)
    found = engine.run(settings, out, device=_device(device), force=force, dry_run=dry_run)
    if dry_run:
        console.result(found, _lines(found))
        return
    columns, rows = engine.table_of(Path(found["out"]))
    shown = {**found, "report": str(Path(found["out"]) / "report.html")}
    console.result(found, _lines(shown), console.table("Held-out images by noise level", columns, rows))


@app.command("guide-sample")
def guide_sample(
    disc: Disc = None,
    ckpt: GuidedCkpt = None,
    dg_weight: DgWeight = None,
    dg_weight_2nd: DgWeight2nd = None,
    time_min: TimeMin = None,
    time_max: TimeMax = None,
    decay: Annotated[
        str | None, typer.Option(help="Weight over time: constant, linear or cosine, falling with t.")
    ] = None,
    boost: Annotated[
        bool | None, typer.Option("--boost/--no-boost", help="Push samples that look generated further.")
    ] = None,
    boost_churn_period: Annotated[int | None, typer.Option(help="Steps between their churns.")] = None,
    boost_weight_period: Annotated[int | None, typer.Option(help="Steps between doubled weights.")] = None,
    guide_ckpt: GuideCkpt = None,
    guidance: Guidance = 1.0,
    classifier: Annotated[
        str | None, typer.Option(help="Classifier guidance: a noisy-image classifier (`ddo train-classifier`).")
    ] = None,
    classifier_weight: Annotated[float, typer.Option(help="Its weight.")] = 1.0,
    num: Num = 64,
    seed: Seed = 0,
    seeds: Seeds = None,
    classes: Classes = None,
    sampler: Sampler = None,
    steps: Steps = None,
    s_churn: Churn = None,
    cfg_scale: CfgScale = None,
    batch: Batch = None,
    out: Annotated[Path, typer.Option(help="Directory of the sample set.")] = Path("guided"),
    form: Form = "png",
    model_file: ModelFile = None,
    overrides: SamplingKeys = None,
    force: Force = False,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Draw samples with discriminator guidance. Same seeds as `ddo sample`. Run again to continue."""
    console.use_json(json_)
    form_ = _choice("--format", form, ("png", "npz", "shards"))
    from ddo_cli.engines import guide_sample as engine
    from ddo_cli.engines.guides import Others
    from ddo_cli.models import registry
    from ddo_cli.recipe import parse_sampling

    flags = {"sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale, "batch": batch}
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    found = engine.run(
        disc,
        ckpt,
        _seeds(seeds, seed, num),
        out,
        form=form_,
        classes=_classes(classes),
        sampling=sampling,
        guidance={
            "dg_weight": dg_weight, "dg_weight_2nd": dg_weight_2nd, "time_min": time_min, "time_max": time_max,
            "decay": decay, "boost": boost, "boost_churn_period": boost_churn_period,
            "boost_weight_period": boost_weight_period,
        },
        others=Others(guide_ckpt, guidance, classifier, classifier_weight),
        force=force,
        device=_device(device),
        dry_run=dry_run,
    )  # fmt: skip
    console.result(found, _lines(found))


@app.command()
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
    counts = _parse("--steps-list", steps_list, _numbers, "write numbers of steps such as 4,8,18")
    from ddo_cli.engines import analyze as engine
    from ddo_cli.models import registry
    from ddo_cli.recipe import parse_sampling

    flags = {"sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale, "batch": batch}
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    guidance = {"dg_weight": dg_weight, "dg_weight_2nd": dg_weight_2nd, "time_min": time_min, "time_max": time_max}
    found = engine.run(
        disc, ckpt, out, what=what, data=data, settings=engine.Settings(tuple(counts), num, noise_level, regenerations),
        sampling=sampling, guidance=guidance, force=force, device=_device(device), dry_run=dry_run,
    )  # fmt: skip
    table = None
    if "gain" in found:
        table = console.table("Gain by noise level", *engine.table_of(Path(found["out"])))
    console.result(found, _lines(found), table)


@app.command()
def edit(
    source: Annotated[
        str, typer.Argument(metavar="IMAGES", help="Images: a folder, zip, npz, sample set, or embedded:<name>.")
    ],
    level: Annotated[
        str, typer.Option(help="Noise levels to start from, in units of pixels in [-1, 1].")
    ] = "0.5,1,2,5",
    num: Annotated[int, typer.Option("--num", "--num-images", min=1, help="Edit the first so many.")] = 64,
    disc: Annotated[
        str | None,
        typer.Option(help="Discriminator of `ddo train-disc`. Default: the newest of this model below runs/, if any."),
    ] = None,
    ckpt: Annotated[
        str | None,
        typer.Option(help="Model that edits. Default: the one that --disc was trained against, or embedded:digits32."),
    ] = None,
    no_guidance: Annotated[bool, typer.Option("--no-guidance", help="Without guidance only.")] = False,
    dg_weight: DgWeight = None,
    dg_weight_2nd: DgWeight2nd = None,
    time_min: TimeMin = None,
    time_max: TimeMax = None,
    label: Annotated[
        int | None, typer.Option(help="Class that every image is translated to. Default: the images' own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    sampler: Sampler = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps from each noise level down.")] = None,
    s_churn: Churn = None,
    cfg_scale: CfgScale = None,
    batch: Batch = None,
    ref: Annotated[
        str | None,
        typer.Option(help="Target set, or .npz with mu and sigma. Default: the discriminator's data, or digits32."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Inception-v3 weights for an FID. Without: the embedded extractor.")
    ] = None,
    extractor: Annotated[str | None, typer.Option(help="An extractor of `ddo train-extractor`.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the edited images.")] = Path("edited"),
    form: Form = "png",
    model_file: ModelFile = None,
    overrides: SamplingKeys = None,
    force: Force = False,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Edit images (SDEdit): noise them, and sample from there with and without guidance. Run again to continue."""
    console.use_json(json_)
    form_ = _choice("--format", form, ("png", "npz", "shards"))
    levels = _parse("--level", level, _floats, "write noise levels such as 0.5,1,2")
    from ddo_cli.engines import edit as engine
    from ddo_cli.engines import edit_report
    from ddo_cli.models import registry
    from ddo_cli.recipe import parse_sampling

    flags = {"sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale, "batch": batch}
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    guidance = {"dg_weight": dg_weight, "dg_weight_2nd": dg_weight_2nd, "time_min": time_min, "time_max": time_max}
    found = engine.run(
        source, out, levels, num=num, disc=disc, ckpt=ckpt, guidance=guidance, use_guidance=not no_guidance,
        label=label, seed=seed, form=form_, sampling=sampling, ref=ref, weights=weights, extractor=extractor,
        force=force, device=_device(device), dry_run=dry_run,
    )  # fmt: skip
    if dry_run:
        console.result(found, _lines(found))
        return
    shown = {key: value for key, value in found.items() if key != "levels"}
    console.result(found, _lines(shown), console.table("Edited images", *edit_report.table(found)))


@app.command("finetune-ddo")
def finetune_ddo(
    recipe: RecipeName = "quickstart",
    ckpt: Annotated[
        str | None,
        typer.Option(help="Reference to improve: a safetensors file or embedded:<name>."),
    ] = None,
    data: Data = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of self-play.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the fake term.")] = None,
    beta: Annotated[float | None, typer.Option(help="Scale of the log-ratio.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Real images per step, over all processes.")] = None,
    images_per_round: Annotated[int | None, typer.Option(help="Real images per round.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Images between candidates.")] = None,
    num_fake: Annotated[int | None, typer.Option(help="Samples of the reference per round.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, tf32 or bf16.")] = None,
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
        "finetune.rounds": rounds, "finetune.alpha": alpha, "finetune.beta": beta, "finetune.lr": lr,
        "finetune.batch": batch, "finetune.images_per_round": images_per_round, "finetune.eval_every": eval_every,
        "finetune.num_fake": num_fake, "finetune.precision": precision,
    }  # fmt: skip
    from ddo_cli import rundir
    from ddo_cli.engines import finetune_ddo as engine
    from ddo_cli.engines import finetune_report

    settings = _recipe(recipe, overrides, given)
    found = engine.run(settings, out or Path("runs") / settings.name, device=_device(device), dry_run=dry_run)
    if dry_run:
        console.result(found, _lines(found))
        return
    columns, rows = finetune_report.table_of(rundir.RunDir(Path(found["out"])), found["metric"])
    shown = {"final": found["final"], "report": str(Path(found["out"]) / "report.html")}
    console.result(found, _lines(shown), console.table("DDO by round (lower is better)", columns, rows))


@app.command()
def pretrain(
    recipe: RecipeName = "quickstart",
    data: Data = None,
    images: Annotated[int | None, typer.Option(help="Images to train on, repeats counted.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, tf32 or bf16.")] = None,
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
    from ddo_cli.engines import pretrain as engine

    settings = _recipe(recipe, overrides, given, own_model=True)
    out = out or Path("runs") / f"{settings.name}-pretrain"
    found = engine.run(settings, out, device=_device(device), dry_run=dry_run)
    console.result(found, _lines(found))


@app.command("train-extractor")
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
    from ddo_cli.engines import train_extractor as engine

    found = engine.run(data, out, held_out=held_out, images=images, seed=seed, device=_device(device), dry_run=dry_run)
    console.result(found, _lines(found))


@app.command()
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
    found = engine.run(source, ref, metric, weights=weights, extractor=extractor, batch=batch, device=_device(device))
    console.result(found, _lines(found))


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="A weight file, sample set, run directory, or embedded:<name>.")],
    json_: Json = False,
) -> None:
    """What a checkpoint, sample set or run holds: model, provenance, hashes."""
    console.use_json(json_)
    from ddo_cli.engines import info as engine

    found = engine.run(path)
    console.result(found, _lines(found))


@app.command()
def recipes(json_: Json = False) -> None:
    """The recipes that come with the program."""
    console.use_json(json_)
    from ddo_cli.recipe import recipe_names

    found = {
        name: next((line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")), "")
        for name, path in recipe_names().items()
    }
    console.result(found, _lines(found))


# ---------------------------------------------------------------------------------------------------------------------
# Options -> values


def _recipe(name: str, overrides: list[str] | None, given: dict[str, Any], own_model: bool = False) -> Recipe:
    """The resolved recipe. own_model: the recipe's model section is used, so its options are checked as well."""
    from ddo_cli import recipe as recipes_
    from ddo_cli.models import registry

    def check(recipe: Recipe) -> list[str]:
        registry.load_file(recipe.model.file)
        return registry.problems(recipe.model.name, recipe.model.options, recipe.model.draw)

    return recipes_.load(name, overrides or [], given, check if own_model else None)


def _device(name: str | None) -> torch.device:
    import torch

    from ddo_cli import dist

    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {name} is not known; use cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; leave the option out or use cpu")
    return dist.init(name)


def _choice(option: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise UsageError(f"{option} {value} is not known; use one of {', '.join(known)}")
    return value


def _parse(option: str, text: str | None, parse: Any, remedy: str) -> Any:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise UsageError(f"{option} {text} cannot be read ({error}); {remedy}") from None


def _seeds(text: str | None, first: int, num: int) -> Any:
    from ddo_cli.data.samples import parse_seeds

    return _parse("--seeds", text, parse_seeds, "write seeds such as 0-49999 or 3,7,10-20") or range(first, first + num)


def _classes(text: str | None) -> Any:
    return _parse("--classes", text, _numbers, "write classes such as 3,5")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _lines(found: Mapping[str, Any], indent: str = "") -> str:
    """One "key value" line per entry; nested values indented."""
    lines = []
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}", _lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{key}", *(_lines(entry, indent + "  ") for entry in value)]
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            lines.append(f"{indent}{key:<{max(18 - len(indent), 1)}} {text}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Entry point


def main() -> None:
    """Runs a command; a user's mistake is one message on stderr and exit code 2, never a traceback."""
    # Options are parsed after this; an error before --json is read must still answer in JSON.
    console.use_json("--json" in sys.argv)
    try:
        code = app(standalone_mode=False)
    except DdoError as error:
        _fail(error.kind, str(error), 2)
    except _ClickException as error:
        _fail("usage", f"{error.format_message()} (ddo --help lists the options)", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", INTERRUPTED, 130)
    except OSError as error:
        if error.strerror is None:
            raise
        remedies = {
            errno.ENOSPC: "make room and run the same command again, it continues",
            errno.EDQUOT: "make room and run the same command again, it continues",
            errno.EACCES: "change its permissions, or choose another place",
            errno.EROFS: "choose another place",
        }
        place = error.filename or "the output directory"
        _fail("disk", f"{place}: {error.strerror}; {remedies.get(error.errno or 0, 'choose another path')}", 2)
    else:
        if code == 130:  # newer Typer turns Ctrl-C into an exit code
            _fail("interrupted", INTERRUPTED, 130)
        if "torch" in sys.modules:
            from ddo_cli import dist

            dist.shutdown()
        _exit(code if isinstance(code, int) else 0)


def _fail(kind: str, message: str, code: int) -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # the main process's message comes first, before torchrun ends them all
    console.error(kind, message)
    _exit(code)


def _exit(code: int) -> None:
    """Ends the process; under torchrun at once.

    After a failure, leaving the process group in the regular way would wait for the others, who wait for this process;
    torchrun ends them once this one has. After success, gloo's threads may abort an interpreter that takes them down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else sys.exit(code)
