"""Frechet distance between an image set and a reference."""

from __future__ import annotations

from typing import Any

import torch

from ddo_cli import console
from ddo_cli.data.items import ItemSet
from ddo_cli.engines.scoring import open_comparable, open_reference
from ddo_cli.metrics.features import Extractor, Metric, select_extractor
from ddo_cli.metrics.scorer import FrechetScorer, moments_of, own_batches

DEFAULT_REFERENCE = "embedded:digits32"
PUBLISHED_NUM = 50_000  # images behind a published FID; its bias grows as their number falls


def run(
    source: str,
    ref: str | None = None,
    metric: Metric = "fd_embedded",
    weights: str | None = None,
    extractor: str | None = None,
    batch: int = 256,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """{"num_images", "extractor", "extractor_sha256", "reference", and the distance under the extractor's key}.

    source: what `open_images` reads; ref: the same, or an .npz with mu and sigma; None: the embedded digits.
    weights: Inception-v3 weights of metric "fid"; extractor: checkpoint that replaces the embedded extractor.
    batch: images per network pass of one process. Images are shared out over the processes that torchrun started.
    Raises DataError, CheckpointError or UsageError for what cannot be used.
    """
    chosen = select_extractor(metric, weights, extractor, device)
    name = ref or DEFAULT_REFERENCE
    # Both sides are opened before the first network pass, so that a mistake costs no wait.
    images = open_comparable(source)
    reference = open_reference(name, chosen)
    warn_if_few(source, len(images.items), chosen)
    if isinstance(reference, ItemSet):
        warn_if_few(name, len(reference.items), chosen)
    scorer = FrechetScorer(chosen, reference, batch)
    scores = scorer.score_moments(moments_of(chosen, own_batches(images.items, batch)))
    return {
        "num_images": len(images.items),
        "extractor": chosen.name,
        "extractor_sha256": chosen.sha256,
        "reference": name,
        **scores,
    }


def warn_if_few(name: str, num: int, extractor: Extractor) -> None:
    """Warns where a distance of `num` images means little, or cannot be compared."""
    if num <= extractor.num_features:
        console.warn(
            f"{name}: {num} images for {extractor.num_features} features leave the covariance rank-deficient, and the "
            "distance far too large; use more images"
        )
    elif extractor.key == "fid" and num < PUBLISHED_NUM:
        console.warn(
            f"{name}: {num} images; published FIDs use {PUBLISHED_NUM}, and with fewer the FID is larger; compare it "
            "only with FIDs of as many images"
        )
