"""The training loop: accumulate, clip, step, average, log, save. It knows neither objective nor kind of model.

Everything that happens in step k is a function of the weights before it and of k: batches and noise come from
generators keyed by (seed, step, row). So the state to save is weights, optimizer, averages and k, and nothing else.
"""

import contextlib
import gc
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli import compilation, console, dist, sharding
from ddo_cli.errors import NumericsError, RunError, StoppedError, UsageError
from ddo_cli.precision import allow_tf32, inference_precision, resolved, training_precision
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.stopping import Stopping
from ddo_cli.trainable import Objective, Trainable
from ddo_cli.training import optim
from ddo_cli.training.ema import Averages
from ddo_cli.training.feed import Stream, batches_of
from ddo_cli.training.lr import learning_rate
from ddo_cli.training.meter import Meter
from ddo_cli.training.recompute import recompute_units, units_of
from ddo_cli.training.state import State


class Plan(NamedTuple):
    """What one call of `fit` does."""

    title: str
    steps: int  # length of the schedules
    settings: TrainRecipe
    key: tuple[int | str, ...]  # of every generator, beside purpose, step and row: the seed, the round
    state_file: Path  # what resuming needs
    owner: str  # identifies the run; a saved state of another is refused
    last_good: Callable[[], Path | str]  # the file to fall back on, named when the gradient is not finite
    evaluate_at: frozenset[int] = frozenset()  # steps after which `Evaluate` is yielded
    until: int | None = None  # pause after this step, with what going on needs in `state_file`; None: go to the end


class Stepped(NamedTuple):
    """A step was taken. figures: the line of the log, where one was written."""

    step: int
    figures: dict[str, float] | None


@dataclass
class Evaluate:
    """Averaged weights are due for evaluation; training's state is saved. The caller sets what it measured, and drew.

    After an interruption the last one comes again, since the caller may not have finished with it.
    """

    step: int
    averages: Averages
    figures: dict[str, float] = field(default_factory=dict)
    picture: Path | None = None


class Finished(NamedTuple):
    """The last step, or that of plan.until, is done."""

    step: int
    averages: Averages


Event = Stepped | Evaluate | Finished


def check(model: Trainable, settings: TrainRecipe) -> None:
    """Raises UsageError for settings that this model, or this number of processes, cannot be trained with.

    `fit` would say so as well, but only after what a run does first: references are scored, fake sets drawn.
    """
    local_rows(settings.batch, settings.micro_batch)
    if settings.activation_checkpointing:
        units_of(model)
    if settings.sharding == "fsdp" and not model.shardable:
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


def averaged(events: Iterable[Event], saw: Callable[[Event], None] = lambda event: None) -> dict[str, Tensor]:
    """Trains to the end with nothing to evaluate on the way; returns the averaged weights.

    events: of `fit`. saw: is told of each.
    """
    for event in events:
        saw(event)
    assert isinstance(event, Finished), "the last event"
    return event.averages.whole()


def fit(
    model: Trainable, objective: Objective, stream: Stream, plan: Plan, meter: Meter
) -> Generator[Event, None, None]:
    """Trains `model` in place, step by step, and yields what happens. To be closed where the caller leaves early.

    Continues from plan.state_file where there is one, bit for bit on a CPU; so a pause at plan.until changes nothing,
    and schedules are those of plan.steps.
    Raises NumericsError on a loss or gradient that is not finite, StoppedError after a signal, RunError where
    plan.state_file is of another run.
    """
    settings, device = plan.settings, meter.device
    check(model, settings)
    # FSDP hooks, among others, form reference cycles: collect explicitly, or old models stay in memory. First those of
    # before, since this one's moments and averages are about to be made; at the end this call's own.
    release(device)
    try:
        allow_tf32(resolved(settings.precision, device) == "tf32")  # of backward passes, too
        if settings.compilable and compilation.is_on(settings.compile, device):
            compilation.compile_network(model)
        if settings.activation_checkpointing:
            recompute_units(model)
        if settings.sharding == "fsdp":
            sharding.shard(model, model.units())
        optimizer = optim.build(model, settings)
        stepper = optim.Stepper(optimizer, settings)
        averages = Averages(model, settings)
        state = State(plan.state_file, plan.owner, settings.sharding, model, optimizer, stepper, averages, meter)
        step = state.restore()
        last = plan.steps if plan.until is None else min(plan.until, plan.steps)
        if step > last:
            raise RunError(
                f"{plan.state_file} is of step {step}, after step {last}; remove it, and training starts again"
            )
        if 0 < step < last:
            console.info(f"{plan.title} continues at step {step}")
        meter.trim(step)
        wrapped = model if sharding.is_sharded(model) else dist.wrap(model, device)
        pieces = local_rows(settings.batch, settings.micro_batch)
        if step in plan.evaluate_at:
            yield from _evaluated(Evaluate(step, averages), device)  # a killed process may not have finished it
        wrapped.train(settings.dropout)
        batches = batches_of(
            objective.batch, stream, plan.key, range(step, last), plan.evaluate_at, pieces, settings.batch, device
        )
        shown = console.progress(plan.title, last * settings.batch, "images", step * settings.batch)
        stopping = Stopping()
        with contextlib.closing(batches), contextlib.closing(state), shown as bar, stopping.armed():
            while step < last:
                n_images = (step + 1) * settings.batch
                rate = learning_rate(settings, n_images, plan.steps * settings.batch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                model.before_step()
                for number in range(len(pieces)):
                    batch, is_last = next(batches), number + 1 == len(pieces)
                    with _synchronised(wrapped, is_last), training_precision(settings.precision, device):
                        loss = objective.loss(wrapped, batch)
                    stepper.backward(loss.loss / len(pieces))
                    meter.add({"loss": loss.loss, **loss.log}, 1 / len(pieces))
                norm = stepper.clip()
                failure = stepper.step(norm, step, loss.loss)
                step += 1
                is_logged, is_due = step % settings.log_every == 0 or step == plan.steps, step in plan.evaluate_at
                is_stopping = step < last and stopping.agreed(is_exchange=is_logged)
                is_saved = step % settings.save_every == 0 or is_due or step == last or is_stopping
                if failure is None and (is_logged or is_saved):
                    failure = stepper.settle()
                if failure is not None:
                    # With no finite gradient there is no step to take; weights and saved state are those of before.
                    raise NumericsError(
                        f"{plan.title}: the gradient of step {failure.step} is not finite (loss {failure.loss:.4g}); "
                        f"the last good checkpoint is {plan.last_good()}; lower {settings.prefix}lr = "
                        f"{settings.lr:g} and choose another --out",
                        step=failure.step + 1,
                    )
                averages.update(n_images)
                optimizer.zero_grad(set_to_none=True)  # now: evaluations need the memory
                meter.count(norm.nan_to_num(0.0, 0.0, 0.0))  # of a step left out: 0
                yield Stepped(step, meter.flush(step, n_images, rate, stepper.log()) if is_logged else None)
                bar.advance(settings.batch, f"step {step}/{last}  {meter.text}")
                state.check()
                if is_saved:
                    state.save(step)
                if is_stopping:
                    state.settle()
                    raise StoppedError(
                        f"{plan.title}: stopped by a signal after step {step}, whose state is saved; the same command "
                        "continues there"
                    )
                if is_due:
                    state.settle()
                    with stopping.disarmed():
                        yield from _evaluated(Evaluate(step, averages), device)
                    wrapped.train(settings.dropout)
            state.settle()
        yield Finished(step, averages)
    finally:
        allow_tf32(False)
        release(device)


def _evaluated(evaluation: Evaluate, device: torch.device) -> Iterator[Evaluate]:
    """Yields it, with an empty allocator cache before and after: blocks of training do not fit evaluation batches."""
    release(device)
    with inference_precision("float32", device):  # unless what evaluates it chooses another
        yield evaluation
    release(device)


def release(device: torch.device) -> None:
    """Gives back the memory of objects that nothing but themselves refers to, and of the allocator's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _synchronised(module: nn.Module, is_last: bool) -> Iterator[None]:
    """DDP averages gradients over processes once per step, at its last backward pass.

    FSDP does so in every backward pass: until then each process holds the gradients of all weights whole, and memory is
    what sharding is chosen for. It costs a reduction for each micro-batch.
    """
    if is_last or not isinstance(module, nn.parallel.DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield
