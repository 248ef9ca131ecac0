"""Direct Discriminative Optimization: the GAN loss whose discriminator is a log-likelihood ratio (arXiv 2503.01103)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ddo_cli.recipe.training import ObjectiveName


class DdoSettings(NamedTuple):
    """Which loss, and its coefficients."""

    alpha: float | None  # weight of the fake term; None: the objective has none
    beta: float  # scale of the log-ratio
    divide_by_alpha: bool = False  # loss / max(alpha, 1), so that a sweep of alpha does not sweep the learning rate
    objective: ObjectiveName = "ddo"


class DdoLoss(NamedTuple):
    """The loss and what is worth plotting. All are scalars; everything but `loss` is detached."""

    loss: Tensor
    real_term: Tensor  # -E_real[logsigmoid(beta r)], log 2 at r = 0
    fake_term: Tensor  # -E_fake[logsigmoid(-beta r)], before alpha, log 2 at r = 0
    r_real: Tensor  # mean log-ratio of real rows
    r_fake: Tensor
    margin: Tensor  # r_real - r_fake
    r_square: Tensor  # mean of r^2 over all rows
    accuracy: Tensor  # share of rows whose r has the right sign; a tie counts one half


def ddo_loss(
    r_real: Tensor,
    r_fake: Tensor,
    alpha: float,
    beta: float,
    fake_weight: Tensor | None = None,
    divide_by_alpha: bool = False,
) -> DdoLoss:
    """L = -E_real[logsigmoid(beta r)] - alpha E_fake[logsigmoid(-beta r)] (arXiv 2503.01103, eq. 12).

    r_real, r_fake: log p_model - log p_ref, (B,) each, of log-likelihoods summed over all dimensions.
    fake_weight: (B,) factors of the fake rows, e.g. 0 for rows that lost their label; the mean stays over B rows.
    divide_by_alpha: divides by max(alpha, 1), so that a sweep of alpha does not sweep the learning rate.
    Raises ValueError if alpha or beta is not positive.
    """
    if alpha <= 0 or beta <= 0:
        raise ValueError(f"alpha = {alpha} and beta = {beta} must be positive")
    r_real, r_fake = at_least_float32(r_real), at_least_float32(r_fake)
    real_term = -logsigmoid(beta * r_real).mean()
    fake_rows = -logsigmoid(-beta * r_fake)  # (B,)
    fake_term = (fake_rows if fake_weight is None else fake_rows * fake_weight).mean()
    loss = real_term + alpha * fake_term
    if divide_by_alpha:
        loss = loss / max(alpha, 1.0)
    found = ratios(r_real, r_fake, torch.cat([r_real, -r_fake]))
    return DdoLoss(loss, real_term.detach(), fake_term.detach(), *found)


class Ratios(NamedTuple):
    """What every objective logs of its log-ratios: the last fields of its result."""

    r_real: Tensor
    r_fake: Tensor
    margin: Tensor
    r_square: Tensor
    accuracy: Tensor


@torch.no_grad()
def ratios(r_real: Tensor, r_fake: Tensor, right: Tensor) -> Ratios:
    """r_real, r_fake: (B,). right: of any length; positive where the discriminator is right, negative where wrong."""
    r_square = torch.cat([r_real, r_fake]).square().mean()
    means = r_real.mean(), r_fake.mean()
    return Ratios(*means, means[0] - means[1], r_square, (right.sign() + 1).mean() / 2)


def r_std(r_real: float, r_fake: float, r_square: float) -> float:
    """Standard deviation of r over all rows, of DdoLoss's means over any number of batches of one size.

    beta is well placed when beta * r_std is of order 1.
    """
    return math.sqrt(max(r_square - ((r_real + r_fake) / 2) ** 2, 0.0))


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is if that is more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
