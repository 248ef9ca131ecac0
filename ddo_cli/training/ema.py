"""Exponential moving averages of weights, with a half-life in images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ema_decay(batch: int, half_life: float, n_images: int, ramp: float | None = None) -> float:
    """0.5^(batch / half-life), where the half-life is at most `ramp` times the images seen (EDM's warm-up).

    half_life: images; 0 gives 0, so that the average is the weights themselves.
    """
    if ramp is not None:
        half_life = min(half_life, ramp * n_images)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weights for parameters, in place; buffers are copied."""
    state = model.state_dict()
    trained = {name for name, _ in model.named_parameters()}
    for name, average in ema.items():
        if name in trained:
            average.lerp_(state[name].to(average.dtype), 1 - decay)
        else:
            average.copy_(state[name])
