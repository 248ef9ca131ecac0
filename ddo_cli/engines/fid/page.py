"""The page of `ddo fid --report`: the scores, what they were measured by, and the images."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddo_cli.engines.fid import report as fid_report
from ddo_cli.engines.fid.cache import Source
from ddo_cli.errors import UsageError
from ddo_cli.report import html, pictures
from ddo_cli.report.html import Picture, Section

SHOWN = 64  # of the images


def check(path: Path | None) -> None:
    """Raises UsageError for a file that cannot be a page, or cannot be written."""
    if path is None:
        return
    if path.suffix != ".html":
        raise UsageError(f"--report {path} is not the name of a page; write for example --report {path.stem}.html")
    if not path.parent.is_dir():
        raise UsageError(f"--report {path} cannot be written; give a page in a directory that exists")
    fid_report.probe(path.parent, f"--report {path}")


def write(path: Path, result: Mapping[str, Any], images: Source) -> None:
    """Writes the page; pictures are drawn for it."""
    with tempfile.TemporaryDirectory() as place:
        grid = Path(place) / "grid.png"
        rows = np.arange(min(images.num, SHOWN))
        pictures.contact_sheet(fid_report.images_of(images, rows), grid, columns=8)
        html.write(path, page(result, grid))


def page(result: Mapping[str, Any], grid: Path) -> html.Page:
    """grid: a picture of the first images."""
    columns, rows = fid_report.table(result)
    against = f" against {result['reference']}" if result.get("reference") else ""
    headline = f"{result['source']}, {result['num_images']:,} images{against}: "
    tiles = [(name, re.split(r", | \(", value)[0], f"{better} is better") for name, value, better, *_ in rows[:6]]
    headline += f"{tiles[0][0]} {tiles[0][1]} ({tiles[0][2]})."
    notes = [html.Text(f"Warning: {text}", "warning") for text in result["warnings"]]
    if not result["comparable"]:
        why = "for the reasons above" if notes else "since the network of the features is not the published one"
        notes.append(html.Text(f"Not to be compared with published figures, {why}."))
    if any("±" in value for _, value, *_ in rows):
        notes.append(html.Text("± is one standard error over draws of as many images, or of KID over its subsets."))
    protocol = [
        (f"{key}: {name.replace('_', ' ')}", str(value))
        for key, of_one in result["protocol"].items() for name, value in of_one.items()
    ]  # fmt: skip
    told = [(key, str(result[key])) for key in ("source", "num_images", "reference", "content_digest", "resize")
            if result.get(key) is not None]  # fmt: skip
    drawn = [
        Picture(grid, f"the first {min(result['num_images'], SHOWN)} images"),
        *([Picture(Path(result["nearest"]["picture"]), "images closest to the reference; below each, what is nearest")]
          if "nearest" in result else []),
        *([Picture(Path(result["likelihoods"]), "likelihood under the reference's Gaussian of features")]
          if "likelihoods" in result else []),
    ]  # fmt: skip
    return html.Page(
        f"Scores: {result['source']}", headline, [html.Tiles(tiles), *notes],
        [
            Section("Scores", [html.Table("", columns, rows, of_texts=True)]),
            Section("Images", [html.Pictures(drawn)]),
            Section("Protocol", [html.Table("", ["", ""], [*told, *protocol], of_texts=True)]),
        ],
    )  # fmt: skip
