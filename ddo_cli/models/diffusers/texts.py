"""Prompts -> what a text-to-image network is conditioned on, by the text encoders of a pipeline's folder.

A condition stays a label: the number of a prompt, -1 for none. Embeddings are computed once for a process, or read from
what `ddo encode` has stored, and are no part of a model's weights. Each prompt is encoded by itself, so that its
embedding does not depend on the others.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli import console
from ddo_cli.errors import CheckpointError, printable
from ddo_cli.files import read_json, sha256
from ddo_cli.models.diffusers.families import FAMILIES
from ddo_cli.models.diffusers.family import INDEX, NONE, Condition, Family, Parts
from ddo_cli.places import of_environment
from ddo_cli.precision import inference_precision

VARIABLE = "DDO_PIPELINE"  # environment variable: the pipeline's folder, in place of the one that a weight file names
ON_DEVICE = 1 << 30  # bytes of embeddings that are kept on the device; our choice


def place_of(pipeline: str) -> Path:
    """The folder of a pipeline that a weight file names, or $DDO_PIPELINE."""
    return Path(of_environment(VARIABLE) or pipeline)


class Encoder(NamedTuple):
    """The text encoders of a pipeline. place: its folder; digest: of their files, see `digest_of`."""

    family: str
    place: str
    digest: str

    def folder(self) -> Path:
        """The pipeline's folder. Raises CheckpointError if its text encoders are others."""
        folder = place_of(self.place)
        if digest_of(folder, FAMILIES[self.family]) != self.digest:
            problem = "holds another text encoder" if (folder / "text_encoder").is_dir() else "has no text encoder"
            raise CheckpointError(
                f"{folder} {problem} where the model needs the one that it was trained with; set {VARIABLE} to the "
                "folder of its pipeline"
            )
        return folder


def encoder_of(config: Mapping[str, Any]) -> Encoder | None:
    """The text encoders of a model's configuration; None where it reads no text."""
    options = config["options"]
    told = "text_encoder" in options
    return Encoder(options["family"], options["pipeline"], options["text_encoder"]) if told else None


class Prompts(NamedTuple):
    """What labels mean: texts by number, and the text of the label -1."""

    texts: tuple[str, ...] = ()
    negative: str = NONE


_known: dict[tuple[str, str], Condition] = {}  # (encoder's digest, text) -> of one prompt, on the CPU


def remember(digest: str, texts: Sequence[str], conditions: Condition) -> None:
    """Takes conditions of an encoder, a row for each text, for those that `conditions_of` would compute."""
    rows = [dict(zip(conditions, row, strict=True)) for row in zip(*conditions.values(), strict=True)]
    _known.update(((digest, text), row) for text, row in zip(texts, rows, strict=True))


def conditions_of(encoder: Encoder, texts: Sequence[str], device: torch.device) -> Condition:
    """Of texts, (N, ...) on the CPU. device: where the text encoders run, if they are needed."""
    missing = [text for text in dict.fromkeys(texts) if (encoder.digest, text) not in _known]
    if missing:
        remember(encoder.digest, missing, encode(encoder, missing, device))
        _parts.cache_clear()  # its memory is the network's
    return _stacked([_known[encoder.digest, text] for text in texts])


def _stacked(rows: Sequence[Condition]) -> Condition:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@functools.lru_cache(maxsize=2)  # with and without a negative prompt
def _table(encoder: Encoder, prompts: Prompts, device: torch.device) -> tuple[Condition, Tensor]:
    """Conditions of the texts that differ (U, ...), and the row of each label, that of -1 last, (N + 1,)."""
    texts = [*prompts.texts, prompts.negative]
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    table = conditions_of(encoder, list(row_of), device)
    place = device if sum(part.nbytes for part in table.values()) <= ON_DEVICE else torch.device("cpu")
    rows = torch.tensor([row_of[text] for text in texts], device=place)
    return {name: part.to(place) for name, part in table.items()}, rows


def rows(encoder: Encoder, prompts: Prompts, label: Tensor) -> Condition:
    """The conditions of labels (B,), -1 for none: (B, ...) on their device."""
    table, row_of = _table(encoder, prompts, label.device)
    row = row_of[label.to(row_of.device)]
    return {name: part[row].to(label.device) for name, part in table.items()}


def digest_of(folder: Path, family: Family) -> str:
    """Hash of the files of tokenizers and text encoders; that of none where there are no such folders."""
    total = hashlib.sha256()
    for part in family.texts:
        for path in sorted((folder / part).glob("*")):
            if path.suffix in (".json", ".txt", ".model", ".jinja", ".safetensors"):
                total.update(f"{part}/{path.name} {_sha256(str(path), path.stat().st_mtime_ns)}\n".encode())
    for key in family.told_by_index:
        total.update(f"{key} {_index(folder).get(key)}\n".encode())
    return total.hexdigest()[:32]


@functools.cache
def _sha256(path: str, mtime: int) -> str:
    """Of a file that changes only with its time."""
    return sha256(Path(path))


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    return read_json(path) if path.is_file() else {}


def encode(encoder: Encoder, texts: Sequence[str], device: torch.device) -> Condition:
    """Conditions of texts, (N, ...) on the CPU, computed anew as the pipeline does; float32."""
    family = FAMILIES[encoder.family]
    parts = _parts(encoder, device)
    parts.cut.clear()
    with torch.no_grad(), inference_precision("float32", device):
        found = [{name: _stored(part) for name, part in family.encode(parts, text).items()} for text in texts]
    if parts.cut:
        text, length = next(iter(parts.cut.items()))
        console.warn(
            f"{len(parts.cut)} prompts are longer than {length} tokens and cut, such as {printable(text, 60)!r}"
        )
    return _stacked(found)


def _stored(part: Tensor) -> Tensor:
    return part.cpu().float() if part.is_floating_point() else part.cpu()


@functools.lru_cache(maxsize=1)
def _parts(encoder: Encoder, device: torch.device) -> Parts:
    return Parts(encoder.folder(), FAMILIES[encoder.family].texts, device)
