"""Learning-rate schedules in images seen."""

from __future__ import annotations

import math

from ddo_cli.schema import TrainRecipe


def learning_rate(recipe: TrainRecipe, n_images: int, total: int) -> float:
    """Linear warm-up, then constant, or down half a cosine to 0 at `total` images.

    n_images: seen once this step is done; counting the step itself keeps the first step's rate above 0.
    """
    if n_images < recipe.warmup:
        return recipe.lr * n_images / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.lr
    done = (n_images - recipe.warmup) / max(total - recipe.warmup, 1)
    return recipe.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2
