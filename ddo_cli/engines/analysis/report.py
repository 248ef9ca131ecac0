"""The page of `ddo analyze`, from the files that it left."""

import math
from pathlib import Path
from typing import Any

from ddo_cli.engines import pages
from ddo_cli.files import read_json
from ddo_cli.report import html
from ddo_cli.report.html import Picture, Section

TITLES = {
    "gain": "Gain in log-likelihood by noise level", "trajectory": "Log-ratio along sampling runs",
    "nfe": "Score by network evaluations", "regeneration": "Images noised and drawn back",
    "density": "Densities in the plane",
}  # fmt: skip


def write(out: Path) -> None:
    """Writes report.html."""
    html.write(out / pages.FILE, page(out))


def page(out: Path) -> html.Page:
    """Of all analyses that the directory holds."""
    contents = {name: read_json(file) for name in TITLES if (file := out / f"{name}.json").is_file()}
    first: dict[str, Any] = next(iter(contents.values()))
    weight = first["guidance"].get("dg_weight", 0.0)
    headline = f"What guidance of weight {weight:g} does to {first['model']}"
    if gain := contents.get("gain"):
        verdict = "closer to" if gain["gain"] > 0 else "further from"
        headline += (
            f": it brings its score {verdict} held-out data's, by {gain['gain']:.3g} ± {gain['error']:.2g} nats; "
            f"at weight 1 by {gain['gain_weight_1']:.3g} ± {gain['error_weight_1']:.2g}"
        )
    blocks = [
        html.Text(f"Discriminator {first['discriminator']}; {first['held_out']:,} held-out items of {first['data']}.")
    ]
    sections = [
        Section(TITLES[name], [html.Pictures([Picture(out / f"{name}.png", TITLES[name])]), _figures(content)], name)
        for name, content in contents.items()
    ]
    settings = [
        (key, str(value)) for key in ("guidance", "sampling") for key, value in first[key].items() if value is not None
    ]
    hashes = [(key, str(first[key])) for key in first if key.endswith("_sha256")]
    end = Section("Settings", [html.Table("", ["key", "value"], [*settings, *hashes], of_texts=True)])
    return html.Page(f"Guidance: {out.resolve().name}", f"{headline}.", blocks, [*sections, end])


def _figures(content: dict[str, Any]) -> html.Table:
    """The numbers of an analysis."""
    numbers = {key: value for key, value in content.items() if type(value) in (int, float) and math.isfinite(value)}
    return html.Table("", ["", "value"], [(key, f"{value:.4g}") for key, value in numbers.items()])
