"""Gaussian mixtures, whose noised density, score and denoiser are closed forms: toy data and known answers."""

import math

import torch
from torch import Tensor


class GaussianMixture:
    """sum_k w_k N(mu_k, Sigma_k) in d dimensions; float64 throughout.

    Noise of deviation sigma turns Sigma_k into Sigma_k + sigma^2 I, with the same eigenvectors, so each covariance is
    factored once.
    """

    def __init__(self, means: Tensor, covs: Tensor, weights: Tensor | None = None):
        """means (K, d); covs (K, d, d), or (K,) deviations of isotropic components; weights (K,), equal by default.

        Raises ValueError if the shapes do not fit, a covariance is not positive definite or a weight not positive.
        """
        self.means = means.to(torch.float64)
        count, self.dim = self.means.shape
        covs = covs.to(torch.float64)
        if covs.ndim == 1:
            covs = covs.square()[:, None, None] * torch.eye(self.dim, dtype=torch.float64)
        weights = torch.ones(count) if weights is None else weights
        if covs.shape != (count, self.dim, self.dim) or weights.shape != (count,):
            raise ValueError(
                f"means {tuple(means.shape)} need covs ({count}, {self.dim}, {self.dim}) or ({count},) and weights "
                f"({count},); got {tuple(covs.shape)} and {tuple(weights.shape)}"
            )
        self.covs, self.weights = covs, weights.to(torch.float64) / weights.sum()
        self.variances, self.axes = torch.linalg.eigh(covs)  # (K, d), and (K, d, d) with eigenvectors in columns
        if self.variances.min() <= 0 or weights.min() <= 0:
            raise ValueError("covariances must be positive definite and weights positive")

    def mean(self) -> Tensor:
        """Mean of the whole mixture, (d,)."""
        return self.weights @ self.means

    def cov(self) -> Tensor:
        """Covariance of the whole mixture, (d, d)."""
        centred = self.means - self.mean()
        return torch.einsum("k,kij->ij", self.weights, self.covs + centred[:, :, None] * centred[:, None, :])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Points, (n, d)."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)  # (n,)
        eps = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        scaled = self.variances[component].sqrt() * eps  # (n, d), along the axes
        return self.means[component] + torch.einsum("nij,nj->ni", self.axes[component], scaled)

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Log density of x (B, d) under the mixture noised by sigma, scalar or (B,): nats, (B,)."""
        return self._joint(x, sigma)[0].logsumexp(1)

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Gradient of `log_prob` with respect to x, (B, d)."""
        log_joint, along, variance = self._joint(x, sigma)
        pull = torch.einsum("kij,bkj->bki", self.axes, -along / variance)  # (B, K, d): each component's own score
        return torch.einsum("bk,bki->bi", log_joint.softmax(1), pull)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x0 + sigma eps = x], (B, d): Tweedie's formula, x + sigma^2 score."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return x.to(torch.float64) + sigma.square().expand(len(x))[:, None] * self.score(x, sigma)

    def _joint(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N_k(x) (B, K); x - mu_k along the axes (B, K, d); noised variances along them (B or 1, K, d)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        variance = self.variances + sigma.square().view(-1, 1, 1)  # (B or 1, K, d)
        along = torch.einsum("kji,bkj->bki", self.axes, x.to(torch.float64)[:, None] - self.means)  # (B, K, d)
        exponent = along.square() / variance + variance.log() + math.log(2 * math.pi)
        return self.weights.log() - exponent.sum(2) / 2, along, variance


def toy2d() -> GaussianMixture:
    """The embedded two-dimensional data: a pinwheel of nine strokes, mean 0, deviation 0.5.

    Our choice: three arms of three strokes each, of unequal weights, thinner than the gaps between them, so that a
    small network blurs the strokes and bridges the gaps.
    """
    arm, ring = torch.arange(3.0).repeat_interleave(3).double(), torch.arange(3.0).repeat(3).double()  # (9,) each
    angle = 0.4 + 2 * math.pi / 3 * arm + 0.75 * ring  # radians; the arms bend
    radius = 0.40 + 0.36 * ring
    weights = torch.tensor([3, 4, 2, 2, 3, 5, 4, 2, 3], dtype=torch.float64)
    means = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)  # (9, 2)
    tilt = angle + 0.9
    along = torch.stack([tilt.cos(), tilt.sin()], dim=1)
    across = torch.stack([-tilt.sin(), tilt.cos()], dim=1)
    length, thickness = (0.14 + 0.02 * ring)[:, None, None], 0.055
    covs = length**2 * along[:, :, None] * along[:, None, :] + thickness**2 * across[:, :, None] * across[:, None, :]
    raw = GaussianMixture(means, covs, weights)
    scale = 0.5 / (raw.cov().trace() / 2).sqrt()
    return GaussianMixture((means - raw.mean()) * scale, covs * scale**2, weights)


def toy2d_wrong() -> GaussianMixture:
    """Another mixture, for a model of `toy2d` that is wrong: a ring of eight round blobs around a ninth.

    Our choice: it covers toy2d's support, so that the log-ratio is moderate where data lie, but has none of its shapes.
    """
    angle = 2 * math.pi / 8 * torch.arange(8.0).double()
    ring = 0.75 * torch.stack([angle.cos(), angle.sin()], dim=1)  # (8, 2)
    means = torch.cat([ring, torch.zeros(1, 2, dtype=torch.float64)])
    return GaussianMixture(means, torch.full((9,), 0.2, dtype=torch.float64))
