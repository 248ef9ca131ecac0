"""What the models of tokens share: the distribution that a token is drawn from, and the draw by one uniform number."""

from __future__ import annotations

import torch
from torch import Tensor

from ddo_cli.recipe.schema import SamplingRecipe


def sampled_log_prob(
    logits: Tensor, unconditional: Tensor | None, spec: SamplingRecipe, cfg_scale: float | Tensor | None = None
) -> Tensor:
    """Log-probabilities (..., levels) that tokens are drawn from, float64; levels cut off are -inf.

    In this order: guidance on logits, temperature, the top_k likeliest levels (and their ties), and of what is left
    the fewest likeliest levels that hold at least top_p of the probability.
    cfg_scale: of these tokens, as it broadcasts with the logits, where it is not spec's own.
    """
    logits = logits.to(torch.float64)
    scale = spec.cfg_scale if cfg_scale is None else cfg_scale
    if unconditional is not None and scale is not None:
        logits = unconditional + scale * (logits - unconditional)
    logits = logits / (spec.temperature or 1.0)
    if spec.top_k is not None and spec.top_k < logits.shape[-1]:
        least = logits.topk(spec.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if spec.top_p is not None and spec.top_p < 1:
        ordered, order = logits.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        prob = ordered.exp()
        likelier = prob.cumsum(-1) - prob  # mass of the levels before; 0 for the first, which is always kept
        cut = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, likelier >= spec.top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits.log_softmax(-1)


def inverse_cdf(log_prob: Tensor, uniform: Tensor) -> Tensor:
    """The token (...) at which the cumulative distribution of log_prob (..., levels) passes uniform (...) in [0, 1)."""
    cumulative = log_prob.exp().cumsum(-1)
    # Scaled to end in exactly 1, above every uniform number; a level of probability 0 is never the first above.
    return (cumulative / cumulative[..., -1:] <= uniform[..., None]).sum(-1)


def is_guided(spec: SamplingRecipe) -> bool:
    """Whether sampling needs the unconditional logits."""
    return spec.cfg_scale not in (None, 1.0)


def of_tokens(log_prob: Tensor, x: Tensor) -> Tensor:
    """Entries (B, L) of log_prob (B, L, levels) at the tokens x (B, L)."""
    return log_prob.gather(2, x[:, :, None])[:, :, 0]
