"""Image sets of one file per image: folders, and EDM's and StyleGAN's zips."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddo_cli import console
from ddo_cli.data import cache
from ddo_cli.data.items import INDEX, ItemSet, choice, count_classes, describe
from ddo_cli.errors import DataError
from ddo_cli.likelihood import NO_LABEL

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MANY = 4000  # files; from here on they are decoded by several threads, with progress, and kept decoded
CHUNK = 256  # files per task of a thread
# Pillow modes without loss in 8 bits of grey or RGB. RGBA is taken where it is opaque.
MODES = {"1": "L", "L": "L", "RGB": "RGB", "P": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "RGBA": "RGBA"}
ZIP_ERRORS = (OSError, RuntimeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class _Files(NamedTuple):
    """Image files below the folder, or in the zip, `path`: their names in order, and how to read one."""

    source: str
    path: Path
    names: list[str]
    read: Callable[[str], bytes]


def open_folder(source: str, path: Path, num: int | None, keep: bool) -> ItemSet:
    """Images by sorted name; labels of dataset.json, or else of the top-level subfolders if every image is in one.

    keep: whether many images go through the cache.
    """
    return open_listed(source, path, *folder_entries(source, path), num, keep)


def folder_entries(source: str, path: Path) -> tuple[list[str], np.ndarray]:
    """Names of a folder's images, sorted, and their labels int64 (N,)."""
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
    names = _image_names(source, names)
    labels = indexed_labels(source, names, text)
    tops = [name.partition("/")[0] for name in names if "/" in name]
    classes = sorted(set(tops))
    if text is None and len(tops) == len(names) and len(classes) > 1:
        number = {top: label for label, top in enumerate(classes)}
        labels = np.array([number[top] for top in tops], dtype=np.int64)
    return names, labels


def open_listed(
    source: str, path: Path, names: Sequence[str], labels: np.ndarray, num: int | None, keep: bool
) -> ItemSet:
    """The files `names` of a folder, in this order, with labels int64 (N,)."""
    return _decoded(_Files(source, path, list(names), lambda name: (path / name).read_bytes()), labels, num, keep)


def open_zip(source: str, path: Path, num: int | None, keep: bool) -> ItemSet:
    """Images by sorted name; labels of dataset.json. Directories in a zip are no classes, as in EDM."""
    try:
        with zipfile.ZipFile(path) as archive:
            names, labels = zip_entries(source, archive)
            return _decoded(_Files(source, path, names, archive.read), labels, num, keep)
    except ZIP_ERRORS as error:
        raise broken_zip(source, error) from None


def zip_entries(source: str, archive: zipfile.ZipFile) -> tuple[list[str], np.ndarray]:
    """Names of a zip's images, sorted, and their labels int64 (N,). Raises DataError, or one of ZIP_ERRORS."""
    text = archive.read(INDEX) if INDEX in archive.namelist() else None
    names = _image_names(source, archive.namelist())
    return names, indexed_labels(source, names, text)


def broken_zip(source: str, error: Exception) -> DataError:
    """What to say of one of ZIP_ERRORS."""
    return DataError(f"{source} is not a whole zip file ({error}); copy it again")


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


def indexed_labels(source: str, names: list[str], text: bytes | None) -> np.ndarray:
    """Labels of dataset.json, int64 (N,): {"labels": [[name, class], ...]}, or null for none."""
    where, labels = f"{source}: {INDEX}", np.full(len(names), NO_LABEL)
    if text is None:
        return labels
    remedy = 'it must be {"labels": [["image name", class number], ...]} or {"labels": null}'
    try:
        entries = json.loads(text)["labels"]
        if entries is None:
            return labels
        known = dict(entries)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is malformed ({type(error).__name__}: {error}); {remedy}") from None
    for row, name in enumerate(names):
        if name not in known:
            raise DataError(f"{where} has no label for {name}; add it, or set labels to null")
        label = known[name]
        if type(label) is not int or not 0 <= label < 2**31:
            raise DataError(f"{where}: the label of {name} is {label!r}, not a class number; {remedy}")
        labels[row] = label
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def _decoded(files: _Files, labels: np.ndarray, num: int | None, keep: bool) -> ItemSet:
    """The chosen files as one array: of the cache where they are many, else in memory."""
    chosen = choice(files.source, len(files.names), num)
    part = files._replace(names=[files.names[row] for row in chosen])
    items = _kept(part) if keep and len(part.names) >= MANY else None
    if items is None:
        items = np.empty((len(part.names), *_first(part).shape), dtype=np.uint8)
        _fill(part, items)
    return ItemSet(items, labels[chosen], files.source, count_classes(labels))


def _kept(files: _Files) -> np.ndarray | None:
    """All files, from the cache or through it; None where it is off or cannot hold them."""
    stamped = [files.path] if files.path.is_file() else [files.path / name for name in files.names]
    key = cache.key_of(files.path, stamped, files.names)
    if key is None:
        return None
    return cache.kept(
        files.source, key, len(files.names), lambda: _first(files).shape, lambda items: _fill(files, items)
    )


def _first(files: _Files) -> np.ndarray:
    return _decode(files, files.names[0])


def _fill(files: _Files, items: np.ndarray) -> None:
    """Decodes every file straight into its row of `items`. Raises DataError naming the first that does not fit."""

    def fill(start: int) -> int:
        part = files.names[start : start + CHUNK]
        for row, name in enumerate(part, start):
            image = _decode(files, name)
            check_same(files.source, name, image.shape, files.names[0], items.shape[1:])
            items[row] = image
        return len(part)

    starts = range(0, len(files.names), CHUNK)
    if len(files.names) < MANY:
        for start in starts:
            fill(start)
        return
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow decodes outside Python's lock
    try:
        with console.progress(f"reading {files.source}", len(files.names), "images") as bar:
            for count in pool.map(fill, starts):  # in order, so that the first bad name is the one reported
                bar.advance(count)
    finally:
        pool.shutdown(cancel_futures=True)


def check_same(source: str, name: str, shape: Sequence[int], first_name: str, first_shape: Sequence[int]) -> None:
    """Raises DataError unless the image `name` has the shape (C, H, W) of the set's first."""
    if tuple(shape) != tuple(first_shape):
        raise DataError(
            f"{source}: {name} is {describe(shape)} where the first image, {first_name}, is {describe(first_shape)}; "
            "all images must have one size and mode: convert or remove it"
        )


def _decode(files: _Files, name: str) -> np.ndarray:
    return decode(f"{files.source}: {name}", lambda: files.read(name))


def decode(where: str, read: Callable[[], bytes]) -> np.ndarray:
    """The image of the bytes that `read` returns: uint8 (C, H, W) with 1 or 3 channels. Raises DataError."""
    try:
        with Image.open(io.BytesIO(read())) as image:
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
