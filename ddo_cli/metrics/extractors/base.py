"""What every feature extractor is: uint8 images to features, under a name that says which numbers can be compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ddo_cli.errors import DataError, NumericsError, UsageError
from ddo_cli.precision import inference_precision

Precision = Literal["float32", "tf32", "bf16"]


class Extractor(ABC):
    """uint8 images (B, 1 or 3, H, W) -> features by output name, float32, on `device`.

    key: what a distance of these features is called ("fid" for Inception-v3 only); outputs: names of what it can give:
    "pool" (B, num_features), which everyone has, "logits" and "spatial" of Inception-v3; resize: how images reach the
    network's size; name: network, preprocessing and precision, so that numbers of different names cannot be compared;
    is_fixed: whether `protocol` names all that decides the features, so that they may be kept for later runs;
    sha256: of the weight file; content_sha256: of the weights, whatever file they lie in; is_published: whether these
    are the weights that published numbers rest on.
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
        device: torch.device | str,
        precision: Precision = "float32",
        content: str | None = None,
        is_published: bool = False,
    ) -> None:
        # Reduced precision moves a distance in its third digit: the numbers get a name of their own.
        self.name = name if precision == "float32" else f"{name}-{precision}"
        self.num_features, self.sha256, self.content_sha256 = num_features, digest, content or digest
        self.device, self.precision, self.is_published = torch.device(device), precision, is_published

    def protocol(self) -> dict[str, str]:
        """All that decides whether features can be compared with others: equal exactly if they can."""
        return {
            "extractor": self.name,
            "weights_sha256": self.content_sha256,
            "resize": self.resize,
            "precision": self.precision,
        }

    def __call__(self, images: Tensor) -> Tensor:
        """The pool features (B, F), as `extract` gives them."""
        return self.extract(images)["pool"]

    def extract(self, images: Tensor, outputs: Sequence[str] = ("pool",)) -> dict[str, Tensor]:
        """The outputs asked for, each (B, its size), of one pass. Grey images are repeated to three channels.

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
        images = images.to(self.device).expand(-1, 3, -1, -1)  # (B, 3, H, W), on its way as bytes
        with torch.no_grad(), inference_precision(self.precision, self.device):
            found = {name: value.to(torch.float32) for name, value in self._extract(images, outputs).items()}
        for name, value in found.items():
            if not torch.isfinite(value).all():
                raise NumericsError(
                    f"the extractor {self.name} gives '{name}' features that are not finite; its weights are damaged, "
                    "or its precision does not suffice"
                )
        return found

    @abstractmethod
    def _extract(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> {output: (B, its size)}, of those asked for."""


def short(error: BaseException) -> str:
    """The first words of a message of another library, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:240] + " ..."
