"""Precision, recall, density and coverage, from k-nearest-neighbour balls in feature space.

The ball of a row x of a set reaches to its k-th nearest other row in the set. Improved precision and recall,
arXiv 1904.06991, eqs. 1 and 2; density and coverage, arXiv 2002.09797, eqs. 4 and 5.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import DataError
from ddo_cli.metrics.nearest import TILE, nearest_squared, tiles

K_PRECISION, K_DENSITY = 3, 5  # the papers' values
# Squared distances that differ by less, relatively, are equal: rounding must not decide whether a row lies on the edge
# of a ball (as the k-th neighbour itself does, where the sets share rows).
EDGE = 1e-10


class Manifold(NamedTuple):
    """precision: share of generated rows in any real ball. recall: share of real rows in any generated ball.

    density: mean over generated rows of the number of real balls around them, divided by k; 1 for equal sets, may be
    larger. coverage: share of real balls with a generated row inside.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(
    fake: Tensor, real: Tensor, k: int = K_PRECISION, k_density: int = K_DENSITY, tile: int = TILE
) -> Manifold:
    """All four, of generated rows (N, F) and real rows (M, F), on their device.

    Balls are closed for precision and recall, open for density and coverage, as in the authors' code. ADM's suite and
    torch-fidelity compute the same precision and recall, but with distances in float16 and float32.
    Memory beside the features: those of `nearest.tiles`. Time: 2 F (N^2 + M^2 + N M) operations in float64.
    Raises DataError if a set has no more than k rows.
    """
    fewest = min(len(fake), len(real))
    if fewest <= max(k, k_density):
        raise DataError(
            f"precision, recall, density and coverage look at {max(k, k_density)} neighbours of each image, but a set "
            f"has {fewest} images; give more than {max(k, k_density)} of both"
        )
    # A row is its own nearest neighbour, hence k + 1.
    real_squared = nearest_squared(real, real, max(k, k_density) + 1, tile).distances  # (M, k + 1)
    fake_radius = nearest_squared(fake, fake, k + 1, tile).distances[:, k, None] * (1 + EDGE)  # (N, 1)
    real_radius = real_squared[:, k] * (1 + EDGE)  # (M,), squared like the others
    dense_radius = real_squared[:, k_density] * (1 - EDGE)

    in_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    in_fake, covered = (torch.zeros(len(real), dtype=torch.bool, device=fake.device) for _ in range(2))
    pairs = torch.zeros((), dtype=torch.int64, device=fake.device)
    for i, j, squared in tiles(fake, real, tile):  # (tile, tile)
        rows, columns = slice(i, i + len(squared)), slice(j, j + squared.shape[1])
        in_real[rows] |= (squared <= real_radius[columns]).any(1)
        in_fake[columns] |= (squared <= fake_radius[rows]).any(0)
        inside = squared < dense_radius[columns]
        pairs += inside.sum()
        covered[columns] |= inside.any(0)
    return Manifold(
        precision=float(in_real.double().mean()),
        recall=float(in_fake.double().mean()),
        density=int(pairs) / (k_density * len(fake)),
        coverage=float(covered.double().mean()),
    )
