"""One training step of Direct Discriminative Optimization (arXiv 2503.01103) or a relative: from items to the loss."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli.codec import Encodable
from ddo_cli.likelihood import LikelihoodModel, repeat_draw
from ddo_cli.objectives.ddo import DdoLoss, DdoSettings, ddo_loss
from ddo_cli.objectives.relatives import PairwiseLoss, cca_loss, pairwise_loss
from ddo_cli.rng import StepRng
from ddo_cli.trainable import Loss, Objective

# Items as they lie on disk and their labels (-1: none), both (n, ...). None: the real items, under other labels.
Rows = tuple[Tensor | None, Tensor]


class DdoBatch(NamedTuple):
    """Rows and random numbers of one step: n real rows and n fake ones."""

    real: Encodable  # items as they lie on disk (n, ...), with the numbers that encoding them takes
    fake: Encodable | None  # None: the real ones again, under other labels
    label: Tensor  # (2n,), real rows first; -1: none
    draw: Any  # the model's, of n rows


def ddo_batch(model: LikelihoodModel, real: Rows, fake: Rows, rng: StepRng) -> DdoBatch:
    """All that a step takes from outside, on the CPU. Raises DataError for items that are not of this model."""
    encode_rng = rng("encode")
    inputs = [None if items is None else model.codec.prepare(items, encode_rng) for items, _ in (real, fake)]
    assert inputs[0] is not None, "real rows have items"
    label = torch.cat([real[1], fake[1]])
    return DdoBatch(inputs[0], inputs[1], label, model.draw(len(real[1]), rng("ddo")))


def ddo_step(
    model: LikelihoodModel, wrapped: nn.Module, batch: DdoBatch, *, ref: LikelihoodModel, settings: DdoSettings
) -> Loss:
    """The loss of a batch on the model's device, and what is logged beside it.

    model: p_theta, being trained; wrapped: its DDP or FSDP wrapper, or itself. ref: p_ref, frozen, from which the fake
    rows were sampled. The implicit discriminator is d(x) = sigmoid(beta r(x)), r = log p_theta(x) - log p_ref(x).
    """
    n, label = len(batch.label) // 2, batch.label
    real = model.codec.encode(*batch.real)
    x = torch.cat([real, real if batch.fake is None else model.codec.encode(*batch.fake)])  # (2n, ...)

    # One draw of (sigma, eps) for real and fake rows, for model and reference (section 3.2): r is a small difference
    # of two large bounds, which independent noise would drown.
    half = batch.draw
    draw = repeat_draw(half, 2)

    with torch.no_grad():
        ref_prediction = ref.predict(x, label, draw)
    r = wrapped(x, label, draw, ref_prediction)  # log p_theta(x) - log p_ref(x), (2n,)

    found = _loss(r[:n], r[n:], half.drop, label[:n] == label[n:], settings)

    # For the guard against divergence: log p_theta on data is log p_ref plus r, so it needs no further pass.
    ref_loss = -ref.log_lik(ref_prediction[:n], x[:n], half).mean()
    log = {**found._asdict(), "ref_loss": ref_loss}
    return Loss(log.pop("loss"), log)


def _loss(
    r_real: Tensor, r_fake: Tensor, drop: Tensor, is_match: Tensor, settings: DdoSettings
) -> DdoLoss | PairwiseLoss:
    """drop: rows whose labels were dropped, for classifier-free guidance; is_match: pairs of equal labels, both (n,).

    Where a label was dropped the fake row does not count: it was made for its label.
    """
    alpha, beta, divide_by_alpha, objective = settings
    labelled = 1 - drop.to(r_real.dtype)
    if objective in ("spin", "dpo"):  # L = -E[log sigmoid(beta (r_real - r_fake))]
        return pairwise_loss(r_real, r_fake, beta, fake_weight=labelled)
    assert alpha is not None, "given for these"
    # DDO: L = -E_data[log sigmoid(beta r)] - alpha E_ref[log(1 - sigmoid(beta r))]  (eq. 12); CCA's is the same with
    # images under other labels for fakes.
    if objective == "cca":
        return cca_loss(r_real, r_fake, drop | is_match, alpha, beta, divide_by_alpha)
    return ddo_loss(r_real, r_fake, alpha, beta, fake_weight=labelled, divide_by_alpha=divide_by_alpha)


def ddo_objective(model: LikelihoodModel, ref: LikelihoodModel, settings: DdoSettings) -> Objective:
    """Both parts, as the training loop takes them."""
    return Objective(partial(ddo_batch, model), partial(ddo_step, model, ref=ref, settings=settings))
