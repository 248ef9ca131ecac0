"""Opens any kind of source: a reader of its items, and their labels."""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import ddo_cli
from ddo_cli import rundir
from ddo_cli.checkpoint import EMBEDDED
from ddo_cli.data import arrays, cache, cifar, image_files, latents, parquet, samples, tars
from ddo_cli.data.embedded import embedded_names, open_embedded
from ddo_cli.data.image_files import ImageFiles
from ddo_cli.data.items import Encoded, choice, count_classes, hashed
from ddo_cli.data.readers import ZIP_ERRORS, Content, Contents, FolderBytes, ItemFiles, Memory, Reader, ZipBytes
from ddo_cli.errors import DataError, printable


@dataclass
class Source:
    """Items in a fixed order, not read yet, with their labels.

    positions: int64 (N,), rows of `reader`; labels: int64 (N,), -1 = none; num_classes, encoded: as in `items.ItemSet`;
    identity: changes with the path and with names, sizes and times of the files, not with labels; None if unknown;
    notes, warnings, classes, captions: as in `readers.Contents`.
    """

    name: str
    reader: Reader
    positions: np.ndarray
    labels: np.ndarray
    num_classes: int
    identity: str | None = None
    encoded: Encoded | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    captions: tuple[str, ...] = ()

    @property
    def num(self) -> int:
        return len(self.positions)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an item: (C, H, W) of images."""
        return self.reader.shape


def open_source(source: str, num: int | None, in_memory: bool, is_prepared: bool = False) -> Source:
    """The items of a source as `images.open_images` lists them, or `num` of them. Raises DataError.

    in_memory: whether the array of an .npz is read now; else its rows are read on demand, from a temporary file if it
    is compressed. Image files and latents are always read on demand; embedded sets, CIFAR-10 and points are held.
    is_prepared: whether the images will be `prepared`: folders in a zip are then classes, as for EDM's tool, and what
    of the files is not read is for the caller to say.
    """
    if num is not None and num < 1:
        raise DataError(f"{source}: num = {num} must be at least 1")
    path = Path(source)
    contents = _contents(source, path, num, in_memory, is_prepared)
    reader, labels, num_classes, key, encoded = contents[:5]
    rows = choice(source, reader.num, num)
    identity = None if key is None else hashed(key, num)
    if source.startswith(EMBEDDED):
        identity = hashed(ddo_cli.__version__, source, num)
    elif isinstance(reader, ItemFiles):
        reader.first, names = int(rows[0]), [reader.names[row] for row in rows]
        identity = cache.key_of(path, reader.content.files(rows.tolist()), names)
    if encoded is not None and num is not None and num != reader.num:
        encoded = encoded._replace(digest=hashed(encoded.digest, num))
    notes = contents.notes
    if isinstance(reader, ImageFiles) and not is_prepared:
        notes = (*notes, *reader.peculiarities())
    said, labels = (notes, contents.warnings, contents.classes), labels[rows]
    captions = tuple(contents.captions[row] for row in rows) if contents.captions else ()
    if captions:  # of fewer rows they are numbered anew
        labels, num_classes = np.arange(len(rows)), len(rows)
    return Source(source, reader, rows, labels, num_classes, identity, encoded, *said, captions)


def _contents(source: str, path: Path, num: int | None, in_memory: bool, zip_classes: bool) -> Contents:
    """All items, but for embedded sets, of which `num` are made."""
    if source.startswith(EMBEDDED):
        items, labels = open_embedded(source, num)
        return Contents(Memory(items), labels, count_classes(labels))
    if latents.is_latents(path):
        return latents.open_latents(source, path)
    if path.is_dir():
        return _directory(source, path, in_memory)
    if not path.is_file():
        problem = "is a pipe or a device" if path.exists() else "does not exist"
        raise DataError(
            f"{source} {problem}; give a folder, a .zip, .npz, .tar or .parquet file, or one of {embedded_names()}",
            missing=source,
        )
    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                listing = image_files.zip_entries(source, archive, zip_classes)
                return _image_files(source, listing, ZipBytes(path, archive, listing.names))
        except ZIP_ERRORS as error:
            raise image_files.broken_zip(source, error) from None
    if path.suffix.lower() == ".npz":
        return arrays.open_npz(source, path, in_memory)
    if path.suffix.lower() == parquet.SUFFIX:
        return _image_files(source, *parquet.entries(source, {"": path}))
    if path.suffix.lower() == tars.SUFFIX:
        found = tars.index(path)
        if not any(name.rpartition("/")[2] in cifar.BATCHES for name in found):
            return _image_files(source, *tars.entries(source, {"": path}, [found], zip_classes))
    if path.name.lower().endswith(cifar.TAR_SUFFIXES):
        items, labels = cifar.open_tar(source, path)
        return Contents(Memory(items), labels, cifar.NUM_CLASSES, cache.key_of(path, [path]))
    raise DataError(
        f"{source} is neither a folder nor a .zip, .npz, .tar or .parquet file; put images into a folder and give that"
    )


def _directory(source: str, path: Path, in_memory: bool) -> Contents:
    if rundir.is_run(path):  # whose pictures are of curves and contact sheets
        raise DataError(
            f"{source} is the directory of a run, not of images; draw some with `ddo sample --ckpt {source}`, and give "
            "their directory"
        )
    manifest = samples.read_manifest(path)
    form = manifest.get("format")
    if form in ("png", "npz"):
        samples.check_complete(path, manifest)
        if form == "npz":
            return arrays.open_npz(source, path / "samples.npz", in_memory)
        listing = image_files.Listing(*samples.image_entries(source, manifest))
    elif form == "shards" or any(path.glob("shard-*.safetensors")):
        return samples.open_shards(path)[0]
    elif any((path / name).is_file() for name in cifar.BATCHES):
        items, labels = cifar.open_unpacked(source, path)
        key = cache.key_of(path, [path / name for name in cifar.BATCHES])
        return Contents(Memory(items), labels, cifar.NUM_CLASSES, key)
    elif files := arrays.npz_files(path):
        return _of_arrays(source, path, files, in_memory)
    else:
        names, again = image_files.folder_files(path)
        if shards := _shards(source, path, names):
            is_tar = next(iter(shards)).lower().endswith(tars.SUFFIX)
            if not is_tar:
                return _image_files(source, *parquet.entries(source, shards))
            found = [tars.index(file) for file in shards.values()]
            return _image_files(source, *tars.entries(source, shards, found, False))
        listing = image_files.folder_entries(source, path, names, again)
    return _image_files(source, listing, FolderBytes(path, listing.names))


def _shards(source: str, path: Path, names: Sequence[str]) -> dict[str, Path]:
    """The tars or files of Parquet that hold the images of a folder; none where images lie in it as files.

    Raises DataError for both kinds, or splits that are not to be trained on together.
    """
    visible = [name for name in names if image_files.is_visible(name)]
    shards = sorted(name for name in visible if name.lower().endswith((tars.SUFFIX, parquet.SUFFIX)))
    if not shards or image_files.images_of(visible):
        return {}
    kinds = {name.lower().rpartition(".")[2]: name for name in shards}
    if len(kinds) > 1:
        raise DataError(f"{source} holds {' and '.join(kinds.values())}; give a folder of one of the two kinds")
    words = ((name, re.split(r"[-_./]", name.lower())) for name in shards)  # train of data/train-00000-of-00002.parquet
    splits = {word: name for name, parts in words for word in parts if image_files.SPLIT.fullmatch(word)}
    if len(splits) > 1:
        shown = printable(", ".join(splits.values()), 120)
        raise DataError(f"{source} holds several splits ({shown}); put the files of one into a folder of their own")
    return {name: path / name for name in shards}


def _of_arrays(source: str, path: Path, files: Sequence[Path], in_memory: bool) -> Contents:
    """The arrays of a folder's .npz files, beside which there may be logs and Discriminator Guidance's contact sheets.

    Raises DataError where further images lie beside them: one of the two would be left out.
    """
    contents = arrays.open_npz_folder(path, files, in_memory)
    stems = {file.stem for file in files}
    others = sorted(entry for entry in path.iterdir() if entry not in files and not entry.name.startswith("."))
    others = [entry for entry in others if entry.name != arrays.MERGED]
    for entry in others:
        names = [name for *_, leaves in os.walk(entry) for name in leaves] if entry.is_dir() else [entry.name]
        is_sheet = entry.stem.replace("sample_", "samples_") in stems
        if not is_sheet and any(name.lower().endswith(image_files.EXTENSIONS) for name in names):
            raise DataError(
                f"{source} holds images in .npz files ({files[0].name}) and others beside them ({entry.name}); give a "
                "folder, or a file, of one of the two"
            )
    if not others:
        return contents
    left_out = ", ".join(entry.name for entry in others[: image_files.FEW_NAMES])
    more = ", ..." if len(others) > image_files.FEW_NAMES else ""
    plural = "s" if len(files) > 1 else ""
    note = f"{source}: the images are those of {len(files)} .npz file{plural}; left out: {left_out}{more}"
    return contents._replace(notes=(*contents.notes, note))


def _image_files(source: str, listing: image_files.Listing, content: Content) -> Contents:
    files = ImageFiles(source, listing.names, content)
    return Contents(files, listing.labels, count_classes(listing.labels), None, None, *listing[2:])
