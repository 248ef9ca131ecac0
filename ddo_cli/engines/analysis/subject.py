"""Shared by the analyses of `ddo analyze`: a model with its guide and held-out data, settings, and results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddo_cli import console, dist
from ddo_cli.data.items import ItemSet
from ddo_cli.diffusion import samplers
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.diffusion.guidance import GradientGuide
from ddo_cli.engines.sampling import guides
from ddo_cli.generation import encoded
from ddo_cli.likelihood import NO_LABEL
from ddo_cli.recipe.schema import Recipe, SamplingRecipe

T = TypeVar("T")
R = TypeVar("R")


class Settings(NamedTuple):
    """Settings of `ddo analyze`, except model, discriminator and sampler."""

    steps_list: tuple[int, ...] = (4, 6, 8, 12, 18)  # of nfe
    num: int = 1024  # images per score of nfe
    noise_level: float = 1.0  # of regeneration; the paper adds standard normal noise
    regenerations: int = 100  # of each image, as in the paper


class Subject(NamedTuple):
    """A model, its guide, how samples are drawn, and real data that the discriminator was not trained on."""

    base: DiffusionModel
    guide: GradientGuide
    spec: SamplingRecipe
    recipe: Recipe
    real: ItemSet
    rows: np.ndarray  # of `real`: the held-out ones
    device: torch.device

    def held_out(self, num: int | None = None) -> tuple[Tensor, Tensor]:
        """x0 (N, ...) in model space and labels (N,) of the first `num` held-out rows, or of all."""
        rows = self.rows[:num]
        has_labels = bool(self.base.num_classes)
        label = torch.from_numpy(self.real.labels[rows]) if has_labels else torch.full((len(rows),), NO_LABEL)
        return encoded(self.base, self.real.items, rows, "real", self.recipe.seed, device=self.device), label

    def sides(self) -> dict[str, DiffusionModel]:
        """What is compared, by name."""
        return {"model": self.base, "guided": self.base.guided_by([self.guide])}

    def ode_sides(self) -> dict[str, DiffusionModel]:
        """The same for an ODE solver, without boosting, which acts on the steps of a stochastic sampler.

        The solver's correctors take their own weight if the sampler has correctors, and the predictors' otherwise.
        """
        second = self.guide.weight_2nd if samplers.find(self.spec.sampler).has_corrector else self.guide.weight
        return {"model": self.base, "guided": self.base.guided_by([self.guide._replace(boost=None, weight_2nd=second)])}

    def window(self) -> tuple[float, float]:
        """The lowest and highest noise level with guidance; not increasing if there is none."""
        return guides.window(self.base, self.guide, self.spec)


class Finding(NamedTuple):
    """summary: figures for the terminal; content: everything, for the JSON file; draw: makes the picture."""

    summary: dict[str, Any]
    content: dict[str, Any]
    draw: Callable[[Path], None]


def shared_out(title: str, unit: str, tasks: Sequence[T], act: Callable[[T], R]) -> dict[T, R]:
    """`act(task)` of every task, by task; the processes share the tasks, and all get every result. Collective."""
    results, tasks_here = [], dist.shard(tasks)
    with console.progress(title, len(tasks_here), unit) as bar:
        for task in tasks_here:
            results.append((task, act(task)))
            bar.advance()
    every = dict(pair for rank in dist.gathered(results) for pair in rank)
    return {task: every[task] for task in tasks}
