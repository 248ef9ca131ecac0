"""What `ddo fid` scores and what it compares with: image sets, models that draw, statistics, and their checks."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ddo_cli import dist, rundir
from ddo_cli.data.inspection import Inspection
from ddo_cli.data.pictures import Preparation, spelled
from ddo_cli.data.samples import MAX_SEED, Format, read_manifest
from ddo_cli.data.stream import ImageStream, open_stream
from ddo_cli.engines.fid.cache import Source
from ddo_cli.engines.fid.one_pass import Passed, Wanted
from ddo_cli.engines.sampling.sample import spec_of
from ddo_cli.errors import DataError, UsageError
from ddo_cli.generation import check_channels, check_labels, generate, labels_of, num_batches
from ddo_cli.metrics import references
from ddo_cli.metrics.references import ReferenceFile
from ddo_cli.metrics.stats import Moments, Statistics
from ddo_cli.metrics.uncertainty import merged
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe

PUBLISHED_NUM = 50_000  # images behind a published FID; its bias grows as their number falls


# --- What is scored


class Drawn:
    """Images that a model draws for the seeds first .. first + num - 1, never on disk."""

    num_lossy = 0
    warnings: tuple[str, ...] = ()
    identity: str | None = None  # its images are known only once they are drawn

    def __init__(self, loaded: registry.Loaded, spec: SamplingRecipe, first: int, num: int, device: Any):
        model = loaded.model
        self.name, self.model, self.spec, self.device = str(loaded.checkpoint.path), model, spec, device
        self.captions = tuple(loaded.checkpoint.header["config"]["options"].get("prompts", ()))
        self.seeds = range(first, first + num)
        self.num, self.shape = num, model.codec.shape
        self.num_classes = model.num_classes if spec.labels != "random" else 0
        counted = range(num) if spec.labels == "position" else self.seeds
        self.labels = labels_of(counted, self.num_classes).numpy()

    def share(self, batch: int) -> np.ndarray:
        """Rows of this process: whole batches of the sampler, so that images do not depend on the process count."""
        numbers = dist.shard(range(num_batches(self.num, self.spec.batch)))
        return np.concatenate([np.zeros(0, np.int64), *(self._rows(number) for number in numbers)])

    def default_workers(self, device: torch.device, batch: int) -> int:
        """Nothing is decoded."""
        return 0

    def batches(
        self, batch: int, rows: np.ndarray | None = None, workers: int = 0, pin: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """As the sampler draws them. rows: of `share`, or a few, whose batches are drawn anew."""
        rows = np.arange(self.num) if rows is None else rows
        numbers = sorted(set((rows // self.spec.batch).tolist()))
        is_wanted = np.zeros(self.num, dtype=bool)
        is_wanted[rows] = True
        for drawn in generate(
            self.model, self.seeds, self.spec, batch=self.spec.batch, only=numbers, device=self.device
        ):
            drawn_rows = self._rows(drawn.number)
            kept = is_wanted[drawn_rows]
            yield drawn_rows[kept], drawn.items[torch.from_numpy(kept)]

    def _rows(self, number: int) -> np.ndarray:
        first = number * self.spec.batch
        return np.arange(first, min(first + self.spec.batch, self.num))


def open_sources(
    source: str | ImageStream,
    num: int | None,
    repeat: int,
    sampling: dict[str, Any],
    device: torch.device,
    preparation: Preparation | None = None,
) -> list[Source]:
    """One set of images per repeat. Raises DataError, CheckpointError or UsageError.

    source: images, or a run directory or weight file, whose model draws `num` (default 50,000) for each of as many
    ranges of seeds. Images are cut into `repeat` equal parts in their order, which is that of the seeds. Images in
    memory are taken as they are, all of them.
    preparation: of images of mixed sizes.
    """
    if isinstance(source, str) and (weights := _weights_of(source)) is not None:
        if preparation is not None:
            size = preparation.protocol["size"]
            raise UsageError(
                f"--resize {size} is for images of mixed sizes, and {source} draws them of one; leave it out"
            )
        return [*_drawn(str(weights), num or PUBLISHED_NUM, repeat, sampling, device)]
    name = source if isinstance(source, str) else source.name
    if sampling:
        raise UsageError(f"{', '.join(sampling)} are for sampling, and {name} holds images; give a weight file")
    stream = comparable(source, num, preparation)
    part = stream.num // repeat
    if part < 2:
        raise UsageError(f"--repeat {repeat} leaves {part} of the {stream.num} images of {name} to each; lower it")
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


def _weights_of(source: str) -> Path | None:
    """The weight file of a run's directory, or the weight file that `source` is; None: it holds images."""
    path = Path(source)
    if path.is_dir() and (rundir.RunDir(path).final.is_file() or rundir.is_run(path)):
        return rundir.weights_of(path)
    return path if path.suffix == ".safetensors" else None


def _drawn(name: str, num: int, repeat: int, sampling: dict[str, Any], device: torch.device) -> Iterator[Drawn]:
    if repeat * num - 1 > MAX_SEED:
        raise UsageError(
            f"--repeat {repeat} of --num-images {num} draw seeds up to {repeat * num - 1}, and they end at {MAX_SEED}"
        )
    loaded = registry.load_model(name, device)
    spec = spec_of(loaded.checkpoint, **sampling)
    loaded.model.check_sampling(spec)
    check_channels(loaded.model.codec.shape)
    loaded.model.codec.encoder_id()  # loads a separate autoencoder now, not after the first batch is drawn
    check_labels(spec, loaded.model.num_classes, num)
    if len(loaded.model.codec.shape) != 3:
        raise UsageError(f"{name} draws points, not images; a Frechet distance needs images")
    for i in range(repeat):
        yield Drawn(loaded, spec, i * num, num, device)


def texts_of(source: Source) -> tuple[str, ...]:
    """What a set's labels mean where they are no classes: captions of images, or prompts of samples; else ()."""
    if source.captions or not isinstance(source, ImageStream):
        return source.captions
    manifest = read_manifest(Path(source.name))
    prompts = manifest.get("prompts") if manifest.get("format") in get_args(Format) else None
    return tuple(map(str, prompts)) if isinstance(prompts, list) else ()


def captions_of(source: Source) -> tuple[str, ...]:
    """The texts of a set. Raises DataError where it has none."""
    texts = texts_of(source)
    if not texts:
        raise DataError(
            f"{source.name} has no captions, which the CLIP score compares images with; give images with a .txt beside "
            "each, or a set that `ddo sample` drew of prompts"
        )
    if source.labels.min() < 0 or source.labels.max() >= len(texts):
        raise DataError(
            f"{source.name}: labels go from {source.labels.min()} to {source.labels.max()} where it has {len(texts)} "
            "captions; the CLIP score needs one of each image, so draw them again with --prompts"
        )
    return texts


def comparable(
    source: str | ImageStream, num: int | None = None, preparation: Preparation | None = None
) -> ImageStream:
    """Images that a distance can be taken of. Raises DataError."""
    stream = open_stream(source, num, preparation) if isinstance(source, str) else source
    if stream.num < 2:
        raise DataError(
            f"{stream.name} holds one image; a distance needs at least two, and thousands to mean something"
        )
    return stream


# --- What it is compared with


class Reference(NamedTuple):
    """A reference before any network pass: a file of statistics, or a stream of images."""

    name: str
    file: ReferenceFile | None
    stream: ImageStream | None


class Side(NamedTuple):
    """The reference's statistics for one extractor, by kind of features, and what else its metrics need."""

    moments: dict[str, Statistics]
    features: Tensor | None = None
    classes: list[Moments] | None = None


def open_reference(
    source: str | ImageStream, wanted: Sequence[Wanted], preparation: Preparation | None = None
) -> Reference:
    """The reference, checked to serve every extractor. Raises DataError or CheckpointError.

    preparation: of its images, as of those that are compared with it.
    """
    needs_classes = any(of_one.classes for of_one in wanted)
    if not isinstance(source, str) or not references.is_reference(source):
        stream = comparable(source, None, preparation)
        if needs_classes and not stream.num_classes:
            raise DataError(f"{stream.name} has no labels; a distance per class needs a reference with them")
        return Reference(stream.name, None, stream)
    file = references.read_reference(source)
    for of_one in wanted:
        for kind in of_one.moments:
            file.statistics(of_one.extractor, kind)
        if of_one.classes:
            raise DataError(f"{source} holds statistics; a distance per class needs images with labels")
        if of_one.features and file.images is None:
            file.features(of_one.extractor)
    return Reference(source, file, None)


def resized_otherwise(reference: Reference, preparation: Preparation | None) -> list[str]:
    """A warning where the images are resized otherwise than those of a file of statistics."""
    if reference.file is None:  # its images are resized likewise
        return []
    theirs = (reference.file.data or {}).get("resize")
    ours = None if preparation is None else preparation.protocol
    if ours == theirs:
        return []
    here, there = (
        "not resized" if protocol is None else f"resized ({spelled(protocol)})" for protocol in (ours, theirs)
    )
    if theirs is None and reference.file.data is None:
        there = "resized in a way that the file does not tell"
    return [f"the images are {here}, those of {reference.name} {there}; compare only with scores made likewise"]


def sides(
    reference: Reference, wanted: Sequence[Wanted], batch: int, accumulate: Callable[..., Passed]
) -> tuple[list[Side], Inspection | None]:
    """The reference's side of every extractor, and what its images show; None for a file of statistics.

    accumulate: `one_pass.run`, of a source, what is wanted and a title.
    """
    if reference.file is not None:
        return [_of_file(reference.file, of_one, batch) for of_one in wanted], None
    # No score is taken of the reference, and no error, which needs the moments of parts.
    wanted = [of_one._replace(chunks=1, score=None) for of_one in wanted]
    passed = accumulate(reference.stream, wanted, f"reference {reference.name}")
    of_images = [
        Side(
            {kind: merged(chunks.result()).statistics() for kind, chunks in taken.moments.items()},
            None if taken.features is None else taken.features.result(),
            None if taken.classes is None else taken.classes.result(),
        )
        for taken in passed.taken
    ]
    return of_images, passed.inspection


def _of_file(file: ReferenceFile, wanted: Wanted, batch: int) -> Side:
    moments = {kind: file.statistics(wanted.extractor, kind) for kind in wanted.moments}
    if not wanted.features:
        return Side(moments)
    if "pool" in file.shapes:
        return Side(moments, file.features(wanted.extractor))
    # ADM's references hold 10,000 images for precision and recall.
    assert file.images is not None, "checked by open_reference"
    return Side(moments, torch.cat([wanted.extractor(images) for images in file.images.batches(batch)]))
