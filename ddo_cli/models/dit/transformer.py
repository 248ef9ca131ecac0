"""The transformer of DiT (arXiv 2212.09748), SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940): one network.

Tensors have the published names, but for the rows of the last layer that make a variance, which lie by themselves
(`FinalLayer`): the likelihood does not train them, so neither weight decay nor averaging may touch them.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ddo_cli.codec import PixelCodec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.models.adm.layers import cosines_and_sines
from ddo_cli.models.norms import widened
from ddo_cli.models.registry import register
from ddo_cli.models.sides import check_side, square
from ddo_cli.models.vae_codec import EMA_VAE, FACTOR, STABLE, StabilityCodec

TIME_FEATURES = 256
_MLP_RATIO = 4
_NORM_EPS = 1e-6  # of norms without weights
_LONGEST_PERIOD = 10_000  # of positions

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads


class DitOptions(DiffusionOptions):
    """Options of `dit`. Defaults: DiT-XL/2 on latents of Stability's autoencoder, without a learned variance.

    width, depth, heads: see SIZES for the published ones
    patch: side of the squares that become tokens, in pixels of the state
    codec: what the network sees: pixels, or latents of Stability's autoencoder, 4 channels and an eighth of the side
    vae: name or folder of the autoencoder; decoders differ, and published FIDs are those of sd-vae-ft-ema
    unused_variance: the file has a variance's rows that are not used (SiT); kept for `ddo export`
    projectors: widths (hidden, out) of REPA's projectors, which only its own training loss uses; kept likewise
    """

    width: int = Field(1152, ge=4, multiple_of=4)
    depth: PositiveInt = 28
    heads: PositiveInt = 16
    patch: PositiveInt = 2
    codec: Literal["rgb", "sd-vae"] = "sd-vae"
    vae: str = Field(EMA_VAE, min_length=1)
    unused_variance: bool = False
    projectors: tuple[tuple[PositiveInt, PositiveInt], ...] = ()


class Attention(nn.Module):
    """Self-attention over tokens. Channels of qkv: q of all heads, then k, then v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """The shape of h, (B, T, D)."""
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers, each token by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, _MLP_RATIO * width)
        self.fc2 = nn.Linear(_MLP_RATIO * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by what time and label make of six vectors (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """The shape of h, (B, T, D). condition: (B, D), of time and label, float32 under autocast."""
        with torch.autocast(h.device.type, enabled=False):
            modulation = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)  # (B, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = h + gate1 * self.attn(modulated(h, shift1, scale1))
        return h + gate2 * self.mlp(modulated(h, shift2, scale2))


class FinalLayer(nn.Module):
    """What tokens say about their pixels: F, and a variance where the network has one.

    `linear` makes F; `variance` has the same shape. Published files hold the rows of both in one layer, see
    `dit.files`. The second is frozen, and evaluated where the model samples with it.
    """

    def __init__(self, width: int, outputs: int, has_variance: bool, is_used: bool) -> None:
        super().__init__()
        self.is_used = is_used
        self.linear = nn.Linear(width, outputs)
        self.variance = nn.Linear(width, outputs).requires_grad_(False) if has_variance else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """(B, T, outputs) of F and of a variance in use, float32 whatever the autocast."""
        with torch.autocast(h.device.type, enabled=False):
            shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
            h = modulated(widened(h), shift, scale)
            used = (self.linear, self.variance) if self.is_used and self.variance is not None else (self.linear,)
            return tuple(layer(h) for layer in used)


class Dit(nn.Module):
    """The raw network F.

    channels, size: of the state (C, size, size); size is a multiple of options.patch
    num_classes: 0 = unconditional, labels are then ignored. The last row of the label table is that of no label.
    """

    adapter_targets = ("attn.qkv", "attn.proj")

    def __init__(self, channels: int, size: int, num_classes: int, options: DitOptions) -> None:
        super().__init__()
        width, patch, self.num_classes = options.width, options.patch, num_classes
        if width % options.heads:
            raise ValueError(f"model.options.heads = {options.heads} must divide width = {width}")
        if options.learned_variance and options.unused_variance:
            raise ValueError("model.options.learned_variance and unused_variance exclude each other; leave one out")
        self.patch, self.grid = patch, size // patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.register_buffer("pos_embed", positions(width, self.grid))
        self.blocks = nn.ModuleList(Block(width, options.heads) for _ in range(options.depth))
        has_variance = options.learned_variance or options.unused_variance
        self.final_layer = FinalLayer(width, patch * patch * channels, has_variance, options.learned_variance)
        if options.projectors:
            self.projectors = nn.ModuleList(
                nn.Sequential(
                    nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
                )
                for hidden, out in options.projectors
            ).requires_grad_(False)
        self._initialise()

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F, of x's shape; with a learned variance (B, 2 C, size, size): F, then its v in [-1, 1].

        x: float (B, C, size, size), already multiplied by c_in. c_noise: float (B,), the time as the network knows it:
        the index 0 .. 999 of a step (DiT), or t in [0, 1] (SiT). label: int64 (B,), -1 = no label.
        """
        with torch.autocast(x.device.type, enabled=False):  # bf16 could not tell times in [0, 1] apart
            condition = self._condition(c_noise, label, x.dtype)  # (B, D)
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, D), rows first
        for block in self.blocks:
            h = block(h, condition)
        return torch.cat([self._image(tokens) for tokens in self.final_layer(h, condition)], dim=1)

    def units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def _condition(self, c_noise: Tensor, label: Tensor, dtype: torch.dtype) -> Tensor:
        features = cosines_and_sines(c_noise, TIME_FEATURES).to(dtype)  # (B, 256)
        rows = torch.where(label < 0, self.num_classes, label) if self.num_classes else torch.zeros_like(label)
        return self.t_embedder["mlp"](features) + self.y_embedder["embedding_table"](rows)

    def _image(self, tokens: Tensor) -> Tensor:
        """(B, T, p p C), channels innermost -> (B, C, size, size)."""
        squares = tokens.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (self.grid, self.grid))
        return squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, rows, p, columns, p) -> image

    def _initialise(self) -> None:
        """The published initialisation: each block starts as the identity, and F as 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for name, weight in self.named_parameters():
            if name.startswith(("t_embedder.", "y_embedder.")) and weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        parts = [*self.blocks, self.final_layer]
        zero = [part.adaLN_modulation[1] for part in parts] + [self.final_layer.linear, self.final_layer.variance]
        for layer in filter(None, zero):
            nn.init.zeros_(layer.weight)


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) norm(h) + shift."""
    return F.layer_norm(h, h.shape[-1:], eps=_NORM_EPS) * (1 + scale) + shift


def positions(width: int, grid: int) -> Tensor:
    """Embedding of a grid's places, (1, grid grid, width) float32, row by row.

    The first half tells the column, the second the row, each by sines and cosines at width / 4 frequencies.
    """
    frequencies = _LONGEST_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * frequencies  # (grid, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    columns, rows = axis[None].expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)[None].to(torch.float32)


@register("dit", DitOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: DitOptions, draw_options: DiffusionDrawOptions
) -> DiffusionModel:
    """A denoiser of square uint8 images, of their pixels or latents. Raises ValueError for another shape."""
    _, side = square(shape)
    if options.codec == "rgb":
        check_side(side, options.patch, "patch")
        codec: PixelCodec | StabilityCodec = PixelCodec(shape)
    else:
        check_side(side, FACTOR * options.patch, "codec", "patch")
        codec = StabilityCodec(shape, options.vae, STABLE)
    channels, size, _ = codec.state_shape
    return DiffusionModel(Dit(channels, size, num_classes, options), codec, num_classes, options, draw_options)
