"""Weight files: safetensors with configuration and provenance in the header. Knows nothing about models.

The header's only metadata entry is "ddo", JSON with sorted keys, so that equal content gives equal bytes. Its fields:
`kind` ("model", "extractor", "train-state"), `config` (rebuilds the module) and others of the writer, such as
`provenance` (reference, recipe and round) and `sampling` (defaults of `ddo sample`).
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddo_cli.errors import CheckpointError
from ddo_cli.files import replacing, sha256

ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED = "embedded:"


class Checkpoint(NamedTuple):
    """Tensors by name, the header, the file's hash and its name as given."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]
    sha256: str
    path: str


def embedded_names() -> list[str]:
    """Names of the embedded weight files."""
    return sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def resolve(path: str | Path) -> Path:
    """The file of a path or of "embedded:<name>". Raises CheckpointError if there is none."""
    name = str(path)
    if name.startswith(EMBEDDED):
        file = ASSETS / f"{name.removeprefix(EMBEDDED)}.safetensors"
        if not file.is_file():
            known = ", ".join(EMBEDDED + known for known in embedded_names())
            raise CheckpointError(f"{name} does not come with this program; known: {known}")
        return file
    file = Path(name)
    if file.is_dir():
        raise CheckpointError(f"{name} is a directory; give the weight file inside it")
    if not file.is_file():
        remedy = "give the path of a weight file (`ddo convert` makes one of published weights)"
        raise CheckpointError(f"{name} does not exist; {remedy}")
    return file


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes a weight file atomically. Equal tensors and header give equal bytes."""
    write_tensors(path, tensors, {"ddo": json.dumps(header, sort_keys=True)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. Raises OSError, for example if the disk is full."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=metadata)
        except SafetensorError as error:  # the system's error is in its text only
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_header(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The header alone, without reading tensors. Raises CheckpointError as `load` does."""
    return _open(resolve(path), str(path), kind, tensors=False).header


def load(path: str | Path, kind: str | None = None) -> Checkpoint:
    """A weight file. Raises CheckpointError if it is missing, damaged, foreign, or not of this kind."""
    return _open(resolve(path), str(path), kind, tensors=True)


def tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a weight file, read one by one. Raises CheckpointError as `load` does."""
    read_header(path)
    with safe_open(resolve(path), framework="pt") as content:
        for name in content.keys():  # noqa: SIM118
            yield name, content.get_tensor(name)


def _open(file: Path, name: str, kind: str | None, tensors: bool) -> Checkpoint:
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            loaded = {key: content.get_tensor(key) for key in content.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is not a whole safetensors file ({error}); copy it again, or convert it if it is of another format"
        ) from None
    try:
        header = json.loads(metadata["ddo"])
        actual = header["kind"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{name} is a safetensors file without this program's header, so its model is unknown; "
            "give a file that ddo wrote"
        ) from None
    if kind is not None and actual != kind:
        raise CheckpointError(f"{name} holds a checkpoint of kind '{actual}' where a '{kind}' is needed; give one")
    return Checkpoint(loaded, header, sha256(file) if tensors else "", name)
