"""What a training run will take: memory of each process, disk, hours. Printed before it starts; nothing is computed.

Memory is that of torch's tensors: the weights and what goes with them, counted, and the training step and the
scoring pass, run on tensors without content (`training.memory`). A GPU adds about a gigabyte for its context and the
workspaces of kernels; a CPU the pages that its allocator keeps, a tenth or two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli import dist
from ddo_cli.data.items import ItemSet
from ddo_cli.engines import ddo_sweep
from ddo_cli.engines.scoring import Scoring
from ddo_cli.likelihood import LikelihoodModel, map_draw, repeat_draw
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import ddo_loss
from ddo_cli.rng import RowRng
from ddo_cli.schema import FinetuneRecipe, Recipe, SamplingRecipe, TrainRecipe
from ddo_cli.training import loop, memory
from ddo_cli.training.recompute import recompute_units

# Share of the speed of a large matrix product that whole passes reach, chosen by us and not calibrated: small layers,
# convolutions and what is not a product run below it. benchmarks/bench_memory.py measures it.
EFFICIENCY = {"cpu": 0.6, "cuda": 0.4}
MOMENTS = 2  # of Adam, per weight
GIB, HOUR = 2**30, 3600

ItemType = tuple[tuple[int, ...], torch.dtype]  # shape of one item as it lies on disk, and its type


class Work(NamedTuple):
    """How often a run does what; images over all processes."""

    steps: int  # of training
    scored: int  # images drawn for scores
    fake: int  # images drawn for fake sets
    stored: int  # weight files that stay on disk


class Passes(NamedTuple):
    """A traced model: its sizes, one micro-batch of training, and one batch of sampling."""

    weights: int
    trainable: int
    state: int  # of its state dict: what a file holds, and an average
    units: tuple[int, ...]  # trainable bytes of each unit
    reference: int
    step: memory.Cost
    sampling: memory.Cost  # forward pass and decoding
    rows: int  # of that batch
    per_sample: int  # forward passes


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
    try:
        with torch.random.fork_rng(devices=[]):
            found = _traced(config, settings, spec, items, device, draw)
    except Exception as error:  # a user's network may do anything; the run itself is not at stake
        reason = str(error).strip().split("\n")[0]
        return {"not_estimated": f"{config['name']} does not run without data: {type(error).__name__}: {reason}"[:300]}
    pieces = len(loop.local_rows(settings.batch, settings.micro_batch))
    speed = {kind: matmul_speed(device, kind) * EFFICIENCY[device.type] for kind in {settings.precision, "float32"}}
    item_size = _numel(items[-1][0]) * torch.empty((), dtype=items[-1][1]).element_size()
    step = pieces * found.step.flops / speed[settings.precision]
    image = found.per_sample * found.sampling.flops / found.rows / speed["float32"] / dist.world_size()
    seconds = {
        "step": step,
        "training": work.steps * step,
        "fake_sets": work.fake * image,
        "scores": work.scored * image,
    }
    seconds["total"] = sum(value for key, value in seconds.items() if key != "step")
    averages = max(len(settings.ema_widths), 1)
    disk = {
        "fake_sets": work.fake * item_size,
        "checkpoints": work.stored * found.state,
        "train_state": found.state * (1 + averages) + MOMENTS * found.trainable,
    }
    return {
        "processes": dist.world_size(),
        "sharding": settings.sharding if dist.world_size() > 1 else "none",
        "bytes": _bytes(found, settings, averages, device),
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "flops": {"step": pieces * found.step.flops, "image": found.per_sample * found.sampling.flops // found.rows},
        "passes_per_image": found.per_sample,
        "flops_per_second": speed,
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
    shown = ("weights", "moments", "averages", "reference", "evaluation_copy", "gradients", "activations")
    parts = ", ".join(f"{key.replace('_', ' ')} {_gib(amount[key])}" for key in shown if amount[key])
    drawn = seconds["fake_sets"] + seconds["scores"]
    return {
        "memory": f"{_gib(amount['peak'])} GiB per process, at most in {amount['peak_in']} ({parts})",
        "disk": f"{_gib(disk['total'])} GiB (fake sets {_gib(disk['fake_sets'])}, weights {_gib(disk['checkpoints'])})",
        "time": f"{_hours(seconds['total'])} ({_hours(seconds['training'])} of training, {seconds['step']:.3g} s a "
        f"step; {_hours(drawn)} of drawing images; metrics not counted)",
    }


def summary(estimate: dict[str, Any]) -> str:
    """One line for the start of a run."""
    return "estimate: " + "; ".join(described(estimate).values())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def _traced(
    config: dict[str, Any],
    settings: TrainRecipe,
    spec: SamplingRecipe,
    items: Sequence[ItemType],
    device: torch.device,
    draw: dict[str, Any] | None,
) -> Passes:
    micro = min(settings.micro_batch or settings.batch, -(-settings.batch // dist.world_size()))
    pieces = len(loop.local_rows(settings.batch, settings.micro_batch))
    rows = spec.batch
    images = torch.uint8 if len(config["shape"]) == 3 else torch.float32
    with torch.device("meta"):
        model = registry.build(config, draw)
        ref = registry.build(config, draw)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    per_sample = model.passes(spec)
    halves = [model.draw(n, RowRng.for_rows("estimate", rows=range(n))) for n in (micro, rows)]
    if settings.recompute:
        recompute_units(model)
    with memory.imagined():
        for one in (model, ref):
            memory.without_content(one, device)
        ref.requires_grad_(False)
        kept = _keep_bf16(ref, trained) if getattr(settings, "reference_precision", "float32") == "bf16" else 0
        model.train(not isinstance(settings, FinetuneRecipe))
        if settings.sharding == "fsdp" and dist.world_size() > 1:  # gradients are counted by hand: see _bytes
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(_forget)
        drawn, sampled = (map_draw(lambda tensor: _empty(tensor.shape, tensor.dtype, device), half) for half in halves)

        one_x = model.encode(_empty((1, *model.shape), images, device))

        def train() -> None:
            for _ in range(min(pieces, 2)):  # the second one has gradients beside it
                with loop.autocast(device, settings.precision):
                    loss = _loss(model, ref, items, one_x, drawn, micro, settings)
                loss.backward()

        def sample() -> None:
            with torch.no_grad():
                x = _empty((rows, *one_x.shape[1:]), one_x.dtype, device)
                model.predict(x, _empty((rows,), torch.int64, device), sampled)
                model.decode(x)

        training = memory.cost(train, model, ref)
        training = training._replace(flops=training.flops // min(pieces, 2))
        for parameter in model.parameters():
            parameter.grad = None
        sampling = memory.cost(sample, model, ref)
        own = [p for p in model.parameters() if p.requires_grad]
        weights = memory.size(*model.parameters(), *model.buffers())
        return Passes(
            weights=weights,
            trainable=memory.size(*own),
            state=memory.size(*model.state_dict().values()),
            units=tuple(memory.size(*(p for p in unit.parameters() if p.requires_grad)) for unit in model.units()),
            reference=(weights - kept) if isinstance(settings, FinetuneRecipe) else 0,
            step=training,
            sampling=sampling,
            rows=rows,
            per_sample=per_sample,
        )


def _loss(
    model: LikelihoodModel,
    ref: LikelihoodModel,
    items: Sequence[ItemType],
    one_x: Tensor,
    draw: Any,
    n: int,
    settings: TrainRecipe,
) -> Tensor:
    """The loss of n real items, and as many fake ones for DDO, with everything that the engines compute."""
    device = draw.drop.device
    x = torch.cat(
        [
            # What is in model space already is not encoded: checks of tokens read them.
            _empty((n, *shape), one_x.dtype, device)
            if shape == model.state_shape != model.shape
            else model.encode(_empty((n, *shape), dtype, device))
            for shape, dtype in items
        ]
    )
    label = _empty((len(x),), torch.int64, device)
    if not isinstance(settings, FinetuneRecipe):
        return -model(x, label, draw).mean()
    both = repeat_draw(draw, 2)
    with torch.no_grad():
        prediction = ref.predict(x, label, both)
    r = model(x, label, both, prediction)
    loss = ddo_loss(r[:n], r[n:], 1.0, 1.0, fake_weight=1 - draw.drop.to(r.dtype)).loss
    ref.log_lik(prediction[:n], x[:n], draw)
    return loss


def _bytes(found: Passes, settings: TrainRecipe, averages: int, device: torch.device) -> dict[str, Any]:
    """What one process holds, and the larger of a step's and a score's peak."""
    world = dist.world_size()
    sharded = settings.sharding == "fsdp" and world > 1
    share = world if sharded else 1
    finetunes = isinstance(settings, FinetuneRecipe)
    lasting = {
        "weights": found.weights // share,
        "moments": MOMENTS * found.trainable // share,
        "averages": averages * found.state // share,
        "reference": found.reference // share,
        "evaluation_copy": found.weights if finetunes else 0,
    }
    gradients = found.trainable // share
    step = found.step.peak
    if sharded:
        # Beside its share a process holds the gathered weights of two units (one computes, the next arrives), what is
        # outside of units in full, and the full gradients of one unit until they are spread.
        largest, outside = max(found.units, default=0), found.trainable - sum(found.units)
        step += gradients + 3 * largest + 2 * outside
    elif world > 1:
        step += gradients  # the buckets that gradients are averaged in
    # Adam's update of all weights at once needs a temporary tensor for each; on a CPU they come one by one.
    optimizer = gradients + (gradients if device.type == "cuda" else 0)
    moments = {"a training step": step, "the optimizer's step": optimizer, "a score": gradients + found.sampling.peak}
    where = max(moments, key=lambda key: moments[key])
    return {
        **lasting,
        "gradients": gradients,
        "activations": found.step.saved,
        "step": step,
        "score": gradients + found.sampling.peak,
        "peak": sum(lasting.values()) + moments[where],
        "peak_in": where,
    }


def _keep_bf16(ref: LikelihoodModel, trained: set[str]) -> int:
    """Weights of the reference in half the bytes; returns what that saves."""
    saved = 0
    for name, parameter in ref.named_parameters():
        if name in trained:
            saved += memory.size(parameter) // 2
    return saved


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def matmul_speed(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product, measured for a fraction of a second."""
    side = 4096 if device.type == "cuda" else 512
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.ones(side, side, dtype=dtype, device=device)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        fastest, spent = float("inf"), 0.0
        while spent < 0.1:
            taken = _timed(lambda: a @ a, device)
            fastest, spent = min(fastest, taken), spent + taken
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * side**3 / fastest


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR:.3g} h" if seconds >= HOUR / 10 else f"{seconds:.3g} s"
