"""Network snapshots of EDM and EDM2: pickles, read without running them -> configuration and tensors of our model."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddo_cli.errors import CheckpointError, RecipeError, printable
from ddo_cli.models import pt_files, registry
from ddo_cli.safe_pickle import Record, Storage, read_with_storages

# Arguments that are read apart or of no use here: dropout stays off, since model and reference share their draw; half
# precision is the caller's choice.
READ = {"img_resolution", "img_channels", "label_dim", "dropout", "use_fp16", "sigma_data"}
_LONGEST = 64  # of a list or text among the arguments; our choice, far above every published one
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError, RecipeError)


class Snapshot(NamedTuple):
    """A file as it was read. outer: its averaged network (`ema`) inside a preconditioner."""

    content: dict[Any, Any]
    outer: Record
    storages: list[Storage]


class Names(Protocol):
    """Official names and tensors <-> ours. None: a constant that we compute. Raises KeyError for another name."""

    def from_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None: ...

    def to_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor]: ...


class Network(NamedTuple):
    """The averaged network of a snapshot.

    config: as `registry.build` takes it. tensors: of that model's state dict, float32. stored: under official names,
    views of `storages`. classes: of the preconditioner and its network. half: there it runs in float16 on CUDA.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    stored: dict[str, Tensor]
    storages: list[Storage]
    names: Names
    classes: tuple[str, str]
    half: bool


def open_snapshot(path: str | Path) -> Snapshot:
    """The content of a network snapshot. Raises CheckpointError if `read_pickle` refuses it or it has no `ema`."""
    content, storages = read_with_storages(path)
    outer = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(outer, Record):
        raise CheckpointError(f"{path} holds no averaged network under the key 'ema'; give a network-snapshot of EDM")
    return Snapshot(content, outer, storages)


def read_network(
    path: str | Path,
    snapshot: Snapshot,
    child: str,
    config_of: Callable[[dict[str, Any], tuple[str, str]], dict[str, Any]],
    names_of: Callable[[dict[str, Any], dict[str, Tensor]], Names],
) -> Network:
    """The averaged network, checked.

    child: the preconditioner's name of its network. config_of: of the preconditioner's state and the two classes;
    names_of: of configuration and stored tensors, and raises ValueError if there are too few to build.
    Raises CheckpointError if the tensors do not fit the description.
    """
    state = snapshot.outer.state or {}
    try:
        classes = snapshot.outer.class_name, state["_modules"][child].class_name
        config = config_of(state, classes)
        stored = dict(_tensors_of(snapshot.outer, "", set()))
        pt_files.check_size(stored.values(), path)
        names = names_of(config, stored)
        tensors = dict(filter(None, (names.from_edm(key, tensor) for key, tensor in stored.items())))
        with torch.device("meta"):
            expected = registry.build(config).state_dict()
        half = bool(state.get("use_fp16"))
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path}: the network does not fit its description ({type(error).__name__}: {printable(str(error))}); "
            "download it again"
        ) from None
    if problems := pt_files.misfits(expected, tensors, lambda key, tensor: printable(names.to_edm(key, tensor)[0])):
        listed = printable("; ".join(problems[:5]), 160)
        raise CheckpointError(f"{path}: {len(problems)} tensors do not fit the network it describes: {listed}")
    fitting = {key: tensors[key].to(torch.float32).clone(memory_format=torch.contiguous_format) for key in expected}
    return Network(config, fitting, stored, snapshot.storages, names, classes, half)


def arguments(state: dict[str, Any], known: Collection[str], path: str | Path) -> dict[str, Any]:
    """The arguments by name that a network was made with: numbers, texts and short lists of them.

    Raises CheckpointError for unknown ones, TypeError for other values, which could be nested without end.
    """
    given = state["_init_kwargs"]
    if type(given) is not dict:
        raise TypeError("arguments that are not a dict")
    for key, value in given.items():
        parts = value if type(value) in (list, tuple) else (value,)
        plain = all(part is None or type(part) in (bool, int, float, str) for part in parts)
        short = len(parts) <= _LONGEST and all(type(part) is not str or len(part) <= _LONGEST for part in parts)
        if type(key) is not str or not plain or not short:
            raise TypeError(f"argument {printable(str(key))!r} is neither a number, a word nor a short list")
    if unknown := sorted(given.keys() - set(known)):
        listed = printable(", ".join(unknown))
        raise CheckpointError(f"{path}: the network was made with arguments that are not known: {listed}")
    if state["_init_args"] != ():
        raise CheckpointError(f"{path}: the network was made with arguments that have no name")
    return given


def shape_of(state: dict[str, Any]) -> tuple[int, int, int]:
    """Channels and side of a preconditioner's states, and the number of classes."""
    channels, side, classes = (number(state[key], key, int) for key in ("img_channels", "img_resolution", "label_dim"))
    return channels, side, classes


def number(value: Any, key: str, kind: type = float) -> Any:
    """`value`, a number of this kind. Raises TypeError or ValueError."""
    if type(value) not in (int, kind):
        raise TypeError(f"{key} is not a number")
    if kind is int and not 0 <= value < 2**31:
        raise ValueError(f"{key} is out of range")
    return value


def _tensors_of(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module in the order of its state dict: parameters, buffers, then children."""
    if not isinstance(module, Record) or id(module) in seen:  # twice: a file of cycles would never end
        raise ValueError(f"'{prefix.rstrip('.')}' is not a module of its own")
    seen.add(id(module))
    state = module.state or {}
    for name, tensor in (*state["_parameters"].items(), *state["_buffers"].items()):
        if tensor is not None:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"'{prefix}{name}' is not a tensor of floating-point numbers")
            yield prefix + name, tensor
    for name, child in state["_modules"].items():
        yield from _tensors_of(child, f"{prefix}{name}.", seen)
