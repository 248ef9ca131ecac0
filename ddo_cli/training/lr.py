"""Learning-rate schedules in images seen."""

import math

from ddo_cli.recipe.schema import TrainRecipe


def learning_rate(recipe: TrainRecipe, n_images: int, total: int) -> float:
    """Linear warm-up, times the schedule: constant; half a cosine down to 0 at `total` images; EDM2's inverse square
    root, lr / sqrt(max(n / decay_images, 1)) (arXiv 2312.02696); or VAR's line down to lr_final * lr at `total`.

    n_images: seen once this step is done; counting the step itself keeps the first step's rate above 0.
    """
    if recipe.lr_schedule == "inverse-sqrt":  # counts all images, those of the warm-up among them
        assert recipe.decay_images is not None, "the schema refuses this schedule without it"
        warm = min(n_images / recipe.warmup, 1.0) if recipe.warmup else 1.0
        return recipe.lr * warm / math.sqrt(max(n_images / recipe.decay_images, 1.0))
    if n_images < recipe.warmup:
        return recipe.lr * n_images / recipe.warmup
    if recipe.lr_schedule == "constant":
        return recipe.lr
    done = min((n_images - recipe.warmup) / max(total - recipe.warmup, 1), 1.0)
    if recipe.lr_schedule == "linear":
        left = min((1 - done) / (1 - recipe.lr_hold), 1.0)
        return recipe.lr * (recipe.lr_final + (1 - recipe.lr_final) * left)
    return recipe.lr * (1 + math.cos(math.pi * done)) / 2
