"""Binary cross-entropy of a real-or-generated discriminator, and how well it is calibrated (arXiv 2211.17091)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class DiscriminatorLoss(NamedTuple):
    """The loss and what is worth plotting. All are scalars; everything but `loss` is detached."""

    loss: Tensor  # log 2 where the logit is 0 everywhere
    accuracy_real: Tensor  # share of real rows with a positive logit; 0 counts one half
    accuracy_fake: Tensor  # share of generated rows with a negative logit
    logit_real: Tensor  # mean logit of real rows
    logit_fake: Tensor


def discriminator_loss(
    logit_real: Tensor, logit_fake: Tensor, weight_real: Tensor | None = None, weight_fake: Tensor | None = None
) -> DiscriminatorLoss:
    """-(E_real[w log d] + E_fake[w log(1 - d)]) / 2 with d = sigmoid(logit) (arXiv 2211.17091, eq. 6).

    logit_real, logit_fake: (B,) each; positive means real. The optimal logit is log p_real - log p_generated.
    weight_real, weight_fake: (B,), lambda(t) where times are not importance-sampled; see `noise`.
    """
    logit_real, logit_fake = logit_real.to(torch.float32), logit_fake.to(torch.float32)
    real_rows, fake_rows = softplus(-logit_real), softplus(logit_fake)  # -log d, -log(1 - d)
    if weight_real is not None:
        real_rows = real_rows * weight_real
    if weight_fake is not None:
        fake_rows = fake_rows * weight_fake
    return DiscriminatorLoss(
        loss=(real_rows.mean() + fake_rows.mean()) / 2,
        accuracy_real=_positive(logit_real.detach()),
        accuracy_fake=_positive(-logit_fake.detach()),
        logit_real=logit_real.detach().mean(),
        logit_fake=logit_fake.detach().mean(),
    )


def _positive(logit: Tensor) -> Tensor:
    return (logit.sign() + 1).mean() / 2


class Reliability(NamedTuple):
    """Predicted against observed share of real rows, per bin of equal width in d = sigmoid(logit); NaN where empty."""

    predicted: Tensor  # (bins,), mean d of the bin's rows
    observed: Tensor  # (bins,), share of them that is real
    num: Tensor  # (bins,) int64
    error: float  # expected calibration error: mean over rows of |predicted - observed| (arXiv 1706.04599, eq. 5)


def reliability(logit_real: Tensor, logit_fake: Tensor, bins: int = 10) -> Reliability:
    """How well d is calibrated: guidance follows the logit's gradient, so an overconfident one pushes too far."""
    d = torch.cat([logit_real, logit_fake]).detach().to(torch.float64).sigmoid()
    is_real = torch.cat([torch.ones_like(logit_real), torch.zeros_like(logit_fake)]).detach().to(torch.float64)
    index = (d * bins).long().clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins)
    predicted = torch.bincount(index, d, bins) / count  # 0 / 0 is NaN
    observed = torch.bincount(index, is_real, bins) / count
    error = float(((predicted - observed).abs().nan_to_num() * count).sum() / count.sum())
    return Reliability(predicted, observed, count, error)
