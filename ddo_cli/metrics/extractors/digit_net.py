"""DigitNet: a small image classifier whose features serve the embedded Frechet distance."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli.trainable import Trainable


class DigitNet(Trainable):
    """Convolutional classifier of 32x32 RGB images; each convolution halves the side, except for the last.

    No normalisation layer and no dropout: the features of an image depend on that image only, in training too, and on
    its contrast.

    num_classes: number of logits
    widths: channels of each convolution; the last is the number of features
    """

    def __init__(self, *, num_classes: int = 10, widths: Sequence[int] = (32, 64, 96, 64)) -> None:
        super().__init__()
        strides = [2] * (len(widths) - 1) + [1]
        inputs = [3, *widths[:-1]]
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
            for c_in, c_out, stride in zip(inputs, widths, strides, strict=True)
        )
        self.classifier = nn.Linear(widths[-1], num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Non-negative features, float (B, widths[-1]): the last convolution after ReLU, averaged over positions.

        images: float (B, 3, 32, 32) in [-1, 1].
        """
        h = images
        for conv in self.convs:
            h = F.relu(conv(h))  # (B, width, side, side)
        return h.mean(dim=(2, 3))  # (B, widths[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float (B, num_classes)."""
        return self.classifier(self.features(images))
