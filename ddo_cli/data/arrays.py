"""Item sets in .npz files: ADM's sample batches (arr_0, arr_1), Discriminator Guidance's (samples, label), and ours."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddo_cli.data.items import ItemSet, count_classes, describe, item_set
from ddo_cli.errors import DataError
from ddo_cli.likelihood import NO_LABEL

NPZ_ITEMS = ("arr_0", "samples", "images")
NPZ_LABELS = ("label", "labels", "arr_1")
NPZ_ERRORS = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
# Discriminator Guidance's trainer leaves the concatenation of a folder's files in that folder.
MERGED = "gen_data_for_discriminator_training.npz"


class _Arrays(NamedTuple):
    """Content of one file: items, labels int64 (N,), how many classes its labels can name, and its arrays' names."""

    items: np.ndarray
    labels: np.ndarray
    num_classes: int
    keys: set[str]


def open_npz(source: str, path: Path, num: int | None) -> ItemSet:
    """The items of one .npz."""
    found = _read(source, path)
    return item_set(source, found.items, found.labels, num, found.num_classes)


def npz_files(path: Path) -> list[Path]:
    """The .npz files of a folder that holds nothing else (hidden files aside), sorted by name; else none."""
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if not all(entry.suffix.lower() == ".npz" and entry.is_file() for entry in entries):
        return []
    return [entry for entry in entries if entry.name != MERGED] or entries


def open_npz_folder(source: str, files: list[Path], num: int | None) -> ItemSet:
    """The concatenation of a folder's .npz files, which must hold arrays of the same names."""
    parts = [_read(str(file), file) for file in files]
    for file, part in zip(files, parts, strict=True):
        check_alike(file, part.keys, part.items.shape[1:], files[0], parts[0].keys, parts[0].items.shape[1:])
    items, labels = np.concatenate([part.items for part in parts]), np.concatenate([part.labels for part in parts])
    return item_set(source, items, labels, num, max(part.num_classes for part in parts))


def check_alike(
    file: Path, keys: set[str], shape: Sequence[int], first: Path, first_keys: set[str], first_shape: Sequence[int]
) -> None:
    """Raises DataError unless a folder's file has arrays of the first one's names, and items of its shape."""
    if keys != first_keys:
        raise DataError(
            f"{file} holds {', '.join(sorted(keys))} where the first file, {first.name}, holds "
            f"{', '.join(sorted(first_keys))}; a folder of .npz files is one set: take out what does not belong"
        )
    if tuple(shape) != tuple(first_shape):
        raise DataError(
            f"{file} holds {describe(shape)} where the first file, {first.name}, holds {describe(first_shape)}; all "
            "items of a set must have one size and mode"
        )


def _read(source: str, path: Path) -> _Arrays:
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
        raise without_items(source, keys)
    items = _items(f"{source}: {key}", items)
    if labels is None:
        return _Arrays(items, np.full(len(items), NO_LABEL), 0, keys)
    return _Arrays(items, *label_classes(f"{source}: {label_key}", labels, len(items)), keys)


def without_items(source: str, keys: set[str]) -> DataError:
    """What to say of an .npz that has none of NPZ_ITEMS."""
    what = "feature statistics, not images" if {"mu", "sigma"} <= keys else f"only {', '.join(sorted(keys))}"
    return DataError(f"{source} holds {what}; it needs an array named {', '.join(NPZ_ITEMS[:-1])} or images")


def _items(where: str, items: np.ndarray) -> np.ndarray:
    """uint8 (N, C, H, W), or float32 (N, d)."""
    if items.dtype.kind == "f" and items.ndim == 2 and items.size:
        points = items.astype(np.float32)
        if not np.isfinite(points).all():
            raise DataError(f"{where} holds a point that is not finite in float32; remove it")
        return points
    if are_channels_last(where, items.dtype, items.shape):
        return np.ascontiguousarray(items.transpose(0, 3, 1, 2))
    return items


def are_channels_last(where: str, dtype: np.dtype, shape: Sequence[int]) -> bool:
    """Whether images are (N, H, W, C) and not (N, C, H, W). Raises DataError if they are neither, or not uint8."""
    if dtype != np.uint8 or len(shape) != 4 or 0 in shape:
        raise DataError(
            f"{where} is {dtype} {tuple(shape)}; it must be uint8 images (N, H, W, C) or (N, C, H, W), N >= 1, or "
            "float points (N, d)"
        )
    if shape[3] in (1, 3):  # as ADM's files; they win where both would do
        return True
    if shape[1] in (1, 3):
        return False
    raise DataError(
        f"{where} has the shape {tuple(shape)} without an axis of 1 or 3 channels; store grey or RGB images"
    )


def label_classes(where: str, labels: np.ndarray, num: int) -> tuple[np.ndarray, int]:
    """Classes int64 (N,) and their number, of class numbers (N,) or one-hot rows (N, classes)."""
    if labels.ndim == 2 and len(labels) == num and labels.shape[1] > 1 and labels.dtype.kind in "biuf":
        # Exactly one 1 and nothing else: a soft label, or a row of zeros, is no class.
        wrong = ((labels != 0) & (labels != 1)).any(1) | ((labels == 1).sum(1) != 1)
        if not wrong.any():
            return labels.argmax(1).astype(np.int64), labels.shape[1]
        raise DataError(
            f"{where} is {labels.dtype} {labels.shape}, and row {int(wrong.argmax())} is not one-hot; it must hold one "
            f"class number for each of the {num} items, or a row of zeros with a single 1"
        )
    if labels.shape != (num,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} is {labels.dtype} {labels.shape}; it must hold one class number for each of the {num} items, or "
            "a one-hot row"
        )
    if labels.min() < NO_LABEL or labels.max() >= 2**31:
        raise DataError(f"{where} holds {labels.min()}..{labels.max()}; classes count from 0, -1 is none")
    classes = labels.astype(np.int64)
    return classes, count_classes(classes)
