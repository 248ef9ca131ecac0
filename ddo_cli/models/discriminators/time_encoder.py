"""TimeEncoder: the encoder of a small U-Net, conditioned on time and label: discriminator and classifier."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from ddo_cli.diffusion import vp_sde
from ddo_cli.likelihood import NO_LABEL, Options
from ddo_cli.models.discriminators.registry import register, register_classifier
from ddo_cli.models.norms import GroupNorm, widened
from ddo_cli.models.sides import check_side, square
from ddo_cli.models.toy.patch_unet import PatchEncoder

_NORM_GROUPS = 8
_COARSEST = 4  # smallest side of the coarsest level: patches do not grow beyond it
_FINE_ENOUGH = 8  # levels are added until the coarsest has at most this side, so that it sees the whole image
_WIDTHS = (64, 96, 128)  # of the default's levels; further ones are as wide as the last


class TimeEncoder(PatchEncoder):
    """`num_outputs` numbers of a noisy state. Any channel count; square states of a side that the levels divide.

    Its features are normalised, modulated by the embedding and averaged over positions. Time enters as
    ln(sigma(t)) / 4, in which the levels of noise are evenly spread: t itself crowds the small ones against 0.

    num_classes: 0 = labels are ignored
    """

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
        super().__init__(in_channels, num_classes, patch, widths, depths, emb_width)
        if widths[-1] % _NORM_GROUPS:
            raise ValueError(f"the last of widths {list(widths)} must be a multiple of {_NORM_GROUPS}")
        check_side(size, patch * 2 ** (len(widths) - 1), "patch", "widths")
        self.shrink = nn.ModuleList(nn.Conv2d(4 * fine, coarse, 1) for fine, coarse in pairwise(widths))
        self.norm = GroupNorm(_NORM_GROUPS, widths[-1])
        self.affine = nn.Linear(emb_width, 2 * widths[-1])
        self.head = nn.Linear(widths[-1], num_outputs)
        nn.init.zeros_(self.head.weight)  # untrained, the logit is 0: no guidance at all
        nn.init.zeros_(self.head.bias)

    def outputs(self, x_vp: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """(B, num_outputs). x_vp: float (B, C, H, W) in VP coordinates; t: (B,); label: int64 (B,), -1 = none."""
        features, emb = self._encoded(x_vp, t, label)
        h = F.silu(self.norm(features))  # (B, widths[-1], h, w)
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)  # (B, widths[-1], 1, 1) each
        pooled = F.silu(torch.addcmul(shift, h, 1 + scale)).mean((2, 3))  # (B, widths[-1])
        with torch.autocast(x_vp.device.type, enabled=False):
            return self.head(widened(pooled))

    def features(self, x_vp: Tensor, t: Tensor) -> Tensor:
        """(B, widths[-1], h, w): what the pooling head sees, before its normalisation."""
        return self._encoded(x_vp, t, torch.full((len(x_vp),), NO_LABEL, device=x_vp.device))[0]

    def _encoded(self, x_vp: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, widths[-1], h, w) and embedding (B, E)."""
        emb = self.embedding((vp_sde.sigma_of(t).log() / 4).to(x_vp.dtype), label)
        return self.levels(self.patches(x_vp), emb)[-1], emb


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
    if len(shape) != 3:
        raise ValueError("it needs square images or latents; points need discriminator.name = time-mlp")
    square(shape)
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
