"""The vision transformer of DINOv2 (Oquab et al. 2023, arXiv 2304.07193), for its published weights.

Written anew because torch hub, the usual way, downloads code and runs it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14
TRAINED_GRID = 37  # patches per side in the last training stage, 518 x 518 pixels
# The published code adds this to the grid size when it computes the scale at which position embeddings are resampled,
# which shifts the sampling points slightly.
GRID_OFFSET = 0.1


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # 3 (B, heads, N, c)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MLP(nn.Module):
    """Two layers with a hidden width of 4 x width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals and layer scale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), MLP(width)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoV2(nn.Module):
    """Normalised images (B, 3, H, W), H and W multiples of 14 -> the class token (B, width). Defaults: ViT-L/14."""

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_GRID**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # used in training only, but in the published files
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images)  # (B, C, rows, columns)
        positions = self._positions(*x.shape[2:])  # (1, 1 + N, C)
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + positions  # (B, 1 + N, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]  # (B, C)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings of this many patches, resampled from the trained grid (bicubic)."""
        if (rows, columns) == (TRAINED_GRID, TRAINED_GRID):
            return self.pos_embed
        first, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.view(1, TRAINED_GRID, TRAINED_GRID, -1).permute(0, 3, 1, 2)  # (1, C, 37, 37)
        scale = ((rows + GRID_OFFSET) / TRAINED_GRID, (columns + GRID_OFFSET) / TRAINED_GRID)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")  # (1, C, rows, columns)
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)
