"""One pass over images: everything that the metrics of `ddo fid` need of them, accumulated as they go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddo_cli import console, dist
from ddo_cli.data.inspection import Inspection
from ddo_cli.errors import DdoError
from ddo_cli.metrics.accumulators import Accumulator, ChunkedMoments, FeatureStore
from ddo_cli.metrics.extractor import Extractor
from ddo_cli.metrics.inception_score import InceptionScore
from ddo_cli.metrics.inception_score import Protocol as ScoreProtocol
from ddo_cli.metrics.likelihood_histogram import FeatureGaussian, NegativeLogLikelihoods
from ddo_cli.metrics.per_class import ClassMoments
from ddo_cli.metrics.references import SPATIAL_FEATURES

T = TypeVar("T")
LOGITS = 1008  # classes of the Inception that scores rest on


class Source(Protocol):
    """Images that a pass can take: `data.stream.ImageStream`, or a model that draws them."""

    name: str
    labels: np.ndarray
    num_classes: int

    @property
    def num(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_lossy(self) -> int: ...

    def share(self, batch: int) -> np.ndarray: ...

    def default_workers(self, device: torch.device, batch: int) -> int: ...

    def batches(
        self, batch: int, rows: np.ndarray | None = None, workers: int = 0, pin: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor]]: ...


class Wanted(NamedTuple):
    """What one extractor's metrics need of a set.

    moments: kinds of features ("pool", "spatial"); chunks: random parts that the moments of "pool" are kept apart for.
    """

    extractor: Extractor
    moments: tuple[str, ...] = ()
    chunks: int = 1
    score: ScoreProtocol | None = None
    features: bool = False
    classes: bool = False
    gaussian: FeatureGaussian | None = None


class Taken:
    """The accumulators of one extractor; after the pass the same on every process."""

    def __init__(self, wanted: Wanted, source: Source):
        extractor, num, device = wanted.extractor, source.num, wanted.extractor.device
        sizes = {"pool": extractor.num_features, "spatial": SPATIAL_FEATURES}
        self.extractor = extractor
        self.moments = {
            kind: ChunkedMoments(num, sizes[kind], kind, wanted.chunks if kind == "pool" else 1, device)
            for kind in wanted.moments
        }
        self.score = InceptionScore(num, LOGITS, wanted.score, device) if wanted.score else None
        self.features = FeatureStore(num, sizes["pool"], "pool", device) if wanted.features else None
        self.classes = (
            ClassMoments(source.labels, source.num_classes, sizes["pool"], "pool", device) if wanted.classes else None
        )
        self.nll = NegativeLogLikelihoods(num, wanted.gaussian) if wanted.gaussian is not None else None

    @property
    def accumulators(self) -> list[Accumulator]:
        """All that are there."""
        others = (self.score, self.features, self.classes, self.nll)
        return [*self.moments.values(), *(one for one in others if one is not None)]


class Passed(NamedTuple):
    """What a pass gave: by extractor, in the order asked for; and of the images themselves."""

    taken: list[Taken]
    inspection: Inspection


def run(
    source: Source, wanted: Sequence[Wanted], batch: int, workers: int | None, device: torch.device, title: str
) -> Passed:
    """Passes all images through every extractor once; collective. workers: that decode; None: as suits the source."""
    taken = [Taken(one, source) for one in wanted]
    inspection = Inspection(source.labels, source.num_classes)
    own = source.share(batch)
    count = source.default_workers(device, batch) if workers is None else workers

    def take() -> None:
        with console.progress(title, len(own), "images") as bar:
            for rows, images in source.batches(batch, own, count, pin=device.type == "cuda"):
                inspection.update(rows, images)
                for one in taken:
                    outputs = tuple({accumulator.needs: None for accumulator in one.accumulators})
                    found = one.extractor.extract(images, outputs)
                    for accumulator in one.accumulators:
                        accumulator.update(rows, found)
                bar.advance(len(rows))

    together(take)
    for one in taken:
        for accumulator in one.accumulators:
            accumulator.all_reduce()
    inspection.all_reduce(device)
    return Passed(taken, inspection)


def together(act: Callable[[], T]) -> T:
    """What `act` returns here, once no process has failed in it. Collective.

    Raises on every process the DdoError of the first one that did: left alone, the others would wait for it in the next
    collective call, which breaks down with a traceback when it ends, and the main process would not report the reason.
    """
    failure: DdoError | None = None
    try:
        found = act()
    except DdoError as error:
        failure = error
    for other in dist.gathered(failure):
        if other is not None:
            raise other
    return found
