"""Relatives of DDO that share its log-ratio r = log p_model - log p_ref: CCA, and the pairwise loss of SPIN and DPO."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ddo_cli.objectives.ddo import DdoLoss, at_least_float32, ddo_loss, ratios


def cca_loss(
    r_real: Tensor, r_other: Tensor, is_match: Tensor, alpha: float, beta: float, divide_by_alpha: bool = False
) -> DdoLoss:
    """L = -E[logsigmoid(beta r(x, c))] - alpha E[logsigmoid(-beta r(x, c'))] (CCA, arXiv 2410.09347; alpha: lambda).

    r_real, r_other: (B,) each, of the same images x under their labels c and under those of other images, c'.
    is_match: (B,) bool, rows with c' = c, or without any label. They are no negatives: as in the paper's experiments
    they count as positives once more, with weight 1.
    """
    again = is_match.to(r_other.dtype)
    found = ddo_loss(r_real, r_other, alpha, beta, fake_weight=1 - again, divide_by_alpha=divide_by_alpha)
    r_real, r_other = at_least_float32(r_real), at_least_float32(r_other)
    positives = -(again * logsigmoid(beta * r_other)).mean()
    loss = found.loss + (positives / max(alpha, 1.0) if divide_by_alpha else positives)
    right = torch.cat([r_real, torch.where(is_match, r_other, -r_other)])
    return DdoLoss(loss, found.real_term, found.fake_term, *ratios(r_real, r_other, right))


class PairwiseLoss(NamedTuple):
    """The loss and what is worth plotting, as in `DdoLoss`."""

    loss: Tensor  # log 2 at r_real = r_fake
    r_real: Tensor
    r_fake: Tensor
    margin: Tensor
    r_square: Tensor
    accuracy: Tensor  # share of pairs with r_real > r_fake; a tie counts one half


def pairwise_loss(r_real: Tensor, r_fake: Tensor, beta: float, fake_weight: Tensor | None = None) -> PairwiseLoss:
    """L = -E[logsigmoid(beta (r_real - r_fake))] (SPIN, arXiv 2402.10210, eq. 4.7; Diffusion-DPO, 2311.12908, eq. 14).

    r_real, r_fake: (B,) each, of images that are compared in pairs, row by row.
    fake_weight: (B,) factors of r_fake, 0 for pairs that lost their label: of these the real image alone counts.
    Raises ValueError if beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta = {beta} must be positive")
    r_real, r_fake = at_least_float32(r_real), at_least_float32(r_fake)
    difference = r_real - (r_fake if fake_weight is None else fake_weight * r_fake)
    return PairwiseLoss(-logsigmoid(beta * difference).mean(), *ratios(r_real, r_fake, difference))
