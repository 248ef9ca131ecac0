"""Adam and AdamW as a recipe asks for them, steps that are left out, and the loss scaling of float16."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddo_cli import sharding
from ddo_cli.errors import UsageError
from ddo_cli.extras import imported
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.trainable import Trainable

# float16 holds no gradient below 6e-8 and none above 65504. Start and patience as in VAR's training: a round may have
# 80 steps only, so few of them may go to finding the scale.
_FIRST_SCALE = 2.0**11
_STEPS_TO_DOUBLE = 1000
SMALLEST_SCALE = 1.0  # our choice: below it, gradients overflow that were not scaled up at all


def build(model: Trainable, recipe: TrainRecipe) -> Optimizer:
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
    fused: dict[str, Any] = {"fused": _can_fuse([parameter for _, parameter in named]) or None}
    if recipe.optimizer == "adam":
        return _with_moments(torch.optim.Adam([p for _, p in named], **keywords, **fused))
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if not model.no_decay(name, p)]},
        {"params": [p for name, p in named if model.no_decay(name, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return _with_moments(torch.optim.AdamW(groups, **keywords, **fused))
    bitsandbytes = imported("optimizer = adamw8bit needs", "bitsandbytes", "8bit")
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **keywords)
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, place)  # type: ignore[attr-defined]  # as `_with_moments`
    return optimizer


def tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """What a step changes, themselves and not copies, by "<number of the parameter>.<key>".

    Counts that are no tensors, as of bitsandbytes, are copies, which `counted` takes over.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{number}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        for number, parameter in enumerate(parameters)
        for key, value in optimizer.state[parameter].items()
        if not key.startswith("qmap")  # constants that all moments of 8 bits share
    }


def counted(optimizer: Optimizer, filled: Mapping[str, Tensor]) -> None:
    """Takes over counts that are no tensors. filled: those of `tensors`, with other values."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        state.update((key, int(filled[f"{number}.{key}"])) for key, value in state.items() if isinstance(value, int))


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether one kernel updates all parameters: on a GPU, where each is whole.

    Not on a CPU, whose fused kernel rounds otherwise; nor the rows of sharded weights beside scalars, which are whole.
    """
    return all(type(parameter) is nn.Parameter and parameter.is_cuda for parameter in parameters)


def _with_moments(optimizer: torch.optim.Adam) -> Optimizer:
    """Makes the moments, zeros, before the first step: a saved state is read into them, and memory that does not
    suffice shows at once.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            device = parameter.device if group["fused"] else "cpu"
            optimizer.state[parameter] = {"step": torch.zeros((), device=device), **moments}
    return optimizer


class Failure(NamedTuple):
    """A gradient that is not finite, and the loss that it was of."""

    step: int
    loss: float


class _Outcome(NamedTuple):
    """What a step has come to, on its way to the CPU."""

    step: int
    has_failed: Tensor  # on the CPU
    loss: Tensor
    arrived: torch.cuda.Event | None

    def failure(self) -> Failure | None:
        if self.arrived is not None:
            self.arrived.synchronize()
        return Failure(self.step, float(self.loss)) if self.has_failed else None


class Stepper:
    """Takes the optimizer's steps, but for those whose gradient is not finite.

    Such a step is a failure. In float16 the loss is scaled so that small gradients survive, and a step that overflows
    is left out instead and halves the scale; after a thousand good ones in a row it doubles. A scale that can fall no
    further makes it a failure, too.

    A fused optimizer is told on the device what to leave out, by numbers that never leave it, and after a failure
    everything: so weights and moments stay those of before, while the CPU reads of it one step later, or in `settle`.
    Another one is asked to step only after the CPU has read whether it should.
    """

    def __init__(self, optimizer: Optimizer, recipe: TrainRecipe):
        self.optimizer, self.clip_at = optimizer, recipe.grad_clip or math.inf
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.is_fused = bool(optimizer.defaults.get("fused"))
        self.is_on = recipe.precision == "fp16"
        device = self.parameters[0].device
        # The factor of the loss, a power of two: it rounds nothing.
        self.scale = torch.full((), _FIRST_SCALE if self.is_on else 1.0, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)  # steps in a row that were not left out
        self.skipped = torch.zeros((), device=device)  # steps left out
        self._has_failed = torch.zeros((), device=device)
        self._unread: _Outcome | None = None

    def backward(self, loss: Tensor) -> None:
        """Gradients of the scaled loss, added to those there are."""
        (loss * self.scale if self.is_on else loss).backward()

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Divides the gradients by the scale and clips them; returns the norm they had, over all processes."""
        if self.is_on:
            gradients = [sharding.own_rows(p.grad) for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.scale)
        return sharding.clip_grad_norm(self.parameters, self.clip_at)

    @torch.no_grad()
    def step(self, norm: Tensor, number: int, loss: Tensor) -> Failure | None:
        """Takes the step of this number, or leaves it out; returns a failure that the CPU has come to know of.

        norm: of the gradient over all processes, of which each may hold a part only. loss: of the step.
        """
        overflows = norm.isfinite().logical_not().to(torch.float32)
        self._has_failed = torch.maximum(self._has_failed, overflows * (self.scale <= SMALLEST_SCALE))
        left_out = torch.maximum(overflows, self._has_failed)
        if self.is_fused:
            self.optimizer.found_inf = left_out  # type: ignore[attr-defined]  # as torch's GradScaler has it
            self.optimizer.step()
        elif not left_out:
            self.optimizer.step()
        if self.is_on:
            self.skipped += left_out
            torch._amp_update_scale_(self.scale, self.good, overflows, 2.0, 0.5, _STEPS_TO_DOUBLE)
        before, self._unread = self._unread, self._outcome(number, loss)
        if not self.is_fused:
            return self.settle()
        return before.failure() if before is not None else None

    def settle(self) -> Failure | None:
        """The failure of the last step, if it was one; waits for the device."""
        last, self._unread = self._unread, None
        return last.failure() if last is not None else None

    def _outcome(self, number: int, loss: Tensor) -> _Outcome:
        has_failed, arrived = self._has_failed.to("cpu", non_blocking=True), None
        if self.scale.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return _Outcome(number, has_failed, loss.detach(), arrived)

    def state(self) -> dict[str, Any]:
        """What resuming needs, JSON-ready; empty where nothing is scaled."""
        numbers = {"scale": float(self.scale), "skipped": int(self.skipped), "good_steps": int(self.good)}
        return numbers if self.is_on else {}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        if self.is_on and saved:
            self.scale.fill_(saved["scale"])
            self.skipped.fill_(saved["skipped"])
            self.good.fill_(saved["good_steps"])

    def log(self) -> dict[str, float]:
        """Figures for a line of the log; as `state` it waits for the device."""
        return {"loss_scale": float(self.scale), "skipped_steps": int(self.skipped)} if self.is_on else {}
