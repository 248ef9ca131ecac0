"""What training asks of a module beside its loss. The defaults fit any network."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Loss(NamedTuple):
    """Mean loss over the rows of one forward pass, and the means of what is logged beside it."""

    loss: Tensor
    log: dict[str, Tensor]


class Objective(NamedTuple):
    """What is trained for, in two parts, so that the next batch is made while the device works on this one.

    batch: (*rows, generators) -> everything random and every row of one forward pass: tensors on the CPU, in nested
    NamedTuples. It runs in a thread of its own, so it draws from those generators only and leaves the model alone.
    loss: (module, batch on the device) -> mean loss over its rows. The module is the model's DDP or FSDP wrapper.
    """

    batch: Callable[..., Any]
    loss: Callable[[nn.Module, Any], Loss]


def map_tensors(fn: Callable[[Tensor], Tensor], value: T) -> T:
    """The NamedTuple with `fn` applied to each of its tensors and those of tuples in it; the rest as it is."""
    if isinstance(value, Tensor):
        return fn(value)  # type: ignore[return-value]
    if not isinstance(value, tuple):
        return value
    entries = [map_tensors(fn, entry) for entry in value]
    return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)  # type: ignore[return-value]


def is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Biases, gains and norms: parameters that weight decay customarily leaves alone."""
    return parameter.ndim < 2


class Trainable(nn.Module):
    """Base of everything that `training.loop` trains: likelihood models, discriminators, classifiers, tokenizers."""

    shardable: ClassVar[bool] = False  # whether FSDP2 may spread its weights over the processes
    # Ends of the names of the layers that an adapter changes by default: the attention's projections.
    adapter_targets: Sequence[str] = ()

    def units(self) -> Sequence[nn.Module]:
        """The repeated blocks, in order: what is sharded and checkpointed one by one. Empty: the network as a whole."""
        return ()

    def graphs(self) -> Sequence[nn.Module]:
        """What torch.compile makes a graph of each: the blocks, else the network as a whole."""
        return self.units() or (self,)

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether AdamW's weight decay leaves this parameter alone."""
        return is_vector(name, parameter)

    def start_training(self) -> None:
        """Called before training from scratch, to fetch what comes from other files. Raises DdoError."""

    def before_step(self) -> None:
        """Called before each optimizer step, e.g. to normalise weights in place (EDM2)."""
