"""Copies from the CPU to a GPU that wait for nothing."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. A copy to a GPU goes through pinned memory and waits neither for it nor for its work."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned memory until the copy is made
