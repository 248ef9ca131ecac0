"""Items as they lie on disk <-> model space."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class PixelCodec:
    """uint8 images <-> [-1, 1]. Decoding truncates 127.5 x + 128, as EDM's scripts do."""

    def encode(self, items: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 in [-1, 1]."""
        return items.to(torch.float32) / 127.5 - 1

    def decode(self, x: Tensor) -> Tensor:
        """Float (B, C, H, W) -> uint8; values outside [-1, 1] are clipped."""
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


class PointCodec:
    """Float points <-> themselves."""

    def encode(self, items: Tensor) -> Tensor:
        """Float (B, d) -> float32."""
        return items.to(torch.float32)

    def decode(self, x: Tensor) -> Tensor:
        """Float (B, d) -> float32."""
        return x.to(torch.float32)


class LevelCodec:
    """uint8 images of `levels` evenly spaced grey values <-> tokens in raster order.

    Level k is stored as round(255 k / (levels - 1)).
    """

    def __init__(self, shape: tuple[int, ...], levels: int):
        self.shape, self.levels = shape, levels

    def encode(self, items: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) -> int64 tokens (B, H W) in 0..levels - 1."""
        return (items.to(torch.float32) * (self.levels - 1) / 255).round().to(torch.int64).flatten(1)

    def decode(self, x: Tensor) -> Tensor:
        """Tokens (B, H W) -> uint8 (B, 1, H, W)."""
        return (x.to(torch.float32) * 255 / (self.levels - 1)).round().to(torch.uint8).view(-1, *self.shape)


def hash_of(tensors: dict[str, Tensor]) -> str:
    """Hex digest of the tensors' names and float32 numbers, which a file's type and order do not change."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(repr((name, tuple(tensors[name].shape))).encode())
        found.update(tensors[name].detach().to("cpu", torch.float32).contiguous().numpy().data)
    return found.hexdigest()[:32]
