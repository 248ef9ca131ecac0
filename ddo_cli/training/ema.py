"""Averages of weights over training: with a half-life in images, or by power functions of several widths."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ddo_cli import sharding
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.training.profiles import power_decay


def ema_decay(batch: int, half_life: float, n_images: int, ramp: float | None = None) -> float:
    """0.5^(batch / half-life), where the half-life is at most `ramp` times the images seen (EDM's warm-up).

    half_life: images; 0 gives 0, so that the average is the weights themselves.
    """
    if ramp is not None:
        half_life = min(half_life, ramp * n_images)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def snapshot_name(step: int, width: float | None = None) -> str:
    """File name of the averaged weights after a step. width: of a further average; None: of the first."""
    return f"step-{step:06d}.safetensors" if width is None else f"step-{step:06d}-ema{width:.3f}.safetensors"


class Averages:
    """One set of averaged weights for each of recipe.ema_widths, or else the one of recipe.ema_half_life.

    A set has every tensor of the model's state. Buffers and frozen parameters (a tokenizer, for example) are not
    averaged: those entries are the model's own tensors, not copies.
    """

    def __init__(self, model: nn.Module, recipe: TrainRecipe):
        self.recipe = recipe
        self.widths = recipe.ema_widths
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.sets: list[dict[str, Tensor]] = [
            {name: tensor.clone() if name in self.trained else tensor for name, tensor in state.items()}
            for _ in range(max(len(self.widths), 1))
        ]
        with torch.no_grad():
            self._averaged = [[sharding.own_rows(average[name]) for name in self.trained] for average in self.sets]

    def whole(self) -> dict[str, Tensor]:
        """The first set, which is scored and promoted, gathered where it is sharded; every process has to ask."""
        return sharding.full(self.sets[0])

    def further(self) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """The widths and tensors of the others, likewise."""
        for width, tensors in zip(self.widths[1:], self.sets[1:], strict=True):
            yield width, sharding.full(tensors)

    @torch.no_grad()
    def update(self, n_images: int) -> None:
        """average <- decay * average + (1 - decay) * weights, after a step; n_images: trained on so far, with it."""
        batch, recipe = self.recipe.batch, self.recipe
        ramp = getattr(recipe, "ema_ramp", None)  # a key of pretraining only
        decays = [power_decay(batch, width, n_images) for width in self.widths]
        decays = decays or [ema_decay(batch, recipe.ema_half_life, n_images, ramp)]
        weights = [sharding.own_rows(parameter) for parameter in self.trained.values()]
        for averaged, decay in zip(self._averaged, decays, strict=True):
            torch._foreach_lerp_(averaged, weights, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """What resuming needs: averaged tensors as "ema.<name>" of the first set, "ema1.<name>" of the second ..."""
        return {
            f"ema{number or ''}.{name}": average[name]
            for number, average in enumerate(self.sets)
            for name in average
            if name in self.trained
        }
