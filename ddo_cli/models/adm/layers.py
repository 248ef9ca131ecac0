"""ADM's blocks (arXiv 2105.05233, section 4), and the encoder half of its U-Net: classifiers, DG's discriminator.

Discriminator Guidance (arXiv 2211.17091, section 4.3) takes the features of such a classifier, frozen, and trains a
shallow network of the same family on them. Names of parameters are those of the published files, which load as they
are. All of them have scale-shift norms, residual up/down blocks, 64 channels per head and an attention-pooling head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ddo_cli.diffusion import vp_sde
from ddo_cli.likelihood import Options
from ddo_cli.models.discriminators.registry import register_classifier
from ddo_cli.trainable import Trainable

Time = Literal["linear", "cosine"]
Resampling = Literal["", "up", "down"]

_GROUPS = 32  # of every GroupNorm, see `group_norm`
_TIME_SCALE = 999  # the networks were trained on step indices 0..999
_LONGEST_PERIOD = 10_000

# Options of the published classifiers by (channels, side) of the state; all tell 1000 classes. OpenAI trained those of
# 64x64 and above, of which only the 64x64 one knows the cosine schedule; DG's authors those of 32x32 images and of
# 32x32 latents. The two share the file name 32x32_classifier.pt.
PUBLISHED: dict[tuple[int, int], dict[str, Any]] = {
    (3, 32): {"depth": 4, "channel_mult": (1, 2, 4)},
    (4, 32): {"depth": 2, "channel_mult": (1, 2, 3)},
    (3, 64): {"depth": 4, "channel_mult": (1, 2, 3, 4), "time": "cosine"},
    (3, 128): {"depth": 2, "channel_mult": (1, 1, 2, 3, 4)},
    (3, 256): {"depth": 2, "channel_mult": (1, 1, 2, 2, 4, 4)},
    (3, 512): {"depth": 2, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)},
}


def cosines_and_sines(position: Tensor, width: int) -> Tensor:
    """[cos | sin] of `position` (B,) at width / 2 frequencies from 1 down to almost 1 / 10000, (B, width) float64."""
    half = width // 2
    k = torch.arange(half, device=position.device, dtype=torch.float64)
    frequencies = torch.exp(-math.log(_LONGEST_PERIOD) * k / half)
    angles = position.to(torch.float64)[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Features of the step index that a time t in [0, 1] means, 999 t; (B, width) float64."""
    return cosines_and_sines(_TIME_SCALE * t.to(torch.float64), width)


def group_norm(channels: int, group_channels: int = 1) -> nn.GroupNorm:
    """32 groups, or fewer where a group would have less than `group_channels` channels (EDM's version: 4).

    Raises ValueError if they do not divide the channels.
    """
    groups = min(_GROUPS, channels // group_channels)
    if groups == 0 or channels % groups:
        raise ValueError(f"{channels} channels (width times channel_mult) do not divide into {groups} groups")
    return nn.GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """skip(x) + conv(SiLU(norm(conv(SiLU(norm(x)))) (1 + scale) + shift)), scale and shift from the embedding.

    resampling: both branches are halved by a 2x2 mean, or doubled by repetition, the residual one before its first
    convolution. dropout: share of activations dropped before the last convolution, in train mode only.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        *,
        resampling: Resampling = "",
        dropout: float = 0.0,
        group_channels: int = 1,
    ) -> None:
        super().__init__()
        self.resampling = resampling
        first = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.in_layers = nn.Sequential(group_norm(c_in, group_channels), nn.SiLU(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, 2 * c_out))
        last = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.out_layers = nn.Sequential(group_norm(c_out, group_channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, c_out, H, W), or the sides halved or doubled. x: (B, c_in, H, W); emb: (B, E)."""
        h = self.in_layers[:2](x)
        if self.resampling == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resampling == "up":
            x, h = F.interpolate(x, scale_factor=2.0), F.interpolate(h, scale_factor=2.0)  # nearest
        h = self.in_layers[2](h)  # (B, c_out, H, W)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1) each
        h = torch.addcmul(shift, self.out_layers[0](h), 1 + scale)
        return self.skip_connection(x) + self.out_layers[1:](h)


class Attention(nn.Module):
    """x + proj_out(self-attention(norm(x))) over positions. Channels of qkv: q, k, v of one head, then the next."""

    def __init__(self, channels: int, head_channels: int, group_channels: int = 1) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = group_norm(channels, group_channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W), as x. emb is not used: blocks of both kinds are called alike."""
        flat = x.flatten(2)  # (B, C, H W)
        qkv = self.qkv(self.norm(flat)).unflatten(1, (-1, 3, self.head_channels))  # (B, heads, 3, d, H W)
        return (flat + self.proj_out(_attend(*qkv.unbind(2)))).view_as(x)


class AttentionPool(nn.Module):
    """What the mean over positions, as one more token, gathers from all. Here all of q come first, then k, then v."""

    def __init__(self, channels: int, side: int, head_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        # Initial scale chosen by us: position vectors of length about 1.
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / math.sqrt(channels))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, num_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_outputs). x: (B, C, side, side)."""
        x = x.flatten(2)  # (B, C, T)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding  # (B, C, 1 + T)
        qkv = self.qkv_proj(x).unflatten(1, (3, -1, self.head_channels))  # (B, 3, heads, d, 1 + T)
        q, k, v = qkv.unbind(1)
        return self.c_proj(_attend(q[..., :1], k, v)).squeeze(2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of tensors (B, heads, d, T), scores scaled by 1 / sqrt(d); (B, heads * d, T of q)."""
    q, k, v = (part.transpose(2, 3) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


def embedded(embedding: nn.Embedding, label: Tensor) -> Tensor:
    """Rows of the labels, (B, E); zeros for the label -1."""
    return embedding(label.clamp(min=0)) * (label >= 0)[:, None]


class Block(nn.ModuleList):
    """Layers in a row. Those of ADM take the embedding too."""

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """The last one's output."""
        for layer in self:
            h = layer(h) if isinstance(layer, nn.Conv2d) else layer(h, emb)
        return h


def encoder_blocks(
    in_channels: int,
    widths: Sequence[int],
    depth: int,
    attending: Sequence[bool],
    res: Callable[..., ResBlock],
    attention: Callable[[int], Attention],
) -> tuple[nn.ModuleList, Block]:
    """(input_blocks, middle_block) of levels with these channels: `depth` blocks each, halvings in between.

    res(c_in, c_out, resampling=...), attention(channels): make the layers.
    """
    channels = widths[0]
    blocks = nn.ModuleList([Block([nn.Conv2d(in_channels, channels, 3, padding=1)])])
    for level, width in enumerate(widths):
        for _ in range(depth):
            layers: list[nn.Module] = [res(channels, width)]
            if attending[level]:
                layers.append(attention(width))
            blocks.append(Block(layers))
            channels = width
        if level < len(widths) - 1:
            blocks.append(Block([res(channels, channels, resampling="down")]))
    return blocks, Block([res(channels, channels), attention(channels), res(channels, channels)])


class AdmEncoder(Trainable):
    """`num_outputs` numbers of a noisy state.

    depth: residual blocks of each level. channel_mult: each level's channels, in widths, finest first.
    attention: sides at which blocks attend, for states of side `size`.
    num_labels: rows of the label embedding; 0 = labels are ignored.
    time: "cosine" if the published weights know the cosine schedule's time; t itself is always the linear one's.
    Raises ValueError if the sizes do not divide.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        num_outputs: int,
        width: int = 128,
        depth: int = 2,
        channel_mult: Sequence[float],
        attention: Sequence[int] = (32, 16, 8),
        num_head_channels: int = 64,
        num_labels: int = 0,
        time: Time = "linear",
    ) -> None:
        super().__init__()
        self.width, self.time, emb_width = width, time, 4 * width
        widths = [round(multiple * width) for multiple in channel_mult]  # channels of each level
        factors = {size // side for side in attention}  # as ADM reads them: by how much the state has been shrunk
        attending = [2**level in factors for level in range(len(widths))]
        _check_sizes(size, widths, attending, num_head_channels)
        self.time_embed = nn.Sequential(nn.Linear(width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.label_emb = nn.Embedding(num_labels, emb_width) if num_labels else None
        self.input_blocks, self.middle_block = encoder_blocks(
            in_channels,
            widths,
            depth,
            attending,
            partial(ResBlock, emb_width=emb_width),
            partial(Attention, head_channels=num_head_channels),
        )
        side = size // 2 ** (len(widths) - 1)
        pool = AttentionPool(widths[-1], side, num_head_channels, num_outputs)
        self.out = nn.Sequential(group_norm(widths[-1]), nn.SiLU(), pool)

    def features(self, x_vp: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, C, h, w), what the pooling head sees. x_vp: float (B, C, H, W) in VP coordinates; t: (B,);
        label: int64 (B,), -1 = none.
        """
        t = vp_sde.cosine_time_of(t) if self.time == "cosine" else t
        emb = self.time_embed(time_embedding(t, self.width).to(x_vp.dtype))  # (B, E)
        if self.label_emb is not None and label is not None:
            emb = emb + embedded(self.label_emb, label)
        h = x_vp
        for block in self.input_blocks:
            h = block(h, emb)
        return self.middle_block(h, emb)

    def outputs(self, x_vp: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, num_outputs)."""
        return self.out(self.features(x_vp, t, label))


def _check_sizes(size: int, widths: list[int], attending: list[bool], head_channels: int) -> None:
    shrunk = 2 ** (len(widths) - 1)
    if not widths or size % shrunk:
        raise ValueError(f"side {size} must be a multiple of 2**(levels of channel_mult - 1) = {shrunk}")
    if any(width % _GROUPS for width in widths):
        raise ValueError(f"the levels' channels {widths} (width times channel_mult) must be multiples of {_GROUPS}")
    attended = [width for width, attends in zip(widths, attending, strict=True) if attends] + widths[-1:]
    if any(width % head_channels for width in attended):
        raise ValueError(f"channels {attended} of attending levels must be multiples of num_head_channels")


class AdmClassifier(AdmEncoder):
    """Class logits of noisy states."""

    def forward(self, x_vp: Tensor, t: Tensor) -> Tensor:
        """(B, classes)."""
        return self.outputs(x_vp, t)


class AdmEncoderOptions(Options):
    """Options of `adm-classifier`. PUBLISHED has those of the published files."""

    width: PositiveInt = 128
    depth: PositiveInt = 2  # residual blocks of each level
    channel_mult: tuple[PositiveFloat, ...] = Field((1, 2, 3), min_length=1)  # each level's channels, in widths
    attention: tuple[PositiveInt, ...] = (32, 16, 8)  # sides at which blocks attend
    num_head_channels: PositiveInt = 64
    time: Time = "linear"  # cosine: for weights trained on the cosine schedule, as OpenAI's for 64x64


def square(shape: tuple[int, ...]) -> tuple[int, int]:
    """(channels, side) of a state. Raises ValueError unless it is a square image or latent."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError("it needs square images or latents")
    return shape[0], shape[1]


@register_classifier("adm-classifier", AdmEncoderOptions)
def build_classifier(shape: tuple[int, ...], num_classes: int, options: AdmEncoderOptions) -> AdmClassifier:
    """A classifier of square states."""
    channels, side = square(shape)
    return AdmClassifier(in_channels=channels, size=side, num_outputs=num_classes, **options.model_dump())
