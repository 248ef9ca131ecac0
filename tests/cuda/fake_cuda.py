"""A CUDA device for tests on machines without one: its tensors have shape, type and place, but no content.

Tensors of the CPU are real. Devices that do not fit and types that do not fit raise errors, as they would on a GPU;
what would wait for the GPU is written down.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
needs_cuda_support = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch was built without CUDA, so it cannot check its devices"
)

# Kernels that take a scalar of the CPU as an argument of their launch. Others refuse it, or copy it and wait.
_TAKE_NUMBERS = {
    "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "eq", "ne", "lt", "le", "gt", "ge", "maximum",
    "minimum", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "masked_fill", "masked_fill_", "fill", "fill_",
}  # fmt: skip


class FakeCuda(TorchDispatchMode):
    """Answers every call of a kernel: by the kernel where all tensors are real, by its shapes where one is fake.

    waits: for what the CPU would have waited, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        name = func.overloadpacket.__name__
        if name == "is_pinned":
            return any(args[0] is pinned for pinned in self._pinned)
        if name in ("_pin_memory", "pin_memory"):
            with unset_fake_temporarily():
                self._pinned.append(args[0].clone())
            return self._pinned[-1]
        to_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not fake and not to_cuda:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.waits.append("item")
            # True: what is asked of whole batches is whether they are finite.
            return True if args[0].dtype is torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        if name in ("_to_copy", "copy_", "copy"):
            return self._copy(func, name, args, kwargs, fake)
        if len(fake) < len(tensors) and name not in _TAKE_NUMBERS:
            self.waits.append(f"{name} with a tensor of the CPU")
        return func(*args, **kwargs)  # by the fake mode beneath

    def _copy(self, func, name, args, kwargs, fake):
        target, source = (args[0], args[1]) if name != "_to_copy" else (None, args[0])
        device = kwargs.get("device") or (source if target is None else target).device
        if isinstance(source, FakeTensor) and torch.device(device).type == "cpu":
            self.waits.append("copy to the CPU")
            with unset_fake_temporarily():
                ones = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                return ones if target is None else target.copy_(ones)
        if not isinstance(source, FakeTensor):  # to the GPU
            is_pinned = any(source is pinned for pinned in self._pinned)
            non_blocking = kwargs.get("non_blocking") or (target is not None and args[2:] == (True,))
            if not (is_pinned and non_blocking):
                self.waits.append("copy from the CPU")
        return func(*args, **kwargs)


def _gradient(outputs, inputs, *_, **__):
    """The gradients' shapes: a real backward pass asks the driver for a stream."""
    return tuple(torch.empty_like(one) for one in (inputs if isinstance(inputs, (list, tuple)) else [inputs]))


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, the device "cuda" exists, and so do its autocast and pinned memory."""
    found = FakeCuda()
    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        # Which kernel a convolution takes is asked of cuDNN, and so of the driver.
        mock.patch.object(torch._C, "_select_conv_backend", return_value=torch._C._ConvBackend.Cudnn),
        mock.patch.object(torch.autograd, "grad", _gradient),
        FakeTensorMode(allow_non_fake_inputs=True),
        found,
    ):
        yield found
