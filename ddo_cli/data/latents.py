"""Sets of latents or tokens, written by `ddo encode` or as EDM2's archives; rows are read when indexed.

`ddo encode`: latents-000000.safetensors, ... with tensors `latents` and `labels`, and a manifest.json with the encoder
and each shard's hash. Of a text-to-image model also texts-000000.safetensors, ... with `embeddings` (n, L, E) and
`labels` (n,) of the same rows, the first with a further row, that of the empty prompt and label -1; the manifest has
the captions. EDM2: a zip or folder of img-mean-std-00000000.npy, float32 (8, h, w), the mean and deviation of
Stability's autoencoder, with labels in dataset.json.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ddo_cli import ledger, npz
from ddo_cli.checkpoint import load_tensors, open_tensors, write_tensors
from ddo_cli.data import cache, image_files, samples
from ddo_cli.data.items import INDEX, Encoded, count_classes, hashed
from ddo_cli.data.readers import TENSOR_ERRORS, ZIP_ERRORS, Contents, FolderBytes, ItemFiles, ZipBytes, join_tensors
from ddo_cli.errors import DataError, problem_of, reason
from ddo_cli.files import parse_json, write_json

FORMAT = "latents"  # of the manifest
MANIFEST = samples.MANIFEST
EDM2_NAME = "img-mean-std-"  # how the entries of EDM2's archives start
EDM2_FACTOR = 8  # pixels per side of the autoencoder's grid


def is_latents(path: Path) -> bool:
    """Whether this folder or zip is a set of latents or tokens. Looks at a few names only."""
    try:
        if path.is_dir():
            first = f"{EDM2_NAME}00000000.npy"
            is_encoded = samples.read_manifest(path).get("format") == FORMAT
            return is_encoded or (path / first).is_file() or (path / "00000" / first).is_file()
        if path.suffix.lower() != ".zip":
            return False
        with open(path, "rb") as file:  # reading the directory of a zip of ImageNet would take seconds
            return EDM2_NAME.encode() in file.read(1 << 16)
    except OSError:
        return False  # opening it will report the error


def open_latents(source: str, path: Path) -> Contents:
    """The set, its items not read yet. Raises DataError."""
    if not path.is_dir():
        return _open_zip(source, path)
    manifest = samples.read_manifest(path)
    if manifest.get("format") == FORMAT:
        return _open_shards(source, path, manifest)
    names = _entries(file.relative_to(path).as_posix() for file in path.rglob(f"{EDM2_NAME}*.npy"))
    labelled = image_files.indexed_labels(source, names, image_files.folder_file(path / INDEX, len(names)))
    stamp = cache.key_of(path, (path / name for name in names), names)
    return _edm2_set(source, names, FolderBytes(path, names), labelled, stamp)


# --- Shards


class _Shard(BaseModel):
    sha256: str


class _Manifest(BaseModel):
    """What a manifest.json tells of a complete set."""

    model_config = ConfigDict(strict=True)

    encoder: str
    image_shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=4)
    num_classes: int = Field(ge=0, le=1 << 24)
    captions: list[str] = []
    shards: list[_Shard] = Field(min_length=1)


class ShardInfo(NamedTuple):
    """Header of a shard: number of items, hash of their content, and notes of `ddo encode`."""

    num: int
    sha256: str
    notes: dict[str, Any]


def shard_file(path: Path, number: int) -> Path:
    """The file of a shard."""
    return path / f"latents-{number:06d}.safetensors"


def text_file(path: Path, number: int) -> Path:
    """The file of the embeddings of a shard's captions."""
    return path / f"texts-{number:06d}.safetensors"


def stored_texts(path: Path) -> tuple[str, list[str], dict[str, Tensor]] | None:
    """The text encoder's hash, captions and their embeddings (N, ...) of a set, with the empty prompt as a last one.

    None for a set without. Raises DataError if a file is damaged or missing.
    """
    manifest = samples.read_manifest(path)
    if manifest.get("format") != FORMAT or "text_encoder" not in manifest:
        return None
    told, parts, file = _Manifest.model_validate(manifest), [], path
    try:
        for number in range(len(told.shards)):
            file = text_file(path, number)
            parts.append(load_tensors(file))
        labels = torch.cat([part["labels"] for part in parts])
        order = torch.argsort(torch.where(labels < 0, len(labels), labels))
        names = parts[0].keys() - {"labels"}
        embeddings = {name: torch.cat([part[name] for part in parts])[order] for name in sorted(names)}
        if len(order) != len(told.captions) + 1:
            raise ValueError(f"{len(order)} embeddings for {len(told.captions)} captions and the empty prompt")
    except TENSOR_ERRORS as error:
        raise _damaged(file, error) from None
    return manifest["text_encoder"], [*told.captions, ""], embeddings


def write_shard(file: Path, latents: Tensor, labels: Tensor, notes: dict[str, Any]) -> None:
    """Writes a shard atomically, with the hash of its content. notes: stored for `read_info`."""
    tensors = {"latents": latents.contiguous(), "labels": labels.contiguous()}
    # A single entry: safetensors writes several in random order, and equal sets should be equal files.
    write_tensors(file, tensors, {"ddo": json.dumps({"sha256": content_hash(tensors), "notes": notes}, sort_keys=True)})


def content_hash(tensors: dict[str, Tensor]) -> str:
    """Hex SHA-256 of a shard's latents and labels."""
    content = hashlib.sha256(tensors["latents"].numpy().data)
    content.update(tensors["labels"].numpy().data)
    return content.hexdigest()


def read_info(file: Path) -> ShardInfo:
    """The header of a shard, without reading its latents. Raises DataError if the file is damaged."""
    try:
        with open_tensors(file, "np") as content:  # checks that the file is as long as its header says
            header, shape = parse_json(content.metadata()["ddo"]), content.get_slice("latents").get_shape()
        return ShardInfo(shape[0], header["sha256"], header["notes"])
    except TENSOR_ERRORS as error:
        raise _damaged(file, error) from None


def labels_of(file: Path) -> np.ndarray:
    """The labels of a shard, without reading its latents. Raises DataError if the file is damaged."""
    try:
        with open_tensors(file, "np") as content:
            labels: np.ndarray = content.get_tensor("labels")
            return labels
    except TENSOR_ERRORS as error:
        raise _damaged(file, error) from None


def finish(path: Path, manifest: dict[str, Any], infos: Sequence[ShardInfo]) -> dict[str, Any]:
    """Completes and writes the manifest of a set whose shards are all written; returns it."""
    shards = [{"num": info.num, "sha256": info.sha256} for info in infos]
    whole = {**manifest, "shards": shards, "complete": True}
    write_json(path / MANIFEST, whole)
    return whole


def _open_shards(source: str, path: Path, manifest: dict[str, Any]) -> Contents:
    """Compares the hashes in the manifest with those in the shards' headers, and hashes the content of the first shard.

    Hashing all 170 GB of ImageNet at each start could take longer than the run.
    """
    if not manifest.get("complete"):
        raise DataError(f"{source} is an unfinished set; run the ddo encode that made it again, it continues")
    try:
        told = _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise DataError(
            f"{source}: {MANIFEST} is damaged ({problem_of(error)}); remove the set, and encode the images again"
        ) from None
    hashes = [shard.sha256 for shard in told.shards]
    encoded = Encoded(told.encoder, tuple(told.image_shape), hashed("latents", *hashes))
    files = [shard_file(path, number) for number in range(len(hashes))]
    for name, problem in ledger.near(path).problems(path, lambda name: False).items():
        raise DataError(f"{path}: {name} {problem}; copy it again, or run the same ddo encode again")
    for file, sha256 in zip(files, hashes, strict=True):
        if not file.is_file():
            raise DataError(f"{file} is missing from an encoded set; copy it again, or run the same ddo encode again")
        if read_info(file).sha256 != sha256:
            raise _damaged(file, ValueError(f"it is not the shard that {MANIFEST} names"))
    try:
        if content_hash(load_tensors(files[0])) != hashes[0]:
            raise ValueError("its content has changed")
    except TENSOR_ERRORS as error:
        raise _damaged(files[0], error) from None
    try:
        labels = join_tensors(files, "labels")
        contents = Contents(join_tensors(files, "latents"), labels.read(np.arange(labels.num)), told.num_classes)
        if told.captions and len(told.captions) != labels.num:
            raise ValueError(f"{source}: {len(told.captions)} captions of {labels.num} items")
    except TENSOR_ERRORS as error:
        raise DataError(f"{error}; encode the images again") from None
    return contents._replace(encoded=encoded, captions=tuple(told.captions))


def _damaged(file: Path, error: Exception) -> DataError:
    remedy = "copy it again, or remove it and run the same ddo encode again"
    return DataError(f"{file} is damaged ({reason(error)}); {remedy}")


# --- EDM2's archives


class _NpyFiles(ItemFiles):
    """Float32 arrays of one shape in .npy files or zip members."""

    dtype: np.dtype[Any] = np.dtype(np.float32)

    def item(self, row: int) -> np.ndarray:
        try:
            content = self.content(row)
            return npz.read_array(io.BytesIO(content), len(content))
        except (*ZIP_ERRORS, MemoryError) as error:
            raise DataError(f"{self.source}: {self.names[row]} cannot be read ({reason(error)}); replace it") from None

    def mismatch(self, row: int, item: np.ndarray) -> DataError:
        return DataError(
            f"{self.source}: {self.names[row]} is {item.dtype} {item.shape} where the first is float32 {self.shape}; "
            "replace it"
        )


def _open_zip(source: str, path: Path) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            names = _entries(archive.namelist())
            labelled = image_files.indexed_labels(source, names, image_files.zip_file(archive, INDEX, len(names)))
            content = ZipBytes(path, archive, names)
    except ZIP_ERRORS as error:
        raise image_files.broken_zip(source, error) from None
    # Sizes and CRC-32 of the members, which reading checks.
    return _edm2_set(source, names, content, labelled, content.places[:, 1:].tobytes())


def _entries(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.rpartition("/")[2].startswith(EDM2_NAME) and name.endswith(".npy"))


def _edm2_set(
    source: str,
    names: list[str],
    content: FolderBytes | ZipBytes,
    labelled: tuple[np.ndarray, tuple[str, ...]],
    stamp: bytes | str | None,
) -> Contents:
    labels, warnings = labelled
    if not names:
        raise DataError(f"{source} names latents and holds no {EDM2_NAME}*.npy; copy it again")
    reader = _NpyFiles(source, names, content)
    first = reader.item(0)
    if first.dtype != np.float32 or first.ndim != 3 or len(first) % 2:
        raise DataError(
            f"{source}: {names[0]} is {first.dtype} {first.shape}; mean and deviation of latents are float32 "
            "(8, h, w), as EDM2 stores them"
        )
    digest = hashlib.sha256(repr((names, stamp)).encode() + labels.tobytes()).hexdigest()
    encoded = Encoded("", (3, *(EDM2_FACTOR * side for side in first.shape[1:])), digest)
    return Contents(reader, labels, count_classes(labels), None, encoded, (), warnings)
