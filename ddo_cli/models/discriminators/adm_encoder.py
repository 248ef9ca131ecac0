"""The encoder half of ADM's U-Net (arXiv 2105.05233): noisy-image classifiers, and DG's discriminator on top of one.

Discriminator Guidance (arXiv 2211.17091, section 4.3) takes the features of such a classifier, frozen, and trains a
shallow network of the same family on them. Names of parameters are those of the published files, which load as they
are; those have scale-shift norms, residual halvings, 64 channels per head and an attention-pooling head.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ddo_cli.diffusion import precond, vp_sde
from ddo_cli.likelihood import Options
from ddo_cli.models.adm.layers import (
    GROUPS,
    Attention,
    ResBlock,
    attend,
    attended,
    check_sizes,
    cosines_and_sines,
    embedded,
    encoder_blocks,
    group_norm,
)
from ddo_cli.models.discriminators.registry import register_classifier
from ddo_cli.models.norms import widened
from ddo_cli.models.sides import square
from ddo_cli.trainable import Trainable

Time = Literal["linear", "cosine"]
_SCHEDULES: dict[Time, Callable[[int], Tensor]] = {"linear": precond.linear_sigmas, "cosine": precond.cosine_sigmas}

# Options of the published classifiers by (channels, side) of the state; all tell 1000 classes. OpenAI trained those of
# 64x64 and above, of which only the 64x64 one knows the cosine schedule; DG's authors those of 32x32 images and of
# 32x32 latents. The two share the file name 32x32_classifier.pt.
PUBLISHED: dict[tuple[int, int], dict[str, Any]] = {
    (3, 32): {"depth": 4, "channel_mult": (1, 2, 4)},
    (4, 32): {"depth": 2, "channel_mult": (1, 2, 3)},
    (3, 64): {"depth": 4, "channel_mult": (1, 2, 3, 4), "time": "cosine"},
    (3, 128): {"depth": 2, "channel_mult": (1, 1, 2, 3, 4)},
    (3, 256): {"depth": 2, "channel_mult": (1, 1, 2, 2, 4, 4)},
    (3, 512): {"depth": 2, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)},
}


class AttentionPool(nn.Module):
    """What the mean over positions, as one more token, gathers from all. Here all of q come first, then k, then v."""

    def __init__(self, channels: int, side: int, head_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        # Our choice; the paper gives none: position vectors of length about 1.
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / math.sqrt(channels))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, num_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_outputs). x: (B, C, side, side)."""
        x = x.flatten(2)  # (B, C, T)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding  # (B, C, 1 + T)
        qkv = self.qkv_proj(x).unflatten(1, (3, -1, self.head_channels))  # (B, 3, heads, d, 1 + T)
        gathered = attend(qkv.permute(1, 0, 2, 4, 3), num_queries=1)  # (B, C, 1)
        with torch.autocast(x.device.type, enabled=False):
            return self.c_proj(widened(gathered)).squeeze(2)


class AdmEncoder(Trainable):
    """`num_outputs` numbers of a noisy state.

    depth: residual blocks of each level. channel_mult: each level's channels, in widths, finest first.
    attention: sides at which blocks attend, for states of side `size`.
    num_labels: rows of the label embedding; 0 = labels are ignored.
    time: "cosine" if the weights know the cosine schedule's time; t itself is always the linear one's. steps: the
    number M of steps of the schedule that they were trained at, so that t means the step's index (M - 1) t; None: they
    were trained at any time, which then counts to 999. rescaled_steps: they were told the index times 1000 / M.
    updown, scale_shift: as of `adm-unet`. Raises ValueError if the sizes do not divide.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: int,
        num_outputs: int,
        width: int = 128,
        depth: int = 2,
        channel_mult: Sequence[float],
        attention: Sequence[int] = (32, 16, 8),
        num_head_channels: int = 64,
        num_labels: int = 0,
        time: Time = "linear",
        steps: int | None = None,
        rescaled_steps: bool = False,
        updown: bool = True,
        scale_shift: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.time, self.steps, emb_width = width, time, steps, 4 * width
        with torch.device("cpu"):  # levels hold numbers even where the network is on meta
            self.known = precond.Discrete(_SCHEDULES[time](steps)) if steps else None
        self.step_scale = precond.NUM_STEPS / steps if steps and rescaled_steps else 1.0
        widths = [round(multiple * width) for multiple in channel_mult]  # channels of each level
        factors = {size // side for side in attention}  # as ADM reads them: by how much the state has been shrunk
        attending = [2**level in factors for level in range(len(widths))]
        if any(width % GROUPS for width in widths):
            raise ValueError(f"the levels' channels {widths} (width times channel_mult) must be multiples of {GROUPS}")
        check_sizes(size, widths, attending, num_head_channels)
        if any(channels % num_head_channels for channels in attended(widths, attending)):
            raise ValueError(
                f"channels {attended(widths, attending)} of attending levels must be multiples of num_head_channels = "
                f"{num_head_channels}"
            )
        self.time_embed = nn.Sequential(nn.Linear(width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.label_emb = nn.Embedding(num_labels, emb_width) if num_labels else None
        self.input_blocks, self.middle_block = encoder_blocks(
            in_channels,
            widths,
            depth,
            attending,
            partial(ResBlock, emb_width=emb_width, scale_shift=scale_shift),
            partial(Attention, head_channels=num_head_channels),
            updown,
        )
        side = size // 2 ** (len(widths) - 1)
        pool = AttentionPool(widths[-1], side, num_head_channels, num_outputs)
        self.out = nn.Sequential(group_norm(widths[-1]), nn.SiLU(), pool)

    def features(self, x_vp: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, C, h, w), what the pooling head sees. x_vp: float (B, C, H, W) in VP coordinates; t: (B,);
        label: int64 (B,), -1 = none.
        """
        t = vp_sde.cosine_time_of(t) if self.time == "cosine" else t
        return self.features_at(((self.steps or precond.NUM_STEPS) - 1) * t.to(torch.float64), x_vp, label)

    def features_at(self, step: Tensor, x_vp: Tensor, label: Tensor | None = None) -> Tensor:
        """`features`, told the index of a step, (B,), instead of a time."""
        emb = self.time_embed(cosines_and_sines(self.step_scale * step, self.width).to(x_vp.dtype))  # (B, E)
        if self.label_emb is not None and label is not None:
            emb = emb + embedded(self.label_emb, label)
        h = x_vp
        for block in self.input_blocks:
            h = block(h, emb)
        return self.middle_block(h, emb)

    def outputs(self, x_vp: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, num_outputs)."""
        return self.out(self.features(x_vp, t, label))


class AdmClassifier(AdmEncoder):
    """Class logits of noisy states."""

    def forward(self, x_vp: Tensor, t: Tensor) -> Tensor:
        """(B, classes)."""
        return self.outputs(x_vp, t)

    def at_steps(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """`forward`, told the nearest of the steps that it was trained at; None if those were no steps.

        For guiding a model of discrete steps, as OpenAI's code does: its steps lie up to 3.4 of them beside 999 t.
        """
        known = self.known

        def forward(x_vp: Tensor, t: Tensor) -> Tensor:
            assert known is not None
            return self.out(self.features_at(known.step_of(vp_sde.sigma_of(t)), x_vp))

        return None if known is None else forward


class AdmEncoderOptions(Options):
    """Options of `adm-classifier`. PUBLISHED has those of the published files."""

    width: PositiveInt = 128
    depth: PositiveInt = 2  # residual blocks of each level
    channel_mult: tuple[PositiveFloat, ...] = Field((1, 2, 3), min_length=1)  # each level's channels, in widths
    attention: tuple[PositiveInt, ...] = (32, 16, 8)  # sides at which blocks attend
    num_head_channels: PositiveInt = 64
    time: Time = "linear"  # cosine: for weights trained on the cosine schedule, as OpenAI's for 64x64
    steps: int | None = Field(None, ge=2, le=100_000)  # number of those that it was trained at; None: all times
    rescaled_steps: bool = False  # they were told as of 1000
    updown: bool = True  # halvings are residual blocks, and not convolutions
    scale_shift: bool = True  # the embedding scales and shifts after a norm, and is not added before it


@register_classifier("adm-classifier", AdmEncoderOptions)
def build_classifier(shape: tuple[int, ...], num_classes: int, options: AdmEncoderOptions) -> AdmClassifier:
    """A classifier of square states."""
    channels, side = square(shape)
    return AdmClassifier(in_channels=channels, size=side, num_outputs=num_classes, **options.model_dump())
