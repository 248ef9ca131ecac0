"""Parts that the pages of several commands share: curves of the log, cost, provenance, recipe."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddo_cli import checkpoint, rundir
from ddo_cli.errors import CheckpointError
from ddo_cli.recipe.load import differing_keys, load, recipe_names, to_yaml
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html
from ddo_cli.report.charts import Chart
from ddo_cli.report.html import Section
from ddo_cli.report.numbers import readable
from ddo_cli.report.pictures import Curve
from ddo_cli.training import meter

Lines = Sequence[dict[str, Any]]  # of a log, each with "images": those of all rounds up to it
FILE = "report.html"
# Of a log, by the keys that share a chart; whatever else a run logs gets a chart of its own.
TITLES = {"loss": "Loss", "grad_norm": "Gradient norm", "lr": "Learning rate"}
NOT_DRAWN = ("step", "n_images", "images", "round", "alpha", "beta", "images_per_second", "processes")


def recipe_of(run_dir: rundir.RunDir) -> Recipe:
    """The resolved recipe that a run has stored."""
    return load(str(run_dir.recipe_file))


def title(kind: str, place: Path, recipe: Recipe) -> str:
    """ "DDO: mine (recipe quickstart)"."""
    name = place.resolve().name
    return f"{kind}: {name}" + (f" (recipe {recipe.name})" if name != recipe.name else "")


def curve(label: str, lines: Lines, key: str) -> Curve:
    """A figure of the log over images."""
    found = [line for line in lines if isinstance(line.get(key), (int, float))]
    return Curve(label, [line["images"] for line in found], [line[key] for line in found])


def charts_of(lines: Lines, *keys: str, breaks: Sequence[float] = ()) -> list[Chart]:
    """A chart for each of these figures that the log has."""
    drawn = [key for key in keys if any(key in line for line in lines)]
    return [Chart(TITLES.get(key, key), [curve(key, lines, key)], "images", breaks=breaks) for key in drawn]


def further_charts(lines: Lines, *known: str) -> list[Chart]:
    """A chart for each figure of the log that is not `known`."""
    keys = dict.fromkeys(key for line in lines for key in line)
    return charts_of(lines, *(key for key in keys if key not in (*NOT_DRAWN, *known)))


def cost(logs: Sequence[Lines], notes: Sequence[str] = ()) -> Section:
    """Time and speed of training. The only section that differs between two runs of the same command."""
    lines = [line for log in logs for line in log if line.get("images_per_second")]
    spent, before = 0.0, 0
    for line in lines:
        new = line["images"] - before
        taken = new if new > 0 else line["n_images"]  # a log begins anew
        spent, before = spent + taken / line["images_per_second"] * line.get("processes", 1), line["images"]
    blocks: list[html.Block] = [html.Text(note) for note in notes]
    if lines:
        speed = statistics.median(line["images_per_second"] for line in lines)
        images = sum(log[-1]["images"] for log in logs if log)
        processes = max(line.get("processes", 1) for line in lines)
        blocks = [
            html.Tiles([
                ("device hours of training", readable(spent / 3600, 3), "with evaluations between steps"),
                ("images/s", f"{speed:,.0f}", "median, over all processes"),
                ("images trained on", f"{images:,}", f"by {processes} process{'es' if processes > 1 else ''}"),
            ]),
            html.Charts([Chart("Images per second", [curve("images/s", log, "images_per_second") for log in logs[:1]],
                               "images", note="A line after an evaluation counts its time, too.")]),
            *blocks,
        ]  # fmt: skip
    return Section("Cost", blocks, "cost")


def provenance(weights: str | Path, inputs: dict[str, Any]) -> Section:
    """Where the weights come from, step by step, and the hashes of what the run has read."""
    try:
        links = checkpoint.read_header(weights).get("provenance", [])
    except (CheckpointError, OSError):
        links = []
    told = html.Text(f"{weights} does not tell where it comes from.")
    hashes = [
        (key.removesuffix("_sha256"), value) for key, value in inputs.items() if key.endswith("_sha256") and value
    ]
    return Section(
        "Provenance",
        [steps_table(links) if links else told, html.Table("Inputs", ["", "SHA-256"], hashes, of_texts=True)],
    )


# What a score is, by the name of the recipe's metric.
_SCORES = {
    "fd_embedded": "the Fréchet distance between features of a small digit classifier, which is no FID",
    "fid": "the Fréchet distance between features of Inception-v3",
    "fd_dinov2": "the Fréchet distance between features of DINOv2",
    "fd_clip": "the Fréchet distance between features of CLIP",
    "clip": "100 minus the CLIP score, the mean of 100 max(cos, 0) between CLIP's embeddings of image and caption",
    "js": "the Jensen-Shannon divergence of the model's density from the data's, on a grid",
}


def protocol(recipe: Recipe, weights: str | Path, key: str) -> html.Text:
    """How the scores were measured. weights: tell how samples are drawn."""
    metric = recipe.metric
    what = f"the Fréchet distance between features of {metric.extractor}" if metric.extractor else _SCORES[metric.name]
    against = "of the captions of" if metric.name == "clip" else "against"
    words = f"{key} is {what}, {against} {metric.ref or recipe.data.source}"
    if metric.name != "js":
        ranges = "one range" if metric.repeats == 1 else f"each of {metric.repeats} ranges"
        words += f": {metric.num_images:,} images in {ranges} of seeds"
    sampling = checkpoint.read_header(weights).get("sampling", {})
    if "sampler" in sampling and "steps" in sampling:
        words += f", drawn by {sampling['sampler']} with {sampling['steps']} steps"
    return html.Text(f"{words}.")


def steps_table(links: Sequence[dict[str, Any]]) -> html.Table:
    """The steps of a provenance: command, recipe, data, settings, and the weights that each began with."""
    rows: list[tuple[str, ...]] = []
    for number, link in enumerate(links, start=1):
        recipe = link.get("recipe", {})
        of_round = f", round {link['round']}" if "round" in link else ""
        what = f"{link['command']}{' (control)' if link.get('control') else ''}{of_round}"
        settings = _settings(link, recipe) | {key: link[key] for key in ("alpha", "beta", "steps") if key in link}
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        rows.append((str(number), what, str(recipe.get("name", "-")), data_of(link) or "-", told or "-",
                     str(link.get("reference_sha256", "-"))[:12]))  # fmt: skip
    return html.Table("", ["", "command", "recipe", "data", "settings", "from weights (SHA-256)"], rows, of_texts=True)


def data_of(link: dict[str, Any]) -> str:
    """The data of a step of the provenance; empty if it does not tell."""
    recipe: dict[str, Any] = link.get("recipe", {})
    data = recipe.get("data")
    return str(data.get("source") or "") if isinstance(data, dict) else ""


def _settings(link: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    sections = {"finetune-ddo": "finetune", "pretrain": "pretrain", "train-disc": "discriminator"}
    section = recipe.get(sections.get(link["command"], ""))
    keys = ("alpha", "beta", "lr", "batch", "images", "images_per_round")
    found = {key: section.get(key) for key in keys} if isinstance(section, dict) else {}
    return {key: value for key, value in found.items() if value is not None}


def recipe_section(recipe: Recipe) -> Section:
    """How the recipe differs from the one of its name, or from the defaults, and the whole of it."""
    is_ours = recipe.name in recipe_names()
    named = load(recipe.name) if is_ours else Recipe()
    what = f"the recipe {recipe.name}" if is_ours else "the defaults"
    lines = differing_keys(recipe.model_dump(mode="json"), named.model_dump(mode="json"))
    rows = []
    for line in lines:
        key, _, values = line.partition(": ")
        before, _, now = values.partition(" -> ")
        if key != "name":
            rows.append((key, before, now))
    told = html.Table(f"Different from {what}", ["key", what, "this run"], rows, of_texts=True)
    blocks: list[html.Block] = [told if rows else html.Text(f"Exactly {what}.")]
    return Section("Recipe", [*blocks, html.Folded("The whole recipe, as resolved", to_yaml(recipe))])


def warnings(state: dict[str, Any]) -> list[html.Text]:
    """Files of the run that were found damaged."""
    return [html.Text(f"Warning: {text}", "warning") for text in rundir.warnings_of(state)]


def is_behind(run_dir: rundir.RunDir, state: dict[str, Any]) -> bool:
    """Whether the report is damaged, missing, or does not tell of all damage of the run."""
    file = run_dir.path / FILE
    if not run_dir.ledger.is_good(file):
        return True
    page = file.read_text(encoding="utf-8")
    return not all(html.text(warning) in page for warning in rundir.warnings_of(state))


def lines_of(run_dir: rundir.RunDir) -> list[dict[str, Any]]:
    """The log of a run that trains one network."""
    return [{**line, "images": line["n_images"]} for line in meter.read(run_dir.log_file)]


def unfinished(state: dict[str, Any], log: Lines) -> list[html.Text]:
    """Says so of a run that is."""
    if state.get("finished"):
        return []
    done = f" {log[-1]['images']:,} images so far." if log else ""
    return [html.Text(f"Unfinished: this page is written again while the run goes on.{done}", "warning")]


def of_training(
    run_dir: rundir.RunDir, recipe: Recipe, state: dict[str, Any], kind: str, headline: str,
    sections: Sequence[Section] = (),
) -> html.Page:  # fmt: skip
    """The page of a run that trains one network. headline: of the finished run; sections: its results."""
    log = lines_of(run_dir)
    told = headline if state.get("finished") else "No figure yet: the network is being trained."
    weights = run_dir.final if run_dir.final.is_file() else recipe.model.ckpt
    first = charts_of(log, "loss", "grad_norm", "lr")
    return html.Page(
        title(kind, run_dir.path, recipe), told, [*warnings(state), *unfinished(state, log)],
        [
            *sections,
            Section("Training", [html.Charts([*first, *further_charts(log, "loss", "grad_norm", "lr")])]),
            cost([log]),
            *([provenance(weights, state)] if run_dir.final.is_file() else []),
            recipe_section(recipe),
        ],
    )  # fmt: skip
