"""What models of tokens share: an exact likelihood, and tokens drawn from it by one uniform number each."""

from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli.likelihood import LikelihoodModel, check_fields
from ddo_cli.recipe.schema import SamplingRecipe


class Cache(NamedTuple):
    """Keys and values of a block so far, (B, heads, L, head width) each; filled from position 0 on."""

    key: Tensor
    value: Tensor


class TokenModel(LikelihoodModel, ABC):
    """x: int64 tokens (B, L). `predict` returns log p of each token given the earlier ones, (B, L) nats, float32."""

    sampling_fields: ClassVar[tuple[str, ...]] = ("cfg_scale", "temperature", "top_k", "top_p")
    blocks: nn.ModuleList
    heads: int  # of each block
    adapter_targets = ("qkv", "out")

    def units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def log_lik(self, prediction: Tensor, x: Tensor, draw: Any) -> Tensor:
        """log p(x), exact, (B,) nats: the sum over all tokens."""
        return prediction.sum(1)

    def log_ratio(self, prediction: Tensor, ref_prediction: Tensor, x: Tensor, draw: Any) -> Tensor:
        """log p(x) - log p_ref(x), (B,): subtracted token by token, where the terms are small, and then summed."""
        return (prediction - ref_prediction).sum(1)

    def caches(self, num_rows: int, position: Tensor) -> list[Cache]:
        """Empty caches of all blocks, for the positions of an embedding (L, width).

        Of the type in which attention computes: keys are rounded as they come in, and not all of them at every step.
        """
        length, width = position.shape
        kind = position.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else position.dtype
        size = (2, num_rows, self.heads, length, width // self.heads)
        return [Cache(*position.new_empty(size, dtype=dtype).unbind()) for _ in self.blocks]

    def check_sampling(self, spec: SamplingRecipe) -> None:
        check_fields(self, spec, self.sampling_fields)


def sampled_log_prob(
    logits: Tensor, unconditional: Tensor | None, spec: SamplingRecipe, cfg_scale: float | Tensor | None = None
) -> Tensor:
    """Log-probabilities (..., levels) that tokens are drawn from, float64; levels cut off are -inf.

    In this order: guidance on logits, temperature, the top_k likeliest levels, and of what is left the fewest likeliest
    levels that hold at least top_p of the probability; ties with the last level that is kept are kept.
    logits: float32. cfg_scale: of these tokens, as it broadcasts with the logits, where it is not spec's own.
    """
    scale = spec.cfg_scale if cfg_scale is None else cfg_scale
    if unconditional is not None and scale is not None:
        logits = unconditional + scale * (logits - unconditional)
    logits = logits / (spec.temperature or 1.0)
    levels = logits.shape[-1]
    top_k, top_p = min(spec.top_k or levels, levels), spec.top_p or 1.0
    if top_k < levels or top_p < 1:
        ordered = logits.topk(top_k, dim=-1).values  # (..., top_k), decreasing
        logits = logits.masked_fill(logits < ordered[..., -1:], -torch.inf)
        if top_p < 1:
            prob = (ordered.to(torch.float64) - logits.to(torch.float64).logsumexp(-1, keepdim=True)).exp()
            likelier = prob.cumsum(-1) - prob  # mass of the levels before; 0 for the first, which is always kept
            least = ordered.masked_fill(likelier >= top_p, torch.inf).amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.log_softmax(-1, dtype=torch.float64)


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
