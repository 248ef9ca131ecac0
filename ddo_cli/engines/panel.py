"""What a terminal shows below the bars while a run goes on: where it stands, its scores, its rounds."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddo_cli import console, dist
from ddo_cli.metrics.uncertainty import Mean, mean
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report.numbers import readable

ROUNDS = 8  # the newest ones that are shown: with all else they fit 24 lines


class Panel:
    """Lines of text, made when something changes: they are drawn several times a second."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.lines = recipe, list[str]()
        self.header, self.left, self.last = "", "", ""
        self.table: list[str] = []
        self.best: tuple[float, int] | None = None  # score of a candidate of this round, and its images
        self.started: tuple[float, float] | None = None  # time and share of the run at its first step

    def begins(self, out: Path, model: nn.Module, device: torch.device, state: dict[str, Any]) -> None:
        """Says what is trained, where, and what earlier calls have come to."""
        self.header = what_and_where(model, device, out)
        self.rounds_of(state)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While the run goes on, on a terminal."""
        with console.panel(lambda: self.lines):
            yield

    def stepped(self, images: int, is_control: bool) -> None:
        """images: that DDO, or the control, has trained on in all rounds."""
        settings, now = self.recipe.finetune, time.monotonic()
        total = sum(settings.of_round(number).images_per_round for number in range(1, settings.rounds + 1))
        share = (images / total + is_control) / (2 if settings.control else 1)
        if self.started is None:
            self.started = now, share
        start, before = self.started
        if share > before:
            left = (now - start) * max(1 - share, 0) / (share - before)
            self.left = f"run: {share:.0%}, {console.clock(left)} left at most"
        self._write()

    def scored(self, title: str, key: str, value: float, images: int) -> None:
        """A candidate's score. title: of its round."""
        if self.best is None or value < self.best[0]:
            self.best = value, images
        best, there = self.best
        self.last = f"{title}: {key} {readable(value)} at {images:,} images; best {readable(best)} at {there:,}"
        self._write()

    def rounds_of(self, state: dict[str, Any]) -> None:
        """The table, of a state with rounds."""
        self.best = None  # candidates of one round are compared
        if "reference" in state and "metric" in state:
            self.table = _table(state, state["metric"])
        self._write()

    def _write(self) -> None:
        self.lines = [line for line in (self.header, self.left, self.last, *self.table) if line]


def what_and_where(network: nn.Module, device: torch.device, out: Path) -> str:
    """The first line of a long command: "64,960 parameters on cpu, in runs/quickstart"."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    processes = f" by {dist.world_size()} processes" if dist.world_size() > 1 else ""
    return f"{parameters:,} parameters on {device.type}{processes}, in {out}"


def _table(state: dict[str, Any], key: str) -> list[str]:
    rows = [("reference", _score(state["reference"], key), "")]
    for name, title in (("rounds", "round"), ("control", "control")):
        for record in state.get(name, []):
            outcome = "promoted" if record["promoted"] else "not promoted"
            than = Mean(**record["improvement"]).as_improvement
            rows.append((f"{title} {record['round']}", _score(record, key), f"{outcome}, {than}"))
    rows = [rows[0], *rows[1:][-ROUNDS:]] if len(rows) > 1 else []
    return [f"{name:<12}{score:>16}  {outcome}" for name, score, outcome in rows]


def _score(record: dict[str, Any], key: str) -> str:
    return str(mean([figures[key] for figures in record["repeats"]]))
