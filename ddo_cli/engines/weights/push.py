"""`ddo push`: weights, recipe and a card made from provenance into a repository of the Hugging Face Hub."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ddo_cli import checkpoint, console, hub, rundir
from ddo_cli.engines import report
from ddo_cli.engines.weights import card
from ddo_cli.errors import CheckpointError, UsageError, printable
from ddo_cli.files import sha256
from ddo_cli.ledger import damage
from ddo_cli.recipe import syntax

RECIPE = "recipe.yaml"
_REPO = re.compile(r"(?:hf://)?(\w[\w.-]{0,95}/\w[\w.-]{0,95})")


def run(
    source: str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    licence: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Commits a run's final weights, or a weight file, to user/name; returns what `push --json` prints.

    Raises UsageError where the Hub refuses, CheckpointError for a file that cannot be used from there.
    """
    name = _checked(repo, revision, licence)
    file = checkpoint.resolve(source)
    header = checkpoint.read_header(file)
    kind = header["kind"]
    if kind not in card.USE or "config" not in header:
        known = ", ".join(card.USE)
        raise CheckpointError(f"{source} holds a checkpoint of kind '{kind}'; give one of these kinds: {known}")
    if (problem := damage(file)) is not None:
        raise CheckpointError(f"{source} {problem} since it was written; restore it from a copy")
    place = _run_of(source, file)
    if place is not None and not rundir.RunDir(place).state().get("finished"):
        raise UsageError(f"{place} is not finished; run its command again, or give a weight file of one of its rounds")
    page = None if place is None else report.page_of(place)
    pictures = {} if place is None else _pictures(place)
    recipe = _recipe(place, header)
    found = card.licence_of(header, licence)
    captions = {beside: caption for beside, (_, caption) in pictures.items()}
    text = card.write(name, revision, found, card.Subject(header, _num_parameters(file), page, captions))
    if found.name is None:
        console.warn(f"the licence is {found.told}; state one by --license")
    if paths := list(dict.fromkeys([*_paths(header), *_paths(syntax.parse(recipe) if recipe else None)])):
        console.warn(f"header and recipe name paths of this machine, which others will see: {', '.join(paths[:3])}")
    files: dict[str, Path | bytes] = {hub.FILE: file, hub.CARD: text.encode()}
    files |= {**({RECIPE: recipe} if recipe else {}), **{beside: path for beside, (path, _) in pictures.items()}}
    result = {
        "repo": name, "revision": revision or "main", "private": private, "license": found.name,
        "sha256": sha256(file), "files": {each: _size(content) for each, content in sorted(files.items())},
    }  # fmt: skip
    if dry_run:
        return {**result, "card": text, "dry_run": True}
    commit = hub.upload(name, files, f"ddo push: {kind}", private=private, revision=revision)
    return {**result, "card": text, "commit": commit, "use": card.address(name, revision)}


def _checked(repo: str, revision: str | None, licence: str | None) -> str:
    """user/name, as it is typed or as hf://user/name. Raises UsageError for options that the Hub would refuse."""
    if (match := _REPO.fullmatch(repo)) is None:
        at = "; a branch is given as --revision" if "@" in repo else ""
        raise UsageError(f"{printable(repo, 60)} is no repository of the Hub; write user/name{at}")
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision):
        raise UsageError(f"--revision {printable(revision, 60)} is no name of a branch; write for example v1")
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UsageError(
            f"--license {printable(licence, 60)} is no identifier of the Hub; write one such as apache-2.0, or other"
        )
    return match[1]


def _run_of(source: str, file: Path) -> Path | None:
    """The run whose final weights these are; other files of a run are not what its figures are about."""
    places = (Path(source), file.parent)
    return next((each for each in places if rundir.is_run(each) and rundir.RunDir(each).final.samefile(file)), None)


def _recipe(place: Path | None, header: dict[str, Any]) -> bytes:
    """The run's resolved recipe; of a file the one of its last step, as far as it is told; empty without any."""
    if place is not None:
        return rundir.RunDir(place).recipe_file.read_bytes()
    told = [link["recipe"] for link in header.get("provenance", []) if link.get("recipe")]
    return yaml.safe_dump(told[-1], sort_keys=False).encode() if told else b""


def _pictures(place: Path) -> dict[str, tuple[Path, str]]:
    """Pictures of a run with their captions, by the names that they get."""
    promoted = [record["round"] for record in rundir.RunDir(place).state().get("rounds", []) if record["promoted"]]
    last = place / f"round-{promoted[-1]:02d}" / "grid.png" if promoted else place / "grid.png"
    found = {
        "reference.png": (place / "reference.png", "Samples of the reference."),
        "samples.png": (last, "Samples of these weights" + (", on the same seeds." if promoted else ".")),
    }
    return {name: (path, caption) for name, (path, caption) in found.items() if path.is_file()}


def _num_parameters(file: Path) -> int:
    with checkpoint.open_tensors(file) as content:
        return sum(math.prod(content.get_slice(key).get_shape()) for key in content.keys())  # noqa: SIM118


def _paths(value: Any) -> Iterator[str]:
    """Absolute paths in nested values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _paths(inner)
    elif isinstance(value, str) and value.startswith("/"):
        yield value


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
