"""Divergences between a known density in the plane and a model's, integrated on a grid, without sampling noise."""

from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli import console
from ddo_cli.diffusion.mixture import GaussianMixture
from ddo_cli.errors import UsageError
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel
from ddo_cli.recipe.schema import SamplingRecipe

CHUNK = 2048  # points per network pass, so that a small network's activations stay in the CPU's cache


class Densities(NamedTuple):
    """extent (left, right, bottom, top), as matplotlib's imshow takes it, and arrays (size, size), row 0 at the bottom.

    Both densities are normalised on the grid. mass: that of the model on the grid before.
    """

    extent: tuple[float, float, float, float]
    p_data: np.ndarray
    p_model: np.ndarray
    mass: float


class DensityScorer:
    """Scores models of points in the plane against the mixture that the data is drawn from.

    The grid is a square around the mixture's mean with a margin of `margin` standard deviations. Cells must not be
    wider than the thinnest component's standard deviation; at that width the sum misses a normal's mass by 1e-8.
    """

    def __init__(self, data: GaussianMixture, size: int = 100, margin: float = 5.0):
        """Raises ValueError if the mixture is not two-dimensional or the grid is too coarse for it."""
        if data.dim != 2:
            raise ValueError(f"a density on a grid needs 2 dimensions; the data has {data.dim}")
        deviations = data.variances.sqrt()  # (K, 2)
        reach = (data.means - data.mean()).abs().amax(1) + margin * deviations.amax(1)  # (K,)
        half = float(reach.max())
        self.size, self.cell = size, 2 * half / size
        if self.cell > deviations.min():
            raise ValueError(
                f"size = {size} makes cells of {self.cell:.3g}, wider than the thinnest component's deviation "
                f"{float(deviations.min()):.3g}; use at least {int(2 * half / float(deviations.min())) + 1}"
            )
        steps = (torch.arange(size, dtype=torch.float64) + 0.5) * self.cell - half  # cell centres
        centre = data.mean()
        y, x = torch.meshgrid(centre[1] + steps, centre[0] + steps, indexing="ij")
        self.points = torch.stack([x, y], dim=2).flatten(0, 1)  # (size^2, 2), x fastest
        left, bottom = (float(value) - half for value in centre)
        self.extent = (left, left + 2 * half, bottom, bottom + 2 * half)
        self.log_data = self._normalised(data.log_prob(self.points))[0]  # (size^2,)

    def score(self, model: LikelihoodModel, spec: SamplingRecipe) -> dict[str, float]:
        """js, forward_kl = KL(data || model) and reverse_kl = KL(model || data) in nats, and mass, see `Densities`."""
        return self.score_and_densities(model, spec)[0]

    def score_and_densities(self, model: LikelihoodModel, spec: SamplingRecipe) -> tuple[dict[str, float], Densities]:
        """The score and the densities that it compares, with one evaluation of the model."""
        log_model, mass = self._normalised(self._log_model(model, spec))
        log_mean = torch.logaddexp(self.log_data, log_model) - np.log(2)
        score = {
            "js": (self._kl(self.log_data, log_mean) + self._kl(log_model, log_mean)) / 2,
            "forward_kl": self._kl(self.log_data, log_model),
            "reverse_kl": self._kl(log_model, self.log_data),
            "mass": mass,
        }
        p_data, p_model = (log_p.exp().view(self.size, self.size).numpy() for log_p in (self.log_data, log_model))
        return score, Densities(self.extent, p_data, p_model, mass)

    def _log_model(self, model: LikelihoodModel, spec: SamplingRecipe) -> Tensor:
        """log density of the model at the grid's points, (size^2,)."""
        if model.codec.shape != (2,) or model.num_classes:
            raise UsageError(
                f"metric js needs an unconditional model of points in the plane; this one has items of shape "
                f"{model.codec.shape} and {model.num_classes} classes"
            )
        device = next((p.device for p in chain(model.parameters(), model.buffers())), torch.device("cpu"))
        chunks = []
        with console.progress(f"density on a {self.size}x{self.size} grid", len(self.points), "points") as bar:
            for points in self.points.split(CHUNK):
                label = torch.full((len(points),), NO_LABEL, device=device)
                chunks.append(model.log_density(points.to(device), label, spec).cpu())
                bar.advance(len(points))
        return torch.cat(chunks).to(torch.float64)

    def _normalised(self, log_p: Tensor) -> tuple[Tensor, float]:
        """log density normalised on the grid, and the mass before."""
        log_mass = log_p.logsumexp(0) + 2 * np.log(self.cell)
        return log_p - log_mass, float(log_mass.exp())

    def _kl(self, log_p: Tensor, log_q: Tensor) -> float:
        """KL(p || q) in nats, in log space so that tails of q do not underflow; 0 where p underflows."""
        return float((log_p.exp() * (log_p - log_q)).sum()) * self.cell**2
