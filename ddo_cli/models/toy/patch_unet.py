"""PatchUNet: a small U-Net on patches, fast enough to train and to sample on a CPU."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ddo_cli.codec import PixelCodec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.likelihood import one_hot
from ddo_cli.models.norms import widened
from ddo_cli.models.registry import register
from ddo_cli.models.sides import check_side, square
from ddo_cli.trainable import Trainable

_NUM_FREQUENCIES = 16  # of the noise level's Fourier features; our choice
_MAX_FREQUENCY = 16.0  # c_noise = ln(sigma) / 4 spans about [-1.5, 1.1]: the fastest feature has 6 periods there


class PatchEncoder(Trainable):
    """The embedding of noise level and label, and the way down on patches, which discriminators have too.

    Patches are folded into channels (pixel unshuffle), so that the full resolution costs one 1x1 convolution.
    """

    frequencies: Tensor
    shrink: nn.ModuleList  # from each level to the next; made by the subclass

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        patch: int,
        widths: Sequence[int],
        depths: Sequence[int],
        emb_width: int,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or not widths:
            raise ValueError(f"widths {list(widths)} and depths {list(depths)} must be of the same length, at least 1")
        self.num_classes, self.patch = num_classes, patch
        frequencies = torch.exp(torch.linspace(0.0, math.log(_MAX_FREQUENCY), _NUM_FREQUENCIES, device="cpu"))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise_emb = nn.Linear(2 * _NUM_FREQUENCIES, emb_width)
        self.label_emb = nn.Linear(num_classes, emb_width, bias=False) if num_classes else None
        self.emb = nn.Linear(emb_width, emb_width)
        self.stem = nn.Conv2d(in_channels * patch**2, widths[0], 1)
        levels = zip(widths, depths, strict=True)
        self.encoder = nn.ModuleList(Stage(width, depth, emb_width) for width, depth in levels)

    def embedding(self, c_noise: Tensor, label: Tensor) -> Tensor:
        """(B, E) of noise levels (B,) and labels (B,)."""
        angles = c_noise[:, None] * self.frequencies  # (B, frequencies)
        emb = self.noise_emb(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.label_emb is not None:
            emb = emb + self.label_emb(one_hot(label, self.num_classes).to(emb.dtype))
        return F.silu(self.emb(F.silu(emb)))

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C p p, H/p, W/p)."""
        return F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)

    def levels(self, patches: Tensor, emb: Tensor) -> list[Tensor]:
        """What each level of the encoder leaves, (B, widths[level], side, side), finest first."""
        h = self.stem(patches)
        outputs: list[Tensor] = []
        for level, stage in enumerate(self.encoder):
            if level:
                h = self.shrink[level - 1](F.pixel_unshuffle(h, 2))
            h = stage(h, emb)
            outputs.append(h)
        return outputs


class PatchUNetOptions(DiffusionOptions):
    """Options of `patch-unet`.

    patch: side of a patch in pixels
    widths: channels of each level, finest first; each level halves the side of the one before
    depths: residual blocks of each level on the way down, and again on the way up except for the coarsest
    emb_width: width of the embedding of noise level and label
    """

    patch: int = Field(4, ge=1)
    widths: tuple[PositiveInt, ...] = (64, 96)
    depths: tuple[PositiveInt, ...] = (1, 2)
    emb_width: int = Field(128, ge=1)


class PatchUNet(PatchEncoder):
    """The raw network F of a denoiser: a convolutional U-Net whose pixels are patches.

    A stem narrower than the values of a patch cannot carry the noise that F has to predict, so the last layer also sees
    the patches themselves, scaled by a gain that depends on the noise level. There is no normalisation: residual
    branches start at zero, which keeps the training stable without it.

    size: side of the images in pixels, a multiple of patch * 2**(len(widths) - 1)
    num_classes: 0 = unconditional, labels are then ignored
    """

    adapter_targets = ("conv1", "conv2")  # it has no attention

    def __init__(
        self,
        in_channels: int,
        size: int,
        num_classes: int,
        patch: int,
        widths: Sequence[int],
        depths: Sequence[int],
        emb_width: int,
    ) -> None:
        super().__init__(in_channels, num_classes, patch, widths, depths, emb_width)
        check_side(size, patch * 2 ** (len(widths) - 1), "patch", "widths")
        folded = in_channels * patch**2
        levels = list(zip(widths, depths, strict=True))
        self.decoder = nn.ModuleList(Stage(width, depth, emb_width) for width, depth in levels[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 1) for fine, coarse in pairwise(widths))
        self.grow = nn.ModuleList(nn.Conv2d(coarse, 4 * fine, 1) for fine, coarse in pairwise(widths))

        self.affine = nn.Linear(emb_width, 2 * widths[0])
        self.gain = nn.Linear(emb_width, folded)
        self.head = nn.Conv2d(widths[0] + folded, folded, 1)
        _zero(self.head)  # F starts at 0

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F, the shape of x.

        x: float (B, C, H, W), already multiplied by c_in. c_noise: float (B,). label: int64 (B,), -1 = no label.
        """
        emb = self.embedding(c_noise, label)  # (B, E)
        patches = self.patches(x)  # (B, C p p, H/p, W/p)
        *skips, h = self.levels(patches, emb)
        for level in reversed(range(len(self.grow))):
            h = skips[level] + F.pixel_shuffle(self.grow[level](h), 2)  # (B, widths[level], double, double)
            h = self.decoder[level](h, emb)

        h = _modulate(F.silu(h), self.affine(emb))  # (B, widths[0], H/p, W/p)
        patches = patches * (1 + self.gain(emb)[:, :, None, None])  # (B, C p p, H/p, W/p)
        with torch.autocast(x.device.type, enabled=False):
            folded = self.head(torch.cat([widened(h), widened(patches)], dim=1))
        return F.pixel_shuffle(folded, self.patch)  # (B, C, H, W)

    def units(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, ResBlock)]


class Stage(nn.Module):
    """The residual blocks of one level, in one direction."""

    def __init__(self, width: int, depth: int, emb_width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(width, emb_width) for _ in range(depth))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """The shape of h, (B, width, H, W); emb: float (B, emb_width)."""
        for block in self.blocks:
            h = block(h, emb)
        return h


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the embedding scales and shifts between them, as in ADM."""

    def __init__(self, width: int, emb_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.affine = nn.Linear(emb_width, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        _zero(self.conv2)  # the block starts as the identity

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """The shape of x, (B, width, H, W); emb: float (B, emb_width)."""
        h = _modulate(self.conv1(F.silu(x)), self.affine(emb))  # (B, width, H, W)
        return x + self.conv2(F.silu(h))


def _modulate(h: Tensor, affine: Tensor) -> Tensor:
    """h (B, C, H, W) scaled by 1 + the first half of affine (B, 2 C) and shifted by the second."""
    scale, shift = affine[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
    return torch.addcmul(shift, h, 1 + scale)


def _zero(conv: nn.Conv2d) -> None:
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)


@register("patch-unet", PatchUNetOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: PatchUNetOptions, draw_options: DiffusionDrawOptions
) -> DiffusionModel:
    """A denoiser of square uint8 images. Raises ValueError for another shape."""
    channels, side = square(shape)
    net = PatchUNet(in_channels=channels, size=side, num_classes=num_classes, **options.of_network())
    net = net.to(memory_format=torch.channels_last)  # 1.5 times faster convolutions on a CPU
    return DiffusionModel(net, PixelCodec(shape), num_classes, options, draw_options)
