"""Weights, averages and optimizer state spread over processes (FSDP2, arXiv 2304.11277), and their state on disk.

Each process keeps its rows of every weight; the weights of a unit are gathered while it computes. With `dist` the only
caller of torch.distributed. One process shards nothing but saves its state in the same form, so a run continues with
any number of processes.
"""

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ddo_cli import checkpoint, dist, ledger
from ddo_cli.errors import CheckpointError
from ddo_cli.files import remove, system_error

REST = "rest.safetensors"  # beside the sharded tensors: the small ones, and the header
UNFINISHED = "unfinished-"


def shard(module: nn.Module, units: Sequence[nn.Module], methods: Sequence[str] = ()) -> None:
    """Shards the trainable weights in place: unit by unit, then what lies outside of units.

    methods: methods other than `forward` that use the weights (registered with FSDP2).
    Frozen weights (a tokenizer) and scalars stay whole on every process: the first are called separately, the second
    have no rows. `clip_grad_norm` averages the gradients of scalars.
    """
    if dist.world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Without a mesh FSDP would move weights to a GPU if there is one, even in a run on CPUs.
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.world_size(),))
    for parameter in module.parameters():  # rows of a channels-last weight do not lie side by side
        parameter.data = parameter.data.contiguous()
    whole = {parameter for parameter in module.parameters() if not parameter.requires_grad or not parameter.ndim}
    for unit in [*units, module]:
        fully_shard(unit, mesh=mesh, ignored_params=whole)
    for method in methods:
        register_fsdp_forward_method(module, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether its weights are sharded."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def own_rows(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, to change it in place; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gathered tensors, on every process; every process has to call it. Unsharded ones as they are."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scales gradients down to a norm of at most `most` over all processes, and returns the norm they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return nn.utils.clip_grad_norm_(parameters, most) if most < math.inf else nn.utils.get_total_norm(gradients)
    rows = [own_rows(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    for gradient in whole:
        dist.all_reduce_sum(gradient).div_(dist.world_size())
    squares = dist.all_reduce_sum(_sum_of_squares(rows)) + (_sum_of_squares(whole) if whole else 0)
    norm = squares.sqrt()
    if most < math.inf:
        factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for gradient in [*rows, *whole]:
            gradient.mul_(factor)
    return norm


def _sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


# --- On disk: one directory for each saved step; the newest one that is not damaged counts


def saved(directory: Path) -> list[Path]:
    """The complete states in `directory`, the newest first."""
    whole = [path for path in directory.glob("*") if path.name.isdecimal()]
    return dist.from_main(sorted(whole, key=lambda path: int(path.name), reverse=True))


def save(
    directory: Path, step: int, tensors: dict[str, Tensor], rest: dict[str, Tensor], header: dict[str, Any]
) -> None:
    """Writes a state (each process its rows of `tensors`, the main one `rest` and the header); the one before stays.

    A state gets its name when it is complete, so a kill at any time leaves one.
    """
    from torch.distributed import checkpoint as dcp

    target, unfinished = directory / f"{step:09d}", directory / f"{UNFINISHED}{step:09d}"
    if dist.is_main():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=unfinished, no_dist=dist.world_size() == 1)
    except dcp.CheckpointException as error:
        failed = next(filter(None, (system_error(failure) for failure, _ in error.failures.values())), None)
        if failed is None:
            raise
        failed.filename = str(directory)
        raise failed from None
    own = ledger.entries(unfinished.glob(f"__{dist.rank()}_*"))
    shards = {name: entry for part in dist.gathered(own) for name, entry in part.items()}
    if dist.is_main():
        checkpoint.save(unfinished / REST, rest, header)
        if (kept := ledger.of(directory)) is not None:
            further = ledger.entries(path for path in unfinished.iterdir() if path.name not in shards)
            kept.note_moved(unfinished, target, {**shards, **further})
        shutil.rmtree(target, ignore_errors=True)  # of the same step, by a run that started again
        os.replace(unfinished, target)
        states = sorted(path for path in directory.iterdir() if path.name.isdecimal() and path.name <= target.name)
        for older in directory.iterdir():
            if older not in states[-2:]:
                remove(older)
    dist.barrier()


def load(place: Path, tensors: dict[str, Tensor]) -> None:
    """Fills `tensors` with what `save` wrote, whatever the number of processes was. Raises CheckpointError."""
    from torch.distributed import checkpoint as dcp

    try:
        dcp.load(tensors, checkpoint_id=place, no_dist=dist.world_size() == 1)
    except (dcp.CheckpointException, RuntimeError, OSError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{place} cannot be read ({type(error).__name__}: {reason}); remove {place.parent}, and training starts "
            "again"
        ) from None
