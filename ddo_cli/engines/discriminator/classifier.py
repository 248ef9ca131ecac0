"""`ddo train-classifier`: a classifier of noisy images, for classifier guidance and as the trunk of discriminators."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli import checkpoint, dist, rundir
from ddo_cli.codec import Codec, Encodable
from ddo_cli.data.images import open_images
from ddo_cli.data.items import check_enough, check_fits, compare_names
from ddo_cli.data.items import identity as identity_of
from ddo_cli.data.pairs import Shuffled, split
from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.engines import captions, pages, training_run
from ddo_cli.engines.sampling import guides
from ddo_cli.engines.watch import Watch
from ddo_cli.errors import DataError
from ddo_cli.generation import encoded
from ddo_cli.metrics.discrimination import BATCH, LEVELS, noisy
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html
from ddo_cli.report.charts import Chart
from ddo_cli.report.html import Section
from ddo_cli.report.pictures import Curve
from ddo_cli.rng import RowRng, StepRng, seed_from
from ddo_cli.trainable import Loss, Objective, Trainable
from ddo_cli.training import loop


def run(
    recipe: Recipe, out: Path, *, device: torch.device, dry_run: bool = False, log_to: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains recipe.classifier on recipe.data, in the model space of recipe.model.ckpt, and returns its accuracy.

    The same call on an unfinished run continues it; on a finished one it returns the stored result.
    Raises DataError if images have no labels, or too few are left to train on.
    """
    settings = recipe.classifier
    registry.load_file(recipe.model.file)
    loaded = registry.load_model(recipe.model.ckpt, device)
    base = guides.diffusion_model(loaded)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache, base.codec)
    captions.refuse(real, "a classifier")
    num_classes = base.num_classes or real.num_classes
    check_fits(real, base, recipe.data.hflip, num_classes=num_classes)
    compare_names(real, loaded.checkpoint.header.get("provenance", []))
    if not num_classes:
        raise DataError(f"{real.name} has no labels; a classifier is trained on labelled images")
    if len(real.items) < 2 * settings.held_out:
        raise DataError(
            f"{real.name} holds {len(real.items)} images, too few beside the {settings.held_out} that are held out; "
            f"lower classifier.held_out to at most {len(real.items) // 2}"
        )
    check_enough(real.name, len(real.items) - settings.held_out, settings.batch, "classifier.batch")
    config = discriminators.config_of(
        "classifier", settings.name, base.codec.state_shape, num_classes, settings.options
    )
    torch.manual_seed(seed_from("init", recipe.seed))  # weights are the only thing drawn from the global generator
    network = discriminators.build("classifier", config).to(device)
    loop.local_rows(settings.batch, settings.micro_batch)
    steps = training_run.num_steps(settings.images, settings.batch)
    precision = training_run.precision_of(settings, None, device)
    identity = {**identity_of(real), "model_sha256": loaded.checkpoint.sha256, **precision}
    rundir.RunDir(out).check("train-classifier", recipe, **identity)
    if dry_run:
        parameters = sum(p.numel() for p in network.parameters())
        return {"out": str(out), "dry_run": True, "parameters": parameters, "steps": steps, "data": real.name}
    with training_run.claimed("train-classifier", recipe, out, identity, network, device) as (run_dir, state):
        if not run_dir.is_finished(state):
            draw = base.draw_options
            law = vp_sde.TimeLaw(settings.time, False, settings.t_min, draw.p_mean, draw.p_std, draw.distribution)
            rows = split(len(real.items), settings.held_out, "classifier", recipe.seed)
            hflip = recipe.data.hflip
            stream = Shuffled(real.items, real.labels, "classifier", recipe.seed, only=rows.train, hflip=hflip)
            plan, meter = training_run.plan_of(run_dir, recipe, "classifier", steps, settings, device)
            objective = Objective(partial(_batch, base.codec, law), partial(_cross_entropy, base.codec))
            events = loop.fit(network, objective, stream, plan, meter)
            with Watch(run_dir, recipe, page, log_to) as watch:
                ema = loop.averaged(events, partial(watch.saw, batch=settings.batch))
            network.load_state_dict(ema)
            held_out = encoded(base, real.items, rows.held_out, "classifier", recipe.seed, device=device)
            labels = torch.from_numpy(real.labels[rows.held_out])
            levels = _accuracies(network.eval(), base, law, held_out, labels, device)
            if dist.is_main():
                link = {"command": "train-classifier", "recipe": recipe.told("data", "model", "classifier")}
                header = {"kind": "classifier", "config": config, "process": discriminators.PROCESS}
                checkpoint.save(run_dir.final, network.state_dict(), {**header, "provenance": [link], "levels": levels})
            accuracy = sum(level["accuracy"] for level in levels) / len(levels)
            figures = {"heldout_accuracy": accuracy, "levels": levels}
            watch.finish({**run_dir.state(), **figures})
            state = training_run.finish(run_dir, **figures)
        return training_run.result(run_dir, state, "heldout_accuracy", "levels")


def page(run_dir: rundir.RunDir, recipe: Recipe, state: dict[str, Any]) -> html.Page:
    """Of a run at any stage."""
    headline, sections = "", []
    if state.get("finished"):
        headline = f"The classifier of noisy images is right on {state['heldout_accuracy']:.1%} of held-out ones."
        levels = state["levels"]
        middle = [math.log10(level["sigma_min"] * level["sigma_max"]) / 2 for level in levels]
        line = Curve("accuracy", middle, [level["accuracy"] for level in levels], "o")
        sections = [Section("By noise level", [html.Charts([Chart("Held-out accuracy", [line], "log10 sigma")])])]
    return pages.of_training(run_dir, recipe, state, "Classifier", headline, sections)


class _Batch(NamedTuple):
    inputs: Encodable
    label: Tensor
    t: Tensor  # (B,), float64
    eps: Tensor


def _batch(codec: Codec, law: vp_sde.TimeLaw, items: Tensor, label: Tensor, rng: StepRng) -> _Batch:
    """Images with times drawn from `law` and noise."""
    row_rng = rng("classifier")
    t = law.times(row_rng.rand(dtype=torch.float64)).t
    eps = row_rng.randn(codec.state_shape)
    return _Batch(codec.prepare(items, row_rng), label, t, eps)


def _cross_entropy(codec: Codec, wrapped: nn.Module, batch: _Batch) -> Loss:
    """Cross-entropy of noisy images."""
    logits = wrapped(noisy(codec.encode(*batch.inputs), batch.t, batch.eps), batch.t)  # (B, classes)
    right = (logits.detach().argmax(1) == batch.label).to(torch.float32).mean()
    return Loss(F.cross_entropy(logits, batch.label), {"accuracy": right})


@torch.no_grad()
def _accuracies(
    network: Trainable, base: DiffusionModel, law: vp_sde.TimeLaw, x0: Tensor, label: Tensor, device: torch.device
) -> list[dict[str, float]]:
    """Accuracy on held-out images in strata of equal probability under the training density of t."""
    levels = []
    for level in range(LEVELS):
        right, sigmas = 0, []
        for start in range(0, len(x0), BATCH):
            part = x0[start : start + BATCH]
            rng = RowRng.for_rows("classifier held-out", level, rows=range(start, start + len(part)))
            t = law.times((level + rng.rand(dtype=torch.float64)) / LEVELS).t
            states = noisy(part.to(device), t.to(device), rng.randn(base.codec.state_shape).to(device))
            right += int((network(states, t.to(device)).argmax(1).cpu() == label[start : start + BATCH]).sum())
            sigmas.append(vp_sde.sigma_of(t))
        sigma = torch.cat(sigmas)
        levels.append({"sigma_min": float(sigma.min()), "sigma_max": float(sigma.max()), "accuracy": right / len(x0)})
    return levels
