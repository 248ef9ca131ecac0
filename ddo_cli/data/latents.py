"""Sets of latents or tokens: what `ddo encode` writes and EDM2's own archives, read row by row when asked for.

`ddo encode`: latents-000000.safetensors, ... with tensors `latents` and `labels`, and a manifest.json that names what
encoded them and each shard's hash. EDM2: a zip or folder of img-mean-std-00000000.npy, float32 (8, h, w), the mean and
deviation of Stability's autoencoder, with labels in dataset.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddo_cli.checkpoint import write_tensors
from ddo_cli.data import cache, image_files
from ddo_cli.data.items import INDEX, Encoded, ItemSet, choice, count_classes
from ddo_cli.data.readers import FolderBytes, ZipBytes
from ddo_cli.errors import DataError
from ddo_cli.files import write_json

FORMAT = "latents"  # of the manifest
MANIFEST = "manifest.json"
EDM2_NAME = "img-mean-std-"  # how the entries of EDM2's archives start
EDM2_FACTOR = 8  # pixels per side of the autoencoder's grid
_DTYPES = {"F32": np.float32, "F16": np.float16, "I16": np.int16, "I32": np.int32, "I64": np.int64}
_DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError, EOFError)


class _Rows(Protocol):
    """Where items lie: how many, of which shape and type, and how to read some of them."""

    num: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The items of these rows, a new array (b, ...). Raises DataError."""


class Lazy:
    """Items on disk in the place of an array: length, shape, and indexing, which reads what is asked for."""

    def __init__(self, source: _Rows, rows: np.ndarray):
        self._source, self._rows = source, rows
        self.shape, self.dtype, self.ndim = (len(rows), *source.shape), source.dtype, 1 + len(source.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        rows = self._rows[index]
        found = self._source.read(np.atleast_1d(rows))
        return found if np.ndim(rows) else found[0]


def is_latents(path: Path) -> bool:
    """Whether this folder or zip is a set of latents or tokens. Looks at a few names only."""
    try:
        if path.is_dir():
            first = f"{EDM2_NAME}00000000.npy"
            return _manifest(path) is not None or (path / first).is_file() or (path / "00000" / first).is_file()
        if path.suffix.lower() != ".zip":
            return False
        with open(path, "rb") as file:  # the directory of a zip of ImageNet takes seconds to read, its start does not
            return EDM2_NAME.encode() in file.read(1 << 16)
    except OSError:
        return False  # whoever opens it says it better


def not_images(source: str) -> DataError:
    """What to say where images are needed."""
    return DataError(f"{source} holds latents or tokens, not images; give the images that they were encoded from")


def open_latents(source: str, path: Path, num: int | None) -> ItemSet:
    """The set, or `num` of its items as `items.choice` picks them. Raises DataError."""
    if not path.is_dir():
        return _open_zip(source, path, num)
    manifest = _manifest(path)
    return _open_npy_folder(source, path, num) if manifest is None else _open_shards(source, path, manifest, num)


def _item_set(
    source: str, rows_of: _Rows, labels: np.ndarray, num_classes: int, num: int | None, encoded: Encoded
) -> ItemSet:
    rows = choice(source, rows_of.num, num)
    if num is not None and num != rows_of.num:
        encoded = encoded._replace(digest=_hashed(encoded.digest, num))
    # The program indexes items and asks for their shape, which `Lazy` answers as an array does.
    return ItemSet(cast(np.ndarray, Lazy(rows_of, rows)), labels[rows], source, num_classes, encoded)


def _hashed(*content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Shards


class ShardInfo(NamedTuple):
    """What a shard says of itself: its items, the hash of their content, and `ddo encode`'s own notes."""

    num: int
    sha256: str
    notes: dict[str, Any]


def shard_file(path: Path, number: int) -> Path:
    """The file of a shard."""
    return path / f"latents-{number:06d}.safetensors"


def write_shard(file: Path, latents: Tensor, labels: Tensor, notes: dict[str, Any]) -> None:
    """Writes a shard atomically, with the hash of its content. notes: what the writer wants back, see `read_info`."""
    tensors = {"latents": latents.contiguous(), "labels": labels.contiguous()}
    # One entry, since safetensors writes several in random order, and equal sets are to be equal files.
    write_tensors(file, tensors, {"ddo": json.dumps({"sha256": content_hash(tensors), "notes": notes}, sort_keys=True)})


def content_hash(tensors: dict[str, Tensor]) -> str:
    """Hex SHA-256 of a shard's latents and labels."""
    found = hashlib.sha256(tensors["latents"].numpy().data)
    found.update(tensors["labels"].numpy().data)
    return found.hexdigest()


def read_info(file: Path) -> ShardInfo:
    """What a shard says of itself, without reading its latents. Raises DataError if the file is damaged."""
    try:
        with safe_open(file, framework="np") as content:  # checks that the file is as long as its header says
            found, shape = json.loads(content.metadata()["ddo"]), content.get_slice("latents").get_shape()
        return ShardInfo(shape[0], found["sha256"], found["notes"])
    except _DAMAGE as error:
        raise _damaged(file, error) from None


def finish(path: Path, manifest: dict[str, Any], infos: Sequence[ShardInfo]) -> dict[str, Any]:
    """Completes and writes the manifest of a set whose shards are there; returns it."""
    shards = [{"num": info.num, "sha256": info.sha256} for info in infos]
    whole = {**manifest, "shards": shards, "complete": True}
    write_json(path / MANIFEST, whole)
    return whole


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _open_shards(source: str, path: Path, manifest: dict[str, Any], num: int | None) -> ItemSet:
    """The hashes that the manifest names are compared with those in the shards; of one shard the content is hashed.

    Reading all of ImageNet's 170 GB on each start would take longer than some of what is done with them.
    """
    if not manifest.get("complete"):
        raise DataError(f"{source} is an unfinished set; run the ddo encode that made it again, it continues")
    try:
        hashes = [shard["sha256"] for shard in manifest["shards"]]
        encoded = Encoded(manifest["encoder"], tuple(manifest["image_shape"]), _hashed("latents", *hashes))
        num_classes = int(manifest["num_classes"])
        if not hashes:
            raise ValueError("it names no shard")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{source}: {MANIFEST} is damaged ({error}); remove the set, and encode the images again"
        ) from None
    files = [shard_file(path, number) for number in range(len(hashes))]
    for file, sha256 in zip(files, hashes, strict=True):
        if not file.is_file():
            raise DataError(f"{file} is missing from an encoded set; copy it again, or run the same ddo encode again")
        if read_info(file).sha256 != sha256:
            raise _damaged(file, ValueError(f"it is not the shard that {MANIFEST} names"))
    try:
        if content_hash(load_file(files[0])) != hashes[0]:
            raise ValueError("its content has changed")
    except _DAMAGE as error:
        raise _damaged(files[0], error) from None
    shards = _Shards(files)
    return _item_set(source, shards, shards.labels(), num_classes, num, encoded)


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} is damaged ({error}); copy it again, or remove it and run the same ddo encode again")


class _Shards:
    """`latents` of safetensors files, read at their place.

    Files are opened for each read: open maps of all shards of ImageNet would exceed the usual number of open files.
    """

    def __init__(self, files: Sequence[Path]):
        found = [_place(file) for file in files]
        self.files, self.offsets = list(files), [place.offset for place in found]
        self.ends = np.cumsum([place.shape[0] for place in found])
        first = found[0]
        self.num, self.shape, self.dtype = int(self.ends[-1]), first.shape[1:], first.dtype
        for file, place in zip(files, found, strict=True):
            if place.shape[1:] != self.shape or place.dtype != self.dtype:
                raise DataError(
                    f"{file} holds {place.dtype} {place.shape[1:]} where the first shard holds {self.dtype} "
                    f"{self.shape}; encode the images again"
                )

    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        parts = []
        for file in self.files:
            with safe_open(file, framework="np") as content:
                parts.append(content.get_tensor("labels").astype(np.int64))
        return np.concatenate(parts)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The items of these rows, in any order."""
        found = np.empty((len(rows), *self.shape), dtype=self.dtype)
        owner = np.searchsorted(self.ends, rows, side="right")
        size = found[:1].nbytes
        for number in np.unique(owner).tolist():
            first = 0 if number == 0 else int(self.ends[number - 1])
            try:
                with open(self.files[number], "rb", buffering=0) as file:
                    for place in np.flatnonzero(owner == number).tolist():
                        file.seek(self.offsets[number] + (int(rows[place]) - first) * size)
                        if file.readinto(memoryview(found[place]).cast("B")) != size:
                            raise EOFError("it has become shorter")
            except (OSError, EOFError) as error:
                raise DataError(
                    f"{self.files[number]} has changed since it was opened ({error}); run the command again"
                ) from None
        return found


class _Place(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of the first byte in the file


def _place(file: Path) -> _Place:
    """Where `latents` lie in a shard whose header `read_info` has checked."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            entry = json.loads(opened.read(length))["latents"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        return _Place(tuple(entry["shape"]), dtype, 8 + length + entry["data_offsets"][0])
    except _DAMAGE as error:
        raise _damaged(file, error) from None


# ---------------------------------------------------------------------------------------------------------------------
# EDM2's archives


class _Npy:
    """Float32 arrays of one shape in .npy files or zip members."""

    def __init__(self, source: str, names: Sequence[str], content: Callable[[int], bytes]):
        self.source, self.names, self.content = source, names, content
        first = self._array(0)
        self.num, self.shape, self.dtype = len(names), first.shape, first.dtype
        if self.dtype != np.float32 or len(self.shape) != 3 or self.shape[0] % 2:
            raise DataError(
                f"{source}: {names[0]} is {self.dtype} {self.shape}; mean and deviation of latents are float32 "
                "(8, h, w), as EDM2 stores them"
            )

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Raises DataError naming the first entry that is not like the others."""
        found = np.empty((len(rows), *self.shape), dtype=np.float32)
        for place, row in enumerate(rows.tolist()):
            one = self._array(row)
            if one.shape != self.shape or one.dtype != np.float32:
                raise DataError(
                    f"{self.source}: {self.names[row]} is {one.dtype} {one.shape} where the first is float32 "
                    f"{self.shape}; replace it"
                )
            found[place] = one
        return found

    def _array(self, row: int) -> np.ndarray:
        try:
            found = np.load(io.BytesIO(self.content(row)), allow_pickle=False)
            if not isinstance(found, np.ndarray):
                raise ValueError("it is no array")
            return found
        except (*image_files.ZIP_ERRORS, ValueError, MemoryError) as error:
            raise DataError(f"{self.source}: {self.names[row]} cannot be read ({error}); replace it") from None


def _open_zip(source: str, path: Path, num: int | None) -> ItemSet:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            names = _entries(members)
            labels = image_files.indexed_labels(source, names, archive.read(INDEX) if INDEX in members else None)
            content = ZipBytes(path, archive, names)
    except image_files.ZIP_ERRORS as error:
        raise image_files.broken_zip(source, error) from None
    # Each member's CRC-32 stands in the directory, and is checked on reading.
    return _edm2_set(source, names, content, labels, num, content.places[:, 1:].tobytes())


def _open_npy_folder(source: str, path: Path, num: int | None) -> ItemSet:
    names = _entries(file.relative_to(path).as_posix() for file in path.rglob(f"{EDM2_NAME}*.npy"))
    index = path / INDEX
    labels = image_files.indexed_labels(source, names, index.read_bytes() if index.is_file() else None)
    stamp = cache.key_of(path, (path / name for name in names), names)
    return _edm2_set(source, names, FolderBytes(path, names), labels, num, stamp)


def _entries(names: Any) -> list[str]:
    return sorted(name for name in names if name.rpartition("/")[2].startswith(EDM2_NAME) and name.endswith(".npy"))


def _edm2_set(
    source: str,
    names: list[str],
    content: Callable[[int], bytes],
    labels: np.ndarray,
    num: int | None,
    stamp: bytes | str | None,
) -> ItemSet:
    entries = _Npy(source, names, content)
    _, *sides = entries.shape
    digest = hashlib.sha256(repr((names, stamp)).encode() + labels.tobytes()).hexdigest()
    encoded = Encoded("", (3, *(EDM2_FACTOR * side for side in sides)), digest)
    return _item_set(source, entries, labels, count_classes(labels), num, encoded)
