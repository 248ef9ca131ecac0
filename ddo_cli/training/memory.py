"""Memory and floating-point operations of a computation that is not carried out: run on tensors without content.

Each operation yields fake tensors of the right shape, type and device, whose storages are counted while they live. So
the peak is exact for what torch allocates, whatever the network does; what kernels allocate inside (workspaces of
convolutions, reordered weights) and what an allocator keeps in reserve is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Cost(NamedTuple):
    """What a computation takes beyond the tensors that were there before."""

    peak: int  # most bytes alive at once
    saved: int  # bytes kept for the backward pass at once, without weights
    flops: int  # a multiplication and an addition are two


@contextlib.contextmanager
def imagined() -> Iterator[None]:
    """Inside, tensors have no content. Real ones are taken as they are, such as tables of noise levels."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def without_content(module: nn.Module, device: torch.device) -> None:
    """Puts the weights of a module built on the meta device onto `device`, without content; inside `imagined`."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = moved(buffer)


def cost(computation: Callable[[], Any], *modules: nn.Module) -> Cost:
    """The cost of `computation`, inside `imagined`. modules: whose weights are not counted as saved."""
    weights = {tensor.untyped_storage()._cdata for module in modules for tensor in _tensors(module)}
    live, kept = _Live(weights), _Bytes(weights)

    def keep(tensor: Tensor) -> _Kept:
        kept.add(tensor)
        return _Kept(tensor)

    with live, torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        computation()
    return Cost(live.bytes.peak, kept.peak, live.flops)


def size(*tensors: Tensor) -> int:
    """Bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class _Kept:
    """A tensor held for the backward pass; autograd drops it when that part of the pass is done."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _Bytes:
    """Bytes of the storages that are alive, each counted once, and their maximum. ignored: storages not counted."""

    def __init__(self, ignored: set[int]) -> None:
        self.now = self.peak = 0
        self.known = set(ignored)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _Live(TorchDispatchMode):
    """Counts the storages that operations make, and what they compute."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.bytes = _Bytes(ignored)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Not through FlopCounterMode: its hooks on modules keep recomputed activations alive.
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.bytes.add(leaf)
        return out
