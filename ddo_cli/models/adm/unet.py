"""ADM's U-Net (arXiv 2105.05233, section 4), as OpenAI published it and as EDM trained it again (arXiv 2206.00364).

The two programs write the same function differently; parameters here have OpenAI's names, in its "legacy" order of the
attention's channels. `adm.keys` translates EDM's tensors and the other order.
"""

from collections.abc import Sequence
from functools import partial

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ddo_cli.codec import PixelCodec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.precond import NUM_STEPS, SCHEDULES, Discrete
from ddo_cli.models.adm.layers import (
    Attention,
    Block,
    ResBlock,
    Upsample,
    check_sizes,
    cosines_and_sines,
    embedded,
    encoder_blocks,
    group_norm,
    head_width,
)
from ddo_cli.models.norms import widened
from ddo_cli.models.registry import register
from ddo_cli.models.sides import square


class AdmUnetOptions(DiffusionOptions):
    """Options of `adm-unet`. Their defaults are the network of 64x64 ImageNet; the published ones: `adm.published`.

    width: channels of the noise level's features; channel_mult: each level's channels, in widths, finest first
    num_blocks: residual blocks of a level on the way down; one more on the way up
    attention: sides at which every block attends; the middle of the network always does
    num_head_channels: channels of each head, or a few more where they do not divide a level's: as many heads as have so
        many (EDM's rule; OpenAI's code takes multiples only). num_heads, if given: so many heads everywhere instead
    dropout: share of activations dropped in each block, in train mode only
    augment_dim: width of the augmentation labels that the network was trained with (0: none)
    group_channels: norms have 32 groups, or fewer where a group would have less than this (1 for OpenAI, 4 for EDM,
        which is no difference from 128 channels on)
    updown: halvings and doublings are residual blocks, and not convolutions
    scale_shift: the embedding scales and shifts after a norm, and is not added before it
    num_steps: of the schedule that precond ddpm or cosine names
    rescaled_steps: the network is told a step's number times 1000 / num_steps
    """

    width: int = Field(192, ge=2, multiple_of=2)
    channel_mult: tuple[PositiveFloat, ...] = Field((1, 2, 3, 4), min_length=1)
    num_blocks: PositiveInt = 3
    attention: tuple[PositiveInt, ...] = (32, 16, 8)
    num_head_channels: PositiveInt = 64
    num_heads: PositiveInt | None = None
    dropout: float = Field(0.0, ge=0, lt=1)  # 0.1 in the 64x64 trainings; 0 here: model and reference share their draw
    augment_dim: int = Field(0, ge=0)
    group_channels: PositiveInt = 1
    updown: bool = True
    scale_shift: bool = True
    num_steps: int = Field(NUM_STEPS, ge=2, le=100_000)
    rescaled_steps: bool = False


class AdmUnet(nn.Module):
    """The raw network F.

    in_channels, out_channels: of x and of F; they differ with a learned variance, or with a condition beside the state
    size: side of the states, a multiple of 2**(len(channel_mult) - 1)
    num_classes: 0 = unconditional, labels are then ignored
    Raises ValueError if the sizes do not divide.
    """

    adapter_targets = ("qkv", "proj_out")

    def __init__(
        self, in_channels: int, out_channels: int, size: int, num_classes: int, options: AdmUnetOptions
    ) -> None:
        super().__init__()
        width, num_blocks, groups = options.width, options.num_blocks, options.group_channels
        self.width, self.augment_dim, emb_width = width, options.augment_dim, 4 * width
        widths = level_widths(width, options.channel_mult)
        attending = [size >> level in options.attention for level in range(len(widths))]
        check_sizes(size, widths, attending, options.num_head_channels, options.num_heads)
        res = partial(
            ResBlock,
            emb_width=emb_width,
            dropout=options.dropout,
            group_channels=groups,
            scale_shift=options.scale_shift,
        )

        def attend(channels: int) -> Attention:
            return Attention(channels, head_width(channels, options.num_head_channels, options.num_heads), groups)

        self.augment_emb = nn.Linear(self.augment_dim, width, bias=False) if self.augment_dim else None
        self.time_embed = nn.Sequential(nn.Linear(width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.label_emb = nn.Embedding(num_classes, emb_width) if num_classes else None
        self.input_blocks, self.middle_block = encoder_blocks(
            in_channels, widths, num_blocks, attending, res, attend, options.updown
        )

        # Channels that input_blocks leave: the first convolution, each level's blocks, its halving.
        last = len(widths) - 1
        skips = [widths[0], *(c for level, c in enumerate(widths) for _ in range(num_blocks + (level < last)))]
        channels = widths[-1]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(num_blocks + 1):
                layers: list[nn.Module] = [res(channels + skips.pop(), widths[level])]
                channels = widths[level]
                if attending[level]:
                    layers.append(attend(channels))
                if level and i == num_blocks:
                    up = res(channels, channels, resampling="up") if options.updown else Upsample(channels)
                    layers.append(up)
                self.output_blocks.append(Block(layers))
        head = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.out = nn.Sequential(group_norm(channels, groups), nn.SiLU(), head)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        if self.augment_emb is not None:
            nn.init.zeros_(self.augment_emb.weight)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        """F, (B, out_channels, H, W).

        x: float (B, in_channels, H, W), already multiplied by c_in. label: int64 (B,), -1 = no label.
        c_noise: float (B,), the position whose cosines and sines the network knows: ln(sigma) / 4 of EDM, or the index
        0 .. 999 of a step. augment: float (B, augment_dim), what was done to x; None = nothing, the same as zeros.
        """
        features = cosines_and_sines(c_noise, self.width).to(x.dtype)  # (B, width)
        if self.augment_emb is not None:  # zeros and not left out: DDP wants each parameter to have a gradient
            given = features.new_zeros(len(x), self.augment_dim) if augment is None else augment
            features = features + self.augment_emb(given)
        emb = self.time_embed(features)  # (B, E)
        if self.label_emb is not None:
            emb = emb + embedded(self.label_emb, label)
        h = x
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h = block(h, emb)  # (B, channels, side, side)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        with torch.autocast(h.device.type, enabled=False):
            return self.out(widened(h))  # (B, out_channels, H, W)

    def units(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, (ResBlock, Attention))]


def level_widths(width: int, channel_mult: Sequence[float]) -> list[int]:
    """Channels of each level, finest first."""
    return [round(multiple * width) for multiple in channel_mult]


@register("adm-unet", AdmUnetOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: AdmUnetOptions, draw_options: DiffusionDrawOptions
) -> DiffusionModel:
    """A denoiser of square uint8 images. Raises ValueError for another shape, or steps that `precond` does not have."""
    channels, side = square(shape)
    net = AdmUnet(channels, channels * (2 if options.learned_variance else 1), side, num_classes, options)
    return DiffusionModel(net, PixelCodec(shape), num_classes, options, draw_options, _of_steps(options))


def _of_steps(options: AdmUnetOptions) -> Discrete | None:
    """The preconditioner of another number of steps than 1000; None: the one that `precond` names."""
    if options.num_steps == NUM_STEPS:
        return None
    if options.precond not in SCHEDULES:
        raise ValueError(f"num_steps = {options.num_steps} is of precond ddpm or cosine, not {options.precond}")
    with torch.device("cpu"):  # levels hold numbers even where the network is on meta
        return Discrete(SCHEDULES[options.precond](options.num_steps), rescaled=options.rescaled_steps)
