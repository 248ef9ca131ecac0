"""Curves, tables and page of `ddo analyze`, from what the files of its analyses hold."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddo_cli.engines import pages
from ddo_cli.files import read_json
from ddo_cli.report import html, pictures
from ddo_cli.report.charts import Chart
from ddo_cli.report.html import Picture, Section
from ddo_cli.report.numbers import readable
from ddo_cli.report.pictures import Curve

Content = dict[str, Any]  # of an analysis' file
TITLES = {
    "gain": "Gain in log-likelihood by noise level", "trajectory": "Log-ratio along sampling runs",
    "nfe": "Score by network evaluations", "regeneration": "Images noised and drawn back",
    "density": "Densities in the plane",
}  # fmt: skip
CAPTIONS = {
    "regeneration": "from top to bottom: held-out images, the mean of the model's regenerations, of the guided model's",
    "density": "densities of data, model and guided model",
}
SIDES = ("model", "guided")


def write(out: Path) -> None:
    """Writes report.html."""
    html.write(out / pages.FILE, page(out))


def page(out: Path) -> html.Page:
    """Of all analyses that the directory holds."""
    contents = {name: read_json(file) for name in TITLES if (file := out / f"{name}.json").is_file()}
    first: Content = next(iter(contents.values()))
    blocks = [
        html.Text(f"Discriminator {first['discriminator']}; {first['held_out']:,} held-out items of {first['data']}.")
    ]
    sections = [Section(TITLES[name], [_drawn(name, content, out), TABLES[name](content)], name)
                for name, content in contents.items()]  # fmt: skip
    settings = [
        (key, str(value)) for key in ("guidance", "sampling") for key, value in first[key].items() if value is not None
    ]
    hashes = [(key, str(first[key])) for key in first if key.endswith("_sha256")]
    end = Section("Settings", [html.Table("", ["key", "value"], [*settings, *hashes], of_texts=True)])
    return html.Page(f"Guidance: {out.resolve().name}", headline(first, contents.get("gain")), blocks, [*sections, end])


def headline(first: Content, gain: Content | None) -> str:
    """What guidance does; a gain within two standard errors is none."""
    told = f"What guidance of weight {first['guidance'].get('dg_weight', 0.0):g} does to {first['model']}"
    if gain is None:
        return f"{told}."
    figures = f"{gain['gain']:.3g} ± {gain['error']:.2g} nats"
    if abs(gain["gain"]) <= 2 * gain["error"]:
        told += f": nothing beyond the error, a gain of {figures} on held-out data"
    else:
        verdict = "closer to" if gain["gain"] > 0 else "further from"
        told += f": it brings its score {verdict} held-out data's, by {figures}"
    return f"{told}; at weight 1 by {gain['gain_weight_1']:.3g} ± {gain['error_weight_1']:.2g}."


def _drawn(name: str, content: Content, out: Path) -> html.Block:
    """Curves in the page's own colours, or the picture."""
    if name not in CURVES:
        return html.Pictures([Picture(out / f"{name}.png", CAPTIONS[name])])
    panels, x_label = CURVES[name](content)
    return html.Charts([Chart(title, lines, x_label) for title, lines in panels.items()])


# --- Curves: by title of their panel, and what they are drawn over


Panels = tuple[dict[str, list[Curve]], str]


def draw(name: str, content: Content, path: Path) -> None:
    """Draws the curves of an analysis into a PNG file."""
    panels, x_label = CURVES[name](content)
    pictures.curves(panels, path, x_label)


def _gain_curves(content: Content) -> Panels:
    levels = content["levels"]
    shown = [pictures.gain_curve("weight 1", levels, "gain_weight_1", "error_weight_1")]
    if content["weight"] != 1:
        shown.append(pictures.gain_curve(f"weight {content['weight']:g}", levels, "gain", "error"))
    x = shown[0].x
    known = {at: level["best_weight"] for at, level in zip(x, levels, strict=True) if level["best_weight"] is not None}
    best = Curve("", list(known), [min(max(weight, -2), 6) for weight in known.values()], "o")
    return {"gain per unit of ln sigma, nats": shown, "best weight, cut at -2 and 6": [best]}, "log10 sigma"


def _trajectory_curves(content: Content) -> Panels:
    lines = [
        Curve(name, [math.log10(sigma) for sigma in content[name]["sigma"]], content[name]["mean"], "o",
              (content[name]["quartile_1"], content[name]["quartile_3"]))
        for name in (*SIDES, "data")
    ]  # fmt: skip
    return {"log-ratio: mean and quartiles": lines}, "log10 sigma"


def _nfe_curves(content: Content) -> Panels:
    points = content["points"]
    lines = [Curve(name, [point["nfe"] for point in points], [point[name] for point in points], "o") for name in SIDES]
    return {f"{content['metric']} of {content['num_images']} images": lines}, "network evaluations of the model"


CURVES: dict[str, Callable[[Content], Panels]] = {
    "gain": _gain_curves, "trajectory": _trajectory_curves, "nfe": _nfe_curves,
}  # fmt: skip


# --- Tables


def gain_table(content: Content) -> html.Table:
    """The gain by noise level, and in total."""

    def row(name: str, level: Content) -> tuple[str, ...]:
        best = "-" if level["best_weight"] is None else f"{level['best_weight']:.2f}"
        pairs = [(level["gain"], level["error"]), (level["gain_weight_1"], level["error_weight_1"])]
        return (name, *(f"{value:.4g} ± {error:.2g}" for value, error in pairs), best)

    levels = [row(f"{level['sigma_min']:.3g} to {level['sigma_max']:.3g}", level) for level in content["levels"]]
    columns = ["sigma", f"gain at weight {content['weight']:g}, nats", "at weight 1", "best weight"]
    return html.Table("", columns, [*levels, row("total", content)])


def _trajectory_table(content: Content) -> html.Table:
    low, high = content["window"]
    means = [(name, content[f"mean_log_ratio_{name}"]) for name in (*SIDES, "data")]
    return html.Table("", ["", f"mean log-ratio, sigma {low:.3g} to {high:.3g}"],
                      [(name, "-" if mean is None else f"{mean:.4g}") for name, mean in means])  # fmt: skip


def _nfe_table(content: Content) -> html.Table:
    rows = [(str(point["steps"]), str(point["nfe"]), str(point["disc_nfe"]), *(readable(point[name]) for name in SIDES))
            for point in content["points"]]  # fmt: skip
    metric = content["metric"]
    columns = ["steps", "evaluations", "of the discriminator", f"{metric}, model", f"{metric}, guided"]
    return html.Table("", columns, rows)


def _regeneration_table(content: Content) -> html.Table:
    columns = ["", "mean regeneration, RMSE", "PSNR, dB", f"round trip of {content['round_trip_steps']} steps, RMSE"]
    rows = []
    for name in SIDES:
        mean, trip = content["mean_image"][name], content["round_trip"][name]
        psnr = "-" if mean["psnr"] is None else f"{mean['psnr']:.2f}"
        rows.append((name, f"{mean['rmse']:.4g}", psnr, f"{trip['rmse']:.4g}"))
    title = f"{content['regenerations']} regenerations from noise level {content['noise_level']:g}; grey levels of 255"
    return html.Table(title, columns, rows)


def _density_table(content: Content) -> html.Table:
    keys = ("js", "forward_kl", "reverse_kl")
    rows = [(name, *(f"{content[name][key]:.4g}" for key in keys)) for name in SIDES]
    columns = ["", "Jensen-Shannon", "KL(data, model)", "KL(model, data)"]
    return html.Table("Divergence from the data, nats", columns, rows)


TABLES: dict[str, Callable[[Content], html.Table]] = {
    "gain": gain_table, "trajectory": _trajectory_table, "nfe": _nfe_table, "regeneration": _regeneration_table,
    "density": _density_table,
}  # fmt: skip
