"""What a training run will take: memory of each process, disk, hours. Printed by `--dry-run`.

Memory is that of torch's tensors: the weights and what goes with them, counted, and the training step and the
scoring pass, run on tensors without content (`step_cost`); on a CPU also the program itself. A GPU adds about a
gigabyte for its context and the workspaces of kernels; a CPU the holes between the tensors on its heap, a guess.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ddo_cli import dist
from ddo_cli.data.items import ItemSet
from ddo_cli.engines import sample_cost, step_cost
from ddo_cli.engines.ddo import sweep
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.engines.step_cost import ItemType, Passes, Seconds, Setup
from ddo_cli.generation import decoding_precision
from ddo_cli.models import registry
from ddo_cli.recipe.schema import FinetuneRecipe, Recipe, SamplingRecipe, TrainRecipe

# Share of the speed of a large matrix product that whole passes reach, chosen by us for passes too long to be timed:
# convolutions and what is not a product run below it. benchmarks/bench_memory.py measures it.
EFFICIENCY = {"cpu": 0.6, "cuda": 0.4}
MOMENTS = 2  # of Adam, per weight
GIB, HOUR = 2**30, 3600
# Python, the libraries, and torch's compiler stack, which the optimizer imports: the resident set of a run on a CPU
# before its first weights.
PROGRAM = {"cpu": int(0.65 * GIB), "cuda": 0}
LASTING = ("program", "weights", "moments", "averages", "reference", "evaluation_copy")  # throughout a training
# What is there at once, of the keys of `bytes`, when memory is short. By a promotion training is over.
MOMENTS_OF_A_RUN = {
    "a training step": (*LASTING, "step", "heap"),
    "the optimizer's step": (*LASTING, "optimizer"),
    "the gathering of averages": (*LASTING, "gathered"),
    "a score": (*LASTING, "score"),
    "a promotion": ("program", "reference", "evaluation_copy", "candidate", "score"),
}
# Share of a step's memory that glibc's heap takes beside it: it fills the holes between what lasts badly. Measured on
# steps with a batch of 2: 0.4 for EDM2-S, 0.6 for VAR-d16. MALLOC_MMAP_THRESHOLD_=1048576 avoids it, for more system
# calls (EDM2-S: 1.2 GiB became 0.1).
HOLES = {"cpu": 0.5, "cuda": 0.0}


class Work(NamedTuple):
    """How often a run does what; images over all processes."""

    steps: int  # of training
    scored: int  # images drawn for scores
    fake: int  # images drawn for fake sets
    stored: int  # weight files that stay on disk


def of_finetuning(
    recipe: Recipe, reference: registry.Loaded, plans: Sequence[sweep.Plan], real: ItemSet, scoring: Scoring
) -> dict[str, Any]:
    """The estimate of `finetune-ddo`; memory is that of its first round. scoring: of `plans`, one for each round."""
    settings, model = recipe.finetune, reference.model
    rounds = [settings.of_round(number) for number in range(1, settings.rounds + 1)]
    kept = sample.kept_of_fakes(model, settings.fake_as, scoring.spec)
    fake: ItemType = (model.codec.state_shape, torch.float32)
    if kept != "latents":
        shape = model.codec.latent_shapes[0] if kept == "encoded" else model.codec.shape
        fake = (shape, torch.uint8 if kept == "images" and len(shape) == 3 else torch.float32)
    of_rounds = [sweep.planned(plan.rungs, plan.candidates_at) for plan in plans]
    nodes = [(plan, node) for plan, found in zip(plans, of_rounds, strict=True) for node in found]
    candidates = [sum(len(node["candidates"]) for node in found) for found in of_rounds]
    # The best one's stay, and every candidate of the round that runs.
    stored = sum(candidates) if settings.keep_candidates == "all" else len(rounds) - 1 + max(candidates)
    per_score = (
        0 if scoring.density is not None else recipe.metric.num_images
    )  # densities are of points, which cost little
    scores = settings.rounds * (scoring.repeats - 1) + scoring.repeats + sum(candidates)
    of_rungs = sum(len(node["rungs"]) * plan.images for plan, node in nodes) if per_score else 0
    work = Work(
        steps=sum(node["stopped_at"] for _, node in nodes),
        scored=scores * per_score + of_rungs,
        fake=sum(one.num_fake for one in rounds),
        stored=stored * max(len(settings.ema_widths), 1) + len(rounds) + 1,
    )
    items = [(tuple(real.items.shape[1:]), _type_of(real)), fake]
    config = reference.checkpoint.header["config"]
    return estimate(config, rounds[0], scoring.spec, items, work, device=scoring.device, draw=rounds[0].draw)


def of_pretraining(recipe: Recipe, config: dict[str, Any], real: ItemSet, scoring: Scoring) -> dict[str, Any]:
    """The estimate of `pretrain`."""
    settings = recipe.pretrain
    per_score = 0 if scoring.density is not None else recipe.metric.num_images
    snapshots = 0 if settings.snapshot_every is None else settings.images // settings.snapshot_every
    stored = 1 + snapshots * max(len(settings.ema_widths), 1)
    work = Work(-(-settings.images // settings.batch), scoring.repeats * per_score, 0, stored)
    items = [(tuple(real.items.shape[1:]), _type_of(real))]
    return estimate(config, settings, recipe.sampling, items, work, device=scoring.device)


def _type_of(real: ItemSet) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=real.items.dtype)).dtype


def estimate(
    config: dict[str, Any],
    settings: TrainRecipe,
    spec: SamplingRecipe,
    items: Sequence[ItemType],
    work: Work,
    *,
    device: torch.device,
    draw: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The object `estimate` of a dry run: bytes, seconds and operations; {"not_estimated": reason} where it fails.

    items: of real data; for finetuning, also of the fake set.
    """
    setup = Setup(config, settings, spec, items, device, draw)
    try:
        with _forked(device):
            found = step_cost.traced(setup)
    except Exception as error:  # a user's network may do anything; the run itself is not at stake
        reason = str(error).strip().split("\n")[0]
        return {"not_estimated": f"{config['name']} does not run without data: {type(error).__name__}: {reason}"[:300]}
    speed = _speed(found, setup, work)
    item_size = _numel(items[-1][0]) * torch.empty((), dtype=items[-1][1]).element_size()
    averages = max(len(settings.ema_widths), 1)
    disk = {
        "fake_sets": work.fake * item_size,
        "checkpoints": work.stored * found.state,
        "train_state": found.state + (averages + MOMENTS) * found.trainable,
    }
    return {
        "processes": dist.world_size(),
        "sharding": settings.sharding if dist.world_size() > 1 else "none",
        "bytes": _bytes(found, settings, averages, device),
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "flops": {
            "step": setup.pieces * found.piece.flops,
            "image": (found.per_sample * found.predict.flops + found.decode.flops) // spec.batch,
        },
        "passes_per_image": found.per_sample,
        "flops_per_second": speed.per_second,
        "is_timed": speed.is_timed,
        "seconds": speed.seconds,
    }


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """The result of a dry run with its estimate in the lines that people read."""
    return {**{key: value for key, value in found.items() if key != "estimate"}, **described(found["estimate"])}


def described(estimate: dict[str, Any]) -> dict[str, str]:
    """An estimate in GiB and hours."""
    if "not_estimated" in estimate:
        return {"estimate": f"not estimated: {estimate['not_estimated']}"}
    amount, disk, seconds = estimate["bytes"], estimate["disk_bytes"], estimate["seconds"]
    shown = MOMENTS_OF_A_RUN[amount["peak_in"]]
    if "step" in shown:
        shown = (*LASTING, "gradients", "activations", "heap")
    parts = ", ".join(f"{key.replace('_', ' ')} {_gib(amount[key])}" for key in shown if amount[key])
    if amount["score_of"] != sample_cost.WHOLE:
        parts += f"; a score's is that of {amount['score_of']}"
    drawn = seconds["fake_sets"] + seconds["scores"]
    return {
        "memory": f"{_gib(amount['peak'])} GiB per process, at most in {amount['peak_in']} ({parts})",
        "disk": f"{_gib(disk['total'])} GiB (fake sets {_gib(disk['fake_sets'])}, weights {_gib(disk['checkpoints'])})",
        "time": f"{_hours(seconds['total'])} ({_hours(seconds['training'])} of training, {seconds['step']:.3g} s a "
        f"step, {_known(estimate, 'training')}; {_hours(drawn)} of drawing images, {_known(estimate, 'sampling')}; "
        "metrics not counted)",
    }


def _known(estimate: dict[str, Any], part: str) -> str:
    return "timed" if estimate["is_timed"][part] else "assumed"


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def _bytes(found: Passes, settings: TrainRecipe, averages: int, device: torch.device) -> dict[str, Any]:
    """What one process holds, and the peak of the moment at which that is most."""
    world = dist.world_size()
    sharded = settings.sharding == "fsdp" and world > 1
    share = world if sharded else 1
    finetunes = isinstance(settings, FinetuneRecipe)
    held = {
        "program": PROGRAM[device.type],
        "weights": found.weights // share,
        "moments": MOMENTS * found.trainable // share,
        "averages": averages * found.trainable // share,
        "reference": found.reference // share,
        "evaluation_copy": found.weights if finetunes else 0,
    }
    gradients = found.trainable // share
    step = found.piece.peak
    if sharded:
        # Beside its share a process holds the gathered weights of two units (one computes, the next arrives), what is
        # outside of units in full, and the full gradients of one unit until they are spread.
        largest, outside = max(found.units, default=0), found.trainable - sum(found.units)
        step += gradients + 3 * largest + 2 * outside
    elif world > 1:
        step += gradients  # the buckets that gradients are averaged in
    heap = int(HOLES[device.type] * step)
    # Adam's update of all weights at once needs a temporary tensor for each; on a CPU they come one by one.
    optimizer = gradients + (gradients if device.type == "cuda" else 0)
    held |= {
        "gradients": gradients,
        "activations": found.piece.saved,
        "step": step,
        "heap": heap,
        "optimizer": optimizer,
        # Sharded averages are made whole on every process, to be written and copied into the model that is scored.
        "gathered": found.trainable if sharded else 0,
        "score": max(found.predict.peak, found.sample.peak, found.decode.peak),  # gradients are gone by then
        "candidate": found.weights if finetunes else 0,  # the best one, beside the reference and the evaluation's copy
    }
    peaks = {moment: sum(held[key] for key in keys) for moment, keys in MOMENTS_OF_A_RUN.items()}
    where = max(peaks, key=lambda moment: peaks[moment])
    return {**held, "score_of": found.sample.traced, "peak": peaks[where], "peak_in": where}


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


# ---------------------------------------------------------------------------------------------------------------------
# Time


class _Speed(NamedTuple):
    """How long a run takes, by passes that were timed where they take seconds only."""

    seconds: dict[str, float]  # of each part of the run
    per_second: dict[str, float]  # operations
    is_timed: dict[str, bool]


def _speed(found: Passes, setup: Setup, work: Work) -> _Speed:
    training, sampling = setup.settings.precision, setup.spec.precision or "float32"
    decoding, share = decoding_precision(setup.spec), EFFICIENCY[setup.device.type]
    speed = {kind: share * step_cost.matmul_speed(setup.device, kind) for kind in {training, sampling, decoding}}
    flops = Seconds(found.piece.flops, 0.0, found.predict.flops, found.decode.flops)
    guess = Seconds(flops.piece / speed[training], 0.0, flops.predict / speed[sampling], flops.decode / speed[decoding])
    with _forked(setup.device):
        timed = step_cost.timed(setup, guess)
    passes = guess._replace(**timed)
    step = setup.pieces * passes.piece + passes.update
    image = _image(found, setup.spec, passes) / dist.world_size()
    seconds = {
        "step": step,
        "training": work.steps * step,
        "fake_sets": work.fake * image,
        "scores": work.scored * image,
    }
    seconds["total"] = sum(value for key, value in seconds.items() if key != "step")
    image_flops = _image(found, setup.spec, flops) / dist.world_size()
    return _Speed(
        seconds,
        {"training": setup.pieces * flops.piece / max(step, 1e-9), "sampling": image_flops / max(image, 1e-9)},
        {"training": "piece" in timed, "sampling": "predict" in timed},
    )


def _image(found: Passes, spec: SamplingRecipe, batch: Seconds) -> float:
    """What an image takes where a batch's pass and its decoding take so much."""
    return (found.per_sample * batch.predict + batch.decode) / spec.batch


def _forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Global generators go on from where they were: new networks draw their weights from them."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR:.3g} h" if seconds >= HOUR / 10 else f"{seconds:.3g} s"
