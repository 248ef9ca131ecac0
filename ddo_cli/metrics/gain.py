"""Gain of discriminator guidance by noise level: the reduction of the score error (arXiv 2211.17091).

    Gain = 1/2 int g^2 E[ |grad log p_data - s|^2 - |grad log p_data - s'|^2 ] dt,   s' = s + w grad_x L
    KL(data || guided) <= KL(data || model) - Gain   for w = 1

The data's score is unknown, but the difference needs only its inner product with grad_x L, where E[x0 | x] - D may be
replaced by x0 - D (denoising score matching). With g^2 dt = 2 sigma dsigma and D' = D + w u, u = sigma^2 grad_x L:

    Gain = int sigma^-3 E[ |x0 - D|^2 - |x0 - D'|^2 ] dsigma = int sigma^-2 E[ 2 w <x0 - D, u> - w^2 |u|^2 ] dln sigma

On the discriminator's training items the estimate is too large. On held-out items a negative bin means that guidance
makes the score worse at that noise level: the discriminator overfits or the weight is too large. An untrained one gains
exactly 0. The gain concerns scores, that is, a sampler with infinitely many steps: a discriminator trained on samples
of few steps also corrects discretisation errors, and may improve samples although its gain is negative.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli import console, dist
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.diffusion.guidance import GradientGuide
from ddo_cli.diffusion.trace import Trace, rows_of
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

BINS = 16  # of equal width in ln sigma; our choice, the paper gives none


class Gain(NamedTuple):
    """The gain as a function of the weight w: 2 w slope - w^2 curvature, in nats; u is that of weight 1, with decay.

    edges: of the bins in sigma (K + 1,), increasing; slope, curvature: of each item in each bin (N, K), float64.
    """

    edges: Tensor
    slope: Tensor
    curvature: Tensor

    def by_item(self, weight: float) -> Tensor:
        """Contribution of each item to the gain in each bin, (N, K); its mean over items is the gain."""
        return 2 * weight * self.slope - weight**2 * self.curvature

    def figures(self, weight: float) -> dict[str, Any]:
        """`gain` and its standard `error` at this weight and at weight 1, and `levels` with the same for each bin.

        The error of the total comes from the items' totals, since the contributions of an item to neighbouring bins are
        correlated. best_weight: maximum of the parabola; None where guidance is 0.
        """
        levels = [
            {"sigma_min": low, "sigma_max": high, **self._summary(weight, slice(k, k + 1))}
            for k, (low, high) in enumerate(pairwise(self.edges.tolist()))
        ]
        return {**self._summary(weight, slice(None)), "levels": levels}

    def _summary(self, weight: float, bins: slice) -> dict[str, Any]:
        chosen, paper = (self.by_item(w)[:, bins].sum(1) for w in (weight, 1.0))  # (N,)
        slope, curvature = float(self.slope[:, bins].sum()), float(self.curvature[:, bins].sum())
        return {
            "gain": float(chosen.mean()),
            "error": _error(chosen),
            "gain_weight_1": float(paper.mean()),
            "error_weight_1": _error(paper),
            "best_weight": slope / curvature if curvature > 0 else None,
        }


def _error(values: Tensor) -> float:
    """The standard error of the mean of values (N,), N >= 2."""
    return float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def measure(
    base: DiffusionModel,
    guide: GradientGuide,
    x0: Tensor,
    label: Tensor,
    spec: SamplingRecipe,
    bounds: tuple[float, float],
    *,
    bins: int = BINS,
    seed: int = 0,
    device: torch.device,
) -> Gain:
    """The gain of `guide` on held-out items x0 (N, ...) between two noise levels; equal on every process.

    Every item is noised once per bin, at a random level in it; level and noise depend only on seed, bin and item. The
    guide's weight and boosting are ignored, see `Gain`; its window and decay apply, and so does cfg_scale.
    """

    def zero(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
        return torch.zeros_like(x)  # is steered instead of D, so that u has no rounding of D

    edges = torch.linspace(math.log(bounds[0]), math.log(bounds[1]), bins + 1, dtype=torch.float64)
    unit = guide._replace(weight=1.0, boost=None)
    tasks = [(k, start) for k in range(bins) for start in range(0, len(x0), spec.batch)]
    share = dist.shard(tasks)
    parts = []
    with console.progress("gain", len(share), "batches") as bar:
        for k, start in share:
            rows = slice(start, min(start + spec.batch, len(x0)))
            rng = RowRng.for_rows("gain", seed, k, rows=range(rows.start, rows.stop))
            u = rng.rand(dtype=torch.float64)
            sigma = (edges[k] + (edges[k + 1] - edges[k]) * u).exp().to(device)  # (b,)
            eps = rng.randn(x0.shape[1:], dtype=torch.float64).to(device)
            clean, classes = x0[rows].to(device, torch.float64), label[rows].to(device)
            x = clean + rows_of(sigma, clean) * eps
            u = unit.steer(zero, classes, Trace())(x, sigma)
            error = clean - base.steered(classes, spec, Trace())(x, sigma)
            # sigma^-2 <x0 - D, u> and sigma^-2 |u|^2, (2, b)
            terms = torch.stack([(error * u).flatten(1).sum(1), u.square().flatten(1).sum(1)]) / sigma.square()
            parts.append((k, rows, terms.cpu() * (edges[k + 1] - edges[k])))
            bar.advance()
    shares = torch.zeros(2, len(x0), bins, dtype=torch.float64)
    for k, rows, terms in (part for rank in dist.gathered(parts) for part in rank):
        shares[:, rows, k] = terms
    return Gain(edges.exp(), shares[0], shares[1])
