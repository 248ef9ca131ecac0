"""Processes started by torchrun or srun, or one without them. With `sharding` the only caller of torch.distributed."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ddo_cli import console
from ddo_cli.errors import UsageError
from ddo_cli.precision import allow_tf32

T = TypeVar("T")
# Collective timeout; long because rank 0 alone writes files.
_TIMEOUT = timedelta(hours=2)


def rank() -> int:
    """Number of this process; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def init(device: str | None = None) -> torch.device:
    """Joins the group that torchrun or srun started (NCCL on GPUs, gloo on CPUs); returns this process's device.

    Raises UsageError for a device that is not there, and under a srun of several tasks that does not say where they
    meet.
    """
    _check_device(device)
    _take_over_srun()
    # Numbers below 1e-38, such as silu(-90), cost a CPU a hundred times as much as others: a discriminator's training
    # steps took 2.6 times as long. Set before the first parallel work, whose threads take it over.
    torch.set_flush_denormal(True)
    # Torch lets convolutions use TF32 by default: what computes in it says so, see `precision`.
    allow_tf32(False)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        # Modulo, because a launcher may show each process its own GPU only.
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(torch.cuda.device_count(), 1)}"
        torch.cuda.set_device(device)
    if world_size() > 1 and not torch_dist.is_initialized():
        # NCCL takes the GPU's number from it. Without, it guesses that of the rank, wrongly on a second machine, and
        # connects in the first collective call, where a process that has failed shows as a hang.
        options: dict[str, Any] = {"device_id": torch.device(device)} if device.startswith("cuda") else {}
        with _stdout_to_stderr():
            backend = "nccl" if options else "gloo"
            torch_dist.init_process_group(backend, timeout=_TIMEOUT, **_after_restart(), **options)
    return torch.device(device)


def _after_restart() -> dict[str, Any]:
    """For `init_process_group` once torchrun has started all processes again (--max-restarts): names of their own.

    torchrun keeps one store for all restarts, where addresses of processes that have ended would be read.
    """
    if (count := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == "0":
        return {}
    store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
    return {"store": torch_dist.PrefixStore(count, store), "rank": rank, "world_size": size}


def _check_device(device: str | None) -> None:
    if device is not None and re.fullmatch(r"(cuda:|gpu:?)?\d{1,3}", device):
        number = re.sub(r"\D", "", device)
        raise UsageError(
            f"--device {device}: choose the GPU by CUDA_VISIBLE_DEVICES={number} before the command (of torchrun, a "
            "list such as 0,1), and give --device cuda"
        )
    if device not in (None, "cpu", "cuda", "mps"):
        raise UsageError(f"--device {device} is not known; use cuda, mps or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device here"
        raise UsageError(f"--device cuda: {why}; leave the option out or use cpu")
    if device == "mps":
        _check_mps()


def _check_mps() -> None:
    """Raises UsageError unless this is one process on a Mac whose GPU torch can use; says what is different there."""
    mps = torch.backends.mps
    if not mps.is_available():
        why = "torch finds no Apple GPU, or macOS is older than 14" if mps.is_built() else "this torch is not for Macs"
        raise UsageError(f"--device mps: {why}; leave the option out or use cpu")
    if world_size() > 1:
        raise UsageError(f"--device mps: {world_size()} processes cannot share an Apple GPU; start one, or use cpu")
    console.info(
        "device mps: not tried on a Mac by the authors. States of sampling are float32, and features are computed on "
        "the CPU: these GPUs have no float64. What needs it, such as discriminator guidance, is refused"
    )


def _take_over_srun() -> None:
    """Makes srun's tasks the processes of one run, as torchrun's are; else each would be a run of its own, all of them
    writing to the same directory.

    Only inside a step of several tasks: a batch script has SLURM's other variables as well.
    """
    slurm = os.environ
    tasks = int(slurm.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in slurm or tasks == 1 or "SLURM_PROCID" not in slurm:
        return
    if "MASTER_ADDR" not in slurm:
        raise UsageError(
            f"srun started {tasks} tasks, and MASTER_ADDR does not say where they meet; export MASTER_ADDR=$(scontrol "
            "show hostnames $SLURM_JOB_NODELIST | head -n 1), or start one task on each machine, and torchrun in it"
        )
    of_a_machine = str(-(-tasks // int(slurm.get("SLURM_STEP_NUM_NODES", "1"))))  # shares cores among decoders
    slurm.update(RANK=slurm["SLURM_PROCID"], WORLD_SIZE=str(tasks), LOCAL_RANK=slurm.get("SLURM_LOCALID", "0"))
    slurm.update(LOCAL_WORLD_SIZE=of_a_machine, MASTER_PORT=slurm.get("MASTER_PORT", "29500"))  # torchrun's port


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Gloo prints its connections on stdout, where `--json` promises a single object."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def shutdown() -> None:
    """Leaves the group once every process has come here."""
    if torch_dist.is_initialized():
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        torch_dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if world_size() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    torch_dist.broadcast_object_list(box)
    return box[0]


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(box, value)
    return box


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's share: every world_size-th item."""
    return items[rank() :: world_size()]


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with gradients averaged over processes (DistributedDataParallel); itself in one process.

    Buffers are equal on all processes from the start; they are broadcast before a pass only where passes change them.
    """
    if world_size() == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    statistics = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())
    # Not static_graph: with micro-batches (`no_sync`) the first step fails an assertion inside torch (2.14).
    return nn.parallel.DistributedDataParallel(
        module, device_ids=ids, broadcast_buffers=statistics, gradient_as_bucket_view=True
    )
