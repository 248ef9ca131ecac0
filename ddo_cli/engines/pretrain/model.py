"""`ddo pretrain`: maximum likelihood of any registered model, to make references where no checkpoint exists."""

import contextlib
import itertools
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddo_cli import checkpoint, console, dist, rundir, sharding
from ddo_cli.data.images import open_images
from ddo_cli.data.items import check_enough, check_fits, named_classes
from ddo_cli.data.items import identity as identity_of
from ddo_cli.data.pairs import Shuffled
from ddo_cli.engines import captions, training_run
from ddo_cli.engines import dry_run as dry_runs
from ddo_cli.engines.pretrain import tokenizer as pretrain_tokenizer
from ddo_cli.engines.pretrain.page import page
from ddo_cli.engines.scoring import Scoring
from ddo_cli.engines.watch import Watch
from ddo_cli.errors import UsageError, reason
from ddo_cli.files import write_json
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.models.var import tokenizers
from ddo_cli.objectives.likelihood import LikelihoodBatch, likelihood_step
from ddo_cli.recipe.schema import PretrainRecipe, Recipe
from ddo_cli.rng import StepRng, seed_from
from ddo_cli.trainable import Objective
from ddo_cli.training import loop
from ddo_cli.training.ema import snapshot_name


def run(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    dry_run: bool = False,
    measure: bool = True,
    log_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains recipe.model on recipe.data and returns the object that `pretrain --json` prints.

    The same call on an unfinished run continues it; on a finished one it returns the stored result.
    """
    settings = recipe.pretrain
    if recipe.model.name in tokenizers.BUILTIN:
        return pretrain_tokenizer.run(recipe, out, device=device, dry_run=dry_run, measure=measure, log_to=log_to)
    registry.load_file(recipe.model.file)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache)
    reads_text = registry.reads_text(recipe.model.name)
    num_classes = 0 if real.captions else real.num_classes  # captions are no classes, see `check_fits`
    config = registry.config_of(recipe.model.name, real.shape, num_classes, recipe.model.options, recipe.model.draw)
    steps = training_run.num_steps(settings.images, settings.batch)
    _check_memory(config)
    torch.manual_seed(seed_from("init", recipe.seed))  # weights are the only thing drawn from the global generator
    model = registry.build(config).to(device)
    if reads_text:
        config = registry.tell(model, config, captions.of(real))
        captions.remember(real)
    check_fits(real, model, recipe.data.hflip)
    check_enough(real.name, len(real.items), settings.batch, "pretrain.batch")
    loop.check(model, settings)
    snapshot_steps(settings, steps)
    model.check_sampling(recipe.sampling)
    scoring = Scoring(recipe, real, recipe.sampling, device, reads_text)
    parameters = sum(p.numel() for p in model.parameters())
    precision = training_run.precision_of(settings, recipe.sampling, device)
    identity = {**identity_of(real), **scoring.identity, **precision}
    rundir.RunDir(out).check("pretrain", recipe, **identity)
    stream = Shuffled(real.items, real.labels, "pretrain", recipe.seed, hflip=recipe.data.hflip)
    objective = likelihood_objective(model)
    if dry_run:
        plan = {
            "out": str(out), "dry_run": True, "model": config["name"], "parameters": parameters,
            "images": steps * settings.batch, "steps": steps, "batch": settings.batch, "data": real.name,
        }  # fmt: skip
        if recipe.model.file is not None:
            dry_runs.try_network(model, real, device)
        if measure:
            model.start_training()
            plan |= dry_runs.of_pretraining(recipe, model, objective, stream, device, model, scoring.images)
        return plan
    model.start_training()
    with training_run.claimed("pretrain", recipe, out, identity, model, device) as (run_dir, state):
        if not run_dir.is_finished(state):
            console.info(f"pretrain {config['name']}: {steps:,} steps of {settings.batch} images")
            told = recipe.told("data", "model", "pretrain")
            link = {"command": "pretrain", "recipe": told, "steps": steps, **named_classes(real)}
            sampling = recipe.sampling.model_dump(mode="json", exclude_none=True, exclude={"compile"})
            header = {"kind": "model", "config": config, "sampling": sampling, "provenance": [link]}
            snapshots = _Snapshots(settings, steps, out / "checkpoints", header)
            job = training_run.plan_of(run_dir, recipe, "pretraining", steps, settings, device, snapshots.due)
            fitted = contextlib.closing(loop.fit(model, objective, stream, *job))
            with Watch(run_dir, recipe, page, log_to) as watch, fitted as events:
                for event in events:
                    if isinstance(event, loop.Evaluate):
                        snapshots.keep(event)
                    watch.saw(event, settings.batch)
                assert isinstance(event, loop.Finished), "the last event"
                ema, header = event.averages.whole(), snapshots.header_at(steps, None)
                if sharding.is_sharded(model):
                    model = registry.build(config).to(device)
                score = _finish(model, ema, header, run_dir, scoring)
                figures = {"metric": scoring.key, "score": score}
                watch.measured("score", {scoring.key: score}, steps * settings.batch, run_dir.path / "grid.png")
                watch.finish({**run_dir.state(), **figures})
            state = training_run.finish(run_dir, **figures)
        return training_run.result(run_dir, state, "metric", "score")


def likelihood_objective(model: LikelihoodModel) -> Objective:
    """Negative log-likelihood (or bound) per dimension."""
    return Objective(partial(_batch, model), partial(likelihood_step, model))


def _batch(model: LikelihoodModel, items: Tensor, label: Tensor, rng: StepRng) -> LikelihoodBatch:
    row_rng = rng("pretrain")
    draw = model.draw(len(items), row_rng)
    return LikelihoodBatch(model.codec.prepare(items, row_rng), label, draw)


def _check_memory(config: dict[str, Any]) -> None:
    """Raises UsageError for weights beyond this machine's memory: to fill them would bring it to a standstill."""
    if config["name"] not in registry.BUILTIN or not hasattr(os, "sysconf"):
        return
    try:
        with torch.device("meta"):
            sizes = [parameter.nbytes for parameter in registry.build(config).parameters()]
    except RuntimeError as error:  # sizes beyond what torch can count
        raise UsageError(
            f"model.options: this {config['name']} cannot be built ({reason(error)}); choose a smaller network"
        ) from None
    if sum(sizes) > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise UsageError(
            f"model.options: the weights of this {config['name']} take {sum(sizes) / 1e9:,.0f} GB, and this machine "
            f"has {memory / 1e9:,.0f} GB of memory; choose a smaller network"
        )


def snapshot_steps(settings: PretrainRecipe, steps: int) -> int | None:
    """Steps between snapshots. Raises UsageError for far too many."""
    images = settings.snapshot_every
    return images and training_run.steps_between("pretrain.snapshot_every", images, settings.batch, steps)


class _Snapshots:
    """Averaged weights kept on the way, from which `ddo ema` makes other averages."""

    def __init__(self, settings: PretrainRecipe, steps: int, path: Path, header: dict[str, Any]):
        self.settings, self.path, self.header = settings, path, header
        every = snapshot_steps(settings, steps)
        is_asked_for = every is not None or len(settings.ema_widths) > 1
        self.due = frozenset([*range(every or steps, steps, every or steps), *([steps] * is_asked_for)])

    def keep(self, event: loop.Evaluate) -> None:
        """Writes all averages of a step."""
        step, first = event.step, (None, event.averages.whole())
        for width, tensors in itertools.chain([first], event.averages.further()):
            if dist.is_main():
                checkpoint.save(self.path / snapshot_name(step, width), tensors, self.header_at(step, width))

    def header_at(self, step: int, width: float | None) -> dict[str, Any]:
        """The header with the average that the weights are, where it is a power function. width: None for the first."""
        widths = [width] if width is not None else self.settings.ema_widths[:1]
        images = step * self.settings.batch
        return {**self.header, **({"ema": {"std": widths[0], "images": images}} if widths else {})}


def _finish(
    model: Any, ema: dict[str, Tensor], header: dict[str, Any], run_dir: rundir.RunDir, scoring: Scoring
) -> float:
    """Scores the averaged weights, draws their picture and writes the checkpoint; returns the mean score."""
    model.load_state_dict(ema)
    model.eval()
    figures = [scoring.run(model, repeat) for repeat in range(scoring.repeats)]
    scoring.picture(model, run_dir.path / "grid.png")
    if dist.is_main():
        write_json(run_dir.path / "metrics.json", figures)
        checkpoint.save(run_dir.final, ema, header)
    return sum(figure[scoring.key] for figure in figures) / len(figures)
