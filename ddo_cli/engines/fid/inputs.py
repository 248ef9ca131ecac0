"""What `ddo fid` scores and what it compares with: image sets, models that draw, statistics, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli import dist
from ddo_cli.data.samples import MAX_SEED
from ddo_cli.data.stream import ImageStream, open_stream
from ddo_cli.engines.fid import one_pass
from ddo_cli.engines.fid.one_pass import Source, Wanted
from ddo_cli.errors import DataError, UsageError
from ddo_cli.likelihood import LikelihoodModel, check_labels, generate, labels_of, num_batches
from ddo_cli.metrics import references
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.references import ReferenceFile
from ddo_cli.metrics.stats import Moments, Statistics
from ddo_cli.metrics.uncertainty import merged
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe

FINAL = "final.safetensors"  # of a run directory
PUBLISHED_NUM = 50_000  # images behind a published FID; its bias grows as their number falls


# ---------------------------------------------------------------------------------------------------------------------
# What is scored


class Drawn:
    """Images that a model draws for the seeds first .. first + num - 1, never on disk."""

    num_lossy = 0
    identity: str | None = None  # its images are known once they are drawn

    def __init__(self, name: str, model: LikelihoodModel, spec: SamplingRecipe, first: int, num: int, device: Any):
        self.name, self.model, self.spec, self.device = name, model, spec, device
        self.seeds = range(first, first + num)
        self.num_classes = model.num_classes if spec.labels != "random" else 0
        counted = range(num) if spec.labels == "position" else self.seeds
        self.labels = labels_of(counted, self.num_classes).numpy()

    @property
    def num(self) -> int:
        """Images of the set."""
        return len(self.seeds)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.model.shape

    def share(self, batch: int) -> np.ndarray:
        """Rows of this process: whole batches of the sampler, so that images do not depend on the process count."""
        own = dist.shard(range(num_batches(self.num, self.spec.batch)))
        return np.concatenate([np.zeros(0, np.int64), *(self._rows(number) for number in own)])

    def default_workers(self, device: torch.device, batch: int) -> int:
        """Nothing is decoded."""
        return 0

    def batches(
        self, batch: int, rows: np.ndarray | None = None, workers: int = 0, pin: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """As the sampler draws them. rows: of `share`, or a few, whose batches are drawn anew."""
        rows = np.arange(self.num) if rows is None else rows
        numbers = sorted(set((rows // self.spec.batch).tolist()))
        wanted = np.zeros(self.num, dtype=bool)
        wanted[rows] = True
        made = generate(self.model, self.seeds, self.spec, batch=self.spec.batch, only=numbers, device=self.device)
        for found in made:
            own = self._rows(found.number)
            kept = wanted[own]
            yield own[kept], found.items[torch.from_numpy(kept)]

    def _rows(self, number: int) -> np.ndarray:
        first = number * self.spec.batch
        return np.arange(first, min(first + self.spec.batch, self.num))


def open_sources(
    source: str, num: int | None, repeat: int, sampling: dict[str, Any], device: torch.device
) -> list[Source]:
    """One set of images per repeat. Raises DataError, CheckpointError or UsageError.

    source: images, or a run directory or weight file, whose model draws `num` (default 50,000) for each of as many
    ranges of seeds. Images are cut into `repeat` equal parts in their order, which is that of the seeds.
    """
    path = Path(source)
    if path.is_dir() and (path / FINAL).is_file():
        path = path / FINAL
    if path.suffix == ".safetensors":
        return [*_drawn(str(path), num or PUBLISHED_NUM, repeat, sampling, device)]
    if sampling:
        raise UsageError(f"{', '.join(sampling)} are for sampling, and {source} holds images; give a weight file")
    stream = comparable(source, num)
    part = stream.num // repeat
    if part < 2:
        raise UsageError(f"--repeat {repeat} leaves {part} of the {stream.num} images of {source} to each; lower it")
    if repeat == 1:
        return [stream]
    return [
        dataclasses.replace(
            stream,
            positions=stream.positions[i * part : (i + 1) * part],
            labels=stream.labels[i * part : (i + 1) * part],
            identity=None if stream.identity is None else f"{stream.identity} {i}/{repeat}",
        )
        for i in range(repeat)
    ]


def _drawn(name: str, num: int, repeat: int, sampling: dict[str, Any], device: torch.device) -> Iterator[Drawn]:
    if repeat * num - 1 > MAX_SEED:
        raise UsageError(
            f"--repeat {repeat} of --num-images {num} draw seeds up to {repeat * num - 1}, and they end at {MAX_SEED}"
        )
    loaded = registry.load_model(name, device)
    spec = SamplingRecipe(**loaded.checkpoint.header.get("sampling", {})).merged(**sampling)
    loaded.model.check_sampling(spec)
    loaded.model.encoder_id()  # loads an autoencoder that is no part of the weights, before anything is drawn
    check_labels(spec, loaded.model.num_classes, num)
    if len(loaded.model.shape) != 3:
        raise UsageError(f"{name} draws points, not images; a Frechet distance needs images")
    for i in range(repeat):
        yield Drawn(name, loaded.model, spec, i * num, num, device)


def comparable(source: str, num: int | None = None) -> ImageStream:
    """Images that a distance can be taken of. Raises DataError."""
    stream = open_stream(source, num)
    if stream.num < 2:
        raise DataError(f"{source} holds one image; a distance needs at least two, and thousands to mean something")
    return stream


# ---------------------------------------------------------------------------------------------------------------------
# What it is compared with


class Side(NamedTuple):
    """The reference as one extractor sees it; what was not asked for is None. stream: its images, where it has them."""

    pool: Statistics | None
    spatial: Statistics | None
    features: Tensor | None
    classes: list[Moments] | None
    stream: ImageStream | None


class Opened(NamedTuple):
    """A reference before any network pass."""

    name: str
    file: ReferenceFile | None
    stream: ImageStream | None


def open_reference(name: str, wanted: Sequence[Wanted]) -> Opened:
    """The reference, once it is sure to serve every extractor. Raises DataError or CheckpointError."""
    if not references.is_reference(name):
        stream = comparable(name)
        if any(one.classes for one in wanted) and not stream.num_classes:
            raise DataError(f"{name} has no labels; a distance per class needs a reference with them")
        return Opened(name, None, stream)
    file = references.read_reference(name)
    for one in wanted:
        for kind in one.moments:
            file.statistics(one.extractor, kind)
        if one.classes:
            raise DataError(f"{name} holds statistics; a distance per class needs images with labels")
        if one.features and file.images is None:
            file.features(one.extractor)
    return Opened(name, file, None)


def sides(
    opened: Opened, wanted: Sequence[Wanted], batch: int, workers: int | None, device: torch.device, cache: bool = True
) -> list[Side]:
    """The reference's side of every extractor. cache: as `fid_pass.run` takes it."""
    if opened.file is not None:
        return [_of_file(opened.file, one, batch) for one in wanted]
    stream = opened.stream
    assert stream is not None, "images or a file"
    passed = one_pass.run(stream, wanted, batch, workers, device, f"reference {opened.name}", cache=cache)
    return [_of_pass(stream, taken) for taken in passed.taken]


def _of_pass(stream: ImageStream, taken: one_pass.Taken) -> Side:
    kinds = {kind: merged(chunks.result()).statistics() for kind, chunks in taken.moments.items()}
    features = taken.features.result() if taken.features is not None else None
    classes = taken.classes.result() if taken.classes is not None else None
    return Side(kinds.get("pool"), kinds.get("spatial"), features, classes, stream)


def _of_file(file: ReferenceFile, wanted: Wanted, batch: int) -> Side:
    kinds = {kind: file.statistics(wanted.extractor, kind) for kind in wanted.moments}
    features = None
    if wanted.features:
        stored = "pool" in file.shapes
        features = file.features(wanted.extractor) if stored else _features_of(file, wanted.extractor, batch)
    return Side(kinds.get("pool"), kinds.get("spatial"), features, None, None)


def _features_of(file: ReferenceFile, extractor: Extractor, batch: int) -> Tensor:
    """Features of the images inside a reference, (N, F): ADM's hold 10,000 for precision and recall."""
    assert file.images is not None, "see open_reference"
    return torch.cat([extractor(images) for images in file.images.batches(batch)])
