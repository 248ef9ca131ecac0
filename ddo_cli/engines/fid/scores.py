"""The figures of `ddo fid`: what one pass has accumulated, against the reference's side. No image is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddo_cli.engines.fid.inputs import Side
from ddo_cli.engines.fid.one_pass import Taken
from ddo_cli.metrics import frechet
from ddo_cli.metrics.kid import kernel_distance
from ddo_cli.metrics.manifold import manifold
from ddo_cli.metrics.uncertainty import merged, uncertainty

MANIFOLD = ("precision", "recall", "density", "coverage")


def of_set(
    taken: Sequence[Taken], sides: Sequence[Side], metrics: Sequence[str], with_error: bool = False
) -> dict[str, Any]:
    """All figures of one set, by the extractors in their order. with_error: standard error and limit of the FID."""
    found: dict[str, Any] = {}
    for one, side in zip(taken, sides, strict=True):
        found |= _of_extractor(one, side, metrics, with_error)
    return found


def _of_extractor(one: Taken, side: Side, metrics: Sequence[str], with_error: bool) -> dict[str, Any]:
    key, found = one.extractor.key, dict[str, Any]()
    # Another network's figures get its name, so that they are never taken for Inception's.
    end = "" if key == "fid" else f"_{key.removeprefix('fd_')}"
    if "pool" in one.moments and side.pool is not None:
        reference = frechet.reference(side.pool.mean, side.pool.cov)
        chunks = one.moments["pool"].result()
        if with_error and len(chunks) > 1:
            sure = uncertainty(reference, chunks)
            found |= {key: sure.value, f"{key}_std_error": sure.std_error, f"{key}_infinity": sure.infinity}
        else:
            whole = merged(chunks)
            found[key] = frechet.distance_to(reference, whole.mean, whole.cov)
    if "sfid" in metrics and "spatial" in one.moments and side.spatial is not None:
        spatial = merged(one.moments["spatial"].result())
        found[f"sfid{end}"] = frechet.frechet_distance(spatial.mean, spatial.cov, side.spatial.mean, side.spatial.cov)
    if one.score is not None:
        score = one.score.result()
        found |= {f"is{end}": score.mean, f"is{end}_std": score.std}
    if one.features is not None and side.features is not None:
        fake, real = one.features.result(), side.features.to(one.features.result())
        if "kid" in metrics:
            kid = kernel_distance(fake, real)
            found |= {f"kid{end}": kid.mean, f"kid{end}_std": kid.std}
        if chosen := [metric for metric in MANIFOLD if metric in metrics]:
            values = manifold(fake, real)._asdict()
            found |= {f"{metric}{end}": values[metric] for metric in chosen}
    if one.classes is not None and side.classes is not None:
        found[f"{key}_per_class"] = [
            frechet.frechet_distance(fake.mean, fake.cov, real.mean, real.cov) if min(fake.n, real.n) > 1 else None
            for fake, real in zip(one.classes.result(), side.classes, strict=False)
        ]
    if one.nll is not None:
        nats = one.nll.result()
        found |= {"nll_spatial_mean": float(nats.mean()), "nll_spatial_median": float(np.quantile(nats, 0.5))}
    return found
