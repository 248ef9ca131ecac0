"""Maximum likelihood: the loss of pretraining, and of the control beside a finetuning."""

import math
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ddo_cli.codec import Encodable
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.rng import StepRng
from ddo_cli.trainable import Loss, Objective


class LikelihoodBatch(NamedTuple):
    """Rows and random numbers of one step."""

    inputs: Encodable  # items as they lie on disk (n, ...), with the numbers that encoding them takes
    label: Tensor  # (n,); -1: none
    draw: Any  # the model's, of n rows


def likelihood_step(model: LikelihoodModel, wrapped: nn.Module, batch: LikelihoodBatch) -> Loss:
    """Negative log-likelihood (or bound) per dimension. wrapped: the model's DDP or FSDP wrapper, or itself."""
    log_lik = wrapped(model.codec.encode(*batch.inputs), batch.label, batch.draw)
    return Loss(-log_lik.mean() / math.prod(model.codec.state_shape), {})


def plain_batch(model: LikelihoodModel, items: Tensor, label: Tensor, rng: StepRng) -> LikelihoodBatch:
    """Real rows with the random numbers that `ddo_step.ddo_batch` gives them, so that both are compared in pairs."""
    return LikelihoodBatch(model.codec.prepare(items, rng("encode")), label, model.draw(len(label), rng("ddo")))


def plain_objective(model: LikelihoodModel) -> Objective:
    """What a control is trained for, on the real rows alone: no fake row, and no pass of the reference."""
    return Objective(partial(plain_batch, model), partial(likelihood_step, model))
