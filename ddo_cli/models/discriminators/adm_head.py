"""DG's published discriminator: a shallow ADM encoder on a frozen classifier's features (arXiv 2211.17091, 4.3)."""

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ddo_cli.models.discriminators.adm_encoder import AdmEncoder
from ddo_cli.models.discriminators.on_trunk import TrunkDiscriminator, TrunkFile, load_trunk
from ddo_cli.models.discriminators.registry import register


class AdmHead(AdmEncoder):
    """One logit per feature map."""

    def forward(self, features: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """(B,)."""
        return self.outputs(features, t, label).squeeze(1)


class AdmDiscriminatorOptions(TrunkFile):
    """Options of `adm-discriminator`; the defaults are the published head. Its time is the trunk's."""

    width: PositiveInt = 128
    depth: PositiveInt = 2  # residual blocks of each level
    channel_mult: tuple[PositiveFloat, ...] = Field((1,), min_length=1)  # channels of each level, in widths
    attention: tuple[PositiveInt, ...] = (32, 16, 8)  # sides at which blocks attend
    num_head_channels: PositiveInt = 64
    updown: bool = True  # halvings are residual blocks, and not convolutions
    scale_shift: bool = True  # the embedding scales and shifts after a norm, and is not added before it
    label_rows: PositiveInt = 1000  # of the label embedding; the published files have 1000 even for CIFAR-10


@register("adm-discriminator", AdmDiscriminatorOptions)
def build(shape: tuple[int, ...], num_classes: int, options: AdmDiscriminatorOptions) -> TrunkDiscriminator:
    """The published head for the features that the trunk makes of states of this shape. Raises as `load_trunk` does."""
    if num_classes > options.label_rows:
        raise ValueError(f"label_rows = {options.label_rows} must be at least the number of classes, {num_classes}")
    trunk, channels, side = load_trunk(shape, options)
    head = AdmHead(
        in_channels=channels,
        size=side,
        num_outputs=1,
        num_labels=options.label_rows if num_classes else 0,
        time=getattr(trunk, "time", "linear"),
        **options.model_dump(exclude={"trunk", "trunk_sha256", "label_rows"}),
    )
    return TrunkDiscriminator(trunk, head, options.trunk_sha256, (channels, side, side))
