"""`ddo fid`: distances and scores of an image set, or of a model's samples, in one pass over the images.

Each number equals the one that the metric's own tool prints for the same files: torch-fidelity's FID, IS, KID,
precision and recall, EDM's FID, ADM's sFID. What would change a number is refused, or reported in `warnings`.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ddo_cli import console
from ddo_cli.data.inspection import balance
from ddo_cli.data.pictures import Preparation
from ddo_cli.data.stream import ImageStream
from ddo_cli.engines.fid import inputs as fid_inputs
from ddo_cli.engines.fid import one_pass
from ddo_cli.engines.fid import page as fid_page
from ddo_cli.engines.fid import report as fid_report
from ddo_cli.engines.fid import scores as fid_scores
from ddo_cli.engines.fid.cache import Source
from ddo_cli.engines.fid.inputs import PUBLISHED_NUM, Reference, Side
from ddo_cli.engines.fid.one_pass import Wanted, on_main
from ddo_cli.engines.fid.scores import MANIFOLD
from ddo_cli.errors import DdoError, UsageError, printable
from ddo_cli.metrics.extractors import clip_text
from ddo_cli.metrics.extractors.base import Extractor, Mode, Precision
from ddo_cli.metrics.extractors.select import select_extractor
from ddo_cli.metrics.inception_score import SPLITS
from ddo_cli.metrics.likelihood_histogram import FeatureGaussian
from ddo_cli.metrics.manifold import K_DENSITY
from ddo_cli.recipe.load import differing_keys
from ddo_cli.recipe.schema import nearest as nearest_name

DEFAULT_REFERENCE = "embedded:digits16"
MAIN = "fid"  # the network shared by all metrics but those of OWN_NETWORK
OWN_NETWORK = ("fd_dinov2", "fd_clip", clip_text.KEY)  # metrics with an extractor of their own
METRICS = ("fid", "sfid", "is", "kid", *MANIFOLD, *OWN_NETWORK)
CHUNKS = 10  # of the jackknife
KID_SUBSET = 1000  # images per subset, as published


class Options(NamedTuple):
    """What is measured, and how."""

    metrics: tuple[str, ...] = ("fid",)  # of METRICS
    # A file of the main extractor (of the only one, where there is one), or files by `metrics.weights.NAMES`.
    weights: str | Mapping[str, str] | None = None
    extractor: str | None = None  # this one, `precision` and `download` as for `select_extractor`
    precision: Precision = "float32"
    download: bool = False
    mode: Mode = "legacy"  # how images get Inception's size
    num: int | None = None  # images to use, or to draw
    repeat: int = 1  # ranges of seeds, each scored by itself
    resize: tuple[int, int] | None = None  # width and height of images of mixed sizes; None: they are of one size
    batch: int = 256
    workers: int | None = None  # processes that decode; None: chosen for the source
    uncertainty: bool = False  # standard error of the FID and its limit for infinitely many images
    per_class: bool = False  # an FID of each class
    adm: bool = False  # ADM's protocol of the Inception Score
    kid_subset: int | None = None  # images in each random subset of KID; None: KID_SUBSET
    nearest: int = 0  # how many generated images, those closest to the reference's, are drawn
    nll: tuple[str, ...] | None = None  # further sets in the histogram of likelihoods; None: no histogram
    cache: bool = True  # reuse what earlier passes over the same images have computed, and keep what this one does
    pictures: Path = Path("fid-pictures")
    sampling: dict[str, Any] | None = None  # for images that a model draws


def run(
    source: str | ImageStream,
    ref: str | ImageStream | None = None,
    options: Options | None = None,
    *,
    device: torch.device,
    benchmark: str | None = None,
    log: Path | None = None,
    report: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """The scores by metric, what they were computed from, and what speaks against comparing them.

    source: images that `open_stream` reads, a run directory or a weight file; ref: images or statistics, see
    `metrics.references`; None: the embedded digits. Images may be in memory: see `data.stream.of_array`.
    benchmark: whose published figures are shown beside the scores; log: a CSV file that gets a row; report: a page.
    Images are shared out over the processes that torchrun started.
    Raises DataError, CheckpointError or UsageError for bad inputs, before the first network pass where that is
    possible. What cannot be drawn or written afterwards is listed in `not_written`, and the scores are returned.
    """
    options = options or Options()
    _check(options)
    _check_mode(ref if isinstance(ref, str) else "", options.mode)
    preparation = Preparation(*options.resize) if options.resize else None
    # Everything is opened before the first network pass, so that a mistake costs no wait.
    compared = [fid_inputs.comparable(other, None, preparation) for other in options.nll or ()]
    extractors = _extractors(options, device)
    sources = fid_inputs.open_sources(source, options.num, options.repeat, options.sampling or {}, device, preparation)
    source = source if isinstance(source, str) else source.name
    wanted = [_wanted(options, extractor) for extractor in extractors]
    captions = fid_inputs.captions_of(sources[0]) if wanted[-1].captions else ()
    reference = None
    compared_with = [of_one for of_one in wanted if of_one.has_reference]
    if compared_with:
        reference = fid_inputs.open_reference(ref or DEFAULT_REFERENCE, compared_with, preparation)
    fid_report.check(log, benchmark, options.pictures if options.nearest or options.nll is not None else None)
    fid_page.check(report)
    _check_numbers(options, sources[0], reference)
    warnings = _warnings(source, sources[0], reference, extractors, options.per_class)
    if reference is not None:
        warnings += fid_inputs.resized_otherwise(reference, preparation)
    if (options.kid_subset or KID_SUBSET) != KID_SUBSET:
        warnings.append(
            f"KID of subsets of {options.kid_subset} images: its mean has more noise than the published ones, of "
            f"{KID_SUBSET}"
        )
    _warned(warnings)
    result: dict[str, Any] = {
        "source": source, "num_images": sources[0].num,
        "extractor": extractors[0].name, "extractor_sha256": extractors[0].sha256,
        "reference": None if reference is None else reference.name,
        **({"resize": preparation.protocol} if preparation else {}),
    }  # fmt: skip
    if dry_run:
        return {**result, "dry_run": True, "metrics": list(options.metrics), "warnings": warnings}

    networks = ", ".join(extractor.name for extractor in extractors)
    console.info(f"{sources[0].num:,} images, features of {networks} on {extractors[0].device}")
    accumulate = partial(one_pass.run, batch=options.batch, workers=options.workers, device=device, cache=options.cache)
    sides = [Side({}) for _ in wanted]
    if reference is not None:
        found, of_reference = fid_inputs.sides(reference, compared_with, options.batch, accumulate)
        sides[: len(found)] = found
        warnings += _warned(of_reference.warnings(reference.name) if of_reference is not None else [])
    if options.nll is not None:
        spatial = sides[0].moments["spatial"]
        wanted[0] = wanted[0]._replace(gaussian=FeatureGaussian(spatial.mean, spatial.cov))

    subset = options.kid_subset or KID_SUBSET
    started, repeats, num_cached = time.monotonic(), list[dict[str, Any]](), 0
    for number, images in enumerate(sources, 1):
        title = source if options.repeat == 1 else f"{source} {number}/{options.repeat}"
        passed = accumulate(images, wanted, title)
        texts = [captions[label] for label in images.labels.tolist()] if captions else []
        num_cached += images.num if passed.is_cached else 0
        warnings += _warned(passed.inspection.warnings(source))
        repeats.append(
            on_main(
                partial(fid_scores.of_set, passed.taken, sides, options.metrics, options.uncertainty, subset, texts)
            )
        )
    num_computed = sum(images.num for images in sources) - num_cached
    seconds = max(time.monotonic() - started, 1e-9)
    result |= {
        **fid_report.summary(repeats),
        "images_per_second": round(num_computed / seconds, 1) if num_computed else None,
        "images_from_cache": num_cached,
        "content_digest": passed.inspection.digest(),
    }

    failed = list[str]()
    with _noting(failed, f"--pictures {options.pictures}"):
        if options.nearest:
            path = options.pictures / "nearest.png"
            draw = partial(fid_report.draw_nearest, images, passed.taken[0], reference, sides[0], options.nearest, path)
            result["nearest"] = on_main(draw)
        if options.nll is not None:
            path = options.pictures / "likelihoods.png"
            only_nll = Wanted(extractors[0], gaussian=wanted[0].gaussian)
            taken = {images.name: passed.taken[0]}
            taken |= {other.name: accumulate(other, [only_nll], other.name).taken[0] for other in compared}
            on_main(partial(fid_report.draw_likelihoods, taken, path))
            result["likelihoods"] = str(path)
    result |= {
        "warnings": warnings,
        "comparable": not warnings and all(extractor.is_published for extractor in extractors),
        "protocol": {extractor.key: extractor.protocol() for extractor in extractors},
    }
    if benchmark is not None:
        result |= fid_report.published(benchmark, result)
    result["markdown"] = fid_report.markdown(result)
    if log is not None:
        with _noting(failed, f"--csv {log}"):
            on_main(partial(fid_report.append, log, result))
    if report is not None:
        with _noting(failed, f"--report {report}"):
            on_main(partial(fid_page.write, report, result, images))
    return {**result, **({"not_written": failed} if failed else {})}


@contextlib.contextmanager
def _noting(failed: list[str], option: str) -> Iterator[None]:
    """Adds an error's message to `failed` instead of raising it: a full disk must not lose a pass of hours."""
    try:
        yield
    except DdoError as error:
        failed.append(str(error))
    except OSError as error:
        failed.append(f"{option} could not be written ({error.strerror or error})")


# --- What the options ask for


def _check(options: Options) -> None:
    for metric in options.metrics:
        if metric not in METRICS:
            raise UsageError(
                f"--metrics {metric} is not known{nearest_name(metric, METRICS)}; use some of {', '.join(METRICS)}"
            )
    if len(set(options.metrics)) < len(options.metrics) or not options.metrics:
        raise UsageError(f"--metrics {','.join(options.metrics)} must name one or more different metrics")
    if (options.uncertainty or options.per_class) and "fid" not in options.metrics:
        raise UsageError("--uncertainty and --per-class are of the metric fid; add it to --metrics")
    if options.kid_subset and "kid" not in options.metrics:
        raise UsageError(f"--kid-subset {options.kid_subset} is of the metric kid; add it to --metrics")
    if options.adm and "is" not in options.metrics:
        raise UsageError(
            f"--adm is a protocol of the metric 'is', and has no effect on --metrics {','.join(options.metrics)}; add "
            "it, or leave --adm out"
        )
    if options.extractor and set(options.metrics) <= set(OWN_NETWORK):
        raise UsageError(
            f"--extractor {options.extractor} has no effect: --metrics {','.join(options.metrics)} have networks of "
            "their own; leave it out"
        )
    if (options.nearest or options.nll is not None) and set(options.metrics) <= set(OWN_NETWORK):
        raise UsageError("--nearest and --nll use features of the main extractor; add one of its metrics, e.g. fid")


def _check_mode(ref: str, mode: Mode) -> None:
    """Raises UsageError for clean-fid's statistics of another mode, which only their name tells."""
    name = Path(ref).name.lower()
    told: Mode | None = "clean" if "_clean_" in name else "legacy" if "_legacy_" in name else None
    if name.endswith(".npz") and told not in (None, mode):
        remedy = "add --mode clean" if told == "clean" else "leave --mode clean out"
        raise UsageError(
            f"--ref {ref} has by its name the statistics of clean-fid's mode {told}; {remedy}, or rename it"
        )


def _extractors(options: Options, device: torch.device) -> list[Extractor]:
    """The main extractor, where a metric needs it, then one for each metric that has its own."""
    of_main = [metric for metric in options.metrics if metric not in OWN_NETWORK]
    own = [metric for metric in options.metrics if metric in OWN_NETWORK]
    networks = [*([MAIN] if of_main else []), *sorted(own, key=lambda metric: metric == clip_text.KEY)]  # last
    files = _weight_files(options, networks)
    if options.download and set(networks) <= files.keys() | ({MAIN} if options.extractor else set()):
        option = f"--extractor {options.extractor}" if options.extractor else "--weights"
        raise UsageError(f"--download has no effect beside {option}, which needs no download; leave one of them out")
    extractors: list[Extractor] = []
    for network in networks:
        extractor = options.extractor if network == MAIN else None
        metric: Any = "fd_embedded" if extractor else network
        weights = files.get(network)
        if network == clip_text.KEY:
            extractors.append(clip_text.load(weights, device, options.precision))
            continue
        mode: Mode = options.mode if network == MAIN else "legacy"
        extractors.append(
            select_extractor(metric, weights, extractor, device, options.precision, options.download, mode)
        )
    needs = {"sfid": ("the metric 'sfid'", "spatial"), "is": ("the metric 'is'", "logits")}
    needed = [needs[metric] for metric in needs if metric in of_main]
    if options.nll is not None:
        needed.append(("--nll", "spatial"))
    for what, output in needed:
        if output not in extractors[0].outputs:
            if options.mode == "clean":
                raise UsageError(f"{what} is not defined with --mode clean; leave one of them out")
            raise UsageError(
                f"{what} is of Inception-v3, and the extractor is {extractors[0].name}; give Inception's "
                "weights with --weights, or leave the metric out"
            )
    return extractors


def _weight_files(options: Options, networks: Sequence[str]) -> Mapping[str, str]:
    """Weight files by network. Raises UsageError for a file that no metric needs."""
    if options.weights is None:
        return {}
    if isinstance(options.weights, str):
        return {networks[0] if len(networks) == 1 else MAIN: options.weights}
    for network, file in options.weights.items():
        if network not in networks:
            raise UsageError(
                f"--weights {network}={file} has no effect: the metrics {','.join(options.metrics)} need the networks "
                f"{', '.join(networks)}; add a metric of {network}, or leave the file out"
            )
    return options.weights


def _wanted(options: Options, extractor: Extractor) -> Wanted:
    if extractor.key == clip_text.KEY:
        return Wanted(extractor, features=True, captions=True)
    if extractor.key in OWN_NETWORK:
        return Wanted(extractor, ("pool",))
    metrics = set(options.metrics)
    score: Literal["adm", "torch-fidelity"] = "adm" if options.adm else "torch-fidelity"
    kinds = {"pool": "fid" in metrics, "spatial": "sfid" in metrics or options.nll is not None}
    return Wanted(
        extractor,
        moments=tuple(kind for kind, is_needed in kinds.items() if is_needed),
        chunks=CHUNKS if options.uncertainty else 1,
        score=score if "is" in metrics else None,
        features=bool(metrics & {"kid", *MANIFOLD}) or options.nearest > 0,
        classes=options.per_class,
    )


# --- Checks of the images


def _check_numbers(options: Options, images: Source, reference: Reference | None) -> None:
    """Raises UsageError for sets too small for a metric: after the pass, one process would fail and others wait."""
    stream = reference.stream if reference is not None else None
    subset = options.kid_subset or KID_SUBSET
    needed = {"kid": subset, "is": SPLITS} | dict.fromkeys(MANIFOLD, K_DENSITY + 1)
    sets = [(images.name, images.num)]
    if reference is not None and stream is not None:
        sets.append((reference.name, stream.num))
    for metric in options.metrics:
        for name, num in sets[: 1 if metric == "is" else None]:
            if num < needed.get(metric, 2):
                smaller = f", or --kid-subset {max(num // 2, 2)}" if metric == "kid" else ""
                raise UsageError(
                    f"{name}: {num} images are too few for the metric '{metric}', which needs {needed[metric]}; give "
                    f"more{smaller}"
                )
    if options.nearest and reference is not None and stream is None:
        raise UsageError(
            f"--nearest needs the images of the reference, and {reference.name} holds statistics; give images"
        )
    if options.per_class and reference is not None and stream is not None:
        num_labels = int((images.labels >= 0).sum())
        if images.num_classes != stream.num_classes or num_labels < images.num:
            raise UsageError(
                f"--per-class needs a label of each image, of the {stream.num_classes} classes of {reference.name}; "
                f"{images.name} has labels of {images.num_classes} classes for {num_labels} of {images.num} images"
            )
        ours, theirs = dict(getattr(images, "classes", {})), dict(stream.classes)
        if ours and theirs and (lines := differing_keys(ours, theirs)):
            raise UsageError(
                f"--per-class: classes of {images.name} have other names than those of {reference.name} (there -> "
                f"here): {printable('; '.join(lines), 80)}; give folders of the same names"
            )
    if options.uncertainty and images.num < 2 * CHUNKS:
        raise UsageError(f"{images.name}: {images.num} images are too few for --uncertainty; give {2 * CHUNKS}")


def _warnings(
    source: str, images: Source, reference: Reference | None, extractors: Sequence[Extractor], per_class: bool
) -> list[str]:
    """What speaks against comparing the scores with others, as far as it shows before the pass."""
    main = extractors[0]
    warnings = few(source, images.num, main)
    is_of_classes = not fid_inputs.texts_of(images)
    if is_of_classes and (unbalanced := balance(images.labels, images.num_classes)):
        warnings.append(f"{source}: {unbalanced}")
    warnings += images.warnings
    if per_class and images.num_classes and (least := int(np.bincount(images.labels[images.labels >= 0]).min())):
        warnings += few(f"{source}, smallest class", least, main)
    if images.num_lossy:
        warnings.append(f"{source}: {images.num_lossy} images are JPEGs or lossy WebPs; compression moves every score")
    for extractor in extractors:
        if extractor.precision != "float32":
            warnings.append(f"precision {extractor.precision}: the figures are not comparable with those of float32")
        if extractor.key == "fid" and not extractor.is_published:
            warnings.append(
                "the Inception weights are not the published file: the figures compare only with those of these weights"
            )
    if reference is not None and reference.stream is not None:
        stream = reference.stream
        warnings += [*few(reference.name, stream.num, main), *stream.warnings]
        if stream.num_lossy:
            warnings.append(
                f"reference {reference.name}: {stream.num_lossy} images are JPEGs or lossy WebPs; compare only with "
                "scores against the same files"
            )
        if reference.stream.shape != images.shape:
            warnings.append(
                f"{source} holds images of shape {images.shape}, {reference.name} of {reference.stream.shape}: both "
                f"are resized ({main.resize}), and the difference in resolution is part of the distance"
            )
    return warnings


def _warned(warnings: list[str]) -> list[str]:
    """The warnings, shown."""
    for warning in warnings:
        console.warn(warning)
    return warnings


def few(name: str, num: int, extractor: Extractor) -> list[str]:
    """A warning where a distance of `num` images means little, or cannot be compared."""
    if extractor.key == clip_text.KEY:  # a mean over images
        return []
    if num <= extractor.num_features:
        return [
            f"{name}: {num} images for {extractor.num_features} features leave the covariance rank-deficient, and the "
            "distance far too large; use more images"
        ]
    if extractor.key == "fid" and num < PUBLISHED_NUM:
        return [
            f"{name}: {num} images; published FIDs use {PUBLISHED_NUM}, and with fewer the FID is larger; compare it "
            "only with FIDs of as many images"
        ]
    return []
