"""Scores of generated images within a run: Frechet distance from one reference, and distance from captions by CLIP."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ddo_cli import dist
from ddo_cli.errors import DataError
from ddo_cli.metrics import frechet
from ddo_cli.metrics.extractors import clip_text
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.stats import Moments, Statistics


class HasItems(Protocol):
    """Anything with uint8 images (N, C, H, W), such as data.images.ItemSet."""

    @property
    def items(self) -> np.ndarray: ...


def share_of_batches(items: np.ndarray, batch: int) -> Iterator[Tensor]:
    """This process's share of the batches of `items` (N, ...), each (b, ...)."""
    for start in dist.shard(range(0, len(items), batch)):
        # Copied because the items may be a read-only mapped file.
        yield torch.from_numpy(items[start : start + batch].copy())


def moments_of(extractor: Extractor, batches: Iterable[Tensor]) -> Moments:
    """Moments of the features of all processes' images. batches: uint8 (b, C, H, W), this process's share only."""
    moments = Moments(extractor.num_features, extractor.device)
    for images in batches:
        moments.update(extractor(images))
    return moments.all_reduce()


class FrechetScorer:
    """Frechet distance from a fixed reference, whose moments and factor are computed once.

    reference: images (all of them on every process) or moments; batch: reference images per network pass.
    """

    def __init__(
        self, extractor: Extractor, reference: np.ndarray | HasItems | Moments | Statistics, batch: int = 256
    ) -> None:
        self.extractor = extractor
        items = reference if isinstance(reference, np.ndarray) else getattr(reference, "items", None)
        if items is not None:
            reference = moments_of(extractor, share_of_batches(items, batch))
        moments = cast(Moments | Statistics, reference)
        self.reference = frechet.reference(moments.mean, moments.cov)

    def score(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """{extractor.key: distance}, lower is better, the same on every process.

        batches: uint8 (b, C, H, W), this process's share of the images, which may be empty.
        Raises ValueError if all processes together pass fewer than two images.
        """
        moments = moments_of(self.extractor, batches)
        value = frechet.distance_to(self.reference, moments.mean, moments.cov)
        return {self.extractor.key: dist.from_main(value)}  # all processes must decide alike


class ClipScorer:
    """CLIP score of images and captions, and what is left of it to 100: a distance, as every metric of a run is one.

    captions: by label.
    """

    key = "clip_distance"

    def __init__(self, extractor: clip_text.ClipTextExtractor, captions: Sequence[str]):
        self.extractor, self.texts = extractor, extractor.of_texts(captions)

    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """{"clip_distance": 100 - s, "clip": s}, s the mean of 100 max(cos, 0), the same on every process.

        batches: uint8 (b, C, H, W) and labels (b,), this process's share. Raises DataError if there are no images.
        """
        values = list[float]()
        for images, label in batches:
            texts = self.texts[label.to(self.texts.device)]
            values += clip_text.scores(self.extractor(images), texts).tolist()
        every = [value for part in dist.gathered(values) for value in part]
        if not every:
            raise DataError("a CLIP score needs images; draw at least one")
        mean = math.fsum(every) / len(every)  # in whatever order
        return {self.key: clip_text.SCALE - mean, clip_text.KEY: mean}
