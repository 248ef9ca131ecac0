"""Analyses of `ddo analyze`: gain, trajectory, score by evaluations, exact densities (arXiv 2211.17091)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddo_cli import console, dist
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.diffusion.guidance import Potential, potential_at
from ddo_cli.diffusion.trace import Denoiser, Trace
from ddo_cli.engines.analysis import report
from ddo_cli.engines.analysis.subject import Finding, Settings, Subject, shared_out
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import NumericsError
from ddo_cli.generation import generate, num_batches
from ddo_cli.metrics import gain as gains
from ddo_cli.report import pictures
from ddo_cli.rng import RowRng

# Our choice, enough for smooth curves and pictures:
TRAJECTORIES = 256  # sampling runs, and held-out items beside them
POINTS = 4096  # of a scatter plot


# --- Gain


def gain(subject: Subject, settings: Settings) -> Finding:
    """Gain(theta, phi) with its standard error, in nats per item; with weight 1 it is the paper's. See `metrics.gain`.

    The weight is the predictor's; Heun with another weight in its corrector samples with about the mean of both.
    """
    x0, label = subject.held_out()
    measured = gains.measure(
        subject.base, subject.guide, x0, label, subject.spec, subject.window(), seed=subject.recipe.seed,
        device=subject.device,
    )  # fmt: skip
    figures = measured.figures(subject.guide.weight)
    levels = figures["levels"]
    if bad := [level for level in levels if not math.isfinite(level["gain"])]:
        raise NumericsError(
            f"the gain is not finite at sigma {bad[0]['sigma_min']:.3g} to {bad[0]['sigma_max']:.3g}; the model or the "
            "discriminator diverges there: narrow the window (--time-min, --time-max), or train it again"
        )
    if harmful := [level for level in levels if level["gain"] < -3 * level["error"]]:  # by chance in 1 run of 50
        places = ", ".join(f"{level['sigma_min']:.2g} to {level['sigma_max']:.2g}" for level in harmful)
        console.warn(
            f"guidance of weight {subject.guide.weight:g} leads the score away from held-out data's at sigma {places}: "
            "it is too strong (see best_weight), overfitted, or trained on samples of few steps, whose errors it "
            "corrects as well and the gain does not count"
        )
    content = {**figures, "weight": subject.guide.weight, "num_items": len(x0)}
    summary = {key: value for key, value in content.items() if key not in ("levels", "num_items")}
    return Finding(summary, content, partial(report.draw, "gain", content))


# --- Trajectories


class Recorder:
    """A guide that changes nothing and records noise level and log-ratio of every state that a predictor evaluates."""

    def __init__(self, potential: Potential):
        self.potential = potential
        self.sigmas: list[Tensor] = []  # of the last batch, scalars; the mean where samples differ
        self.log_ratios: list[Tensor] = []  # (B,) each, on the device

    def steer(self, denoise: Denoiser, label: Tensor, trace: Trace) -> Denoiser:
        """The denoiser, with recording. A new batch starts a new record."""
        self.sigmas, self.log_ratios = [], []

        def recorded(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
            if stage == "predictor":
                self.sigmas.append(sigma.mean())
                self.log_ratios.append(potential_at(self.potential, x, sigma, label))
            return denoise(x, sigma, stage)

        return recorded


def trajectory(subject: Subject, settings: Settings) -> Finding:
    """The log-ratio L along sampling runs with and without guidance, and of noisy real data (the paper's Fig. 7).

    The paper shows d / (1 - d) = exp(L). Where guidance works, the guided curve coincides with the data's.
    """
    curves = {name: _along(subject, name, model) for name, model in subject.sides().items()}
    curves["data"] = _of_data(subject, curves["model"]["sigma"])
    low, high = subject.window()

    def mean(curve: dict[str, list[float]]) -> float | None:
        inside = [value for value, sigma in zip(curve["mean"], curve["sigma"], strict=True) if low <= sigma <= high]
        return sum(inside) / len(inside) if inside else None

    summary = {f"mean_log_ratio_{name}": mean(curve) for name, curve in curves.items()}
    content = {**curves, **summary, "num": TRAJECTORIES, "window": [low, high]}
    return Finding(summary, content, partial(report.draw, "trajectory", content))


def _along(subject: Subject, name: str, model: DiffusionModel) -> dict[str, list[float]]:
    """Figures of L at every predictor of a sampling run."""
    recorder = Recorder(subject.guide.potential)
    model, spec = model.guided_by([recorder]), subject.spec
    seeds, batch = range(TRAJECTORIES), min(spec.batch, TRAJECTORIES)

    def record(number: int) -> tuple[list[float], Tensor]:
        (drawn,) = generate(model, seeds, spec, batch=batch, only=[number], device=subject.device)
        # Without the rows that fill a batch up.
        log_ratios = torch.stack(recorder.log_ratios).cpu()
        return [float(sigma) for sigma in recorder.sigmas], log_ratios[:, : len(drawn.items)]

    records = shared_out(f"trajectory, {name}", "batches", range(num_batches(len(seeds), batch)), record).values()
    sigma = np.mean([sigmas for sigmas, _ in records], axis=0).tolist()
    return _quartiles(sigma, torch.cat([rows for _, rows in records], dim=1))


def _of_data(subject: Subject, levels: Sequence[float]) -> dict[str, list[float]]:
    x0, label = subject.held_out(TRAJECTORIES)
    x0, label = x0.to(subject.device, torch.float64), label.to(subject.device)
    log_ratios = []
    for step, level in enumerate(levels):
        rng = RowRng.for_rows("trajectory", subject.recipe.seed, step, rows=range(len(x0)))
        x = x0 + level * rng.randn(x0.shape[1:], dtype=torch.float64).to(subject.device)
        sigma = torch.tensor(level, dtype=torch.float64)
        log_ratios.append(potential_at(subject.guide.potential, x, sigma, label).cpu())
    return _quartiles(levels, torch.stack(log_ratios))


def _quartiles(sigma: Sequence[float], log_ratio: Tensor) -> dict[str, list[float]]:
    """Figures of log_ratio (steps, N) by step."""
    values = log_ratio.to(torch.float64)
    quartiles = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=1).tolist()
    names = ("sigma", "mean", "quartile_1", "median", "quartile_3")
    return dict(zip(names, (list(sigma), values.mean(1).tolist(), *quartiles), strict=True))


# --- Score by the number of evaluations


class _Passes:
    """A guide that changes nothing and keeps the last batch's trace, which counts network evaluations."""

    trace = Trace()

    def steer(self, denoise: Denoiser, label: Tensor, trace: Trace) -> Denoiser:
        self.trace = trace
        return denoise


def nfe(subject: Subject, settings: Settings) -> Finding:
    """The recipe's metric by network evaluations, with and without guidance on the same seeds (the paper's Fig. 8)."""
    metric = subject.recipe.metric
    if settings.num != metric.num_images:
        console.warn(
            f"nfe: scores of {settings.num} images where the recipe's are of {metric.num_images} (metric.num_images); "
            f"a Frechet distance falls with their number, so compare them with one another only (or --num-images "
            f"{metric.num_images})"
        )
    recipe = subject.recipe.model_copy(update={"metric": metric.model_copy(update={"num_images": settings.num})})
    scoring = Scoring(recipe, subject.real, subject.spec, subject.device)
    points = []
    with console.progress("nfe", 2 * len(settings.steps_list), "scores") as bar:
        for steps in settings.steps_list:
            scoring.spec = subject.spec.merged(steps=steps)
            point: dict[str, Any] = {"steps": steps}
            for name, model in subject.sides().items():
                passes = _Passes()
                point[name] = scoring.run(model.guided_by([passes]), 0)[scoring.key]
                spent = dist.gathered((passes.trace.nfe, passes.trace.disc_nfe))
                point["nfe"], point["disc_nfe"] = max(spent)  # a process without images has spent none
                bar.advance(fields=f"{name}, {steps} steps: {point[name]:.4g}")
            points.append(point)
    content = {"metric": scoring.key, "num_images": settings.num, "points": points}
    return Finding(content, content, partial(report.draw, "nfe", content))


# --- Densities


def density(subject: Subject, settings: Settings) -> Finding:
    """Exact densities of points before and after guidance, and their divergences from the data's (the paper's Fig. 5).

    By the probability-flow ODE, in which the guide acts with its predictor's weight.
    """
    scorer = Scoring(subject.recipe, subject.real, subject.spec, subject.device).density
    assert scorer is not None, "offered for the js metric only"
    scores: dict[str, dict[str, float]] = {}
    densities: dict[str, np.ndarray] = {}
    points = {"data": subject.real.items[:POINTS]}
    spec = subject.spec.merged(batch=min(subject.spec.batch, POINTS))
    with console.progress("density", 2, "densities") as bar:
        for name, model in subject.ode_sides().items():
            scores[name], grid = scorer.score_and_densities(model, spec)
            densities |= {"data": grid.p_data, name: grid.p_model}
            drawn = generate(subject.sides()[name], range(POINTS), spec, batch=spec.batch, device=subject.device)
            points[name] = np.concatenate([batch.items.numpy() for batch in drawn])
            bar.advance(fields=f"{name}: js {scores[name]['js']:.4g}")
    summary = {
        f"{key}_{name}": value for name, score in scores.items() for key, value in score.items() if key != "mass"
    }
    content = {**scores, "weight": subject.guide.weight, "num_points": POINTS}
    draw = partial(pictures.points_and_densities, points, densities, scorer.extent)
    return Finding(summary, content, draw)
