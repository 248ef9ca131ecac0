"""The page of a finetuning run, from what the run has left on disk so far."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from ddo_cli import rundir
from ddo_cli.engines import pages
from ddo_cli.engines.ddo import report
from ddo_cli.engines.ddo.sweep import Setting
from ddo_cli.files import read_json
from ddo_cli.metrics import published
from ddo_cli.metrics.uncertainty import Mean, mean
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html
from ddo_cli.report.charts import Chart
from ddo_cli.report.html import Picture, Section
from ddo_cli.report.numbers import readable
from ddo_cli.report.pictures import Curve
from ddo_cli.training import meter

Record = dict[str, Any]
MOST_PREVIEWS = 12  # in the page


class _Chain(NamedTuple):
    """Rounds of DDO, or of the control, as they lie on disk."""

    label: str
    recipe: Recipe
    run_dir: rundir.RunDir
    records: Sequence[Record]
    is_control: bool = False

    @property
    def place(self) -> Any:
        return self.run_dir.path / "control" if self.is_control else self.run_dir.path

    def before(self, number: int) -> int:
        """Images of the rounds before this one."""
        return report.images_before(self.recipe, self.records)[number - 1]

    def candidates(self) -> dict[int, dict[str, dict[str, float]]]:
        """Figures of candidates by step, by round; those of the round that is being trained, too."""
        found = {record["round"]: record["candidates"] for record in self.records}
        running = len(self.records) + 1
        file = self.place / f"round-{running:02d}" / "metrics.json"
        if running <= self.recipe.finetune.rounds and file.is_file():
            found[running] = read_json(file).get("candidates", {})
        return found

    def scores(self, key: str) -> Curve:
        """Scores of candidates over images of all rounds."""
        points = [
            (self.before(number) + int(step) * self.recipe.finetune.of_round(number).batch, figures[key])
            for number, by_step in self.candidates().items()
            for step, figures in sorted(by_step.items(), key=lambda item: int(item[0]))
        ]
        return Curve(self.label, [x for x, _ in points], [y for _, y in points], "o", is_dashed=self.is_control)

    def by_round(self, start: Record, key: str) -> Curve:
        """The table's scores, with their standard errors."""
        means = [mean([one[key] for one in record["repeats"]]) for record in (start, *self.records)]
        rounds = [0, *(record["round"] for record in self.records)]
        errors = [each.std_error for each in means]
        return Curve(self.label, rounds, [each.value for each in means], "o", error=errors, is_dashed=self.is_control)

    def log(self) -> list[dict[str, Any]]:
        """Its lines, of a sweep only those of each round's best node, with images over all rounds."""
        chosen = {record["round"]: _setting(record) for record in self.records if "alpha" in record}
        lines = []
        for line in meter.read(self.place / self.run_dir.log_file.name, "round"):
            number, setting = line["round"], _setting(line) if "alpha" in line else None
            if not 1 <= number <= self.recipe.finetune.rounds or setting != chosen.get(number):
                continue
            lines.append({**line, "images": self.before(number) + line["n_images"]})
        return lines


def page(run_dir: rundir.RunDir, recipe: Recipe, state: dict[str, Any]) -> html.Page:
    """Of a run at any stage."""
    key = state.get("metric") or next(iter(state.get("reference", {}).get("repeats", [{}])[0]), "")
    method, rounds, control = recipe.finetune.objective.upper(), state.get("rounds", []), state.get("control", [])
    ddo = _Chain(method, recipe, run_dir, rounds)
    twin = _Chain("control", recipe, run_dir, control, is_control=True)
    chains = [ddo, twin] if control or recipe.finetune.control else [ddo]
    log, title = ddo.log(), pages.title(method, run_dir.path, recipe)
    blocks = [*_tiles(state, key), *pages.warnings(state), *_notes(recipe, state, log)]
    if "reference" in state:
        blocks.append(pages.protocol(recipe, _newest(run_dir, recipe, rounds), key))
    if "reference" not in state:
        return html.Page(title, "No figure yet: the reference is being scored.", blocks, [pages.recipe_section(recipe)])
    sections = [
        Section("Scores", _scores(recipe, state, key, chains)),
        Section("Same seeds, before and after", _comparison(run_dir, chains)),
        Section("Candidates of the newest round", _previews(ddo, key)),
        Section("Training", [html.Charts(_training(log, recipe)), *_of_control(twin)]),
        Section("Settings that were tried", _tried(recipe, rounds, key)),
        pages.cost([chain.log() for chain in chains], [text] if (text := report.sweep_cost(rounds)) else []),
        pages.provenance(_newest(run_dir, recipe, rounds), state),
        pages.recipe_section(recipe),
    ]
    return html.Page(title, headline(recipe, state, key), blocks, sections)


def headline(recipe: Recipe, state: dict[str, Any], key: str) -> str:
    """What has come out: the figure, its error, its control."""
    start, rounds = state["reference"], state.get("rounds", [])
    first = _score(start, key)
    if not rounds:
        return f"The reference has {key} {first} (lower is better); round 1 of {recipe.finetune.rounds} is under way."
    last, told = rounds[-1], report.improvements(state, key)
    number, method = len(rounds), recipe.finetune.objective.upper()
    words = f"{number} round{'s' if number > 1 else ''} of {method} took {key} from {first} to {_score(last, key)}"
    words += f" (lower is better), {Mean(**told['better_than_reference']).as_improvement} in pairs of the same seeds"
    if "better_than_control" in told:
        twin = state["control"][-1]
        words += f". Its control, trained without discrimination, is at {_score(twin, key)}: {method} is "
        words += f"{Mean(**told['better_than_control']).as_improvement} than the control"
    return words + "."


def _tiles(state: dict[str, Any], key: str) -> list[html.Block]:
    if "reference" not in state:
        return []
    rounds, control, start = state.get("rounds", []), state.get("control", []), state["reference"]
    tiles = [(f"{key} before", _score(start, key), "the reference")]
    if rounds:
        best = [record["round"] for record in rounds if record["promoted"]]
        tiles.append(
            (f"{key} after", _score(rounds[-1], key), f"weights of round {best[-1]}" if best else "no round was better")
        )
        if start["score"]:
            tiles.append(("after / before", f"{rounds[-1]['score'] / start['score']:.3f}", "1 is no gain"))
    if control:
        tiles.append((f"{key} of the control", _score(control[-1], key), "same images, plain loss"))
    return [html.Tiles(tiles)]


def _notes(recipe: Recipe, state: dict[str, Any], log: pages.Lines) -> list[html.Block]:
    rounds, notes = state.get("rounds", []), list[html.Block]()
    if not state.get("finished"):
        done = f" {log[-1]['images']:,} images so far." if log else ""
        told = f"Unfinished: this page is written again at evaluations, at most every 30 seconds.{done}"
        notes.append(html.Text(told, "warning"))
    if ending := report.ending(recipe, rounds) if state.get("finished") else "":
        notes.append(html.Text(f"{ending.capitalize()}."))
    if "reference" in state and len(state["reference"]["repeats"]) > 1:
        notes.append(html.Text(
            f"± is one standard error over {len(state['reference']['repeats'])} ranges of sampling seeds that decided "
            "nothing. It does not cover the training seed: train again with another --seed for that."
        ))  # fmt: skip
    if not recipe.finetune.control and rounds:
        notes.append(html.Text("No control was trained: what plain training on the same images would have given is not "
                               "known. The same command with --control adds it."))  # fmt: skip
    return notes


def _scores(recipe: Recipe, state: dict[str, Any], key: str, chains: Sequence[_Chain]) -> list[html.Block]:
    shown = [chain for chain in chains if chain.records]
    benchmark = recipe.metric.benchmark
    levels = [] if benchmark is None else [
        (f"{row.method} (arXiv {row.arxiv})", row.value) for row in published.rows(benchmark, key)
    ]  # fmt: skip
    charts = []
    if shown:
        note = "Bars: one standard error over ranges of seeds. Round 0 is the reference."
        curves = [chain.by_round(state["reference"], key) for chain in shown]
        charts.append(Chart(f"{key} by round", curves, "round", note, levels))
    within = [curve for chain in chains if (curve := chain.scores(key)).x]
    if within:
        note = "On the seeds that choose among candidates, where the best of many looks better than it is."
        charts.append(Chart(f"{key} of candidates within rounds", within, "images", note))
    blocks: list[html.Block] = [html.Charts(charts)]
    if shown:
        columns, rows = report.table(state, key)
        blocks.append(html.Table("By round", columns, rows))
    return blocks


def _comparison(run_dir: rundir.RunDir, chains: Sequence[_Chain]) -> list[html.Block]:
    blocks, before = list[html.Block](), Picture(run_dir.path / "reference.png", "before: the reference")
    for chain in chains:
        title = "control, " if chain.is_control else ""
        pictures = [
            Picture(
                chain.place / f"round-{record['round']:02d}" / "grid.png",
                f"{title}round {record['round']}, same seeds" + ("" if record["promoted"] else " (not promoted)"),
            )
            for record in chain.records
        ]
        if pictures or not chain.is_control:
            blocks.append(html.Compare(f"round of {chain.label}", [before, *pictures]))
    return blocks


def _previews(chain: _Chain, key: str) -> list[html.Block]:
    """Images of the candidates of the round that is being trained, else of the last, beside the reference's."""
    number, by_step = max(chain.candidates().items(), default=(0, {}))
    place, batch = chain.place / f"round-{number:02d}", chain.recipe.finetune.of_round(max(number, 1)).batch
    steps = sorted(map(int, by_step))
    kept = steps if len(steps) <= MOST_PREVIEWS else [steps[i * (len(steps) - 1) // (MOST_PREVIEWS - 1)]
                                                      for i in range(MOST_PREVIEWS)]  # fmt: skip
    shown = [
        Picture(
            place / "previews" / f"step-{step:06d}.png",
            f"round {number}, {step * batch:,} images, {key} {readable(by_step[str(step)][key])}: "
            "reference left, candidate right",
        )
        for step in kept
    ]
    return [html.Compare(f"candidates of round {number}", shown)] if shown else []


def _training(log: pages.Lines, recipe: Recipe) -> list[Chart]:
    if not log:
        return []
    breaks = _breaks(log)

    def chart(title: str, labels: dict[str, str], note: str = "") -> Chart:
        return Chart(title, [pages.curve(label, log, key) for key, label in labels.items()], "images", note, (), breaks)

    drawn = [
        chart("Log-ratio r, nats", {"r_real": "real", "r_fake": "generated"},
              "log p_model − log p_ref, mean over a batch. Both may fall; their difference is what counts."),
        chart("beta · std(r)", {"beta_r_std": "beta · std(r)"},
              "Near 1 the loss uses the log-ratio's range; far above, it is saturated."),
        chart("Discriminator accuracy", {"accuracy": "accuracy"}, "Share of images on the right side; 0.5 is chance."),
        chart("Plain loss on data / reference's", {"denoising_ratio": "ratio"},
              f"Training stops above {recipe.finetune.max_denoising_ratio:g}: the model is leaving the data."),
    ]  # fmt: skip
    drawn = [each for each in drawn if any(line.x for line in each.lines)]
    return [*drawn, *pages.charts_of(log, "loss", "grad_norm", "lr", breaks=breaks)]


def _breaks(log: pages.Lines) -> list[float]:
    """Images after which the next round begins."""
    return [one["images"] for one, other in itertools.pairwise(log) if other["round"] != one["round"]]


def _of_control(twin: _Chain) -> list[html.Block]:
    log = twin.log()
    drawn = pages.charts_of(log, "loss", "grad_norm", breaks=_breaks(log))
    return [html.Charts([each._replace(title=f"Control: {each.title.lower()}") for each in drawn])]


def _tried(recipe: Recipe, rounds: Sequence[Record], key: str) -> list[html.Block]:
    return [report.sweep_table(record, recipe, key) for record in rounds if "nodes" in record]


def _newest(run_dir: rundir.RunDir, recipe: Recipe, rounds: Sequence[Record]) -> Any:
    """The weights that the run has led to so far."""
    file = run_dir.path / f"round-{len(rounds):02d}" / "best.safetensors"
    return file if file.is_file() else recipe.model.ckpt


def _score(record: Record, key: str) -> str:
    return str(mean([figures[key] for figures in record["repeats"]]))


def _setting(record: Record) -> Setting:
    return Setting(record["alpha"], record["beta"])
