"""Whole sets of items in model space, batch by batch: one pass of an autoencoder over all of them would not fit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.rng import RowRng

BATCH = 256


@torch.no_grad()
def encoded(
    model: LikelihoodModel, items: np.ndarray, rows: np.ndarray, *key: int | str, device: torch.device
) -> Tensor:
    """x0 of these rows of a set, (N, ...), on the CPU.

    key: names the random numbers of an encoder that draws, which are the same on every process and in every run.
    """
    parts = []
    for start in range(0, len(rows), BATCH):
        own = rows[start : start + BATCH]
        rng = RowRng.for_rows("encode", *key, rows=range(start, start + len(own)))
        parts.append(model.encode(torch.from_numpy(items[own]).to(device), rng).cpu())
    return torch.cat(parts)
