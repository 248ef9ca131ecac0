"""Image sets from wherever users keep them: folders, zips, .npz files, sample sets, and the embedded sets."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ddo_cli import console
from ddo_cli.checkpoint import EMBEDDED
from ddo_cli.data import samples
from ddo_cli.data.embedded import embedded_names, open_embedded
from ddo_cli.data.items import INDEX, ItemSet, choice, count_classes, describe, item_set
from ddo_cli.errors import DataError
from ddo_cli.likelihood import NO_LABEL

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NPZ_ITEMS = ("arr_0", "samples", "images")
NPZ_LABELS = ("label", "labels", "arr_1")
MANY = 4000  # files; from here on they are decoded by several threads, with progress
CHUNK = 256  # files per task of a thread
# Pillow modes without loss in 8 bits of grey or RGB. RGBA is taken where it is opaque.
MODES = {"1": "L", "L": "L", "RGB": "RGB", "P": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "RGBA": "RGBA"}
NPZ_ERRORS = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def open_images(source: str, num: int | None = None) -> ItemSet:
    """The items of a source.

    source: a folder of images (sorted by name; labels from dataset.json, or else from two or more top-level subfolders
    when every image lies in one); a zip of images (labels from dataset.json); an .npz (arr_0, samples or images: uint8,
    channels first or last, or float points (N, d); label, labels or arr_1); a sample set that ddo wrote; or
    "embedded:<name>", see `embedded.embedded_sets`.
    num: use this many. Embedded sets that are generated are made in this number; of any other, a random choice that is
    always the same (numpy's RandomState(0), as EDM does), in the set's order.
    Raises DataError naming the first item that cannot be used.
    """
    if num is not None and num < 1:
        raise DataError(f"{source}: num = {num} must be at least 1")
    path = Path(source)
    if source.startswith(EMBEDDED):
        return open_embedded(source, num)
    if path.is_dir():
        manifest = _sample_manifest(path)
        if manifest is not None:
            return _open_samples(source, path, manifest, num)
        return _open_folder(source, path, num)
    if not path.is_file():
        raise DataError(f"{source} does not exist; give a folder, a .zip or .npz file, or one of {embedded_names()}")
    if path.suffix.lower() == ".zip":
        return _open_zip(source, path, num)
    if path.suffix.lower() == ".npz":
        return _open_npz(source, path, num)
    raise DataError(f"{source} is neither a folder nor a .zip or .npz file; put images into a folder and give that")


# ---------------------------------------------------------------------------------------------------------------------
# Folders and zips


class _Files(NamedTuple):
    """Image files by sorted name, how to read one, and the content of dataset.json if there is one."""

    source: str
    names: list[str]
    read: Callable[[str], bytes]
    labels_text: bytes | None


def _open_folder(source: str, path: Path, num: int | None) -> ItemSet:
    names: list[str] = []
    seen: set[str] = set()
    for root, folders, leaves in os.walk(path, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [folder for folder in folders if not folder.startswith(".")]
        if real not in seen:  # a link to a parent would go round for ever
            names += [Path(root, leaf).relative_to(path).as_posix() for leaf in leaves]
        seen.add(real)
    index = path / INDEX
    try:
        text = index.read_bytes() if index.is_file() else None
    except OSError as error:
        raise DataError(f"{index} cannot be read ({error.strerror}); correct its permissions") from None
    files = _Files(source, _image_names(source, names), lambda name: (path / name).read_bytes(), text)
    labels = _indexed_labels(files)
    tops = [name.partition("/")[0] for name in files.names if "/" in name]
    classes = sorted(set(tops))
    if text is None and len(tops) == len(files.names) and len(classes) > 1:
        number = {top: label for label, top in enumerate(classes)}
        labels = np.array([number[top] for top in tops], dtype=np.int64)
    return _decoded(files, labels, num)


def _open_zip(source: str, path: Path, num: int | None) -> ItemSet:
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read(INDEX) if INDEX in archive.namelist() else None
            files = _Files(source, _image_names(source, archive.namelist()), archive.read, text)
            return _decoded(files, _indexed_labels(files), num)
    except (OSError, RuntimeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{source} is not a whole zip file ({error}); copy it again") from None


def _image_names(source: str, names: list[str]) -> list[str]:
    """Names with an image's extension, sorted; hidden files and macOS's resource forks are no images."""
    found = sorted(
        name
        for name in names
        if name.lower().endswith(EXTENSIONS)
        and not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    )
    if not found:
        raise DataError(f"{source} holds no images ({', '.join(EXTENSIONS)}); give the folder or zip that has them")
    return found


def _indexed_labels(files: _Files) -> np.ndarray:
    """Labels of dataset.json, int64 (N,): {"labels": [[name, class], ...]}, or null for none."""
    where, labels = f"{files.source}: {INDEX}", np.full(len(files.names), NO_LABEL)
    if files.labels_text is None:
        return labels
    remedy = 'it must be {"labels": [["image name", class number], ...]} or {"labels": null}'
    try:
        entries = json.loads(files.labels_text)["labels"]
        if entries is None:
            return labels
        known = dict(entries)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is malformed ({type(error).__name__}: {error}); {remedy}") from None
    for row, name in enumerate(files.names):
        if name not in known:
            raise DataError(f"{where} has no label for {name}; add it, or set labels to null")
        label = known[name]
        if type(label) is not int or not 0 <= label < 2**31:
            raise DataError(f"{where}: the label of {name} is {label!r}, not a class number; {remedy}")
        labels[row] = label
    return labels


def _decoded(files: _Files, labels: np.ndarray, num: int | None) -> ItemSet:
    """Decodes the chosen files straight into one array."""
    num_classes = count_classes(labels)
    chosen = choice(files.source, len(files.names), num)
    names = [files.names[row] for row in chosen]
    first = _decode(files, names[0])
    items = np.empty((len(names), *first.shape), dtype=np.uint8)

    def fill(start: int) -> int:
        part = names[start : start + CHUNK]
        for row, name in enumerate(part, start):
            image = _decode(files, name)
            if image.shape != first.shape:
                raise DataError(
                    f"{files.source}: {name} is {describe(image.shape)} where the first image, {names[0]}, is "
                    f"{describe(first.shape)}; all images must have one size and mode: convert or remove it"
                )
            items[row] = image
        return len(part)

    starts = range(0, len(names), CHUNK)
    if len(names) < MANY:
        for start in starts:
            fill(start)
    else:
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow decodes outside Python's lock
        try:
            with console.progress(f"reading {files.source}", len(names), "images") as bar:
                for count in pool.map(fill, starts):  # in order, so that the first bad name is the one reported
                    bar.advance(count)
        finally:
            pool.shutdown(cancel_futures=True)
    return ItemSet(items, labels[chosen], files.source, num_classes)


def _decode(files: _Files, name: str) -> np.ndarray:
    """uint8 (C, H, W) with 1 or 3 channels."""
    where = f"{files.source}: {name}"
    try:
        with Image.open(io.BytesIO(files.read(name))) as image:
            image.load()
            mode = MODES.get(image.mode)
            pixels = np.asarray(image.convert(mode)) if mode else None  # (H, W) or (H, W, C)
            found = image.mode
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead them to
        raise DataError(f"{where} cannot be read as an image ({error}); replace or remove it") from None
    if mode == "RGBA" and pixels is not None and (pixels[..., 3] == 255).all():
        mode, pixels = "RGB", pixels[..., :3]
    if pixels is None or mode == "RGBA":
        what = "transparent pixels" if mode == "RGBA" else f"the mode {found}"
        raise DataError(f"{where} has {what}; convert it to RGB or 8-bit grey")
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# .npz files and sample sets


def _open_npz(source: str, path: Path, num: int | None) -> ItemSet:
    try:
        content = np.load(path)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with content:
            keys = set(content.files)
            key = next((key for key in NPZ_ITEMS if key in keys), None)
            label_key = next((key for key in NPZ_LABELS if key in keys), None)
            items = content[key] if key else None
            labels = content[label_key] if key and label_key else None
    except NPZ_ERRORS as error:
        raise DataError(f"{source} is not a whole .npz of arrays ({error}); copy it again") from None
    if items is None:
        what = "feature statistics, not images" if {"mu", "sigma"} <= keys else f"only {', '.join(sorted(keys))}"
        raise DataError(f"{source} holds {what}; it needs an array named {', '.join(NPZ_ITEMS[:-1])} or images")
    items = _npz_items(f"{source}: {key}", items)
    if labels is None:
        labels = np.full(len(items), NO_LABEL)
    elif labels.shape != (len(items),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{source}: {label_key} is {labels.dtype} {labels.shape}; it must hold one class number for each of the "
            f"{len(items)} items"
        )
    elif labels.min() < NO_LABEL or labels.max() >= 2**31:
        raise DataError(f"{source}: {label_key} holds {labels.min()}..{labels.max()}; classes count from 0, -1 is none")
    return item_set(source, items, labels.astype(np.int64), num)


def _npz_items(where: str, items: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W), or float32 (N, d)."""
    if items.dtype.kind == "f" and items.ndim == 2 and items.size:
        points = items.astype(np.float32)
        if not np.isfinite(points).all():
            raise DataError(f"{where} holds a point that is not finite in float32; remove it")
        return points
    if items.dtype != np.uint8 or items.ndim != 4 or not items.size:
        raise DataError(
            f"{where} is {items.dtype} {items.shape}; it must be uint8 images (N, H, W, C) or (N, C, H, W), N >= 1, or "
            "float points (N, d)"
        )
    if items.shape[3] in (1, 3):  # channels last, as ADM's files; they win where both would do
        return np.ascontiguousarray(items.transpose(0, 3, 1, 2))
    if items.shape[1] in (1, 3):
        return items
    raise DataError(f"{where} has the shape {items.shape} without an axis of 1 or 3 channels; store grey or RGB images")


def _sample_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a sample set in this folder; None where there is none, or a file of another program."""
    try:
        manifest = json.loads((path / samples.MANIFEST).read_bytes())
    except (OSError, ValueError):
        manifest = None
    if isinstance(manifest, dict) and manifest.get("format") in ("png", "npz", "shards"):
        return manifest
    return {"format": "shards"} if any(path.glob("shard-*.safetensors")) else None


def _open_samples(source: str, path: Path, manifest: dict[str, Any], num: int | None) -> ItemSet:
    """A set in any of the formats that `ddo sample` writes."""
    if manifest["format"] == "shards":
        opened = samples.open_samples(path)  # checks the set as a whole
        return item_set(source, opened.items, opened.labels, num)
    if not manifest.get("complete"):
        raise DataError(f"{source} is an unfinished sample set; run the command that made it again, it continues")
    if manifest["format"] == "npz":
        return _open_npz(source, path / "samples.npz", num)
    try:
        names = [f"{seed:06d}.png" for seed in samples.parse_seeds(manifest["seeds"])]
        labels = np.array(manifest["labels"], dtype=np.int64)
        if labels.shape != (len(names),):
            raise ValueError(f"{len(names)} seeds and {labels.size} labels")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(f"{source}: {samples.MANIFEST} is damaged ({error}); remove the set and sample again") from None
    return _decoded(_Files(source, names, lambda name: (path / name).read_bytes(), None), labels, num)
