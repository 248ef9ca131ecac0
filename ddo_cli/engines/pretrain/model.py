"""`ddo pretrain`: maximum likelihood of any registered model, to make references where no checkpoint exists."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist, rundir, sharding
from ddo_cli.data.images import open_images
from ddo_cli.data.items import check_fits, digest
from ddo_cli.data.pairs import Shuffled
from ddo_cli.engines import estimate, training_run
from ddo_cli.engines.pretrain import tokenizer as pretrain_tokenizer
from ddo_cli.engines.scoring import Scoring
from ddo_cli.files import write_json
from ddo_cli.likelihood import map_draw
from ddo_cli.models import registry
from ddo_cli.models.var import vqvae
from ddo_cli.precision import set_training_precision
from ddo_cli.recipe.schema import PretrainRecipe, Recipe
from ddo_cli.rng import RowRng, seed_from
from ddo_cli.training import loop
from ddo_cli.training.ema import snapshot_name


def run(recipe: Recipe, out: Path, *, device: torch.device, dry_run: bool = False) -> dict[str, Any]:
    """Trains recipe.model on recipe.data and returns what layout promises of `pretrain --json`.

    The same call on an unfinished run continues it; on a finished one it returns the stored result.
    """
    settings = recipe.pretrain
    if recipe.model.name == vqvae.NAME:
        return pretrain_tokenizer.run(recipe, out, device=device, dry_run=dry_run)
    registry.load_file(recipe.model.file)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache)
    config = registry.config_of(
        recipe.model.name, real.shape, real.num_classes, recipe.model.options, recipe.model.draw
    )
    steps = -(-settings.images // settings.batch)
    torch.manual_seed(seed_from("init", recipe.seed))  # weights are the only thing drawn from the global generator
    model = registry.build(config).to(device)
    check_fits(real, model, recipe.data.hflip)
    loop.check(model, settings)
    model.check_sampling(recipe.sampling)
    scoring = Scoring(recipe, real, recipe.sampling, device)
    parameters = sum(p.numel() for p in model.parameters())
    identity = {"data_sha256": digest(real), **scoring.identity}
    rundir.RunDir(out).check("pretrain", recipe, **identity)
    if dry_run:
        expected = estimate.of_pretraining(recipe, config, real, scoring)
        return {
            "out": str(out), "dry_run": True, "model": config["name"], "parameters": parameters,
            "images": steps * settings.batch, "steps": steps, "batch": settings.batch, "data": real.name,
            "estimate": expected,
        }  # fmt: skip
    model.start_training()
    set_training_precision(settings.precision)
    with rundir.locked(out) as run_dir:
        state = run_dir.claim("pretrain", recipe, **identity)
        if run_dir.is_finished(state):
            return _result(run_dir, state)
        console.info(f"pretrain {config['name']}: {parameters:,} parameters, {steps} steps of {settings.batch} images")
        stream = Shuffled(real.items, real.labels, "pretrain", recipe.seed, hflip=recipe.data.hflip)

        def loss(wrapped: nn.Module, rows: loop.Rows) -> loop.Loss:
            """Negative log-likelihood (or bound) per dimension."""
            base = rows.step * settings.batch
            items, label = stream.rows(base + rows.start, base + rows.stop)
            rng = RowRng.for_rows("pretrain", recipe.seed, rows.step, rows=range(rows.start, rows.stop))
            draw = map_draw(lambda tensor: tensor.to(device), model.draw(len(items), rng))
            x = model.encode(items.to(device), rng)
            log_lik = wrapped(x, label.to(device), draw)
            return loop.Loss(-log_lik.mean() / math.prod(model.state_shape), {})

        header = {
            "kind": "model",
            "config": config,
            "sampling": recipe.sampling.model_dump(mode="json", exclude_none=True),
            "provenance": [{"command": "pretrain", "recipe": recipe.model_dump(mode="json"), "steps": steps}],
        }
        snapshots = _Snapshots(settings, steps, out / "checkpoints", header)
        state_file = out / "train-state.safetensors"
        plan = loop.Plan(
            title="pretraining",
            steps=steps,
            recipe=settings,
            loss=loss,
            state_file=state_file,
            log_file=run_dir.log_file,
            log_tags={},
            last_good=lambda: training_run.newest(state_file, loop.state_directory(state_file), *snapshots.files()),
            ema_ramp=settings.ema_ramp,
            evaluate_at=snapshots.due,
            evaluate=lambda step, ema: snapshots.keep(step, None, ema),
            keep=snapshots.keep,
            dropout=True,
            owner=recipe.name,
        )
        ema = loop.fit(model, plan, device)
        header = snapshots.header_at(steps, None)
        if sharding.is_sharded(model):
            model = registry.build(config).to(device)
        score = _finish(model, ema, header, run_dir, scoring)
        state = run_dir.advance(finished=True, metric=scoring.key, score=score)
        if dist.is_main():
            loop.drop_state(state_file)
        return _result(run_dir, state)


class _Snapshots:
    """Averaged weights kept on the way, from which `ddo ema` makes other averages."""

    def __init__(self, settings: PretrainRecipe, steps: int, path: Path, header: dict[str, Any]):
        self.settings, self.path, self.header = settings, path, header
        every = settings.snapshot_every and max(settings.snapshot_every // settings.batch, 1)
        is_asked_for = every is not None or len(settings.ema_widths) > 1
        self.due = frozenset([*range(every or steps, steps, every or steps), *([steps] * is_asked_for)])

    def keep(self, step: int, width: float | None, ema: dict[str, Tensor]) -> str:
        """Writes a snapshot. width: None for the first average."""
        if dist.is_main():
            checkpoint.save(self.path / snapshot_name(step, width), ema, self.header_at(step, width))
        return ""

    def files(self) -> list[Path]:
        """Those that are on disk."""
        return sorted(self.path.glob("*.safetensors"))

    def header_at(self, step: int, width: float | None) -> dict[str, Any]:
        """The header with the average that the weights are, where it is a power function."""
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


def _result(run_dir: rundir.RunDir, state: dict[str, Any]) -> dict[str, Any]:
    paths = {"out": str(run_dir.path), "final": str(run_dir.final)}
    return {**paths, "metric": state["metric"], "score": state["score"]}
