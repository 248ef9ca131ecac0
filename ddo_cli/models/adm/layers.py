"""ADM's blocks (arXiv 2105.05233, section 4), shared by its U-Net and by the encoders of `models.discriminators`."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli.models.norms import GroupNorm
from ddo_cli.models.sides import check_side

Resampling = Literal["", "up", "down"]

GROUPS = 32  # of every GroupNorm, see `group_norm`
_LONGEST_PERIOD = 10_000


def cosines_and_sines(position: Tensor, width: int) -> Tensor:
    """[cos | sin] of `position` (B,) at width / 2 frequencies from 1 down to almost 1 / 10000, (B, width) float64.

    Frequencies and angles are rounded to float32 as where the published networks were trained: at step 800 that moves a
    cosine by up to 5e-5, and the output of DiT-XL/2 by 6e-6.
    """
    half = width // 2
    k = torch.arange(half, device=position.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(_LONGEST_PERIOD) * k / half)
    angles = (position.to(torch.float32)[:, None] * frequencies).to(torch.float64)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels: int, group_channels: int = 1) -> GroupNorm:
    """32 groups, or fewer where a group would have less than `group_channels` channels (EDM's version: 4).

    Raises ValueError if they do not divide the channels.
    """
    groups = min(GROUPS, channels // group_channels)
    if groups == 0 or channels % groups:
        raise ValueError(f"{channels} channels (width times channel_mult) do not divide into {groups} groups")
    return GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """skip(x) + conv(SiLU(norm(conv(SiLU(norm(x)))) (1 + scale) + shift)), scale and shift from the embedding.

    scale_shift: False: the embedding is added before the second norm instead (DDPM's block).
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
        scale_shift: bool = True,
    ) -> None:
        super().__init__()
        self.resampling, self.scale_shift = resampling, scale_shift
        first = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.in_layers = nn.Sequential(group_norm(c_in, group_channels), nn.SiLU(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, (2 if scale_shift else 1) * c_out))
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
        told = self.emb_layers(emb)[:, :, None, None]  # (B, c_out or 2 c_out, 1, 1)
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = torch.addcmul(shift, self.out_layers[0](h), 1 + scale)
        else:
            h = self.out_layers[0](h + told)
        return self.skip_connection(x) + self.out_layers[1:](h)


class Downsample(nn.Module):
    """A convolution of stride 2, where halvings are no residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H / 2, W / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Repetition and a convolution, where doublings are no residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0))


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
        return (flat + self.proj_out(attend(qkv.permute(2, 0, 1, 4, 3)))).view_as(x)


def attend(qkv: Tensor, num_queries: int | None = None) -> Tensor:
    """Attention of q, k and v (3, B, heads, T, d), scores scaled by 1 / sqrt(d); (B, heads * d, T).

    num_queries: only the first tokens ask.
    """
    q, k, v = qkv.contiguous().unbind(0)  # channels innermost: the fused kernels take no other layout
    return F.scaled_dot_product_attention(q[:, :, :num_queries], k, v).transpose(2, 3).flatten(1, 2)


def embedded(embedding: nn.Embedding, label: Tensor) -> Tensor:
    """Rows of the labels, (B, E); zeros for the label -1."""
    return embedding(label.clamp(min=0)) * (label >= 0)[:, None]


class Block(nn.ModuleList):
    """Layers in a row. Those of ADM take the embedding too."""

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
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
    updown: bool = True,
) -> tuple[nn.ModuleList, Block]:
    """(input_blocks, middle_block) of levels with these channels: `depth` blocks each, halvings in between.

    res(c_in, c_out, resampling=...), attention(channels): make the layers. updown: halvings are residual blocks.
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
            blocks.append(Block([res(channels, channels, resampling="down") if updown else Downsample(channels)]))
    return blocks, Block([res(channels, channels), attention(channels), res(channels, channels)])


def head_width(channels: int, head_channels: int, heads: int | None = None) -> int:
    """Channels of each head of an attention layer. heads: None: as many as have `head_channels` channels or more."""
    return channels // (heads or max(channels // head_channels, 1))


def attended(widths: Sequence[int], attending: Sequence[bool]) -> list[int]:
    """Channels of all attention layers: those of attending levels, and the middle's."""
    return [*(width for width, attends in zip(widths, attending, strict=True) if attends), widths[-1]]


def check_sizes(
    size: int, widths: Sequence[int], attending: Sequence[bool], head_channels: int, heads: int | None = None
) -> None:
    """Raises ValueError unless the levels divide the side and the heads the channels. heads: None: by head_channels."""
    shrunk = 2 ** (len(widths) - 1)
    if not widths:
        raise ValueError("channel_mult must have an entry for each level")
    check_side(size, shrunk, "channel_mult")
    if odd := [width for width in attended(widths, attending) if width % (heads or max(width // head_channels, 1))]:
        key, value = ("num_head_channels", head_channels) if heads is None else ("num_heads", heads)
        raise ValueError(f"channels {odd} of attending levels do not divide into heads with {key} = {value}")
