"""`ddo data`: pictures of any size and mode as one archive of equal images, as EDM's tool makes it.

The archive is a zip that stores PNGs without compression, `00000/img00000000.png` and so on, and labels in
`dataset.json`. The same pictures and options give the same bytes.
"""

import io
import json
import shutil
import time
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from ddo_cli import console
from ddo_cli.data.image_files import FEW_NAMES
from ddo_cli.data.items import INDEX, count_classes
from ddo_cli.data.pictures import BLACK, EFFECTS, WHITE, Colour, Crop, Header, Preparation, Unfit
from ddo_cli.data.prepared import Prepared, header_of, name_of
from ddo_cli.data.sources import Source, open_source
from ddo_cli.data.stream import available_cores, check_images
from ddo_cli.errors import DataError, RunError, UsageError, printable
from ddo_cli.files import remove_abandoned, replacing

STAMP = (1980, 1, 1, 0, 0, 0)  # of every entry: the earliest that a zip can hold
ENTRY, END = 76, 22  # bytes of a zip's entry beside its content and names, and of its end
CHUNK = 1 << 20  # bytes of images that a thread makes at a time


def run(
    source: str,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    crop: Crop = "center",
    mode: Literal["L", "RGB"] | None = None,
    background: Colour | None = None,
    upscale: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes the images of `source` to the zip `out`, and returns how many there are and what was done to them.

    size: width and height; None: those of all images, which must be equal. mode: None: grey where all are grey, else
    RGB. background: below transparent pixels and around padded images; None: white and black. upscale: whether small
    images are enlarged; else they are an error: blurred images teach blur, and nothing tells them from others later.
    Files that cannot be read are left out, with a warning. An archive that is there already is compared and kept.
    Raises DataError, UsageError or RunError.
    """
    _check(out, size, crop, dry_run)
    images = open_source(source, None, in_memory=False, is_prepared=True)
    check_images(source, images.reader)
    for note in images.notes:
        console.info(note)
    for warning in images.warnings:
        console.warn(warning)
    survey = _survey(images)
    preparation = _preparation(source, survey, size, crop, mode, background)._replace(upscale=upscale)
    if not upscale:
        _check_sizes(images, survey, preparation)
    shape = (len(preparation.mode), preparation.height, preparation.width)
    image_size = len(_png(np.zeros(shape, np.uint8)))  # the same for all, as they are not compressed
    names = 2 * (len(survey.rows) * len(_name(0)) + len(INDEX))  # each is written twice
    contents = len(survey.rows) * image_size + len(_index(images, survey.rows))
    size_of = {"bytes": contents + names + (len(survey.rows) + 1) * ENTRY + END}
    made = _Made(survey.rows, survey.problems)
    speed = None
    if not dry_run:
        remove_abandoned(out)
        if not out.exists() and size_of["bytes"] > (free := shutil.disk_usage(_existing(out)).free):
            raise RunError(f"{out}: {size_of['bytes']:,} bytes are to be written, and {free:,} are free; make room")
        start = time.monotonic()
        made = _make(images, survey, preparation, out, max(1, min(64, CHUNK // image_size)))
        speed = round(len(made.rows) / max(time.monotonic() - start, 1e-9), 1)
        size_of["bytes"] = out.stat().st_size
    if made.problems:
        more = f" and {len(made.problems) - 1} more" if len(made.problems) > 1 else ""
        console.warn(f"{source}: left out, since they cannot be used: {_named(images, made.problems)}{more}")
    labels = images.labels[made.rows]
    num_classes = count_classes(labels) if _are_labelled(labels) and not images.captions else 0
    return {
        "out": str(out), "num_images": len(made.rows), "shape": list(shape), **preparation.protocol,
        "background": _hex(preparation.background or WHITE), "padding": _hex(preparation.padding),
        "num_classes": num_classes, "classes": dict(images.classes),
        **({"captions": len(made.rows)} if images.captions else {}),
        "effects": _effects(survey, made.rows, preparation), "left_out": len(made.problems),
        "problems": [_named(images, {row: made.problems[row]}) for row in sorted(made.problems)[:FEW_NAMES]],
        **size_of, **({"dry_run": True} if dry_run else {"images_per_second": speed}),
    }  # fmt: skip


def _hex(colour: Colour) -> str:
    return "#" + bytes(colour).hex()


def _check(out: Path, size: tuple[int, int] | None, crop: Crop, dry_run: bool) -> None:
    if out.suffix.lower() != ".zip":
        raise UsageError(f"--out {out} must be a file that ends in .zip, such as {out.with_suffix('')}.zip")
    if dry_run or not _is_archive(out):
        _check_free(out)
    if not _existing(out).is_dir():
        raise UsageError(f"--out {out}: {_existing(out)} is a file; choose another place")
    if crop != "center" and size is None:
        raise UsageError(f"--crop {crop} has no effect without --size; give both")
    if crop in ("center-adm", "center-celeba") and size is not None and size[0] != size[1]:
        raise UsageError(f"--crop {crop} makes squares, and --size is {size[0]}x{size[1]}; give one side")


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UsageError(f"--out {out} exists, and nothing is overwritten; choose another name, or remove it")


def _existing(out: Path) -> Path:
    """The nearest place above `out` that is there."""
    return next(place for place in out.absolute().parents if place.exists())


# --- What is there


class _Survey(NamedTuple):
    """What the heads of all files tell.

    rows: int64 (n,), those that may be images; kinds: int32 (N,), of each row, its place in `headers`; problems: of all
    other rows.
    """

    rows: np.ndarray
    kinds: np.ndarray
    headers: list[Header]
    problems: dict[int, str]


def _survey(images: Source) -> _Survey:
    places, kinds, problems = dict[Header, int](), np.full(images.num, -1, np.int32), dict[int, str]()
    with console.progress(f"looking at {images.name}", images.num, "files") as bar:
        for row, header in _ahead(lambda row: header_of(images.reader, row), range(images.num), 64):
            if isinstance(header, Header):
                kinds[row] = places.setdefault(header, len(places))
            else:
                problems[row] = header
            bar.advance()
    if not places:
        raise DataError(f"{images.name}: no file can be read as an image: {_named(images, problems)}; give another one")
    return _Survey(np.flatnonzero(kinds >= 0), kinds, list(places), problems)


def _preparation(
    source: str,
    survey: _Survey,
    size: tuple[int, int] | None,
    crop: Crop,
    mode: Literal["L", "RGB"] | None,
    background: Colour | None,
) -> Preparation:
    sizes = sorted({(header.width, header.height) for header in survey.headers})
    if size is None and len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes[:3]) + (", ..." if len(sizes) > 3 else "")
        raise DataError(
            f"{source} holds images of {len(sizes)} sizes ({shown}); add --size: up to {min(map(min, sizes))} enlarges "
            "none"
        )
    if mode is None:
        are_grey = all(header.is_grey for header in survey.headers)
        is_coloured = len(set(background or WHITE)) > 1 and (
            crop == "pad" or any(header.has_alpha for header in survey.headers)
        )
        mode = "L" if are_grey and not is_coloured else "RGB"
    return Preparation(*(size or sizes[0]), crop, mode, background or WHITE, background or BLACK)


def _check_sizes(images: Source, survey: _Survey, preparation: Preparation) -> None:
    """Raises DataError for images that would be enlarged."""
    is_small = np.array([preparation.enlarges(header.width, header.height) for header in survey.headers])
    rows = survey.rows[is_small[survey.kinds[survey.rows]]]
    if len(rows):
        first = survey.headers[survey.kinds[rows[0]]]
        raise DataError(
            f"{images.name}: {len(rows)} of {len(survey.rows)} images are smaller than {preparation.width}x"
            f"{preparation.height}, such as {name_of(images.reader, rows[0])} of {first.width}x{first.height}; add "
            "--upscale to enlarge them, --crop pad to pad them, or choose a smaller --size"
        )


def _effects(survey: _Survey, rows: np.ndarray, preparation: Preparation) -> dict[str, int]:
    """How many of the rows' images have each of EFFECTS."""
    counts = Counter[str]()
    for header, count in zip(
        survey.headers, np.bincount(survey.kinds[rows], minlength=len(survey.headers)), strict=True
    ):
        counts.update(dict.fromkeys(preparation.effects(header), int(count)))
    return {effect: counts[effect] for effect in EFFECTS if counts[effect]}


def _named(images: Source, problems: Mapping[int, str]) -> str:
    """The first problem, with the file's name."""
    row = min(problems)
    return f"{name_of(images.reader, row)} {problems[row]}"


# --- Making the archive


class _Made(NamedTuple):
    """The rows whose images are in the archive, and the problems of all others."""

    rows: np.ndarray
    problems: dict[int, str]


def _make(images: Source, survey: _Survey, preparation: Preparation, out: Path, chunk: int) -> _Made:
    prepared = Prepared(images.name, images.reader, preparation)
    rows, problems = list[int](), dict(survey.problems)

    def entries() -> Iterator[tuple[str, bytes]]:
        with console.progress(f"preparing {images.name}", len(survey.rows), "images") as bar:
            for row, content in _ahead(lambda row: _png(prepared.item(row)), survey.rows.tolist(), chunk):
                if isinstance(content, bytes):
                    yield _name(len(rows)), content
                    rows.append(row)
                else:
                    problems[row] = content
                bar.advance()
        if not rows:
            raise DataError(f"{images.name}: no file holds a whole image: {_named(images, problems)}; replace them")
        yield INDEX, _index(images, np.array(rows))

    if out.exists():
        if not _holds(out, entries()):
            _check_free(out)
        console.info(f"{out} is finished; nothing to do")
        return _Made(np.array(rows), problems)
    with replacing(out) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name, content in entries():
                _add(archive, name, content)
        _check_free(out)  # another process may have written it meanwhile
    return _Made(np.array(rows), problems)


def _is_archive(path: Path) -> bool:
    """Whether a file can be an archive of this command."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:1] == [_name(0)]
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        return False


def _holds(path: Path, entries: Iterator[tuple[str, bytes]]) -> bool:
    """Whether an archive has exactly these entries. Asks for no more of them than up to the first difference."""
    with zipfile.ZipFile(path) as archive:
        names = iter(archive.namelist())
        for name, content in entries:
            if next(names, None) != name or archive.getinfo(name).file_size != len(content):
                return False
            try:
                if archive.read(name) != content:
                    return False
            except (zipfile.BadZipFile, RuntimeError, zlib.error, EOFError):  # damaged
                return False
        return next(names, None) is None


class _Problem(str):
    """Why an item cannot be used."""


def _ahead(act: Callable[[int], Any], rows: Sequence[int], chunk: int) -> Iterator[tuple[int, Any]]:
    """(row, act(row), or a _Problem) in order, computed ahead by threads: Pillow releases Python's lock."""

    def of_chunk(chunk_rows: Sequence[int]) -> list[tuple[int, Any]]:
        return [(row, _attempt(act, row)) for row in chunk_rows]

    threads = available_cores()
    pool, pending = ThreadPoolExecutor(threads), deque[Future[list[tuple[int, Any]]]]()
    try:
        for start in range(0, len(rows), chunk):
            pending.append(pool.submit(of_chunk, rows[start : start + chunk]))
            if len(pending) > 2 * threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(act: Callable[[int], Any], row: int) -> Any:
    try:
        return act(row)
    except Unfit as error:
        return _Problem(f"has {error}")
    except DataError:  # of an array, which is damaged as a whole
        raise
    except Exception as error:  # Pillow's decoders raise errors of any kind
        return _Problem(f"cannot be read as an image ({printable(str(error), 80)})")


def _png(image: np.ndarray) -> bytes:
    """uint8 (C, H, W) -> a PNG without compression."""
    content = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(content, "png", compress_level=0)
    return content.getvalue()


def _name(number: int) -> str:
    return f"{number:08d}"[:5] + f"/img{number:08d}.png"


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, STAMP)
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # whatever the machine
    archive.writestr(entry, content)


def _index(images: Source, rows: np.ndarray) -> bytes:
    """dataset.json. EDM's code reads the labels, ours names of classes and captions, too."""
    labels = np.arange(len(rows)) if images.captions else images.labels[rows]
    pairs = [[_name(number), label] for number, label in enumerate(labels.tolist())] if _are_labelled(labels) else None
    texts = [images.captions[row] for row in rows.tolist()] if images.captions else []
    names = {"classes": dict(images.classes)} if images.classes else {}
    return json.dumps({"labels": pairs, **names, **({"captions": texts} if texts else {})}).encode()


def _are_labelled(labels: np.ndarray) -> bool:
    return bool((labels >= 0).all())
