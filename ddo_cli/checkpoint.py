"""Weight files: safetensors with configuration and provenance in the header. Knows nothing about models.

The header's only metadata entry is "ddo", JSON with sorted keys, so that equal content gives equal bytes. Its fields:
`kind` ("model", "extractor", "train-state"), `config` (rebuilds the module) and others of the writer, such as
`provenance` (reference, recipe and round) and `sampling` (defaults of `ddo sample`).
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddo_cli import foreign, hub, rundir
from ddo_cli.errors import CheckpointError, printable, problem_of, reason
from ddo_cli.files import parse_json, replacing, sha256
from ddo_cli.ledger import damage
from ddo_cli.places import ASSETS, EMBEDDED, embedded_names

_PAGE = "a web page, which sites give in place of a file without a login or beyond a quota; download it again"
_DISGUISES = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file; run `git lfs pull` in its folder",
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}


class _Entries(BaseModel):
    """Base of what a header holds: further entries are the writers' own."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Config(_Entries):
    """Rebuilds a module. Which of these a kind of file has is the reader's to check."""

    name: str = ""
    shape: list[Annotated[int, Field(ge=1, le=1 << 20)]] = Field([], max_length=4)
    num_classes: int = Field(0, ge=0, le=1 << 24)
    options: dict[str, Any] = {}
    draw: dict[str, Any] = {}


class _Link(_Entries):
    """A step of the provenance."""

    command: str
    recipe: dict[str, Any] = {}
    classes: dict[str, str] = {}  # names by number, where folders named them


class _TrainedOn(_Entries):
    """What a discriminator tells real images from."""

    model: str = ""
    model_sha256: str = ""
    data_sha256: str = ""


class _Gain(_Entries):
    """Gain of guidance by a discriminator, in nats: the figures that are read again."""

    gain_weight_1: float
    error_weight_1: float


class _HeldOut(_Entries):
    """Figures of a discriminator on held-out items."""

    gain: _Gain | None = None


class _Base(_Entries):
    """The file of the weights that an adapter changes."""

    path: str
    sha256: str


class _Header(_Entries):
    kind: str
    config: _Config | None = None
    sampling: dict[str, Any] = {}
    guidance: dict[str, Any] = {}
    trained_on: _TrainedOn = _TrainedOn()
    heldout: _HeldOut = _HeldOut()
    base: _Base | None = None  # of an adapter; None: the file is whole
    adapter: dict[str, Any] = {}
    provenance: list[_Link] = []
    step: int = Field(0, ge=0)


class Checkpoint(NamedTuple):
    """Tensors by name, the header, the file's hash and its name as given."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]
    sha256: str
    path: str


_MAKERS = {  # commands that write a kind of file
    "model": "`ddo pretrain`, `ddo finetune-ddo` and, of published weights, `ddo convert` write them",
    "discriminator": "`ddo train-disc` writes them",
    "classifier": "`ddo train-classifier` writes them",
    "extractor": "`ddo train-extractor` writes them",
}


def resolve(path: str | Path, kind: str = "model") -> Path:
    """The file of a path, of a run's directory (its final weights), of "embedded:<name>" or of "hf://user/name".

    kind: for messages.

    Raises CheckpointError if there is none.
    """
    name = str(path)
    if name.startswith(EMBEDDED):
        file = ASSETS / f"{name.removeprefix(EMBEDDED)}.safetensors"
        if file.stem not in embedded_names() or not file.is_file():
            known = ", ".join(EMBEDDED + known for known in embedded_names())
            raise CheckpointError(f"{name} does not come with this program; known: {known}")
        return file
    if hub.is_address(name):
        return hub.download(name)
    file = Path(name)
    if file.is_dir():
        return rundir.weights_of(file)
    if not file.is_file():
        made_by = f" ({_MAKERS[kind]})" if kind in _MAKERS else ""
        is_repo = hub.ADDRESS.fullmatch(f"hf://{name}") and not file.parent.exists() and file.suffix != ".safetensors"
        of_hub = f", or hf://{name} for a repository of the Hub" if is_repo else ""
        raise CheckpointError(f"{name} does not exist; give the path of a weight file{made_by}{of_hub}", missing=name)
    if what := disguise(file):
        raise CheckpointError(f"{name} is {what}")
    return file


def disguise(file: Path) -> str | None:
    """What a file is that was left in place of another one, and what to do; None where there is no sign of it."""
    with open(file, "rb") as stream:
        start = stream.read(64).lstrip().lower()
    return next((what for sign, what in _DISGUISES.items() if start.startswith(sign)), None)


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], previous: Path | None = None) -> None:
    """Writes a weight file atomically. Equal tensors and header give equal bytes. previous: as for `replacing`."""
    write_tensors(path, tensors, {"ddo": json.dumps(header, sort_keys=True)}, previous)


def difference(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> str | None:
    """What of the file at `path` is not as `save` would write it: header, names or a tensor; None if nothing."""
    if read_header(path) != json.loads(json.dumps(header)):
        return "header"
    names = set()
    for name, tensor in _tensors_of(path):
        names.add(name)
        if name in tensors and not torch.equal(tensors[name].detach().cpu(), tensor):
            return f"tensor {name}"
    return None if names == tensors.keys() else "names of tensors"


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, previous: Path | None = None
) -> None:
    """Writes a safetensors file atomically. Raises OSError, for example if the disk is full."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path, previous) as temporary:
        try:
            save_file(contiguous, temporary, metadata=metadata)
        except SafetensorError as error:  # the system's error is in its text only
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_header(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The header alone, without reading tensors. Raises CheckpointError as `load` does."""
    return _open(resolve(path, kind or ""), str(path), kind, tensors=False).header


def load(path: str | Path, kind: str | None = None) -> Checkpoint:
    """A weight file. Raises CheckpointError if it is missing, damaged, foreign, or not of this kind.

    In a run's directory its content must be what the run has written.
    """
    file = resolve(path, kind or "")
    if (problem := damage(file)) is not None:
        raise CheckpointError(f"{path} {problem} since it was written; restore it from a copy")
    return _open(file, str(path), kind, tensors=True)


def tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a weight file, read one by one. Raises CheckpointError as `load` does."""
    read_header(path)
    yield from _tensors_of(resolve(path))


def open_tensors(file: Path, framework: str = "pt") -> Any:
    """A safetensors file, opened. Raises OSError with the system's reason, which the library does not tell."""
    try:
        return safe_open(file, framework=framework)
    except (FileNotFoundError, RuntimeError) as error:  # the second by torch, which opens it once more
        with open(file, "rb"):
            pass
        number = re.search(r"\((\d+)\)$", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(file)) from None


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name. Raises what `open_tensors` does."""
    return dict(_tensors_of(file))


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    with open_tensors(file) as content:
        for name in content.keys():  # noqa: SIM118
            yield name, content.get_tensor(name)


def _open(file: Path, name: str, kind: str | None, tensors: bool) -> Checkpoint:
    try:
        with open_tensors(file) as content:
            metadata = content.metadata() or {}
            loaded = {key: content.get_tensor(key) for key in content.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        _refuse_foreign(file, name)
        raise CheckpointError(
            f"{name} is not a whole safetensors file ({reason(error, 60)}); "
            + ("copy it again" if file.suffix == ".safetensors" else "`ddo convert` makes one of published weights")
        ) from None
    try:
        header = parse_json(metadata["ddo"])
        actual = _Header.model_validate(header).kind
    except ValidationError as error:
        raise CheckpointError(f"{name} has a damaged header ({problem_of(error)}); copy the file again") from None
    except (KeyError, ValueError):
        _refuse_foreign(file, name)
        raise CheckpointError(
            f"{name} is a safetensors file without this program's header, so its model is unknown; give a file that "
            "ddo wrote, such as by `ddo convert` of published weights"
        ) from None
    if kind is not None and actual != kind:
        raise CheckpointError(f"{name} holds a checkpoint of kind '{actual}' where a '{kind}' is needed; give one")
    return Checkpoint(loaded, header, sha256(file) if tensors else "", name)


def _refuse_foreign(file: Path, name: str) -> None:
    """Raises CheckpointError for a network of another program that is known by its tensors' names."""
    if what := foreign.network_of(file):
        raise CheckpointError(
            f"{name} holds {what}; give a file that ddo wrote, such as by `ddo convert` of published weights"
        )


def require(file: Checkpoint, *keys: str) -> None:
    """Raises CheckpointError unless the header has these entries, given as dotted names; `load` has checked types."""
    for key in keys:
        value: Any = file.header
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            raise CheckpointError(f"{file.path} has a damaged header ({key} is missing); copy the file again")


def check_sizes(options: Any, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises CheckpointError for an option larger than the file's weights are many: no network of it could have them.

    Building one first could take all memory, or for ever.
    """
    most = max(sum(tensor.numel() for tensor in tensors.values()), 1 << 16)
    waiting = [options]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        size = len(value) if isinstance(value, list) else abs(value) if isinstance(value, (int, float)) else 0
        if not size <= most:  # NaN, too
            raise CheckpointError(
                f"{name} has a damaged header: an option of {printable(str(value), 40)} in a file of {most:,} weights "
                "at most; copy the file again"
            )
