"""`ddo pretrain` of a `vqvae`: the tokenizer of a VAR, trained to reconstruct images."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_enough, check_images
from ddo_cli.data.items import identity as identity_of
from ddo_cli.data.pairs import Shuffled
from ddo_cli.engines import dry_run as dry_runs
from ddo_cli.engines import training_run
from ddo_cli.engines.pretrain.page import page
from ddo_cli.engines.scoring import Scoring
from ddo_cli.engines.watch import Watch
from ddo_cli.errors import UsageError
from ddo_cli.files import write_json
from ddo_cli.metrics.scorer import share_of_batches
from ddo_cli.models.var import tokenizers, vqvae
from ddo_cli.models.var.vqvae import Vqvae
from ddo_cli.models.var.vqvae_layers import full_precision
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import pictures
from ddo_cli.rng import StepRng, permutation, seed_from
from ddo_cli.trainable import Loss, Objective
from ddo_cli.training import loop

GRID_ITEMS = 32
# In the first half of a run, codes that no token of some images uses are reset every so many steps. Both figures are
# our choice; the published tokenizer comes without its training.
REVIVE_EVERY, REVIVE_IMAGES = 25, 32


def run(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    dry_run: bool = False,
    measure: bool = True,
    log_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains the tokenizer recipe.model on recipe.data; returns what `pretrain` does, and `image_error`: the mean
    squared error of reconstructed pixels in [-1, 1].

    Its score is the recipe's distance of reconstructed images, which no VAR on top can be much better than.
    """
    settings = recipe.pretrain
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache)
    check_images(real, "a tokenizer is trained on images themselves")
    check_enough(real.name, len(real.items), settings.batch, "pretrain.batch")
    if recipe.metric.name in ("js", "clip"):
        what = "densities of points" if recipe.metric.name == "js" else "images and captions"
        raise UsageError(f"metric {recipe.metric.name} is of {what}; choose a metric of images, e.g. fd_embedded")
    config = tokenizers.config_of(recipe.model.name, real.shape, recipe.model.options)
    loop.local_rows(settings.batch, settings.micro_batch)
    steps = training_run.num_steps(settings.images, settings.batch)
    torch.manual_seed(seed_from("init", recipe.seed))  # weights are the only thing drawn from the global generator
    model: Vqvae = tokenizers.build(config).to(device)
    scoring = Scoring(recipe, real, recipe.sampling, device)
    parameters = sum(p.numel() for p in model.parameters())
    precision = training_run.precision_of(settings, None, device)
    identity = {**identity_of(real), **scoring.identity, **precision}
    rundir.RunDir(out).check("pretrain", recipe, **identity)
    stream = Shuffled(real.items, real.labels, "pretrain", recipe.seed, hflip=recipe.data.hflip)
    objective = Objective(partial(_batch, recipe, stream), partial(_reconstruction, model))
    if dry_run:
        plan = {
            "out": str(out), "dry_run": True, "model": vqvae.NAME, "parameters": parameters,
            "images": steps * settings.batch, "steps": steps, "batch": settings.batch, "data": real.name,
        }  # fmt: skip
        return plan | dry_runs.of_pretraining(recipe, model, objective, stream, device) if measure else plan
    with training_run.claimed("pretrain", recipe, out, identity, model, device) as (run_dir, state):
        if not run_dir.is_finished(state):
            console.info(f"pretrain {vqvae.NAME}: {steps:,} steps of {settings.batch} images")
            job = training_run.plan_of(run_dir, recipe, "pretraining", steps, settings, device)
            events = loop.fit(model, objective, stream, *job)
            with Watch(run_dir, recipe, page, log_to) as watch:
                ema = loop.averaged(events, partial(watch.saw, batch=settings.batch))
                model.load_state_dict(ema)
                model.eval()
                figures = _finish(model, ema, recipe, real, scoring, steps, run_dir)
                watch.measured("score", figures, steps * settings.batch, run_dir.path / "grid.png")
                scores = {"metric": scoring.key, "score": figures[scoring.key], "image_error": figures["image_error"]}
                watch.finish({**run_dir.state(), **scores})
            state = training_run.finish(run_dir, **scores)
        return training_run.result(run_dir, state, "metric", "score", "image_error")


class _Revival(NamedTuple):
    """Images whose unused codes are reset before a step, and the key of the vectors that take their place."""

    items: Tensor
    seed: int
    step: int


class _Batch(NamedTuple):
    items: Tensor
    revival: _Revival | None


def _batch(recipe: Recipe, stream: Shuffled, items: Tensor, label: Tensor, rng: StepRng) -> _Batch:
    settings, revival = recipe.pretrain, None
    steps = training_run.num_steps(settings.images, settings.batch)
    is_first = rng.rows.start == loop.local_rows(settings.batch, settings.micro_batch)[0][0]
    if rng.step % REVIVE_EVERY == 0 and 2 * rng.step < steps and is_first:
        # The same images for every process: a function of weights and step, as all of a step must be.
        first = rng.step * settings.batch
        some, _ = stream.rows(first, first + min(settings.batch, REVIVE_IMAGES))
        revival = _Revival(some, recipe.seed, rng.step)
    return _Batch(items, revival)


def _reconstruction(model: Vqvae, wrapped: nn.Module, batch: _Batch) -> Loss:
    """Mean squared error of pixels, and the quantisation loss."""
    if batch.revival is not None:
        some, seed, step = batch.revival
        _revive(model, vqvae.scaled(some), ("revive", seed, step))
    images = vqvae.scaled(batch.items)
    out = wrapped(images)
    error = F.mse_loss(out.images, images)
    # Not tokens.unique(): its size would have to be waited for.
    codes = error.new_zeros(model.options.vocabulary).index_fill_(0, out.tokens.flatten(), 1.0).sum()
    return Loss(error + out.loss, {"image_error": error, "quantisation": out.loss, "codes_used": codes})


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
        for items in share_of_batches(real.items[: recipe.metric.num_images], recipe.sampling.batch):
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
        provenance = [{"command": "pretrain", "recipe": recipe.told("data", "model", "pretrain"), "steps": steps}]
        config = vqvae.config_of(real.shape, model.options)
        checkpoint.save(run_dir.final, ema, {"kind": tokenizers.KIND, "config": config, "provenance": provenance})
    return figures
