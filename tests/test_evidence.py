"""The README's figures are those of docs/evidence/figures.json, and the program that makes them keeps what is done."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ddo_cli import cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402 (lies outside the package)

FIGURES = json.loads(evidence.FIGURES.read_text())


def test_the_table_of_the_readme_is_that_of_the_figures():
    assert evidence.table(evidence.README_ROWS, FIGURES) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_is_that_of_the_figures():
    assert evidence.PAGE.read_text(encoding="utf-8") == evidence.page(FIGURES)


def test_the_figures_are_of_the_lines_that_are_carried_out_now():
    for name, told in FIGURES.items():
        experiment = evidence.EXPERIMENTS[name]
        assert told["lines"] == evidence.told_lines(name)
        assert {tuple(values) for values in told["figures"].values()} == {tuple(map(str, experiment.seeds))}
        assert told["figures"].keys() == experiment.figures.keys()


def test_every_row_is_of_known_figures():
    for row in evidence.ROWS:
        known = evidence.EXPERIMENTS[row.experiment].figures
        assert {row.before, row.after, row.control} <= {*known, None}


@pytest.mark.parametrize("name", evidence.EXPERIMENTS)
def test_lines_are_those_of_commands(name):
    commands = typer.main.get_command(cli.app).commands
    for text in evidence.told_lines(name):
        command, *words = shlex.split(text.replace("SEED", "0"))
        commands[command].make_context(command, [*words, "--json"])  # raises for an unknown option


def test_what_is_answered_is_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def run(words, **_):
        asked.append(words[3:-1])
        return subprocess.CompletedProcess(words, 0, json.dumps({"score": len(asked), "of": {"control": 9.0}}))

    monkeypatch.setattr(subprocess, "run", run)
    lines = ("sample --out {shared}/a", "fid {place}/b --seed {seed}")
    experiment = evidence.Experiment(lines, {"reference": "0 score", "improved": "1 score", "control": "1 of control"})
    monkeypatch.setitem(evidence.EXPERIMENTS, "made-up", experiment)
    once = evidence.run("made-up", tmp_path)
    assert len(asked) == 1 + 3
    assert once["figures"]["reference"] == {"0": 1, "1": 1, "2": 1}
    assert once["figures"]["improved"] == {"0": 2, "1": 3, "2": 4}
    assert evidence.run("made-up", tmp_path) == once
    assert len(asked) == 4
    row = evidence.Row("Made up", "made-up")
    assert evidence.line(row, {"made-up": once}) == "| Made up | 1.00 | 3.00 ± 1.00 | 3.00 ± 1.00 | 9.00 |"


def test_a_search_is_told_with_its_cost():
    pairs = [
        {"stopped_at": 60, "rungs": [{"step": 60}], "candidates": []},
        {"stopped_at": 120, "rungs": [{"step": 60}], "candidates": [{"step": 40}, {"step": 80}, {"step": 120}]},
    ]
    answers = [{}, {"final_score": 9, "rounds": [{"alpha": 4, "beta": 0.03, "nodes": pairs}]}]
    figures = evidence._beta_auto("quickstart", "embedded:digits16", 4, "0.1", ["pretrain"]).figures
    told = {
        name: path(answers) if callable(path) else evidence.value_at(answers, path)
        for name, path in figures.items()
        if name.startswith("auto")
    }
    assert told == {"auto": 9, "auto, alpha": 4, "auto, beta": 0.03, "auto, steps": 180, "auto, scores": 5}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([58.29] * 3, "58.3"),
        ([11.91, 16.66, 11.56], "13.4 ± 2.8"),
        ([0.0403, 0.0405, 0.0406], "0.0405 ± 0.0002"),
        ([0], "0.00"),
    ],
)
def test_figures_have_three_digits(values, text):
    assert evidence.shown(values) == text
