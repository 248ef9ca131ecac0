"""Pieces of VAR's transformer: attention over scales and blocks whose norms the class modulates (arXiv 2404.02905)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli.models.norms import widened
from ddo_cli.models.tokens import Cache

NORM_EPS = 1e-6
LARGEST_SCALE = 100.0  # of normalised queries


class Qkv(nn.Linear):
    """A linear map whose bias is made outside."""

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(h, self.weight, bias)


class Attention(nn.Module):
    """Self-attention. Queries and keys are unit vectors, queries times a learned scale per head (if l2_norm)."""

    def __init__(self, width: int, heads: int, l2_norm: bool):
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        self.qkv = Qkv(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))  # keys have none: it would shift all logits of a query alike
        self.v_bias = nn.Parameter(torch.zeros(width))
        if l2_norm:
            self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, mask: Tensor | None, cache: Cache | None, start: int) -> Tensor:
        """Same shape as h, (B, l, C). mask: (l, l) bool, True where a query sees a key.

        cache: filled with these positions, `start` and on; every position in it so far is seen.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        split = self.qkv(h, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)  # (B, heads, l, C / heads) each
        scale = 0.25 / math.sqrt(query.shape[-1])
        if self.l2_norm:
            query = F.normalize(query, dim=-1) * self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
            key, scale = F.normalize(key, dim=-1), 1.0
        if cache is not None:
            stop = start + h.shape[1]
            cache.key[:, :, start:stop], cache.value[:, :, start:stop] = key, value
            key, value = cache.key[:, :, :stop], cache.value[:, :, :stop]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP on plain norms, each scaled, shifted and gated by what the class makes of six vectors."""

    def __init__(self, width: int, heads: int, l2_norm: bool, shared_adaln: bool):
        """shared_adaln: the class's vectors come from outside, and the block adds its own constant ones."""
        super().__init__()
        self.attn = Attention(width, heads, l2_norm)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if shared_adaln:
            self.adaln: nn.Parameter | nn.Linear = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.adaln = nn.Linear(width, 6 * width)

    def forward(
        self,
        h: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        cache: Cache | None = None,
        start: int = 0,
    ) -> Tensor:
        """Same shape as h, (B, l, C).

        condition: silu of the class embedding (B, C), or the shared vectors (B, 1, 6, C). keep: (B, 2), what each
        row's attention and MLP are multiplied by (drop path). mask, cache, start: see `Attention`.
        """
        if isinstance(self.adaln, nn.Linear):
            modulation = self.adaln(condition).unflatten(1, (1, 6, -1))  # (B, 1, 6, C)
        else:
            modulation = self.adaln + condition
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)  # (B, 1, C) each
        if keep is not None:
            gate1, gate2 = gate1 * keep[:, :1, None], gate2 * keep[:, 1:, None]
        h = h + gate1 * self.attn(modulated(h, scale1, shift1), mask, cache, start)
        return h + gate2 * self.fc2(F.gelu(self.fc1(modulated(h, scale2, shift2)), approximate="tanh"))


class Head(nn.Module):
    """Logits; its norm has scale and shift by the class, in this order."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.adaln = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, vocabulary)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """(B, l, C), silu of the class embedding (B, C) -> (B, l, vocabulary), float32."""
        scale, shift = self.adaln(condition).unflatten(1, (1, 2, -1)).unbind(2)
        with torch.autocast(h.device.type, enabled=False):
            return self.linear(modulated(widened(h), widened(scale), widened(shift)))


def modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) norm(h) + shift."""
    return F.layer_norm(h, h.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift
