"""Adam and AdamW as a recipe asks for them, and the loss scaling of float16."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddo_cli import sharding
from ddo_cli.errors import UsageError
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.trainable import Trainable

# float16 holds no gradient below 6e-8 and none above 65504. Start and patience as in VAR's training: a round may have
# 80 steps only, so few of them may go to finding the scale.
_FIRST_SCALE = 2.0**11
_STEPS_TO_DOUBLE = 1000
SMALLEST_SCALE = 1.0  # our choice: below it, gradients overflow that were not scaled up at all


def build(model: Trainable, recipe: TrainRecipe) -> torch.optim.Adam:
    """The optimizer of the model's trainable parameters, in their order. Raises UsageError if there are none.

    Groups are in the order decayed, exempt, which numbers the moments in a saved state.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UsageError("this model has no trainable parameters; choose another")
    keywords: dict[str, Any] = {
        "lr": recipe.lr,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_eps,
        "weight_decay": recipe.weight_decay,
    }
    if recipe.optimizer == "adam":
        return _with_moments(torch.optim.Adam([p for _, p in named], **keywords))
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if not model.no_decay(name, p)]},
        {"params": [p for name, p in named if model.no_decay(name, p)], "weight_decay": 0.0},
    ]
    return _with_moments(torch.optim.AdamW([group for group in groups if group["params"]], **keywords))


def _with_moments(optimizer: torch.optim.Adam) -> torch.optim.Adam:
    """Makes the moments, zeros, before the first step: a saved state is read into them, and memory that does not
    suffice shows at once.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


class LossScale:
    """Scaling of the loss, so that small gradients survive float16; for other precisions nothing happens.

    A step whose gradient overflows is left out and the scale halved; after a thousand good ones in a row it doubles.
    """

    def __init__(self, recipe: TrainRecipe):
        self.is_on = recipe.precision == "fp16"
        self.value = _FIRST_SCALE if self.is_on else 1.0  # the factor of the loss, a power of two: it rounds nothing
        self.skipped = 0  # steps left out
        self._good = 0  # steps in a row that were not

    def backward(self, loss: Tensor) -> None:
        """Gradients of the scaled loss, added to those there are."""
        (loss * self.value if self.is_on else loss).backward()

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides the gradients by the scale, once before the step.

        One by one: the scalars of a sharded model are not sharded, and torch's GradScaler takes no list of both kinds.
        """
        if self.is_on:
            for parameter in parameters:
                if parameter.grad is not None:
                    sharding.own_rows(parameter.grad).mul_(1 / self.value)

    def step(self, optimizer: torch.optim.Optimizer, is_finite: bool) -> bool:
        """Takes the optimizer's step, or leaves it out and lowers the scale. False: the scale can fall no further.

        is_finite: of the gradient's norm over all processes, of which each may hold a part only.
        """
        if is_finite:
            optimizer.step()
            self._good += 1
            if self.is_on and self._good == _STEPS_TO_DOUBLE:
                self.value, self._good = 2 * self.value, 0
            return True
        if not self.is_on or self.value <= SMALLEST_SCALE:
            return False
        self.value, self._good = self.value / 2, 0
        self.skipped += 1
        return True

    def state(self) -> dict[str, Any]:
        """What resuming needs, JSON-ready; empty where nothing is scaled."""
        return {"scale": self.value, "skipped": self.skipped, "good_steps": self._good} if self.is_on else {}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        if self.is_on and saved:
            self.value, self.skipped, self._good = saved["scale"], saved["skipped"], saved["good_steps"]

    def log(self) -> dict[str, float]:
        """Figures for a line of the log."""
        return {"loss_scale": self.value, "skipped_steps": self.skipped} if self.is_on else {}
