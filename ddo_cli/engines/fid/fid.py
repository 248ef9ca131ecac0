"""`ddo fid`: distances and scores of an image set, or of a model's samples, in one pass over the images.

Each number is the one that the metric's own tool prints for the same files: torch-fidelity's FID, IS, KID, precision
and recall, EDM's FID, ADM's sFID. What could make it another one is refused, or said in `warnings`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ddo_cli import console, dist
from ddo_cli.data.inspection import balance
from ddo_cli.engines.fid import inputs as fid_inputs
from ddo_cli.engines.fid import one_pass
from ddo_cli.engines.fid import pictures as fid_pictures
from ddo_cli.engines.fid import report as fid_report
from ddo_cli.engines.fid import scores as fid_scores
from ddo_cli.engines.fid.inputs import PUBLISHED_NUM, Opened, Side
from ddo_cli.engines.fid.one_pass import Passed, Source, Wanted
from ddo_cli.engines.fid.scores import MANIFOLD
from ddo_cli.errors import DdoError, UsageError
from ddo_cli.metrics.extractors.base import Extractor, Precision
from ddo_cli.metrics.extractors.select import select_extractor
from ddo_cli.metrics.inception_score import SPLITS
from ddo_cli.metrics.likelihood_histogram import FeatureGaussian
from ddo_cli.metrics.manifold import K_DENSITY
from ddo_cli.recipe.schema import nearest as nearest_name

DEFAULT_REFERENCE = "embedded:digits32"
MAIN = "fid"  # network of the metrics without one of their own
OWN_NETWORK = ("fd_dinov2", "fd_clip")  # metrics with an extractor of their own
METRICS = ("fid", "sfid", "is", "kid", *MANIFOLD, *OWN_NETWORK)
CHUNKS = 10  # of the jackknife
KID_SUBSET = 1000  # images of a subset


class Options(NamedTuple):
    """What is measured, and how.

    metrics: of METRICS; weights: a file of the main extractor (of the sole one, where one is asked for), or files by
    `metrics.weights.Network`; extractor, precision, download: as `select_extractor` takes them; num: images to use;
    repeat: ranges of seeds scored apart; workers: processes that decode, None as suits the images; uncertainty:
    standard error and limit of the FID; per_class: an FID of each class; adm: ADM's protocol of the IS; nearest:
    pictures of so many images closest to the reference's; nll: further sets of the histogram of likelihoods, () for
    the scored set alone, None for none; pictures: directory of both; cache: what passes over the same images have left
    is used, and kept for others; sampling: of a model's images.
    """

    metrics: tuple[str, ...] = ("fid",)
    weights: str | Mapping[str, str] | None = None
    extractor: str | None = None
    precision: Precision = "float32"
    download: bool = False
    num: int | None = None
    repeat: int = 1
    batch: int = 256
    workers: int | None = None
    uncertainty: bool = False
    per_class: bool = False
    adm: bool = False
    nearest: int = 0
    nll: tuple[str, ...] | None = None
    cache: bool = True
    pictures: Path = Path("fid-pictures")
    sampling: dict[str, Any] | None = None


def run(
    source: str,
    ref: str | None = None,
    options: Options | None = None,
    *,
    device: torch.device,
    benchmark: str | None = None,
    log: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """The figures by metric, with what they are of and what speaks against comparing them.

    source: images that `open_stream` reads, a run directory or a weight file; ref: images or statistics, see
    `metrics.references`; None: the embedded digits. benchmark: whose published figures stand beside; log: a CSV file
    that gets a row. Images are shared out over the processes that torchrun started.
    Raises DataError, CheckpointError or UsageError for what cannot be used, before the first network pass where it can.
    What cannot be drawn or written after it costs no figure: `not_written` says what, and why.
    """
    options = options or Options()
    _check(options)
    # All is opened before the first network pass, so that a mistake costs no wait.
    compared = [fid_inputs.comparable(other) for other in options.nll or ()]
    extractors = _extractors(options, device)
    name = ref or DEFAULT_REFERENCE
    sources = fid_inputs.open_sources(source, options.num, options.repeat, options.sampling or {}, device)
    wanted = [_wanted(options, extractor) for extractor in extractors]
    opened = fid_inputs.open_reference(name, wanted) if any(_needs_reference(one) for one in wanted) else None
    fid_report.check(log, benchmark, options.pictures if options.nearest or options.nll is not None else None)
    _check_numbers(options, sources, opened)
    warnings = _warnings(source, sources, opened, extractors)
    for warning in warnings:
        console.warn(warning)
    main = extractors[0]
    found: dict[str, Any] = {
        "source": source,
        "num_images": sources[0].num,
        "extractor": main.name,
        "extractor_sha256": main.sha256,
        "reference": name if opened is not None else None,
    }
    if dry_run:
        return {**found, "dry_run": True, "metrics": list(options.metrics), "warnings": warnings}
    sides = _sides(opened, wanted, options, device)
    wanted = [_with_gaussian(one, side, options) for one, side in zip(wanted, sides, strict=True)]
    started, repeats, kept = time.monotonic(), list[dict[str, Any]](), 0
    for number, one in enumerate(sources, 1):
        title = source if options.repeat == 1 else f"{source} {number}/{options.repeat}"
        last = one_pass.run(one, wanted, options.batch, options.workers, device, title, cache=options.cache)
        kept += one.num if last.is_kept else 0
        warnings += _inspected(source, last)
        taken = last.taken if dist.is_main() else []
        figures = partial(fid_scores.of_set, taken, sides[: len(taken)], options.metrics, options.uncertainty)
        repeats.append(dist.from_main(one_pass.together(figures)))
    passed = sum(one.num for one in sources) - kept
    found |= fid_report.summary(repeats)
    found |= {
        "images_per_second": round(passed / max(time.monotonic() - started, 1e-9), 1) if passed else None,
        "images_from_cache": kept,
        "content_digest": last.inspection.digest(),
    }
    failed = list[str]()
    with _noting(failed, f"--pictures {options.pictures}"):
        found |= _pictures(sources[-1], last, sides[0], wanted[0], compared, options, device)
    found |= {"warnings": warnings, "comparable": not warnings and _is_published(extractors)}
    found |= {"protocol": {extractor.key: extractor.protocol() for extractor in extractors}}
    if benchmark is not None:
        found |= fid_report.published(benchmark, found)
    found["markdown"] = fid_report.markdown(found)
    if log is not None:
        with _noting(failed, f"--csv {log}"):
            one_pass.together(lambda: fid_report.append(log, found) if dist.is_main() else None)
    return {**found, **({"not_written": failed} if failed else {})}


# ---------------------------------------------------------------------------------------------------------------------
# Before the pass


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


def _check_numbers(options: Options, sources: Sequence[Source], opened: Opened | None) -> None:
    """Raises UsageError for sets too small for a metric: after the pass, one process would fail and others wait."""
    needed = {"kid": KID_SUBSET, "is": SPLITS} | dict.fromkeys(MANIFOLD, K_DENSITY + 1)
    sets = [(sources[0].name, sources[0].num)]
    if opened is not None and opened.stream is not None:
        sets.append((opened.name, opened.stream.num))
    for metric in options.metrics:
        for name, num in sets[: 1 if metric == "is" else None]:
            if num < needed.get(metric, 2):
                raise UsageError(
                    f"{name}: {num} images are too few for the metric '{metric}', which needs {needed[metric]}"
                )
    if options.nearest and opened is not None and opened.stream is None:
        raise UsageError(
            f"--nearest needs the images of the reference, and {opened.name} holds statistics; give images"
        )
    if options.per_class and opened is not None and opened.stream is not None:
        one, classes = sources[0], opened.stream.num_classes
        if one.num_classes != classes or (one.labels < 0).any():
            raise UsageError(
                f"--per-class needs a label of each image, of the {classes} classes of {opened.name}; {one.name} has "
                f"labels of {one.num_classes} classes for {int((one.labels >= 0).sum())} of {one.num} images"
            )
    if options.uncertainty and sources[0].num < 2 * CHUNKS:
        raise UsageError(f"{sources[0].name}: {sources[0].num} images are too few for --uncertainty; give {2 * CHUNKS}")


def _extractors(options: Options, device: torch.device) -> list[Extractor]:
    """The main extractor, where a metric needs it, then one for each metric that has its own."""
    found = []
    own = [metric for metric in options.metrics if metric in OWN_NETWORK]
    rest = [metric for metric in options.metrics if metric not in OWN_NETWORK]
    networks = [*([MAIN] if rest else []), *own]
    files = _weight_files(options, networks)
    given = {**files, **({MAIN: options.extractor} if options.extractor else {})}
    if options.download and set(networks) <= given.keys():
        option = f"--extractor {options.extractor}" if options.extractor else "--weights"
        raise UsageError(f"--download has no effect beside {option}, which needs no download; leave one of them out")
    if rest:
        kind: Literal["fid", "fd_embedded"] = "fd_embedded" if options.extractor else "fid"
        weights = files.get(MAIN)
        found.append(select_extractor(kind, weights, options.extractor, device, options.precision, options.download))
        asked = [*rest, *(["--nll"] if options.nll is not None else [])]
        for metric, output in (("sfid", "spatial"), ("is", "logits"), ("--nll", "spatial")):
            if metric in asked and output not in found[0].outputs:
                name = metric if metric == "--nll" else f"the metric '{metric}'"
                raise UsageError(
                    f"{name} is of Inception-v3, and the extractor is {found[0].name}; give Inception's "
                    "weights with --weights, or leave the metric out"
                )
    for metric in own:
        weights = files.get(metric)
        found.append(select_extractor(metric, weights, None, device, options.precision, options.download))  # type: ignore[arg-type]
    return found


def _weight_files(options: Options, networks: Sequence[str]) -> Mapping[str, str]:
    """The weight files by network, of those that the metrics need. Raises UsageError for a file without effect."""
    if options.weights is None:
        return {}
    if isinstance(options.weights, str):
        return {networks[0] if len(networks) == 1 else MAIN: options.weights}
    for network in options.weights:
        if network not in networks:
            raise UsageError(
                f"--weights {network}={options.weights[network]} has no effect: the metrics "
                f"{','.join(options.metrics)} need the networks {', '.join(networks)}; add a metric of {network}, or "
                "leave the file out"
            )
    return options.weights


def _wanted(options: Options, extractor: Extractor) -> Wanted:
    if extractor.key in OWN_NETWORK:
        return Wanted(extractor, ("pool",))
    metrics = set(options.metrics)
    spatial = "sfid" in metrics or options.nll is not None
    kinds = (("pool",) if "fid" in metrics else ()) + (("spatial",) if spatial else ())
    score: Literal["adm", "torch-fidelity"] = "adm" if options.adm else "torch-fidelity"
    return Wanted(
        extractor,
        moments=kinds,
        chunks=CHUNKS if options.uncertainty else 1,
        score=score if "is" in metrics else None,
        features=bool(metrics & {"kid", *MANIFOLD}) or options.nearest > 0,
        classes=options.per_class,
    )


def _needs_reference(wanted: Wanted) -> bool:
    return bool(wanted.moments) or wanted.features or wanted.classes


def _sides(opened: Opened | None, wanted: Sequence[Wanted], options: Options, device: torch.device) -> list[Side]:
    if opened is None:
        return [Side(None, None, None, None, None) for _ in wanted]
    # Of the reference neither a score nor parts are needed.
    asked = [one._replace(chunks=1, score=None) for one in wanted]
    return fid_inputs.sides(opened, asked, options.batch, options.workers, device, options.cache)


def _with_gaussian(wanted: Wanted, side: Side, options: Options) -> Wanted:
    if options.nll is None or side.spatial is None:
        return wanted
    return wanted._replace(gaussian=FeatureGaussian(side.spatial.mean, side.spatial.cov))


def _warnings(
    source: str, sources: Sequence[Source], opened: Opened | None, extractors: Sequence[Extractor]
) -> list[str]:
    """What speaks against comparing the figures with others, as far as it shows before the pass."""
    one, main = sources[0], extractors[0]
    found = list(few(source, one.num, main))
    if unbalanced := balance(one.labels, one.num_classes):
        found.append(f"{source}: {unbalanced}")
    if one.num_lossy:
        found.append(f"{source}: {one.num_lossy} images are JPEGs or lossy WebPs; compression moves every score")
    for extractor in extractors:
        if extractor.precision != "float32":
            found.append(f"precision {extractor.precision}: the figures are not comparable with those of float32")
        if extractor.key == "fid" and not extractor.is_published:
            found.append(
                "the Inception weights are not the published file: the figures compare only with those of these weights"
            )
    if opened is not None and opened.stream is not None:
        found += few(opened.name, opened.stream.num, main)
        if opened.stream.shape != one.shape:
            found.append(
                f"{source} holds images of shape {one.shape}, {opened.name} of {opened.stream.shape}: both are resized "
                f"({main.resize}), and the difference in resolution is part of the distance"
            )
    return found


def few(name: str, num: int, extractor: Extractor) -> list[str]:
    """A warning where a distance of `num` images means little, or cannot be compared."""
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


def _inspected(source: str, passed: Passed) -> list[str]:
    """What the pass itself has shown."""
    found = passed.inspection.warnings(source)
    for warning in found:
        console.warn(warning)
    return found


def _is_published(extractors: Sequence[Extractor]) -> bool:
    return all(extractor.is_published for extractor in extractors)


# ---------------------------------------------------------------------------------------------------------------------
# After the pass


@contextlib.contextmanager
def _noting(failed: list[str], option: str) -> Iterator[None]:
    """Adds an error's message to `failed` in its place: a pass of hours must not be lost to a full disk at its end."""
    try:
        yield
    except DdoError as error:
        failed.append(str(error))
    except OSError as error:
        failed.append(f"{option} could not be written ({error.strerror or error})")


def _pictures(
    source: Source,
    passed: Passed,
    side: Side,
    wanted: Wanted,
    compared: Sequence[Source],
    options: Options,
    device: torch.device,
) -> dict[str, Any]:
    """Draws what was asked for and returns where it is. Collective."""
    found: dict[str, Any] = {}
    if options.nearest:
        path = options.pictures / "nearest.png"
        draw = partial(fid_pictures.memorised, source, passed, side, options.nearest, path)
        found["nearest"] = dist.from_main(one_pass.together(lambda: draw() if dist.is_main() else None))
    if options.nll is not None:
        path = options.pictures / "likelihoods.png"
        asked = (options.batch, options.workers, device)
        values = fid_pictures.likelihoods(source, passed, compared, wanted, asked, options.cache)
        one_pass.together(lambda: fid_pictures.histograms(values, path) if dist.is_main() else None)
        found["likelihoods"] = str(path)
    return found
