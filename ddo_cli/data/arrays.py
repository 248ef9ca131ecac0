"""Item sets in .npz files: ADM's sample batches (arr_0, arr_1), Discriminator Guidance's (samples, label), and ours."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddo_cli import npz
from ddo_cli.data import cache
from ddo_cli.data.items import MAX_CLASSES, count_classes, describe
from ddo_cli.data.readers import ArrayFile, Contents, Joined, Memory, Reader
from ddo_cli.errors import DataError, printable, reason
from ddo_cli.likelihood import NO_LABEL

NPZ_ITEMS = ("arr_0", "samples", "images")
NPZ_LABELS = ("label", "labels", "arr_1")
NPZ_OTHERS = ("seeds", "mu", "sigma", "mu_s", "sigma_s")  # of our sample sets; of ADM's references
# Discriminator Guidance's trainer leaves the concatenation of a folder's files in that folder.
MERGED = "gen_data_for_discriminator_training.npz"
CHUNK = 1 << 22  # bytes that are decompressed at a time


def npz_files(path: Path) -> list[Path]:
    """The .npz files of a folder that hold items, sorted by name; statistics beside images are none."""
    files = sorted(
        entry
        for entry in path.iterdir()
        if entry.suffix.lower() == ".npz" and entry.is_file() and not entry.name.startswith(".")
    )
    if not files:
        return []
    only_npz = all(entry in files or entry.name.startswith(".") for entry in path.iterdir())
    if not only_npz:  # a damaged file is no set; among nothing else it is reported
        files = [file for file in files if holds_items(file)]
    return [file for file in files if file.name != MERGED] or files


def holds_items(file: Path) -> bool:
    """Whether an .npz holds items."""
    try:
        return bool(npz.names(file) & set(NPZ_ITEMS))
    except npz.DAMAGE:
        return False


def open_npz_folder(path: Path, files: Sequence[Path], in_memory: bool) -> Contents:
    """The concatenation of a folder's .npz files, which must hold arrays of the same names and items of one shape."""
    parts = [open_npz(str(file), file, in_memory) for file in files]
    first, first_keys = parts[0], npz.names(files[0])
    for file, part in zip(files, parts, strict=True):
        if (keys := npz.names(file)) != first_keys:
            raise DataError(
                f"{file} holds {', '.join(sorted(keys))} where the first file, {files[0].name}, holds "
                f"{', '.join(sorted(first_keys))}; a folder of .npz files is one set: take out what does not belong"
            )
        if part.reader.shape != first.reader.shape:
            raise DataError(
                f"{file} holds {describe(part.reader.shape)} where the first file, {files[0].name}, holds "
                f"{describe(first.reader.shape)}; all items of a set must have one size and mode"
            )
    labels = np.concatenate([part.labels for part in parts])
    _check_all_or_none(str(path), labels)
    num_classes = max(part.num_classes for part in parts)
    key = cache.key_of(path, files, [file.name for file in files])
    return Contents(Joined([part.reader for part in parts]), labels, num_classes, key, None, first.notes)


def open_npz(source: str, path: Path, in_memory: bool) -> Contents:
    """The items of one .npz. in_memory: as one array; else rows of images are read when asked for."""
    try:
        keys = npz.names(path)
        key = next((key for key in NPZ_ITEMS if key in keys), None)
        if key is None:
            content = "feature statistics, not images" if {"mu", "sigma"} <= keys else f"only {', '.join(sorted(keys))}"
            raise DataError(f"{source} holds {content}; it needs an array named {', '.join(NPZ_ITEMS[:-1])} or images")
        reader = _reader(f"{source}: {key}", npz.members(path, key)[key], in_memory)
        label_key = next((key for key in NPZ_LABELS if key in keys), None)
        labels = npz.members(path, label_key)[label_key].read() if label_key else None
    except npz.DAMAGE as error:
        raise DataError(f"{source} is not a whole .npz of arrays ({reason(error)}); copy it again") from None
    classes, num_classes = np.full(reader.num, NO_LABEL), 0
    if labels is not None:
        classes, num_classes = _label_classes(f"{source}: {label_key}", labels, reader.num)
    notes = [
        f"{source}: {', '.join(others)} left out: {chosen} comes first"
        for chosen, known in ((key, NPZ_ITEMS), (label_key, NPZ_LABELS))
        if (others := [name for name in known if name in keys and name != chosen])
    ]
    if unknown := sorted(keys - {*NPZ_ITEMS, *NPZ_LABELS, *NPZ_OTHERS}):
        notes.append(f"{source}: not read: {printable(', '.join(unknown), 80)}; labels are {' or '.join(NPZ_LABELS)}")
    return Contents(reader, classes, num_classes, cache.key_of(path, [path]), None, tuple(notes))


def _reader(where: str, member: npz.Member, in_memory: bool) -> Reader:
    """Items uint8 (N, C, H, W), or float32 (N, d)."""
    shape, dtype = member.shape, member.dtype
    if dtype.kind == "f" and len(shape) == 2 and 0 not in shape:
        with np.errstate(over="ignore"):  # told below
            points = member.read().astype(np.float32)
        if not np.isfinite(points).all():
            raise DataError(f"{where} holds a point that is not finite in float32; remove it")
        return Memory(points)
    channels_last = _are_channels_last(where, dtype, shape)
    if in_memory or member.is_fortran:  # in Fortran order rows are spread over the file
        items = member.read()
        return Memory(np.ascontiguousarray(items.transpose(0, 3, 1, 2)) if channels_last else items)
    if member.offset is not None:
        return ArrayFile(where, member.path, member.offset, shape, channels_last=channels_last)
    return _unpacked(where, member, channels_last)


def _unpacked(where: str, member: npz.Member, channels_last: bool) -> ArrayFile:
    """A compressed array, unpacked to a temporary file that is removed with the reader."""
    directory, item_size = tempfile.gettempdir(), int(np.prod(member.shape[1:], dtype=object))
    size = member.shape[0] * item_size
    if shutil.disk_usage(directory).free < size + CHUNK:
        raise DataError(
            f"{where} is compressed, and unpacked takes {size / 1e9:.1f} GB, more than {directory} has free; set "
            "TMPDIR to a larger disk, or store it with np.savez"
        )
    with tempfile.NamedTemporaryFile(prefix="ddo-", suffix=".raw", delete=False) as file:
        reader = ArrayFile(where, Path(file.name), 0, member.shape, channels_last=channels_last)
        weakref.finalize(reader, _remove, file.name, os.getpid())
        for rows in member.rows(max(1, CHUNK // item_size)):
            file.write(rows.data)
    return reader


def _remove(name: str, process: int) -> None:
    if os.getpid() == process:  # a forked worker's copy of the reader must not remove its parent's file
        Path(name).unlink(missing_ok=True)


def _are_channels_last(where: str, dtype: np.dtype, shape: Sequence[int]) -> bool:
    """Whether images are (N, H, W, C) and not (N, C, H, W). Raises DataError if they are neither, or not uint8."""
    if dtype.kind == "f" and len(shape) == 4:
        raise DataError(
            f"{where} is {dtype} {tuple(shape)}; images are uint8 0..255: round and store them as such (from [-1, 1]: "
            "127.5 (x + 1), from [0, 1]: 255 x), since the rounding is part of every published FID"
        )
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
        f"{where} has the shape {tuple(shape)} without an axis of 1 or 3 channels; store grey or RGB images: RGBA "
        "blended with a background, latents decoded"
    )


def _label_classes(where: str, labels: np.ndarray, num: int) -> tuple[np.ndarray, int]:
    """Classes int64 (N,) and their number, of class numbers (N,) or one-hot rows (N, classes)."""
    if labels.ndim == 2 and len(labels) == num and labels.shape[1] > 1 and labels.dtype.kind in "biuf":
        # Exactly a single 1, else zeros: a soft label or a row of zeros is no class.
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
    if labels.min() < NO_LABEL or labels.max() >= MAX_CLASSES:
        raise DataError(
            f"{where} holds {labels.min()}..{labels.max()}; classes count from 0, are below "
            f"{MAX_CLASSES:,}, and -1 is none"
        )
    classes = labels.astype(np.int64)
    _check_all_or_none(where, classes)
    return classes, count_classes(classes)


def _check_all_or_none(where: str, classes: np.ndarray) -> None:
    """Raises DataError if only some items have a class: the labels of these would be lost with the others'."""
    if 0 < (num := int((classes == NO_LABEL).sum())) < len(classes):
        raise DataError(
            f"{where}: {num} of {len(classes)} items have no class (-1); give each its class, or leave the labels out"
        )
