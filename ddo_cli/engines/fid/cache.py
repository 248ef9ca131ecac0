"""What earlier passes have left of the same images: found by content, whatever files hold them and in what order.

Two levels. A set's identity (path, names, sizes and times of its files) leads to the digests of its images, so that a
set seen before need not be decoded; the digest of the content and the extractor's protocol lead to what its metrics
accumulate. Files with another identity but the same images are decoded once, and pass through no network either.
Its functions are called by the main process alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ddo_cli.data.inspection import Inspection
from ddo_cli.engines.fid import feature_cache
from ddo_cli.metrics.accumulators import ROWS, Accumulator, ChunkedMoments, State, features_of
from ddo_cli.metrics.extractors.base import Extractor

REPLAYED = 256  # rows of stored features that accumulators take at a time, as of a pass by default


class HasIdentity(Protocol):
    """What can be looked up: images (N, C, H, W) with their labels (N,), such as `data.stream.ImageStream`."""

    labels: np.ndarray
    num_classes: int
    identity: str | None

    @property
    def num(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def batches(
        self, batch: int, rows: np.ndarray | None = None, workers: int = 0, pin: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor]]: ...


# ---------------------------------------------------------------------------------------------------------------------
# Identity -> digests of the images


def inspection(source: HasIdentity) -> Inspection | None:
    """What a pass over these very files has found out about the images; None if there was none."""
    key = _set_key(source)
    found = Inspection(source.labels, source.num_classes)
    state = feature_cache.load(key, "sets")
    if state is None:
        return None
    try:
        found.restore(state)
    except ValueError:
        feature_cache.damaged(key, "sets")
        return None
    return found


def keep_inspection(source: HasIdentity, found: Inspection) -> None:
    """Remembers the digests of the images in these files: 16 bytes of each."""
    feature_cache.store(_set_key(source), found.state(), "sets")


def forget_inspection(source: HasIdentity) -> None:
    """The files hold other images by now, though their sizes and times are the same."""
    feature_cache.forget(_set_key(source), "sets")


def may_be_known(source: HasIdentity) -> bool:
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


def _group(source: HasIdentity) -> str:
    return "x".join(map(str, (source.num, *source.shape)))


def _set_key(source: HasIdentity) -> str:
    assert source.identity is not None, "asked by the caller"
    return f"{_group(source)}/{feature_cache.key_of(source.identity, {}, [])}"


# ---------------------------------------------------------------------------------------------------------------------
# Digest and protocol -> what metrics accumulate


def restore(found: Inspection, extractor: Extractor, accumulators: Sequence[Accumulator]) -> list[bool]:
    """Whether each accumulator now holds what the images would have given it.

    Where the features of each image are stored, every accumulator of them can be served, whatever its metric.
    """
    if not extractor.is_fixed:
        return [False] * len(accumulators)
    done = [_restore(found, extractor, one) for one in accumulators]
    for needs in {one.needs for one, is_done in zip(accumulators, done, strict=True) if not is_done}:
        features = _features(found, extractor, needs)
        if features is None:
            continue
        for i, one in enumerate(accumulators):
            if not done[i] and one.needs == needs:
                for start in range(0, len(features), REPLAYED):
                    part = torch.from_numpy(features[start : start + REPLAYED]).to(extractor.device)
                    one.update(np.arange(start, start + len(part)), {needs: part})
                done[i] = True
    return done


def store(found: Inspection, extractor: Extractor, accumulators: Sequence[Accumulator]) -> None:
    """Keeps what the accumulators hold, after a pass over all images."""
    if not extractor.is_fixed:
        return
    # An FID alone is asked for more often than its error, which needs the moments of parts.
    parts = [one for one in accumulators if isinstance(one, ChunkedMoments) and one.kept != "set"]
    for one in (*accumulators, *(chunked.whole() for chunked in parts)):
        state = one.state()
        if one.kept == "rows":
            order = _order(found)
            state = {name: array[order] for name, array in state.items()}
        feature_cache.store(_key(found, extractor, one.kept, one.kind), state)


def _restore(found: Inspection, extractor: Extractor, one: Accumulator) -> bool:
    key = _key(found, extractor, one.kept, one.kind)
    state = _loaded(found, key, one.kept)
    if state is None:
        return False
    try:
        one.restore(state)
    except ValueError:
        feature_cache.damaged(key)
        return False
    return True


def _features(found: Inspection, extractor: Extractor, needs: str) -> np.ndarray | None:
    """Stored features (N, F) float32 of one output of the extractor, in the order of the images."""
    state = _loaded(found, _key(found, extractor, "rows", features_of(needs)), "rows")
    features = None if state is None else state.get(ROWS)
    if features is None or features.dtype != np.float32 or features.ndim != 2 or not np.isfinite(features).all():
        return None
    return features


def _loaded(found: Inspection, key: str, kept: str) -> State | None:
    state = feature_cache.load(key)
    if state is None or kept != "rows":
        return state
    if any(len(array) != found.num for array in state.values()):
        feature_cache.damaged(key)
        return None
    place = np.empty(found.num, dtype=np.int64)
    place[_order(found)] = np.arange(found.num)
    return {name: array[place] for name, array in state.items()}


def _order(found: Inspection) -> np.ndarray:
    """Rows by the digests of their images: entries of rows lie in this order, so that any order of a set finds them.

    Copies may change places; their features are the same.
    """
    return np.lexsort((found.digests[:, 1], found.digests[:, 0]))


def _key(found: Inspection, extractor: Extractor, kept: str, kind: str) -> str:
    images = found.order() if kept == "order" else found.digest()
    return feature_cache.key_of(images, extractor.protocol(), [kind])
