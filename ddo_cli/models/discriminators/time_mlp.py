"""TimeMlp: a discriminator of points, the paper's toy network (arXiv 2211.17091, section 5.1)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddo_cli.diffusion import vp_sde
from ddo_cli.likelihood import Options, one_hot
from ddo_cli.models.discriminators.registry import register
from ddo_cli.trainable import Trainable

_NUM_FREQUENCIES = 6  # cos and sin of k ln(sigma) / 4, k = 1..6; our choice, the paper gives none


class TimeMlpOptions(Options):
    """Options of `time-mlp`; the defaults are the paper's four layers of 256 units."""

    width: int = Field(256, ge=1)
    depth: int = Field(4, ge=1)  # hidden layers


class TimeMlp(Trainable):
    """One logit per point. num_classes: 0 = labels are ignored."""

    frequencies: Tensor

    def __init__(self, *, dim: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        frequencies = torch.arange(1.0, _NUM_FREQUENCIES + 1, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)
        inputs = dim + 2 * _NUM_FREQUENCIES + num_classes
        self.hidden = nn.ModuleList(nn.Linear(width if i else inputs, width) for i in range(depth))
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)  # untrained, the logit is 0: no guidance at all
        nn.init.zeros_(self.head.bias)

    def forward(self, x_vp: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """(B,). x_vp: float (B, d) in VP coordinates; t: (B,); label: int64 (B,), -1 = none."""
        dtype = self.head.weight.dtype
        angles = (vp_sde.sigma_of(t).log() / 4).to(dtype)[:, None] * self.frequencies
        inputs = [x_vp.to(dtype), angles.cos(), angles.sin()]
        if self.num_classes:
            inputs.append(one_hot(label, self.num_classes).to(dtype))
        h = torch.cat(inputs, dim=1)
        for layer in self.hidden:
            h = F.silu(layer(h))  # (B, width); smooth, so that guided densities have a divergence
        with torch.autocast(h.device.type, enabled=False):
            return self.head(h.to(dtype)).squeeze(1)


@register("time-mlp", TimeMlpOptions)
def build(shape: tuple[int, ...], num_classes: int, options: TimeMlpOptions) -> TimeMlp:
    """A discriminator of points (d,). Raises ValueError for any other shape."""
    if len(shape) != 1:
        raise ValueError("it needs points of shape (d,); images need discriminator.name = time-encoder")
    return TimeMlp(dim=shape[0], num_classes=num_classes, **options.model_dump())
