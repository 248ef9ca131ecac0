"""What a training run will take: memory of each process, disk, hours. Printed before it starts.

Memory is that of torch's tensors: the weights and what goes with them, counted, and the training step and the
scoring pass, run on tensors without content (`step_cost`); on a CPU also the program itself. A GPU adds about a
gigabyte for its context and the workspaces of kernels; a CPU the holes between the tensors on its heap, a tenth or two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ddo_cli import dist
from ddo_cli.data.items import ItemSet
from ddo_cli.engines import ddo_sweep, step_cost
from ddo_cli.engines.scoring import Scoring
from ddo_cli.engines.step_cost import ItemType, Passes, Seconds, Setup
from ddo_cli.models import registry
from ddo_cli.schema import FinetuneRecipe, Recipe, SamplingRecipe, TrainRecipe

# Share of the speed of a large matrix product that whole passes reach, chosen by us for passes too long to be timed:
# convolutions and what is not a product run below it. benchmarks/bench_memory.py measures it.
EFFICIENCY = {"cpu": 0.6, "cuda": 0.4}
MOMENTS = 2  # of Adam, per weight
GIB, HOUR = 2**30, 3600
# Python, the libraries, and torch's compiler stack, which the optimizer imports: the resident set of a run on a CPU
# before its first weights.
PROGRAM = {"cpu": int(0.65 * GIB), "cuda": 0}


class Work(NamedTuple):
    """How often a run does what; images over all processes."""

    steps: int  # of training
    scored: int  # images drawn for scores
    fake: int  # images drawn for fake sets
    stored: int  # weight files that stay on disk


def of_finetuning(
    recipe: Recipe, reference: registry.Loaded, plans: Sequence[ddo_sweep.Plan], real: ItemSet, scoring: Scoring
) -> dict[str, Any]:
    """The estimate of `finetune-ddo`; memory is that of its first round. scoring: of `plans`, one for each round."""
    settings, model = recipe.finetune, reference.model
    rounds = [settings.of_round(number) for number in range(1, settings.rounds + 1)]
    is_latent = (settings.fake_as or model.fake_as) == "latents"
    fake = (
        (model.state_shape, torch.float32)
        if is_latent
        else (model.shape, torch.uint8 if len(model.shape) == 3 else torch.float32)
    )
    nodes = [(plan, node) for plan in plans for node in ddo_sweep.planned(plan.rungs, plan.candidates_at)]
    per_score = (
        0 if scoring.density is not None else recipe.metric.num_images
    )  # densities are of points, which cost little
    scores = settings.rounds * (scoring.repeats - 1) + scoring.repeats + sum(len(n["candidates"]) for _, n in nodes)
    of_rungs = sum(len(node["rungs"]) * plan.images for plan, node in nodes) if per_score else 0
    work = Work(
        steps=sum(node["stopped_at"] for _, node in nodes),
        scored=scores * per_score + of_rungs,
        fake=sum(one.num_fake for one in rounds),
        stored=sum(len(node["candidates"]) for _, node in nodes) * max(len(settings.ema_widths), 1) + len(rounds) + 1,
    )
    items = [(tuple(real.items.shape[1:]), _type_of(real)), fake]
    config = reference.checkpoint.header["config"]
    return estimate(config, rounds[0], scoring.spec, items, work, device=scoring.device, draw=rounds[0].draw)


def of_pretraining(recipe: Recipe, config: dict[str, Any], real: ItemSet, scoring: Scoring) -> dict[str, Any]:
    """The estimate of `pretrain`."""
    settings = recipe.pretrain
    per_score = 0 if scoring.density is not None else recipe.metric.num_images
    stored = 1 if settings.snapshot_every is None else 1 + settings.images // settings.snapshot_every
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
    speed, seconds, is_timed = _seconds(found, setup, work)
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
        "flops": {"step": setup.pieces * found.piece.flops, "image": _image(found, spec, *_flops(found))},
        "passes_per_image": found.per_sample,
        "flops_per_second": speed,
        "is_timed": is_timed,
        "seconds": seconds,
    }


def shown(found: dict[str, Any]) -> dict[str, Any]:
    """The result of a dry run with its estimate in the lines that people read."""
    return {**{key: value for key, value in found.items() if key != "estimate"}, **described(found["estimate"])}


def described(estimate: dict[str, Any]) -> dict[str, str]:
    """An estimate in GiB and hours."""
    if "not_estimated" in estimate:
        return {"estimate": f"not estimated: {estimate['not_estimated']}"}
    amount, disk, seconds = estimate["bytes"], estimate["disk_bytes"], estimate["seconds"]
    shown = ("program", "weights", "moments", "averages", "reference", "evaluation_copy", "gradients", "activations")
    parts = ", ".join(f"{key.replace('_', ' ')} {_gib(amount[key])}" for key in shown if amount[key])
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


def summary(estimate: dict[str, Any]) -> str:
    """One line for the start of a run."""
    return "estimate: " + "; ".join(described(estimate).values())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def _bytes(found: Passes, settings: TrainRecipe, averages: int, device: torch.device) -> dict[str, Any]:
    """What one process holds, and the larger of a step's and a score's peak."""
    world = dist.world_size()
    sharded = settings.sharding == "fsdp" and world > 1
    share = world if sharded else 1
    finetunes = isinstance(settings, FinetuneRecipe)
    lasting = {
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
    # Adam's update of all weights at once needs a temporary tensor for each; on a CPU they come one by one.
    optimizer = gradients + (gradients if device.type == "cuda" else 0)
    score = gradients + max(found.predict.peak, found.decode.peak)
    moments = {"a training step": step, "the optimizer's step": optimizer, "a score": score}
    where = max(moments, key=lambda key: moments[key])
    return {
        **lasting,
        "gradients": gradients,
        "activations": found.piece.saved,
        "step": step,
        "score": score,
        "peak": sum(lasting.values()) + moments[where],
        "peak_in": where,
    }


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def _seconds(
    found: Passes, setup: Setup, work: Work
) -> tuple[dict[str, float], dict[str, float], dict[str, bool]]:
    """Operations per second of training and of sampling, seconds of each part of the run, and which speed was timed.

    Passes that can be timed in seconds are; for others the speed of a matrix product and a share of it are taken.
    """
    device, spec = setup.device, setup.spec
    training, sampling = setup.settings.precision, spec.precision or "float32"
    share = EFFICIENCY[device.type]
    product = {kind: share * step_cost.matmul_speed(device, kind) for kind in {training, sampling}}
    predict, decode = _flops(found)
    guess = Seconds(
        found.piece.flops / product[training], 0.0, predict / product[sampling], decode / product[sampling]
    )
    with _forked(device):
        timed = step_cost.timed(setup, guess)
    passes = Seconds(*(at_hand if one is None else one for one, at_hand in zip(timed, guess, strict=True)))
    step = setup.pieces * passes.piece + passes.update
    image = _image(found, spec, passes.predict, passes.decode) / dist.world_size()
    seconds = {
        "step": step,
        "training": work.steps * step,
        "fake_sets": work.fake * image,
        "scores": work.scored * image,
    }
    seconds["total"] = sum(value for key, value in seconds.items() if key != "step")
    speed = {"training": found.piece.flops / passes.piece, "sampling": (predict + decode) / (passes.predict + passes.decode)}
    return speed, seconds, {"training": timed.piece is not None, "sampling": timed.predict is not None}


def _image(found: Passes, spec: SamplingRecipe, predict: float, decode: float) -> float:
    """What an image takes where a batch's pass and its decoding take so much."""
    return (found.per_sample * predict + decode) / spec.batch


def _flops(found: Passes) -> tuple[int, int]:
    return found.predict.flops, found.decode.flops


def _forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Global generators go on from where they were: new networks draw their weights from them."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR:.3g} h" if seconds >= HOUR / 10 else f"{seconds:.3g} s"
