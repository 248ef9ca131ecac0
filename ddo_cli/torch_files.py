"""Files of `torch.save` without running code from them: its zip files, and the files that it wrote before version 1.6.

`torch.load(weights_only=True)` calls no foreign code either, but what it reserves and how long it takes is up to the
file, it advises to load without restriction, and it refuses the settings that trainers keep beside weights. Here the
interpreter of `safe_pickle` reads the structure within its limits; a name beyond those of tensors makes a `Record`
where it is known to be harmless, and is refused elsewhere.
"""

import io
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ddo_cli import checkpoint
from ddo_cli.errors import CheckpointError, printable
from ddo_cli.safe_pickle import (
    DAMAGE,
    LEGACY_MAGIC,
    LEGACY_PROTOCOL,
    STORAGE_TYPES,
    Global,
    Machine,
    Record,
    Storage,
    of,
    plain_key,
    refuse_call,
    view_of,
)

_ZIP, _TAR = b"PK\3\4", (257, b"ustar")  # what files start with; a tar's sign, and where it is
_DATA = "/data.pkl"
# Beside weights: settings of the trainer, kept as records, ...
_RECORDS = ("argparse.Namespace", "types.SimpleNamespace", "torch.device", "pathlib.PosixPath", "pathlib.WindowsPath",
            "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "pathlib.PurePosixPath")  # fmt: skip
# ... and types, which are only named.
_TYPES = [f"{module}.{name}" for module, names in {
    **dict.fromkeys(("builtins", "__builtin__"), ("int", "float", "str", "list", "dict", "set")),
    "torch": ("float32", "float16", "bfloat16", "float64", "int64", "strided"),
}.items() for name in names]  # fmt: skip
_ODD = ("_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_nested_tensor", "_rebuild_meta_tensor_no_storage",
        "_rebuild_tensor_v3", "_rebuild_device_tensor_from_numpy")  # fmt: skip


def read_tensors(file: Path, name: str, remedy: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of `torch.save` that holds tensors by name and nothing else.

    name: of the file, and remedy: what to give instead, for messages. Raises CheckpointError.
    """
    if what := checkpoint.disguise(file):
        raise CheckpointError(f"{name} is {what}")
    if file.suffix == ".safetensors":
        try:
            return checkpoint.load_tensors(file)
        except Exception as error:  # the library has errors of its own kinds for damaged bytes
            reason = printable(str(error), 80)
            raise CheckpointError(f"{name} is not a whole file of tensors ({reason}); {remedy}") from None
    content = read(file, name, remedy)
    if not is_state_dict(content):
        raise CheckpointError(f"{name} holds something else than tensors by name; {remedy}")
    check_size(content.values(), file, name)
    return dict(content)


def check_size(tensors: Iterable[Tensor], file: Path, name: str) -> None:
    """Raises CheckpointError if the tensors have more numbers than the file could hold.

    A stored tensor may have strides of 0 and any shape, so that writing it out would fill memory and disk.
    """
    claimed, size = sum(tensor.numel() * tensor.element_size() for tensor in tensors), file.stat().st_size
    if claimed > size:
        raise CheckpointError(
            f"{name}: refused: its tensors claim {claimed:,} bytes and the file has {size:,}; published files store "
            "every number"
        )


def is_state_dict(content: Any) -> bool:
    """Whether this is tensors by name, at least one."""
    return isinstance(content, dict) and bool(content) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )  # fmt: skip


def read(file: Path, name: str, remedy: str) -> Any:
    """The content of a file of `torch.save`: dicts, lists, numbers, texts, tensors, and records of other settings.

    Its tensors may have fewer numbers than their shapes say. name: of the file, and remedy: what to give instead, for
    messages. Raises CheckpointError if it is damaged, of another kind, or names what could run code.
    """
    machine = Machine(name, file.stat().st_size, remedy)
    machine.globals |= _names()
    machine.dicts_have_attributes = True
    machine.advice = "If it is yours, save the tensors alone, by torch.save(model.state_dict(), FILE)"
    try:
        with open(file, "rb") as stream:
            start = stream.read(512)
            stream.seek(0)
            if start[_TAR[0] :].startswith(_TAR[1]):
                raise ValueError("it is a tar archive; unpack it, and give the weight file in it")
            return _zipped(stream, machine) if start.startswith(_ZIP) else _legacy(stream, machine)
    except (*DAMAGE, OSError, zipfile.BadZipFile) as error:
        reason = printable(str(error) or type(error).__name__, 80)
        raise CheckpointError(
            f"{name} is not a whole .pt file of tensors ({reason}); download it again; {remedy}"
        ) from None


def _names() -> dict[str, Callable[..., Any]]:
    """The functions that stand for names in these files, beside those of `Machine`."""

    def odd(*arguments: Any) -> Any:
        raise TypeError("a sparse or quantized tensor where a plain tensor belongs")

    records = {name: _record(name) for name in _RECORDS}
    return {
        **records,
        **dict.fromkeys(_TYPES, refuse_call),
        **dict.fromkeys(STORAGE_TYPES, refuse_call),
        **{f"torch._utils.{name}": odd for name in _ODD},
        "torch.serialization._get_layout": odd,  # of sparse tensors
        "torch._utils._rebuild_tensor_v2": view_of,
        "torch._utils._rebuild_tensor": lambda storage, offset, size, stride: view_of(
            storage, offset, size, stride, False, None
        ),
        "torch._utils._rebuild_parameter_with_state": lambda data, requires_grad, hooks, state: of(data, Tensor),
        "torch.Size": lambda sizes: tuple(of(size, int) for size in of(sizes, tuple)),
        "collections.OrderedDict": _ordered,
        "collections.defaultdict": lambda *factory: {},
        "builtins.set": lambda items: set(map(plain_key, of(items, list))),
        "__builtin__.set": lambda items: set(map(plain_key, of(items, list))),
        "_codecs.encode": lambda text, coding: of(text, str).encode({"latin1": "latin1"}[of(coding, str)]),
    }


def _record(name: str) -> Callable[..., Record]:
    return lambda *arguments: Record(name.rpartition(".")[2], {} if arguments else None)


def _ordered(*arguments: Any) -> dict[Any, Any]:
    """An OrderedDict; programs of Python 2 gave it its pairs."""
    pairs = of(arguments[0], list) if arguments else []
    return {plain_key(key): value for key, value in (of(pair, list) for pair in pairs)}


# --- Layouts


def _zipped(stream: BinaryIO, machine: Machine) -> Any:
    """A zip: NAME/data.pkl, and the numbers of each storage, as they are, in NAME/data/KEY."""
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > machine.budget:  # compressed, or one entry listed often: a small file could unpack to any size
            raise CheckpointError(
                f"{machine.path}: refused: it unpacks to {unpacked:,} bytes, more than the file has; {machine.known}"
            )
        if odd := [name for name, entry in entries.items() if entry.compress_type or entry.flag_bits & 1]:
            raise ValueError(f"'{printable(odd[0], 40)}' in it is compressed or encrypted, as torch.save does not")
        roots = [name.removesuffix(_DATA) for name in entries if name.endswith(_DATA) and name.count("/") == 1]
        if len(roots) != 1:
            raise ValueError("a zip file without data.pkl")
        if f"{roots[0]}/constants.pkl" in entries:
            raise ValueError("it is a TorchScript archive, which holds code")
        order = f"{roots[0]}/byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        storages: dict[str, Storage] = {}

        def storage(place: Any) -> Storage:
            kind, storage_type, key, _, count = of(place, tuple)
            dtype = _dtype(kind, storage_type)
            if of(key, str) not in storages:
                raw = torch.empty(entries[f"{roots[0]}/data/{key}"].file_size, dtype=torch.uint8)
                with archive.open(f"{roots[0]}/data/{key}") as numbers:
                    if len(raw) and numbers.readinto(raw.numpy().data) != len(raw):  # type: ignore[attr-defined]
                        raise EOFError(f"storage {key} ends early")
                storages[key] = Storage(raw.view(dtype), 0)
            values = storages[key].values
            if values.dtype != dtype or len(values) != of(count, int):
                raise ValueError(f"storage {key} is described in two ways")
            return storages[key]

        return machine.run(io.BytesIO(archive.read(f"{roots[0]}{_DATA}")), machine.globals, storage)


def _legacy(stream: BinaryIO, machine: Machine) -> Any:
    """Pickles one after another: a magic number, a version, the machine, the object, the storages' keys; then each
    storage's length and numbers.
    """
    if machine.run(stream, {}) != LEGACY_MAGIC or machine.run(stream, {}) != LEGACY_PROTOCOL:
        raise ValueError("it begins as no file of torch.save does")
    if of(machine.run(stream, {}), dict)["little_endian"] is not True:
        raise ValueError("its numbers are big-endian")
    storages: dict[str, Storage] = {}

    def storage(place: Any) -> Storage:
        kind, storage_type, key, _, count, view = of(place, tuple)
        dtype = _dtype(kind, storage_type)
        if view is not None or of(count, int) < 0:
            raise ValueError("a storage is of an unknown layout")
        if of(key, str) not in storages:
            machine.spend(count * dtype.itemsize, "storages")
            storages[key] = Storage(torch.zeros(count, dtype=dtype), 0)
        values = storages[key].values
        if values.dtype != dtype or len(values) != count:
            raise ValueError(f"storage {key} is described in two ways")
        return storages[key]

    content = machine.run(stream, machine.globals, storage)
    keys = [of(key, str) for key in of(machine.run(stream, {}), list)]
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        values = storages[key].values
        if int.from_bytes(stream.read(8), "little", signed=True) != len(values):
            raise ValueError(f"storage {key} gives two lengths")
        raw = values.view(torch.uint8).numpy().data if len(values) else bytearray()
        if stream.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise EOFError(f"storage {key} ends early")
    return content


def _dtype(kind: Any, storage_type: Any) -> torch.dtype:
    if of(kind, str) != "storage":
        raise ValueError("a persistent object that is no storage")
    return STORAGE_TYPES[of(storage_type, Global).name]
