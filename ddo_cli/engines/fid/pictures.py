"""Pictures of `ddo fid`: the generated images that lie closest to the reference's, and histograms of likelihoods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddo_cli.engines.fid import one_pass
from ddo_cli.engines.fid.inputs import Side
from ddo_cli.engines.fid.one_pass import Passed, Source, Wanted
from ddo_cli.errors import UsageError
from ddo_cli.metrics.nearest import nearest
from ddo_cli.report import pictures

NEIGHBOURS = 3  # nearest images of the reference that are shown


def memorised(source: Source, passed: Passed, side: Side, count: int, path: Path) -> dict[str, Any]:
    """Draws the `count` images that are closest to one of the reference, with their nearest there; a row for each rank.

    Returns distances, positions and the picture's path. Called by the main process. Raises UsageError where the
    reference has no images.
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
        "picture": str(path),
    }


def _images(source: Source, rows: np.ndarray) -> np.ndarray:
    """uint8 (n, C, H, W) in the order of `rows`, which may repeat."""
    kept: dict[int, np.ndarray] = {}
    for numbers, images in source.batches(64, np.unique(rows)):
        kept |= dict(zip(numbers.tolist(), images.numpy(), strict=True))
    return np.stack([kept[row] for row in rows.tolist()])


def likelihoods(
    source: Source,
    passed: Passed,
    others: Sequence[Source],
    wanted: Wanted,
    asked: tuple[int, int | None, torch.device],
    cache: bool,
) -> dict[str, np.ndarray]:
    """Negative log-likelihood of sFID's features, nats of each image, by set (DG, Fig. 9). Collective.

    asked: batch, workers and device of the passes over `others`.
    """
    taken = passed.taken[0]
    assert taken.nll is not None, "asked for by the caller"
    values = {source.name: taken.nll.result()}
    alone = Wanted(wanted.extractor, gaussian=wanted.gaussian)
    for other in others:
        found = one_pass.run(other, [alone], *asked, other.name, cache=cache).taken[0].nll
        assert found is not None
        values[other.name] = found.result()
    return values


def histograms(values: Mapping[str, np.ndarray], path: Path) -> None:
    """Draws the sets' likelihoods over each other. Called by the main process."""
    pictures.histograms(dict(values), path, "nats per image under the data's Gaussian (sFID features)")
