"""Activation checkpointing (arXiv 1604.06174): memory of a backward pass for one more forward pass of each block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddo_cli.errors import UsageError
from ddo_cli.trainable import Trainable


def recompute_units(model: Trainable) -> None:
    """From now on the backward pass of `model` keeps only the inputs of its units and computes their insides again.

    Each unit becomes one of a derived class: a wrapping module would rename the weights in files, and a function kept
    in the unit that calls the unit's own `forward` is a cycle of references, with which every model ever trained stays
    in memory until the garbage collector's rarest pass. To be called before the model is sharded or wrapped, so that
    the second pass runs on gathered weights, too. A second call changes nothing.
    Raises UsageError if the model names no units.
    """
    for unit in units_of(model):
        if not isinstance(unit, _Recomputed):
            unit.__class__ = _recomputed(type(unit))  # type: ignore[arg-type]


def units_of(model: Trainable) -> Sequence[nn.Module]:
    """What can be recomputed of the model. Raises UsageError if it names nothing."""
    units = model.units()
    if not units:
        raise UsageError(
            f"activation_checkpointing = true: this {type(model).__name__} names no blocks to recompute; leave it out, "
            "and lower micro_batch where memory is short"
        )
    return units


class _Recomputed(nn.Module):
    """Comes before a unit's own class in the order of methods."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # sampling and scores
            return super().forward(*args, **kwargs)
        # With the generator's state restored, dropout (in pretraining) hits the same activations again.
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


@functools.cache
def _recomputed(unit_class: type[nn.Module]) -> type[nn.Module]:
    return type(unit_class.__name__, (_Recomputed, unit_class), {})
