"""The number format of network passes that nobody trains: of samples, their features, and codes of images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def arithmetic(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """float32: as it stands, whatever a run's own switches; tf32: products and convolutions in TensorFloat-32 where the
    device has it; bf16, fp16: torch's autocast."""
    with _switches_kept():
        allow_tf32(precision == "tf32")
        with torch.autocast(torch.device(device).type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            yield


def allow_tf32(is_on: bool) -> None:
    """TensorFloat-32 in products, convolutions and recurrences, or in none of them; of the whole process.

    Torch has two sets of switches, and raises at whoever reads the old one while they differ. So both are set.
    """
    torch.set_float32_matmul_precision("high" if is_on else "highest")
    torch.backends.cudnn.allow_tf32 = is_on
    for operation in _operations():  # the old switch leaves some to a switch above them when it is off
        operation.fp32_precision = "tf32" if is_on else "ieee"


@contextlib.contextmanager
def _switches_kept() -> Iterator[None]:
    """Both sets as they were, whatever is done inside."""
    products = convolutions = None  # an old switch that differs from the new ones cannot be read, nor need it be
    with contextlib.suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    new = [operation.fp32_precision for operation in _operations()]
    try:
        yield
    finally:
        if products is not None:  # first: the old ones set new ones, too
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for operation, value in zip(_operations(), new, strict=True):
            operation.fp32_precision = value


def _operations() -> tuple[Any, ...]:
    cudnn, cpu = torch.backends.cudnn, torch.backends.mkldnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, cpu.matmul  # type: ignore[attr-defined]
