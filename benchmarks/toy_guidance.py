"""Guidance and DiffRS by discriminators of the recipe toy2d-dg: divergence from the data at about equal evaluations.

    python benchmarks/toy_guidance.py runs/many/final.safetensors runs/few/final.safetensors ...

Rejection has no density, so that samples are compared: the data's density, noised by H, is a closed form, and a
Gaussian kernel estimate of the samples has the same noise. 20 s of one core for a discriminator.
"""

import math
import sys

import torch
from torch import Tensor

from ddo_cli.diffusion.denoiser import as_diffusion
from ddo_cli.diffusion.guidance import GradientGuide, Guide
from ddo_cli.diffusion.mixture import toy2d
from ddo_cli.diffusion.rejection import Cost, Limits, Rejection
from ddo_cli.generation import generate
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.recipe.schema import SamplingRecipe

N, H = 8192, 0.06
HALF, CELLS = 2.6, 90
WINDOW = {"time_min": 0.0, "time_max": 0.4}  # the recipe's
CPU = torch.device("cpu")
BASE = as_diffusion(registry.load_model("embedded:toy2d-wrong", CPU).model, "the toy is a diffusion model")
CELL = (2 * HALF / CELLS) ** 2
_STEPS = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * (2 * HALF / CELLS) - HALF
POINTS = torch.cartesian_prod(_STEPS, _STEPS)


def normalised(log_p: Tensor) -> Tensor:
    return log_p - log_p.logsumexp(0) - math.log(CELL)


def kl(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum()) * CELL


def show(name: str, samples: Tensor, cost: str) -> None:
    """Jensen-Shannon and KL(data, samples); the density of samples counts as at least 1e-6."""
    parts = [(-torch.cdist(rows, samples.double()).square() / (2 * H * H)).logsumexp(1) for rows in POINTS.split(512)]
    log_data, log_model = normalised(toy2d().log_prob(POINTS, H)), normalised(torch.cat(parts))
    mean = torch.logaddexp(log_data, log_model) - math.log(2)
    js = (kl(log_data, mean) + kl(log_model, mean)) / 2
    floor = torch.full_like(log_model, math.log(1e-6))
    print(f"{name}: JS {js:.4f}, KL {kl(log_data, torch.logaddexp(log_model, floor)):.4f}, {cost}", flush=True)


def draw(guides: list[Guide], steps: int, seeds: range = range(N), batch: int = 4096) -> tuple[Tensor, str]:
    """Samples, and the evaluations of model and discriminator."""
    spec = SamplingRecipe(sampler="heun", steps=steps, sigma_max=20.0, batch=batch)
    batches = list(generate(BASE.guided_by(guides), seeds, spec, batch=batch))
    samples, nfe, disc_nfe = torch.cat([b.items for b in batches]), float(batches[0].nfe), float(batches[0].disc_nfe)
    if costs := [b.cost for b in batches if b.cost is not None]:
        cost = Cost(*torch.cat(costs).double().T)
        nfe, disc_nfe = float(cost.nfe.mean()), float(cost.disc_nfe.mean())
    return samples, f"{nfe:.1f} and {disc_nfe:.1f} evaluations"


def main(files: list[str]) -> None:
    show("data", toy2d().sample(N, torch.Generator().manual_seed(1)).float(), "no evaluations")
    show("no guidance", *draw([], 24))
    for file in files:
        network = discriminators.load("discriminator", file, CPU).network
        show(f"{file}, guidance", *draw([GradientGuide(network, 1.0, 1.0, **WINDOW)], 24))
        for percentile in (0.75, 0.95):
            pilot = Rejection(network, None, **WINDOW, max_nfe=10**6)
            draw([pilot], 16, range(3_000_000, 3_000_512), 512)
            assert pilot.log_ratio is not None
            rejection = Rejection(network, Limits.of(pilot.log_ratio, percentile), **WINDOW, max_nfe=93)
            show(f"{file}, DiffRS {percentile}", *draw([rejection], 16))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
