"""The number format of network passes that nobody trains: of samples, their features, and codes of images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def arithmetic(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """float32: as it stands, whatever a run's own switches; tf32: products and convolutions in TensorFloat-32 where the
    device has it; bf16, fp16: torch's autocast."""
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, products.allow_tf32
    convolutions.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    products.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(torch.device(device).type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            yield
    finally:
        convolutions.fp32_precision, products.allow_tf32 = before
