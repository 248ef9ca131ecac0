"""Commands that measure, describe and convert: `fid`, `analyze`, `convert`, `export`, `info`, `recipes`."""

from __future__ import annotations

import json
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
    choice,
    device_of,
    lines_of,
    numbers,
    parsed,
)
from ddo_cli.errors import RunError, UsageError

FileSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="What a file does not tell. ADM .pt: qkv=legacy|new, schedule=linear|cosine, size=, num_heads=. "
        "VAR .pth: patch_nums=1,2,3,...",
        show_default=False,
    ),
]


def fid(
    source: Annotated[
        str, typer.Argument(help="Images (a folder, zip, npz, sample set), or a run or weight file that draws them.")
    ],
    overrides: SamplingKeys = None,
    ref: Annotated[
        str | None,
        typer.Option(help="Images, or statistics of EDM, EDM2, ADM or `ddo stats`. Default: embedded:digits32."),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(help="Some of fid, sfid, is, kid, precision, recall, density, coverage, fd_dinov2, fd_clip."),
    ] = "fid",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Inception-v3 weights of torch-fidelity; NAME=PATH of another network (fd_dinov2, fd_clip), may be "
            "repeated. Without, and none found: the embedded extractor."
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="Instead of Inception: of `ddo train-extractor`, TorchScript, or Python (which is run)."),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch published weights that are not here.")] = False,
    precision: Annotated[str | None, typer.Option(help="float32; tf32 and bf16 are marked as not comparable.")] = None,
    num: Annotated[
        int | None, typer.Option("--num-images", min=2, help="Images to use, or to draw. Default: all, 50000.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, max=100, help="Ranges of seeds scored apart.")] = 1,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Standard error of the FID, and its limit for infinitely many images.")
    ] = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="An FID of each class.")] = False,
    adm: Annotated[bool, typer.Option("--adm", help="IS as ADM's suite: chunks of 5000 images.")] = False,
    nearest: Annotated[
        int, typer.Option(min=0, max=64, help="Picture of so many images that lie closest to the reference's.")
    ] = 0,
    nll: Annotated[
        bool, typer.Option("--nll", help="Histogram of sFID features' likelihood under the reference's Gaussian.")
    ] = False,
    compare: Annotated[list[str] | None, typer.Option(help="A further set of that histogram. May be repeated.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Directory of the pictures.", show_default="fid-pictures")
    ] = None,
    benchmark: Annotated[str | None, typer.Option(help="Show published figures, e.g. of cifar10-uncond.")] = None,
    log: Annotated[Path | None, typer.Option("--csv", help="CSV file that gets a row.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 256,
    workers: Annotated[
        int | None, typer.Option(min=0, max=64, help="Processes that decode. Default: as suits the machine.")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Pass all images through the network, and keep nothing for later runs.")
    ] = False,
    model_file: ModelFile = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Fréchet distance between a set of images and a reference, and its kin: IS, KID, precision, recall, ..."""
    console.use_json(json_)
    if compare and not nll:
        raise UsageError("--compare adds a set to the histogram of --nll; give both")
    if pictures is not None and not (nearest or nll):
        raise UsageError(f"--pictures {pictures} has no effect without --nearest or --nll; add one of them")
    from ddo_cli.engines.fid import fid as engine
    from ddo_cli.engines.fid import report as fid_report
    from ddo_cli.metrics.extractors.weights import by_network
    from ddo_cli.models import registry
    from ddo_cli.recipe.load import parse_sampling

    registry.load_file(model_file)
    precision_: Any = choice("--precision", precision, ("float32", "tf32", "bf16")) or "float32"
    options = engine.Options(
        metrics=tuple(part.strip() for part in metrics.split(",")), weights=by_network(weights or []),
        extractor=extractor, precision=precision_, download=download, num=num, repeat=repeat, batch=batch,
        workers=workers, uncertainty=uncertainty, per_class=per_class, adm=adm, nearest=nearest,
        nll=tuple(compare or ()) if nll else None, pictures=pictures or Path("fid-pictures"), cache=not no_cache,
        sampling=parse_sampling(overrides or [], {}),
    )  # fmt: skip
    found = engine.run(source, ref, options, device=device_of(device), benchmark=benchmark, log=log, dry_run=dry_run)
    if dry_run:
        console.result(found, lines_of(found))
        return
    kept = ("reference", "extractor", "extractor_sha256", "images_per_second", "images_from_cache", "comparable")
    shown = {key: found[key] for key in (*kept, "nearest", "likelihoods") if found.get(key) is not None}
    title = f"{source}: {found['num_images']:,} images"
    console.result(found, lines_of(shown) + "\n\n" + found["markdown"], console.table(title, *fid_report.table(found)))
    if "not_written" in found:
        raise RunError(
            f"the figures above are whole, but {'; '.join(found['not_written'])}; mend that and run it again"
        )


def stats(
    data: Annotated[str, typer.Argument(help="Images: a folder, zip, npz, sample set, or embedded:<name>.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write, for --ref of `ddo fid`.")],
    metric: Annotated[
        str | None,
        typer.Option(help="Whose features: fid, fd_dinov2, fd_clip or fd_embedded. Default: fid."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights of the published network, where they are not in a usual place.")
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="An extractor of `ddo train-extractor`, or one of your own, instead of a published one."),
    ] = None,
    features: Annotated[
        bool,
        typer.Option("--features", help="Keep the features of each image: KID, precision and recall need them."),
    ] = False,
    num: Annotated[int | None, typer.Option("--num-images", min=2, help="Use so many images, always the same.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 256,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Statistics of an image set, written once as the reference of many scores."""
    console.use_json(json_)
    choice("--metric", metric, ("fid", "fd_dinov2", "fd_clip", "fd_embedded"))
    from ddo_cli.engines.fid import stats as engine

    kind: Any = metric or ("fd_embedded" if extractor else "fid")
    found = engine.run(
        data, out, metric=kind, weights=weights, extractor=extractor, features=features, num=num, batch=batch,
        device=device_of(device), dry_run=dry_run,
    )  # fmt: skip
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
    num: Annotated[
        int | None,
        typer.Option("--num-images", min=2, help="nfe: images per score.", show_default="1024"),
    ] = None,
    steps_list: Annotated[
        str | None, typer.Option(help="nfe: numbers of sampling steps.", show_default="4,6,8,12,18")
    ] = None,
    noise_level: Annotated[
        float | None, typer.Option(help="regeneration: deviation of the noise that is added.", show_default="1.0")
    ] = None,
    regenerations: Annotated[
        int | None, typer.Option(min=1, help="regeneration: how many of each image.", show_default="100")
    ] = None,
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
    from ddo_cli.engines.analysis import analyze as engine
    from ddo_cli.models import registry
    from ddo_cli.recipe.load import parse_sampling

    given: dict[str, Any] = {
        "num": num, "steps_list": counts and tuple(counts), "noise_level": noise_level, "regenerations": regenerations,
    }  # fmt: skip
    settings = {key: value for key, value in given.items() if value is not None}
    _refuse_unread(what, settings, engine.ON_REQUEST)
    flags = {"sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale, "batch": batch}
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    guidance = {"dg_weight": dg_weight, "dg_weight_2nd": dg_weight_2nd, "time_min": time_min, "time_max": time_max}
    found = engine.run(
        disc, ckpt, out, what=what, data=data, settings=engine.Settings(**settings),
        sampling=sampling, guidance=guidance, force=force, device=device_of(device), dry_run=dry_run,
    )  # fmt: skip
    table = None
    if "gain" in found:
        table = console.table("Gain by noise level", *engine.table_of(Path(found["out"])))
    console.result(found, lines_of(found), table)


def _refuse_unread(what: str | None, settings: dict[str, Any], on_request: tuple[str, ...]) -> None:
    """Raises UsageError for a setting of an analysis that is not asked for."""
    asked = None if what is None else {name.strip() for name in what.split(",")}
    for key, value in settings.items():
        name = "nfe" if key in ("num", "steps_list") else "regeneration"
        if (name in on_request) if asked is None else not asked & {name, "all"}:
            given = f"--what {what}" if asked else "the analyses that are done without --what"
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            option = "num-images" if key == "num" else key.replace("_", "-")
            raise UsageError(
                f"--{option} {shown} is of the analysis '{name}', and has no effect on {given}; add "
                f"{name} to --what, or leave the option out"
            )


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="EDM or EDM2 .pkl; ADM diffusion model, ADM classifier or DG .pt; VAR .pth; diffusers folder."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    settings: FileSettings = None,
    model: Annotated[str | None, typer.Option(help="Of a discriminator: the converted model that it guides.")] = None,
    trunk: Annotated[
        str | None, typer.Option(help="Of a discriminator: the converted classifier that it stands on.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Of a VAR: the published file of its tokenizer.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the file again and compare every tensor.")] = False,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Convert published weights to safetensors, without running the code inside them."""
    console.use_json(json_)
    from ddo_cli.engines.weights import convert as engine

    found = engine.run(
        source, out, model=model, trunk=trunk, vae=vae, settings=settings or (), verify=verify, dry_run=dry_run
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
    from ddo_cli.engines.weights import export as engine

    found = engine.run(ckpt, out, like=like, settings=settings or (), dry_run=dry_run)
    console.result(found, lines_of(found))


def info(
    path: Annotated[
        str, typer.Argument(help="A weight file, sample or encoded set, run directory, or embedded:<name>.")
    ],
    json_: Json = False,
) -> None:
    """What a checkpoint, sample set, encoded set or run holds: model, provenance, hashes."""
    console.use_json(json_)
    from ddo_cli.engines.weights import info as engine

    found = engine.run(path)
    console.result(found, lines_of(found))


def recipes(
    keys: Annotated[
        bool, typer.Option("--keys", help="Every key of a recipe instead: default, type, meaning.")
    ] = False,
    json_: Json = False,
) -> None:
    """The recipes that come with the program."""
    console.use_json(json_)
    from ddo_cli.recipe.keys import described
    from ddo_cli.recipe.load import recipe_names

    if keys:
        known = list(described())
        lines = [
            f"{key.name:<36} {json.dumps(key.default):<14} {key.type}; {key.meaning}".rstrip("; ") for key in known
        ]
        console.result({key.name: key._asdict() for key in known}, "\n".join(lines))
        return

    found = {
        name: next(
            (line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")), ""
        )
        for name, path in recipe_names().items()
    }
    console.result(found, lines_of(found))
