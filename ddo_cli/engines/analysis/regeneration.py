"""Analysis of `ddo analyze`: held-out images through the probability-flow ODE (arXiv 2211.17091, Fig. 6)."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddo_cli.diffusion import samplers
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.diffusion.trace import Trace
from ddo_cli.engines.analysis.subject import Finding, Settings, Subject, shared_out
from ddo_cli.report import pictures
from ddo_cli.rng import RowRng

# Our choice; the paper gives none.
REGENERATED = 8  # held-out images in the picture of mean regenerations
ROUND_TRIPS = 32  # held-out images that are encoded and decoded again
ROUND_TRIP_STEPS = 32  # at least; with 32, Heun's error on the embedded digits is 0.3 of 255 grey levels, Euler's 12


def round_trip(subject: Subject, model: DiffusionModel, x0: Tensor, label: Tensor) -> Tensor:
    """x0 (N, ...) encoded to the highest noise level and decoded again, by Heun: an exact solver would return x0."""
    spec = subject.spec.merged(steps=round_trip_steps(subject))
    up = model.sigmas(spec)[:-1].flip(0)
    x = x0.to(torch.float64)
    for levels in (up, up.flip(0)):
        x = samplers.heun(model.steered(label, spec, Trace()), x, levels)
    return x


def round_trip_steps(subject: Subject) -> int:
    """The sampler's number of steps, or more if its error would be large."""
    return max(len(subject.base.sigmas(subject.spec)) - 1, ROUND_TRIP_STEPS)


def mean_regeneration(
    subject: Subject, model: DiffusionModel, x0: Tensor, label: Tensor, number: int, settings: Settings
) -> Tensor:
    """Mean of many regenerations of one x0 (...): noised, then brought back to 0 by the ODE; grey levels, float64.

    number: of the item; the noise depends on it alone.
    """
    spec = subject.spec.merged(sigma_max=settings.noise_level)
    sampler = samplers.find(spec.sampler)
    solve = sampler.ode or sampler.integrate
    levels = subject.base.sigmas(spec)
    total = torch.zeros(x0.shape, dtype=torch.float64)
    for start in range(0, settings.regenerations, spec.batch):
        rows = range(start, min(start + spec.batch, settings.regenerations))
        rng = RowRng.for_rows("regeneration", subject.recipe.seed, number, rows=rows)
        eps = rng.randn(x0.shape, dtype=torch.float64).to(subject.device)
        denoise = model.steered(label.expand(len(rows)), spec, Trace())
        x = solve(denoise, x0.to(torch.float64) + levels[0] * eps, levels, None)
        total += subject.base.codec.decode(x).to("cpu", torch.float64).sum(0)
    return total / settings.regenerations


@torch.no_grad()
def regeneration(subject: Subject, settings: Settings) -> Finding:
    """Held-out images through the probability-flow ODE, with and without guidance (the paper's Fig. 6).

    round_trip: encoded and decoded again, the solver's error; mean_image: the mean of many regenerations from one noise
    level, which for a model with the right density is E[x0 | x] averaged, close to the original. RMSE in grey levels.
    """
    shown = torch.from_numpy(subject.real.items[subject.rows[:REGENERATED]]).to(torch.float64)
    trips = {name: _round_trips(subject, model) for name, model in subject.ode_sides().items()}
    x0, label = (tensor.to(subject.device) for tensor in subject.held_out(REGENERATED))

    def mean_of(task: tuple[str, int]) -> Tensor:
        name, number = task
        return mean_regeneration(subject, subject.ode_sides()[name], x0[number], label[number], number, settings)

    tasks = [(name, number) for name in trips for number in range(len(x0))]
    images = shared_out("regeneration", "images", tasks, mean_of)
    means = {name: torch.stack([images[name, number] for number in range(len(x0))]) for name in trips}
    content = {
        "round_trip": {name: _distance(*pair) for name, pair in trips.items()},
        "mean_image": {name: _distance(mean, shown) for name, mean in means.items()},
        "noise_level": settings.noise_level,
        "regenerations": settings.regenerations,
        "round_trip_steps": round_trip_steps(subject),
        "rows": subject.rows[:REGENERATED].tolist(),
    }
    summary = {
        f"{kind}_{key}_{name}": content[kind][name][key]
        for kind in ("round_trip", "mean_image") for name in trips for key in ("rmse", "psnr")
    }  # fmt: skip
    rows = {"original": shown} | {f"mean of {name}": mean for name, mean in means.items()}
    drawn = {name: row.round().to(torch.uint8).numpy() for name, row in rows.items()}
    return Finding(summary, content, partial(pictures.image_rows, drawn))


def _round_trips(subject: Subject, model: DiffusionModel) -> tuple[Tensor, Tensor]:
    """Decoded and original items (N, ...), float64 in grey levels."""
    x0, label = subject.held_out(ROUND_TRIPS)
    size = min(subject.spec.batch, 16)  # so that several processes have something to do

    def batch_from(start: int) -> Tensor:
        rows = slice(start, start + size)
        x = round_trip(subject, model, x0[rows].to(subject.device), label[rows].to(subject.device))
        return subject.base.codec.decode(x).cpu()

    batches = shared_out("round trip", "batches", range(0, len(x0), size), batch_from)
    originals = torch.from_numpy(subject.real.items[subject.rows[:ROUND_TRIPS]])
    return torch.cat([*batches.values()]).to(torch.float64), originals.to(torch.float64)


def _distance(items: Tensor, originals: Tensor) -> dict[str, Any]:
    """Root mean squared error in grey levels 0..255 over all pixels, its PSNR in dB (None: no error), and by image."""
    squares = (items - originals).square().flatten(1).mean(1)  # (N,)
    rmse = float(squares.mean().sqrt())
    return {
        "rmse": rmse,
        "psnr": 20 * math.log10(255 / rmse) if rmse else None,
        "rmse_by_image": squares.sqrt().tolist(),
    }
