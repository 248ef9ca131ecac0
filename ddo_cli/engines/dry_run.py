"""What a run takes, measured by `--dry-run`: two real training steps and one real batch of samples; and its disk."""

import contextlib
import math
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddo_cli import console, dist
from ddo_cli.data.items import ItemSet
from ddo_cli.data.pairs import Shuffled, compared
from ddo_cli.engines.ddo import auto, reference, sweep
from ddo_cli.engines.ddo.round import ddo_task
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import UsageError, reason
from ddo_cli.generation import encoded
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel
from ddo_cli.models import adapters, registry
from ddo_cli.recipe.schema import Recipe, SamplingRecipe, TrainRecipe
from ddo_cli.rng import RowRng
from ddo_cli.trainable import Objective, Trainable, map_tensors
from ddo_cli.training import loop
from ddo_cli.training.feed import Stream
from ddo_cli.training.meter import Meter

CONTROL_STEP = 3 / 8  # of a step of DDO: no fakes and no reference. In rows: 3 n against 6 n + 2 n; backward counts two
STEPS = 2  # the first one warms up, the second one is timed
GIB, HOUR = 2**30, 3600


class Work(NamedTuple):
    """How often a run does what; images over all processes."""

    steps: int  # of training
    scored: int  # images drawn for scores
    fake: int  # images drawn for fake sets
    stored: int  # weight files that stay on disk


@torch.no_grad()
def try_network(model: LikelihoodModel, real: ItemSet, device: torch.device) -> None:
    """Calls a network of one's own once with labels, where it has classes, and once without: -1.

    Raises UsageError where it fails, or returns another shape than x; of one with classes a call without only warns.
    """
    rows = np.arange(min(2, len(real.items)))
    x = encoded(model, real.items, rows, "try", device=device).to(device)
    rng = RowRng.for_rows("try", rows=range(len(rows)))
    draw = map_tensors(lambda tensor: tensor.to(device), model.draw(len(rows), rng))
    for value in (0, NO_LABEL) if model.num_classes else (NO_LABEL,):
        problem = ""
        try:
            shape = model.predict(x, torch.full((len(rows),), value, device=device), draw).shape
            if not model.codec.is_discrete and shape != x.shape:
                problem = f"returns {tuple(shape)} for images {tuple(x.shape)}"
        except Exception as error:  # whatever the user's code raises
            problem = f"fails ({type(error).__name__}: {reason(error)})"
        if problem and model.num_classes and value == NO_LABEL:
            console.warn(f"the network {problem} on label -1, none; label_dropout, cfg_scale, unlabelled data need it")
        elif problem:
            raise UsageError(f"the network {problem} on label {value}; mend it in the file given as --model-file")


def of_finetuning(
    recipe: Recipe,
    loaded: registry.Loaded,
    plans: Sequence[sweep.Plan],
    real: ItemSet,
    rejected: ItemSet | None,
    scoring: Scoring,
) -> dict[str, Any]:
    """Measures `finetune-ddo`: two steps of its first round, whose fakes are the batch of samples. rejected: of dpo."""
    settings, device = recipe.of_round(1).finetune, scoring.device
    fresh = reference.copies_of(loaded, settings.draw)
    model = fresh() if adapters.is_in(loaded.model) else loaded.model
    keep = sample.kept_of_fakes(model, settings.fake_as, scoring.spec)
    with _measured(device) as figures:
        ref = reference.frozen(fresh(), settings, device)
        scratch = fresh()  # holds averages while they are scored
        fake, figures["images_per_second"] = _one_batch(scratch, scoring.spec, keep, device)
        other = None if rejected is None else (rejected.items, rejected.labels)
        like = settings.objective
        if settings.num_drawn:  # paired as for ddo: a few samples may lack a class
            other, like = (fake, np.resize(real.labels, len(fake))), "ddo"
        images = Shuffled(real.items, real.labels, "real", recipe.seed)
        rows = compared(like, images, other, model.num_classes, recipe.seed)
        setting = plans[0].settings[0]
        if plans[0].is_auto:
            setting = setting._replace(beta=1.0)  # a step takes as long with any
        objective = ddo_task(ref, rows, settings, None).objective(model, setting)
        figures["seconds_per_step"] = two_steps(model, objective, rows, settings, (recipe.seed, 1), device)
    work = _work_of_rounds(recipe, plans, scoring)
    of_reference = 0 if scoring.density is not None else 2 * scoring.images
    control = None
    if settings.control:
        control = _work_of_rounds(recipe, [plan.of_control() for plan in plans], scoring)._replace(fake=0)
    work = work._replace(scored=work.scored + of_reference)
    return _summary(figures, work, settings, model, fake[:1].nbytes, control)


def of_pretraining(
    recipe: Recipe,
    model: Trainable,
    objective: Objective,
    stream: Stream,
    device: torch.device,
    sampled: LikelihoodModel | None = None,
    scored: int = 0,
) -> dict[str, Any]:
    """Measures `pretrain`: two of its steps, and a batch of samples, of which a run draws `scored` for its scores."""
    settings = recipe.pretrain
    with _measured(device) as figures:
        if sampled is not None:
            _, figures["images_per_second"] = _one_batch(sampled, recipe.sampling, "images", device)
        figures["seconds_per_step"] = two_steps(model, objective, stream, settings, (recipe.seed,), device)
    snapshots = settings.images // settings.snapshot_every if settings.snapshot_every else 0
    stored = 1 + snapshots * max(len(settings.ema_widths), 1)
    return _summary(figures, Work(-(-settings.images // settings.batch), scored, 0, stored), settings, model, 0)


def _work_of_rounds(recipe: Recipe, plans: Sequence[sweep.Plan], scoring: Scoring) -> Work:
    """Of a chain of rounds that are all promoted: so many candidates are scored once, and the best on further seeds."""
    settings = recipe.finetune
    rounds = [sweep.planned(plan.rungs, plan.candidates_at) for plan in plans]
    candidates = [sum(len(node["candidates"]) for node in nodes) for nodes in rounds]
    # The best one's stay, and every candidate of the round that runs.
    stored = sum(candidates) if settings.keep_candidates == "all" else len(rounds) - 1 + max(candidates)
    scores = settings.rounds * 2 * scoring.repeats + sum(candidates)
    at_rungs = sum(
        len(node["rungs"]) * plan.images for plan, nodes in zip(plans, rounds, strict=True) for node in nodes
    )
    searching = [plan for plan in plans if plan.is_auto]  # each for as long as it may take, one training counted above
    at_rungs += auto.MOST_SHORT * sum(plan.images for plan in searching)
    more = (auto.MOST_WHOLE - 1) * sum(len(plan.candidates_at) for plan in searching)
    scores, stored = scores + more, stored + more * (settings.keep_candidates == "all")
    searched = sum((auto.MOST_SHORT - 1) * plan.short + (auto.MOST_WHOLE - 1) * plan.steps for plan in searching)
    per_score = recipe.metric.num_images
    return Work(
        steps=sum(node["stopped_at"] for nodes in rounds for node in nodes) + searched,
        scored=0 if scoring.density is not None else scores * per_score + at_rungs,  # densities are of points
        fake=sum(settings.of_round(number).num_drawn for number in range(1, settings.rounds + 1)),
        stored=stored * max(len(settings.ema_widths), 1) + len(rounds) + 1,
    )


def two_steps(
    model: Trainable,
    objective: Objective,
    stream: Stream,
    settings: TrainRecipe,
    key: tuple[int | str, ...],
    device: torch.device,
) -> float:
    """Seconds of a training step, the second of two real ones. Nothing is written; the model is trained."""
    nowhere = Path("dry-run-without-a-state")  # never saved: the loop is left before it would be
    quiet = settings.model_copy(update={"log_every": 10**9, "save_every": 10**9})
    plan = loop.Plan("dry run: training", STEPS + 1, quiet, key, nowhere, "dry run", lambda: "none yet")
    ends = [time.perf_counter()]
    with contextlib.closing(
        loop.fit(model, objective, stream, plan, Meter(nowhere, {}, settings.batch, device))
    ) as events:
        for _ in events:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the loop itself does not wait for a step's end
            ends.append(time.perf_counter())
            if len(ends) > STEPS:
                break
    return ends[-1] - ends[-2]


def _one_batch(
    model: LikelihoodModel, spec: SamplingRecipe, keep: sample.Keep, device: torch.device
) -> tuple[np.ndarray, float]:
    """A batch of samples as a fake set keeps them, and how many of them all processes draw in a second."""
    console.info(f"dry run: drawing a batch of {spec.batch}")
    start = time.perf_counter()
    (batch,) = sample.drawn(model, range(spec.batch), spec, keep, device)
    return batch.items.numpy(), dist.world_size() * spec.batch / (time.perf_counter() - start)


@contextlib.contextmanager
def _measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """Figures that the block fills in, and at its end the peak of memory.

    Raises UsageError where the GPU's memory is too small.
    """
    figures: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield figures
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UsageError(
            f"the run does not fit into the memory of {_name(device)} ({reason}); lower micro_batch or sampling.batch, "
            "or set activation_checkpointing = true"
        ) from None
    if device.type == "cuda":
        figures["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        figures["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB  # what the card has to hold
    else:
        figures["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB
    figures["device"] = _name(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def _summary(
    figures: dict[str, Any],
    work: Work,
    settings: TrainRecipe,
    model: Trainable,
    item_bytes: int,
    control: Work | None = None,
) -> dict[str, Any]:
    """What `--dry-run` adds to the plan: `measured` (hours without the metrics themselves) and `disk_gib`.

    control: what is done beside `work`; its steps are counted by their rows, not measured.
    """
    speed = figures.get("images_per_second", math.inf)
    training = work.steps * figures["seconds_per_step"] / HOUR
    sampling = (work.fake + work.scored) / speed / HOUR
    hours = {"training": training, "sampling": sampling}
    if control is not None:
        seconds = control.steps * CONTROL_STEP * figures["seconds_per_step"] + control.scored / speed
        hours["control"] = seconds / HOUR
    hours["total"] = sum(hours.values())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    disk = {
        "fake_sets": work.fake * item_bytes / GIB,
        "weights": (work.stored + (control.stored if control else 0)) * weights / GIB,
        # Averages, and Adam's two moments; the state saved before stays.
        "train_state": 2 * (weights + (max(len(settings.ema_widths), 1) + 2) * trained) / GIB,
    }
    measured = {"processes": dist.world_size(), **figures, "hours": hours}
    return {"measured": measured, "disk_gib": {**disk, "total": sum(disk.values())}}
