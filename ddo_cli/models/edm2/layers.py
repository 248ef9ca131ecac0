"""Magnitude-preserving building blocks: unit variance in, unit variance out (EDM2, arXiv 2312.02696, appendix B).

Equation numbers are the paper's. "Magnitude" is the root mean square of a tensor's elements.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-4  # added to a magnitude before dividing by it
_SILU_MAGNITUDE = 0.596  # of silu(n), n standard normal


def normalize(x: Tensor, dim: Sequence[int] | int | None = None) -> Tensor:
    """x / (rms + 1e-4), of x's shape and type; the rms over `dim`, by default all but the first (eq. 21 and 66).

    The rms has float32's precision or x's own. That eps is added to it, and not to its square, is part of the published
    networks.
    """
    dims = list(range(1, x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    size = math.prod([x.shape[d] for d in dims])
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=_wide(x))
    return x / (norm / math.sqrt(size) + _EPS).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596 (eq. 81)."""
    return F.silu(x) / _SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2): `b` weighs t (eq. 88)."""
    norm = math.hypot(1 - t, t)
    # Not add(..., alpha=t): where b is a matrix product, inductor fuses them and drops alpha (torch 2.11 and 2.14).
    return a * ((1 - t) / norm) + b * (t / norm)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Channels of a, then those of b, scaled so that each input gives half of the squared magnitude (eq. 103, t = 1/2).

    a: (B, Na, H, W); b: (B, Nb, H, W).
    """
    scale = math.sqrt((a.shape[1] + b.shape[1]) / 2)
    return torch.cat([a * (scale / math.sqrt(a.shape[1])), b * (scale / math.sqrt(b.shape[1]))], dim=1)


class MPFourier(nn.Module):
    """sqrt(2) cos(c freqs + phases): random features of a number, part of the weights (eq. 75).

    Frequencies are those of a standard normal, phases uniform, both times 2 pi.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, c: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        return math.sqrt(2) * (c[:, None] * self.freqs + self.phases).cos()


class MPConv(nn.Module):
    """Convolution or linear map whose filters have norm `gain`, whatever is stored (eq. 47). No bias.

    kernel: side of the filters; None: linear.
    """

    def __init__(self, in_width: int, width: int, kernel: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((width, in_width, kernel, kernel) if kernel else (width, in_width)))
        self.fan_in = self.weight[0].numel()

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """(B, in_width) -> (B, width), or (B, in_width, H, W) -> (B, width, H, W). gain: a number or one element."""
        weight = normalize(self.weight.to(_wide(self.weight))) * (gain / math.sqrt(self.fan_in))
        if weight.ndim == 2:
            return F.linear(x, weight.to(x.dtype))
        # Filters with channels innermost lead a GPU to give all activations that layout, in which its tensor cores
        # compute; the CPU's convolutions are as fast in either.
        layout = torch.channels_last if x.is_cuda else torch.preserve_format
        return F.conv2d(x, weight.to(x.dtype, memory_format=layout), padding=weight.shape[-1] // 2)


@torch.no_grad()
def force_norms(layers: Sequence[MPConv]) -> None:
    """Overwrites the layers' stored filters by their normalized selves (eq. 66), as `normalize` gives them.

    The gradient is orthogonal to a filter, so steps make it longer and the effective learning rate smaller unless its
    length is put back. What a layer computes stays the same up to the eps of `normalize`. Rows are independent: a shard
    of whole rows, as FSDP2 keeps, is normalized where it lies. For all layers together, since there are hundreds: on a
    GPU two kernels for each, which read or change it in place, and two for all.
    """
    if not layers:
        return
    weights = [layer.weight for layer in layers]
    local = [weight.to_local() if hasattr(weight, "to_local") else weight.data for weight in weights]
    norms = [torch.linalg.vector_norm(x, dim=list(range(1, x.ndim)), keepdim=True, dtype=_wide(x)) for x in local]
    torch._foreach_div_(norms, [math.sqrt(layer.fan_in) for layer in layers])
    torch._foreach_add_(norms, _EPS)
    torch._foreach_div_(local, norms)
