"""The training loop: accumulate, clip, step, average, log, save. It knows neither objective nor model kind.

Everything that happens in step k is a function of the weights before it and of k: batches and noise come from
generators keyed by (seed, step, row). So the state to save is weights, optimizer, average and k, and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist, sharding
from ddo_cli.errors import NumericsError, RunError, UsageError
from ddo_cli.precision import training_precision
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.trainable import Trainable
from ddo_cli.training import optim
from ddo_cli.training.ema import Averages
from ddo_cli.training.lr import learning_rate
from ddo_cli.training.meter import Meter
from ddo_cli.training.recompute import recompute_units, units_of


class Rows(NamedTuple):
    """The rows of one forward pass: positions start..stop - 1 of the global batch of step `step`."""

    step: int
    start: int
    stop: int


class Loss(NamedTuple):
    """Mean loss of some rows, and the means of what is logged beside it."""

    loss: Tensor
    log: dict[str, Tensor]


class Plan(NamedTuple):
    """What one call of `fit` does."""

    title: str
    steps: int
    recipe: TrainRecipe
    loss: Callable[[nn.Module, Rows], Loss]  # mean over the rows; the module is the DDP wrapper under torchrun
    state_file: Path  # what resuming needs
    log_file: Path
    log_tags: dict[str, Any]  # repeated on every line of the log, e.g. the round
    last_good: Callable[[], Path | str]  # what to fall back on when the loss is not finite
    ema_ramp: float | None = None
    evaluate_at: frozenset[int] = frozenset()  # steps after which `evaluate` is called
    evaluate: Callable[[int, dict[str, Tensor]], str] | None = None  # (step, averaged weights) -> short text to show
    keep: Callable[[int, float, dict[str, Tensor]], Any] | None = None  # ditto, of recipe.ema_widths but the first
    check: Callable[[int, dict[str, float]], None] | None = None  # stops the run by raising NumericsError
    settled: Callable[[], bool] = lambda: False  # asked after each evaluation: whether to stop before `steps`
    until: int | None = None  # pause after this step, with all that going on needs in `state_file`; None: go to the end
    dropout: bool = False  # DDO needs it off: with it, r is not 0 for equal weights
    owner: str = ""  # identifies the run; a saved state of another is refused
    derived: Callable[[dict[str, float]], dict[str, float]] = dict  # a line's figures, of the means of what is logged
    wants_averages: bool = True  # False: `fit` returns nothing, and spares each process the whole weights


def check(model: Trainable, recipe: TrainRecipe) -> None:
    """Raises UsageError for settings that this model, or this number of processes, cannot be trained with.

    `fit` would say so as well, but only after what a run does first: references are scored, fake sets drawn.
    """
    local_rows(recipe.batch, recipe.micro_batch)
    if recipe.activation_checkpointing:
        units_of(model)
    if recipe.sharding == "fsdp" and not model.shardable:
        raise UsageError("sharding = fsdp is for models that pretrain and finetune-ddo train; use ddp")


def local_rows(batch: int, micro_batch: int | None) -> list[tuple[int, int]]:
    """(start, stop) of each forward pass of this process: a contiguous share of the global batch, cut in equal pieces.

    Raises UsageError if the batch cannot be shared evenly, since DDP averages processes with equal weight.
    """
    world = dist.world_size()
    if batch % world:
        raise UsageError(f"batch = {batch} cannot be shared by {world} processes; use a multiple of {world}")
    share = batch // world
    micro = min(micro_batch or share, share)
    if share % micro:
        raise UsageError(f"micro_batch = {micro} does not divide the {share} images of one process; use a divisor")
    first = dist.rank() * share
    return [(start, start + micro) for start in range(first, first + share, micro)]


def fit(model: Trainable, plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """Trains `model` in place for plan.steps steps, or until plan.settled, and returns the averaged weights.

    Continues from plan.state_file where there is one, bit for bit on a CPU; so a pause at plan.until changes nothing,
    and schedules are those of plan.steps.
    Raises NumericsError on a loss or gradient that is not finite, RunError where plan.state_file is of another run.
    """
    # FSDP's hooks, among others, tie a model and its optimizer into cycles of references, which by itself the collector
    # visits when it has seen enough of Python's objects, however many gigabytes they hold. First the models of before,
    # since this one's moments and averages are about to be made; at the end what was this call's alone.
    release(device)
    try:
        return _fit(model, plan, device)
    finally:
        release(device)


def release(device: torch.device) -> None:
    """Gives back the memory of objects that nothing but themselves refers to, and of the allocator's reserve."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _fit(model: Trainable, plan: Plan, device: torch.device) -> dict[str, Tensor]:
    recipe = plan.recipe
    check(model, recipe)
    _arrange(model, recipe)
    optimizer, scale = optim.build(model, recipe), optim.LossScale(recipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    averages = Averages(model, recipe, plan.ema_ramp)
    meter = Meter(plan.log_file, plan.log_tags, recipe.batch, device, plan.derived)
    step = _restore(plan, model, optimizer, scale, averages, meter)
    last = plan.steps if plan.until is None else min(plan.until, plan.steps)
    if step > last:
        raise RunError(f"{plan.state_file} is of step {step}, after step {last}; remove it, and training starts again")
    meter.trim(step)
    wrapped = model if sharding.is_sharded(model) else dist.wrap(model, device)
    _set_mode(wrapped, plan)
    pieces = local_rows(recipe.batch, recipe.micro_batch)
    shown = ""
    if step in plan.evaluate_at and plan.evaluate is not None:
        shown = _evaluate(plan, step, averages, device)  # a killed process may not have finished it
        _set_mode(wrapped, plan)
    with console.progress(plan.title, last * recipe.batch, "images", step * recipe.batch) as bar:
        while step < last and not plan.settled():
            n_images = (step + 1) * recipe.batch
            rate = learning_rate(recipe, n_images, plan.steps * recipe.batch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.before_step()
            for number, (start, stop) in enumerate(pieces):
                with (
                    _synchronised(wrapped, last=number + 1 == len(pieces)),
                    training_precision(recipe.precision, device),
                ):
                    loss = plan.loss(wrapped, Rows(step, start, stop))
                scale.backward(loss.loss / len(pieces))
                meter.add({"loss": loss.loss, **loss.log}, 1 / len(pieces))
            scale.unscale(parameters)
            norm = sharding.clip_grad_norm(parameters, recipe.grad_clip or math.inf)
            is_finite = bool(torch.isfinite(norm))
            if not scale.step(optimizer, is_finite):
                # With no finite gradient there is no step to take; weights and saved state are those of before.
                raise NumericsError(
                    f"{plan.title}: the gradient of step {step} is not finite (loss {loss.loss.item():.4g}); "
                    f"the last good checkpoint is {plan.last_good()}; lower {recipe.prefix}lr = {recipe.lr:g} and "
                    "choose another --out"
                )
            step += 1
            averages.update(model, n_images)
            optimizer.zero_grad(set_to_none=True)  # now: evaluations need the memory
            meter.count(norm if is_finite else torch.zeros_like(norm))
            if step % recipe.log_every == 0 or step == plan.steps:
                record = meter.flush(step, n_images, rate, scale.log())
                if plan.check is not None:
                    plan.check(step, record)
            bar.advance(recipe.batch, f"{meter.text} {shown}")
            due_now = step in plan.evaluate_at and plan.evaluate is not None
            if step % recipe.save_every == 0 or due_now or step == last:
                _save(plan, model, optimizer, scale, averages, meter, step)
            if due_now and plan.evaluate is not None:
                shown = _evaluate(plan, step, averages, device)
                _set_mode(wrapped, plan)
    return sharding.full(averages.first) if plan.wants_averages else {}


def _arrange(model: Trainable, recipe: TrainRecipe) -> None:
    """Recomputed and sharded as the recipe asks."""
    if recipe.activation_checkpointing:
        recompute_units(model)
    if recipe.sharding == "fsdp":
        sharding.shard(model, model.units())


def _evaluate(plan: Plan, step: int, averages: Averages, device: torch.device) -> str:
    assert plan.evaluate is not None, "asked for by evaluate_at"
    # A GPU's allocator keeps blocks cut for the shapes of training, into which the batches of scoring do not fit, nor
    # the other way round: without giving them back, each takes its memory beside the other's.
    release(device)
    if plan.keep is not None:
        for width, tensors in averages.further:
            plan.keep(step, width, sharding.full(tensors))
    shown = plan.evaluate(step, sharding.full(averages.first))
    release(device)
    return shown


def _set_mode(module: nn.Module, plan: Plan) -> None:
    module.train(plan.dropout)


@contextlib.contextmanager
def _synchronised(module: nn.Module, last: bool) -> Iterator[None]:
    """DDP averages gradients over processes once per step, at its last backward pass.

    FSDP does so in every backward pass: until then each process holds the gradients of all weights whole, and memory is
    what sharding is chosen for. It costs a reduction for each micro-batch.
    """
    if last or not isinstance(module, nn.parallel.DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield


# ---------------------------------------------------------------------------------------------------------------------
# Saving and resuming


def _save(
    plan: Plan,
    model: Trainable,
    optimizer: torch.optim.Adam,
    scale: optim.LossScale,
    averages: Averages,
    meter: Meter,
    step: int,
) -> None:
    rest = {f"meter.{name}": tensor for name, tensor in meter.state().items()}
    header = {"kind": "train-state", "step": step, "metered_steps": meter.steps, "owner": plan.owner}
    header |= {"loss_scale": scale.state()}
    tensors = _lasting(model, optimizer, averages)
    if plan.recipe.sharding == "fsdp":
        sharding.save(state_directory(plan.state_file), step, tensors, rest, header)
    elif dist.is_main():
        checkpoint.save(plan.state_file, {**tensors, **rest}, header)
    dist.barrier()


def state_directory(state_file: Path) -> Path:
    """Where the state lies that takes the place of `state_file` when weights are sharded."""
    return state_file.with_suffix("")


def drop_state(state_file: Path) -> None:
    """Removes what resuming needs, in either form."""
    state_file.unlink(missing_ok=True)
    shutil.rmtree(state_directory(state_file), ignore_errors=True)


def _lasting(model: Trainable, optimizer: torch.optim.Adam, averages: Averages) -> dict[str, Tensor]:
    """The tensors that a step changes, themselves, and not copies: "model.<name>", "ema.<name>", "adam.<number>.<key>".

    Also before the first step, since `optim.build` makes Adam's moments.
    """
    moments = optimizer.state_dict()["state"]
    return {
        **{f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        **averages.tensors(),
        **{f"adam.{number}.{key}": tensor for number, of_one in moments.items() for key, tensor in of_one.items()},
    }


def _restore(
    plan: Plan,
    model: Trainable,
    optimizer: torch.optim.Adam,
    scale: optim.LossScale,
    averages: Averages,
    meter: Meter,
) -> int:
    dist.barrier()
    if plan.recipe.sharding == "fsdp":
        place = sharding.newest(state_directory(plan.state_file))
        file = place and place / sharding.REST
    else:
        place, file = None, plan.state_file if dist.from_main(plan.state_file.is_file()) else None
    if file is None:
        return 0
    saved = _read_state(file, plan.owner)
    own = _lasting(model, optimizer, averages)
    if place is not None:
        sharding.load(place, own)
    else:
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved.tensors[name])
    scale.restore(saved.header.get("loss_scale", {}))
    sums = {name.removeprefix("meter."): t for name, t in saved.tensors.items() if name.startswith("meter.")}
    meter.restore(sums, saved.header["metered_steps"])
    return int(saved.header["step"])


def _read_state(file: Path, owner: str) -> checkpoint.Checkpoint:
    """What the main process found, as every process reads it. Raises RunError, on all of them alike.

    Without a common directory others would find nothing there, or the state of another step. They would begin at that
    step, and wait in sums that the main process does not take part in.
    """
    is_there = dist.is_main() or file.is_file()
    saved = checkpoint.load(file, kind="train-state") if is_there else None
    found = dist.gathered(saved and (saved.header["step"], saved.header["owner"]))
    step, its_owner = found[0] or (None, None)
    if its_owner != owner:
        raise RunError(f"{file} belongs to another run; remove it or choose another --out")
    for rank, one in enumerate(found):
        if one != found[0]:
            other = f"of step {one[0]}" if one else "missing"
            raise RunError(
                f"{file} is of step {step} for the main process and {other} for process {rank}; --out must be a "
                "directory that all processes share"
            )
    assert saved is not None, "as for the main process"
    return saved
