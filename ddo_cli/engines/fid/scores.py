"""Scores from accumulated features and reference statistics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ddo_cli.engines.fid.inputs import Side
from ddo_cli.engines.fid.one_pass import Taken
from ddo_cli.metrics import frechet
from ddo_cli.metrics.extractors import clip_text
from ddo_cli.metrics.kid import kernel_distance
from ddo_cli.metrics.manifold import manifold
from ddo_cli.metrics.uncertainty import merged, uncertainty

MANIFOLD = ("precision", "recall", "density", "coverage")


def of_set(
    taken: Sequence[Taken],
    sides: Sequence[Side],
    metrics: Sequence[str],
    with_error: bool,
    kid_subset: int,
    captions: Sequence[str] = (),
) -> dict[str, Any]:
    """All scores of one set, by the extractors in their order.

    with_error: standard error and limit of the FID; captions: of each image, for the CLIP score.
    """
    scores: dict[str, Any] = {}
    for of_set, side in zip(taken, sides, strict=True):
        key = of_set.extractor.key
        if isinstance(of_set.extractor, clip_text.ClipTextExtractor):
            assert of_set.features is not None, "see fid"
            values = clip_text.scores(of_set.features.result(), of_set.extractor.of_texts(captions))
            scores |= {key: float(values.mean()), f"{key}_std_error": float(values.std() / len(values) ** 0.5)}
            continue
        # Another network's scores get its name, so that they are never taken for Inception's.
        end = "" if key == "fid" else f"_{key.removeprefix('fd_')}"
        if "pool" in of_set.moments:
            reference = frechet.reference(side.moments["pool"].mean, side.moments["pool"].cov)
            chunks = of_set.moments["pool"].result()
            if with_error and len(chunks) > 1:
                fid = uncertainty(reference, chunks)
                scores |= {key: fid.value, f"{key}_std_error": fid.std_error, f"{key}_infinity": fid.infinity}
            else:
                whole = merged(chunks)
                scores[key] = frechet.distance_to(reference, whole.mean, whole.cov)
        if "sfid" in metrics and "spatial" in of_set.moments:
            fake, real = merged(of_set.moments["spatial"].result()), side.moments["spatial"]
            scores[f"sfid{end}"] = frechet.frechet_distance(fake.mean, fake.cov, real.mean, real.cov)
        if of_set.score is not None:
            score = of_set.score.result()
            scores |= {f"is{end}": score.mean, f"is{end}_std": score.std}
        if of_set.features is not None and side.features is not None:
            scores |= _of_features(of_set.features.result(), side.features, metrics, kid_subset, end)
        if of_set.classes is not None and side.classes is not None:
            scores[f"{key}_per_class"] = [
                frechet.frechet_distance(fake.mean, fake.cov, real.mean, real.cov) if min(fake.n, real.n) > 1 else None
                for fake, real in zip(of_set.classes.result(), side.classes, strict=False)
            ]
        if of_set.nll is not None:
            nats = of_set.nll.result()
            scores |= {"nll_spatial_mean": float(nats.mean()), "nll_spatial_median": float(np.quantile(nats, 0.5))}
    return scores


def _of_features(fake: Tensor, real: Tensor, metrics: Sequence[str], kid_subset: int, end: str) -> dict[str, float]:
    """Scores that compare single images."""
    real, scores = real.to(fake), dict[str, float]()
    if "kid" in metrics:
        kid = kernel_distance(fake, real, subset_size=kid_subset)
        scores |= {f"kid{end}": kid.mean, f"kid{end}_std": kid.std}
    if chosen := [metric for metric in MANIFOLD if metric in metrics]:
        values = manifold(fake, real)._asdict()
        scores |= {f"{metric}{end}": values[metric] for metric in chosen}
    return scores
