"""Figures and pictures of `ddo edit`: fidelity to the source against distance from the target set."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddo_cli import console, dist
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_images, digest
from ddo_cli.diffusion import vp_sde
from ddo_cli.engines.fid.fid import DEFAULT_REFERENCE, few
from ddo_cli.engines.scoring import open_reference
from ddo_cli.errors import DataError
from ddo_cli.files import sha256
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.extractors.select import Metric, select_extractor
from ddo_cli.metrics.scorer import FrechetScorer, share_of_batches
from ddo_cli.metrics.stats import Statistics
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.report import html, pictures
from ddo_cli.report.charts import Chart
from ddo_cli.report.html import Section
from ddo_cli.report.numbers import readable

SHOWN = 12  # images in a row of the contact sheet; our choice


class Way(NamedTuple):
    """One way of editing: the noise level to start from, and whether the discriminator guides."""

    sigma: float
    is_guided: bool

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"level-{self.sigma:g}{'-guided' if self.is_guided else ''}"

    @property
    def title(self) -> str:
        """In tables and pictures."""
        return f"noise level {self.sigma:g}{', guided' if self.is_guided else ''}"

    @property
    def time(self) -> float:
        """The level's VP time."""
        return float(vp_sde.time_of(torch.tensor(self.sigma, dtype=torch.float64)))


class Target(NamedTuple):
    """The set that edited images should look like, and the features that the distance compares."""

    name: str
    reference: ItemSet | Statistics
    extractor: Extractor
    identity: dict[str, Any]  # hashes that a continued run compares


def open_target(
    ref: str | None,
    disc: discriminators.Loaded | None,
    weights: str | None,
    extractor: str | None,
    sources: ItemSet,
    device: torch.device,
) -> Target:
    """The target set and the extractor, see `edit.run`. Raises DataError, CheckpointError or UsageError."""
    metric: Metric = "fid" if weights is not None else "fd_embedded"
    chosen = select_extractor(metric, weights, extractor, device)
    reference = _reference(ref, disc, chosen)
    name = reference.name if isinstance(reference, ItemSet) else str(ref)
    for images in (sources, reference):
        if isinstance(images, ItemSet):
            for warning in few(images.name, len(images.items), chosen):
                console.warn(warning)
    content = digest(reference) if isinstance(reference, ItemSet) else sha256(Path(name))
    return Target(name, reference, chosen, {"extractor_sha256": chosen.sha256, "reference_sha256": content})


def _reference(ref: str | None, disc: discriminators.Loaded | None, extractor: Extractor) -> ItemSet | Statistics:
    link = (disc.checkpoint.header.get("provenance") or [{}])[-1] if disc is not None else {}
    data = link.get("recipe", {}).get("data", {})
    if disc is None or ref is not None or not data:
        return open_reference(ref or DEFAULT_REFERENCE, extractor)
    try:
        images = open_images(data["source"], data.get("num"))
        check_images(images, "a distance needs images")
        return images
    except DataError as error:
        raise DataError(
            f"{error} (the data that {disc.checkpoint.path} was trained on; another target can be given by --ref)"
        ) from None


def psnr(images: np.ndarray, sources: np.ndarray) -> float:
    """20 log10(255 / RMSE) in dB, with the RMSE over all pixels of all images. uint8 arrays of equal shape.

    Pooled, since a mean of PSNRs is dominated by the images that hardly changed. Equal sets count as if one value
    differed by one grey level, so that the result is finite.
    """
    pairs = zip(images.astype(np.int64), sources.astype(np.int64), strict=True)
    total = sum(int(np.square(image - source).sum()) for image, source in pairs)
    return 10 * math.log10(255**2 * sources.size / max(total, 1))


def pictures_of(out: Path, num: int) -> dict[str, str]:
    """Files of the contact sheet and of the curve; the curve needs a distance and so two images."""
    grid = {"grid": str(out / "edit-grid.png")}
    return grid if num < 2 else {**grid, "curve": str(out / "edit.png")}


def write(
    out: Path, sources: np.ndarray, manifests: dict[Way, dict[str, Any]], target: Target, batch: int
) -> dict[str, Any]:
    """Measures the sets of `out`, draws the pictures, and returns the figures. Called by every process.

    manifests: of each way's set. The distance of a single image is None.
    """
    key = target.extractor.key
    scorer = FrechetScorer(target.extractor, target.reference, batch) if len(sources) > 1 else None

    def distance(items: np.ndarray) -> float | None:
        return scorer.score(share_of_batches(items, batch))[key] if scorer is not None else None

    levels: list[dict[str, Any]] = []
    rows = {"source": _row(sources)}
    for way, manifest in manifests.items():
        items = open_images(str(out / way.name)).items
        rows[way.title] = _row(items)
        level = {"sigma": way.sigma, "time": way.time, "guided": way.is_guided, "psnr": psnr(items, sources)}
        levels.append({**level, key: distance(items), "nfe": manifest["nfe"], "disc_nfe": manifest["disc_nfe"]})
    figures = {"levels": levels, "source_distance": distance(sources)}
    if dist.is_main():
        files = {name: Path(path) for name, path in pictures_of(out, len(sources)).items()}
        pictures.image_rows(rows, files["grid"])
        if scorer is not None:
            sigmas = [level["sigma"] for level in levels]
            axis = f"PSNR to the source, dB (noise level {max(sigmas):g} left, {min(sigmas):g} right)"
            pictures.curves(_curves(levels, key), files["curve"], axis)
    return figures


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the figures by level."""
    key = result["metric"]
    rows = []
    for level in result["levels"]:
        title = Way(level["sigma"], level["guided"]).title
        distance = "-" if level[key] is None else readable(level[key])
        passes = str(level["nfe"]), str(level["disc_nfe"])
        rows.append([title, f"{level['time']:.3f}", f"{level['psnr']:.2f}", distance, *passes])
    return ["", "VP time", "PSNR, dB", key, "nfe", "disc_nfe"], rows


def _row(items: np.ndarray) -> np.ndarray:
    """The first images, padded with white ones so that a few are not drawn huge."""
    shown = items[:SHOWN]
    return np.concatenate([shown, np.full((SHOWN - len(shown), *shown.shape[1:]), 255, dtype=np.uint8)])


def _curves(levels: list[dict[str, Any]], key: str) -> dict[str, list[pictures.Curve]]:
    """Distance to the target over PSNR to the source, a line for each of guided and not (the paper's Fig. 10b)."""
    lines = []
    for is_guided, title in ((False, "without guidance"), (True, "with guidance")):
        if chosen := [level for level in levels if level["guided"] == is_guided]:
            x, y = ([level[quantity] for level in chosen] for quantity in ("psnr", key))
            lines.append(pictures.Curve(title, x, y, marker="o"))
    return {f"{key} to the target": lines}


def page(out: Path, record: dict[str, Any]) -> html.Page:
    """Of a directory of edited images. record: the content of its edit.json."""
    figures = record["figures"]
    named = next(
        key for key in figures["levels"][0] if key not in ("sigma", "time", "guided", "psnr", "nfe", "disc_nfe")
    )
    distances = [level for level in figures["levels"] if level[named] is not None]
    count = len({level["sigma"] for level in figures["levels"]})
    headline = f"{record['num']:,} images of {record['source']}, edited from {count} noise level{'s' * (count > 1)}"
    if distances:
        best = min(distances, key=lambda level: level[named])
        before, after = readable(figures["source_distance"]), readable(best[named])
        told = f"falls from {before} to {after}"
        if best[named] >= figures["source_distance"]:
            told = f"does not fall: from {before} of the source to {after} at best"
        where = f"{Way(best['sigma'], best['guided']).title}, PSNR {best['psnr']:.1f} dB"
        headline += f": {named} to the target {told} ({where})"
    lines = {name: curve for name, curve in _curves(distances, named).items() if curve} if distances else {}
    charts = [Chart(title, curves, "PSNR to the source, dB") for title, curves in lines.items()]
    columns, rows = table({"metric": named, **figures})
    grid = html.Picture(
        out / "edit-grid.png", f"from top to bottom: the source, {'; '.join(title for title, *_ in rows)}"
    )
    settings = [(key, str(value)) for key, value in record["sampling"].items() if value is not None]
    return html.Page(
        f"Edited images: {out.resolve().name}",
        f"{headline}.",
        [],
        [
            Section("By noise level", [html.Charts(charts), html.Table("", columns, rows)]),
            Section("Images", [html.Pictures([grid])]),
            Section("Settings", [html.Table("", ["key", "value"], settings, of_texts=True)]),
        ],
    )
