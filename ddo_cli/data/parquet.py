"""Image sets in Parquet files, as data sets of the Hub have them: `image` {bytes, path}, `text` or `caption`.

Files are read by the library pyarrow, row group by row group.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np

from ddo_cli import extras
from ddo_cli.data import captions
from ddo_cli.data.image_files import Listing
from ddo_cli.data.items import MAX_CLASSES
from ddo_cli.data.readers import MAX_MEMBER
from ddo_cli.errors import DataError, printable, reason
from ddo_cli.likelihood import NO_LABEL

SUFFIX = ".parquet"
IMAGE, TEXTS, LABEL = "image", ("text", "caption"), "label"
MAX_GROUP = 1 << 30  # bytes of images in a row group, and of the groups that are kept; our choice


def library() -> ModuleType:
    """pyarrow's reader. Raises DataError where it is missing."""
    return extras.imported("files of Parquet need", "pyarrow.parquet", "parquet", DataError)


class _File(NamedTuple):
    """A file's rows. is_nested: whether images are structures with `bytes`; group_of, row_of: of each row its row
    group, and the place in it; columns: those that are not read.
    """

    path: Path
    is_nested: bool
    group_of: np.ndarray
    row_of: np.ndarray
    endings: list[str]
    texts: list[str] | None
    labels: np.ndarray | None
    columns: tuple[str, ...]


def entries(source: str, files: Mapping[str, Path]) -> tuple[Listing, "ParquetBytes"]:
    """The images of files as one set, in the order of files and rows. files: by name, "" for a single one.

    Labels are those of the column `label` where there are no captions. Raises DataError.
    """
    parts = [_open(path) for path in files.values()]
    for part in parts:
        if (part.texts is None, part.labels is None) != (parts[0].texts is None, parts[0].labels is None):
            raise DataError(f"{part.path} has other columns than {parts[0].path}; give files of one data set")
    names = [
        f"{name or path.name}/{row:06d}{ending}"
        for (name, path), part in zip(files.items(), parts, strict=True) for row, ending in enumerate(part.endings)
    ]  # fmt: skip
    if not names:
        raise DataError(f"{source} has no rows; give a data set that has some")
    notes, texts, labels = list[str](), dict[str, str](), np.full(len(names), NO_LABEL)
    unread = set[str]().union(*(part.columns for part in parts))
    if parts[0].texts is not None:
        told = [captions.plain(text) for part in parts for text in part.texts or ()]
        texts, labels = dict(zip(names, told, strict=True)), np.arange(len(names))
        notes += [f"{source}: {len(names)} captions from a column of texts", *captions.said_of(source, texts)]
    elif parts[0].labels is not None:
        labels = np.concatenate([part.labels for part in parts if part.labels is not None])
        notes.append(f"{source}: labels are those of the column {LABEL}")
    if unread:
        notes.append(f"{source}: columns that are not read: {printable(', '.join(sorted(unread)), 120)}")
    return Listing(names, labels, tuple(notes), captions=tuple(texts.values())), ParquetBytes(names, parts)


def _open(path: Path) -> _File:
    """What a file holds beside the bytes of its images. Raises DataError."""
    parquet = library()
    try:
        with parquet.ParquetFile(path) as file:
            return _told(path, file)
    except DataError:
        raise
    except Exception as error:  # of pyarrow, which has kinds of its own
        raise DataError(f"{path} is not a whole file of Parquet ({reason(error, 100)}); copy it again") from None


def _told(path: Path, file: Any) -> _File:
    import pyarrow as pa

    schema, groups = file.schema_arrow, file.metadata
    form = "a column image {bytes, path}, and one of text or caption"
    if IMAGE not in schema.names:
        raise DataError(f"{path} has the columns {printable(', '.join(schema.names), 80)}; images are {form}")
    kind, have = schema.field(IMAGE).type, [name for name in TEXTS if name in schema.names]
    is_nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    stored = kind.field("bytes").type if is_nested else kind
    if not (pa.types.is_binary(stored) or pa.types.is_large_binary(stored)):
        raise DataError(
            f"{path}: the column {IMAGE} is {printable(str(kind), 80)}, not bytes of image files; write {form}"
        )
    if len(have) > 1:
        raise DataError(f"{path} has captions in the columns {' and '.join(have)}; drop one of them")
    if groups.num_rows > path.stat().st_size:
        raise DataError(f"{path} claims {groups.num_rows:,} rows, more than it has bytes; copy it again")
    rows = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
    has_path = is_nested and kind.get_field_index("path") >= 0 and pa.types.is_string(kind.field("path").type)
    has_labels = not have and LABEL in schema.names and pa.types.is_integer(schema.field(LABEL).type)
    wanted = [*have, *([LABEL] if has_labels else []), *([f"{IMAGE}.path"] if has_path else [])]
    table = file.read(columns=wanted, use_threads=False)
    texts = _texts(path, have[0], table.column(have[0])) if have else None
    endings = [""] * sum(rows)
    if has_path:
        paths = table.column(IMAGE).combine_chunks().field("path").to_pylist()
        endings = [PurePosixPath(name or "").suffix.lower()[:8] for name in paths]
    labels = _labels(path, table.column(LABEL)) if has_labels else None
    group_of = np.repeat(np.arange(len(rows)), rows)
    row_of = np.concatenate([np.arange(num) for num in rows] or [np.arange(0)])
    unread = tuple(name for name in schema.names if name not in (IMAGE, *wanted))
    return _File(path, is_nested, group_of, row_of, endings, texts, labels, unread)


def _texts(path: Path, name: str, column: Any) -> list[str]:
    found = column.to_pylist()
    for row, text in enumerate(found):
        if not isinstance(text, str):
            what = "is missing" if text is None else f"= {printable(repr(text), 60)} is no text"
            raise DataError(f"{path} row {row}: {name} {what}; write one text for each image")
    return found


def _labels(path: Path, column: Any) -> np.ndarray:
    found = column.to_pylist()
    for row, label in enumerate(found):
        if label is None or not -1 <= label < MAX_CLASSES:
            raise DataError(f"{path} row {row}: {LABEL} = {label} is no class number; correct it, or drop the column")
    return np.array(found, dtype=np.int64)


class ParquetBytes:
    """The bytes of images in Parquet files, by row.

    A row group is the least that can be read. The last ones are kept, up to MAX_GROUP, since threads read side by side.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[_File]):
        self.names, self.paths, self.nested = names, [part.path for part in parts], [part.is_nested for part in parts]
        numbers = np.repeat(np.arange(len(parts)), [len(part.row_of) for part in parts])
        groups, rows = (np.concatenate([part[k] for part in parts]) for k in (2, 3))
        self.places = np.stack([numbers, groups, rows], axis=1)
        self._lock, self._kept = threading.Lock(), OrderedDict[tuple[int, int], Any]()

    def __call__(self, row: int) -> bytes:
        number, group, place = self.places[row].tolist()
        with self._lock:
            content = self._group(number, group)[place].as_py()
        if content is None:
            raise ValueError("it has no bytes, only a path perhaps")
        if len(content) > MAX_MEMBER:
            raise ValueError(f"it has {len(content) >> 20:,} MB, which no image has")
        return bytes(content)

    def open(self, row: int) -> IO[bytes]:
        """The image of a row as a file, in memory."""
        return io.BytesIO(self(row))

    def files(self, rows: Iterable[int]) -> Iterable[Path]:
        """The files of Parquet."""
        return self.paths

    def _group(self, number: int, group: int) -> Any:
        """The bytes of a row group's images, an array of pyarrow."""
        if (number, group) in self._kept:
            self._kept.move_to_end((number, group))
            return self._kept[number, group]
        with library().ParquetFile(self.paths[number]) as file:
            told = file.metadata.row_group(group)
            if told.total_byte_size > MAX_GROUP:
                raise ValueError(f"a row group has {told.total_byte_size >> 20:,} MB; write groups of 100 rows")
            columns = [f"{IMAGE}.bytes" if self.nested[number] else IMAGE]
            found = file.read_row_group(group, columns=columns, use_threads=False).column(IMAGE).combine_chunks()
        found = found.field("bytes") if self.nested[number] else found
        self._kept[number, group] = found
        while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > MAX_GROUP:
            self._kept.popitem(last=False)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_kept": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
