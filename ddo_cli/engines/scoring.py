"""Scores of a model inside a run: samples drawn and measured in memory, or densities on a grid."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ddo_cli import console, dist
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_distance, check_images
from ddo_cli.diffusion import probability_flow
from ddo_cli.diffusion.mixture import toy2d
from ddo_cli.errors import DataError, UsageError, printable
from ddo_cli.generation import Batch, generate, num_batches
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.metrics import references, stats
from ddo_cli.metrics.density import DensityScorer
from ddo_cli.metrics.extractors import clip_text
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.extractors.select import select_extractor
from ddo_cli.metrics.scorer import ClipScorer, FrechetScorer
from ddo_cli.precision import inference_precision
from ddo_cli.recipe.schema import Recipe, SamplingRecipe
from ddo_cli.report import pictures

GRID_SEEDS = range(64)  # of the pictures that compare models
PREVIEWED = 16  # of those, at each evaluation


class Scoring:
    """The recipe's metric, with the reference statistics computed once. Lower is better."""

    def __init__(
        self, recipe: Recipe, real: ItemSet, spec: SamplingRecipe, device: torch.device, reads_text: bool = False
    ):
        """Opens everything, so that a mistake shows at once; the reference's features wait for the first score.

        reads_text: whether the model's labels are the numbers of the captions of `real`.
        """
        self.metric, self.spec, self.device = recipe.metric, spec, device
        self.density: DensityScorer | None = None
        self._clip: Callable[[], ClipScorer] | None = None
        self.identity: dict[str, str] = {}  # hashes that a continued run compares
        metric = recipe.metric
        if metric.name == "js":
            if not real.name.startswith("embedded:toy2d"):
                raise UsageError(f"metric.name = js needs data of known density (embedded:toy2d), not {real.name}")
            self.density = DensityScorer(toy2d())
            self.key = "js"
        elif metric.name == "clip":
            self._check_captions(recipe, real, reads_text)
            of_clip = clip_text.load(metric.weights, device)
            self._clip, self.key = partial(ClipScorer, of_clip, real.captions), ClipScorer.key
            self.identity = {"extractor_sha256": of_clip.sha256}
        else:
            self.extractor = select_extractor(metric.name, metric.weights, metric.extractor, device)
            if metric.ref is None:
                check_images(real, "set metric.ref to images, or to statistics of them (ddo stats)")
                check_distance(real)
            self.reference = real if metric.ref is None else open_reference(metric.ref, self.extractor)
            self.key = self.extractor.key
            _check_suits(self.reference, metric.extractor is None and self.extractor.key == "fd_embedded")
            self.identity = {"extractor_sha256": self.extractor.sha256}

    @staticmethod
    def _check_captions(recipe: Recipe, real: ItemSet, reads_text: bool) -> None:
        metric = recipe.metric
        if given := [name for name in ("ref", "extractor", "benchmark") if getattr(metric, name) is not None]:
            value = printable(getattr(metric, given[0]), 80)
            raise UsageError(
                f"metric.{given[0]} = {value} has no effect with metric.name = clip, which compares images with the "
                f"captions of data.source; set metric.{given[0]} = null"
            )
        if not reads_text or not real.captions:
            what = f"{real.name} has none" if reads_text else "this model reads no text"
            raise UsageError(
                f"metric.name = clip compares images with the captions that they are drawn of, and {what}; choose "
                "another metric"
            )

    @cached_property
    def frechet(self) -> FrechetScorer:
        """The scorer with the reference's statistics."""
        return FrechetScorer(self.extractor, self.reference, self.spec.batch)

    @cached_property
    def clip(self) -> ClipScorer | None:
        """The scorer with the embeddings of captions, where that is the metric."""
        return None if self._clip is None else self._clip()

    @property
    def repeats(self) -> int:
        """Ranges of seeds of a mean; densities have no sampling noise, so one is enough."""
        return 1 if self.density is not None else self.metric.repeats

    # Ranges of seeds of a finetuning, by number. Range 0 chooses among candidates, and the best of many looks better
    # there than it is. So others decide on promotion, and those of the table decide nothing. A density has no seeds.

    @property
    def promotion_ranges(self) -> range:
        """Of what decides whether a candidate is better than the reference."""
        return range(1) if self.density is not None else range(1, 1 + self.repeats)

    @property
    def table_ranges(self) -> range:
        """Of the figures that are reported."""
        return range(1) if self.density is not None else range(1 + self.repeats, 1 + 2 * self.repeats)

    @property
    def images(self) -> int:
        """Images drawn for a mean; densities are of points, which cost little."""
        return 0 if self.density is not None else self.repeats * self.metric.num_images

    def check(self, boosts: bool = False) -> None:
        """Raises UsageError if the metric cannot be computed for this sampler. boosts: whether a guide boosts it."""
        if self.density is not None and (self.spec.s_churn or boosts):
            raise UsageError("metric js is of the density that an ODE draws: leave sampling.s_churn and boost out")

    def run(self, model: LikelihoodModel, repeat: int, images: int | None = None) -> dict[str, float]:
        """The metric's figures, `self.key` among them, on this range of seeds. Equal on every process.

        images: use only this many of those seeds (a density uses none); None: all.
        """
        if self.density is not None:
            with inference_precision("float32", self.device):  # the precision of `generate`, not of training
                return dist.from_main(self.density.score(model, self.spec))
        first = repeat * self.metric.num_images
        seeds = range(first, first + (images or self.metric.num_images))
        numbers = dist.shard(range(num_batches(len(seeds), self.spec.batch)))
        batches = generate(model, seeds, self.spec, batch=self.spec.batch, only=numbers, device=self.device)
        title = f"{self.key}, seeds {seeds.start} to {seeds.stop - 1}"
        num_here = sum(min(self.spec.batch, len(seeds) - number * self.spec.batch) for number in numbers)
        with console.progress(title, num_here, "images") as bar:
            drawn = _counted(batches, bar)
            if self.clip is not None:
                return self.clip.score((batch.items, batch.label) for batch in drawn)
            return self.frechet.score(batch.items for batch in drawn)

    def passes(self, model: LikelihoodModel, images: int | None = None) -> int:
        """Cost of a score in forward passes of one row; a backward pass counts as two."""
        if self.density is not None:
            per_evaluation = 1 + 2 * math.prod(model.codec.shape)  # a backward pass for each dimension
            return self.density.size**2 * 4 * probability_flow.STEPS * per_evaluation
        return model.passes(self.spec) * (images or self.metric.num_images)

    def picture(self, model: LikelihoodModel, path: Path) -> None:
        """Draws samples of the model, on the same seeds for every model, or its density beside the data's."""
        if not dist.is_main():
            return
        if self.density is not None:
            grid = self.density.score_and_densities(model, self.spec)[1]
            pictures.densities({"data": grid.p_data, "model": grid.p_model}, grid.extent, path)
            return
        batches = generate(model, GRID_SEEDS, self.spec, batch=self.spec.batch, device=self.device)
        pictures.contact_sheet(torch.cat([batch.items for batch in batches]).numpy(), path, columns=8)

    def few(self, model: LikelihoodModel) -> np.ndarray | None:
        """Images of the first seeds of the pictures, on the main process; None of a density, and on others."""
        if self.density is not None or not dist.is_main():
            return None
        batches = generate(model, GRID_SEEDS[:PREVIEWED], self.spec, batch=self.spec.batch, device=self.device)
        return torch.cat([batch.items for batch in batches]).numpy()

    def preview(self, before: np.ndarray | None, model: LikelihoodModel, path: Path) -> None:
        """Draws `few` of a model, right, beside those of another, left."""
        after = self.few(model)
        if before is not None and after is not None:
            pictures.side_by_side(before, after, path)


def _counted(batches: Iterator[Batch], bar: console.Bar) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        bar.advance(len(batch.items))


def _check_suits(reference: ItemSet | stats.Statistics, is_embedded: bool) -> None:
    """Warns where the embedded extractor, a classifier of digits, judges other images. (Statistics name their own.)"""
    if not is_embedded or not isinstance(reference, ItemSet) or reference.name.startswith("embedded:digits"):
        return
    remedy = "set metric.name to fid or fd_dinov2, and metric.weights to the path of their weights"
    if reference.num_classes:
        remedy = "give one made by `ddo train-extractor` as metric.extractor, or " + remedy
    console.warn(f"{reference.name} is scored by features of a digit classifier, which mean little here; {remedy}")


def open_reference(ref: str, extractor: Extractor) -> ItemSet | stats.Statistics:
    """The reference of a `FrechetScorer`: images, or statistics from a file. Raises DataError or CheckpointError."""
    if references.is_reference(ref):
        return references.read_reference(ref).statistics(extractor)
    opened = open_images(ref)
    if opened.items.ndim != 4:
        raise DataError(f"{ref} holds points, not images; a Frechet distance needs images (points: metric js)")
    check_images(opened, "a Frechet distance needs the images themselves")
    check_distance(opened)
    return opened
