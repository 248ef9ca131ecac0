"""Image sets read batch by batch: the sources of `open_images` without holding them in memory."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddo_cli import console, dist
from ddo_cli.data import cache, latents
from ddo_cli.data.image_files import ImageFiles
from ddo_cli.data.images import MANY
from ddo_cli.data.inspection import Inspection
from ddo_cli.data.items import count_classes, describe_content, hashed
from ddo_cli.data.pictures import Preparation
from ddo_cli.data.prepared import Prepared
from ddo_cli.data.readers import Memory, Reader, npy
from ddo_cli.data.sources import Source, open_source
from ddo_cli.errors import DataError
from ddo_cli.likelihood import NO_LABEL

PREFETCH = 2  # batches that a worker decodes ahead
FEW = 500  # images: so many 32 x 32 PNGs decode in the 0.05 s that forked workers take to start (our measurement)


@dataclass
class ImageStream(Source):
    """Images in a fixed order, read when asked for. num_lossy: how many are in formats that lose detail."""

    num_lossy: int = 0

    def batches(
        self, batch: int, rows: np.ndarray | None = None, workers: int = 0, pin: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(rows int64 (b,), images uint8 (b, C, H, W)) on the CPU, in the order of `rows` (None: all).

        workers: processes that decode ahead; arrays are read in this process. pin: page-locked memory, from which a
        CUDA device copies while it computes. Raises DataError naming the first image that cannot be used.
        """
        if batch < 1:
            raise ValueError(f"batch = {batch} must be at least 1")
        rows = np.arange(self.num) if rows is None else np.asarray(rows, dtype=np.int64)
        blocks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        positions = [self.positions[block] for block in blocks]
        if workers > 0 and self.reader.decodes and len(blocks) > 1:
            tensors = _decoded_ahead(self.name, self.reader, positions, min(workers, len(blocks)), pin)
        else:
            tensors = (torch.from_numpy(self.reader.read(part)) for part in positions)
            tensors = (tensor.pin_memory() for tensor in tensors) if pin else tensors
        return zip(blocks, tensors, strict=True)

    def share(self, batch: int) -> np.ndarray:
        """Rows of this process, to be passed to `batches` with the same `batch`.

        Each process takes every world_size-th batch, so that batches hold the same images for any number of processes,
        and results differ only by the order of summation.
        """
        starts = dist.shard(range(0, self.num, batch))
        parts = [np.arange(start, min(start + batch, self.num)) for start in starts]
        return np.concatenate(parts) if parts else np.arange(0)

    def default_workers(self, device: torch.device, batch: int) -> int:
        """Number of worker processes to decode ahead of a network on `device`.

        0 for few images or without decoding. With a GPU: this process's share of the cores but one, at most 8. On a CPU
        only cores that torch's threads leave free, at most 2: workers take 70 to 75 % of the decoding off this process
        at 13 to 40 % more work in all (our measurement), a loss where every core is busy.
        """
        share = -(-self.num // dist.world_size())
        cores = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if not self.reader.decodes or share < FEW or share <= batch or cores < 2:
            return 0
        return min(8, cores - 1) if device.type == "cuda" else max(0, min(2, cores - torch.get_num_threads()))

    def digest(self, batch: int = 256, workers: int = 0) -> str:
        """Digest of the images by a pass of its own; see `Inspection.digest`."""
        inspection = Inspection(self.labels, self.num_classes)
        for rows, images in self.batches(batch, workers=workers):
            inspection.update(rows, images)
        return inspection.digest()


def available_cores() -> int:
    """Cores that this process may use: in a container or under taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_stream(source: str, num: int | None = None, preparation: Preparation | None = None) -> ImageStream:
    """The images of a source of `open_images`, in the same order, with the same labels and choice of `num`.

    preparation: of images of any size and mode, as they are read.

    At most one image is decoded; see `open_source` for what is held. A cache entry of `open_images` is used, never
    written. Raises DataError for what open_images refuses, and for points, latents and tokens.
    """
    if latents.is_latents(Path(source)):
        raise DataError(f"{source} holds latents or tokens, not images; give the images that they were encoded from")
    images = ImageStream(**vars(open_source(source, num, in_memory=False, is_prepared=preparation is not None)))
    if preparation is not None:
        return _prepared(images, preparation)
    for note in images.notes:
        console.info(note)
    if isinstance(images.reader, ImageFiles):
        images.num_lossy = images.reader.num_lossy(images.positions.tolist())
        kept = cache.existing(source, images.identity, images.num) if images.identity and images.num >= MANY else None
        if kept is not None:
            images.reader, images.positions = npy(source, kept), np.arange(images.num)
    check_images(source, images.reader)
    return images


def of_array(name: str, images: np.ndarray, labels: np.ndarray | None = None) -> ImageStream:
    """Images (N, C, H, W) in memory, with their labels (N,), as a set of this name. Raises DataError."""
    check_images(name, Memory(images))
    labels = np.full(len(images), NO_LABEL) if labels is None else labels
    return ImageStream(name, Memory(images), np.arange(len(images)), labels, count_classes(labels))


def check_images(source: str, reader: Reader) -> None:
    """Raises DataError unless the items are images."""
    if not isinstance(reader, ImageFiles) and (reader.dtype != np.uint8 or len(reader.shape) != 3):
        raise DataError(
            f"{source} holds {describe_content(reader.dtype, reader.shape)}, not images; give a set of images"
        )


def _prepared(images: ImageStream, preparation: Preparation) -> ImageStream:
    check_images(images.name, images.reader)
    notes = images.notes
    if isinstance(images.reader, ImageFiles):
        images.num_lossy = images.reader.num_lossy(images.positions.tolist())
        notes = (*notes, *images.reader.peculiarities(are_turned=True))
    for note in notes:
        console.info(note)
    identity = None if images.identity is None else hashed(images.identity, preparation)
    return replace(images, reader=Prepared(images.name, images.reader, preparation), identity=identity)


# --- Worker processes


class _Blocks(Dataset[Any]):
    """Images of a batch of positions, or the error message about one of them.

    The message is returned because DataLoader would wrap an exception into a traceback of the worker.
    """

    def __init__(self, reader: Reader, shared: bool):
        self.reader, self.shared = reader, shared

    def __getitem__(self, positions: np.ndarray) -> Tensor | np.ndarray | str:
        try:
            images = self.reader.read(positions)
        except DataError as error:
            return str(error)
        return torch.from_numpy(images) if self.shared else images


def _decoded_ahead(name: str, reader: Reader, blocks: list[np.ndarray], workers: int, pin: bool) -> Iterator[Tensor]:
    """Batches decoded by worker processes, in order. Workers end with the iterator.

    Forked on Linux: they run Pillow and numpy on one thread and no thread pool of torch, whose locks might be taken at
    the fork. Spawning costs a second per worker to import torch, and runs the caller's main module again.
    """
    batch_bytes = max(map(len, blocks)) * int(np.prod(reader.shape))
    loader = DataLoader(
        _Blocks(reader, shared=_fits_shared_memory((PREFETCH + 1) * workers * batch_bytes)),
        batch_size=None,
        sampler=blocks,
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=PREFETCH,
        pin_memory=pin,
        worker_init_fn=_no_signals,
        multiprocessing_context=multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"),
        generator=torch.Generator(),  # else each pass would advance the global generator and change a run's samples
    )
    batches = _started(loader)
    try:
        for _ in blocks:
            try:
                batch = next(batches)
            except (RuntimeError, OSError, EOFError) as error:  # a worker was killed, between batches or within one
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise DataError(
                    f"{name}: a process that decodes images has ended ({reason}); if memory ran out, lower the batch "
                    "or use no workers"
                ) from None
            if isinstance(batch, str):
                raise DataError(batch)
            if isinstance(batch, np.ndarray):
                batch = torch.from_numpy(batch)
                batch = batch.pin_memory() if pin else batch
            yield batch
    finally:
        del batches  # ends the workers now, even if a traceback holds this frame


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, without the signal handler that it installs.

    That handler raises for a killed worker anywhere in the program. `next` notices it, too, within 5 s.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
    return batches


def _fits_shared_memory(size: int) -> bool:
    """Whether batches may be passed through /dev/shm, which containers often limit to 64 MB; else they take a pipe.

    The system kills a worker that finds it full. Twice the size, because other processes use it too.
    """
    try:
        return shutil.disk_usage("/dev/shm").free > 2 * size * dist.world_size()
    except OSError:
        return True  # a system without it; torch then uses something else


def _as_is(batch: Any) -> Any:
    return batch


def _no_signals(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent reports it once and ends the workers, by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
