"""Copies between CPU and GPU that wait for nothing."""

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. A copy to a GPU goes through pinned memory and waits neither for it nor for its work."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned memory until the copy is made


def snapshot(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Copies in memory of the CPU of the tensors as they are once the work given to a GPU so far is done.

    The second is to be called, from any thread, before they are read: it waits for them.
    """
    copies = {name: t.to("cpu", non_blocking=True) if t.is_cuda else t.clone() for name, t in tensors.items()}
    on_gpu = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if on_gpu is None:
        return copies, lambda: None
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> None:
        torch.cuda.set_device(on_gpu)  # a thread begins with the first one
        arrived.synchronize()

    return copies, wait
