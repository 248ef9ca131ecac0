"""Image sets read batch by batch: what `open_images` opens, without holding it in memory."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ddo_cli
from ddo_cli import dist
from ddo_cli.checkpoint import EMBEDDED
from ddo_cli.data import arrays, cache, cifar, image_files, images, latents, readers, samples
from ddo_cli.data.inspection import Inspection
from ddo_cli.data.items import ItemSet, choice, count_classes, describe
from ddo_cli.data.readers import Reader
from ddo_cli.errors import DataError

LOSSY = (".jpg", ".jpeg", ".webp")
PREFETCH = 2  # batches that a worker decodes ahead
FEW = 500  # images: 32 x 32 PNGs decode in the 0.05 s that forked workers take to start (measured by us)


@dataclass
class ImageStream:
    """Images in a fixed order, read when asked for, with their labels.

    labels: int64 (N,), -1 = none; num_classes: as `ItemSet`'s; shape: (C, H, W) of every image; names: of the files, or
    None; num_lossy: images in formats that lose detail; identity: of the images, not of their labels: changes with the
    set's path and its files' names, sizes and times, None where these cannot be told; positions: of the stream's images
    in `reader`.
    """

    name: str
    reader: Reader
    positions: np.ndarray
    labels: np.ndarray
    num_classes: int
    names: Sequence[str] | None = None
    num_lossy: int = 0
    identity: str | None = None

    @property
    def num(self) -> int:
        """Number of images N."""
        return len(self.positions)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.reader.shape

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
            found = _decoded_ahead(self.name, self.reader, positions, min(workers, len(blocks)), pin)
        else:
            found = (torch.from_numpy(self.reader.read(part)) for part in positions)
            found = (tensor.pin_memory() for tensor in found) if pin else found
        return zip(blocks, found, strict=True)

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
    Raises DataError for what open_images refuses, for points, and for images in floating point.
    """
    path = Path(source)
    if num is not None and num < 1:
        raise DataError(f"{source}: num = {num} must be at least 1")
    if latents.is_latents(path):
        raise latents.not_images(source)
    if path.is_dir():
        return _directory(source, path, num)
    if path.is_file() and path.suffix.lower() == ".zip":
        return _zip(source, path, num)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _npz(source, path, num)
    # The rest is small, or refused with a reason.
    made_by = None if not source.startswith(EMBEDDED) else _hashed(ddo_cli.__version__, source, num)
    return _in_memory(images.open_images(source, num, cache=False), made_by or _identity(path, [path], [], num))


def _directory(source: str, path: Path, num: int | None) -> ImageStream:
    manifest = images.sample_manifest(path)
    if manifest is not None:
        if manifest["format"] == "shards":
            return _shards(source, path, num)
        images.check_complete(source, manifest)
        if manifest["format"] == "npz":
            return _npz(source, path / "samples.npz", num)
        return _files(source, path, *images.sample_entries(source, manifest), None, num)
    if cifar.holds_batches(path):
        files = [path / name for name in cifar.BATCHES]
        return _in_memory(cifar.open_unpacked(source, path, num), _identity(path, files, [], num))
    if found := arrays.npz_files(path):
        return _npz_folder(source, path, found, num)
    return _files(source, path, *image_files.folder_entries(source, path), None, num)


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of sources


def _in_memory(items: ItemSet, identity: str | None) -> ImageStream:
    if items.items.ndim != 4:
        raise DataError(f"{items.name} holds {describe(items.items.shape[1:])}, not images; give a set of images")
    rows = np.arange(len(items.items))
    return ImageStream(
        items.name, readers.Memory(items.items), rows, items.labels, items.num_classes, None, 0, identity
    )


def _zip(source: str, path: Path, num: int | None) -> ImageStream:
    try:
        with zipfile.ZipFile(path) as archive:
            names, labels = image_files.zip_entries(source, archive)
            content = readers.ZipBytes(path, archive, names)
    except image_files.ZIP_ERRORS as error:
        raise image_files.broken_zip(source, error) from None
    return _files(source, path, names, labels, content, num)


def _files(
    source: str, path: Path, names: list[str], labels: np.ndarray, zipped: readers.ZipBytes | None, num: int | None
) -> ImageStream:
    """Image files of a folder, or of a zip."""
    rows = choice(source, len(names), num)
    chosen = [names[row] for row in rows]
    content = zipped or readers.FolderBytes(path, names)
    key = cache.key_of(path, [path] if zipped else (path / name for name in chosen), chosen)
    kept = cache.existing(source, key, len(chosen)) if key and len(chosen) >= image_files.MANY else None
    if kept is not None:
        reader: Reader = readers.npy(source, kept)
        positions = np.arange(len(rows))
    else:
        reader, positions = readers.Files(source, names, content, rows), rows
    lossy = _num_lossy(names, rows, content)
    return ImageStream(source, reader, positions, labels[rows], count_classes(labels), chosen, lossy, key)


def _num_lossy(names: Sequence[str], rows: np.ndarray, content: Callable[[int], bytes]) -> int:
    """Images in formats that lose detail: by name, where the first of them bears it out, or all if the first is one.

    Every file would have to be opened to know: a WebP may be lossless, and a JPEG be called .png by who resized it.
    """
    named = [row for row in rows.tolist() if names[row].lower().endswith(LOSSY)]
    try:
        if named:
            # One WebP that is lossless speaks for the set's others, not for its JPEGs.
            webp = next((row for row in named if names[row].lower().endswith(".webp")), None)
            if webp is not None and not _loses(content(webp)):
                return sum(not names[row].lower().endswith(".webp") for row in named)
            return len(named)
        return len(rows) if _loses(content(int(rows[0]))) else 0
    except (*image_files.ZIP_ERRORS, ValueError):
        return len(named)  # reading the pixels says what is wrong


def _loses(content: bytes) -> bool:
    """Whether a file is a JPEG (starts with SOI) or a WebP other than a simple lossless one (RIFF....WEBPVP8L)."""
    return content[:3] == b"\xff\xd8\xff" or (content[8:12] == b"WEBP" and content[12:16] != b"VP8L")


def _npz(source: str, path: Path, num: int | None) -> ImageStream:
    reader, labels, num_classes, _ = readers.npz(source, path)
    rows = choice(source, reader.num, num)
    return ImageStream(source, reader, rows, labels[rows], num_classes, None, 0, _identity(path, [path], [], num))


def _npz_folder(source: str, path: Path, files: list[Path], num: int | None) -> ImageStream:
    parts = [readers.npz(str(file), file) for file in files]
    first, _, _, first_keys = parts[0]
    for file, (reader, _, _, keys) in zip(files, parts, strict=True):
        arrays.check_alike(file, keys, reader.shape, files[0], first_keys, first.shape)
    joined = readers.Joined([reader for reader, _, _, _ in parts])
    labels = np.concatenate([labels for _, labels, _, _ in parts])
    rows = choice(source, joined.num, num)
    classes = max(classes for _, _, classes, _ in parts)
    identity = _identity(path, files, [file.name for file in files], num)
    return ImageStream(source, joined, rows, labels[rows], classes, None, 0, identity)


def _shards(source: str, path: Path, num: int | None) -> ImageStream:
    """A sample set of format shards; the same checks as `samples.open_samples`."""
    manifest = samples.manifest_of(path)
    images.check_complete(source, manifest)
    files = samples.shard_files(path, manifest)
    try:
        parts: list[Reader] = [readers.Shard(file) for file in files]
        labels = np.concatenate([_column(file, "labels") for file in files])
        joined = readers.Joined(parts)
        if any(part.shape != joined.shape for part in parts) or len(labels) != joined.num:
            raise ValueError("its shards do not belong together")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} holds a damaged shard ({error}); remove the directory and sample again") from None
    if joined.num != manifest.get("num"):
        raise DataError(f"{path} holds {joined.num} items where its manifest says {manifest.get('num')}; sample again")
    rows = choice(source, joined.num, num)
    identity = _identity(path, files, [file.name for file in files], num)
    return ImageStream(source, joined, rows, labels[rows], count_classes(labels), None, 0, identity)


def _column(file: Path, key: str) -> np.ndarray:
    with safe_open(file, framework="np") as shard:
        return shard.get_tensor(key).astype(np.int64)


def _identity(path: Path, files: Sequence[Path], names: Sequence[str], num: int | None) -> str | None:
    key = cache.key_of(path, files, names)
    return None if key is None else _hashed(key, num)


def _hashed(*content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


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
