"""Precision of network passes: TF32 switches, autocast, and that of inference (sampling, features, autoencoding)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ddo_cli import console
from ddo_cli.recipe.training import Precision

Device = torch.device | str
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def inference_precision(precision: Precision, device: Device) -> Iterator[None]:
    """Precision of inference passes, independent of the training run's own.

    float32: without TF32; tf32: matrix products and convolutions in TensorFloat-32 where the device has it; bf16,
    fp16: torch's autocast.
    """
    with _switches_kept():
        allow_tf32(precision == "tf32")
        with torch.autocast(torch.device(device).type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            yield


def decoding(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Precision of autoencoders: TF32 inside `inference_precision("tf32")`, exact float32 elsewhere; never autocast.

    The switch of matrix products tells which, since torch leaves that of convolutions on by default. On a CPU always
    float32: decoded images should not depend on what the CPU can do.
    """
    asked = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return inference_precision("tf32" if asked and device.type != "cpu" else "float32", device)


def training_precision(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast of a training step in bf16 or fp16; TF32 is a switch of the whole process (`set_training_precision`)."""
    if precision in _AUTOCAST:
        return torch.autocast(device.type, _AUTOCAST[precision])
    return contextlib.nullcontext()


def set_training_precision(precision: Precision) -> None:
    """Turns TF32 on or off for the whole process, and warns of reduced precision."""
    allow_tf32(precision == "tf32")
    if precision != "float32":
        console.warn(f"precision {precision}: log-ratios are small differences; the papers train in float32")


def allow_tf32(is_on: bool) -> None:
    """Allows or forbids TF32 in matrix products, convolutions and recurrences of the whole process.

    Torch has an old and a new set of switches, and reading the old one raises while they differ: so both are set.
    """
    torch.set_float32_matmul_precision("high" if is_on else "highest")
    torch.backends.cudnn.allow_tf32 = is_on
    for operation in _operations():  # the old switch leaves some to a switch above them when it is off
        operation.fp32_precision = "tf32" if is_on else "ieee"


@contextlib.contextmanager
def _switches_kept() -> Iterator[None]:
    """Restores both sets of switches at the end."""
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
