"""CIFAR-10 as published: cifar-10-python.tar.gz, or the folder cifar-10-batches-py in it. Training images only.

Its batches are pickles of Python 2, which Python's unpickler would read by calling whatever they name. Here a pickle is
only parsed: a call that it asks for is written down as `_Made`, never made, and the numbers are taken from the bytes
where the array of the published layout has them.

Source: https://www.cs.toronto.edu/~kriz/cifar.html, and the opcodes' documentation in Python's `pickletools`.
"""

from __future__ import annotations

import gzip
import io
import pickletools
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddo_cli.data.items import ItemSet, item_set
from ddo_cli.errors import DataError, printable

TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar")
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))  # test_batch is not for training
SHAPE = (3, 32, 32)  # of an image; rows of `data` are in this order
NUM_CLASSES = 10
MAX_BATCH, MAX_TAR = 64 << 20, 512 << 20  # bytes: twice the published 31 MB of a batch, 186 MB of the tar unpacked
_NAMES = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "class",
    "numpy dtype": "dtype",
}
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, EOFError)


def open_tar(source: str, path: Path, num: int | None) -> ItemSet:
    """The 50,000 training images. Raises DataError for another tar, and for a batch of another layout."""
    try:
        # Unpacked as a whole, and no further than the limit: a small file can unpack to any size.
        with open(path, "rb") if path.suffix.lower() == ".tar" else gzip.open(path) as file:
            raw = file.read(MAX_TAR + 1)
        if len(raw) > MAX_TAR:
            raise DataError(
                f"{source} unpacks to more than {MAX_TAR >> 20} MB, CIFAR-10 to 186; give the published file"
            )
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            members = {Path(member.name).name: member for member in archive if member.isreg() and not member.issparse()}

            def read(name: str) -> bytes | None:
                member = members.get(name)
                if member is not None and member.size > MAX_BATCH:
                    raise DataError(_too_large(f"{source}: {name}", member.size))
                content = archive.extractfile(member) if member is not None else None
                return content.read() if content is not None else None

            return _open_batches(source, read, num)
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{source} is not a whole .tar.gz ({error}); download it again") from None


def holds_batches(path: Path) -> bool:
    """Whether a folder is the unpacked cifar-10-batches-py."""
    return any((path / name).is_file() for name in BATCHES)


def open_unpacked(source: str, path: Path, num: int | None) -> ItemSet:
    """The same of the unpacked folder."""

    def read(name: str) -> bytes | None:
        file = path / name
        try:
            if file.stat().st_size > MAX_BATCH:
                raise DataError(_too_large(str(file), file.stat().st_size))
            return file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); correct its permissions") from None

    return _open_batches(source, read, num)


def _too_large(where: str, size: int) -> str:
    return f"{where} has {size >> 20} MB, a batch of CIFAR-10 31; give the published file"


def _open_batches(source: str, read: Callable[[str], bytes | None], num: int | None) -> ItemSet:
    found = []
    for name in BATCHES:
        raw = read(name)
        if raw is None:
            raise DataError(f"{source} has no {name}; give cifar-10-python.tar.gz, or its folder cifar-10-batches-py")
        found.append(_batch(f"{source}: {name}", raw))
    items, labels = (np.concatenate(column) for column in zip(*found, strict=True))
    return item_set(source, items, labels, num, NUM_CLASSES)


def _batch(where: str, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of one batch."""
    try:
        content = _parsed(where, raw)
        rows, labels = _array(content["data"]), content["labels"]
        if rows.ndim != 2 or rows.shape[1] != 3 * 32 * 32 or not len(rows):
            raise ValueError(f"its data are {rows.shape}, not (N, 3072)")
        if type(labels) is not list or len(labels) != len(rows):
            raise ValueError(f"{len(rows)} images and {len(labels)} labels")
        if any(type(label) is not int or not 0 <= label < NUM_CLASSES for label in labels):
            raise ValueError("a label is not one of 0..9")
    except _DAMAGE as error:
        what = f"{type(error).__name__}: {printable(str(error))}"
        raise DataError(f"{where} is not a whole batch of CIFAR-10 ({what}); download it again") from None
    return rows.reshape(-1, *SHAPE), np.array(labels, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# The pickle


@dataclass(eq=False)
class _Made:
    """What a pickle would make by calling `name`: the arguments and the state that it gives. Nothing is called."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: tuple[Any, ...] = ()


def _array(made: _Made) -> np.ndarray:
    """The uint8 array that numpy's own pickles describe: (version, shape, dtype, is Fortran order, raw bytes)."""
    _, shape, dtype, fortran, text = made.state
    if made.name != "array" or dtype.name != "dtype" or dtype.arguments[0] != "u1":
        raise ValueError("its data are no array of uint8")
    flat = np.frombuffer(text.encode("latin-1"), np.uint8)
    return np.ascontiguousarray(flat.reshape(shape, order="F" if fortran is True else "C"))


def _parsed(where: str, raw: bytes) -> Any:
    """The content of a pickle of lists, dicts, tuples, numbers and texts (bytes as latin-1), and `_Made`.

    Knows the opcodes that Python 2 writes for a batch. Raises DataError for others, _DAMAGE for what is broken.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, arg, _ in pickletools.genops(raw):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "SHORT_BINSTRING" | "BINSTRING":
                stack.append(arg)
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({"EMPTY_LIST": [], "EMPTY_DICT": {}, "EMPTY_TUPLE": ()}[opcode.name])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(opcode.name[-1]))][::-1]))
            case "APPEND" | "APPENDS":
                items = since_mark() if opcode.name == "APPENDS" else [stack.pop()]
                _of(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                _of(stack[-1], dict).update(
                    (_of(key, str), value) for key, value in zip(*[iter(items)] * 2, strict=True)
                )
            case "BINPUT" | "LONG_BINPUT":
                memo[_of(arg, int)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[_of(arg, int)])
            case "GLOBAL" if arg in _NAMES:
                stack.append(_Made(_NAMES[_of(arg, str)]))
            case "REDUCE":
                arguments = _of(stack.pop(), tuple)
                stack.append(_Made(_of(stack.pop(), _Made).name, arguments))
            case "BUILD":
                state = _of(stack.pop(), tuple)
                _of(stack[-1], _Made).state = state
            case _:
                what = (
                    f"names {printable(str(arg))!r}" if opcode.name == "GLOBAL" else f"uses the operation {opcode.name}"
                )
                raise DataError(
                    f"{where} is refused: its pickle {what}, which could run code and has no place in CIFAR-10; "
                    "nothing was run. Do not open it with another program; download it again"
                )
    raise EOFError("the pickle has no end")


def _of(value: Any, kind: type) -> Any:
    """`value`, which must be of exactly this type."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value
