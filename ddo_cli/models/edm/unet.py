"""EDM's U-Net: DDPM++ and NCSN++ as trained in EDM (arXiv 2206.00364; 2011.13456, appendix H).

The same tensors as the published weights under names of our own; `edm.keys` translates them.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ddo_cli.codec import PixelCodec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.likelihood import one_hot
from ddo_cli.models.norms import GroupNorm, widened
from ddo_cli.models.registry import register
from ddo_cli.models.sides import check_side, square

_NORM_EPS = 1e-6  # of every GroupNorm
_FOURIER_SCALE = 16.0  # standard deviation of NCSN++'s frequencies
_MAX_PERIOD = 10000.0  # of DDPM++'s
_BRANCH_GAIN = 1e-5  # of the last layer of a branch: a block starts as its skip path
_QKV_GAIN = math.sqrt(0.2)

Resampling = Literal["", "up", "down", "fused-down"]


class EdmUnetOptions(DiffusionOptions):
    """The defaults are EDM's DDPM++ for CIFAR-10, except for dropout; NCSN++ is fourier, residual, [1, 3, 3, 1].

    channels: of the first convolution; level i has channels * channel_mult[i], finest first
    channel_mult_emb, channel_mult_noise: width of the embedding and of the noise level's features, in `channels`
    num_blocks: residual blocks of a level on the way down; one more on the way up
    attn_resolutions: sides at which blocks attend: all on the way down, the last of the level on the way up
    dropout: share of activations dropped in each block, in train mode only
    augment_dim: width of the augmentation labels that the network was trained with (0: none)
    embedding, encoder: features of the noise level; whether the image itself enters at each level of the encoder
    resample_filter: taps of the low-pass filter of each halving and doubling, an even number of them
    """

    channels: int = Field(128, ge=4)
    channel_mult: tuple[PositiveInt, ...] = Field((2, 2, 2), min_length=1)
    channel_mult_emb: int = Field(4, ge=1)
    channel_mult_noise: int = Field(1, ge=1)
    num_blocks: int = Field(4, ge=1)
    attn_resolutions: tuple[PositiveInt, ...] = (16,)
    dropout: float = Field(0.0, ge=0, lt=1)  # 0.13 in EDM's training; 0 here, as model and reference share their draw
    augment_dim: int = Field(9, ge=0)
    embedding: Literal["positional", "fourier"] = "positional"
    encoder: Literal["standard", "residual"] = "standard"
    resample_filter: tuple[PositiveInt, ...] = Field((1, 1), min_length=2)


class EdmUnet(nn.Module):
    """The raw network F.

    size: side of the images in pixels, a multiple of 2**(len(channel_mult) - 1)
    num_classes: 0 = unconditional, labels are then ignored
    """

    adapter_targets = ("qkv", "proj")

    def __init__(
        self, in_channels: int, out_channels: int, size: int, num_classes: int, options: EdmUnetOptions
    ) -> None:
        super().__init__()
        channels, channel_mult, resample_filter = options.channels, options.channel_mult, options.resample_filter
        check_side(size, 2 ** (len(channel_mult) - 1), "channel_mult")
        if len(resample_filter) % 2 or not resample_filter:
            raise ValueError(f"resample_filter {list(resample_filter)} must have an even number of taps, at least 2")
        if channels % 4:
            raise ValueError(f"channels = {channels} must be a multiple of 4")
        self.num_classes, self.augment_dim = num_classes, options.augment_dim

        noise_width, emb_width = channels * options.channel_mult_noise, channels * options.channel_mult_emb
        features = FourierFeatures if options.embedding == "fourier" else SineFeatures
        self.noise_features = features(noise_width)
        self.label_emb = nn.Linear(num_classes, noise_width) if num_classes else None
        self.augment_emb = nn.Linear(self.augment_dim, noise_width, bias=False) if self.augment_dim else None
        self.emb0 = nn.Linear(noise_width, emb_width)
        self.emb1 = nn.Linear(emb_width, emb_width)
        block = partial(Block, emb_width=emb_width, options=options)

        self.encoder = nn.ModuleDict()  # "32": {"stem", "block0", ...}, finest first
        width, aux_width = channels, in_channels
        skip_widths = []
        for level, mult in enumerate(channel_mult):
            parts, side = nn.ModuleDict(), size >> level
            if level == 0:
                parts["stem"] = nn.Conv2d(in_channels, channels, 3, padding=1)
            else:
                parts["down"] = block(width, width, "down")
                if options.encoder == "residual":
                    parts["aux"] = ResampledConv(aux_width, width, 3, "fused-down", resample_filter)
                    aux_width = width
            skip_widths.append(width)
            for i in range(options.num_blocks):
                parts[f"block{i}"] = block(width, channels * mult, attends=side in options.attn_resolutions)
                width = channels * mult
                skip_widths.append(width)
            self.encoder[str(side)] = parts

        self.decoder = nn.ModuleDict()  # "8": {"in0", "in1", "block0", ...}, coarsest first
        for level, mult in reversed(list(enumerate(channel_mult))):
            parts, side = nn.ModuleDict(), size >> level
            if level == len(channel_mult) - 1:
                parts["in0"] = block(width, width, attends=True)
                parts["in1"] = block(width, width)
            else:
                parts["up"] = block(width, width, "up")
            for i in range(options.num_blocks + 1):
                attends = i == options.num_blocks and side in options.attn_resolutions
                parts[f"block{i}"] = block(width + skip_widths.pop(), channels * mult, attends=attends)
                width = channels * mult
            self.decoder[str(side)] = parts
        self.head_norm = _norm(width)
        self.head = nn.Conv2d(width, out_channels, 3, padding=1)
        self._initialise()

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        """F, the shape of x.

        x: float (B, C, H, W), already multiplied by c_in. c_noise: float (B,). label: int64 (B,), -1 = no label.
        augment: float (B, augment_dim), what was done to x; None = nothing, the same as zeros.
        """
        emb = self.noise_features(c_noise)  # (B, N)
        if self.label_emb is not None:
            emb = emb + self.label_emb(one_hot(label, self.num_classes).to(emb.dtype) * math.sqrt(self.num_classes))
        if self.augment_emb is not None:  # zeros and not left out: DDP wants each parameter to have a gradient
            emb = emb + self.augment_emb(emb.new_zeros(len(emb), self.augment_dim) if augment is None else augment)
        emb = F.silu(self.emb1(F.silu(self.emb0(emb))))  # (B, E)

        aux = x
        skips: list[Tensor] = []
        for parts in self.encoder.values():
            for name, part in parts.named_children():
                if name == "aux":
                    x = aux = (x + part(aux)) * math.sqrt(0.5)
                    skips[-1] = x  # replaces what "down" left
                else:
                    x = part(x) if name == "stem" else part(x, emb)  # (B, width, side, side)
                    skips.append(x)
        for parts in self.decoder.values():
            for name, part in parts.named_children():
                if name.startswith("block"):
                    x = torch.cat([x, skips.pop()], dim=1)
                x = part(x, emb)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(F.silu(self.head_norm(widened(x))))  # (B, C, H, W)

    def units(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def _initialise(self) -> None:
        """Xavier-uniform weights and zero biases; the last layer of every branch is close to zero."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                last = name.rpartition(".")[2]
                gain = {"conv1": _BRANCH_GAIN, "proj": _BRANCH_GAIN, "head": _BRANCH_GAIN, "qkv": _QKV_GAIN}
                nn.init.xavier_uniform_(module.weight, gain.get(last, 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _norm(width: int) -> GroupNorm:
    return GroupNorm(min(32, width // 4), width, eps=_NORM_EPS)


# --- Features of the noise level, [sin, cos]


class SineFeatures(nn.Module):
    """DDPM++: `width` features at fixed frequencies from 1 down to 1/10000."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, c_noise: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        half = self.width // 2
        exponents = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - 1)
        angles = c_noise[:, None] * _MAX_PERIOD**-exponents  # (B, width / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierFeatures(nn.Module):
    """NCSN++: `width` features at random frequencies, which are part of the weights."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2) * _FOURIER_SCALE)

    def forward(self, c_noise: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        angles = c_noise[:, None] * (2 * math.pi * self.frequencies)  # (B, width / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


# --- Blocks


class Block(nn.Module):
    """Residual block, with attention after it where it attends. Sums of two terms are divided by sqrt(2)."""

    def __init__(
        self,
        in_width: int,
        width: int,
        resampling: Resampling = "",
        attends: bool = False,
        *,
        emb_width: int,
        options: EdmUnetOptions,
    ) -> None:
        super().__init__()
        self.dropout, resample_filter = options.dropout, options.resample_filter
        self.norm0 = _norm(in_width)
        self.conv0 = ResampledConv(in_width, width, 3, resampling, resample_filter)
        self.affine = nn.Linear(emb_width, width)
        self.norm1 = _norm(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        changes = in_width != width or bool(resampling)
        self.skip = ResampledConv(in_width, width, 1, resampling, resample_filter) if changes else None
        self.attention = Attention(width) if attends else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, in_width, H, W) -> (B, width, H', W'); emb: float (B, emb_width)."""
        h = self.conv0(F.silu(self.norm0(x)))  # (B, width, H', W')
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        return x if self.attention is None else (x + self.attention(x)) * math.sqrt(0.5)


class Attention(nn.Module):
    """The attention branch: one head over all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)  # output channel 3 c + {0: query, 1: key, 2: value}
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The shape of x, (B, width, H, W)."""
        b, c, h, w = x.shape
        # (3, B, 1, H W, C), channels innermost: the fused kernels take no other layout.
        parts = self.qkv(self.norm(x)).view(b, 1, c, 3, h * w).permute(3, 0, 1, 4, 2).contiguous()
        q, k, v = parts.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H W, C), divides by sqrt(C)
        return self.proj(out.transpose(2, 3).reshape(b, c, h, w))


class ResampledConv(nn.Conv2d):
    """A convolution after doubling or halving the side with a low-pass filter; plain where resampling is "".

    "fused-down" convolves first, on an image padded for both, and halves then: NCSN++'s way for the image that enters
    the encoder. It differs from the other order at the borders.
    """

    resample_filter: Tensor

    def __init__(
        self, in_width: int, width: int, kernel: int, resampling: Resampling, resample_filter: Sequence[int]
    ) -> None:
        super().__init__(in_width, width, kernel, padding=kernel // 2)
        self.resampling = resampling
        if resampling:
            taps = torch.tensor(list(resample_filter), dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(taps, taps) / taps.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_width, H, W) -> (B, width, H', W')."""
        if not self.resampling:
            return super().forward(x)
        pad = (self.resample_filter.shape[-1] - 1) // 2
        if self.resampling == "fused-down":
            x = F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2 + pad)  # (B, width, H + 2 pad, W + 2 pad)
            return F.conv2d(x, self._depthwise(x), self.bias, stride=2, groups=x.shape[1])
        if self.resampling == "up":
            x = F.conv_transpose2d(x, 4 * self._depthwise(x), stride=2, padding=pad, groups=x.shape[1])
        else:
            x = F.conv2d(x, self._depthwise(x), stride=2, padding=pad, groups=x.shape[1])
        return super().forward(x)

    def _depthwise(self, x: Tensor) -> Tensor:
        """The filter once per channel of x, (C, 1, k, k)."""
        return self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)


@register("edm-unet", EdmUnetOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: EdmUnetOptions, draw_options: DiffusionDrawOptions
) -> DiffusionModel:
    """A denoiser of square uint8 images. Raises ValueError for another shape."""
    channels, side = square(shape)
    net = EdmUnet(channels, channels * (2 if options.learned_variance else 1), side, num_classes, options)
    return DiffusionModel(net, PixelCodec(shape), num_classes, options, draw_options)
