"""A run's directory: its lock, its resolved recipe, and how far it has come.

Every directory that a command writes is checked before it is locked or anything is written there, and so by dry runs;
and once more, by `claim`, under the lock.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from pydantic import ValidationError

from ddo_cli import console, dist
from ddo_cli.errors import RunError
from ddo_cli.files import LOCK, read_json, sweep, write_json, write_text
from ddo_cli.recipe.load import differing_keys, to_yaml
from ddo_cli.recipe.schema import Recipe


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

        Returns the state, the same on every process. Raises RunError as `check` does.
        """
        self.check(command, recipe, **identity)
        if dist.is_main():
            if not self.recipe_file.is_file():
                # The recipe goes last: a directory with one has a complete identity.
                write_json(self.state_file, {"command": command, **identity})
                write_text(self.recipe_file, to_yaml(recipe))
            sweep(self.path, below=True)
        return dist.from_main(self.state())

    def check(self, command: str, recipe: Recipe, **identity: Any) -> None:
        """Raises RunError, listing what differs, unless `claim` would take the directory. Writes nothing."""
        if not dist.is_main():
            return
        if self.recipe_file.is_file():
            self._compare(command, recipe, identity)
        else:
            own = (self.state_file.name,) if self._is_half_claimed(command, identity) else ()
            check_free(self.path, "run", own)

    def _is_half_claimed(self, command: str, identity: dict[str, Any]) -> bool:
        """Whether the state is what a `claim` that was killed before it wrote the recipe leaves."""
        try:
            state = json.loads(self.state_file.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(state, dict) and state.keys() == {"command", *identity} and state["command"] == command

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


def check_free(path: Path, what: str, own: Container[str] = ()) -> None:
    """Raises RunError unless a new `what` may be made there: `path` does not exist, or is a directory that holds
    nothing but hidden files and `own`.
    """
    _check_directory(path)
    entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    for name in entries:
        if name[0] != "." and name not in own:
            raise RunError(f"{path} is not empty and holds no {what}: there is {name}; choose another --out")


def check_same(path: Path, what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises RunError, listing what differs, unless that which is there (`theirs`) is made as ours is."""
    if lines := differing_keys(ours, theirs):
        raise RunError(
            f"{path} holds {what}; choose another --out or remove it. Differences (there -> now):\n  "
            + "\n  ".join(lines)
        )


def _check_directory(path: Path) -> None:
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        raise RunError(f"{there} is a file; choose another --out")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[RunDir]:
    """The run directory, held by this process (and the others of its torchrun). The lock ends with the process.

    For a directory that was checked: it is made, and a lock put there. Raises RunError if another process holds it.
    """
    run = RunDir(path)
    if not dist.is_main():
        dist.barrier()
        yield run
        return
    _check_directory(path)
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{path} is in use by another process; wait for it, or choose another --out") from None
    try:
        dist.barrier()
        yield run
    finally:
        lock.release()
