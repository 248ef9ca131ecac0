"""Image sets of one file per image: folders, and EDM's and StyleGAN's zips."""

import contextlib
import itertools
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ddo_cli.checkpoint import disguise
from ddo_cli.data import arrays, captions
from ddo_cli.data.items import INDEX, MAX_CLASSES, describe, prepared_by
from ddo_cli.data.pictures import EXTENSIONS, Header, OtherMode, Unfit, flattened, is_deep, open_picture
from ddo_cli.data.readers import ZIP_ERRORS, ItemFiles
from ddo_cli.errors import DataError, reason
from ddo_cli.files import parse_json
from ddo_cli.likelihood import NO_LABEL

LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")
# Pictures that are left out of a set: their number counts against comparing its scores.
OTHER_PICTURES = (
    ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga", ".psd", ".exr", ".hdr", ".dds", ".ico", ".pcx", ".svg",
    ".eps", ".ps", ".pdf", ".wmf", ".emf", ".raw", ".dng", ".cr2", ".nef",
)  # fmt: skip
# Files that may hold images by themselves, which likewise are none of the set's.
CONTAINERS = (
    ".npz", ".npy", ".zip", ".tar", ".tgz", ".gz", ".rar", ".7z", ".parquet", ".arrow", ".tfrecord", ".tfrecords",
    ".h5", ".hdf5", ".mdb",
)  # fmt: skip
# train, val2017, test_set, ...
SPLIT = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?|eval|dev)[-_]?(set)?[-_]?\d*", re.IGNORECASE)
# Names of folders that programs write in parts, by process, or by seed.
_PART = re.compile(r"(part|shard|chunk|batch|rank|gpu|node|proc|process|worker|seed)[-_. ]?\d+", re.IGNORECASE)
FEW_NAMES = 12  # class names, or files, that a note spells out


class Listing(NamedTuple):
    """The images of a set, sorted by name, with labels int64 (N,), -1 = none.

    notes: what is assumed or left out, for people; warnings: what speaks against comparing the set's scores; classes:
    names of the folders by class number, where labels come from them; captions: of each image, or (); with them an
    image's label is its place, the number of its caption.
    """

    names: list[str]
    labels: np.ndarray
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    classes: Mapping[str, str] = MappingProxyType({})
    captions: tuple[str, ...] = ()


# Our choice of limits: of a dataset.json, bytes for each image, where published ones have 40; and pixels of an image,
# four times those of the largest models. `ddo data` makes smaller ones of photographs.
MAX_ENTRY, MAX_PIXELS = 1 << 10, 1 << 24


def folder_files(path: Path) -> tuple[list[str], list[str]]:
    """Names of all files of a folder and below it, and of folders, with a "/" at their end as in a zip.

    And the links to folders that were not followed, since those are read anyway.
    """
    names, again = list[str](), list[str]()
    top = os.path.realpath(path)
    seen = {top}
    for root, folders, leaves in os.walk(path, followlinks=True):
        visible = sorted(folder for folder in folders if not folder.startswith("."))
        folders.clear()
        for folder in visible:
            place, real = Path(root, folder), os.path.realpath(Path(root, folder))
            # A link into the set would have its images twice; one to a folder above would never end.
            is_inner = place.is_symlink() and (Path(real).is_relative_to(top) or Path(top).is_relative_to(real))
            if is_inner or real in seen:
                again.append(folder)
                continue
            folders.append(folder)
            seen.add(real)
        names += [f"{Path(root, folder).relative_to(path).as_posix()}/" for folder in folders]
        names += [Path(root, leaf).relative_to(path).as_posix() for leaf in leaves]
    return names, again


def folder_entries(source: str, path: Path, names: Sequence[str], again: Sequence[str]) -> Listing:
    """The images of a folder and all below it. names, again: its `folder_files`.

    Labels are those of dataset.json, or else of the subfolders if every image is in one. Raises DataError.
    """
    arrays_there = [name for name in names if name.lower().endswith(".npz") and is_visible(name)]
    if full := next((name for name in arrays_there if arrays.holds_items(path / name)), None):
        others = any(name.lower().endswith(EXTENSIONS) for name in names)
        where = "and others beside them; give a folder, or a file, of one of the two" if others else "below; give that"
        raise DataError(f"{source} holds images in .npz files ({full}) {where}")
    found = listing(source, names, lambda name, num: folder_file(path / name, num), True, arrays_there)
    if not again:
        return found
    note = f"{source}: links to folders that are read anyway are not followed: {_few(again)}"
    return found._replace(notes=(*found.notes, note))


def zip_entries(source: str, archive: zipfile.ZipFile, folders_are_classes: bool = False) -> Listing:
    """The images of a zip. Labels are those of dataset.json; directories in a zip are no classes, as in EDM.

    folders_are_classes: they are, as in EDM's tool that makes such zips. Raises DataError, or one of ZIP_ERRORS.
    """
    names = archive.namelist()
    if len(set(names)) < len(names):  # of which zipfile would read the last, as often as there are
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{source} holds {twice} more than once; unpack it, and zip the folder")
    return listing(source, names, lambda name, num: zip_file(archive, name, num), folders_are_classes)


def broken_zip(source: str, error: Exception) -> DataError:
    """The message for one of ZIP_ERRORS."""
    with contextlib.suppress(OSError):
        if what := disguise(Path(source)):
            return DataError(f"{source} is {what}")
    return DataError(f"{source} is not a whole zip file ({reason(error)}); copy it again")


def listing(
    source: str,
    files: Sequence[str],
    read: Callable[[str, int], bytes | None],
    folders_are_classes: bool,
    statistics: Collection[str] = (),
) -> Listing:
    """The images among the files of a folder or an archive. Raises DataError.

    read: content of a file by its name. statistics: files that are known to hold no images.
    """
    visible = [name for name in files if is_visible(name)]
    names = images_of(visible)
    told = captions.find(source, visible, names, read)
    notes, warnings = _left_out(source, visible, names, told.files if told else (), statistics)
    if (odd := next((name for name in names if "\\" in name), None)) is not None:
        notes.append(f"{source}: '\\' in names, such as {odd}, makes no folder; zip with '/' where it should")
    index = _index_of(source, files, names)
    if told is not None and index is not None:
        raise DataError(
            f"{source} has labels in {index} and captions in {min(told.files)}; keep one of the two, as a row has one "
            "label"
        )
    if index is not None:
        root, text = index.removesuffix(INDEX), read(index, len(names))
        labels, absent = indexed_labels(source, [name.removeprefix(root) for name in names], text, index)
        if root:
            notes.append(f"{source}: labels are those of {index}")
        texts = _indexed_captions(source, text, labels, index)
        return Listing(names, labels, tuple(notes), (*warnings, *absent), _class_names(text), texts)
    if told is not None:
        texts = tuple(told.texts[name] for name in names)
        return Listing(names, np.arange(len(names)), (*notes, *told.notes), tuple(warnings), captions=texts)
    found = _folder_labels(source, names, files)
    if not folders_are_classes:
        if found.classes:
            folders = ", ".join([*found.classes.values()][:3])
            notes.append(
                f"{source}: no labels, since folders in a zip are no classes ({folders}, ...); {prepared_by(source)} "
                "makes them labels"
            )
        return Listing(names, np.full(len(names), NO_LABEL), tuple(notes), tuple(warnings))
    return found._replace(notes=(*notes, *found.notes), warnings=(*warnings, *found.warnings))


def images_of(visible: Iterable[str]) -> list[str]:
    """The images, sorted."""
    return sorted(name for name in visible if name.lower().endswith(EXTENSIONS))


def is_visible(name: str) -> bool:
    """Whether a name is of a file that counts: hidden ones and macOS's resource forks are not worth a note."""
    return not name.endswith("/") and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or of macOS's resource forks."""
    parts = name.split("/")
    # "." and ".." are no hidden folders: some programs write ./a.png, and names in a zip are never paths here.
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return hidden or "__MACOSX" in parts


def _left_out(
    source: str, files: Iterable[str], names: Collection[str], read: Collection[str], statistics: Collection[str]
) -> tuple[list[str], list[str]]:
    """Notes and warnings about the files that are neither images, `names`, nor `read` for their captions."""
    if not names:
        raise DataError(f"{source} holds no images ({', '.join(EXTENSIONS)}); give the folder or zip that has them")
    others, known = Counter[str](), {*names, *read, *statistics}
    for name in files:
        if name not in known and name.rpartition("/")[2] != INDEX:
            others[os.path.splitext(name)[1].lower() or "without extension"] += 1
    if statistics:
        others[".npz of statistics"] = len(statistics)
    pictures = {kind: count for kind, count in others.items() if kind in OTHER_PICTURES}
    containers = {kind: count for kind, count in others.items() if kind in CONTAINERS}
    rest = {kind: count for kind, count in others.items() if kind not in (*OTHER_PICTURES, *CONTAINERS)}
    notes = [f"{source}: files that are no images are left out: {_counted(rest)}"] if rest else []
    warnings = []
    if pictures:
        text = (
            f"{source}: pictures of other formats are left out: {_counted(pictures)}; convert them to PNG to use them"
        )
        warnings.append(text)
    if containers:
        warnings.append(f"{source}: files that may hold images are left out: {_counted(containers)}; give one of them")
    return notes, warnings


def _counted(counts: Mapping[str, int]) -> str:
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(shown) - FEW_NAMES} more kinds" if len(shown) > FEW_NAMES else ""
    return ", ".join(f"{count} {kind}" for kind, count in shown[:FEW_NAMES]) + more


def _index_of(source: str, files: Iterable[str], names: Sequence[str]) -> str | None:
    """The dataset.json of a set: at its top, or in the one folder that all images lie in. Raises DataError.

    Labels in any other place would be lost.
    """
    indices = sorted(name for name in files if name.rpartition("/")[2] == INDEX and not name.startswith("__MACOSX/"))
    if not indices or INDEX in indices:
        return INDEX if indices else None
    root = indices[0].removesuffix(INDEX)
    outside = [name for name in names if not name.startswith(root)]
    if len(indices) == 1 and not outside:
        return indices[0]
    if len(indices) > 1:
        problem = f"holds {len(indices)} files {INDEX} ({', '.join(indices[:3])}), each of a set of its own"
    else:
        problem = f"holds {indices[0]}, whose labels do not cover {outside[0]} outside its folder"
    raise DataError(f"{source} {problem}; give the folder or an archive of one set, or remove what does not belong")


def _folder_labels(source: str, names: list[str], files: Sequence[str]) -> Listing:
    """Labels of the folders, or none, and what is to be said of them. Raises DataError.

    They are the folders of the top, or of the only one in which all images lie. files: all names, folders with a "/".
    """
    none = Listing(names, np.full(len(names), NO_LABEL))
    root = _common_folder(names)
    tops = [name[len(root) :].partition("/")[0] for name in names if "/" in name[len(root) :]]
    folders = sorted(set(tops))
    if len(folders) < 2:
        return none
    place = f"{source.rstrip('/')}/{root}" if root else source
    shown = _few(folders)
    if all(folder.endswith(".tar") for folder in folders):  # shards of a set, see `tars`
        return none
    if all(folder.isdecimal() and len(folder) == len(folders[0]) >= 5 for folder in folders) or all(
        map(_PART.fullmatch, folders)
    ):
        return none._replace(notes=(f"{place}: folders {shown} are taken for shards, not classes",))
    if all(map(SPLIT.fullmatch, folders)):
        text = f"{place}: folders {shown} are taken for splits, not classes; to use one of them, give {place}"
        return none._replace(warnings=(f"{text.rstrip('/')}/{folders[0]}",))
    if len(tops) < len(names):
        stray = next(name for name in names if "/" not in name[len(root) :])
        text = f"{place}: no labels, since {stray} lies beside the folders {shown}"
        return none._replace(warnings=(f"{text}; remove it, or move it into its class, to take them for classes",))
    number = _class_numbers(source, folders)
    classes = {str(number[folder]): folder for folder in sorted(number, key=lambda folder: number[folder])}
    mapping = ", ".join(f"{label} {folder}" for label, folder in list(classes.items())[:FEW_NAMES])
    more = ", ..." if len(classes) > FEW_NAMES else ""
    note = f"{place}: {len(classes)} classes from folder names: {mapping}{more}"
    inside = (name[len(root) :] for name in files if name.startswith(root) and not _is_hidden(name))
    empty = sorted({name.partition("/")[0] for name in inside if "/" in name} - set(folders))
    text = f"{place}: folders without images are no classes, and the others are numbered without them: {_few(empty)}"
    warnings = (text,) if empty else ()
    return Listing(names, np.array([number[top] for top in tops], dtype=np.int64), (note,), warnings, classes)


def _common_folder(names: Sequence[str]) -> str:
    """The folder in which all of the sorted names lie, with a "/" at its end; "" for the top."""
    pairs = zip(names[0].split("/")[:-1], names[-1].split("/")[:-1], strict=False)
    return "".join(f"{one}/" for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:FEW_NAMES]) + (", ..." if len(names) > FEW_NAMES else "")


def _class_numbers(source: str, folders: Sequence[str]) -> dict[str, int]:
    """The class of each folder: its own number where all are numbers below a million, else its place by name."""
    if not all(folder.isascii() and folder.isdecimal() and len(folder) <= 6 for folder in folders):
        return {folder: number for number, folder in enumerate(folders)}
    number = {folder: int(folder) for folder in folders}
    if len(set(number.values())) < len(number):
        twice = next(f for f in folders if list(number.values()).count(number[f]) > 1)
        raise DataError(f"{source} has two folders of class {number[twice]}; rename one of them")
    return number


def folder_file(file: Path, num: int) -> bytes | None:
    """The content of a file that tells of `num` images, such as dataset.json; None without. Raises DataError."""
    try:
        if not file.is_file():
            return None
        check_size(str(file), file.stat().st_size, num)
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); correct its permissions") from None


def zip_file(archive: zipfile.ZipFile, name: str, num: int) -> bytes | None:
    """The same of a member of a zip. Raises DataError, or one of ZIP_ERRORS."""
    if name not in archive.NameToInfo:
        return None
    check_size(f"{archive.filename}: {name}", archive.getinfo(name).file_size, num)
    return archive.read(name)


def check_size(where: str, size: int, num: int) -> None:
    """Raises DataError for a file that would take memory and time for nothing."""
    if size > MAX_ENTRY * (1024 + num):
        raise DataError(f"{where} has {size >> 20:,} MB for {num:,} images; give the one of this set, or remove it")


def indexed_labels(
    source: str, names: Sequence[str], text: bytes | None, index: str = INDEX
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of dataset.json, int64 (N,), and warnings: {"labels": [[name, class], ...]}, or null for none."""
    where, labels = f"{source}: {index}", np.full(len(names), NO_LABEL)
    if text is None:
        return labels, ()
    remedy = 'it must be {"labels": [["image name", class number], ...]} or {"labels": null}'
    try:
        entries = parse_json(text)["labels"]
        if entries is None:
            return labels, ()
        known = dict(entries)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is malformed ({type(error).__name__}: {reason(error)}); {remedy}") from None
    if len(known) < len(entries):
        seen = set[str]()
        twice = next(name for name, _ in entries if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"{where} lists {twice} more than once; keep one entry for each image")
    for row, name in enumerate(names):
        if name not in known:
            raise DataError(f"{where} has no label for {name}; add it, or set labels to null")
        label = known[name]
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise DataError(f"{where}: the label of {name} is {label!r}, not a class number; {remedy}")
        labels[row] = label
    if len(known) == len(names):
        return labels, ()
    absent = next(iter(known.keys() - set(names)))
    count = f"{len(known) - len(names):,} of {len(known):,} items"
    return labels, (f"{where} lists {count} that are not there, such as {absent}; is the set copied whole?",)


def _indexed_captions(source: str, text: bytes | None, labels: np.ndarray, index: str) -> tuple[str, ...]:
    """The captions that `ddo data` stores in dataset.json, after its labels are read; () without. Raises DataError."""
    texts = parse_json(text or b"{}").get("captions")
    if texts is None:
        return ()
    are_texts = isinstance(texts, list) and all(isinstance(each, str) for each in texts)
    if not are_texts or len(texts) != len(labels) or not np.array_equal(labels, np.arange(len(labels))):
        raise DataError(
            f"{source}: {index}: captions must be a list of {len(labels)} texts, and each image's label its place in "
            "it; make the set again with `ddo data`"
        )
    return tuple(texts)


def _class_names(text: bytes | None) -> Mapping[str, str]:
    """The names by class number that `ddo data` stores in dataset.json, after its labels are read; else none."""
    names = parse_json(text or b"{}").get("classes")
    is_ours = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    return names if is_ours else {}


# --- Decoding


class ImageFiles(ItemFiles):
    """Images uint8 (C, H, W) of one shape, one per file."""

    def item(self, row: int) -> np.ndarray:
        """The image of a row, with 1 or 3 channels. Raises DataError."""
        where = f"{self.source}: {self.names[row]}"
        try:
            with self.content.open(row) as file, open_picture(file) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    size = f"{picture.width}x{picture.height} pixels, more than a model draws"
                    remedy = f"{prepared_by(self.source, (3, 256, 256))} makes it smaller"
                    raise DataError(f"{where} has {size}; {remedy}")
                if is_deep(picture):
                    raise Unfit("16 bits a channel, and networks take 8")
                picture.load()
                pixels = np.asarray(flattened(picture))
        except DataError:
            raise
        except OtherMode as error:
            raise DataError(f"{where} has {error}; convert it to RGB of 8 bits with another program") from None
        except Unfit as error:
            raise DataError(f"{where} has {error}; {prepared_by(self.source)} makes it RGB") from None
        except Exception as error:  # Pillow's decoders raise errors of any kind
            raise DataError(f"{where} cannot be read as an image ({reason(error)}); replace or remove it") from None
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def header(self, row: int) -> Header:
        """What the head of a row's file tells, without decoding it. Raises errors of any kind."""
        with self.content.open(row) as file, open_picture(file) as picture:
            return Header.of(picture)

    def mismatch(self, row: int, item: np.ndarray) -> DataError:
        side = 2 ** int(math.log2(min(*item.shape[1:], *self.shape[1:])))  # networks halve it
        return DataError(
            f"{self.source}: {self.names[row]} is {describe(item.shape)} where the first image, "
            f"{self.names[self.first]}, is {describe(self.shape)}; all images must have one size "
            f"and mode: {prepared_by(self.source, (3, side, side))} makes them so"
        )

    def num_lossy(self, rows: Sequence[int]) -> int:
        """How many of `rows` are in formats that lose detail.

        Counted by extension after a look into the first file of each: a WebP may be lossless, a JPEG may be named .png,
        a PNG .jpg. To be sure one would have to open every file.
        """
        by_extension = Counter(os.path.splitext(self.names[row])[1].lower() for row in rows)
        first = self._first_of_each(rows)
        try:
            return sum(count for kind, count in by_extension.items() if _is_lossy(self.content(first[kind])))
        except ZIP_ERRORS:  # reading the pixels will say what is wrong
            return sum(count for kind, count in by_extension.items() if kind in LOSSY)

    def _first_of_each(self, rows: Sequence[int]) -> dict[str, int]:
        """The first of `rows` with each extension."""
        return {os.path.splitext(self.names[row])[1].lower(): row for row in reversed(rows)}

    def peculiarities(self, are_turned: bool = False) -> Iterator[str]:
        """What of these files is not read, as the first file of each extension shows.

        are_turned: whether pictures will be turned as EXIF says.
        """
        for row in self._first_of_each(range(self.num)).values():
            with contextlib.suppress(Exception):  # reading the pixels will say what is wrong
                header = self.header(row)
                if header.is_animated:
                    yield f"{self.source}: of animated files, such as {self.names[row]}, the first frame is read"
                if header.mode == "CMYK" and not are_turned:
                    yield f"{self.source}: CMYK, as of {self.names[row]}, becomes RGB without a colour profile"
                if header.is_turned and not are_turned:
                    yield (
                        f"{self.source}: pixels are read as stored; EXIF orientation, as of {self.names[row]}, is not "
                        f"applied; {prepared_by(self.source)} applies it"
                    )


def _is_lossy(content: bytes) -> bool:
    """Whether a file is a JPEG (starts with SOI) or a WebP other than a simple lossless one (RIFF....WEBPVP8L)."""
    return content[:3] == b"\xff\xd8\xff" or (content[8:12] == b"WEBP" and content[12:16] != b"VP8L")
