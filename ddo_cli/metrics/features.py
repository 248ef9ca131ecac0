"""Feature extractors behind Frechet distances: the embedded one, users' own, and Inception-v3 given its weights.

An extractor is its weights together with the preprocessing: its `name` stands for both, and numbers of different names
cannot be compared.
"""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ddo_cli import checkpoint, console
from ddo_cli.errors import CheckpointError, DataError, UsageError
from ddo_cli.files import sha256
from ddo_cli.metrics.digit_net import DigitNet

Metric = Literal["fd_embedded", "fid"]
EMBEDDED_EXTRACTOR = "embedded:extractor-digits32"
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity and pytorch-fid, and what FIDs rest on

# Networks that an extractor checkpoint may name: built from keyword options, with `features(images)` of float images
# (B, 3, 32, 32) in [-1, 1].
NETWORKS: dict[str, Callable[..., nn.Module]] = {"digit-net": DigitNet}
NETWORK_SIZE = 32


class Extractor(ABC):
    """uint8 images (B, 1 or 3, H, W) -> features (B, F) float32, on `device`.

    name: protocol and weights; key: what a distance of these features is called ("fid" for Inception-v3 only);
    sha256: of the weight file.
    """

    key: str

    def __init__(self, name: str, num_features: int, digest: str, device: torch.device | str) -> None:
        self.name, self.num_features, self.sha256 = name, num_features, digest
        self.device = torch.device(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, F). Grey images are repeated to three channels. Raises DataError if these are not images."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(
                f"items of type {images.dtype} and shape {tuple(images.shape[1:])} have no features; the extractor "
                f"{self.name} reads uint8 images with 1 or 3 channels"
            )
        images = images.to(self.device).expand(-1, 3, -1, -1)  # (B, 3, H, W)
        with torch.no_grad(), _exact_convolutions():
            return self._features(images).to(torch.float32)

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, F)."""


class NetworkExtractor(Extractor):
    """A small network from a checkpoint of kind "extractor", its images resized to 32 x 32."""

    key = "fd_embedded"

    def __init__(
        self, network: nn.Module, name: str, num_features: int, digest: str, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(name, num_features, digest, device)
        self.network = network.to(self.device).eval().requires_grad_(False)

    def _features(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32)
        if x.shape[2:] != (NETWORK_SIZE, NETWORK_SIZE):
            x = F.interpolate(x, (NETWORK_SIZE, NETWORK_SIZE), mode="bilinear", antialias=True)
        features: Tensor = self.network.features(x / 127.5 - 1)  # type: ignore[operator]
        return features


class InceptionExtractor(Extractor):
    """Inception-v3 as torch-fidelity runs it ("inception-v3-compat", 2048 features, bilinear resize as TensorFlow 1's).

    state: the network's tensors. Raises ValueError if they do not fit.
    """

    key = "fid"

    def __init__(self, state: dict[str, Tensor], digest: str, device: torch.device | str = "cpu") -> None:
        super().__init__("inception-v3-compat", 2048, digest, device)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # imports for seconds

        # Its constructor unpickles a file without restriction. It gets one that we have just written ourselves.
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        with torch.random.fork_rng(devices=[]):  # it initialises weights before loading them
            try:
                network = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=file)
            except RuntimeError as error:  # of load_state_dict: missing and unexpected keys, shapes
                raise ValueError(str(error)) from None
        self.network = network.to(self.device)

    def _features(self, images: Tensor) -> Tensor:
        (features,) = self.network(images)
        return features


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_extractor(source: str = EMBEDDED_EXTRACTOR, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a checkpoint of kind "extractor": a path or "embedded:<name>".

    Raises CheckpointError if it is missing, damaged, of another kind, or does not fit the network it names.
    """
    tensors, header, digest, _ = checkpoint.load(source, kind="extractor")
    config = header.get("config")
    config = config if isinstance(config, dict) else {}
    name = config.get("name")
    if not isinstance(name, str) or name not in NETWORKS:
        raise CheckpointError(
            f"{source}: its header names the network {name!r}; known: {', '.join(NETWORKS)}. Give another file, or a "
            "newer version of this program"
        )
    try:
        network = NETWORKS[name](**config.get("options", {}))
        network.load_state_dict(tensors)
        probe = network.features(torch.zeros(1, 3, NETWORK_SIZE, NETWORK_SIZE))  # type: ignore[operator]
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{source} does not fit the network '{name}' ({_short(error)}); its file is damaged, or of another version"
        ) from None
    _require_finite(source, tensors)
    if source.startswith(checkpoint.EMBEDDED):
        label = "embedded-" + source.removeprefix(checkpoint.EMBEDDED).removeprefix("extractor-")
    else:
        label = f"{name}-{digest[:8]}"
    return NetworkExtractor(network, label, probe.shape[1], digest, device)


def load_inception(path: str, device: torch.device | str = "cpu") -> InceptionExtractor:
    """Inception-v3 with the weights of a file: .safetensors, or a .pth of tensors only, read without running code.

    Raises CheckpointError if it is missing, not such a file, or of another network.
    """
    remedy = f"give {WEIGHTS_FILE} (torch-fidelity's and pytorch-fid's) or its tensors as .safetensors"
    file = checkpoint.resolve(path)
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        what = type(error).__name__  # torch's own text advises to load without restriction
        raise CheckpointError(f"{path} cannot be read as a file of tensors ({what}); {remedy}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} holds something else than tensors by name; {remedy}")
    state = dict(content)  # without the metadata of OrderedDict, so that files from before torch 0.4.1 load too
    _require_finite(path, state)
    try:
        return InceptionExtractor(state, sha256(file), device)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit Inception-v3 ({_short(error)}); {remedy}") from None


def select_extractor(
    metric: Metric, weights: str | None = None, extractor: str | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor of a metric. Without Inception weights, "fid" falls back to the embedded one, with a warning.

    weights: file of Inception weights, for "fid"; extractor: checkpoint that replaces the embedded extractor.
    Raises UsageError for a combination without meaning, CheckpointError as the loaders do.
    """
    if weights is not None and (metric != "fid" or extractor is not None):
        what = f"the metric '{metric}'" if metric != "fid" else f"the extractor {extractor}"
        raise UsageError(
            f"Inception weights {weights} have no effect with {what}; remove one of them, or use metric fid"
        )
    if weights is not None:
        return load_inception(weights, device)
    loaded = load_extractor(extractor or EMBEDDED_EXTRACTOR, device)
    if metric == "fid":
        console.warn(
            f"no Inception-v3 weights were given, so the extractor {loaded.name} is used instead: the number is "
            f"{loaded.key}, not an FID, and cannot be compared with published ones. For an FID give the file "
            f"{WEIGHTS_FILE}"
        )
    return loaded


def _require_finite(name: str, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name}: the tensor '{key}' holds values that are not finite; copy the file again")


def _short(error: Exception) -> str:
    """The first words of a message of another library, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:240] + " ..."


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Convolutions in float32 on GPUs that would round to TF32: a score must not depend on a run's precision."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
