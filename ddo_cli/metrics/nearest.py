"""Distances between feature vectors in tiles, and nearest neighbours."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import DataError

TILE = 2048  # rows and columns of a tile: 32 MB in float64; our choice
# |x - y|^2 = |x|^2 + |y|^2 - 2 x.y loses the digits of small distances. Below this fraction of |x|^2 + |y|^2 it is set
# to 0, so that duplicates are exactly equal. Our choice: far above the rounding of float64; the features of one image
# differ by 1e-6 of their length when extracted in batches of another size.
ROUNDING = 1e-12


def tiles(x: Tensor, y: Tensor, tile: int = TILE) -> Iterator[tuple[int, int, Tensor]]:
    """(i, j, squared distances of x[i : i + tile] from y[j : j + tile]) over all pairs of rows, row tile by row tile.

    x: (N, F), y: (M, F), on one device. Computed in float64 about the mean of y: float32 would leave four or five
    digits of a distance in 2048 dimensions, too few to order neighbours.
    Memory beside x and y: two tiles of features and three of distances, in float64.
    """
    centre = torch.stack([part.sum(0, dtype=torch.float64) for part in y.split(tile)]).sum(0) / len(y)  # (F,)
    for i in range(0, len(x), tile):
        left = x[i : i + tile].to(torch.float64) - centre
        left_norms = left.square().sum(1)[:, None]
        for j in range(0, len(y), tile):
            right = y[j : j + tile].to(torch.float64) - centre
            norms = left_norms + right.square().sum(1)  # (tile, tile)
            squared = torch.addmm(norms, left, right.T, alpha=-2)
            yield i, j, torch.where(squared > ROUNDING * norms, squared, 0.0)


class Neighbours(NamedTuple):
    """The k nearest rows of each query, nearest first: distances (N, k) float64, and their positions (N, k) int64."""

    distances: Tensor
    rows: Tensor


def nearest(queries: Tensor, rows: Tensor, k: int = 1, tile: int = TILE) -> Neighbours:
    """The k rows (M, F) nearest to each of the queries (N, F), Euclidean. The order of equal distances is not defined.

    Raises DataError if there are fewer than k rows or the features differ in number.
    """
    squared, position = nearest_squared(queries, rows, k, tile)
    return Neighbours(squared.sqrt(), position)


def nearest_squared(queries: Tensor, rows: Tensor, k: int, tile: int = TILE) -> Neighbours:
    """`nearest` with squared distances, comparable with those of `tiles`."""
    if queries.shape[1] != rows.shape[1]:
        raise DataError(f"{queries.shape[1]} features cannot be compared with {rows.shape[1]}; use one extractor")
    if not 1 <= k <= len(rows):
        raise DataError(f"the {k} nearest of {len(rows)} images do not exist; choose between 1 and {len(rows)}")
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
    position = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for i, j, squared in tiles(queries, rows, tile):
        part = slice(i, i + len(squared))
        values, columns = squared.topk(min(k, squared.shape[1]), largest=False)
        values, columns = torch.cat([best[part], values], 1), torch.cat([position[part], columns + j], 1)
        best[part], order = values.topk(k, largest=False)
        position[part] = columns.gather(1, order)
    return Neighbours(best, position)
