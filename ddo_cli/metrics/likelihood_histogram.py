"""Negative log-likelihood of features under the Gaussian of the data's features (DG, arXiv 2211.17091, Fig. 9)."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from ddo_cli.errors import DataError
from ddo_cli.metrics.accumulators import RowStore

# Eigenvalues below this fraction of the largest are rounding, not variance: a covariance stored in float32 is off by
# 2^-24 = 6e-8 of its size. Our choice; the paper gives none.
THRESHOLD = 1e-7


class FeatureGaussian:
    """N(mean, cov) on the subspace of the features in which the data varies.

    cov is singular if a feature never varies or images are fewer than features. It is then inverted on the `rank`
    eigenvectors whose eigenvalue exceeds `threshold` times the largest, and the component of a feature outside them is
    ignored; values of different rank cannot be compared.
    """

    def __init__(self, mean: Tensor, cov: Tensor, threshold: float = THRESHOLD, device: torch.device | str = "cpu"):
        """mean: (F,); cov: (F, F). Raises DataError if cov is not finite or has no positive eigenvalue."""
        mean, cov = (tensor.to(device, torch.float64) for tensor in (mean, cov))
        if cov.shape != (len(mean), len(mean)) or not (torch.isfinite(mean).all() and torch.isfinite(cov).all()):
            raise DataError(
                f"mean {tuple(mean.shape)} and covariance {tuple(cov.shape)} of the reference are not those of a "
                f"Gaussian of {len(mean)} finite features; compute the statistics again"
            )
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)  # (F,), (F, F)
        kept = values > threshold * values[-1].clamp(min=0)
        if not kept.any():
            raise DataError("the reference's features do not vary, so they have no density; give different images")
        self.mean, self.rank = mean, int(kept.sum())
        self._whitening = vectors[:, kept] / values[kept].sqrt()  # (F, rank)
        self._constant = float(values[kept].log().sum() + self.rank * math.log(2 * math.pi)) / 2
        moments = (self.mean.cpu().numpy().tobytes(), cov.cpu().numpy().tobytes(), repr(threshold).encode())
        self.digest = hashlib.sha256(b"".join(moments)).hexdigest()

    def nll(self, features: Tensor) -> Tensor:
        """-log N(x; mean, cov) in nats, (B,) float64, of features (B, F)."""
        z = (features.to(self.mean) - self.mean) @ self._whitening  # (B, rank), of unit variance for the data
        return z.square().sum(1) / 2 + self._constant


class NegativeLogLikelihoods(RowStore):
    """Nats of each of `num` images, float64 (num,), by position; 12 bytes per image."""

    array = "nats"

    def __init__(self, num: int, gaussian: FeatureGaussian, needs: str = "spatial") -> None:
        super().__init__(torch.zeros(num, dtype=torch.float64, device=gaussian.mean.device), needs)
        self.gaussian = gaussian

    def value(self, features: Tensor) -> Tensor:
        return self.gaussian.nll(features)

    @property
    def kind(self) -> str:
        return f"likelihood of {self.needs} under {self.gaussian.digest}"

    def result(self) -> np.ndarray:
        """Nats per image. After `all_reduce`."""
        return self.values().cpu().numpy()
