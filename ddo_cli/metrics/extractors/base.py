"""Base class of feature extractors: uint8 images to features; scores compare only between extractors of one name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ddo_cli.errors import DataError, NumericsError, UsageError
from ddo_cli.precision import Device, inference_precision
from ddo_cli.transfer import to_device

Precision = Literal["float32", "tf32", "bf16"]
Mode = Literal["legacy", "clean"]  # how images get Inception's size: as in TensorFlow 1, or in clean-fid


class Extractor(ABC):
    """uint8 images (B, 1 or 3, H, W) -> features by output name, float32, on `device`.

    key: name of the Frechet distance of these features ("fid" for Inception-v3 only); outputs: "pool" (B, num_features)
    of every extractor, "logits" and "spatial" of Inception-v3; resize: how images get the network's size; name:
    network, preprocessing and precision; is_fixed: whether `protocol` determines the features, so that they may be
    cached; sha256: of the weight file; content_sha256: of the weights, in whatever file; is_published: whether these
    are the weights of published scores.
    """

    key: str
    resize: str
    outputs: tuple[str, ...] = ("pool",)
    is_fixed: bool = True

    def __init__(
        self,
        name: str,
        num_features: int,
        digest: str,
        device: Device,
        precision: Precision = "float32",
        content: str | None = None,
        is_published: bool = False,
    ) -> None:
        # Reduced precision changes the third digit of a distance, hence another name.
        self.name = name if precision == "float32" else f"{name}-{precision}"
        self.num_features, self.sha256, self.content_sha256 = num_features, digest, content or digest
        # Sums of features are float64, which Apple's GPUs lack.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.precision, self.is_published = precision, is_published

    def protocol(self) -> dict[str, str]:
        """Everything that features depend on: two extractors are comparable if their protocols are equal."""
        return {
            "extractor": self.name,
            "weights_sha256": self.content_sha256,
            "resize": self.resize,
            "precision": self.precision,
        }

    def __call__(self, images: Tensor) -> Tensor:
        """The pool features (B, F)."""
        return self.extract(images)["pool"]

    def extract(self, images: Tensor, outputs: Sequence[str] = ("pool",)) -> dict[str, Tensor]:
        """The given outputs (B, size) of one pass. Grey images are repeated to three channels.

        Raises DataError if these are not images, UsageError for an output that this extractor does not have, and
        NumericsError for features that are not finite.
        """
        if missing := [name for name in outputs if name not in self.outputs]:
            raise UsageError(
                f"the extractor {self.name} has no output '{missing[0]}', only {', '.join(self.outputs)}; the metric "
                "that needs it is one of Inception-v3"
            )
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(
                f"items of type {images.dtype} and shape {tuple(images.shape[1:])} have no features; the extractor "
                f"{self.name} reads uint8 images with 1 or 3 channels"
            )
        images = to_device(images, self.device).expand(-1, 3, -1, -1)  # (B, 3, H, W), moved as bytes
        with torch.no_grad(), inference_precision(self.precision, self.device):
            features = {name: value.to(torch.float32) for name, value in self._extract(images, outputs).items()}
        for name, value in features.items():
            if not torch.isfinite(value).all():
                raise NumericsError(
                    f"the extractor {self.name} gives '{name}' features that are not finite; its weights are damaged, "
                    "or its precision does not suffice"
                )
        return features

    @abstractmethod
    def _extract(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> {output: (B, size)} of the given outputs."""
