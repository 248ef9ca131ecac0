"""`make evidence`: the figures of the README and of docs/evidence/figures.md, by the commands that users type.

    python benchmarks/evidence.py                       # what is missing; some hours of a core
    python benchmarks/evidence.py --only toy2d,dg       # some experiments
    python benchmarks/evidence.py --page                # the page alone, from docs/evidence/figures.json

Every command's answer (`--json`) is kept in the working directory and not asked for again, so that a stopped program
continues. An experiment is in figures.json when all its seeds are done. `make evidence` computes on one thread:
training rounds otherwise with another number of threads, and so do the last digits of the figures.
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs" / "evidence"
FIGURES, PAGE = DOCS / "figures.json", DOCS / "figures.md"
SEEDS = (0, 1, 2)
Answer = dict[str, Any]


class Experiment(NamedTuple):
    """Lines of `ddo`, carried out for each training seed, and where their figures stand in the answers."""

    # {seed} is the training seed, {place} the directory of this seed, {of[NAME]} that of another experiment for this
    # seed, {shared} one for all seeds; a line without the others is carried out once.
    lines: tuple[str, ...]
    # name -> number of the line, then keys of its JSON object; or what computes it from all answers
    figures: Mapping[str, str | Callable[[Sequence[Answer]], float]]
    seeds: tuple[int, ...] = SEEDS


class Row(NamedTuple):
    """A line of a table: what was improved, and how much, beside its control. All are names of figures."""

    title: str
    experiment: str
    before: str = "reference"
    after: str = "improved"
    control: str | None = "control"


_FINETUNED = {
    "reference": "{0} reference_score", "improved": "{0} final_score", "control": "{0} control final_score",
    "gain": "{0} better_than_reference value", "error": "{0} better_than_reference std_error",
    "beyond control": "{0} better_than_control value", "its error": "{0} better_than_control std_error",
}  # fmt: skip
SAMPLERS = ("heun 18", "heun 36", "dpmpp-2m 20", "dpm-v3 20")
WEIGHTS = (1, 2, 4)
_SEEDS_OF_SCORES = "--seeds 100000-112287"  # three ranges of 4096, which no run draws
_FEWER_SEEDS = "--seeds 100000-103071"  # three of 1024


def _finetuned(line: int = 0, has_errors: bool = True) -> dict[str, str]:
    """has_errors: whether the score is of samples; a density has none."""
    kept = (name for name in _FINETUNED if has_errors or "error" not in name)
    return {name: _FINETUNED[name].format(line) for name in kept}


def _scored(draw: str, out: str, seeds: str = _SEEDS_OF_SCORES) -> tuple[str, str]:
    """Draws a set and scores it."""
    place = f"{{place}}/{out}" if _is_of_seed(draw) else f"{{shared}}/{out}"
    return f"{draw} {seeds} --format npz --out {place}", f"fid {place} --repeat 3"


def _is_of_seed(line: str) -> bool:
    """Whether a line differs from one training seed to another."""
    return any(part in line for part in ("{seed}", "{place}", "{of["))


def _samplers() -> Experiment:
    lines, figures = list[str](), dict[str, str]()
    for sampler in SAMPLERS:
        name, steps = sampler.split()
        for model, file in (("reference", "embedded:digits16"), ("improved", "{of[quickstart]}/run/final.safetensors")):
            draw = f"sample --ckpt {file} sampler={name} steps={steps}"
            lines += _scored(draw, f"{model}-{name}-{steps}")
            figures[f"{model}, {sampler}"] = f"{len(lines) - 1} fd_embedded"
    return Experiment(tuple(lines), figures)


def _guided(
    model: str, disc: str, recipe: str = "", seeds: str = _SEEDS_OF_SCORES, first: Sequence[str] = ()
) -> Experiment:
    """A discriminator against a model, and guidance by it at several weights; by an untrained one for a control.

    first: lines that make the model.
    """
    lines = [*first, f"train-disc{recipe} --ckpt {model} --control --seed {{seed}} --out {{place}}/{disc}"]
    at = len(first)
    figures = {"gain": f"{at} gain gain", "error": f"{at} gain error", "accuracy": f"{at} heldout_accuracy"}
    trained, untrained = f"{{place}}/{disc}/final.safetensors", f"{{place}}/{disc}/untrained.safetensors"
    lines += _scored(f"sample --ckpt {model}", "plain", seeds)
    figures["reference"] = f"{len(lines) - 1} fd_embedded"
    for weight, file, name in ((1, untrained, "control"), *((w, trained, f"weight {w}") for w in WEIGHTS)):
        lines += _scored(f"guide-sample --disc {file} --dg-weight {weight}", name.replace(" ", "-"), seeds)
        figures[name] = f"{len(lines) - 1} fd_embedded"
    return Experiment(tuple(lines), figures)


def _beta_auto(recipe: str, ckpt: str, alpha: float, betas: str, first: Sequence[str] = ()) -> Experiment:
    """One round with `--beta auto`, and the best one of 25 pairs that are all trained to the end; both on fresh seeds.

    first: lines that make the model.
    """
    at, searched = len(first), ("auto", "grid")
    common = (
        f"finetune-ddo --recipe {recipe} --ckpt {ckpt} --rounds 1 --seed {{seed}} metric.num_images=2048 "
        "finetune.sweep_images=2048 finetune.max_denoising_ratio=10"
    )
    lines = (
        *first,
        f"{common} --alpha {alpha} --beta auto --out {{place}}/auto",
        f"{common} --alpha 0.5,1,2,4,8 --beta {betas} --out {{place}}/grid finetune.sweep_rungs=1",
    )
    figures: dict[str, str | Callable[[Sequence[Answer]], float]] = {"reference": f"{at} reference_score"}
    for line, name in enumerate(searched, at):
        figures[name] = f"{line} final_score"
        figures[f"{name}, alpha"], figures[f"{name}, beta"] = (f"{line} rounds 0 {key}" for key in ("alpha", "beta"))
        figures[f"{name}, steps"], figures[f"{name}, scores"] = partial(_steps, line), partial(_scores, line)
    return Experiment(lines, figures, seeds=(0,))


def _steps(line: int, answers: Sequence[Answer]) -> float:
    """Optimizer steps of all pairs that a round tried."""
    return sum(node["stopped_at"] for node in answers[line]["rounds"][0]["nodes"])


def _scores(line: int, answers: Sequence[Answer]) -> float:
    """Scores by which a round chose among them."""
    return sum(len(node["rungs"]) + len(node["candidates"]) for node in answers[line]["rounds"][0]["nodes"])


def _objectives() -> Experiment:
    """One round with each objective that needs no pairs of the user's, at its best beta of a sweep."""
    lines, figures = list[str](), dict[str, str]()
    for name, options in (
        ("ddo", "--alpha 1 --beta 0.01 --control"), ("spin", "--beta 0.01"), ("cca", "--alpha 1 --beta 0.05"),
    ):  # fmt: skip
        lines.append(
            f"finetune-ddo --rounds 1 --objective {name} {options} --seed {{seed}} --out {{place}}/{name} "
            "metric.num_images=2048 finetune.max_denoising_ratio=10"
        )
        figures[name] = f"{len(lines) - 1} final_score"
    figures["reference"], figures["control"] = "0 reference_score", "0 control final_score"
    # Of what was not promoted, too: by how much the best candidate is better, on the seeds of promotion.
    for name, rounds in (("ddo", "0"), ("spin", "1"), ("cca", "2"), ("control", "0 control")):
        for told, key in (("gain", "value"), ("error", "std_error")):
            figures[f"{name}, {told}"] = f"{rounds} rounds 0 improvement {key}"
    return Experiment(tuple(lines), figures)


def _diffrs() -> Experiment:
    """Guidance and rejection by one discriminator, with Heun and at most 70 evaluations of model and discriminator."""
    drawn = {
        "reference": "sample --ckpt embedded:digits16 --sampler heun --steps 35",
        "reference, 18 steps": "sample --ckpt embedded:digits16 --sampler heun --steps 18",
        "guidance": "guide-sample --disc {of[dg]}/disc/final.safetensors --dg-weight 2 --sampler heun --steps 24",
        "DiffRS": "guide-sample --disc {of[dg]}/disc/final.safetensors --diffrs --sampler heun --steps 18",
    }
    lines, figures = list[str](), dict[str, str]()
    for name, line in drawn.items():
        lines += _scored(line, name.replace(", ", "-").replace(" ", "-"), _FEWER_SEEDS)
        drawing, scoring = len(lines) - 2, len(lines) - 1
        figures[name] = f"{scoring} fd_embedded"
        figures[f"{name}, evaluations"] = f"{drawing} nfe"
        if "--disc" in line:
            figures[f"{name}, of the discriminator"] = f"{drawing} disc_nfe"
    return Experiment(tuple(lines), figures)


_FLOW = "pretrain --recipe digits16-flow --out {shared}/digits16-flow"
_RUN = "--control --seed {seed} --out {place}/run"
EXPERIMENTS = {
    "quickstart": Experiment((f"finetune-ddo --rounds 4 --alpha 4 --beta 0.05 {_RUN}",), _finetuned()),
    "samplers": _samplers(),
    "dg": _guided("embedded:digits16", "disc"),
    "dg-of-ddo": _guided("{of[quickstart]}/run/final.safetensors", "disc"),
    "beta-auto": _beta_auto("quickstart", "embedded:digits16", 4, "0.005,0.01,0.02,0.05,0.1"),
    "objectives": _objectives(),
    "diffrs": _diffrs(),
    "toy2d": Experiment((f"finetune-ddo --recipe toy2d {_RUN}",), _finetuned(has_errors=False)),
    "digits8-ar": Experiment((f"finetune-ddo --recipe digits8-ar {_RUN}",), _finetuned()),
    "digits8-ar-beta-auto": _beta_auto("digits8-ar", "embedded:digits8", 0.5, "0.01,0.02,0.05,0.1,0.2"),
    "digits32-var": Experiment(
        (
            "pretrain --recipe digits32-vqvae --seed {seed} --out {place}/digits32-vqvae",
            "pretrain --recipe digits32-var --seed {seed} --out {place}/digits32-var "
            "model.options.tokenizer={place}/digits32-vqvae/final.safetensors",
            f"finetune-ddo --recipe digits32-var --ckpt {{place}}/digits32-var/final.safetensors {_RUN}",
        ),
        _finetuned(2),
    ),
    "digits32-edm2": Experiment(
        (
            "pretrain --recipe digits32-edm2 --seed {seed} --out {place}/digits32-edm2",
            f"finetune-ddo --recipe digits32-edm2 --ckpt {{place}}/digits32-edm2/final.safetensors {_RUN}",
        ),
        _finetuned(1),
    ),
    "digits16-flow": Experiment(
        (
            _FLOW,
            f"finetune-ddo --recipe digits16-flow --ckpt {{shared}}/digits16-flow/final.safetensors {_RUN} "
            "metric.num_images=1024",
        ),
        _finetuned(1),
    ),
    "digits16-flow-beta-auto": _beta_auto(
        "digits16-flow", "{shared}/digits16-flow/final.safetensors", 1, "0.00125,0.0025,0.005,0.01,0.02", [_FLOW]
    ),
    "digits16-flow-dg": _guided(
        "{shared}/digits16-flow/final.safetensors", "disc", " --recipe digits16-flow", _FEWER_SEEDS, [_FLOW]
    ),
    "digits16-flow-dg-of-ddo": _guided(
        "{of[digits16-flow]}/run/final.safetensors", "disc", " --recipe digits16-flow", _FEWER_SEEDS
    ),
}  # fmt: skip


def _searches(recipe: str, experiment: str) -> list[Row]:
    titles = {"auto": "`--beta auto`", "grid": "best of 25 pairs"}
    return [
        Row(f"One round of {recipe}, {title}", experiment, after=name, control=None) for name, title in titles.items()
    ]


README_ROWS = (
    Row("DDO, four rounds (`--rounds 4 --alpha 4 --beta 0.05`)", "quickstart"),
    *(Row(f"DG, `--dg-weight {weight}`", "dg", after=f"weight {weight}") for weight in WEIGHTS),
)
ROWS = (
    *README_ROWS,
    *(
        Row(f"The quickstart's models, drawn with {sampler.replace(' ', ', ')} steps", "samplers",
            f"reference, {sampler}", f"improved, {sampler}", None)
        for sampler in SAMPLERS
    ),
    *(Row(f"DG of the DDO model, `--dg-weight {w}`", "dg-of-ddo", after=f"weight {w}") for w in WEIGHTS),
    *_searches("the quickstart", "beta-auto"),
    *(Row(f"One round, `--objective {name}`", "objectives", after=name) for name in ("ddo", "spin", "cca")),
    *(
        Row(f"{title}, Heun, 63 to 70 evaluations", "diffrs", after=name, control=None)
        for title, name in (("DG, `--dg-weight 2`", "guidance"), ("DiffRS", "DiffRS"))
    ),
    Row("DDO in the plane (`--recipe toy2d`), Jensen-Shannon in nats", "toy2d"),
    Row("DDO, autoregressive (`--recipe digits8-ar`)", "digits8-ar"),
    *_searches("digits8-ar", "digits8-ar-beta-auto"),
    Row("DDO, VAR (`--recipe digits32-var`)", "digits32-var"),
    Row("DDO, EDM2 (`--recipe digits32-edm2`)", "digits32-edm2"),
    Row("DDO, flow matching (`--recipe digits16-flow`)", "digits16-flow"),
    *_searches("digits16-flow", "digits16-flow-beta-auto"),
    *(Row(f"DG, flow matching, `--dg-weight {w}`", "digits16-flow-dg", after=f"weight {w}") for w in WEIGHTS),
    *(
        Row(f"DG of the DDO model, flow matching, `--dg-weight {w}`", "digits16-flow-dg-of-ddo", after=f"weight {w}")
        for w in WEIGHTS
    ),
)  # fmt: skip


# --- Tables


def shown(values: Iterable[float]) -> str:
    """The mean over seeds and their standard deviation, both to the second digit of the deviation, at least three."""
    values = [*values]
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    digits = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 2
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if spread >= 0.5 * 10**-digits else f"{mean:.{digits}f}"


def line(row: Row, figures: dict[str, Any]) -> str:
    """A row of a table in Markdown: before, after, ratio (mean over seeds), control. figures: of all experiments."""
    of_seed = figures[row.experiment]["figures"]
    before, after = of_seed[row.before], of_seed[row.after]
    ratio = shown([after[seed] / before[seed] for seed in after])
    control = shown(of_seed[row.control].values()) if row.control else ""
    return f"| {row.title} | {shown(before.values())} | {shown(after.values())} | {ratio} | {control} |"


HEAD = ("| | reference | improved | ratio | control |", "|---|---|---|---|---|")


def table(rows: Sequence[Row], figures: dict[str, Any]) -> str:
    """Those rows whose experiment is there."""
    return "\n".join([*HEAD, *(line(row, figures) for row in rows if row.experiment in figures)])


def page(figures: dict[str, Any]) -> str:
    """docs/evidence/figures.md."""
    parts = [
        "# Figures of one command\n",
        "`make evidence` carries out every line below, on one thread, for three training seeds (one where a table "
        "has one column), and writes this page. Mean ± standard deviation over the seeds of training; `fd_embedded` "
        "(or what the line says), lower is better. "
        "*Control*: plain training on the same images with the same selection; of DG, an untrained discriminator.\n",
        table(ROWS, figures) + "\n",
        "[Experiments](experiments.md) says what the figures mean, and what they do not show.",
    ]
    for name, told in figures.items():
        names = list(told["figures"])
        seeds = list(told["figures"][names[0]])
        parts.append(f"\n## {name}\n")
        parts.append("```text\n" + "\n".join(f"ddo {text}" for text in told["lines"]) + "\n```\n")
        parts.append("\n".join([
            f"| | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---|" + "---|" * len(seeds),
            *(f"| {key} | {' | '.join(f'{value:.4g}' for value in told['figures'][key].values())} |" for key in names),
        ]))  # fmt: skip
        parts.append(f"\n{told['machine']}.")
    return "\n".join(parts) + "\n"


# --- Running


def answer(words: Sequence[str], file: Path) -> Answer:
    """What `ddo WORDS --json` prints, kept in `file`."""
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["words"] == [*words]:
            return dict(kept["answer"])
    done = subprocess.run([sys.executable, "-m", "ddo_cli", *words, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"`ddo {shlex.join(words)}` ended with {done.returncode}: {done.stdout}")
    told: Answer = json.loads(done.stdout)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"words": [*words], "answer": told}, indent=1))
    return told


def value_at(answers: Sequence[Answer], path: str) -> float:
    """A figure, by the number of the line and keys."""
    value: Any = answers
    for key in path.split():
        value = value[int(key)] if isinstance(value, Sequence) else value[key]
    return float(value)


def run(name: str, root: Path) -> dict[str, Any]:
    """All seeds of an experiment, as figures.json holds it."""
    experiment = EXPERIMENTS[name]
    figures: dict[str, dict[str, float]] = {figure: {} for figure in experiment.figures}
    for seed in experiment.seeds:
        place, shared = root / name / f"seed-{seed}", root / name / "shared"
        of, answers = {other: root / other / f"seed-{seed}" for other in EXPERIMENTS}, []
        for number, text in enumerate(experiment.lines):
            words = shlex.split(text.format(seed=seed, place=place, shared=shared, of=of))
            print(f"{name}, seed {seed}: ddo {shlex.join(words)}", flush=True)
            answers.append(answer(words, (place if _is_of_seed(text) else shared) / f"answer-{number}.json"))
        for figure, path in experiment.figures.items():
            try:
                figures[figure][str(seed)] = path(answers) if callable(path) else value_at(answers, path)
            except KeyError as missing:
                sys.exit(f"{name}, seed {seed}: the answer has no {missing} for '{figure}' ({path})")
    return {"lines": told_lines(name), "figures": figures, "machine": machine()}


def told_lines(name: str) -> list[str]:
    """The lines of an experiment, for people."""
    lines = EXPERIMENTS[name].lines
    return [
        text.format(seed="SEED", place=name, shared=name, of={other: other for other in EXPERIMENTS}) for text in lines
    ]


def machine() -> str:
    """For people: processor, threads, versions."""
    import torch

    model = next((row.partition(":")[2].strip() for row in _cpuinfo() if row.startswith("model name")), "")
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{model or platform.machine()}, {threads} thread(s), torch {torch.__version__.partition('+')[0]}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="experiments, between commas")
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="working directory")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(EXPERIMENTS)
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        parser.error(f"unknown experiments {', '.join(unknown)}; known: {', '.join(EXPERIMENTS)}")
    figures = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    for name in [] if options.page else names:
        figures[name] = run(name, options.out)
        figures = {known: figures[known] for known in EXPERIMENTS if known in figures}
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        PAGE.write_text(page(figures), encoding="utf-8")
    PAGE.write_text(page(figures), encoding="utf-8")
    print(table(README_ROWS, figures))


if __name__ == "__main__":
    main()
