"""EDM2's magnitude-preserving U-Net (arXiv 2312.02696, figure 21), of pixels or of latents.

Tensors have the published names, with "net." for "unet."; scalar gains are stored with shape (1,), since FSDP2 shards
the first dimension.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ddo_cli.codec import Codec, PixelCodec
from ddo_cli.diffusion.denoiser import DiffusionDraw, DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.likelihood import one_hot
from ddo_cli.models.edm2.layers import MPConv, MPFourier, force_norms, mp_cat, mp_silu, mp_sum, normalize
from ddo_cli.models.norms import widened
from ddo_cli.models.registry import register
from ddo_cli.models.sides import check_side, square
from ddo_cli.models.vae_codec import DEFAULT_VAE, StabilityCodec

_RESIDUAL_BALANCE = 0.3  # weight of a residual or attention branch in its sum
_LABEL_BALANCE = 0.5
_LARGEST = 256.0  # activations are clipped here at the end of each block
_LOGVAR_WIDTH = 128

Resampling = Literal["", "up", "down"]


class Edm2Options(DiffusionOptions):
    """Options of `edm2-unet`. Defaults: EDM2-S for images of 64 x 64, except for dropout.

    width: channels of level i are width * channel_mult[i], finest first; the embedding has as many as the widest
    num_blocks: residual blocks of a level on the way down; one more on the way up
    attn_resolutions: sides at which blocks attend, both ways; the first of the way up always does
    head_width: channels of an attention head
    dropout: share of activations dropped in each block, in train mode only
    codec: what the network sees: pixels, or latents of Stability's autoencoder, 4 channels and an eighth of the side.
    vae: name or folder of the autoencoder.
    """

    width: int = Field(192, ge=1)
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 3, 4), min_length=1)
    num_blocks: int = Field(3, ge=1)
    attn_resolutions: tuple[PositiveInt, ...] = (16, 8)
    head_width: int = Field(64, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)  # 0.1 in the training of M and larger; 0 here: DDO's r needs it off
    codec: Literal["rgb", "sd-vae"] = "rgb"
    vae: str = Field(DEFAULT_VAE, min_length=1)


class Edm2Unet(nn.Module):
    """The raw network F.

    size: side of the state, a multiple of 2**(len(channel_mult) - 1)
    num_classes: 0 = unconditional, labels are then ignored
    """

    adapter_targets = ("attn_qkv", "attn_proj")

    def __init__(self, in_channels: int, out_channels: int, size: int, num_classes: int, options: Edm2Options) -> None:
        super().__init__()
        check_side(size, 2 ** (len(options.channel_mult) - 1), "channel_mult")
        self.num_classes = num_classes
        widths = [options.width * mult for mult in options.channel_mult]
        emb_width = max(widths)
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], emb_width)
        self.emb_label = MPConv(num_classes, emb_width) if num_classes else None
        block = partial(Block, emb_width=emb_width, options=options)

        self.enc = nn.ModuleDict()  # "64x64_conv", "64x64_block0", ..., "32x32_down", ...
        current, skip_widths = widths[0], []
        for level, level_width in enumerate(widths):
            side = size >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = MPConv(in_channels + 1, current, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(current, current, "enc", "down")
            skip_widths.append(current)
            for i in range(options.num_blocks):
                attends = side in options.attn_resolutions
                self.enc[f"{side}x{side}_block{i}"] = block(current, level_width, "enc", attends=attends)
                current = level_width
                skip_widths.append(current)

        self.dec = nn.ModuleDict()  # "8x8_in0", "8x8_in1", "8x8_block0", ..., "16x16_up", ...
        for level, level_width in reversed(list(enumerate(widths))):
            side = size >> level
            if level == len(widths) - 1:
                self.dec[f"{side}x{side}_in0"] = block(current, current, "dec", attends=True)
                self.dec[f"{side}x{side}_in1"] = block(current, current, "dec")
            else:
                self.dec[f"{side}x{side}_up"] = block(current, current, "dec", "up")
            for i in range(options.num_blocks + 1):
                joint, attends = current + skip_widths.pop(), side in options.attn_resolutions
                self.dec[f"{side}x{side}_block{i}"] = block(joint, level_width, "dec", attends=attends)
                current = level_width
        self.out_conv = MPConv(current, out_channels, 3)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F, the shape of x.

        x: float (B, C, H, W), already multiplied by c_in. c_noise: float (B,). label: int64 (B,), -1 = no label.
        """
        with torch.autocast(x.device.type, enabled=False):  # small, and float32 in the published half-precision runs
            emb = self._embed(c_noise.to(torch.float32), label)  # (B, E)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # (B, C + 1, H, W): the constant stands in for biases
        skips: list[Tensor] = []
        for name, part in self.enc.items():
            x = part(x) if name.endswith("_conv") else part(x, emb)  # (B, width, side, side)
            skips.append(x)
        for name, part in self.dec.items():
            x = part(mp_cat(x, skips.pop()) if "_block" in name else x, emb)
        with torch.autocast(x.device.type, enabled=False):
            return self.out_conv(widened(x), self.out_gain)  # (B, C, H, W)

    def _embed(self, c_noise: Tensor, label: Tensor) -> Tensor:
        """Embedding of noise level and label, (B, E). Without a label the noise level's share stays as it is."""
        emb: Tensor = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            classes = one_hot(label, self.num_classes).to(emb.dtype) * math.sqrt(self.num_classes)  # (B, K)
            emb = mp_sum(emb, self.emb_label(classes), _LABEL_BALANCE)
        return mp_silu(emb)


class Block(nn.Module):
    """Residual block, with attention after it where it attends.

    On the way down (half "enc") the widths are made equal and each pixel normalized before the branch leaves; on the
    way up the branch sees the joint channels as they are.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        half: Literal["enc", "dec"],
        resampling: Resampling = "",
        attends: bool = False,
        *,
        emb_width: int,
        options: Edm2Options,
    ) -> None:
        super().__init__()
        is_encoder, head_width = half == "enc", options.head_width
        if attends and width % head_width:
            raise ValueError(f"{width} channels attend, which are no multiple of head_width = {head_width}")
        self.is_encoder, self.resampling = is_encoder, resampling
        self.head_width, self.dropout = head_width, options.dropout
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.conv_res0 = MPConv(width if is_encoder else in_width, width, 3)
        self.emb_linear = MPConv(emb_width, width)
        self.conv_res1 = MPConv(width, width, 3)
        self.conv_skip = MPConv(in_width, width, 1) if in_width != width else None
        self.attn_qkv = MPConv(width, 3 * width, 1) if attends else None
        self.attn_proj = MPConv(width, width, 1) if attends else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, in_width, H, W) -> (B, width, H', W'); emb: float32 (B, emb_width)."""
        if self.resampling:
            x = F.avg_pool2d(x, 2) if self.resampling == "down" else F.interpolate(x, scale_factor=2.0)
        if self.is_encoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), 1)  # (B, width, H', W')
        with torch.autocast(x.device.type, enabled=False):
            scale = self.emb_linear(emb, self.emb_gain) + 1  # (B, width)
        h = self.conv_res0(mp_silu(x))  # (B, width, H', W')
        h = mp_silu(h * scale[:, :, None, None].to(h.dtype))
        h = self.conv_res1(F.dropout(h, self.dropout, self.training))
        if not self.is_encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, h, _RESIDUAL_BALANCE)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attend(self.attn_qkv(x))), _RESIDUAL_BALANCE)
        return x.clamp(-_LARGEST, _LARGEST)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Cosine attention, (B, 3 width, H, W) -> (B, width, H, W): q, k and v of each pixel have unit magnitude."""
        b, c, h, w = qkv.shape
        heads = c // (3 * self.head_width)
        # (3, B, heads, H W, head_width), channels innermost: the fused kernels take no other layout.
        parts = qkv.view(b, heads, self.head_width, 3, h * w).permute(3, 0, 1, 4, 2).contiguous()
        q, k, v = normalize(parts, 4).unbind(0)  # over a head's channels
        out = F.scaled_dot_product_attention(q, k, v)  # divides by sqrt(head_width)
        return out.transpose(2, 3).reshape(b, c // 3, h, w)


# --- The likelihood model


class Edm2DrawOptions(DiffusionDrawOptions):
    """uncertainty: plain likelihood training is weighted by the learned uncertainty u(sigma) (EDM2, eq. 21)."""

    uncertainty: bool = False


class Edm2Model(DiffusionModel):
    """A denoiser with EDM2's uncertainty head, a small network of the noise level beside the U-Net.

    The head acts in maximum-likelihood training only (`forward` without a reference), and only with the draw option
    `uncertainty`; otherwise it stays in the weights untrained. `log_lik` is the ELBO without it.
    """

    def __init__(
        self,
        net: Edm2Unet,
        codec: Codec,
        num_classes: int,
        options: DiffusionOptions,
        draw_options: Edm2DrawOptions,
    ) -> None:
        super().__init__(net, codec, num_classes, options, draw_options)
        self.is_weighted = draw_options.uncertainty
        self.logvar_fourier = MPFourier(_LOGVAR_WIDTH)
        self.logvar_linear = MPConv(_LOGVAR_WIDTH, 1)
        self.logvar_linear.requires_grad_(draw_options.uncertainty)  # DDP and optimizers must not see an unused one

    def log_variance(self, sigma: Tensor) -> Tensor:
        """u(sigma), the learned log variance of F's error, (B,) float32."""
        with torch.autocast(sigma.device.type, enabled=False):
            u: Tensor = self.logvar_linear(self.logvar_fourier(self.precond.coefficients(sigma.float()).c_noise))
        return u.squeeze(1)

    def forward(self, x: Tensor, label: Tensor, draw: DiffusionDraw, ref_prediction: Tensor | None = None) -> Tensor:
        """As in the contract; with options.uncertainty the plain case is -(w / e^u sum (D - x)^2 + u dims), (B,)."""
        value = super().forward(x, label, draw, ref_prediction)
        if not self.is_weighted:
            return value
        u = self.log_variance(draw.sigma)
        if ref_prediction is not None:
            return value + 0 * u  # the ratio's own value; DDP wants each parameter to have a gradient
        return value / u.exp() - u * x[0].numel()

    def before_step(self) -> None:
        """Forced weight normalisation of every layer that is trained."""
        force_norms([part for part in self.modules() if isinstance(part, MPConv) and part.weight.requires_grad])

    def units(self) -> Sequence[nn.Module]:
        net: Any = self.net
        return [part for part in (*net.enc.values(), *net.dec.values()) if isinstance(part, Block)]


@register("edm2-unet", Edm2Options, Edm2DrawOptions)
def build(shape: tuple[int, ...], num_classes: int, options: Edm2Options, draw_options: Edm2DrawOptions) -> Edm2Model:
    """A denoiser of square uint8 images. Raises ValueError for another shape."""
    square(shape)
    codec = PixelCodec(shape) if options.codec == "rgb" else StabilityCodec(shape, options.vae)
    channels, size, _ = codec.state_shape
    net = Edm2Unet(channels, channels * (2 if options.learned_variance else 1), size, num_classes, options)
    return Edm2Model(net, codec, num_classes, options, draw_options)
