"""Image sets of one file per image: folders, and EDM's and StyleGAN's zips."""

import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddo_cli.data.items import INDEX, describe
from ddo_cli.data.readers import ZIP_ERRORS, ItemFiles
from ddo_cli.errors import DataError
from ddo_cli.likelihood import NO_LABEL

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LOSSY = (".jpg", ".jpeg", ".webp")
# Pillow modes without loss in 8 bits of grey or RGB. RGBA is taken where it is opaque.
MODES = {"1": "L", "L": "L", "RGB": "RGB", "P": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "RGBA": "RGBA"}


def folder_entries(source: str, path: Path) -> tuple[list[str], np.ndarray]:
    """Names of a folder's images, sorted, and their labels int64 (N,).

    Labels are those of dataset.json, or else of the top-level subfolders if every image is in one.
    """
    names: list[str] = []
    seen: set[str] = set()
    for root, folders, leaves in os.walk(path, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [folder for folder in folders if not folder.startswith(".")]
        if real not in seen:  # else a link to a parent folder would never end
            names += [Path(root, leaf).relative_to(path).as_posix() for leaf in leaves]
        seen.add(real)
    text = folder_index(path)
    names = _image_names(source, names)
    labels = indexed_labels(source, names, text)
    tops = [name.partition("/")[0] for name in names if "/" in name]
    classes = sorted(set(tops))
    if text is None and len(tops) == len(names) and len(classes) > 1:
        number = {top: label for label, top in enumerate(classes)}
        labels = np.array([number[top] for top in tops], dtype=np.int64)
    return names, labels


def zip_entries(source: str, archive: zipfile.ZipFile) -> tuple[list[str], np.ndarray]:
    """Names of a zip's images, sorted, and their labels int64 (N,). Directories in a zip are no classes, as in EDM.

    Raises DataError, or one of ZIP_ERRORS.
    """
    names = _image_names(source, archive.namelist())
    return names, indexed_labels(source, names, zip_index(archive))


def broken_zip(source: str, error: Exception) -> DataError:
    """The message for one of ZIP_ERRORS."""
    return DataError(f"{source} is not a whole zip file ({error}); copy it again")


def _image_names(source: str, names: Iterable[str]) -> list[str]:
    """Names with an image's extension, sorted; hidden files and macOS's resource forks are no images."""
    images = sorted(
        name
        for name in names
        if name.lower().endswith(EXTENSIONS)
        and not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    )
    if not images:
        raise DataError(f"{source} holds no images ({', '.join(EXTENSIONS)}); give the folder or zip that has them")
    return images


def folder_index(path: Path) -> bytes | None:
    """The dataset.json of a folder; None if there is none."""
    index = path / INDEX
    try:
        return index.read_bytes() if index.is_file() else None
    except OSError as error:
        raise DataError(f"{index} cannot be read ({error.strerror}); correct its permissions") from None


def zip_index(archive: zipfile.ZipFile) -> bytes | None:
    """The dataset.json of a zip; None if there is none."""
    return archive.read(INDEX) if INDEX in archive.namelist() else None


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


# --- Decoding


class ImageFiles(ItemFiles):
    """Images uint8 (C, H, W) of one shape, one per file."""

    def item(self, row: int) -> np.ndarray:
        """The image of a row, with 1 or 3 channels. Raises DataError."""
        where = f"{self.source}: {self.names[row]}"
        try:
            with Image.open(io.BytesIO(self.content(row))) as image:
                image.load()
                mode = MODES.get(image.mode)
                pixels = np.asarray(image.convert(mode)) if mode else None  # (H, W) or (H, W, C)
                mode_in_file = image.mode
        except Exception as error:  # Pillow's decoders raise errors of any kind
            raise DataError(f"{where} cannot be read as an image ({error}); replace or remove it") from None
        if mode == "RGBA" and pixels is not None and (pixels[..., 3] == 255).all():
            mode, pixels = "RGB", pixels[..., :3]
        if pixels is None or mode == "RGBA":
            problem = "transparent pixels" if mode == "RGBA" else f"the mode {mode_in_file}"
            raise DataError(f"{where} has {problem}; convert it to RGB or 8-bit grey")
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def mismatch(self, row: int, item: np.ndarray) -> DataError:
        return DataError(
            f"{self.source}: {self.names[row]} is {describe(item.shape)} where the first image, "
            f"{self.names[self.first]}, is {describe(self.shape)}; all images must have one size and mode: convert or "
            "remove it"
        )

    def num_lossy(self, rows: Sequence[int]) -> int:
        """How many of `rows` are in formats that lose detail.

        Counted by file name after a look into the first such file; all, if the first image is a JPEG with another name.
        To be sure one would have to open every file: a WebP may be lossless, and a JPEG may be named .png.
        """
        named = [row for row in rows if self.names[row].lower().endswith(LOSSY)]
        try:
            if not named:
                return len(rows) if _is_lossy(self.content(rows[0])) else 0
            # A lossless WebP speaks for the set's other WebPs, not for its JPEGs.
            webps = [row for row in named if self.names[row].lower().endswith(".webp")]
            return len(named) - len(webps) if webps and not _is_lossy(self.content(webps[0])) else len(named)
        except (*ZIP_ERRORS, ValueError):
            return len(named)  # reading the pixels will say what is wrong


def _is_lossy(content: bytes) -> bool:
    """Whether a file is a JPEG (starts with SOI) or a WebP other than a simple lossless one (RIFF....WEBPVP8L)."""
    return content[:3] == b"\xff\xd8\xff" or (content[8:12] == b"WEBP" and content[12:16] != b"VP8L")
