"""Reads pickles of weights without running code from them: an interpreter of data opcodes with a list of known names.

Python's unpickler calls any function that a file names. Here a name is looked up in `Machine.globals`, whose functions
only store or check their arguments. Other opcodes and names are refused, so the worst that a hostile file can do is to
be refused or to hold wrong numbers.

Sources: the documentation of opcodes in Python's `pickletools`, and the layout of torch's tensor pickles.
"""

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli import checkpoint
from ddo_cli.errors import CheckpointError, printable

# Limits far above what published files need, so that a hostile file costs seconds and megabytes only; our choice. The
# largest published networks take about 70,000 operations, of which EDM's EMPTY_SET of 216 bytes is the costliest.
_MOST_OPERATIONS = 300_000
_MOST_DIMENSIONS = 8
_LARGEST_KEY = 2**60  # larger integers hash to small ones: a dict of chosen keys would take quadratic time

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before zip files
STORAGE_TYPES = {
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}  # by pickle operation
DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError, EOFError
)  # fmt: skip


@dataclass(eq=False)
class Record:
    """An object whose class is not loaded: class name and attributes. source: its code as text, never run."""

    class_name: str
    state: dict[Any, Any] | None
    source: str = ""


@dataclass(eq=False)
class _ScalarType:
    """A numpy number type; its state sets the byte order."""

    code: str
    order: str = ""

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype((self.order or "<") + self.code)


class Global(NamedTuple):
    """A name in the file and the function that stands for it."""

    name: str
    call: Callable[..., Any]


@dataclass(eq=False)
class Array:
    """A numpy array of plain numbers; its state sets the values."""

    values: np.ndarray | None = None


class _Bounded:
    """A stream of a file of `size` bytes, as `pickletools` reads it: Python reserves what a read asks for."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._size = stream, size
        self.tell, self.readline = stream.tell, stream.readline

    def read(self, size: int) -> bytes:
        """The next bytes. Raises EOFError for more of them than the whole file has."""
        if size > self._size:
            raise EOFError("it claims more bytes than the file has")
        return self._stream.read(size)


class Storage(NamedTuple):
    """The numbers of a tensor, 1-D, and the offset of their little-endian bytes in the file."""

    values: Tensor
    offset: int


WEIGHTS = "a file that `ddo convert` knows"


def read_pickle(path: str | Path, known: str = WEIGHTS) -> Any:
    """The content of a pickle: dicts, lists, tuples, numbers, texts, tensors, and a `Record` for any other object.

    A numpy array is an `Array` with read-only values. known: which files are read, for the message.
    Raises CheckpointError if the file is missing or damaged, or has an unknown name.
    """
    return read_with_storages(path, known)[0]


def read_with_storages(path: str | Path, known: str = WEIGHTS) -> tuple[Any, list[Storage]]:
    """`read_pickle`, and the storages of which the tensors are views: writing to a tensor changes them."""
    file = checkpoint.resolve(path)
    with open(file, "rb") as stream:
        machine = Machine(str(path), file.stat().st_size, known)
        return machine.content(stream), machine.storages


def parse_pickle(where: str, raw: bytes, known: str = WEIGHTS) -> Any:
    """`read_pickle` of bytes. where: their name in messages."""
    return Machine(where, len(raw), known).content(io.BytesIO(raw))


class Machine:
    """One reading of one file of `size` bytes. path, known: for messages."""

    def __init__(self, path: str, size: int, known: str):
        self.path, self.known = path, known
        self.size = size
        self.budget = size  # bytes left for storages and arrays: a file that repeats one would fill the memory
        self.operations = 0
        self.dicts_have_attributes = False
        self.advice = "Do not load it with another program unless you trust its origin"
        self.storages: list[Storage] = []
        self.places: dict[int, tuple[bytes, int]] = {}  # by id: bytes (kept alive, so that ids stay unique) and offset
        self.globals: dict[str, Callable[..., Any]] = {
            "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
            "dnnlib.util.EasyDict": _dict,
            "collections.OrderedDict": _dict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: of(data, Tensor),
            "torch.storage._load_from_bytes": self._storage,
            "torch.nn.modules.container.ModuleDict": _module_dict,
            "numpy.dtype": _scalar_type,
            "numpy.ndarray": refuse_call,  # an argument of _reconstruct
        }
        for core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
            self.globals[f"{core}.multiarray.scalar"] = _scalar
            self.globals[f"{core}.multiarray._reconstruct"] = _array
            self.globals[f"{core}.numeric._frombuffer"] = self._array_of_buffer  # protocol 5

    def content(self, stream: BinaryIO) -> Any:
        """The object in `stream`. Raises CheckpointError."""
        try:
            return self.run(stream, self.globals)
        except DAMAGE as error:
            raise CheckpointError(
                f"{self.path} is not a whole pickle of a known layout ({type(error).__name__}: "
                f"{printable(str(error), 80)}); download it again, or give {self.known}"
            ) from None

    def run(self, stream: BinaryIO, known: dict[str, Callable[..., Any]], persistent: Any = None) -> Any:
        """The object of the pickle at the position of `stream`, which ends up behind the pickle.

        persistent: function of a persistent id. Raises CheckpointError for a refused file, DAMAGE for a broken one.
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for opcode, arg, _ in pickletools.genops(_Bounded(stream, self.size)):  # type: ignore[arg-type]
            self.operations += 1
            if self.operations > _MOST_OPERATIONS:
                raise CheckpointError(
                    f"{self.path}: refused: it has more than {_MOST_OPERATIONS:,} pickle operations, several times "
                    "what a file of numbers needs; nothing was run"
                )
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case (
                    "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT"
                    | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8"
                    | "SHORT_BINSTRING" | "BINSTRING"  # Python 2: bytes, read as latin-1
                ):  # fmt: skip
                    stack.append(arg)
                case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                    stack.append(arg)
                    self.places[id(arg)] = of(arg, bytes), stream.tell() - len(of(arg, bytes))
                case "BYTEARRAY8":
                    stack.append(bytes(of(arg, bytearray)))
                case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "EMPTY_TUPLE":
                    stack.append(_EMPTY[opcode.name]())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple([stack.pop() for _ in range(int(opcode.name[-1]))][::-1]))
                case "APPEND" | "APPENDS":
                    items = since_mark() if opcode.name == "APPENDS" else [stack.pop()]
                    of(stack[-1], list).extend(items)
                case "ADDITEMS":
                    items = since_mark()  # first: it uncovers the set
                    of(stack[-1], set).update(map(plain_key, items))
                case "SETITEM" | "SETITEMS":
                    items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                    of(stack[-1], dict).update(zip(map(plain_key, items[::2]), items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[of(arg, int)] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[of(arg, int)])
                case "GLOBAL":
                    stack.append(self._find(".".join(str(arg).split(" ", 1)), known))
                case "STACK_GLOBAL":
                    name, module = of(stack.pop(), str), of(stack.pop(), str)
                    stack.append(self._find(f"{module}.{name}", known))
                case "REDUCE" | "NEWOBJ":
                    arguments = of(stack.pop(), tuple)
                    stack.append(of(stack.pop(), Global).call(*arguments))
                case "BUILD":
                    self._set_state(stack[-2], stack.pop())
                case "BINPERSID" if persistent is not None:
                    stack.append(persistent(stack.pop()))
                case _:
                    raise CheckpointError(
                        f"{self.path}: refused: it uses the pickle operation {opcode.name}, which no file that this "
                        "program knows has need of; nothing was run"
                    )
        raise EOFError("the pickle has no end")

    def _find(self, name: str, known: dict[str, Callable[..., Any]]) -> Global:
        if name not in known:
            raise CheckpointError(
                f"{self.path}: refused: it names '{printable(name, 80)}', which could run code and has no place in a "
                f"file of numbers; nothing was run. {self.advice}"
            )
        return Global(name, known[name])

    def _set_state(self, target: Any, state: Any) -> None:
        if type(target) is Record and target.state is None:
            target.state = of(state, dict)
        elif type(target) is _ScalarType and not target.order:
            target.order = {"<": "<", "|": "|"}[of(of(state, tuple)[1], str)]
        elif type(target) is Array and target.values is None:
            _, shape, kind, is_fortran, raw = of(state, tuple)
            target.values = self._numbers(raw, kind, shape, "F" if of(is_fortran, bool) else "C")
        elif type(target) is dict and self.dicts_have_attributes:
            of(state, dict)  # which are left out, such as a state dict's `_metadata`
        else:
            raise TypeError(f"a {type(target).__name__} takes no state")

    def spend(self, size: int, what: str) -> None:
        """Counts bytes that are reserved. Raises ValueError once they are more than the file has."""
        self.budget -= size
        if self.budget < 0:
            raise ValueError(f"{what} hold more bytes than the file")

    def _array_of_buffer(self, raw: Any, kind: Any, shape: Any, order: Any) -> Array:
        return Array(self._numbers(raw, kind, shape, {"C": "C", "F": "F"}[of(order, str)]))

    def _numbers(self, raw: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
        """A view of `raw`. Sizes are multiplied as Python integers: numpy's product of a hostile shape overflows."""
        dtype = of(kind, _ScalarType).numpy
        raw = raw.encode("latin-1") if type(raw) is str else raw
        sizes = [of(size, int) for size in of(shape, tuple)]
        if len(sizes) > _MOST_DIMENSIONS or min(sizes, default=0) < 0:
            raise ValueError("an array has an impossible shape")
        self.spend(len(of(raw, bytes)), "arrays")
        if math.prod(sizes) * dtype.itemsize != len(raw):
            raise ValueError(f"an array of the wrong length: it has {len(raw)} bytes")
        return np.frombuffer(raw, dtype).reshape(sizes, order=order)

    def _storage(self, blob: Any) -> Storage:
        """The numbers in a storage saved by torch in its old format: five pickles, a count, and raw little-endian."""
        stream = io.BytesIO(of(blob, bytes))
        begin = self.places[id(blob)][1]
        self.spend(len(blob), "storages")
        types = {name: refuse_call for name in STORAGE_TYPES}
        if self.run(stream, {}) != LEGACY_MAGIC or self.run(stream, {}) != LEGACY_PROTOCOL:
            raise ValueError("a storage is of an unknown format")
        if of(self.run(stream, {}), dict)["little_endian"] is not True:
            raise ValueError("a storage is big-endian")
        kind, storage_type, key, _, count, view = self.run(stream, types, persistent=lambda place: of(place, tuple))
        # Strings only: comparing deeply nested tuples can take forever.
        if of(kind, str) != "storage" or view is not None or self.run(stream, {}) != [of(key, str)]:
            raise ValueError("a storage is of an unknown layout")
        dtype = STORAGE_TYPES[of(storage_type, Global).name]
        if int.from_bytes(stream.read(8), "little", signed=True) != of(count, int):
            raise ValueError("a storage gives two lengths")
        start = stream.tell()
        if len(blob) - start != count * dtype.itemsize:
            raise ValueError(f"a storage of {count} numbers has {len(blob) - start} bytes")
        raw = bytearray(len(blob) - start)  # writable memory for torch
        stream.readinto(raw)
        values = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        self.storages.append(Storage(values, begin + start))
        return self.storages[-1]


def of(value: Any, kind: type) -> Any:
    """`value`, which must have exactly this type: a subclass could behave differently."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def plain_key(value: Any) -> Any:
    """`value` as a dict key. Plain values only: hashing a deeply nested tuple overflows the stack."""
    if value is not None and type(value) not in (str, int, float, bool, bytes):
        raise TypeError(f"a {type(value).__name__} as a key")
    if type(value) is int and abs(value) >= _LARGEST_KEY:
        raise ValueError("a key of more than 60 bits")
    return value


# --- The functions that stand for names


def refuse_call(*arguments: Any) -> Any:
    """Stands for a class that is only named."""
    raise TypeError("a class is called")


def _persistent(meta: Any) -> Record:
    """An object of EDM's code: class name, attributes, and the source text of its module."""
    if of(of(meta, dict)["type"], str) != "class":
        raise ValueError("an object is not described by a class")
    return Record(of(meta["class_name"], str), of(meta["state"], dict), of(meta["module_src"], str))


def _dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise TypeError("a dict is built from arguments")
    return {}


def _module_dict(*arguments: Any) -> Record:
    if arguments:
        raise TypeError("a module is built from arguments")
    return Record("ModuleDict", None)


def view_of(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    """A tensor of a storage's numbers."""
    values = of(storage, Storage).values
    numbers = [of(number, int) for number in (offset, *of(size, tuple), *of(stride, tuple))]
    if min(numbers) < 0 or len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise ValueError("a tensor has an impossible size")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(values):
        raise ValueError("a tensor reaches beyond its storage")
    return values.as_strided(size, stride, offset)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any) -> Tensor:
    """The same, which repeats no number: those of EDM's files do not."""
    tensor = view_of(storage, offset, size, stride, requires_grad, hooks)
    if tensor.numel() > len(storage.values):
        raise ValueError("a tensor reaches beyond its storage")
    return tensor


def _scalar_type(code: Any, align: Any, copy: Any) -> _ScalarType:
    if of(code, str) not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise ValueError(f"a numpy type {code!r:.50}")
    return _ScalarType(code)


def _array(subtype: Any, shape: Any, code: Any) -> Array:
    """The empty array whose state follows."""
    if of(subtype, Global).name != "numpy.ndarray":
        raise TypeError("an array of a class of its own")
    return Array()


def _scalar(kind: Any, raw: Any) -> Any:
    dtype = of(kind, _ScalarType).numpy
    if len(of(raw, bytes)) != dtype.itemsize:
        raise ValueError("a number of the wrong length")
    return np.frombuffer(raw, dtype)[0].item()
