"""Item sets in memory; image files are decoded once for all runs."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

import numpy as np

from ddo_cli import console
from ddo_cli.codec import Codec
from ddo_cli.data import cache
from ddo_cli.data.items import ItemSet, check_shape
from ddo_cli.data.readers import Lazy, Memory
from ddo_cli.data.sources import Source, open_source

MANY = 4000  # images; from here on they are decoded by several threads, with progress, and kept decoded
CHUNK = 256  # images per task of a thread


def open_images(source: str, num: int | None = None, cache: bool = True, codec: Codec | None = None) -> ItemSet:
    """The items of a source.

    source: a folder of images (sorted by name; labels from dataset.json, or else from captions, see `captions`, or else
    from two or more top-level subfolders when every image lies in one); a zip of images (labels from dataset.json, or
    from captions); an .npz (arr_0, samples or images: uint8,
    channels first or last, or float points (N, d); label, labels or arr_1: class numbers or one-hot rows); a folder of
    nothing but .npz files with the same arrays (their concatenation, sorted by name); cifar-10-python.tar.gz or the
    folder in it (its training images); a sample set that ddo wrote; latents or tokens of `ddo encode` or of EDM2's own
    archives, see `latents`, which are read when indexed; or "embedded:<name>", see `embedded.EMBEDDED_SETS`.
    num: use this many: a fixed random subset in the set's order (numpy's RandomState(0), as EDM); an embedded set that
    is generated is generated in this number.
    cache: whether large sets are kept decoded for later runs (`data.cache`); such items are read-only.
    codec: of the model that the items are for: their shape is checked by the first one, before all are decoded.
    Raises DataError naming the first item that cannot be used.
    """
    opened = open_source(source, num, in_memory=True)
    for note in opened.notes:
        console.info(note)
    for warning in opened.warnings:
        console.warn(warning)
    if codec is not None:
        check_shape(source, opened.reader.dtype, opened.shape, codec)
    if opened.encoded is not None:
        # `Lazy` has what is used of an array: shape, dtype and indexing.
        items = cast(np.ndarray, Lazy(opened.reader, opened.positions))
    elif opened.reader.decodes:
        items = _decoded(opened, cache)
    elif isinstance(opened.reader, Memory) and opened.num == opened.reader.num:
        items = opened.reader.items
    else:
        items = opened.reader.read(opened.positions)
    return ItemSet(items, opened.labels, source, opened.num_classes, opened.encoded, opened.classes, opened.captions)


def _decoded(images: Source, keep: bool) -> np.ndarray:
    """All images as one array: mapped from the cache if they are many, else in memory."""
    if keep and images.num >= MANY and images.identity is not None:
        items = cache.kept(images.name, images.identity, images.num, lambda: images.shape, partial(_fill, images))
        if items is not None:
            return items
    items = np.empty((images.num, *images.shape), dtype=np.uint8)
    _fill(images, items)
    return items


def _fill(images: Source, items: np.ndarray) -> None:
    """Decodes every image into its row of `items`. Raises DataError naming the first that does not fit."""

    def fill(start: int) -> int:
        rows = images.positions[start : start + CHUNK]
        items[start : start + CHUNK] = images.reader.read(rows)
        return len(rows)

    starts = range(0, images.num, CHUNK)
    if images.num < MANY:
        for start in starts:
            fill(start)
        return
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow decodes outside Python's lock
    try:
        with console.progress(f"reading {images.name}", images.num, "images") as bar:
            for count in pool.map(fill, starts):  # in order, so that the first bad name is the one reported
                bar.advance(count)
    finally:
        pool.shutdown(cancel_futures=True)
