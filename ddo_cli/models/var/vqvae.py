"""VQVAE: images <-> token maps of growing size, each coding what the smaller ones left over (VAR, arXiv 2404.02905)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ddo_cli import checkpoint
from ddo_cli.errors import CheckpointError, reason
from ddo_cli.likelihood import Options
from ddo_cli.models.var import tokenizers
from ddo_cli.models.var.vqvae_layers import Decoder, Encoder, full_precision, start_as_identity
from ddo_cli.precision import decoding
from ddo_cli.trainable import Trainable

NAME = "vqvae"
NUM_PHI = 4  # convolutions that the scales share
COMMITMENT = 0.25  # beta of the quantisation loss


class VqvaeOptions(Options):
    """Options of `vqvae`. The defaults are those of the published one, for images of 256x256."""

    channels: int = Field(160, ge=1)  # of the first level
    channel_mult: tuple[int, ...] = Field((1, 1, 2, 2, 4), min_length=1, max_length=8)  # width of each level / channels
    num_blocks: int = Field(2, ge=1, le=16)  # residual blocks of a level of the encoder; the decoder has one more
    groups: int = Field(32, ge=1)  # of the norms; a divisor of every width
    z_channels: int = Field(32, ge=1)  # of a code
    vocabulary: int = Field(4096, ge=2, le=2**15)  # codes; tokens are kept as int16
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # sides of the token maps

    @field_validator("patch_nums")
    @classmethod
    def _growing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) < 2 or value[0] != 1 or any(a >= b for a, b in pairwise(value)):
            raise ValueError("the maps must grow, from a side of 1")
        return value

    @property
    def length(self) -> int:
        """Tokens of an image, L."""
        return sum(side**2 for side in self.patch_nums)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(start, stop) of each scale among the L tokens."""
        sizes = [side**2 for side in self.patch_nums]
        return [(sum(sizes[:s]), sum(sizes[: s + 1])) for s in range(len(sizes))]

    @property
    def image_side(self) -> int:
        """Pixels."""
        return self.patch_nums[-1] * 2 ** (len(self.channel_mult) - 1)


class Reconstruction(NamedTuple):
    """Outputs of a training pass: images (B, C, H, W), not clipped; the quantisation loss; latents and tokens."""

    images: Tensor
    loss: Tensor
    f: Tensor  # (B, z, p, p), of the encoder
    tokens: Tensor  # (B, L)


@tokenizers.register(NAME, VqvaeOptions)
class Vqvae(Trainable):
    """Tokens are int64 (B, L), the maps' rows one after another; images are float in [-1, 1]; f, f_hat (B, z, p, p)."""

    def __init__(self, shape: tuple[int, ...], options: VqvaeOptions):
        """Raises ValueError if the images' shape (C, H, W) is not what the options make."""
        super().__init__()
        widths = [options.channels * mult for mult in options.channel_mult]
        side = options.image_side
        if len(shape) != 3 or shape[1:] != (side, side):
            raise ValueError(
                f"its options patch_nums and channel_mult make images of {side}x{side}: `ddo data SRC --out set.zip "
                f"--size {side}` makes such images; or change these options"
            )
        if any(width % options.groups for width in widths):
            raise ValueError(f"groups = {options.groups} must divide the widths {widths}")
        self.shape, self.options = shape, options
        z = options.z_channels
        self.encoder = Encoder(shape[0], widths, options.num_blocks, options.groups, z)
        self.decoder = Decoder(shape[0], widths, options.num_blocks, options.groups, z)
        self.quantize = Quantizer(options)
        self.quant_conv = nn.Conv2d(z, z, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z, z, 3, padding=1)
        start_as_identity(self)

    def graphs(self) -> Sequence[nn.Module]:
        """Not the quantisation between them, which switches precisions."""
        return self.encoder, self.decoder

    def latent(self, images: Tensor) -> Tensor:
        """f (B, z, p, p), before quantisation."""
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, items: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> tokens (B, L), in float32."""
        with full_precision(items.device):
            return self.quantize.tokens(self.latent(scaled(items)))

    @torch.no_grad()
    def decode(self, f_hat: Tensor) -> Tensor:
        """f_hat -> uint8 images (B, C, H, W), in float32 or TF32 (see `decoding`).

        255 (v + 1) / 2 is truncated, as in the published script.
        """
        with decoding(f_hat.device):
            images = self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)
        return ((images + 1) / 2 * 255).to(torch.uint8)

    def forward(self, images: Tensor) -> Reconstruction:
        """Images as they come back, with gradients: the rounding passes them straight through to the encoder."""
        f = self.latent(images)
        with full_precision(f.device):
            f_hat, loss, tokens = self.quantize(f.to(torch.float32))
        return Reconstruction(self.decoder(self.post_quant_conv(f_hat)), loss, f, tokens)


def scaled(items: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return items.to(torch.float32) / 127.5 - 1


class Quantizer(nn.Module):
    """Residual quantisation by one code book over maps of growing side (VAR, algorithms 1 and 2)."""

    def __init__(self, options: VqvaeOptions):
        super().__init__()
        self.options, self.sides = options, options.patch_nums
        z = options.z_channels
        self.embedding = nn.Embedding(options.vocabulary, z)
        nn.init.uniform_(self.embedding.weight, -1 / options.vocabulary, 1 / options.vocabulary)  # VQ-VAE's
        self.phi = nn.ModuleList(nn.Conv2d(z, z, 3, padding=1) for _ in range(NUM_PHI))
        for phi in cast(Iterator[nn.Conv2d], iter(self.phi)):  # codes start by contributing themselves
            nn.init.dirac_(phi.weight)
            nn.init.zeros_(cast(nn.Parameter, phi.bias))
        self.phi_of = phi_of_scale(len(self.sides))

    def codes(self, tokens: Tensor, scale: int) -> Tensor:
        """Codes (B, z, p_s, p_s) of a scale's tokens (B, p_s^2)."""
        return self.as_map(self.embedding(tokens), scale)

    def as_map(self, codes: Tensor, scale: int) -> Tensor:
        """(B, p_s^2, z) -> (B, z, p_s, p_s)."""
        return codes.transpose(1, 2).unflatten(2, (self.sides[scale], self.sides[scale]))

    def contribution(self, codes: Tensor, scale: int) -> Tensor:
        """What codes (B, z, p_s, p_s) add to f_hat: phi of them at full size; also at the last scale."""
        last = scale == len(self.sides) - 1
        h = codes if last else F.interpolate(codes, size=(self.sides[-1], self.sides[-1]), mode="bicubic")
        return 0.5 * h + 0.5 * self.phi[self.phi_of[scale]](h)

    def reduced(self, full: Tensor, scale: int) -> Tensor:
        """(B, z, p, p) averaged over areas to the side of a scale."""
        return F.interpolate(full, size=(self.sides[scale], self.sides[scale]), mode="area")

    def tokens(self, f: Tensor) -> Tensor:
        """Tokens (B, L) of f."""
        return self.searched(f)[0]

    @torch.no_grad()
    def searched(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) of f, and the vectors (B, L, z) that each is the nearest code of."""
        tokens, vectors, rest = [], [], f
        for scale in range(len(self.sides)):
            rows = self.reduced(rest, scale).flatten(2).transpose(1, 2)  # (B, p_s^2, z)
            codes = self.embedding.weight
            nearest = (codes.square().sum(1) - 2 * rows @ codes.T).argmin(2)  # (B, p_s^2): of |e|^2 - 2 z e
            rest = rest - self.contribution(self.codes(nearest, scale), scale)
            tokens.append(nearest)
            vectors.append(rows)
        return torch.cat(tokens, dim=1), torch.cat(vectors, dim=1)

    def f_hat(self, tokens: Tensor) -> Tensor:
        """The sum of what all scales contribute, float32."""
        *_, last = self._partial_sums(tokens)
        return last

    def inputs(self, tokens: Tensor) -> Tensor:
        """The transformer's inputs for tokens 1..L-1, (B, L - 1, z): f_hat so far, at the size of the next scale."""
        partial = self._partial_sums(tokens)
        # zip stops before the last sum is made: `partial` is its second iterator.
        return torch.cat(
            [
                self.reduced(f_hat, scale).flatten(2).transpose(1, 2)
                for scale, f_hat in zip(range(1, len(self.sides)), partial, strict=False)
            ],
            dim=1,
        )

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f_hat, the quantisation loss and tokens (B, L), with gradients.

        That of f_hat passes straight through to f; the loss pulls codes to f and f to its codes, mean over scales.
        """
        tokens = self.tokens(f)
        loss = f.new_zeros(())
        for f_hat in self._partial_sums(tokens):
            loss = loss + COMMITMENT * F.mse_loss(f, f_hat.detach()) + F.mse_loss(f_hat, f.detach())
        return f + (f_hat - f).detach(), loss / len(self.sides), tokens

    def _partial_sums(self, tokens: Tensor) -> Iterator[Tensor]:
        """f_hat after each scale."""
        f_hat = self.embedding.weight.new_zeros(len(tokens), self.options.z_channels, self.sides[-1], self.sides[-1])
        for scale, (start, stop) in enumerate(self.options.bounds):
            f_hat = f_hat + self.contribution(self.codes(tokens[:, start:stop], scale), scale)
            yield f_hat


def phi_of_scale(num_scales: int) -> tuple[int, ...]:
    """The phi of each scale: the nearest of 4 ticks from 1/12 to 11/12, in float64.

    Of 10 scales the third and the eighth are ties that rounding decides; published weights were trained with it.
    """
    ticks = np.linspace(1 / 3 / NUM_PHI, 1 - 1 / 3 / NUM_PHI, NUM_PHI)
    return tuple(int(np.abs(ticks - s / (num_scales - 1)).argmin()) for s in range(num_scales))


# --- Files


def config_of(shape: tuple[int, ...], options: VqvaeOptions) -> dict[str, Any]:
    """The configuration that a tokenizer's file carries."""
    return tokenizers.config_of(NAME, shape, options.model_dump(mode="json"))


def load_into(vqvae: Vqvae, path: str | Path) -> None:
    """Reads the weights of a tokenizer. Raises CheckpointError if the file holds another one."""
    file = checkpoint.load(path, kind=tokenizers.KIND)
    expected = config_of(vqvae.shape, vqvae.options)
    config = file.header.get("config", {})
    if config != expected:
        theirs, ours = ({"shape": part.get("shape"), **part.get("options", {})} for part in (config, expected))
        keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        told = ", ".join(f"{key} {theirs.get(key)} instead of {ours.get(key)}" for key in keys)
        raise CheckpointError(f"{path} holds another tokenizer: {told}; set model.options.vqvae to the file's options")
    try:
        vqvae.load_state_dict(file.tensors)
    except RuntimeError as error:
        text = f"{path}: tensors do not fit the tokenizer its header describes: {reason(error)}"
        raise CheckpointError(text) from None
