"""The frame of every command that trains: its directory, its plan, its end."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddo_cli import console, dist, rundir
from ddo_cli.engines.panel import what_and_where
from ddo_cli.errors import UsageError
from ddo_cli.precision import resolved
from ddo_cli.recipe.schema import Recipe, SamplingRecipe, TrainRecipe
from ddo_cli.recipe.training import Precision
from ddo_cli.training.loop import Plan
from ddo_cli.training.meter import Meter
from ddo_cli.training.state import drop_state, state_directory


@contextlib.contextmanager
def claimed(
    command: str,
    recipe: Recipe,
    out: Path,
    identity: dict[str, Any],
    network: nn.Module,
    device: torch.device,
    needed: Callable[[rundir.RunDir, dict[str, Any], str], str | None] = lambda run_dir, state, name: _copy(name),
) -> Iterator[tuple[rundir.RunDir, dict[str, Any]]]:
    """The run's directory, locked, and its state. Raises RunError as `RunDir.claim` and `RunDir.inspect`.

    network, device: what is trained, or finetuned, and where. needed: for `inspect`, of run, state and name.
    """
    with rundir.locked(out) as run_dir:
        state = run_dir.claim(command, recipe, **identity)
        state = run_dir.inspect(partial(needed, run_dir, state))
        if state.get("finished") and dist.is_main():
            drop_state(state_file(run_dir))  # if it was killed before it did so itself
        console.info(what_and_where(network, device, out))
        console.info("precision: " + ", ".join(f"{use} {value}" for use, value in identity["precision"].items()))
        yield run_dir, state


def _copy(name: str) -> str | None:
    """Of a run of one stage nothing but the saved state is read again; `is_finished` looks at the result."""
    return "" if name == "final.safetensors" else None


def precision_of(
    settings: TrainRecipe, spec: SamplingRecipe | None, device: torch.device
) -> dict[str, dict[str, Precision]]:
    """What passes of a run compute in, as a part of its identity: rounds and scores of two devices do not mix, where
    auto means another precision on each of them.
    """
    sampling = {"sampling": resolved(spec.precision, device)} if spec is not None else {}
    return {"precision": {"training": resolved(settings.precision, device), **sampling}}


def num_steps(images: int, batch: int) -> int:
    """Steps that take in at least so many images."""
    return -(-images // batch)


MOST_EVALUATIONS = 10_000  # of a training; our choice


def steps_between(key: str, images: int, batch: int, steps: int) -> int:
    """Steps between evaluations that are so many images apart. Raises UsageError for far too many of them.

    key: of the recipe, for the message. steps: of the whole training.
    """
    every = max(images // batch, 1)
    if (count := steps // every) > MOST_EVALUATIONS:
        raise UsageError(
            f"{key} = {images} makes {count:,} evaluations of {steps:,} steps, more than {MOST_EVALUATIONS:,}; raise it"
        )
    return every


def state_file(run_dir: rundir.RunDir) -> Path:
    """What resuming needs."""
    return run_dir.path / "train-state.safetensors"


def plan_of(
    run_dir: rundir.RunDir,
    recipe: Recipe,
    title: str,
    steps: int,
    settings: TrainRecipe,
    device: torch.device,
    evaluate_at: Iterable[int] = (),
) -> tuple[Plan, Meter]:
    """Plan and meter of a run that trains one network. Its last good file is the newest checkpoint, or the saved state,
    which holds weights, too.
    """
    state = state_file(run_dir)

    def last_good() -> Path | str:
        return newest(state, state_directory(state), *run_dir.path.glob("checkpoints/*.safetensors"))

    plan = Plan(title, steps, settings, (recipe.seed,), state, recipe.name, last_good, frozenset(evaluate_at))
    return plan, Meter(run_dir.log_file, {}, settings.batch, device)


def finish(run_dir: rundir.RunDir, **figures: Any) -> dict[str, Any]:
    """Marks the run as finished and drops what resuming needed; returns the state."""
    run_dir.advance(finished=True, **figures)
    if dist.is_main():
        drop_state(state_file(run_dir))
    return run_dir.advance()  # again: the state before knows of the end, too


def result(run_dir: rundir.RunDir, state: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The object that the command prints with `--json`: the run's paths and these figures."""
    return {
        "out": str(run_dir.path),
        "final": str(run_dir.final),
        "precision": state["precision"],
        **{key: state[key] for key in keys},
    }


def newest(*places: Path) -> Path | str:
    """The latest written of the files or directories that exist, or "none yet"."""
    there = [place for place in places if place.exists()]
    return max(there, key=lambda place: place.stat().st_mtime, default="none yet")
