"""A shallow discriminator on the features of a frozen noisy-image classifier (arXiv 2211.17091, section 4.3)."""

from typing import Any

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from ddo_cli import checkpoint
from ddo_cli.errors import CheckpointError
from ddo_cli.files import sha256
from ddo_cli.likelihood import Options
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.discriminators.registry import Classifier, register
from ddo_cli.models.discriminators.time_encoder import TimeEncoderDiscriminator
from ddo_cli.trainable import Trainable


class TrunkFile(Options):
    """The frozen classifier under a discriminator; every kind of head adds its own options."""

    trunk: str  # the classifier's file; it is not copied into the discriminator's
    trunk_sha256: str  # of that file when the discriminator was configured; filled in where it is not given

    @model_validator(mode="before")
    @classmethod
    def _hashed(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "trunk" in values and "trunk_sha256" not in values:
            return {**values, "trunk_sha256": sha256(checkpoint.resolve(values["trunk"]))}
        return values


class TrunkOptions(TrunkFile):
    """Options of `trunk`. The defaults are the published head's width and depth."""

    widths: tuple[PositiveInt, ...] = (128,)
    depths: tuple[PositiveInt, ...] = (2,)
    emb_width: int = Field(512, ge=1)


class TrunkDiscriminator(Trainable):
    """head(trunk.features(x_vp, t), t, label). Only the head has parameters and a place in the state dict."""

    def __init__(
        self, trunk: Classifier, head: nn.Module, trunk_sha256: str, feature_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.head, self.trunk_sha256, self.feature_shape = head, trunk_sha256, feature_shape
        self._trunk = [trunk]  # in a list: nn.Module would register it, and weight files would carry it

    def forward(self, x_vp: Tensor | None, t: Tensor, label: Tensor, features: Tensor | None = None) -> Tensor:
        """(B,). The trunk is differentiated with respect to x_vp where x_vp is, as guidance needs.

        features: the trunk's, where they are known; x_vp is then not needed.
        """
        if features is None:
            assert x_vp is not None, "states or their features"
            features = self._trunk[0].features(x_vp, t)
        return self.head(features, t, label)

    @property
    def trunk(self) -> Classifier:
        return self._trunk[0]

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        trunk = self._trunk[0]
        if isinstance(trunk, nn.Module):
            trunk._apply(fn, recurse)  # moves to the same device
        return super()._apply(fn, recurse)


def load_trunk(shape: tuple[int, ...], options: TrunkFile) -> tuple[Classifier, int, int]:
    """The frozen classifier that the options name, and the channels and side of its features.

    Raises CheckpointError if its file is missing or changed, ValueError if it is for states of another shape.
    """
    on_cpu = torch.device("cpu")  # as a context: the discriminator itself may be built without memory
    try:
        with on_cpu:
            trunk, file = discriminators.load("classifier", options.trunk, on_cpu)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; it is the classifier under a discriminator, which names it by this path: put it there, or start "
            "the program where the path leads to it"
        ) from None
    if not callable(getattr(trunk, "features", None)):
        raise ValueError(
            f"the trunk {options.trunk} has no method features(x_vp, t); see models/discriminators/registry.py"
        )
    if options.trunk_sha256 != file.sha256:
        raise CheckpointError(
            f"{options.trunk} has changed since the discriminator was trained on it (sha256 {file.sha256[:12]}, then "
            f"{options.trunk_sha256[:12]}); put the classifier of that time there"
        )
    made_for = tuple(file.header["config"]["shape"])
    if made_for != shape:
        raise ValueError(f"the trunk {options.trunk} was made for states of shape {made_for}")
    with torch.no_grad(), on_cpu:
        black, time = torch.zeros(1, *shape), torch.ones(1, dtype=torch.float64)
        _, channels, side, _ = trunk.features(black, time).shape  # type: ignore[operator]
    return trunk, channels, side  # type: ignore[return-value]


@register("trunk", TrunkOptions)
def build(shape: tuple[int, ...], num_classes: int, options: TrunkOptions) -> TrunkDiscriminator:
    """The head for the features that the trunk makes of states of this shape. Raises as `load_trunk` does."""
    trunk, channels, side = load_trunk(shape, options)
    head = TimeEncoderDiscriminator(
        in_channels=channels,
        size=side,
        num_classes=num_classes,
        num_outputs=1,
        patch=1,
        **options.model_dump(include={"widths", "depths", "emb_width"}),
    )
    return TrunkDiscriminator(
        trunk, head.to(memory_format=torch.channels_last), options.trunk_sha256, (channels, side, side)
    )
