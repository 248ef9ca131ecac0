"""Captions of image files: a .txt beside each image, as trainers of text-to-image models have it, or metadata.jsonl.

metadata.jsonl is that of the library datasets' imagefolder: one JSON object a line, with `file_name`, relative to the
file's own folder, and `text`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ddo_cli.errors import DataError, printable, reason
from ddo_cli.files import parse_json

METADATA = "metadata.jsonl"
SIDECAR = ".txt"
NAME_KEY, TEXT_KEY = "file_name", "text"
_FORM = '{"file_name": "a.png", "text": "a red cup"}'

Read = Callable[[str, int], bytes | None]  # name, and the number of images that the file tells of -> content


class Captions(NamedTuple):
    """The caption of each image by name; the files that hold them; and what is said of them, for people."""

    texts: dict[str, str]
    files: frozenset[str]
    notes: tuple[str, ...] = ()


def find(source: str, files: Sequence[str], names: Sequence[str], read: Read) -> Captions | None:
    """The captions of the images `names` of a set; None if it has none.

    files: names of all files that are not hidden. A .txt that has no image's name is no caption, unless another one is.
    Raises DataError where they do not cover the images exactly.
    """
    stems = {_stem(name): name for name in names}
    sidecars = {_stem(name): name for name in files if name.lower().endswith(SIDECAR)}
    listed = [name for name in files if name.rpartition("/")[2] == METADATA]
    found = _of_metadata(source, listed, names, read) if listed else None
    if not sidecars.keys() & stems.keys():
        return found
    if found is not None:
        both = sidecars[min(sidecars.keys() & stems.keys())]
        raise DataError(f"{source} has captions in {listed[0]} and in {printable(both, 80)}; keep one of the two kinds")
    if len(stems) < len(names):
        twice = next(name for name in names if stems[_stem(name)] != name)
        other = printable(stems[_stem(twice)], 60)
        raise DataError(f"{source}: {printable(twice, 60)} and {other} would share one caption; rename one of them")
    return _of_sidecars(source, sidecars, stems, read)


def _of_sidecars(source: str, sidecars: Mapping[str, str], stems: Mapping[str, str], read: Read) -> Captions:
    if lonely := sorted(sidecars.keys() - stems.keys()):
        more = f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else ""
        raise DataError(
            f"{source}: caption {printable(sidecars[lonely[0]], 80)} has no image of its name{more}; add the image, or "
            "remove the file"
        )
    if bare := sorted(stems.keys() - sidecars.keys()):
        raise _without(source, [stems[stem] for stem in bare], f"{bare[0]}{SIDECAR}")
    texts, num_long = {}, 0
    for stem, name in stems.items():
        text = _decoded(f"{source}: {sidecars[stem]}", read(sidecars[stem], 1) or b"")
        num_long += len(text.strip().splitlines()) > 1
        texts[name] = plain(text)
    notes = [f"{source}: {len(texts)} captions from {SIDECAR} files beside the images"]
    if num_long:
        notes.append(f"{source}: {num_long} captions have several lines, which are read as one")
    return Captions(texts, frozenset(sidecars.values()), (*notes, *said_of(source, texts)))


def _of_metadata(source: str, files: Sequence[str], names: Sequence[str], read: Read) -> Captions | None:
    """Captions of metadata.jsonl files, each of the images below its folder; None if no line has a text."""
    texts, keys = dict[str, str](), set[str]()
    for file in sorted(files):
        root, where = file.removesuffix(METADATA), f"{source}: {file}"
        for number, line in enumerate(_decoded(where, read(file, len(names)) or b"").splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line.encode())
                name, text = root + entry[NAME_KEY].removeprefix("./"), entry.get(TEXT_KEY)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"{where} line {number} is malformed ({type(error).__name__}: {reason(error, 40)})"
                raise DataError(f"{what}; write {_FORM}, or remove the file") from None
            keys |= entry.keys() - {NAME_KEY, TEXT_KEY}
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(f"{where} line {number}: text = {printable(repr(text), 60)} is no text; write {_FORM}")
            if name in texts:
                raise DataError(f"{where} line {number} lists {printable(name, 80)} again; keep one line of each image")
            texts[name] = plain(text)
    if not texts:
        return None  # a file of other keys, which is left out as any other
    known = set(names)
    if lonely := sorted(texts.keys() - known):
        raise DataError(
            f"{source}: {files[0]} has a caption of {printable(lonely[0], 80)}, which is no image of the set; add the "
            "image, or remove the line"
        )
    if bare := sorted(known - texts.keys()):
        raise _without(source, bare, f"a line of {files[0]}")
    notes = [f"{source}: {len(texts)} captions from {files[0]}" + (", ..." if len(files) > 1 else "")]
    if keys:
        notes.append(f"{source}: keys of {files[0]} that are not read: {printable(', '.join(sorted(keys)), 80)}")
    return Captions({name: texts[name] for name in names}, frozenset(files), (*notes, *said_of(source, texts)))


def _without(source: str, bare: Sequence[str], where: str) -> DataError:
    more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
    return DataError(
        f"{source}: image {printable(bare[0], 80)} has no caption{more}; write it into {printable(where, 80)}, or "
        "remove the image"
    )


def said_of(source: str, texts: Mapping[str, str]) -> list[str]:
    """What to tell of captions by name: how many are empty."""
    empty = [name for name, text in texts.items() if not text]
    first = f", such as that of {printable(empty[0], 60)}" if empty else ""
    return [f"{source}: {len(empty)} captions are empty{first}"] if empty else []


def _stem(name: str) -> str:
    """The name up to its last dot, with its folders."""
    folder, slash, leaf = name.rpartition("/")
    return folder + slash + (leaf.rpartition(".")[0] or leaf)


def _decoded(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def plain(text: str) -> str:
    """One line: tokenizers take any white space for one blank."""
    return " ".join(text.split())
