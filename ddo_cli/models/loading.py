"""Modules with the weights of a file, built without drawing initial ones."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ddo_cli import checkpoint
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.errors import CheckpointError, reason

Module = TypeVar("Module", bound=nn.Module)


SPARE = 1000  # parameters beyond twice a file's tensors that a network may make as it is built, such as a library's
# What constructors raise for options that pass their schema and still describe no network.
NO_NETWORK = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, AssertionError, MemoryError)


def of_file(build: Callable[[], Module], file: Checkpoint, device: torch.device) -> Module:
    """A module of this program's own kinds with a file's weights. Raises CheckpointError if the file has none such."""
    checkpoint.check_sizes(file.header["config"], file.tensors, file.path)
    try:
        with at_most(2 * len(file.tensors) + SPARE):
            return with_tensors(build, file.tensors, device)
    except RuntimeError as error:
        text = f"{file.path}: tensors do not fit the model its header describes: {reason(error)}"
        raise CheckpointError(text) from None
    except NO_NETWORK as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise CheckpointError(f"{file.path}: its header describes no network ({what}); copy the file again") from None


@contextlib.contextmanager
def at_most(num: int) -> Iterator[None]:
    """Raises ValueError when more parameters than this are made: a header may describe any number of layers."""
    count = 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > num:
            raise ValueError(f"more than {num} parameters")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def with_tensors(build: Callable[[], Module], tensors: dict[str, Tensor], device: torch.device) -> Module:
    """What `build` makes, on `device`, with these tensors as its state dict, in the types and layouts of its own.

    It is built on torch's meta device, where nothing is allocated or drawn; constants that are no part of the state
    dict are made with device="cpu". Raises RuntimeError, as `load_state_dict` does, if the tensors do not fit.
    """
    with torch.device("meta"):
        module = build()
    own = module.state_dict()
    module.load_state_dict(
        {name: _like(own.get(name), tensor, device) for name, tensor in tensors.items()}, assign=True
    )
    if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
        module = build()  # a library's module, whose constants are made anywhere
        module.load_state_dict(tensors)
    return module.to(device)


def _like(own: Tensor | None, tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in the type and layout of `own`; a tensor that does not fit as it is, for the error message."""
    if own is None or own.shape != tensor.shape:
        return tensor
    return torch.empty_like(own, device=device).copy_(tensor)
