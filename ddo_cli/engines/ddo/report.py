"""Pictures, table and HTML page of a finetuning run, from what the run left on disk."""

from typing import Any

from ddo_cli import rundir
from ddo_cli.engines.ddo.sweep import Setting, fraction_spent, rank
from ddo_cli.recipe.load import to_yaml
from ddo_cli.recipe.schema import FinetuneRecipe, Recipe
from ddo_cli.report import html, pictures
from ddo_cli.report.pictures import Curve
from ddo_cli.training import meter

Row = tuple[str, ...]
FILES = ("report.html", "curves.png", "score-by-round.png")  # what `write` writes


def table(state: dict[str, Any], key: str) -> tuple[list[str], list[Row]]:
    """Column names and rows: the reference, then the reference after each round."""
    others = [name for name in state["reference"]["repeats"][0] if name != key]
    columns = ["reference", key, *others, "ratio", "outcome"]
    start = state["reference"]["score"]
    rows = [("at the start", *_figures(state["reference"], key, others), "1.000", "")]
    for record in state["rounds"]:
        outcome = f"promoted after {record['best_images']:,} images"
        if "nodes" in record:
            outcome += f", {_setting(record).title}"
        if not record["promoted"]:
            outcome = f"kept; best candidate {record['candidate_score']:.4g}"
        if record.get("ended_early"):
            outcome += f"; ended at {record['trained_images']:,}"
        ratio = f"{record['score'] / start:.3f}" if start else "-"
        rows.append((f"after round {record['round']}", *_figures(record, key, others), ratio, outcome))
    return columns, rows


def table_of(run_dir: rundir.RunDir, key: str) -> tuple[list[str], list[Row]]:
    """The table of a finished run."""
    return table(run_dir.state(), key)


def sweep_table(record: dict[str, Any], recipe: Recipe, key: str) -> html.Table:
    """All nodes of a round's sweep: scores at the rungs, best candidate, and how far each came."""
    batch, nodes = recipe.finetune.of_round(record["round"]).batch, record["nodes"]
    rungs = sorted({rung["step"] for node in nodes for rung in node["rungs"]})
    columns = ["node", *(f"{step * batch:,} images" for step in rungs), "best candidate", "at", "outcome"]
    rows = []
    for node in nodes:
        scores = {rung["step"]: f"{rung['score']:.4g}" for rung in node["rungs"]}
        best = min(node["candidates"], key=lambda candidate: rank(candidate["score"]), default=None)
        figures = (f"{best['score']:.4g}", f"{best['step'] * batch:,}") if best else ("-", "-")
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
    """ "sweep cost: 0.47 of the full grid"; empty without a sweep."""
    fraction = fraction_spent(rounds)
    return "" if fraction is None else f"sweep cost: {fraction:.2f} of the full grid"


def is_behind(run_dir: rundir.RunDir, state: dict[str, Any]) -> bool:
    """Whether the report, or a picture of it, is damaged, missing, or does not tell of all damage of the run."""
    files = [run_dir.path / name for name in FILES]
    if not all(map(run_dir.ledger.is_good, files)):
        return True
    page = files[0].read_text()
    return not all(html.text(warning) in page for warning in rundir.warnings_of(state))


def _setting_or_none(record: dict[str, Any]) -> Setting | None:
    """Of a line of the log; None without a sweep."""
    return _setting(record) if "alpha" in record and "beta" in record else None


def _setting(record: dict[str, Any]) -> Setting:
    return Setting(record["alpha"], record["beta"])


def _figures(record: dict[str, Any], key: str, others: list[str]) -> Row:
    """The mean score, with its range over several repeats, and the means of the other figures."""
    repeats = [figures[key] for figures in record["repeats"]]
    spread = f" ({min(repeats):.4g} to {max(repeats):.4g})" if len(repeats) > 1 else ""
    means = [sum(figures[name] for figures in record["repeats"]) / len(repeats) for name in others]
    return (f"{record['score']:.4g}{spread}", *(f"{mean:.4g}" for mean in means))


def write(run_dir: rundir.RunDir, recipe: Recipe, state: dict[str, Any], key: str) -> None:
    """Draws the curves and writes report.html."""
    path, rounds = run_dir.path, state["rounds"]
    log = meter.read(run_dir.log_file, "round", "r_real", "r_fake", "accuracy", "denoising_ratio")
    chosen = {record["round"]: _setting(record) for record in rounds if "nodes" in record}
    log = [
        line
        for line in log
        if 1 <= line["round"] <= len(rounds) and _setting_or_none(line) == chosen.get(line["round"])
    ]
    settings = [recipe.finetune.of_round(number) for number in range(1, recipe.finetune.rounds + 1)]
    lengths = [-(-finetune.images_per_round // finetune.batch) * finetune.batch for finetune in settings]
    for record in rounds:
        lengths[record["round"] - 1] = record.get("trained_images", lengths[record["round"] - 1])
    before = [sum(lengths[:number]) for number in range(len(lengths))]  # images of the rounds before, by round
    at = [before[record["round"] - 1] + record["n_images"] for record in log]
    candidates = [
        (before[record["round"] - 1] + int(step) * settings[record["round"] - 1].batch, figures[key])
        for record in rounds
        for step, figures in sorted(record["candidates"].items(), key=lambda item: int(item[0]))
    ]
    by_round = [state["reference"]["score"], *(record["score"] for record in rounds)]
    pictures.curves(
        {f"{key} by round (mean of repeats)": [Curve(key, range(len(by_round)), by_round, "o")]},
        path / "score-by-round.png",
        "round",
    )
    pictures.curves(
        {
            f"{key} of candidates": [Curve(key, [x for x, _ in candidates], [y for _, y in candidates], "o")],
            "log-ratio, nats": [Curve(name, at, [record[name] for record in log]) for name in ("r_real", "r_fake")],
            "discriminator accuracy": [Curve("accuracy", at, [record["accuracy"] for record in log])],
            "plain loss on data / reference's": [Curve("ratio", at, [record["denoising_ratio"] for record in log])],
        },
        path / "curves.png",
        "images",
    )
    columns, rows = table(state, key)
    shown = [html.Picture(path / "score-by-round.png", "score of the reference after each round")]
    shown += [html.Picture(path / "curves.png", "training")]
    shown += [html.Picture(path / "reference.png", "reference, before")]
    shown += [
        html.Picture(path / f"round-{record['round']:02d}" / "grid.png", f"round {record['round']}, same seeds")
        for record in rounds
    ]
    start, final = by_round[0], by_round[-1]
    ratio = f" ({final / start:.2f} times)" if start else ""
    summary = f"{key} {start:.4g} -> {final:.4g}{ratio} in {len(rounds)} rounds; lower is better."
    if end := ending(recipe, rounds):
        summary += f" {end.capitalize()}."
    cost = sweep_cost(rounds)
    if cost:
        summary += f" {cost.capitalize()}; curves are of each round's best node."
    sweeps = [sweep_table(record, recipe, key) for record in rounds if "nodes" in record]
    title = f"DDO: {recipe.name}"
    warnings = rundir.warnings_of(state)
    html.write_report(path / "report.html", title, summary, columns, rows, shown, to_yaml(recipe), sweeps, warnings)
