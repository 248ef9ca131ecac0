"""Commands that measure: `fid`, `stats`, `analyze`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from typer import Argument, Option

from ddo_cli import console
from ddo_cli.commands import command, completion, options, recipe_options
from ddo_cli.errors import RunError, UsageError

if TYPE_CHECKING:
    import torch


class Metrics(NamedTuple):
    """What is measured."""

    metrics: Annotated[
        str, Option(help="Some of fid, sfid, is, kid, precision, recall, density, coverage, fd_dinov2, fd_clip, clip.")
    ] = "fid"
    uncertainty: Annotated[
        bool, Option("--uncertainty", help="Standard error of the FID, and its limit for N to infinity.")
    ] = False
    per_class: Annotated[bool, Option("--per-class", help="An FID of each class.")] = False
    adm: Annotated[bool, Option("--adm", help="IS as in ADM's suite: chunks of 5000 images.")] = False
    kid_subset: Annotated[
        int | None, Option(min=2, help="Images in each random subset of KID. Default: 1000, as published.")
    ] = None


Mode = Annotated[
    Literal["legacy", "clean"],
    Option(help="How images get Inception's size: as in FID's first code (EDM, ADM, torch-fidelity), or in clean-fid."),
]


class Extractor(NamedTuple):
    """The network that makes the features."""

    weights: Annotated[
        list[str] | None,
        Option(
            help="Inception-v3 weights of torch-fidelity; NAME=PATH for another network (fd_dinov2, fd_clip; clip, a "
            "folder of transformers), may be repeated. Default: those found on this machine, or the embedded extractor."
        ),
    ] = None
    extractor: Annotated[
        str | None,
        Option(help="In place of Inception: of `ddo train-extractor`, TorchScript, or Python (which is run)."),
    ] = None
    download: Annotated[bool, Option("--download", help="Fetch missing published weights.")] = False
    mode: Mode = "legacy"
    precision: Annotated[
        Literal["float32", "tf32", "bf16"],
        Option(help="Scores in tf32 and bf16 are marked as not comparable."),
    ] = "float32"


class Pictures(NamedTuple):
    """Pictures of the nearest images and of likelihoods."""

    nearest: Annotated[
        int, Option(min=0, max=64, help="Draw this many images that lie closest to the reference's.")
    ] = 0
    nll: Annotated[
        bool, Option("--nll", help="Draw a histogram of the features' likelihood under the reference's.")
    ] = False
    compare: Annotated[list[str] | None, Option(help="A further set in this histogram. May be repeated.")] = None
    pictures: Annotated[Path | None, Option(help="Directory of the pictures.", show_default="fid-pictures")] = None


class Passes(NamedTuple):
    """How images pass through the network."""

    batch: options.Batch = 256
    workers: options.Workers = None
    no_cache: Annotated[bool, options.run_option("--no-cache", help="Neither use nor store features.")] = False


@command.add(
    sampling=recipe_options.of_sampling(),
    metrics=Metrics,
    extractor=Extractor,
    pictures=Pictures,
    passes=Passes,
    device=options.device_and_models,
)
def fid(
    sampling: dict[str, Any],
    metrics: Metrics,
    extractor: Extractor,
    pictures: Pictures,
    passes: Passes,
    device: "torch.device",
    source: Annotated[
        str,
        Argument(
            autocompletion=completion.weights,
            help="Images (folder, zip, npz, sample set), or a run directory or weight file to draw them.",
        ),
    ],
    ref: Annotated[
        str | None, Option(help="Images, or statistics of EDM, EDM2, ADM or `ddo stats`. Default: embedded:digits16.")
    ] = None,
    num_images: Annotated[int | None, Option(min=2, help="Images to use or to draw. Default: all, or 50000.")] = None,
    resize: options.Resize = None,
    repeat: Annotated[int, Option(min=1, max=100, help="Number of seed ranges, each with its own score.")] = 1,
    benchmark: Annotated[str | None, Option(help="Show published results, e.g. of cifar10-uncond.")] = None,
    csv: Annotated[Path | None, Option(help="CSV file to which a row is appended.")] = None,
    report_: Annotated[
        Path | None, Option("--report", help="Write a page with scores, protocol and images, e.g. scores.html.")
    ] = None,
    dry_run: options.DryRun = False,
) -> command.Result:
    """Fréchet distance between a set of images and a reference, and related metrics: IS, KID, precision, recall, ..."""
    if pictures.compare and not pictures.nll:
        raise UsageError("--compare adds a set to the histogram of --nll; give both")
    if pictures.pictures is not None and not (pictures.nearest or pictures.nll):
        raise UsageError(f"--pictures {pictures.pictures} has no effect without --nearest or --nll; add one of them")
    from ddo_cli.data.pictures import spelled
    from ddo_cli.engines.fid import fid, report
    from ddo_cli.metrics.extractors.weights import by_network

    asked = fid.Options(
        metrics=tuple(name.strip() for name in metrics.metrics.split(",")), uncertainty=metrics.uncertainty,
        per_class=metrics.per_class, adm=metrics.adm, kid_subset=metrics.kid_subset,
        weights=by_network(extractor.weights or []),
        extractor=extractor.extractor, precision=extractor.precision, download=extractor.download, mode=extractor.mode,
        num=num_images,
        repeat=repeat, nearest=pictures.nearest, nll=tuple(pictures.compare or ()) if pictures.nll else None,
        pictures=pictures.pictures or Path("fid-pictures"), batch=passes.batch, workers=passes.workers,
        cache=not passes.no_cache, sampling=sampling, resize=options.size_of("--resize", resize),
    )  # fmt: skip
    figures = fid.run(source, ref, asked, device=device, benchmark=benchmark, log=csv, report=report_, dry_run=dry_run)
    if dry_run:
        return command.Result(figures)
    lines = ("reference", "extractor", "extractor_sha256", "images_per_second", "images_from_cache", "comparable")
    shown = {key: figures[key] for key in (*lines, "nearest", "likelihoods") if figures.get(key) is not None}
    resized = f", resized ({spelled(figures['resize'])})" if "resize" in figures else ""
    table = console.table(f"{source}: {figures['num_images']:,} images{resized}", *report.table(figures))
    error = None
    if "not_written" in figures:
        missing = "; ".join(figures["not_written"])
        error = RunError(f"the figures above are whole, but {missing}; mend that and run it again")
    return command.Result(figures, shown, table, f"\n\n{figures['markdown']}", error)


@command.add(device=options.device_of)
def stats(
    device: "torch.device",
    data: options.Images,
    out: Annotated[Path, Option(help="The .safetensors file to write, for --ref of `ddo fid`.")],
    metric: Annotated[
        Literal["fid", "fd_dinov2", "fd_clip", "fd_embedded"] | None, Option(help="Whose features are used.")
    ] = None,
    weights: Annotated[str | None, Option(help="Weights of the published network. Default: those found here.")] = None,
    extractor: Annotated[
        str | None, Option(help="An extractor of `ddo train-extractor` or your own, in place of a published one.")
    ] = None,
    features: Annotated[
        bool, Option("--features", help="Store the features of each image: KID, precision and recall need them.")
    ] = False,
    mode: Mode = "legacy",
    num_images: options.NumImages = None,
    resize: options.Resize = None,
    batch: options.Batch = 256,
    dry_run: options.DryRun = False,
) -> dict[str, Any]:
    """Statistics of an image set, computed once as the reference of many scores."""
    from ddo_cli.engines.fid import stats

    metric = metric or ("fd_embedded" if extractor else "fid")
    return stats.run(
        data, out, metric=metric, weights=weights, extractor=extractor, features=features, mode=mode, num=num_images,
        resize=options.size_of("--resize", resize), batch=batch, device=device, dry_run=dry_run,
    )  # fmt: skip


class Analyses(NamedTuple):
    """Which analyses are made, and their settings."""

    what: Annotated[
        str | None,
        Option(help="Some of gain, trajectory, nfe, regeneration, density, or all. Default: the quick ones."),
    ] = None
    num_images: Annotated[int | None, Option(min=2, help="nfe: images per score.", show_default="1024")] = None
    steps_list: Annotated[str | None, Option(help="nfe: numbers of sampling steps.", show_default="4,6,8,12,18")] = None
    noise_level: Annotated[
        float | None, Option(help="regeneration: noise level; pixels lie in [-1, 1].", show_default="1.0")
    ] = None
    regenerations: Annotated[int | None, Option(min=1, help="regeneration: repeats per image.", show_default="100")] = (
        None
    )

    def check(self, on_request: Sequence[str]) -> None:
        """Raises UsageError for a setting of an analysis that is not made. on_request: those not made by default."""
        asked = None if self.what is None else {name.strip() for name in self.what.split(",")}
        for option, value in list(self._asdict().items())[1:]:
            analysis = "nfe" if option in ("num_images", "steps_list") else "regeneration"
            if value is not None and (analysis in on_request if asked is None else not asked & {analysis, "all"}):
                raise UsageError(
                    f"--{option.replace('_', '-')} {value} is of the analysis '{analysis}', and has no effect on "
                    f"{f'--what {self.what}' if asked else 'the analyses that are done without --what'}; add "
                    f"{analysis} to --what, or leave the option out"
                )


@command.add(
    discriminator=options.Pair,
    analyses=Analyses,
    guidance=recipe_options.of_guidance("dg_weight", "dg_weight_2nd", "time_min", "time_max"),
    sampling=recipe_options.of_sampling("sampler", "steps", "s_churn", "cfg_scale", "batch", "precision", "compile"),
    device=options.device_and_models,
)
def analyze(
    discriminator: options.Pair,
    analyses: Analyses,
    guidance: dict[str, Any],
    sampling: dict[str, Any],
    device: "torch.device",
    data: Annotated[
        str | None, Option(help="Real images not trained on. Default: `ddo train-disc`'s held-out ones.")
    ] = None,
    out: Annotated[Path, Option(help="Directory of the pictures and figures.")] = Path("analysis"),
    dry_run: options.DryRun = False,
) -> command.Result:
    """Measure what a discriminator's guidance does to a model: its gain in nats, trajectories, regenerated images."""
    steps = options.parsed(
        "--steps-list", analyses.steps_list, options.numbers, "write numbers of steps such as 4,8,18"
    )
    from ddo_cli.engines.analysis import analyze

    analyses.check(analyze.ON_REQUEST)
    settings: dict[str, Any] = {
        "num": analyses.num_images, "steps_list": steps and tuple(steps), "noise_level": analyses.noise_level,
        "regenerations": analyses.regenerations,
    }  # fmt: skip
    typed = analyze.Settings(**{key: value for key, value in settings.items() if value is not None})
    figures = analyze.run(
        discriminator.disc, discriminator.ckpt, out, what=analyses.what, data=data, settings=typed,
        sampling=sampling, guidance=guidance, force=discriminator.force, device=device, dry_run=dry_run,
    )  # fmt: skip
    table = None
    if "gain" in figures:
        table = console.table("Gain by noise level", *analyze.table_of(Path(figures["out"])))
    return command.Result(figures, table=table)


def report(
    directory: Annotated[Path, Argument(help="Directory that finetune-ddo, pretrain, train-disc, analyze ... filled.")],
    out: Annotated[
        Path | None, Option(help="The page to write. Default: report.html in the directory; needed while it is in use.")
    ] = None,
) -> dict[str, Any]:
    """Write a run's page anew, from what it has left so far: one HTML file, to be opened in any browser."""
    from ddo_cli.engines import report

    return report.run(directory, out)
