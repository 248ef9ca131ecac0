"""`ddo pretrain` of a `vqvae`: the tokenizer that a VAR stands on, trained to give images back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_images, digest
from ddo_cli.data.pairs import Shuffled
from ddo_cli.engines import training_run
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import UsageError
from ddo_cli.files import write_json
from ddo_cli.metrics.scorer import own_batches
from ddo_cli.models import registry
from ddo_cli.models.var import vqvae
from ddo_cli.models.var.vqvae import Vqvae
from ddo_cli.models.var.vqvae_layers import full_precision
from ddo_cli.precision import set_training_precision
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import pictures
from ddo_cli.rng import permutation, seed_from
from ddo_cli.training import loop

GRID_ITEMS = 32
# Every so many steps of a run's first half, codes that nothing in some images is near are moved to where they are of
# use. Both chosen by us; the published tokenizer comes without its training.
REVIVE_EVERY, REVIVE_IMAGES = 25, 32


def run(recipe: Recipe, out: Path, *, device: torch.device, dry_run: bool = False) -> dict[str, Any]:
    """Trains the tokenizer that recipe.model describes on recipe.data; returns what `pretrain` does, and its image
    error: the mean squared one in units of pixels in [-1, 1].

    Its score is the recipe's distance of images that went through it, what no VAR on top can be much better than.
    """
    settings = recipe.pretrain
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache)
    check_images(real, "a tokenizer is trained on images themselves")
    if recipe.metric.name == "js":
        raise UsageError("metric js is of densities of points; choose a metric of images, e.g. fd_embedded")
    options = recipe.model.options
    config = registry.config_of(vqvae.NAME, real.shape, 0, options, {})
    loop.local_rows(settings.batch, settings.micro_batch)
    steps = -(-settings.images // settings.batch)
    torch.manual_seed(seed_from("init", recipe.seed))  # weights are the only thing drawn from the global generator
    model = cast(Vqvae, registry.build(config)).to(device)
    scoring = Scoring(recipe, real, recipe.sampling, device)
    parameters = sum(p.numel() for p in model.parameters())
    identity = {"data_sha256": digest(real), **scoring.identity}
    rundir.RunDir(out).check("pretrain", recipe, **identity)
    if dry_run:
        return {
            "out": str(out), "dry_run": True, "model": vqvae.NAME, "parameters": parameters,
            "images": steps * settings.batch, "steps": steps, "batch": settings.batch, "data": real.name,
            "estimate": {"not_estimated": "a tokenizer of any size is small beside the model on top of it"},
        }  # fmt: skip
    set_training_precision(settings.precision)
    with rundir.locked(out) as run_dir:
        state = run_dir.claim("pretrain", recipe, **identity)
        if run_dir.is_finished(state):
            return _result(run_dir, state)
        console.info(f"pretrain {vqvae.NAME}: {parameters:,} parameters, {steps} steps of {settings.batch} images")
        stream = Shuffled(real.items, real.labels, "pretrain", recipe.seed, hflip=recipe.data.hflip)
        first_rows = loop.local_rows(settings.batch, settings.micro_batch)[0]

        def loss(wrapped: nn.Module, rows: loop.Rows) -> loop.Loss:
            """Mean squared error of pixels, and the quantisation loss."""
            base = rows.step * settings.batch
            items, _ = stream.rows(base + rows.start, base + rows.stop)
            images = vqvae.scaled(items.to(device))
            if rows.step % REVIVE_EVERY == 0 and 2 * rows.step < steps and (rows.start, rows.stop) == first_rows:
                # The same images for every process: a function of weights and step, as all of a step must be.
                some, _ = stream.rows(base, base + min(settings.batch, REVIVE_IMAGES))
                _revive(model, vqvae.scaled(some.to(device)), ("revive", recipe.seed, rows.step))
            found = wrapped(images)
            error = F.mse_loss(found.images, images)
            codes = len(found.tokens.unique())
            log = {"image_error": error, "quantisation": found.loss, "codes_used": error.new_tensor(float(codes))}
            return loop.Loss(error + found.loss, log)

        state_file = out / "train-state.safetensors"
        plan = loop.Plan(
            title="pretraining",
            steps=steps,
            recipe=settings,
            loss=loss,
            state_file=state_file,
            log_file=run_dir.log_file,
            log_tags={},
            last_good=lambda: training_run.newest(state_file),
            ema_ramp=settings.ema_ramp,
            owner=recipe.name,
        )
        ema = loop.fit(model, plan, device)
        model.load_state_dict(ema)
        model.eval()
        figures = _finish(model, ema, recipe, real, scoring, steps, run_dir)
        state = run_dir.advance(
            finished=True, metric=scoring.key, score=figures[scoring.key], image_error=figures["image_error"]
        )
        if dist.is_main():
            state_file.unlink(missing_ok=True)
        return _result(run_dir, state)


def _revive(model: Vqvae, images: Tensor, key: tuple[str | int, ...]) -> None:
    """Moves codes that no token of the images is to vectors, drawn at random, that the tokens stand for."""
    with torch.no_grad(), full_precision(images.device):
        tokens, vectors = model.quantize.searched(model.latent(images))
        weight, candidates = model.quantize.embedding.weight, vectors.flatten(0, 1)  # (B L, z)
        unused = (torch.bincount(tokens.flatten(), minlength=len(weight)) == 0).nonzero()[:, 0]
        order = permutation(len(candidates), *key).to(unused.device)
        number = min(len(unused), len(candidates))
        weight[unused[:number]] = candidates[order[:number]]
        weight.copy_(dist.from_main(weight.detach().cpu()).to(weight.device))  # the same on every process


def _finish(
    model: Vqvae, ema: dict[str, Tensor], recipe: Recipe, real: ItemSet, scoring: Scoring, steps: int, run_dir: Any
) -> dict[str, float]:
    """Scores the averaged weights, draws their picture and writes the checkpoint."""
    device = scoring.device
    squared: list[float] = []

    def reconstructed() -> Iterator[Tensor]:
        for items in own_batches(real.items[: recipe.metric.num_images], recipe.sampling.batch):
            images = items.to(device)
            back = model.decode(model.quantize.f_hat(model.encode(images)))
            squared.extend((vqvae.scaled(back) - vqvae.scaled(images)).square().flatten(1).mean(1).tolist())
            yield back.cpu()

    with torch.no_grad():
        figures = scoring.frechet.score(reconstructed())
        everywhere = [value for part in dist.gathered(squared) for value in part]
        figures["image_error"] = sum(everywhere) / len(everywhere)
        if dist.is_main():
            some = torch.from_numpy(real.items[:GRID_ITEMS].copy())
            back = model.decode(model.quantize.f_hat(model.encode(some.to(device)))).cpu()
            pictures.contact_sheet(torch.stack([some, back], 1).flatten(0, 1).numpy(), run_dir.path / "grid.png", 8)
    if dist.is_main():
        write_json(run_dir.path / "metrics.json", [figures])
        provenance = [{"command": "pretrain", "recipe": recipe.model_dump(mode="json"), "steps": steps}]
        config = vqvae.config_of(tuple(real.shape), model.options)
        checkpoint.save(run_dir.final, ema, {"kind": vqvae.KIND, "config": config, "provenance": provenance})
    return figures


def _result(run_dir: rundir.RunDir, state: dict[str, Any]) -> dict[str, Any]:
    paths = {"out": str(run_dir.path), "final": str(run_dir.final)}
    return {**paths, **{key: state[key] for key in ("metric", "score", "image_error")}}
