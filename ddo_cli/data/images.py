"""Image sets from wherever users keep them: what a source is, and who opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ddo_cli.checkpoint import EMBEDDED
from ddo_cli.data import arrays, cifar, image_files, latents, samples
from ddo_cli.data.embedded import embedded_names, open_embedded
from ddo_cli.data.items import ItemSet, item_set
from ddo_cli.errors import DataError


def open_images(source: str, num: int | None = None, cache: bool = True) -> ItemSet:
    """The items of a source.

    source: a folder of images (sorted by name; labels from dataset.json, or else from two or more top-level subfolders
    when every image lies in one); a zip of images (labels from dataset.json); an .npz (arr_0, samples or images: uint8,
    channels first or last, or float points (N, d); label, labels or arr_1: class numbers or one-hot rows); a folder of
    nothing but .npz files with the same arrays (their concatenation, sorted by name); cifar-10-python.tar.gz or the
    folder in it (its training images); a sample set that ddo wrote; latents or tokens of `ddo encode` or of EDM2's own
    archives, see `latents`, which are read when asked for; or "embedded:<name>", see `embedded.embedded_sets`.
    num: use this many. Embedded sets that are generated are made in this number; of any other, a random choice that is
    always the same (numpy's RandomState(0), as EDM does), in the set's order.
    cache: whether many images are kept decoded for later runs (`data.cache`); such items are read-only.
    Raises DataError naming the first item that cannot be used.
    """
    if num is not None and num < 1:
        raise DataError(f"{source}: num = {num} must be at least 1")
    path = Path(source)
    if source.startswith(EMBEDDED):
        return open_embedded(source, num)
    if latents.is_latents(path):
        return latents.open_latents(source, path, num)
    if path.is_dir():
        return _open_directory(source, path, num, cache)
    if not path.is_file():
        raise DataError(
            f"{source} does not exist; give a folder, a .zip, .npz or .tar.gz file, or one of {embedded_names()}"
        )
    if path.suffix.lower() == ".zip":
        return image_files.open_zip(source, path, num, cache)
    if path.suffix.lower() == ".npz":
        return arrays.open_npz(source, path, num)
    if path.name.lower().endswith(cifar.TAR_SUFFIXES):
        return cifar.open_tar(source, path, num)
    raise DataError(
        f"{source} is neither a folder nor a .zip, .npz or .tar.gz file; put images into a folder and give that"
    )


def _open_directory(source: str, path: Path, num: int | None, cache: bool) -> ItemSet:
    manifest = sample_manifest(path)
    if manifest is not None:
        return _open_samples(source, path, manifest, num, cache)
    if cifar.holds_batches(path):
        return cifar.open_unpacked(source, path, num)
    if files := arrays.npz_files(path):
        return arrays.open_npz_folder(source, files, num)
    return image_files.open_folder(source, path, num, cache)


# ---------------------------------------------------------------------------------------------------------------------
# Sample sets


def sample_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a sample set in this folder; None where there is none, or a file of another program."""
    try:
        manifest = json.loads((path / samples.MANIFEST).read_bytes())
    except (OSError, ValueError):
        manifest = None
    if isinstance(manifest, dict) and manifest.get("format") in ("png", "npz", "shards"):
        return manifest
    return {"format": "shards"} if any(path.glob("shard-*.safetensors")) else None


def _open_samples(source: str, path: Path, manifest: dict[str, Any], num: int | None, cache: bool) -> ItemSet:
    """A set in any of the formats that `ddo sample` writes."""
    if manifest["format"] == "shards":
        opened = samples.open_samples(path)  # checks the set as a whole
        return item_set(source, opened.items, opened.labels, num)
    check_complete(source, manifest)
    if manifest["format"] == "npz":
        return arrays.open_npz(source, path / "samples.npz", num)
    return image_files.open_listed(source, path, *sample_entries(source, manifest), num, cache)


def check_complete(source: str, manifest: dict[str, Any]) -> None:
    """Raises DataError for the manifest of a set that is still being made."""
    if not manifest.get("complete"):
        raise DataError(f"{source} is an unfinished sample set; run the command that made it again, it continues")


def sample_entries(source: str, manifest: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Names of the files of a set in the format png, by seed, and their labels int64 (N,)."""
    try:
        names = [f"{seed:06d}.png" for seed in samples.parse_seeds(manifest["seeds"])]
        labels = np.array(manifest["labels"], dtype=np.int64)
        if labels.shape != (len(names),):
            raise ValueError(f"{len(names)} seeds and {labels.size} labels")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(f"{source}: {samples.MANIFEST} is damaged ({error}); remove the set and sample again") from None
    return names, labels
