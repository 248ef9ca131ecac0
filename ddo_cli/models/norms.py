"""Group normalisation in the type of its input, and the type of output heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """torch's, with the type of x under autocast too, where CUDA would compute and return float32.

    The kernels sum in float32 whatever the type; casting activations forth and back is a third of a U-Net's traffic.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The shape and type of x, (B, C, ...)."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def widened(x: Tensor) -> Tensor:
    """x in float32, or in its own type where that is wider: what output heads compute in, whatever autocast says."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
