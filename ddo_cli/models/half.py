"""Weights of a frozen base in bf16: half the memory, and nothing else is changed but their rounding.

Linear maps and convolutions compute in float32 with weights that are upcast while they are used; under autocast they
are taken as they are. Of a frozen layer y = W x + b the backward pass needs W alone, dL/dx = W^T dL/dy, so that what
is kept for it is the stored weight and not its float32 copy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STORED = "weight_bf16"


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        stride, padding, dilation, groups = settings
        output_padding = [0] * len(stride)
        return torch.convolution(x, weight.to(x.dtype), bias, stride, padding, dilation, False, output_padding, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        like = grad.new_empty(1).expand(ctx.shape)  # of the input its shape alone is read
        found = torch.ops.aten.convolution_backward(
            grad, like, weight.to(grad.dtype), None, stride, padding, dilation, False, [0] * len(stride), groups,
            (True, False, False),
        )  # fmt: skip
        return found[0], None, None, None


class _Half:
    """A layer whose `weight` is made from the stored one when it is read."""

    @property
    def weight(self) -> Tensor:
        return getattr(self, STORED).float()

    def _is_cast(self, x: Tensor) -> bool:
        return torch.is_autocast_enabled(x.device.type)


class HalfLinear(_Half, nn.Linear):  # type: ignore[override]
    """nn.Linear with a frozen weight in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        stored = getattr(self, STORED)
        if self._is_cast(x):
            return F.linear(x, stored, self.bias)
        found: Tensor = _FrozenLinear.apply(x, stored, self.bias)
        return found


class _HalfConv(_Half):
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    _conv_forward: Any

    def forward(self, x: Tensor) -> Tensor:
        stored, settings = getattr(self, STORED), (self.stride, self.padding, self.dilation)
        if self._is_cast(x):
            cast: Tensor = self._conv_forward(x, stored, self.bias)
            return cast
        found: Tensor = _FrozenConv.apply(x, stored, self.bias, (*settings, self.groups))
        return found


class HalfConv1d(_HalfConv, nn.Conv1d):  # type: ignore[override]
    """nn.Conv1d with a frozen weight in bf16."""


class HalfConv2d(_HalfConv, nn.Conv2d):  # type: ignore[override]
    """nn.Conv2d with a frozen weight in bf16."""


class HalfConv3d(_HalfConv, nn.Conv3d):  # type: ignore[override]
    """nn.Conv3d with a frozen weight in bf16."""


_KINDS: dict[type, type] = {
    nn.Linear: HalfLinear, nn.Conv1d: HalfConv1d, nn.Conv2d: HalfConv2d, nn.Conv3d: HalfConv3d
}  # fmt: skip


def keep(model: nn.Module) -> int:
    """Stores the frozen weights of linear maps and convolutions in bf16; returns how many. Others are left alone."""
    count = 0
    for module in model.modules():
        kind, weight = _KINDS.get(type(module)), module._parameters.get("weight")
        is_odd = (
            isinstance(getattr(module, "padding", None), str) or getattr(module, "padding_mode", "zeros") != "zeros"
        )
        if kind is None or is_odd or weight is None or weight.requires_grad or weight.dtype != torch.float32:
            continue
        del module._parameters["weight"]
        module.__class__ = kind
        module.register_parameter(STORED, nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False))
        count += 1
    return count
