"""ADM's blocks (arXiv 2105.05233, section 4), shared by its U-Net and by the encoders of `models.discriminators`."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli.models.norms import GroupNorm

Resampling = Literal["", "up", "down"]

GROUPS = 32  # of every GroupNorm, see `group_norm`
_LONGEST_PERIOD = 10_000


def cosines_and_sines(position: Tensor, width: int) -> Tensor:
    """[cos | sin] of `position` (B,) at width / 2 frequencies from 1 down to almost 1 / 10000, (B, width) float64."""
    half = width // 2
    k = torch.arange(half, device=position.device, dtype=torch.float64)
    frequencies = torch.exp(-math.log(_LONGEST_PERIOD) * k / half)
    angles = position.to(torch.float64)[:, None] * frequencies  # (B, half)
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


def check_sizes(
    size: int, widths: Sequence[int], attending: Sequence[bool], head_channels: int, heads: int | None = None
) -> None:
    """Raises ValueError unless the levels divide the side and the heads the channels. heads: None: by head_channels."""
    shrunk = 2 ** (len(widths) - 1)
    if not widths or size % shrunk:
        raise ValueError(f"side {size} must be a multiple of 2**(levels of channel_mult - 1) = {shrunk}")
    attended = [*(width for width, attends in zip(widths, attending, strict=True) if attends), widths[-1]]
    key, divisor = ("num_head_channels", head_channels) if heads is None else ("num_heads", heads)
    if any(width % divisor for width in attended):
        raise ValueError(f"channels {attended} of attending levels must be multiples of {key}")


def square(shape: tuple[int, ...]) -> tuple[int, int]:
    """(channels, side) of a state. Raises ValueError unless it is a square image or latent."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError("it needs square images or latents")
    return shape[0], shape[1]
