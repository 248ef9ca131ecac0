"""Activation checkpointing (arXiv 1604.06174): memory of a backward pass for one more forward pass of each block."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddo_cli.errors import UsageError
from ddo_cli.trainable import Trainable


def recompute_units(model: Trainable) -> None:
    """Activation checkpointing of each unit: the backward pass keeps its inputs only and computes the rest again.

    Each unit is given a derived class. A wrapping module would rename the weights in files; a replaced `forward` on
    the instance would be a reference cycle, which keeps a trained model in memory until garbage collection. To be
    called before sharding or wrapping, so that the second pass runs on gathered weights, too. A second call changes
    nothing. Raises UsageError if the model names no units.
    """
    for unit in units_of(model):
        if not isinstance(unit, _Recomputed):
            unit.__class__ = _recomputed(type(unit))  # type: ignore[arg-type]


def units_of(model: Trainable) -> Sequence[nn.Module]:
    """The model's units. Raises UsageError if it names none."""
    units = model.units()
    if not units:
        raise UsageError(
            f"activation_checkpointing = true: this {type(model).__name__} names no blocks to recompute; leave it out, "
            "and lower micro_batch where memory is short"
        )
    return units


class _Recomputed(nn.Module):
    """Mixed in before the unit's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # sampling and scores
            return super().forward(*args, **kwargs)
        # With the generator's state restored, dropout (in pretraining) hits the same activations again.
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


@functools.cache
def _recomputed(unit_class: type[nn.Module]) -> type[nn.Module]:
    return type(unit_class.__name__, (_Recomputed, unit_class), {})
