"""Tables and page of a discriminator's training, from its held-out figures."""

import math
from typing import Any

from ddo_cli import rundir
from ddo_cli.engines import pages
from ddo_cli.files import read_json
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html, pictures
from ddo_cli.report.charts import Chart
from ddo_cli.report.html import Section
from ddo_cli.report.pictures import Curve

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


def page(run_dir: rundir.RunDir, recipe: Recipe, state: dict[str, Any]) -> html.Page:
    """Of a run at any stage, from its held-out figures."""
    file, log = run_dir.path / "metrics.json", pages.lines_of(run_dir)
    known = read_json(file)["evaluations"] if file.is_file() else {}
    evaluations = {step: known[str(step)] for step in sorted(map(int, known))}
    batch = recipe.discriminator.batch
    chosen = state["best_images"] // batch if state.get("finished") else min(
        evaluations, key=lambda step: evaluations[step]["bce"], default=None
    )  # fmt: skip
    sections = [Section("Training", [html.Charts(_of_training(evaluations, batch, log, state))])]
    if chosen is not None:
        levels = evaluations[chosen]["levels"]
        by_level: list[html.Block] = [html.Charts(_by_level(levels, state)), html.Table("", *table(levels))]
        sections += [
            Section("By noise level, held out", by_level),
            Section("Reliability by noise level, held out", [html.Charts(_reliability(levels))]),
        ]
    blocks: list[html.Block] = [*pages.warnings(state), *pages.unfinished(state, log)]
    if state.get("finished"):
        blocks.append(html.Table("Held out", *compared(state)))
    weights = run_dir.final if run_dir.final.is_file() else recipe.model.ckpt
    sections += [pages.cost([log]), pages.provenance(weights, state), pages.recipe_section(recipe)]
    return html.Page(
        pages.title("Discriminator", run_dir.path, recipe), _headline(state, evaluations, chosen), blocks, sections
    )


def _headline(state: dict[str, Any], evaluations: Evaluations, chosen: int | None) -> str:
    blind = f"(log 2 = {math.log(2):.4f} is blind)"
    if not state.get("finished"):
        if chosen is None:
            return "No figure yet: the discriminator is being trained."
        return f"Held-out cross-entropy {evaluations[chosen]['bce']:.4f} so far {blind}."
    settled = "settled" if state["settled"] else "NOT settled: still falling when the images were used up"
    words = (
        f"Held-out cross-entropy {state['heldout_bce']:.4f} {blind}, accuracy {state['heldout_accuracy']:.3f}, after "
        f"{state['best_images']:,} images, selected by {state['selected_by']}; {settled}."
    )
    if state.get("untrained"):
        words += f" The untrained network, its control, has {state['untrained']['bce']:.4f}."
    return words


def _of_training(evaluations: Evaluations, batch: int, log: pages.Lines, state: dict[str, Any]) -> list[Chart]:
    images = [step * batch for step in evaluations]

    def held_out(label: str, key: str) -> Curve:
        return Curve(label, images, [figures[key] for figures in evaluations.values()], "o")

    of_sides = [pages.curve("training, real", log, "accuracy_real"), pages.curve("generated", log, "accuracy_fake")]
    charts = [
        Chart("Cross-entropy, nats", [pages.curve("training", log, "loss"), held_out("held out", "bce")], "images"),
        Chart("Accuracy", [*of_sides, held_out("held out", "accuracy")], "images"),
    ]
    if state.get("scores"):
        steps = sorted(map(int, state["scores"]))
        scores = [state["scores"][str(step)] for step in steps]
        line = Curve("score", [step * batch for step in steps], scores, "o")
        charts.append(Chart("Metric of guided samples", [line], "images"))
    return [*charts, *pages.charts_of(log, "grad_norm", "lr")]


def _by_level(levels: list[dict[str, Any]], state: dict[str, Any]) -> list[Chart]:
    middle = [math.log10(math.sqrt(level["sigma_min"] * level["sigma_max"])) for level in levels]
    charts = [
        Chart(
            title,
            [
                Curve(name, middle, [level[f"{key}_{side}"] for level in levels], "o")
                for name, side in (("real", "real"), ("generated", "fake"))
            ],
            "log10 sigma",
        )
        for title, key in (("Cross-entropy, nats", "bce"), ("Accuracy", "accuracy"))
    ]
    gains = {"weight {weight:g}": state.get("gain"), "untrained": state.get("untrained", {}).get("gain")}
    found = {name.format(**gain): gain["levels"] for name, gain in gains.items() if gain is not None}
    if found:
        lines = [pictures.gain_curve(name, levels, "gain", "error") for name, levels in found.items()]
        charts.append(Chart("Gain per unit of ln sigma, nats", lines, "log10 sigma", "Band: one standard error."))
    return charts


def _reliability(levels: list[dict[str, Any]]) -> list[Chart]:
    return [
        Chart(
            f"sigma {level['sigma_min']:.2g} to {level['sigma_max']:.2g}",
            [
                Curve("observed", [x for x, *_ in level["reliability"]], [y for _, y, *_ in level["reliability"]], "o"),
                Curve("calibrated", [0, 1], [0, 1], is_dashed=True),
            ],
            "predicted share of real images",
        )
        for level in levels[::2]
    ]
