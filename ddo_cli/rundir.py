"""Directories that commands fill: a new one is taken, one begun with the same settings continued, any other refused.

`check` decides it without writing anything, for dry runs too, before anything expensive starts. `claim` decides it
again under the directory's lock, and takes the directory.
"""

import contextlib
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from ddo_cli import console, dist, ledger
from ddo_cli.errors import CheckpointError, RunError, problem_of, reason
from ddo_cli.files import DAMAGED, LOCK, json_text, lock, parse_json, read_json, remove, sweep, write_json, write_text
from ddo_cli.ledger import LEDGER
from ddo_cli.recipe import syntax
from ddo_cli.recipe.load import differing_keys, to_yaml
from ddo_cli.recipe.schema import Recipe

# Recipe keys that name a file, and the hash of its content in a run's identity: the same content may have moved.
PLACES = {
    "data.source": ("data_sha256",), "model.ckpt": ("reference_sha256", "model_sha256"),
    "discriminator.fake": ("fake_sha256",), "metric.extractor": ("extractor_sha256",),
    "metric.weights": ("extractor_sha256",),
}  # fmt: skip
RESUMING = "train-state"  # how the names of files begin that `training.state` writes
HARMLESS = ("log_every", "save_every", "control")  # keys of any section that change no other result


@dataclass
class OutDir:
    """A directory with a JSON file `record`, which keeps the settings that its content was made with.

    kind, another: for messages, such as "sample set" and "another sample set".
    results: keys of the record that are added later and are no settings.
    is_ours: tells a record of this kind from a file of the same name.
    """

    path: Path
    record: str
    settings: dict[str, Any]
    kind: str
    another: str
    results: Container[str] = ()
    is_ours: Callable[[dict[str, Any]], bool] = bool

    def check(self) -> None:
        """Raises RunError, listing what differs, unless `claim` would take the directory. Writes nothing."""
        if not dist.is_main():
            return
        file = self.path / self.record
        if _restorable(file, json_text(self.settings)) is not None:
            return
        record = read_json(file) if file.is_file() else {}
        if self.is_ours(record):
            theirs = {key: value for key, value in record.items() if key not in self.results}
            check_same(f"{self.path} holds {self.another}", self.settings, theirs)
        else:
            check_free(self.path, self.kind)

    def claim(self) -> dict[str, Any]:
        """Takes the directory, whose lock is held; the record, equal on every process. Raises as `check` does.

        Removes what is damaged, with a warning: it is made again.
        """
        self.check()
        file = self.path / self.record
        if dist.is_main():
            files = ledger.near(self.path)
            _renew(files, is_ours=file.is_file())
            damaged = files.problems(self.path)
            beside = {name: text for name, text in damaged.items() if name.startswith("..")}
            damaged = {name: text for name, text in damaged.items() if name not in beside}
            _tell(files.directory, damaged, "it is made again")
            for name in damaged:
                remove(files.directory / name)
            beside = {name: text for name, text in beside.items() if (files.directory / name).exists()}
            _tell(files.directory, beside, "remove it, and it is made again")  # it might be another's by now
            if not file.is_file():
                write_json(file, self.settings)
            sweep(self.path)
        return dist.from_main(read_json(file) if dist.is_main() else {})


class _Part(BaseModel):
    """Base of what a state holds: further entries are each command's own."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Score(_Part):
    score: float


class _Round(_Score):
    round: int
    promoted: bool


class _State(_Part):
    command: str = ""
    rounds: list[_Round] = []
    control: list[_Round] = []
    reference: _Score | None = None


def read_state(file: Path) -> dict[str, Any]:
    """The content of a run's state.json. Raises RunError if it is damaged."""
    state: dict[str, Any] = read_json(file)
    try:
        _State.model_validate(state)
    except ValidationError as error:
        raise RunError(f"{file} is damaged ({problem_of(error)}); {DAMAGED}") from None
    return state


class RunDir:
    """Paths and state of a training run. `state.json` is replaced after each stage; a killed run continues from it."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.state_file = path / "state.json"
        self.state_before = path / "state.previous.json"  # of the stage before; used if state.json is damaged
        self.log_file = path / "log.jsonl"
        self.final = path / "final.safetensors"

    @property
    def ledger(self) -> ledger.Ledger:
        """What the run's files must hold."""
        return ledger.near(self.path)

    def state(self) -> dict[str, Any]:
        """What `advance` wrote last; empty for a new run."""
        problems, told = {}, ""
        for file in (self.state_file, self.state_before):
            problems[file] = self._problem(file)
            if problems[file] is None:
                try:
                    return read_state(file)
                except RunError as error:
                    problems[file], told = "is damaged", told or str(error)
        if any(file.is_file() or self.ledger.is_listed(file) for file in problems):
            named = ", ".join(f"{file.name} {problem}" for file, problem in problems.items())
            raise RunError(told or f"{self.path}: {named}; restore one of them from a copy, or choose another --out")
        return {}

    def advance(self, **changes: Any) -> dict[str, Any]:
        """Replaces the given keys of the state (main process only); returns the state."""
        return dist.from_main(self._write(**changes) if dist.is_main() else {})

    def _write(self, **changes: Any) -> dict[str, Any]:
        state, is_good = {**self.state(), **changes}, self.ledger.is_good(self.state_file)
        write_json(self.state_file, state, self.state_before if is_good else None)
        return state

    def claim(self, command: str, recipe: Recipe, **identity: Any) -> dict[str, Any]:
        """Takes the directory, whose lock is held; the state, equal on every process. Raises as `check` does.

        identity: what the run depends on in addition to the recipe, such as hashes of its inputs. Files that have moved
        are taken over from the recipe, and so are more rounds, and keys that change no result.
        """
        if dist.is_main():
            if (self.path / LEDGER).is_file() or self.recipe_file.is_file():
                _renew(self.ledger, is_ours=self.recipe_file.is_file())
            text = to_yaml(recipe)
            problem = _restorable(self.recipe_file, text)
            if problem is None and not self.recipe_file.is_file():
                self.check(command, recipe, **identity)
                # The recipe goes last: a directory with one has a complete identity.
                for file in (self.state_before, self.state_file):
                    write_json(file, {"command": command, **identity})
                write_text(self.recipe_file, text)
            else:
                if problem is not None:
                    console.warn(f"{self.recipe_file} {problem}; it is written again")
                if taken_over := self._compare(command, recipe, identity):
                    console.info(f"{self.path} is continued with {'; '.join(taken_over)}")
                if problem is not None or taken_over:
                    write_text(self.recipe_file, text)
                if not self.ledger.is_good(self.state_file):
                    console.warn(f"{self.state_file} is damaged or missing; the run goes on from {self.state_before}")
                    self._write()
                if not self.ledger.is_good(self.state_before):
                    console.warn(f"{self.state_before} is damaged or missing; it is written again")
                    self._write()
            sweep(self.path, below=True)
        return dist.from_main(self.state() if dist.is_main() else {})

    def check(self, command: str, recipe: Recipe, **identity: Any) -> None:
        """Raises RunError, listing what differs, unless `claim` would take the directory. Writes nothing."""
        if not dist.is_main():
            return
        if self.recipe_file.is_file() or _restorable(self.recipe_file, to_yaml(recipe)) is not None:
            self._compare(command, recipe, identity)
        else:
            states = [self.state_file.name, self.state_before.name]
            check_free(self.path, "run", states if self._is_half_claimed(command, identity) else [])

    def inspect(self, needed: Callable[[str], str | None]) -> dict[str, Any]:
        """Tells which files of the run are damaged or missing, and keeps it in the state for the report; returns the
        state. The lock is held, the directory claimed.

        needed: of a file's name the remedy, if the run still reads it; None: it does not; "": who reads it looks after
        it. Raises RunError if something needed is damaged.
        """
        if dist.is_main():
            others = {}
            for name, problem in self.ledger.problems(is_read=lambda name: bool(needed(name))).items():
                remedy = "" if RESUMING in name else needed(name)
                if remedy:
                    raise RunError(f"{self.path / name} {problem}, and is still needed; {remedy}")
                if remedy is None:
                    others[name] = problem
            _tell(self.path, others, "the run does not need it any more")
            known = self.state().get("damaged", {})
            if not others.items() <= known.items():
                self._write(damaged={**known, **others})
        return dist.from_main(self.state() if dist.is_main() else {})

    def _is_half_claimed(self, command: str, identity: dict[str, Any]) -> bool:
        """Whether a `claim` was killed after it had written a state and before it wrote the recipe."""
        try:
            there = [file for file in (self.state_file, self.state_before) if file.exists()]
            states = [parse_json(file.read_bytes()) for file in there]
        except (OSError, ValueError):
            return False
        ours = {"command", *identity}
        return all(isinstance(one, dict) and one.keys() == ours and one["command"] == command for one in states)

    def is_finished(self, state: dict[str, Any], *copies: Path) -> bool:
        """Whether nothing is left to do; if so, prints that.

        copies: files that the run writes last, of others that it has: if damaged or missing, they are written again.
        Raises RunError if the final weights are damaged and no copy.
        """
        if not state.get("finished"):
            return False
        problems = dist.from_main({file: self._problem(file) for file in (self.final, *copies)})
        for file, problem in problems.items():
            if problem is not None and problem != "is missing" and file not in copies:
                raise RunError(
                    f"{file} {problem}; restore it from a copy, or remove it and run the same command again, which "
                    "trains again"
                )
        if is_finished := not any(problems.values()):
            console.info(f"{self.path} is finished; nothing to do")
        return is_finished

    def _problem(self, file: Path) -> str | None:
        return self.ledger.problem(file) if file.is_file() else "is missing"

    def _compare(self, command: str, recipe: Recipe, identity: dict[str, Any]) -> list[str]:
        """What differs and may, "key: there -> now". Raises RunError for any other difference."""
        state = self.state()
        text = to_yaml(recipe)
        try:
            restored = _restorable(self.recipe_file, text) is not None
            saved = syntax.parse(text.encode() if restored else self.recipe_file.read_bytes())
            if not isinstance(saved, dict):
                raise ValueError(f"it holds a {type(saved).__name__}")
        except ValueError as error:
            raise RunError(f"{self.recipe_file} is damaged ({reason(error)}); choose another --out") from None
        with contextlib.suppress(ValidationError):  # a key that is newer than the run had its default
            saved = Recipe.model_validate(saved).model_dump(mode="json")
        known = {"command": command, **identity}
        lines = differing_keys(known, {key: state.get(key) for key in known})
        free = self._free(command, recipe, identity, state)
        differences = [
            (line, line.partition(": ")[0]) for line in differing_keys(recipe.model_dump(mode="json"), saved)
        ]
        refused = lines + [line for line, key in differences if not free(key)]
        remedy = "choose another --out, or give the same options to continue it"
        if any(line.startswith("metric.") for line in refused):
            remedy += f"; `ddo fid {self.path}` scores its result with other options"
        if moved := [line for line in refused if line.startswith("precision.")]:
            theirs = moved[0].partition(": ")[2].partition(" -> ")[0]
            remedy += f"; on another device set the keys named precision to {theirs}"
        _refuse(f"{self.path} belongs to another run", remedy, refused)
        return [line for line, key in differences if free(key)]

    def _free(
        self, command: str, recipe: Recipe, identity: dict[str, Any], state: dict[str, Any]
    ) -> Callable[[str], bool]:
        """Whether a recipe key may differ from the run's. The hashes of `identity` are known to be the run's."""
        places = {key for key, hashes in PLACES.items() if identity.keys() & set(hashes)}
        done = len(state.get("rounds", []))
        may_grow = command == "finetune-ddo" and recipe.finetune.rounds >= done
        # The other commands score at their end only; scores of different sizes are never compared.
        is_scored = command == "finetune-ddo" or state.get("finished") or (self.path / "guided-scores.json").exists()

        def free(key: str) -> bool:
            return (
                key in places
                or key.rpartition(".")[2] in HARMLESS
                or (key in ("finetune.rounds", "finetune.patience_rounds") and may_grow)
                or (key in ("metric.num_images", "metric.repeats") and not is_scored)
                # What it comes to on this device is compared in the identity.
                or (key.rpartition(".")[2] == "precision" and "precision" in identity)
            )

        return free


def _renew(files: ledger.Ledger, is_ours: bool) -> None:
    """`Ledger.renew`, with a warning where the directory is not a new one."""
    problem = files.renew()
    if problem is not None and is_ours:
        console.warn(f"{files.directory / LEDGER} {problem}")


def remove_damaged(file: Path, consequence: str) -> None:
    """Removes a file that is made again where it is missing, with a warning, if it is damaged (main process only)."""
    if dist.is_main() and (problem := ledger.damage(file)) is not None:
        console.warn(f"{file} {problem}; {consequence}")
        remove(file)


def warnings_of(state: dict[str, Any]) -> list[str]:
    """What `RunDir.inspect` has found so far, for the report."""
    return [f"{name} {problem}" for name, problem in sorted(state.get("damaged", {}).items())]


def _restorable(file: Path, text: str) -> str | None:
    """What is wrong with a file that holds this text by rights; None if nothing is known.

    Raises RunError if the text has never been in it.
    """
    files = ledger.near(file.parent)
    problem = files.problem(file)
    if problem is not None and not files.has_been(file, text):
        raise RunError(
            f"{file} {problem}, and it was made with other options; give those again, restore it from a copy, or "
            "choose another --out"
        )
    return problem


def _tell(directory: Path, problems: Mapping[str, str], consequence: str) -> None:
    """Warns of damaged files: of all, naming the first three."""
    named = list(problems.items())[:3]
    for name, problem in named:
        console.warn(f"{os.path.normpath(directory / name)} {problem}; {consequence}")
    if more := len(problems) - len(named):
        console.warn(f"{directory}: {more} more files are damaged or missing; {consequence}")


def check_free(path: Path, kind: str, allowed: Container[str] = ()) -> None:
    """Raises RunError if `path` is a file, or a directory with anything but hidden files and those `allowed`."""
    _check_directory(path)
    for name in sorted(entry.name for entry in path.iterdir()) if path.exists() else []:
        if name[0] != "." and name not in allowed:
            raise RunError(f"{path} is not empty and holds no {kind}: there is {name}; choose another --out")


def check_same(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises RunError, listing what differs, unless the existing settings (`theirs`) are equal to ours."""
    _refuse(what, "choose another --out or remove it", differing_keys(ours, theirs))


def _refuse(what: str, remedy: str, differences: list[str]) -> None:
    if differences:
        raise RunError(f"{what}; {remedy}. Differences (there -> now):", differences)


def _check_directory(path: Path) -> None:
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        raise RunError(f"{there} is a file; choose another --out")


def is_run(path: Path) -> bool:
    """Whether a directory is one that `RunDir.claim` has taken."""
    run = RunDir(path)
    return run.recipe_file.is_file() and (run.state_file.is_file() or run.state_before.is_file())


def weights_of(path: Path) -> Path:
    """The final weights of a run's directory. Raises CheckpointError without any, naming the newest that there are."""
    run = RunDir(path)
    if run.final.is_file():
        return run.final
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        raise CheckpointError(f"{path} is a folder of diffusers; give the file that `ddo convert` makes of it")
    if not is_run(path):
        raise CheckpointError(f"{path} is a directory without final.safetensors; give the weight file inside it")
    state = run.state()
    promoted = [path / f"round-{record['round']:02d}" for record in state.get("rounds", []) if record["promoted"]]
    files = [file for place in promoted if (file := place / "best.safetensors").is_file()]
    files = files or sorted(path.glob("checkpoints/step-*.safetensors"))
    kind = "promoted" if promoted else "checkpoint"
    newest = f"its newest {kind} weights are {files[-1]}: give these" if files else "it has no weights yet"
    raise CheckpointError(
        f"{path} is an unfinished run of {state.get('command', 'ddo')}; {newest}, or run its command again"
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[RunDir]:
    """Creates the directory and holds its lock, for this process and the others of its torchrun.

    Call `check` first: the lock is a file in the directory. Raises RunError if another process holds it.
    """
    run = RunDir(path)
    if not dist.is_main():
        dist.barrier()
        with ledger.kept(path):
            yield run
        return
    _check_directory(path)
    path.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(path / LOCK, timeout=0)
    except Timeout:
        raise RunError(f"{path} is in use by another process; wait for it, or choose another --out") from None
    with held:
        dist.barrier()
        with ledger.kept(path):
            yield run
