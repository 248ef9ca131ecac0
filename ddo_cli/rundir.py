"""A run's directory: its lock, its resolved recipe, and how far it has come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from pydantic import ValidationError

from ddo_cli import console, dist
from ddo_cli.errors import DdoError, RunError
from ddo_cli.files import read_json, sweep, write_json, write_text
from ddo_cli.recipe import differing_keys, to_yaml
from ddo_cli.schema import Recipe


class RunDir:
    """Paths and state of one run. `state.json` is replaced after each stage; a killed run continues from it."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.state_file = path / "state.json"
        self.log_file = path / "log.jsonl"
        self.final = path / "final.safetensors"

    def state(self) -> dict[str, Any]:
        """What `advance` wrote last; empty for a new run."""
        return read_json(self.state_file) if self.state_file.is_file() else {}

    def advance(self, **changes: Any) -> dict[str, Any]:
        """Replaces the given keys of the state (main process only); returns the state."""
        state = {**self.state(), **changes}
        if dist.is_main():
            write_json(self.state_file, state)
        return dist.from_main(state)

    def claim(self, command: str, recipe: Recipe, **identity: Any) -> dict[str, Any]:
        """Takes a new directory, or continues one with the same command, recipe and identity (e.g. hashes of inputs).

        Returns the state, the same on every process. Raises RunError listing what differs.
        """
        if dist.is_main():
            if self.recipe_file.is_file():
                self._compare(command, recipe, identity)
            elif any(entry.name != self.state_file.name and entry.name[0] != "." for entry in self.path.iterdir()):
                raise RunError(f"{self.path} is not empty and holds no run; choose another --out")
            else:
                # The recipe goes last: a directory with one has a complete identity.
                write_json(self.state_file, {"command": command, **identity})
                write_text(self.recipe_file, to_yaml(recipe))
            sweep(self.path)
        return dist.from_main(self.state())

    def is_finished(self, state: dict[str, Any]) -> bool:
        """Whether nothing is left to do; says so."""
        is_finished = bool(state.get("finished")) and dist.from_main(self.final.is_file())
        if is_finished:
            console.info(f"{self.path} is finished; nothing to do")
        return is_finished

    def _compare(self, command: str, recipe: Recipe, identity: dict[str, Any]) -> None:
        state = self.state()
        try:
            saved = yaml.safe_load(self.recipe_file.read_text())
            if not isinstance(saved, dict):
                raise ValueError(f"it holds a {type(saved).__name__}")
        except (yaml.YAMLError, ValueError) as error:
            raise RunError(f"{self.recipe_file} is damaged ({error}); choose another --out") from None
        lines = differing_keys(
            {"command": command, **identity}, {key: state.get(key) for key in ("command", *identity)}
        )
        with contextlib.suppress(ValidationError):  # keys that are newer than the run had their defaults
            saved = Recipe.model_validate(saved).model_dump(mode="json")
        lines += differing_keys(recipe.model_dump(mode="json"), saved)
        if lines:
            raise RunError(
                f"{self.path} belongs to another run; choose another --out, or give the same options to continue it. "
                "Differences (there -> now):\n  " + "\n  ".join(lines)
            )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[RunDir]:
    """The run directory, held by this process (and the others of its torchrun). The lock ends with the process.

    Raises RunError if another process holds it.
    """
    run = RunDir(path)
    if not dist.is_main():
        dist.barrier()
        yield run
        return
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    is_foreign = not (path / ".lock").exists() and any(path.iterdir())
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{path} is in use by another process; wait for it, or choose another --out") from None
    try:
        dist.barrier()
        yield run
    except DdoError:
        if is_foreign:  # refused: nothing of ours stays in it
            (path / ".lock").unlink(missing_ok=True)
        raise
    finally:
        lock.release()
