"""The arithmetic in which frozen networks make images of codes."""

from __future__ import annotations

import contextlib

import torch

from ddo_cli.arithmetic import arithmetic


def decoding(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """TensorFloat-32 inside where the caller's `arithmetic` is that, or else exact float32; never autocast.

    The caller is asked by the switch of products: torch has that of convolutions on unless somebody turns it off. On a
    CPU it is float32 whatever the switch says, as pictures made there should not depend on what the CPU can do.
    """
    asked = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return arithmetic("tf32" if asked and device.type != "cpu" else "float32", device)
