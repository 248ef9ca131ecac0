"""Reuses features of images seen before, found by content hash, whatever files hold them and in whatever order.

Two levels. A set's identity (path, names, sizes and times of its files) leads to the digests of its images, so that a
set seen before is not decoded again; the digest of the content and the extractor's protocol lead to the state of its
metrics' accumulators. Files of another identity with the same images are decoded once, and pass through no network.
Only the main process calls these functions.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ddo_cli.data.inspection import Inspection
from ddo_cli.engines.fid import feature_cache
from ddo_cli.engines.fid.feature_cache import Part
from ddo_cli.metrics.accumulators import Accumulator, ChunkedMoments, FeatureStore, State, features_of
from ddo_cli.metrics.extractors.base import Extractor

REPLAYED = 256  # rows of stored features that accumulators take at a time, as of a pass by default


class Source(Protocol):
    """Images (N, C, H, W) that a pass can take: `data.stream.ImageStream`, or a model that draws them.

    identity: of the files, for the first level; None for images that are drawn. captions: that labels mean, or ().
    """

    name: str
    labels: np.ndarray  # (N,)
    num_classes: int
    captions: tuple[str, ...]
    identity: str | None

    @property
    def num(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_lossy(self) -> int: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...
    def share(self, batch: int) -> np.ndarray: ...
    def default_workers(self, device: torch.device, batch: int) -> int: ...
    def batches(
        self, batch: int, rows: np.ndarray | None = None, workers: int = 0, pin: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor]]: ...


# --- Identity -> digests of the images


def inspection(source: Source) -> Inspection | None:
    """Figures of the images that an earlier pass over the same files has stored; None if there are none."""
    key, images = _set_key(source), Inspection(source.labels, source.num_classes)
    return images if _restored(feature_cache.load(key, "sets"), images.restore, key, "sets") else None


def keep_inspection(source: Source, inspection: Inspection) -> None:
    """Stores the digests of the images in these files: 16 bytes of each."""
    feature_cache.store(_set_key(source), inspection.state(), "sets")


def forget_inspection(source: Source) -> None:
    """For files that now hold other images, though their sizes and times are the same."""
    feature_cache.forget(_set_key(source), "sets")


def may_be_known(source: Source) -> bool:
    """Whether decoding all images may find a set seen before: the first one is in a set of as many of this shape.

    Spares new sets a second decoding, which would cost a GPU as much time as the network does. Raises DataError.
    """
    keys = list(feature_cache.keys_below(_group(source), "sets"))
    if not keys:
        return False
    first = Inspection(source.labels[:1])
    for rows, images in source.batches(1, np.arange(1)):
        first.update(rows, images)
    states = (feature_cache.load(key, "sets") for key in keys)
    return any(state is not None and (state["digests"] == first.digests).all(1).any() for state in states)


def _group(source: Source) -> str:
    return "x".join(map(str, (source.num, *source.shape)))


def _set_key(source: Source) -> str:
    assert source.identity is not None, "asked by the caller"
    return f"{_group(source)}/{feature_cache.key_of(source.identity, {}, [])}"


# --- Digest and protocol -> what metrics accumulate


def restore(images: Inspection, extractor: Extractor, accumulators: Sequence[Accumulator]) -> list[bool]:
    """Fills accumulators with what a pass over the images would give them; whether each one is.

    Where the features of each image are stored, every accumulator of them can be served, whatever its metric.
    """
    if not extractor.is_fixed:
        return [False] * len(accumulators)
    features_of_images = functools.cache(partial(_features, images, extractor))  # read once

    def is_filled(accumulator: Accumulator) -> bool:
        key, needs = _key(images, extractor, accumulator.kept, accumulator.kind), accumulator.needs
        state = _rows(key, images) if accumulator.kept == "rows" else feature_cache.load(key)
        if _restored(state, accumulator.restore, key):
            return True
        if (features := features_of_images(needs)) is None:
            return False
        for start in range(0, len(features), REPLAYED):
            part = torch.from_numpy(features[start : start + REPLAYED]).to(extractor.device)
            accumulator.update(np.arange(start, start + len(part)), {needs: part})
        return True

    return list(map(is_filled, accumulators))


def store(images: Inspection, extractor: Extractor, accumulators: Sequence[Accumulator], restored: bool) -> None:
    """Keeps the states of accumulators after a pass over all images.

    restored: whether `restore` has looked at the entries: those still there are good, and stay. What it has computed
    from stored features is written, so that an entry that was damaged or could not be written is there again.
    """
    if not extractor.is_fixed:
        return
    # Moments of all images, too, where those of parts were asked for: an FID is asked for more often than its error.
    chunked = [each for each in accumulators if isinstance(each, ChunkedMoments) and each.kept != "set"]
    for accumulator in (*accumulators, *(moments.whole() for moments in chunked)):
        key = _key(images, extractor, accumulator.kept, accumulator.kind)
        if restored and feature_cache.holds(key):
            continue
        state = accumulator.state()
        if accumulator.kept == "rows":
            order = _order(images)
            state = {name: array[order] for name, array in state.items()}
        feature_cache.store(key, state)


def _features(images: Inspection, extractor: Extractor, needs: str) -> np.ndarray | None:
    """Stored features (N, F) float32 of one output of the extractor, in the order of the images."""
    features = (_rows(_key(images, extractor, "rows", features_of(needs)), images) or {}).get(FeatureStore.array)
    if features is None or features.dtype != np.float32 or features.ndim != 2 or not np.isfinite(features).all():
        return None
    return features


def _restored(state: State | None, restore: Callable[[State], None], key: str, part: Part = "features") -> bool:
    """Whether there is a stored state and `restore` takes it."""
    try:
        if state is not None:
            restore(state)
    except ValueError:
        feature_cache.damaged(key, part)
        return False
    return state is not None


def _rows(key: str, images: Inspection) -> State | None:
    """An entry of rows, put into the order of the images."""
    state = feature_cache.load(key)
    if state is None:
        return None
    if any(array.shape[:1] != (images.num,) for array in state.values()):
        feature_cache.damaged(key)
        return None
    place = np.argsort(_order(images))  # of each image in the entry
    return {name: array[place] for name, array in state.items()}


def _order(images: Inspection) -> np.ndarray:
    """Rows by the digests of their images: entries of rows lie in this order, so that any order of a set finds them.

    Copies may change places; their features are the same.
    """
    return np.lexsort((images.digests[:, 1], images.digests[:, 0]))


def _key(images: Inspection, extractor: Extractor, kept: str, kind: str) -> str:
    content = images.order() if kept == "order" else images.digest()
    return feature_cache.key_of(content, extractor.protocol(), [kind])
