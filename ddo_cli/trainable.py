"""What training asks of a module beside its loss. The defaults fit any network."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Loss(NamedTuple):
    """Mean loss over the rows of one forward pass, and the means of what is logged beside it."""

    loss: Tensor
    log: dict[str, Tensor]


def is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Biases, gains and norms: parameters that weight decay customarily leaves alone."""
    return parameter.ndim < 2


class Trainable(nn.Module):
    """Base of everything that `training.loop` trains: likelihood models, discriminators, classifiers, tokenizers."""

    shardable: ClassVar[bool] = False  # whether FSDP2 may spread its weights over the processes

    def units(self) -> Sequence[nn.Module]:
        """The repeated blocks, in order: what is sharded and checkpointed one by one. Empty: the network as a whole."""
        return ()

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether AdamW's weight decay leaves this parameter alone."""
        return is_vector(name, parameter)

    def start_training(self) -> None:
        """Called before training from scratch, to fetch what comes from other files. Raises DdoError."""

    def before_step(self) -> None:
        """Called before each optimizer step, e.g. to normalise weights in place (EDM2)."""
