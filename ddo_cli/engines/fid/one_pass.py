"""One pass over images: everything that the metrics of `ddo fid` need of them, accumulated as they go by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from ddo_cli import console, dist
from ddo_cli.data.inspection import Inspection
from ddo_cli.engines.fid import cache as fid_cache
from ddo_cli.errors import DdoError
from ddo_cli.files import cache_directory
from ddo_cli.metrics.accumulators import Accumulator, ChunkedMoments, FeatureStore
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.inception_score import InceptionScore
from ddo_cli.metrics.inception_score import Protocol as ScoreProtocol
from ddo_cli.metrics.likelihood_histogram import FeatureGaussian, NegativeLogLikelihoods
from ddo_cli.metrics.per_class import ClassMoments
from ddo_cli.metrics.references import SPATIAL_FEATURES

T = TypeVar("T")
LOGITS = 1008  # classes of the Inception that scores rest on


class Source(fid_cache.HasIdentity, Protocol):
    """Images that a pass can take: `data.stream.ImageStream`, or a model that draws them, which has no identity."""

    name: str

    @property
    def num_lossy(self) -> int: ...

    def share(self, batch: int) -> np.ndarray: ...

    def default_workers(self, device: torch.device, batch: int) -> int: ...


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
    """What a pass gave: by extractor, in the order asked for; and of the images themselves.

    is_kept: an earlier pass had left it all, and no image went through a network.
    """

    taken: list[Taken]
    inspection: Inspection
    is_kept: bool = False


def run(
    source: Source,
    wanted: Sequence[Wanted],
    batch: int,
    workers: int | None,
    device: torch.device,
    title: str,
    cache: bool = True,
) -> Passed:
    """Passes all images through every extractor once; collective. workers: that decode; None: as suits the source.

    cache: what an earlier pass over the same images has left is taken from there, and what this one finds is kept.
    """
    taken = [Taken(one, source) for one in wanted]
    looked_up = partial(_pass, source, batch=batch, workers=workers, device=device)
    keeps = dist.from_main(cache and source.identity is not None and cache_directory() is not None)
    known = _known(source, partial(looked_up, [], title=f"digests of {title}")) if keeps else None
    due = [(one.extractor, one.accumulators) for one in taken]
    if known is not None:
        done = dist.from_main([fid_cache.restore(known, *one) for one in due] if dist.is_main() else [])
        due = [
            (extractor, [one for one, is_done in zip(accumulators, flags, strict=True) if not is_done])
            for (extractor, accumulators), flags in zip(due, done, strict=True)
        ]
    is_kept = known is not None and not any(accumulators for _, accumulators in due)
    inspection = known if known is not None and is_kept else looked_up(due, title=title)
    if known is not None and inspection.order() != known.order():
        # Other images under the same names, sizes and times: what was restored is of the old ones.
        if dist.is_main():
            fid_cache.forget_inspection(source)
        dist.barrier()
        return run(source, wanted, batch, workers, device, title, cache)
    for one in taken:
        for accumulator in one.accumulators:
            accumulator.all_reduce()
    if keeps and dist.is_main():
        if known is None:
            fid_cache.keep_inspection(source, inspection)
        for extractor, accumulators in due:
            fid_cache.store(inspection, extractor, accumulators)
    return Passed(taken, inspection, is_kept)


def _known(source: Source, look: Callable[[], Inspection]) -> Inspection | None:
    """The images' digests, by the files' identity or by decoding them; None if they are new. Collective.

    look: decodes all images and passes them through no network. Only for sets that may have been seen before.
    """
    found = dist.from_main(fid_cache.inspection(source) if dist.is_main() else None)
    if found is not None:
        return found
    if not dist.from_main(together(lambda: dist.is_main() and fid_cache.may_be_known(source))):
        return None
    found = look()
    if dist.is_main():
        fid_cache.keep_inspection(source, found)
    return found


def _pass(
    source: Source,
    due: Sequence[tuple[Extractor, Sequence[Accumulator]]],
    batch: int,
    workers: int | None,
    device: torch.device,
    title: str,
) -> Inspection:
    """Decodes all images and feeds the accumulators of each extractor; collective. Returns the images' own figures."""
    inspection = Inspection(source.labels, source.num_classes)
    own = source.share(batch)
    count = source.default_workers(device, batch) if workers is None else workers

    def take() -> None:
        with console.progress(title, len(own), "images") as bar:
            for rows, images in source.batches(batch, own, count, pin=device.type == "cuda"):
                inspection.update(rows, images)
                for extractor, accumulators in due:
                    if not accumulators:
                        continue
                    found = extractor.extract(images, tuple({one.needs: None for one in accumulators}))
                    for accumulator in accumulators:
                        accumulator.update(rows, found)
                bar.advance(len(rows))

    together(take)
    inspection.all_reduce(device)
    return inspection


def together(act: Callable[[], T]) -> T:
    """What `act` returns here, once no process has failed in it. Collective.

    Raises on every process the DdoError or OSError of the first one that did: left alone, the others would wait for it
    in the next collective call, which breaks down with a traceback when it ends, and the main process would not report
    the reason.
    """
    failure: DdoError | OSError | None = None
    try:
        found = act()
    except (DdoError, OSError) as error:
        failure = error
    for other in dist.gathered(failure):
        if other is not None:
            raise other
    return found
