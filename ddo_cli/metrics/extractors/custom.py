"""Custom feature extractors: a TorchScript module or a Python file of the user.

Both are code; give only files that you trust. A TorchScript module runs in torch's interpreter without Python, but may
write files; a Python file can do anything. Pickled detectors of StyleGAN3 and EDM are not read, since they contain
Python source that would have to be run.
"""

import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddo_cli import checkpoint
from ddo_cli.errors import CheckpointError, DataError, UsageError, reason
from ddo_cli.files import sha256
from ddo_cli.metrics.extractors.base import Extractor, Precision
from ddo_cli.precision import Device, inference_precision

SUFFIXES = (".pt", ".ts", ".py")
PYTHON_CONTRACT = "extractor(device) -> a function of uint8 images (B, 3, H, W) that returns features (B, F)"
# Sides of the black images that the module is tried with until it accepts one; most modules accept any size.
PROBES = (64, 32, 224, 256, 299, 512)


class CustomExtractor(Extractor):
    """`function`: uint8 images (B, 3, H, W) on `device` -> features (B, F). It does its own resizing."""

    key = "fd_custom"
    resize = "by the extractor itself"

    def __init__(
        self, function: Callable[[Tensor], Any], path: str, digest: str, device: Device, precision: Precision
    ) -> None:
        super().__init__(f"custom-{Path(path).stem}-{digest[:8]}", 0, digest, device, precision)
        self.network, self.path = function, path
        self.is_fixed = Path(path).suffix != ".py"  # Python may read weights from other files
        self.num_features = self._probe()

    def _extract(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        try:
            features = self.network(images.contiguous())
        except Exception as error:
            raise DataError(
                f"the extractor {self.path} fails on images {tuple(images.shape)}: {_where(error)}"
            ) from None
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise DataError(f"the extractor {self.path} returns {kind}; it must return a tensor (B, F) of floats")
        num, width = len(images), self.num_features or "F"
        if features.ndim != 2 or len(features) != num or self.num_features not in (0, features.shape[1]):
            raise DataError(
                f"the extractor {self.path} returns {tuple(features.shape)} for {num} images; it must be ({num}, "
                f"{width})"
            )
        return {"pool": features.detach().to(self.device)}

    def _probe(self) -> int:
        """The number of features. Raises DataError if no probe is accepted."""
        for size in PROBES:
            images = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=self.device)
            try:
                with torch.no_grad(), inference_precision(self.precision, self.device):
                    return self._extract(images, ("pool",))["pool"].shape[1]
            except DataError as error:
                failure = error
        raise failure


def load_custom(path: str, device: Device = "cpu", precision: Precision = "float32") -> CustomExtractor:
    """The extractor of a TorchScript file (.pt, .ts) or of a Python file (.py), which is run.

    TorchScript: called with uint8 images, and with return_features=True if its forward has that argument, as StyleGAN's
    detectors have. Python: defines `extractor(device)`, which returns the function. Raises CheckpointError or
    UsageError if the file is neither, DataError if the function does not return features.
    """
    file = checkpoint.resolve(path)
    digest = sha256(file)
    load = _python if file.suffix == ".py" else _torchscript
    return CustomExtractor(load(file, path, torch.device(device)), path, digest, device, precision)


def _torchscript(file: Path, path: str, device: torch.device) -> Callable[[Tensor], Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript itself
            module = torch.jit.load(str(file), map_location=device).eval()
            arguments = {argument.name for argument in module.forward.schema.arguments}
    except (RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no TorchScript module with a forward method ({reason(error)}); write one by torch.jit.script "
            "or torch.jit.trace and .save, or give a .py file"
        ) from None
    options = {"return_features": True} if "return_features" in arguments else {}
    return lambda images: module(images, **options)


def _python(file: Path, path: str, device: torch.device) -> Callable[[Tensor], Any]:
    try:
        namespace: dict[str, Any] = {"__name__": "extractor", "__file__": str(file)}
        exec(compile(file.read_bytes(), str(file), "exec"), namespace)
        build = namespace.get("extractor")
        function = build(device) if callable(build) else None
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} fails: {_where(error)}") from None
    if not callable(build):
        raise UsageError(f"{path} defines no function 'extractor'; it must define {PYTHON_CONTRACT}")
    if not callable(function):
        raise UsageError(f"{path}: 'extractor' returns a {type(function).__name__}; it must be {PYTHON_CONTRACT}")
    return function


def _where(error: BaseException) -> str:
    """An error in the user's code on one line, with line number and file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {reason(error)}{place}"
