"""Pictures and HTML page of a discriminator's training, from its held-out figures."""

import math
from typing import Any

from ddo_cli import rundir
from ddo_cli.recipe.load import to_yaml
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html, pictures
from ddo_cli.report.pictures import Curve
from ddo_cli.training import meter

Evaluations = dict[int, dict[str, Any]]


def table(levels: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Column names and one row per noise level, the smallest first."""
    columns = ["sigma", "BCE", "BCE real", "BCE generated", "accuracy real", "generated", "calibration error"]
    keys = ("bce", "bce_real", "bce_fake", "accuracy_real", "accuracy_fake", "calibration_error")
    rows = [
        (f"{level['sigma_min']:.3g} to {level['sigma_max']:.3g}", *(f"{level[key]:.3f}" for key in keys))
        for level in levels
    ]
    return columns, rows


def compared(state: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Column names and rows of the held-out figures of the trained network and of its control, if there is one."""
    trained = {
        "bce": state["heldout_bce"], "accuracy": state["heldout_accuracy"],
        "calibration_error": state["calibration_error"], "gain": state["gain"],
    }  # fmt: skip
    sides = {"trained": trained, **({"untrained (control)": state["untrained"]} if state.get("untrained") else {})}
    weight = (trained["gain"] or {"weight": 1.0})["weight"]
    columns = ["", "cross-entropy", "accuracy", "calibration error", f"gain at weight {weight:g}, nats", "at weight 1"]
    return columns, [(name, *_figures(figures)) for name, figures in sides.items()]


def _figures(figures: dict[str, Any]) -> list[str]:
    gain = figures["gain"]
    pairs = [("gain", "error"), ("gain_weight_1", "error_weight_1")]
    gains = ["-" if gain is None else f"{gain[key]:.3g} ± {gain[error]:.2g}" for key, error in pairs]
    return [f"{figures['bce']:.4f}", f"{figures['accuracy']:.3f}", f"{figures['calibration_error']:.3f}", *gains]


def write(run_dir: rundir.RunDir, recipe: Recipe, evaluations: Evaluations, chosen: int, state: dict[str, Any]) -> None:
    """Draws training.png and levels.png and writes report.html."""
    path, batch = run_dir.path, recipe.discriminator.batch
    log = meter.read(run_dir.log_file, "loss", "accuracy_real", "accuracy_fake")
    images = [step * batch for step in evaluations]
    trained = [record["n_images"] for record in log]

    def of_log(label: str, key: str) -> Curve:
        return Curve(label, trained, [record[key] for record in log])

    def held_out(label: str, key: str) -> Curve:
        return Curve(label, images, [figures[key] for figures in evaluations.values()], "o")

    panels = {
        "cross-entropy, nats": [of_log("training", "loss"), held_out("held out", "bce")],
        "accuracy": [
            of_log("training, real", "accuracy_real"),
            of_log("training, generated", "accuracy_fake"),
            held_out("held out", "accuracy"),
        ],
    }
    if state["scores"]:
        steps = sorted(map(int, state["scores"]))
        scores = [state["scores"][str(step)] for step in steps]
        panels["metric of guided samples"] = [Curve("score", [step * batch for step in steps], scores, "o")]
    pictures.curves(panels, path / "training.png", "images")
    levels = evaluations[chosen]["levels"]
    middle = [math.log10(math.sqrt(level["sigma_min"] * level["sigma_max"])) for level in levels]
    by_level = {
        f"held-out {title}": [
            Curve(name, middle, [level[f"{key}_{side}"] for level in levels], "o")
            for name, side in (("real", "real"), ("generated", "fake"))
        ]
        for title, key in (("cross-entropy, nats", "bce"), ("accuracy", "accuracy"))
    }
    gains = {"weight {weight:g}": state["gain"], "untrained": state.get("untrained", {}).get("gain")}
    if shown := {name.format(**gain): gain["levels"] for name, gain in gains.items() if gain is not None}:
        by_level["held-out gain per unit of ln sigma, nats"] = [
            pictures.gain_curve(name, found, "gain", "error") for name, found in shown.items()
        ]
    pictures.curves(by_level, path / "levels.png", "log10 sigma")
    reliability = {
        f"sigma {level['sigma_min']:.2g} to {level['sigma_max']:.2g}": [
            Curve("calibrated", [0, 1], [0, 1]),
            Curve("observed", [x for x, *_ in level["reliability"]], [y for _, y, *_ in level["reliability"]], "o"),
        ]
        for level in levels[::2]
    }
    pictures.curves(reliability, path / "reliability.png", "predicted share of real images")
    settled = "settled" if state["settled"] else "NOT settled: still falling when the images were used up"
    summary = (
        f"Held-out cross-entropy {state['heldout_bce']:.4f} (log 2 = {math.log(2):.4f} is blind), accuracy "
        f"{state['heldout_accuracy']:.3f}, after {state['best_images']:,} images, selected by {state['selected_by']}; "
        f"{settled}."
    )
    pages = [
        html.Picture(path / "training.png", "training"),
        html.Picture(path / "levels.png", "by noise level"),
        html.Picture(path / "reliability.png", "reliability by noise level"),
    ]
    title = f"Discriminator: {path.name}"
    warnings = rundir.warnings_of(state)
    by_noise_level = html.Table("By noise level", *table(levels))
    html.write_report(
        path / "report.html", title, summary, *compared(state), pages, to_yaml(recipe), [by_noise_level], warnings
    )
