"""Files of `torch.save` with tensors by name, read without running code that a hostile one may hold."""

import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ddo_cli import checkpoint
from ddo_cli.errors import CheckpointError, printable


def read(path: str | Path, expected: str, inside: Iterable[tuple[str, ...]] = ()) -> dict[str, Tensor]:
    """The tensors of a bare state dict, in their order and types.

    Their numbers may be fewer than their shapes say; see `check_size`.
    inside: places, as keys from the outermost one, where a training checkpoint may hold the state dict instead.
    expected: for messages, what could have been given. Raises CheckpointError if the file is anything else.
    """
    file = checkpoint.resolve(path)
    _check_zip(file, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocols of pickles that are refused anyway
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the unpickler to errors of any kind
        if names := re.search(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: refused: it names '{printable(names[1])}', which could run code and has no place in a weight "
                f"file; nothing was run. It is not a whole .pt file of tensors; {expected}"
            ) from None
        raise CheckpointError(
            f"{path} is not a whole .pt file of tensors ({_reason(error)}); {expected}, so download it again"
        ) from None
    for place in inside:
        content = _at(content, place) or content
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise CheckpointError(f"{path} is not a bare state dict, tensors by name; {expected}")
    odd = [key for key, tensor in content.items() if tensor.layout != torch.strided or tensor.device.type != "cpu"]
    if odd:
        raise CheckpointError(f"{path}: '{printable(odd[0])}' is not a plain tensor; {expected}")
    return _apart(content)


def _at(content: object, place: tuple[str, ...]) -> object:
    """What lies at a place of nested dicts; None if nothing does."""
    for key in place:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, sharing no memory; those that repeat numbers stay as they are, for `check_size` to refuse."""
    seen, apart = set(), {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shares = storage.data_ptr() in seen and tensor.numel() * tensor.element_size() <= storage.nbytes()
        seen.add(storage.data_ptr())
        apart[key] = tensor.clone() if shares else tensor
    return apart


def _reason(error: Exception) -> str:
    """What torch found wrong, without its advice to read the file in a way that runs it."""
    reason = str(error).split("WeightsUnpickler error:")[-1].strip()
    advised, _, rest = reason.partition("\n\n")
    line = (rest.strip() if advised.startswith("Weights only") else reason).split("\n")[0]
    return printable(line or type(error).__name__)


def check_size(tensors: Iterable[Tensor], path: str | Path) -> None:
    """Raises CheckpointError if the tensors have more numbers than the file could hold.

    A stored tensor may have strides of 0 and any shape, so that writing it out would fill memory and disk.
    """
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    size = checkpoint.resolve(path).stat().st_size
    if claimed > size:
        raise CheckpointError(
            f"{path}: refused: its tensors claim {claimed:,} bytes and the file has {size:,}; published files store "
            "every number"
        )


def misfits(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    shown: Callable[[str, Tensor], str] = lambda key, tensor: key,
) -> list[str]:
    """How tensors differ from those of a network's state dict, one line each, sorted. shown: a tensor's name there."""
    problems = [f"missing {shown(key, tensor)}" for key, tensor in expected.items() if key not in tensors]
    problems += [f"unexpected {shown(key, tensor)}" for key, tensor in tensors.items() if key not in expected]
    problems += [
        f"{shown(key, tensor)} of shape {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in tensors and (tensors[key].shape != tensor.shape or not tensors[key].is_floating_point())
    ]
    return sorted(problems)


def _check_zip(file: Path, path: str | Path) -> None:
    """Raises CheckpointError for a zip file with compressed entries, which torch never writes: a small one can unpack
    to any size.
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is a damaged zip file ({printable(str(error))}); download it again") from None
    if unpacked > file.stat().st_size:
        raise CheckpointError(f"{path}: refused: it unpacks to {unpacked:,} bytes, more than the file has")
