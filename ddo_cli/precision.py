"""Precision of network passes, for training and inference: TF32 switches and autocast. `auto` depends on the device.

TF32 is off in the whole process (`dist.init`) outside of the contexts here and of a training loop in tf32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ddo_cli import compilation
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.recipe.training import Precision

Device = torch.device | str
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolved(precision: Precision | None, device: Device) -> Precision:
    """The precision that is computed in; auto, or none, is TF32 on CUDA and float32 on a CPU.

    float32 leaves a GPU's tensor cores unused, and TF32 changes the log-ratio by less than 1 % of its spread.
    """
    if precision is None or precision == "auto":
        return "tf32" if torch.device(device).type == "cuda" else "float32"
    return precision


def settled(spec: SamplingRecipe, device: Device) -> SamplingRecipe:
    """The sampling settings with what this device computes by, for the record of what is drawn."""
    computed = {"precision": resolved(spec.precision, device), "compile": compilation.is_on(spec.compile, device)}
    return spec.model_copy(update=computed)


@contextlib.contextmanager
def inference_precision(precision: Precision | None, device: Device) -> Iterator[None]:
    """Precision of inference passes (sampling, features, autoencoding), independent of the training run's own.

    float32: without TF32; tf32: matrix products and convolutions in TensorFloat-32 where the device has it; bf16,
    fp16: torch's autocast.
    """
    precision = resolved(precision, device)
    with _switches_kept():
        allow_tf32(precision == "tf32")
        with torch.autocast(torch.device(device).type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
            yield


def decoding(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Precision of autoencoders: TF32 inside `inference_precision("tf32")`, exact float32 elsewhere; never autocast.

    On a CPU always float32: decoded images should not depend on what the CPU can do.
    """
    asked = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return inference_precision("tf32" if asked and device.type != "cpu" else "float32", device)


def training_precision(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast of a training step in bf16 or fp16. TF32 is switched by the loop, since backward passes need it, too."""
    if precision in _AUTOCAST:
        return torch.autocast(device.type, _AUTOCAST[precision])
    return contextlib.nullcontext()


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
