"""How the figures of `ddo fid` leave it: tables, published figures beside them, a CSV row and a Markdown row."""

from __future__ import annotations

import contextlib
import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ddo_cli.errors import UsageError
from ddo_cli.files import write_text
from ddo_cli.metrics import published as tables
from ddo_cli.recipe.schema import nearest

HIGHER_IS_BETTER = ("is", "precision", "recall", "density", "coverage")
NAMES = {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID", "fd_dinov2": "FD-DINOv2", "fd_clip": "FD-CLIP"}
DESCRIBED = ("source", "reference", "num_images", "extractor", "extractor_sha256", "comparable", "content_digest")
NOT_FIGURES = {
    *DESCRIBED,
    "images_per_second",
    "repeats",
    "warnings",
    "protocol",
    "markdown",
    "published",
    "pictures",
    "not_written",
}


def summary(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one set; of several their means, with the least as <key>_min, as EDM reports it, and each."""
    if len(repeats) == 1:
        return dict(repeats[0])
    found: dict[str, Any] = {}
    for key, value in repeats[0].items():
        values = [one[key] for one in repeats]
        if isinstance(value, float) and None not in values:
            found |= {key: sum(values) / len(values), f"{key}_min": min(values)}
        if key.endswith("_per_class"):
            columns = zip(*values, strict=True)
            found[key] = [None if None in column else sum(column) / len(column) for column in columns]
    return {**found, "repeats": list(repeats)}


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the results, in their order."""
    return {key: value for key, value in found.items() if key not in NOT_FIGURES and isinstance(value, float)}


def table(found: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Metric, value with its spread, and what was published for the same benchmark."""
    numbers = figures(found)
    beside: dict[str, list[str]] = {}
    for figure in found.get("published", {}).get("figures", []):
        evaluations = f", {figure['nfe']} evaluations" if figure["nfe"] else ""
        text = f"{figure['method']} {figure['value']:g} (arXiv {figure['arxiv']}{evaluations})"
        beside.setdefault(figure["metric"], []).append(text)
    rows = list[tuple[str, ...]]()
    for key, value in numbers.items():
        if key.endswith(("_std", "_std_error", "_min", "_infinity")) and key.rpartition("_")[0] in numbers:
            continue
        if key.endswith("_std_error"):
            continue
        spread = next((numbers[key + end] for end in ("_std_error", "_std") if key + end in numbers), None)
        text = f"{value:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
        if (least := numbers.get(f"{key}_min")) is not None:
            text += f" (least {least:.4g})"
        if (limit := numbers.get(f"{key}_infinity")) is not None:
            text += f", {limit:.4g} for infinitely many images"
        direction = "higher" if key.split("_")[0] in HIGHER_IS_BETTER else "lower"
        rows.append((NAMES.get(key, key), text, direction, "\n".join(beside.get(key, []))))
    for key, values in found.items():
        if key.endswith("_per_class"):
            name = NAMES.get(key.removesuffix("_per_class"), key.removesuffix("_per_class"))
            known = [(number, value) for number, value in enumerate(values) if value is not None]
            rows += [(f"{name} of class {number}", f"{value:.4g}", "lower", "") for number, value in known]
    return ["metric", "value", "better", "published"], rows


def published(benchmark: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The published figures of the metrics at hand."""
    entry = tables.TABLE[benchmark]  # type: ignore[index]
    kept = [figure._asdict() for figure in entry.figures if figure.metric in found]
    return {"published": {"benchmark": benchmark, "protocol": entry.protocol, "figures": kept}}


def markdown(found: Mapping[str, Any]) -> str:
    """A header and a row of a Markdown table."""
    numbers = {key: value for key, value in figures(found).items() if not key.endswith(("_std", "_std_error"))}
    names = ["samples", "images", *(NAMES.get(key, key) for key in numbers)]
    values = [str(found["source"]), str(found["num_images"]), *(f"{value:.4g}" for value in numbers.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), values))


# ---------------------------------------------------------------------------------------------------------------------
# The CSV file


def check(log: Path | None, benchmark: str | None, pictures: Path | None = None) -> None:
    """Raises UsageError for an unknown benchmark, a CSV file that cannot get a row, a directory not to write in."""
    if benchmark is not None and benchmark not in tables.NAMES:
        raise UsageError(
            f"--benchmark {benchmark} is not known{nearest(benchmark, tables.NAMES)}; known: {', '.join(tables.NAMES)}"
        )
    if log is not None and log.is_file():
        _header(log)
    elif log is not None and (log.exists() or not log.parent.is_dir()):
        raise UsageError(f"--csv {log} cannot be written; give a CSV file in a directory that exists")
    if log is not None:
        _probe(log.parent, f"--csv {log}")
    if pictures is not None:
        _probe(next(place for place in (pictures, *pictures.parents) if place.exists()), f"--pictures {pictures}")


def _probe(directory: Path, option: str) -> None:
    """Raises UsageError where no file can be made and filled. What it writes has no name, and is gone at once."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UsageError(f"{option} cannot be written ({error.strerror}); choose another place") from None


def append(log: Path, found: Mapping[str, Any]) -> None:
    """Adds a row, and columns where an earlier row lacks them. Written whole under another name and renamed."""
    numbers = figures(found)
    row = {key: str(found.get(key)) for key in DESCRIBED} | {key: repr(value) for key, value in numbers.items()}
    place = log.with_name(f".{log.name}.lock")
    with FileLock(place):
        columns, rows = _header(log) if log.is_file() else ([], [])
        columns += [key for key in row if key not in columns]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
        write_text(log, text.getvalue())
        with contextlib.suppress(OSError):  # Windows lets nobody remove it; elsewhere those who wait make a new one
            place.unlink()


def _header(log: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with open(log, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--csv {log} cannot be read as CSV ({error}); choose another file") from None
    if columns[:2] != list(DESCRIBED[:2]) or any(None in row for row in rows):
        raise UsageError(f"--csv {log} is no CSV file of `ddo fid`; choose another file")
    return columns, rows
