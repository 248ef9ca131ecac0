"""Pictures of `ddo fid`: the generated images that lie closest to the reference's, and histograms of likelihoods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddo_cli import dist, pictures
from ddo_cli.engines import fid_inputs, fid_pass
from ddo_cli.engines.fid_inputs import Side
from ddo_cli.engines.fid_pass import Passed, Source, Wanted
from ddo_cli.errors import UsageError
from ddo_cli.metrics.nearest import nearest

NEIGHBOURS = 3  # nearest images of the reference that are shown


def memorised(source: Source, passed: Passed, side: Side, count: int, path: Path) -> dict[str, Any]:
    """Draws the `count` images that are closest to one of the reference, with their nearest there; a row for each rank.

    Returns distances and positions. Raises UsageError where the reference has no images.
    """
    taken = passed.taken[0]
    if side.stream is None or side.features is None or taken.features is None:
        raise UsageError("--nearest needs the reference's images, not statistics; give images as --ref")
    fake = taken.features.result()
    found = nearest(fake, side.features.to(fake), NEIGHBOURS)
    order = found.distances[:, 0].argsort()[:count]
    rows = {"generated": _images(source, order.numpy())}
    for rank in range(NEIGHBOURS):
        rows[f"nearest {rank + 1}"] = _images(side.stream, found.rows[order, rank].cpu().numpy())
    pictures.image_rows(rows, path)
    return {
        "rows": order.tolist(),
        "nearest_rows": found.rows[order, 0].tolist(),
        "distances": found.distances[order, 0].tolist(),
        "median_distance": float(found.distances[:, 0].median()),
    }


def _images(source: Source, rows: np.ndarray) -> np.ndarray:
    """uint8 (n, C, H, W) in the order of `rows`, which may repeat."""
    kept: dict[int, np.ndarray] = {}
    for numbers, images in source.batches(64, np.unique(rows)):
        kept |= dict(zip(numbers.tolist(), images.numpy(), strict=True))
    return np.stack([kept[row] for row in rows.tolist()])


def likelihoods(
    source: Source, passed: Passed, others: Sequence[str], wanted: Wanted, batch: int, device: torch.device, path: Path
) -> None:
    """Histograms of the negative log-likelihood of sFID's features, of the scored set and of others (DG, Fig. 9)."""
    taken = passed.taken[0]
    assert taken.nll is not None, "asked for by the caller"
    values = {source.name: taken.nll.result()}
    for name in others:
        alone = Wanted(wanted.extractor, gaussian=wanted.gaussian)
        found = fid_pass.run(fid_inputs.comparable(name), [alone], batch, None, device, name).taken[0].nll
        assert found is not None
        values[name] = found.result()
    if dist.is_main():
        pictures.histograms(values, path, "nats per image under the data's Gaussian (sFID features)")
