"""TimeEncoder: the encoder of a small U-Net, conditioned on time and label: discriminator and classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ddo_cli.diffusion import vp_sde
from ddo_cli.likelihood import NO_LABEL, Options, one_hot
from ddo_cli.models.discriminators.registry import register, register_classifier
from ddo_cli.models.toy.patch_unet import Stage
from ddo_cli.trainable import Trainable

_NUM_FREQUENCIES = 16  # of the time's Fourier features
_MAX_FREQUENCY = 16.0  # ln(sigma) / 4 spans about [-1.6, 1.3]: the fastest feature has 7 periods there
_NORM_GROUPS = 8
_COARSEST = 4  # smallest side of the coarsest level: patches do not grow beyond it
_FINE_ENOUGH = 8  # levels are added until the coarsest has at most this side, so that it sees the whole image
_WIDTHS = (64, 96, 128)  # of the default's levels; further ones are as wide as the last


class TimeEncoder(Trainable):
    """`num_outputs` numbers of a noisy state. Any channel count; square states of a side that the levels divide.

    Patches are folded into channels, then residual blocks at ever lower resolution, as in PatchUNet's encoder; features
    are normalised, modulated by the embedding and averaged over positions. Time enters as ln(sigma(t)) / 4, in which
    the levels of noise are evenly spread: t itself crowds the small ones against 0.

    num_classes: 0 = labels are ignored
    """

    frequencies: Tensor

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        num_classes: int,
        num_outputs: int,
        patch: int,
        widths: Sequence[int],
        depths: Sequence[int],
        emb_width: int,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or not widths:
            raise ValueError(f"widths {list(widths)} and depths {list(depths)} must be of the same length, at least 1")
        if widths[-1] % _NORM_GROUPS:
            raise ValueError(f"the last of widths {list(widths)} must be a multiple of {_NORM_GROUPS}")
        multiple = patch * 2 ** (len(widths) - 1)
        if size % multiple:
            raise ValueError(f"side {size} must be a multiple of patch * 2**(levels - 1) = {multiple}")
        self.num_classes, self.patch = num_classes, patch
        frequencies = torch.exp(torch.linspace(0.0, math.log(_MAX_FREQUENCY), _NUM_FREQUENCIES))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise_emb = nn.Linear(2 * _NUM_FREQUENCIES, emb_width)
        self.label_emb = nn.Linear(num_classes, emb_width, bias=False) if num_classes else None
        self.emb = nn.Linear(emb_width, emb_width)
        self.stem = nn.Conv2d(in_channels * patch**2, widths[0], 1)
        self.encoder = nn.ModuleList(Stage(w, depth, emb_width) for w, depth in zip(widths, depths, strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 1) for fine, coarse in pairwise(widths))
        self.norm = nn.GroupNorm(_NORM_GROUPS, widths[-1])
        self.affine = nn.Linear(emb_width, 2 * widths[-1])
        self.head = nn.Linear(widths[-1], num_outputs)
        nn.init.zeros_(self.head.weight)  # untrained, the logit is 0: no guidance at all
        nn.init.zeros_(self.head.bias)

    def outputs(self, x_vp: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """(B, num_outputs). x_vp: float (B, C, H, W) in VP coordinates; t: (B,); label: int64 (B,), -1 = none."""
        emb = self._embedding(t, label, x_vp.dtype)
        h = F.silu(self.norm(self._encoded(x_vp, emb)))  # (B, widths[-1], h, w)
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)  # (B, widths[-1], 1, 1) each
        pooled = F.silu(torch.addcmul(shift, h, 1 + scale)).mean((2, 3))  # (B, widths[-1])
        return self.head(pooled)

    def features(self, x_vp: Tensor, t: Tensor) -> Tensor:
        """(B, widths[-1], h, w): what the pooling head sees, before its normalisation."""
        label = torch.full((len(x_vp),), NO_LABEL, device=x_vp.device)
        return self._encoded(x_vp, self._embedding(t, label, x_vp.dtype))

    def _embedding(self, t: Tensor, label: Tensor, dtype: torch.dtype) -> Tensor:
        c_noise = (vp_sde.sigma_of(t).log() / 4).to(dtype)  # (B,)
        angles = c_noise[:, None] * self.frequencies  # (B, frequencies)
        emb = self.noise_emb(torch.cat([angles.cos(), angles.sin()], dim=1))  # (B, E)
        if self.label_emb is not None:
            emb = emb + self.label_emb(one_hot(label, self.num_classes).to(emb.dtype))
        return F.silu(self.emb(F.silu(emb)))

    def _encoded(self, x_vp: Tensor, emb: Tensor) -> Tensor:
        h = F.pixel_unshuffle(x_vp, self.patch).contiguous(memory_format=torch.channels_last)
        h = self.stem(h)  # (B, widths[0], H/p, W/p)
        for level, stage in enumerate(self.encoder):
            h = stage(h, emb)
            if level < len(self.shrink):
                h = self.shrink[level](F.pixel_unshuffle(h, 2))  # (B, widths[level + 1], half, half)
        return h


class TimeEncoderDiscriminator(TimeEncoder):
    """One logit per state."""

    def forward(self, x_vp: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """(B,)."""
        return self.outputs(x_vp, t, label).squeeze(1)


class TimeEncoderClassifier(TimeEncoder):
    """Class logits of noisy states, which see no label."""

    def forward(self, x_vp: Tensor, t: Tensor) -> Tensor:
        """(B, classes)."""
        return self.outputs(x_vp, t, torch.full((len(x_vp),), NO_LABEL, device=x_vp.device))


class TimeEncoderOptions(Options):
    """Options of `time-encoder`; the defaults have 0.36 M parameters at 32x32."""

    patch: int | None = Field(None, ge=1)  # side of a patch; None: 4, or less where the coarsest side would be below 4
    widths: tuple[PositiveInt, ...] | None = None  # of each level, finest first; None: 2 or more levels from 64 to 128
    depths: tuple[PositiveInt, ...] | None = None  # residual blocks of each level; None: one each
    emb_width: int = Field(128, ge=1)


def settings(shape: tuple[int, ...], options: TimeEncoderOptions) -> dict[str, object]:
    """Constructor arguments for states of this shape. Raises ValueError unless they are square images."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError("it needs square images or latents; points need discriminator.name = time-mlp")
    levels = len(options.widths or (0, 0))
    patch = options.patch
    if patch is None:
        halvings = 2 ** (levels - 1)
        patch = next(
            (p for p in (4, 2) if shape[1] % (p * halvings) == 0 and shape[1] // (p * halvings) >= _COARSEST), 1
        )
    while options.widths is None and shape[1] // (patch * 2 ** (levels - 1)) > _FINE_ENOUGH:
        levels += 1
    widths = options.widths or tuple(_WIDTHS[min(level, len(_WIDTHS) - 1)] for level in range(levels))
    return {
        "in_channels": shape[0],
        "size": shape[1],
        "patch": patch,
        "widths": widths,
        "depths": options.depths or (1,) * len(widths),
        "emb_width": options.emb_width,
    }


@register("time-encoder", TimeEncoderOptions)
def build(shape: tuple[int, ...], num_classes: int, options: TimeEncoderOptions) -> TimeEncoderDiscriminator:
    """A discriminator of square states."""
    network = TimeEncoderDiscriminator(num_classes=num_classes, num_outputs=1, **settings(shape, options))  # type: ignore[arg-type]
    return network.to(memory_format=torch.channels_last)


@register_classifier("time-encoder-classifier", TimeEncoderOptions)
def build_classifier(shape: tuple[int, ...], num_classes: int, options: TimeEncoderOptions) -> TimeEncoderClassifier:
    """A classifier of square states."""
    network = TimeEncoderClassifier(num_classes=0, num_outputs=num_classes, **settings(shape, options))  # type: ignore[arg-type]
    return network.to(memory_format=torch.channels_last)
