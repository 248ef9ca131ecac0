"""Tables and sentences about a finetuning run, from its state."""

from collections.abc import Sequence
from typing import Any

from ddo_cli import rundir
from ddo_cli.engines.ddo.sweep import Setting, fraction_spent, rank
from ddo_cli.metrics.uncertainty import Mean, improvement, mean
from ddo_cli.recipe.schema import FinetuneRecipe, Recipe
from ddo_cli.report import html
from ddo_cli.report.numbers import readable

Row = tuple[str, ...]


def table(state: dict[str, Any], key: str) -> tuple[list[str], list[Row]]:
    """Column names and rows: the reference, then the reference after each round, then those of a control."""
    start, control = state["reference"], state.get("control", [])
    others = [name for name in start["repeats"][0] if name != key]
    columns = ["reference", key, *others, "ratio", "better by", *(["than control by"] if control else []), "outcome"]
    beside = [""] if control else []
    rows: list[Row] = [("at the start", *_figures(start, key, others), "1.000", "", *beside, "")]
    of_rounds = [("after round", record) for record in state["rounds"]]
    for title, record in of_rounds + [("control, round", record) for record in control]:
        outcome = f"promoted after {record['best_images']:,} images"
        if "alpha" in record:
            outcome += f", {_setting(record).title}"
        if not record["promoted"]:
            outcome = f"kept; candidate {Mean(**record['improvement']).as_improvement}"
        if record.get("ended_early"):
            outcome += f"; ended at {record['trained_images']:,}"
        ratio = f"{record['score'] / start['score']:.3f}" if start["score"] else "-"
        gain = str(_improvement(start, record, key))
        if control:
            same = [other for other in control if other["round"] == record["round"]]
            is_beside = title == "after round" and same
            beside = [str(_improvement(same[0], record, key)) if is_beside else ""]
        rows.append((f"{title} {record['round']}", *_figures(record, key, others), ratio, gain, *beside, outcome))
    return columns, rows


def improvements(state: dict[str, Any], key: str) -> dict[str, Any]:
    """For `--json`: by how much the last reference is better than the first one and than the control's, in pairs."""
    rounds, control = state["rounds"], state.get("control", [])
    others = {"reference": state["reference"]}
    if len(control) == len(rounds):
        others["control"] = control[-1]
    return {f"better_than_{name}": _improvement(record, rounds[-1], key)._asdict() for name, record in others.items()}


def told(figures: dict[str, Any]) -> dict[str, str]:
    """The improvements among the figures of `--json`, for people."""
    ranges = figures["metric_repeats"]
    paired = f", paired over {ranges} ranges of seeds" if ranges > 1 else ""
    return {
        f"than {name}": f"{Mean(**figures[f'better_than_{name}']).as_improvement}{paired}"
        for name in ("reference", "control")
        if f"better_than_{name}" in figures
    }


def _improvement(before: dict[str, Any], after: dict[str, Any], key: str) -> Mean:
    """Of one record on another, in pairs of equal seeds that decided nothing."""
    return improvement(*([figures[key] for figures in record["repeats"]] for record in (before, after)))


def table_of(run_dir: rundir.RunDir, key: str) -> tuple[list[str], list[Row]]:
    """The table of a finished run."""
    return table(run_dir.state(), key)


def sweep_table(record: dict[str, Any], recipe: Recipe, key: str) -> html.Table:
    """All nodes that a round compared: scores at the rungs, best candidate, and how far each came."""
    batch, nodes = recipe.finetune.of_round(record["round"]).batch, record["nodes"]
    rungs = sorted({rung["step"] for node in nodes for rung in node["rungs"]})
    columns = ["node", *(f"{step * batch:,} images" for step in rungs), "best candidate", "at", "outcome"]
    rows = []
    for node in nodes:
        scores = {rung["step"]: readable(rung["score"]) for rung in node["rungs"]}
        best = min(node["candidates"], key=lambda candidate: rank(candidate["score"]), default=None)
        figures = (readable(best["score"]), f"{best['step'] * batch:,}") if best else ("-", "-")
        outcome = f"{node['outcome']} at {node['stopped_at'] * batch:,}"
        if _setting(node) == _setting(record):
            outcome += ", best of the round"
        rows.append((_setting(node).title, *(scores.get(step, "-") for step in rungs), *figures, outcome))
    return html.Table(f"Round {record['round']}: {key} of every node (lower is better)", columns, rows)


def ending(recipe: Recipe, rounds: list[dict[str, Any]]) -> str:
    """Says that the run has ended before its last round; empty where it has not."""
    if len(rounds) >= recipe.finetune.rounds:
        return ""
    return (
        f"ended after round {len(rounds)} of {recipe.finetune.rounds}: {recipe.finetune.patience_rounds} in a row "
        "without a promotion (finetune.patience_rounds)"
    )


def early_stop(recipe: FinetuneRecipe) -> dict[str, Any]:
    """For `--dry-run`, which counts every round in full: what may end a round, and the run, before."""
    limits = {"candidates_without_gain": recipe.patience}
    if recipe.patience_rounds is not None and recipe.patience_rounds < recipe.rounds:
        limits["rounds_without_promotion"] = recipe.patience_rounds
    limits = {key: value for key, value in limits.items() if value is not None}
    return {"may_end_early": limits} if limits else {}


def settings_by_round(recipe: Recipe) -> dict[str, Any]:
    """For `--dry-run`: which rounds run with which values of the keys that differ; empty where all are alike."""
    last = recipe.finetune.rounds
    starts = [1, *sorted(number for number in recipe.finetune.from_round if number <= last)]
    ends = [*(number - 1 for number in starts[1:]), last]
    dumped = [recipe.finetune.of_round(number).model_dump(mode="json", exclude={"from_round"}) for number in starts]
    keys = [key for key in dumped[0] if any(values[key] != dumped[0][key] for values in dumped)]
    rows = [
        {"rounds": f"{start} to {end}" if start < end else f"{start}", **{key: values[key] for key in keys}}
        for start, end, values in zip(starts, ends, dumped, strict=True)
    ]
    return {"settings_by_round": rows} if keys else {}


def settings_table(by_round: list[dict[str, Any]]) -> html.Table:
    """`settings_by_round` for people."""
    rows = [tuple(map(_shown, row.values())) for row in by_round]
    return html.Table("Settings that differ between rounds", list(by_round[0]), rows)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items()) or "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def sweep_cost(rounds: list[dict[str, Any]]) -> str:
    """ "Sweep cost: 0.47 of the full grid; ..."; empty without a sweep."""
    fraction = fraction_spent(rounds)
    return (
        ""
        if fraction is None
        else f"Sweep cost: {fraction:.2f} of the full grid; curves are of each round's best node."
    )


def images_before(recipe: Recipe, records: Sequence[dict[str, Any]]) -> list[int]:
    """Images that a chain has trained on before each round. records: of its finished rounds."""
    rounds = [recipe.finetune.of_round(number) for number in range(1, recipe.finetune.rounds + 1)]
    lengths = [-(-settings.images_per_round // settings.batch) * settings.batch for settings in rounds]
    for record in records:
        lengths[record["round"] - 1] = record.get("trained_images", lengths[record["round"] - 1])
    return [sum(lengths[:number]) for number in range(len(lengths))]


def _setting(record: dict[str, Any]) -> Setting:
    return Setting(record["alpha"], record["beta"])


def _figures(record: dict[str, Any], key: str, others: list[str]) -> Row:
    """The mean score with its standard error over ranges of seeds, and the means of the other figures."""
    means = {name: mean([figures[name] for figures in record["repeats"]]) for name in (key, *others)}
    return (str(means[key]), *(readable(means[name].value) for name in others))
