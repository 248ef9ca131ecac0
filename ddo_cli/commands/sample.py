"""Commands that draw images: `sample`, `guide-sample`, `edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddo_cli import console
from ddo_cli.commands.options import (
    Batch,
    CfgScale,
    Churn,
    Classes,
    Device,
    DgWeight,
    DgWeight2nd,
    Disc,
    DryRun,
    Force,
    Form,
    Guidance,
    GuidanceInterval,
    GuideCkpt,
    GuidedCkpt,
    Json,
    Labels,
    ModelFile,
    Num,
    Sampler,
    SamplingKeys,
    Seed,
    Seeds,
    Steps,
    TimeMax,
    TimeMin,
    choice,
    classes_of,
    device_of,
    floats,
    interval_of,
    lines_of,
    parsed,
    seeds_of,
)


def sample(
    ckpt: Annotated[str, typer.Option(help="Weights: a safetensors file or embedded:<name>.")] = "embedded:digits32",
    num: Num = None,
    seed: Seed = None,
    seeds: Seeds = None,
    classes: Classes = None,
    labels: Labels = None,
    sampler: Sampler = None,
    steps: Steps = None,
    s_churn: Churn = None,
    cfg_scale: CfgScale = None,
    guide_ckpt: GuideCkpt = None,
    guidance: Guidance = 1.0,
    guidance_interval: GuidanceInterval = None,
    batch: Batch = None,
    out: Annotated[Path, typer.Option(help="Directory of the sample set.")] = Path("samples"),
    form: Form = None,
    model_file: ModelFile = None,
    overrides: SamplingKeys = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Draw samples: each image depends on its own seed only. Run again to continue."""
    console.use_json(json_)
    form_ = choice("--format", form, ("png", "npz", "shards"))
    from ddo_cli.engines.sampling import guides
    from ddo_cli.engines.sampling import sample as engine
    from ddo_cli.models import registry
    from ddo_cli.recipe.load import parse_sampling

    flags = {
        "labels": labels, "sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale,
        "batch": batch,
    }  # fmt: skip
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    device_ = device_of(device)
    others = guides.Others(guide_ckpt, guidance, interval=interval_of(guidance_interval))
    loaded = registry.load_model(ckpt, device_)
    made = guides.of_plain_sampling(others, loaded, device_)
    found = engine.run(
        loaded,
        seeds_of(seeds, seed, num),
        out,
        form=form_,
        classes=classes_of(classes),
        sampling=sampling,
        guides=made.guides,
        guidance=made.record,
        device=device_,
        dry_run=dry_run,
    )
    console.result(found, lines_of(found))


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
    guidance_interval: GuidanceInterval = None,
    classifier: Annotated[
        str | None, typer.Option(help="Classifier guidance: a noisy-image classifier (`ddo train-classifier`).")
    ] = None,
    classifier_weight: Annotated[float, typer.Option(help="Its weight.")] = 1.0,
    num: Num = None,
    seed: Seed = None,
    seeds: Seeds = None,
    classes: Classes = None,
    labels: Labels = None,
    sampler: Sampler = None,
    steps: Steps = None,
    s_churn: Churn = None,
    cfg_scale: CfgScale = None,
    batch: Batch = None,
    out: Annotated[Path, typer.Option(help="Directory of the sample set.")] = Path("guided"),
    form: Form = None,
    model_file: ModelFile = None,
    overrides: SamplingKeys = None,
    force: Force = False,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Draw samples with discriminator guidance. Same seeds as `ddo sample`. Run again to continue."""
    console.use_json(json_)
    form_ = choice("--format", form, ("png", "npz", "shards"))
    from ddo_cli.engines.sampling import guide_sample as engine
    from ddo_cli.engines.sampling.guides import Others
    from ddo_cli.models import registry
    from ddo_cli.recipe.load import parse_sampling

    flags = {
        "labels": labels, "sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale,
        "batch": batch,
    }  # fmt: skip
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    found = engine.run(
        disc,
        ckpt,
        seeds_of(seeds, seed, num),
        out,
        form=form_,
        classes=classes_of(classes),
        sampling=sampling,
        guidance={
            "dg_weight": dg_weight, "dg_weight_2nd": dg_weight_2nd, "time_min": time_min, "time_max": time_max,
            "decay": decay, "boost": boost, "boost_churn_period": boost_churn_period,
            "boost_weight_period": boost_weight_period,
        },
        others=Others(guide_ckpt, guidance, classifier, classifier_weight, interval_of(guidance_interval)),
        force=force,
        device=device_of(device),
        dry_run=dry_run,
    )  # fmt: skip
    console.result(found, lines_of(found))


def edit(
    source: Annotated[
        str, typer.Argument(metavar="IMAGES", help="Images: a folder, zip, npz, sample set, or embedded:<name>.")
    ],
    level: Annotated[
        str, typer.Option(help="Noise levels to start from, in units of pixels in [-1, 1].")
    ] = "0.5,1,2,5",
    num: Annotated[int, typer.Option("--num-images", min=1, help="Edit the first so many.")] = 64,
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
    form: Form = None,
    model_file: ModelFile = None,
    overrides: SamplingKeys = None,
    force: Force = False,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Edit images (SDEdit): noise them, and sample from there with and without guidance. Run again to continue."""
    console.use_json(json_)
    form_ = choice("--format", form, ("png", "npz", "shards"))
    levels = parsed("--level", level, floats, "write noise levels such as 0.5,1,2")
    from ddo_cli.engines.edit import edit as engine
    from ddo_cli.engines.edit import report as edit_report
    from ddo_cli.models import registry
    from ddo_cli.recipe.load import parse_sampling

    flags = {"sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale, "batch": batch}
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    guidance = {"dg_weight": dg_weight, "dg_weight_2nd": dg_weight_2nd, "time_min": time_min, "time_max": time_max}
    found = engine.run(
        source, out, levels, num=num, disc=disc, ckpt=ckpt, guidance=guidance, use_guidance=not no_guidance,
        label=label, seed=seed, form=form_ or "png", sampling=sampling, ref=ref, weights=weights, extractor=extractor,
        force=force, device=device_of(device), dry_run=dry_run,
    )  # fmt: skip
    if dry_run:
        console.result(found, lines_of(found))
        return
    shown = {key: value for key, value in found.items() if key != "levels"}
    console.result(found, lines_of(shown), console.table("Edited images", *edit_report.table(found)))
