"""MLP: a small denoiser of points, for toy data in few dimensions."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddo_cli.codec import Codec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.likelihood import one_hot
from ddo_cli.models.norms import widened
from ddo_cli.models.registry import register


class MlpOptions(DiffusionOptions):
    """Options of `mlp`. The defaults are small: it underfits on purpose, so that DDO has something to improve."""

    width: int = Field(32, ge=1)  # of every hidden layer
    depth: int = Field(3, ge=1)  # hidden layers


class MLP(nn.Module):
    """The raw network F of a denoiser of points; each hidden layer is shifted by the noise level and the label.

    dim: coordinates of a point
    num_classes: 0 = unconditional, labels are then ignored
    """

    frequencies: Tensor

    adapter_targets = ("hidden",)

    def __init__(self, *, dim: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        frequencies = torch.arange(1, NUM_FREQUENCIES + 1, device="cpu") * FREQ_STEP
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.stem = nn.Linear(dim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.shifts = nn.ModuleList(nn.Linear(2 * NUM_FREQUENCIES + num_classes, width) for _ in range(depth))
        self.head = nn.Linear(width, dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F, the shape of x (B, d). c_noise: float (B,). label: int64 (B,), -1 = no label."""
        angles = c_noise[:, None] * self.frequencies
        condition = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 2 frequencies)
        if self.num_classes:
            condition = torch.cat([condition, one_hot(label, self.num_classes).to(x.dtype)], dim=1)
        h = F.silu(self.stem(x) + self.shifts[0](condition))  # (B, width)
        for layer, shift in zip(self.hidden, self.shifts[1:], strict=True):
            h = F.silu(layer(h) + shift(condition))
        with torch.autocast(h.device.type, enabled=False):
            return self.head(widened(h))


# c_noise = log(sigma) / 4 lies in [-1.6, 1.1] for EDM's noise levels: the slowest wave does not repeat in that range.
NUM_FREQUENCIES = 4
FREQ_STEP = 1.0


@register("mlp", MlpOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: MlpOptions, draw_options: DiffusionDrawOptions
) -> DiffusionModel:
    """A denoiser of points of shape (d,). Raises ValueError for any other shape."""
    if len(shape) != 1:
        raise ValueError("mlp models points of shape (d,); images need patch-unet or pixel-transformer")
    net = MLP(dim=shape[0], num_classes=num_classes, **options.of_network())
    return DiffusionModel(net, Codec(shape), num_classes, options, draw_options)
