"""One pass over images: everything that the metrics of `ddo fid` need of them, accumulated batch by batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from ddo_cli import console, dist
from ddo_cli.data.inspection import Inspection
from ddo_cli.engines.fid import cache as fid_cache
from ddo_cli.engines.fid.cache import Source
from ddo_cli.errors import DdoError
from ddo_cli.files import cache_directory
from ddo_cli.metrics.accumulators import Accumulator, ChunkedMoments, ClassMoments, FeatureStore
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.inception_score import InceptionScore
from ddo_cli.metrics.inception_score import Protocol as ScoreProtocol
from ddo_cli.metrics.likelihood_histogram import FeatureGaussian, NegativeLogLikelihoods
from ddo_cli.metrics.references import SPATIAL_FEATURES

T = TypeVar("T")
LOGITS = 1008  # classes of the Inception that the Inception Score uses


class Wanted(NamedTuple):
    """What one extractor's metrics need of a set.

    moments: kinds of features ("pool", "spatial"); chunks: random parts that the moments of "pool" are kept apart for.
    captions: whether features are compared with those of captions, and not with a reference's.
    """

    extractor: Extractor
    moments: tuple[str, ...] = ()
    chunks: int = 1
    score: ScoreProtocol | None = None
    features: bool = False
    classes: bool = False
    gaussian: FeatureGaussian | None = None
    captions: bool = False

    @property
    def has_reference(self) -> bool:
        """Whether a reference is needed."""
        return bool(self.moments or self.features or self.classes) and not self.captions


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
            ClassMoments(source.labels, source.num_classes, sizes["pool"], device) if wanted.classes else None
        )
        self.nll = NegativeLogLikelihoods(num, wanted.gaussian) if wanted.gaussian is not None else None
        every = (*self.moments.values(), self.score, self.features, self.classes, self.nll)
        self.accumulators: list[Accumulator] = [each for each in every if each is not None]


class Passed(NamedTuple):
    """The result of a pass: accumulators by extractor, in the order asked for, and figures of the images themselves.

    is_cached: everything came from the cache, and no image went through a network.
    """

    taken: list[Taken]
    inspection: Inspection
    is_cached: bool = False


def run(
    source: Source,
    wanted: Sequence[Wanted],
    title: str,
    *,
    batch: int,
    workers: int | None,
    device: torch.device,
    cache: bool = True,
) -> Passed:
    """Passes all images through every extractor once; collective. workers: that decode; None: as suits the source.

    cache: reuse what earlier passes over the same images have computed, and keep what this one computes.
    """
    taken = [Taken(of_one, source) for of_one in wanted]
    decode = partial(_pass, source, batch=batch, workers=workers, device=device)
    uses_cache = dist.from_main(cache and source.identity is not None and cache_directory() is not None)
    known = _known(source, partial(decode, [], title=f"digests of {title}")) if uses_cache else None
    missing = [(of_one.extractor, of_one.accumulators) for of_one in taken]
    if known is not None:
        restored = on_main(lambda: [fid_cache.restore(known, *of_one) for of_one in missing])
        missing = [
            (extractor, [accumulator for accumulator, is_done in zip(accumulators, flags, strict=True) if not is_done])
            for (extractor, accumulators), flags in zip(missing, restored, strict=True)
        ]
    is_cached = known is not None and not any(accumulators for _, accumulators in missing)
    inspection = known if known is not None and is_cached else decode(missing, title=title)
    if known is not None and inspection.order() != known.order():
        # Other images under the same names, sizes and times: what was restored belongs to the old ones.
        on_main(lambda: fid_cache.forget_inspection(source))
        return run(source, wanted, title, batch=batch, workers=workers, device=device, cache=cache)
    for of_one in taken:
        for accumulator in of_one.accumulators:
            accumulator.all_reduce()
    if uses_cache and dist.is_main():
        if known is None:
            fid_cache.keep_inspection(source, inspection)
        for of_one in taken:
            fid_cache.store(inspection, of_one.extractor, of_one.accumulators, restored=known is not None)
    return Passed(taken, inspection, is_cached)


def _known(source: Source, decode: Callable[[], Inspection]) -> Inspection | None:
    """The images' digests, by the files' identity or by decoding them; None if they are new. Collective.

    decode: decodes all images and passes them through no network. Only for sets that may have been seen before.
    """
    inspection = on_main(lambda: fid_cache.inspection(source))
    if inspection is not None or not on_main(lambda: fid_cache.may_be_known(source)):
        return inspection
    inspection = decode()
    if dist.is_main():
        fid_cache.keep_inspection(source, inspection)
    return inspection


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
    rows_here = source.share(batch)
    count = source.default_workers(device, batch) if workers is None else workers

    def take() -> None:
        with console.progress(title, len(rows_here), "images") as bar:
            for rows, images in source.batches(batch, rows_here, count, pin=device.type == "cuda"):
                inspection.update(rows, images)
                for extractor, accumulators in due:
                    outputs = tuple({accumulator.needs: None for accumulator in accumulators})
                    features = extractor.extract(images, outputs) if outputs else {}
                    for accumulator in accumulators:
                        accumulator.update(rows, features)
                bar.advance(len(rows))

    together(take)
    inspection.all_reduce(device)
    return inspection


def together(act: Callable[[], T]) -> T:
    """What `act` returns here, once no process has failed in it. Collective.

    Raises on every process the DdoError or OSError of the first one that did: otherwise the others would wait for it in
    the next collective call, end with a traceback, and the main process would not report the reason.
    """
    failure: DdoError | OSError | None = None
    try:
        result = act()
    except (DdoError, OSError) as error:
        failure = error
    for other in dist.gathered(failure):
        if other is not None:
            raise other
    return result


def on_main(act: Callable[[], Any]) -> Any:
    """What `act` returns on the main process, on every process; its errors, too. Collective."""
    return dist.from_main(together(lambda: act() if dist.is_main() else None))
