"""PixelTransformer: an autoregressive likelihood model of small grey images, one token per pixel in raster order."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddo_cli.codec import LevelCodec
from ddo_cli.likelihood import NO_LABEL, DrawOptions, Options, Sampled, drop_labels
from ddo_cli.models.norms import widened
from ddo_cli.models.registry import register
from ddo_cli.models.tokens import Cache, TokenModel, inverse_cdf, is_guided, of_tokens, sampled_log_prob
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.transfer import to_device


class PixelTransformerOptions(Options):
    """Options of `pixel-transformer`. The defaults hold about 70,000 parameters."""

    levels: int = Field(17, ge=2, le=256)  # grey values a pixel can take
    width: int = Field(48, ge=1)
    depth: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)  # a divisor of width
    mlp_ratio: int = Field(2, ge=1)  # width of the hidden layer of a block, in units of `width`


class AutoregressiveDraw(NamedTuple):
    """The likelihood is exact, so its one random part is the label drop, (B,) bool."""

    drop: Tensor


@register("pixel-transformer", PixelTransformerOptions, DrawOptions)
class PixelTransformer(TokenModel):
    """p(x) = prod_i p(x_i | x_<i, label), x int64 tokens (B, L); the label is the token before the first pixel."""

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, options: PixelTransformerOptions, draw_options: DrawOptions
    ):
        """Raises ValueError if the items are not grey images or `heads` does not divide `width`."""
        super().__init__()
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError("it models grey images: `ddo data SRC --out set.zip --grey` makes them grey")
        if options.width % options.heads:
            raise ValueError(f"model.options.heads = {options.heads} must divide width = {options.width}")
        self.codec, self.num_classes = LevelCodec(shape, options.levels), num_classes
        self.options, self.draw_options = options, draw_options
        self.length, self.heads = shape[1] * shape[2], options.heads
        width = options.width
        self.start = nn.Embedding(num_classes + 1, width)  # row 0: no label
        self.token = nn.Embedding(options.levels, width)
        self.position = nn.Parameter(torch.randn(self.length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, options.heads, options.mlp_ratio) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, options.levels)
        for embedding in (self.start, self.token):
            nn.init.normal_(embedding.weight, std=0.02)  # GPT-2's initialisation, here and above
        nn.init.zeros_(self.head.weight)  # training starts at the uniform distribution
        nn.init.zeros_(self.head.bias)

    # --- Likelihood

    def logits(self, x: Tensor, label: Tensor) -> Tensor:
        """Logits of every pixel given the ones before it, (B, L, levels), float32. x: (B, L), the last pixel unread."""
        h = torch.cat([self._start(label), self.token(x[:, :-1])], dim=1) + self.position  # (B, L, width)
        for block in self.blocks:
            h = block(h)
        return self._logits(h)

    def draw(self, num_rows: int, rng: RowRng) -> AutoregressiveDraw:
        return AutoregressiveDraw(rng.rand() < self.draw_options.label_dropout)

    def predict(self, x: Tensor, label: Tensor, draw: AutoregressiveDraw) -> Tensor:
        """log p(x_i | x_<i, label), (B, L), nats, float32."""
        return of_tokens(self.logits(x, drop_labels(label, draw)).log_softmax(2), x)

    # --- Sampling

    @torch.no_grad()
    def sample(self, label: Tensor, rng: RowRng, spec: SamplingRecipe) -> Sampled:
        """Tokens (B, L), one uniform number per token; nfe counts a pass over one position as an evaluation.

        Keys and values of earlier pixels are kept, so a pass costs one position. Token i of a row is the inverse of
        its cumulative distribution at the row's i-th uniform number: no row depends on another.
        """
        uniform = to_device(rng.rand((self.length,), dtype=torch.float64), label.device)  # (B, L)
        guided = is_guided(spec)
        labels = torch.cat([label, torch.full_like(label, NO_LABEL)]) if guided else label  # (B or 2B,)
        caches = self.caches(len(labels), self.position)
        x = torch.empty(len(label), self.length, dtype=torch.int64, device=label.device)
        h = self._start(labels)  # (B or 2B, 1, width)
        for i in range(self.length):
            h = h + self.position[i]
            for block, cache in zip(self.blocks, caches, strict=True):
                h = block(h, cache, i)
            logits = self._logits(h[:, 0])  # (B or 2B, levels)
            conditional, unconditional = logits.chunk(2) if guided else (logits, None)
            x[:, i] = inverse_cdf(sampled_log_prob(conditional, unconditional, spec), uniform[:, i])
            h = self.token(x[:, i].repeat(2) if guided else x[:, i])[:, None]
        return Sampled(x, self.length * (2 if guided else 1))

    @torch.no_grad()
    def log_density(self, x: Tensor, label: Tensor, spec: SamplingRecipe) -> Tensor:
        """log of the probability that `sample` draws x, (B,) nats: exact, with temperature, truncation and guidance."""
        unconditional = self.logits(x, torch.full_like(label, NO_LABEL)) if is_guided(spec) else None
        return of_tokens(sampled_log_prob(self.logits(x, label), unconditional, spec), x).sum(1)

    def _logits(self, h: Tensor) -> Tensor:
        """(..., width) -> (..., levels), float32 even under autocast: log-ratios are small differences."""
        with torch.autocast(h.device.type, enabled=False):
            return self.head(self.norm(widened(h)))

    def _start(self, label: Tensor) -> Tensor:
        """The token before the first pixel, (B, 1, width). A model without classes ignores labels."""
        return self.start(label + 1 if self.num_classes else torch.zeros_like(label))[:, None]


# --- Pieces


class Block(nn.Module):
    """Pre-norm transformer block with causal attention (GPT-2)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, h: Tensor, cache: Cache | None = None, position: int = 0) -> Tensor:
        """Same shape as h: (B, L, width) without a cache; (B, 1, width), the row at `position`, with one."""
        split = self.qkv(self.norm1(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)  # (B, heads, L, width / heads) each
        if cache is not None:
            cache.key[:, :, position], cache.value[:, :, position] = key[:, :, 0], value[:, :, 0]
            key, value = cache.key[:, :, : position + 1], cache.value[:, :, : position + 1]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h))
