"""Image sets read batch by batch: what `open_images` opens, without holding it in memory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddo_cli import dist
from ddo_cli.data import cache, latents
from ddo_cli.data.image_files import ImageFiles
from ddo_cli.data.images import MANY
from ddo_cli.data.inspection import Inspection
from ddo_cli.data.items import describe_content
from ddo_cli.data.readers import Reader, npy
from ddo_cli.data.sources import Source, open_source
from ddo_cli.errors import DataError

PREFETCH = 2  # batches that a worker decodes ahead
FEW = 500  # images: 32 x 32 PNGs decode in the 0.05 s that forked workers take to start (measured by us)


@dataclass
class ImageStream(Source):
    """Images in a fixed order, read when asked for. num_lossy: how many are in formats that lose detail."""

    num_lossy: int = 0

    def batches(
        self, batch: int, rows: np.ndarray | None = None, workers: int = 0, pin: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(rows int64 (b,), images uint8 (b, C, H, W)) on the CPU, in the order of `rows` (None: all).

        workers: processes that decode ahead; arrays need no decoding and are read here. pin: page-locked memory, from
        which a CUDA device copies while it computes. Raises DataError naming the first image that cannot be used.
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

        Whole batches are dealt out, every world_size-th to one process, so that each batch holds the same images
        whatever the number of processes, and results differ by the order of summation only.
        """
        starts = dist.shard(range(0, self.num, batch))
        parts = [np.arange(start, min(start + batch, self.num)) for start in starts]
        return np.concatenate(parts) if parts else np.arange(0)

    def default_workers(self, device: torch.device, batch: int) -> int:
        """How many processes should decode ahead of a network on `device`.

        None for few images or where nothing is decoded. A GPU leaves the cores idle: all of this process's share but
        one, at most 8. On a CPU only cores that torch's threads leave free: workers take 70 to
        75 % of the decoding off this process, but cost 13 to 40 % more in all (measured by us), which is a loss where
        every core is busy. Two keep up with any network on a CPU.
        """
        share = -(-self.num // dist.world_size())
        cores = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if not self.reader.decodes or share < FEW or share <= batch or cores < 2:
            return 0
        return min(8, cores - 1) if device.type == "cuda" else max(0, min(2, cores - torch.get_num_threads()))

    def digest(self, batch: int = 256, workers: int = 0) -> str:
        """Digest of the images by a pass over them; `Inspection.digest` gives it as part of another pass."""
        inspection = Inspection(self.labels, self.num_classes)
        for rows, found in self.batches(batch, workers=workers):
            inspection.update(rows, found)
        return inspection.digest()


def available_cores() -> int:
    """Cores that this process may use, which in a container or under taskset are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_stream(source: str, num: int | None = None) -> ImageStream:
    """The images of a source of `open_images`, in the same order, with the same labels and choice of `num`.

    One image at most is decoded; a compressed .npz is unpacked to a temporary file; embedded sets and CIFAR-10 are held
    in memory. An array that `open_images` has kept decoded is used, and none is written.
    Raises DataError for what open_images refuses, and for points, latents and tokens.
    """
    if latents.is_latents(Path(source)):
        raise latents.not_images(source)
    images = ImageStream(**vars(open_source(source, num, in_memory=False)))
    if isinstance(images.reader, ImageFiles):
        images.num_lossy = images.reader.num_lossy(images.positions.tolist())
        kept = cache.existing(source, images.identity, images.num) if images.identity and images.num >= MANY else None
        if kept is not None:
            images.reader, images.positions = npy(source, kept), np.arange(images.num)
    if images.reader.dtype != np.uint8 or len(images.shape) != 3:
        content = describe_content(images.reader.dtype, images.shape)
        raise DataError(f"{source} holds {content}, not images; give a set of images")
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes


class _Blocks(Dataset[Any]):
    """Images of a whole batch of positions, or the message of what is wrong with one of them.

    A message is returned, not raised: DataLoader would wrap the exception into a traceback of the worker.
    """

    def __init__(self, reader: Reader, shared: bool):
        self.reader, self.shared = reader, shared

    def __getitem__(self, positions: np.ndarray) -> Tensor | np.ndarray | str:
        try:
            found = self.reader.read(positions)
        except DataError as error:
            return str(error)
        return torch.from_numpy(found) if self.shared else found


def _decoded_ahead(name: str, reader: Reader, blocks: list[np.ndarray], workers: int, pin: bool) -> Iterator[Tensor]:
    """Batches decoded by worker processes, in order. Workers end with the iterator.

    They are forked where that is the custom (Linux): what runs in them is Pillow and numpy on one thread, and none of
    torch's thread pools, whose locks a fork may find taken. Starting afresh costs a second per worker for importing
    torch, and runs a caller's main module again.
    """
    most = max(map(len, blocks)) * int(np.prod(reader.shape))
    loader = DataLoader(
        _Blocks(reader, shared=_fits_shared_memory((PREFETCH + 1) * workers * most)),
        batch_size=None,
        sampler=blocks,
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=PREFETCH,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupt,
        multiprocessing_context=multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"),
        generator=torch.Generator(),  # else each pass would draw from the global one, and change what a run samples
    )
    found = _started(loader)
    try:
        for _ in blocks:
            try:
                batch = next(found)
            except (RuntimeError, OSError, EOFError) as error:  # a worker was killed, between batches or within one
                why = str(error).partition("\n")[0] or type(error).__name__
                raise DataError(
                    f"{name}: a process that decodes images has ended ({why}); if memory ran out, lower the batch or "
                    "use no workers"
                ) from None
            if isinstance(batch, str):
                raise DataError(batch)
            if isinstance(batch, np.ndarray):
                batch = torch.from_numpy(batch)
                batch = batch.pin_memory() if pin else batch
            yield batch
    finally:
        del found  # ends the workers now, not when the last traceback that holds this frame is gone


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, without the signal handler that it installs.

    That one raises an error for a killed worker wherever the program happens to be. `next` notices it, too, in 5 s.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    found = iter(loader)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
    return found


def _fits_shared_memory(size: int) -> bool:
    """Whether batches may travel through /dev/shm, which containers often limit to 64 MB; else they take a pipe.

    A worker that finds it full is killed by the system. Twice the size, because other processes use it too.
    """
    try:
        return shutil.disk_usage("/dev/shm").free > 2 * size * dist.world_size()
    except OSError:
        return True  # a system without it, where torch knows better


def _as_is(found: Any) -> Any:
    return found


def _ignore_interrupt(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent says it once and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
