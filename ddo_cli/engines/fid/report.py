"""The output of `ddo fid`: tables with published scores beside them, a CSV row, a Markdown row, and pictures."""

import contextlib
import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddo_cli.data.pictures import spelled
from ddo_cli.engines.fid.cache import Source
from ddo_cli.engines.fid.inputs import Reference, Side
from ddo_cli.engines.fid.one_pass import Taken
from ddo_cli.errors import UsageError, reason
from ddo_cli.files import lock, write_text
from ddo_cli.metrics import published as tables
from ddo_cli.metrics.nearest import nearest as nearest_rows
from ddo_cli.recipe.schema import nearest
from ddo_cli.report import pictures
from ddo_cli.report.numbers import readable

HIGHER_IS_BETTER = ("is", "precision", "recall", "density", "coverage", "clip")
NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "kid": "KID",
    "fd_dinov2": "FD-DINOv2",
    "fd_clip": "FD-CLIP",
    "clip": "CLIP score",
}
DESCRIBED = ("source", "reference", "num_images", "extractor", "extractor_sha256", "comparable", "content_digest")
DETAILS = ("_std", "_std_error", "_min", "_infinity")  # suffixes of keys shown in the row of their score
NEIGHBOURS = 3  # nearest images of the reference that are shown


def summary(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The scores of one set; of several their means, minima as <key>_min (EDM reports these), and all of them."""
    if len(repeats) == 1:
        return dict(repeats[0])
    scores: dict[str, Any] = {}
    for key, value in repeats[0].items():
        values = [repeat[key] for repeat in repeats]
        if isinstance(value, float) and None not in values:
            scores |= {key: sum(values) / len(values), f"{key}_min": min(values)}
        if key.endswith("_per_class"):
            columns = zip(*values, strict=True)
            scores[key] = [None if None in column else sum(column) / len(column) for column in columns]
    return {**scores, "repeats": list(repeats)}


def _scores(result: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result.items() if key != "images_per_second" and isinstance(value, float)}


def table(result: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Metric, value with its spread, and what was published for the same benchmark."""
    scores = _scores(result)
    beside: dict[str, list[str]] = {}
    for figure in result.get("published", {}).get("figures", []):
        evaluations = f", {figure['nfe']} evaluations" if figure["nfe"] else ""
        text = f"{figure['method']} {figure['value']:g} (arXiv {figure['arxiv']}{evaluations})"
        beside.setdefault(figure["metric"], []).append(text)
    rows = list[tuple[str, ...]]()  # of four cells, the last of which is left out where nothing was published
    for key, value in scores.items():
        if any(key.endswith(end) and key.removesuffix(end) in scores for end in DETAILS):
            continue
        spread = next((scores[key + end] for end in ("_std_error", "_std") if key + end in scores), None)
        text = readable(value) + (f" ± {readable(spread, 2)}" if spread is not None else "")
        if (least := scores.get(f"{key}_min")) is not None:
            text += f" (least {readable(least)})"
        if (limit := scores.get(f"{key}_infinity")) is not None:
            text += f", {readable(limit)} for infinitely many images"
        direction = "higher" if key.split("_")[0] in HIGHER_IS_BETTER else "lower"
        rows.append((NAMES.get(key, key), text, direction, "\n".join(beside.get(key, []))))
    for key, values in result.items():
        if key.endswith("_per_class"):
            name = NAMES.get(key.removesuffix("_per_class"), key.removesuffix("_per_class"))
            known = [(number, value) for number, value in enumerate(values) if value is not None]
            rows += [(f"{name} of class {number}", readable(value), "lower", "") for number, value in known]
    columns = ["metric", "value", "better", "published"]
    return (columns, rows) if beside else (columns[:-1], [row[:-1] for row in rows])


def published(benchmark: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The published scores in the metrics that were computed."""
    entry = tables.TABLE[benchmark]  # type: ignore[index]
    kept = [figure._asdict() for figure in entry.figures if figure.metric in result]
    return {"published": {"benchmark": benchmark, "protocol": entry.protocol, "figures": kept}}


def markdown(result: Mapping[str, Any]) -> str:
    """A header and a row of a Markdown table."""
    scores = {key: value for key, value in _scores(result).items() if not key.endswith(("_std", "_std_error"))}
    names = ["samples", "images", *(NAMES.get(key, key) for key in scores)]
    values = [str(result["source"]), str(result["num_images"]), *map(readable, scores.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), values))


# --- The CSV file


def check(log: Path | None, benchmark: str | None, directory: Path | None = None) -> None:
    """Raises UsageError for an unknown benchmark, a file that cannot get a CSV row, a directory not writable."""
    if benchmark is not None and benchmark not in tables.NAMES:
        raise UsageError(
            f"--benchmark {benchmark} is not known{nearest(benchmark, tables.NAMES)}; known: {', '.join(tables.NAMES)}"
        )
    if log is not None and log.is_file():
        _header(log)
    elif log is not None and (log.exists() or not log.parent.is_dir()):
        raise UsageError(f"--csv {log} cannot be written; give a CSV file in a directory that exists")
    if log is not None:
        probe(log.parent, f"--csv {log}")
    if directory is not None:
        probe(next(place for place in (directory, *directory.parents) if place.exists()), f"--pictures {directory}")


def probe(directory: Path, option: str) -> None:
    """Raises UsageError where no file can be created and filled, tried with a nameless temporary one."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UsageError(f"{option} cannot be written ({error.strerror}); choose another place") from None


def append(log: Path, result: Mapping[str, Any]) -> None:
    """Adds a row, and columns where earlier rows lack them. Written whole under another name and renamed."""
    row = {key: str(result.get(key)) for key in DESCRIBED}
    if "resize" in result:
        row["resize"] = spelled(result["resize"])
    row |= {key: repr(value) for key, value in _scores(result).items()}
    place = log.with_name(f".{log.name}.lock")
    with lock(place):
        columns, rows = _header(log) if log.is_file() else ([], [])
        columns += [key for key in row if key not in columns]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
        write_text(log, text.getvalue())
        with contextlib.suppress(OSError):  # Windows cannot remove it; elsewhere a waiting process creates a new one
            place.unlink()


def _header(log: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with open(log, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--csv {log} cannot be read as CSV ({reason(error)}); choose another file") from None
    if columns[:2] != list(DESCRIBED[:2]) or any(None in row for row in rows):
        raise UsageError(f"--csv {log} is no CSV file of `ddo fid`; choose another file")
    return columns, rows


# --- Pictures


def draw_nearest(
    source: Source, taken: Taken, reference: Reference | None, side: Side, count: int, path: Path
) -> dict[str, Any]:
    """Draws the `count` images that are closest to one of the reference, with their nearest there; a row for each rank.

    Returns distances, positions and the picture's path. Raises UsageError where the reference has no images.
    """
    if reference is None or reference.stream is None or side.features is None or taken.features is None:
        raise UsageError("--nearest needs the reference's images, not statistics; give images as --ref")
    fake = taken.features.result()
    neighbours = nearest_rows(fake, side.features.to(fake), NEIGHBOURS)
    order = neighbours.distances[:, 0].argsort()[:count]
    rows = {"generated": images_of(source, order.numpy())}
    for rank in range(NEIGHBOURS):
        rows[f"nearest {rank + 1}"] = images_of(reference.stream, neighbours.rows[order, rank].cpu().numpy())
    pictures.image_rows(rows, path)
    return {
        "rows": order.tolist(),
        "nearest_rows": neighbours.rows[order, 0].tolist(),
        "distances": neighbours.distances[order, 0].tolist(),
        "median_distance": float(neighbours.distances[:, 0].median()),
        "picture": str(path),
    }


def images_of(source: Source, rows: np.ndarray) -> np.ndarray:
    """uint8 (n, C, H, W) in the order of `rows`, which may repeat."""
    images: dict[int, np.ndarray] = {}
    for numbers, batch in source.batches(64, np.unique(rows)):
        images |= dict(zip(numbers.tolist(), batch.numpy(), strict=True))
    return np.stack([images[row] for row in rows.tolist()])


def draw_likelihoods(sets: Mapping[str, Taken], path: Path) -> None:
    """Histograms of each image's negative log-likelihood, nats of sFID's features, by set (DG, Fig. 9)."""
    nats = {name: taken.nll.result() for name, taken in sets.items() if taken.nll is not None}
    pictures.histograms(nats, path, "nats per image under the data's Gaussian (sFID features)")
