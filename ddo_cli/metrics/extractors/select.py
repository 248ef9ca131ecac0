"""Selects the feature extractor of a metric; and the small embedded extractor.

An extractor is weights and preprocessing: its `name` stands for both, and scores of different names do not compare.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli import checkpoint, console
from ddo_cli.errors import CheckpointError, UsageError, reason
from ddo_cli.metrics.extractors import custom, inception, vit
from ddo_cli.metrics.extractors import weights as weight_files
from ddo_cli.metrics.extractors.base import Extractor, Mode, Precision
from ddo_cli.metrics.extractors.digit_net import DigitNet
from ddo_cli.precision import Device

# Frechet distances, by the key of their extractor. sFID, IS, KID, precision and recall use that of "fid".
Metric = Literal["fd_embedded", "fid", "fd_dinov2", "fd_clip", "fd_custom"]
EMBEDDED_EXTRACTOR = "embedded:extractor-digits32"

# Networks of extractor checkpoints: built from keyword options, with `features(images)` of float images (B, 3, 32, 32)
# in [-1, 1].
NETWORKS: dict[str, Callable[..., nn.Module]] = {"digit-net": DigitNet}
NETWORK_SIZE = 32


class NetworkExtractor(Extractor):
    """A small network from a checkpoint of kind "extractor", its images resized to 32 x 32."""

    key = "fd_embedded"
    resize = "32 x 32, bilinear with antialiasing"

    def __init__(
        self,
        network: nn.Module,
        name: str,
        num_features: int,
        digest: str,
        device: Device = "cpu",
        precision: Precision = "float32",
        is_published: bool = False,
    ) -> None:
        super().__init__(name, num_features, digest, device, precision, is_published=is_published)
        self.network = network.to(self.device).eval().requires_grad_(False)

    def _extract(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        x = images.to(torch.float32)
        if x.shape[2:] != (NETWORK_SIZE, NETWORK_SIZE):
            x = F.interpolate(x, (NETWORK_SIZE, NETWORK_SIZE), mode="bilinear", antialias=True)
        return {"pool": self.network.features(x / 127.5 - 1)}  # type: ignore[operator]


# --- Loading


def load_extractor(
    source: str = EMBEDDED_EXTRACTOR, device: Device = "cpu", precision: Precision = "float32"
) -> Extractor:
    """The extractor of a checkpoint of kind "extractor": a path or "embedded:<name>".

    Raises CheckpointError if it is missing, damaged, of another kind, or does not fit the network it names.
    """
    tensors, header, digest, _ = checkpoint.load(source, kind="extractor")
    config = header["config"] if isinstance(header.get("config"), dict) else {}
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
            f"{source} does not fit the network '{name}' ({reason(error)}); its file is damaged, or of another version"
        ) from None
    weight_files.require_finite(source, tensors)
    is_embedded = source.startswith(checkpoint.EMBEDDED)
    stem = source.removeprefix(checkpoint.EMBEDDED).removeprefix("extractor-")
    label = f"embedded-{stem}" if is_embedded else f"{name}-{digest[:8]}"
    return NetworkExtractor(network, label, probe.shape[1], digest, device, precision, is_embedded)


def select_extractor(
    metric: Metric,
    weights: str | None = None,
    extractor: str | None = None,
    device: Device = "cpu",
    precision: Precision = "float32",
    download: bool = False,
    mode: Mode = "legacy",
) -> Extractor:
    """The extractor of a metric. Without Inception weights, "fid" falls back to the embedded one, with a warning.

    weights: file of the published network of "fid", "fd_dinov2" or "fd_clip"; None: searched by `weights.find`.
    extractor: replaces the embedded extractor: a checkpoint (.safetensors) or the user's code (.pt and .ts:
    TorchScript; .py: Python, which is run). download: fetch missing published weights. mode: of Inception's images.
    Raises UsageError for a combination without meaning, CheckpointError as the loaders do.
    """
    is_published = metric in weight_files.PUBLISHED
    if weights is not None and (not is_published or extractor is not None):
        reason = f"the metric '{metric}'" if not is_published else f"the extractor {extractor}"
        raise UsageError(
            f"weights {weights} have no effect with {reason}; remove one of them, or use metric fid, fd_dinov2 or "
            "fd_clip"
        )
    if metric in ("fd_dinov2", "fd_clip") and mode == "legacy":
        if extractor is not None:
            raise UsageError(f"the extractor {extractor} has no effect with the metric '{metric}'; remove one of them")
        load = vit.load_dinov2 if metric == "fd_dinov2" else vit.load_clip
        return load(weights, device, precision, download)
    if metric == "fid" and extractor is None:
        file = weight_files.find("fid", weights, download)
        if file is not None:
            return inception.from_file(file, device, precision, mode)
    if mode == "clean":
        raise UsageError(
            f"--mode clean is how clean-fid resizes images for Inception-v3, and the extractor is "
            f"{extractor or (EMBEDDED_EXTRACTOR if metric == 'fid' else metric)}; give Inception's weights (--weights)"
        )
    if metric == "fd_custom" and (extractor is None or not _is_code(extractor)):
        raise UsageError(
            f"fd_custom needs an extractor of the user's ({', '.join(custom.SUFFIXES)}), not {extractor}; give its file"
        )
    source = extractor or EMBEDDED_EXTRACTOR
    loaded = (custom.load_custom if _is_code(source) else load_extractor)(source, device, precision)
    if metric == "fid":
        console.warn(
            f"the extractor {loaded.name} stands in for Inception-v3: the number is {loaded.key}, not an FID, and does "
            "not compare with published figures; `ddo fid --download` fetches Inception's weights"
        )
    return loaded


def _is_code(source: str) -> bool:
    return not source.startswith(checkpoint.EMBEDDED) and Path(source).suffix.lower() in custom.SUFFIXES
