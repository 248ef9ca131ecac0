"""Encoder and decoder of VAR's tokenizer, in the layout of latent diffusion (arXiv 2112.10752): images <-> latents."""

import contextlib
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli.models.norms import GroupNorm
from ddo_cli.precision import inference_precision

NORM_EPS = 1e-6
# Names of the convolutions outside of residual branches: the whole signal passes them.
STREAM = ("conv_in", "conv_out", "resample", "shortcut", "quant_conv", "post_quant_conv")


class Encoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> (B, z, h, w), each level but the last halving the side."""

    def __init__(self, image_channels: int, widths: Sequence[int], num_blocks: int, groups: int, z_channels: int):
        """widths: of the levels, from the images' size down; num_blocks: residual ones per level."""
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                [widths[max(level - 1, 0)]] + [width] * num_blocks,
                groups,
                attends=level == last,
                resample=Downsample(width, width, 3, stride=2) if level < last else nn.Identity(),
            )
            for level, width in enumerate(widths)
        )
        self.middle = middle(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, z, h, w)."""
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Latents -> images, with one more residual block per level; `up[l]` has the size of the encoder's `down[l]`."""

    def __init__(self, image_channels: int, widths: Sequence[int], num_blocks: int, groups: int, z_channels: int):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], groups)
        self.up = nn.ModuleList(
            Level(
                [widths[min(level + 1, last)]] + [width] * (num_blocks + 1),
                groups,
                attends=level == last,
                resample=Upsample(width, width, 3, padding=1) if level else nn.Identity(),
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = GroupNorm(groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W), which may leave [-1, 1]."""
        h = self.middle(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# --- Pieces


class Level(nn.Module):
    """Residual blocks at one size, at the smallest each followed by attention, and the step to the next size."""

    def __init__(self, widths: Sequence[int], groups: int, attends: bool, resample: nn.Module):
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(Residual(before, after, groups) for before, after in pairs)
        self.attn = nn.ModuleList(Attention(after, groups) for _, after in pairs if attends)
        self.resample = resample

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return self.resample(h)


def middle(width: int, groups: int) -> nn.Sequential:
    """The blocks at the smallest size, between the levels of encoder or decoder."""
    return nn.Sequential(Residual(width, width, groups), Attention(width, groups), Residual(width, width, groups))


class Residual(nn.Module):
    """h + conv(silu(norm(conv(silu(norm(h)))))); a 1x1 convolution of h where the width changes."""

    def __init__(self, before: int, after: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, before, NORM_EPS)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = GroupNorm(groups, after, NORM_EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, before, h, w) -> (B, after, h, w)."""
        inner = self.conv1(F.silu(self.norm1(h)))
        return self.shortcut(h) + self.conv2(F.silu(self.norm2(inner)))


class Attention(nn.Module):
    """Self-attention of one head over all positions; queries, keys and values are consecutive thirds of `qkv`."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, width, NORM_EPS)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Same shape as h, (B, C, h, w)."""
        # (3, B, 1, h w, C), channels innermost: the fused kernels take no other layout.
        parts = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, 1, -1)).permute(1, 0, 2, 4, 3).contiguous()
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0]  # (B, h w, C)
        return h + self.out(mixed.transpose(1, 2).reshape(h.shape))


class Downsample(nn.Conv2d):
    """Half the side: a row and a column of zeros on the right and below only, then a strided convolution."""

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, 2h, 2w) -> (B, C, h, w)."""
        return super().forward(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the side: each value four times, then a convolution."""

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return super().forward(F.interpolate(h, scale_factor=2.0, mode="nearest"))


def start_as_identity(model: nn.Module) -> None:
    """Initialises each convolution of STREAM as the identity, on as many channels as fit.

    About ten of them follow one another. With torch's initialisation their product nearly loses the directions in
    which images vary least, and reconstructions stay grey for a long time.
    """
    for name, conv in model.named_modules():
        if name.rpartition(".")[2] in STREAM and isinstance(conv, nn.Conv2d):
            nn.init.dirac_(conv.weight)
            assert conv.bias is not None, "all have one"
            nn.init.zeros_(conv.bias)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Float32 without TensorFloat-32 inside, whatever the run's precision: tokens decide by small differences."""
    return inference_precision("float32", device)
