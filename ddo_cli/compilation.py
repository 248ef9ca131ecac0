"""torch.compile of networks, in place: weights keep their names, and every caller its module."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ddo_cli.trainable import Trainable

# Graphs of one piece of code: training and inference, each batch size, precision and resolution of a block has its own.
# Beyond torch's 8 the rest would run uncompiled.
_MOST_GRAPHS = 256


def is_on(choice: bool | None, device: torch.device | str) -> bool:
    """Whether a network is compiled; None, the recipe's default: not."""
    return bool(choice)


def compile_network(model: "Trainable") -> None:
    """Compiles the model's parts, see `Trainable.graphs`, when they are first called. A second call changes nothing.

    Graphs belong to the code, so that models of one class share them. A graph of training may round otherwise than one
    of inference: r of equal weights is within rounding of 0, where uncompiled it is 0. CUDA graphs (mode
    reduce-overhead) are not used: a call overwrites what the one before returned, which is the reference's prediction
    in training, and that of the predictor in sampling.
    """
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = 4 * _MOST_GRAPHS
    parts = model.graphs()
    for part in parts:
        if part._compiled_call_impl is None:
            # A whole network sees few batch sizes, and kernels of a fixed size are faster; the blocks of a sequence
            # see many lengths.
            part.compile(dynamic=False if len(parts) == 1 else None)
