"""Inception-v3 for FID: torch-fidelity's network with safely read weights."""

import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddo_cli.errors import CheckpointError, reason
from ddo_cli.metrics.extractors import weights
from ddo_cli.metrics.extractors.base import Extractor, Mode, Precision
from ddo_cli.precision import Device
from ddo_cli.transfer import to_device

WEIGHTS_FILE = weights.PUBLISHED["fid"].names[0]
SPATIAL_CHANNELS = 7  # of the block's 768, as in ADM's sFID: 17 x 17 x 7 = 2023 features

# torch-fidelity's names of the outputs. "768" ends the pass right after the block of "spatial".
_FIDELITY_NAMES = {"pool": "2048", "logits": "logits_unbiased"}
_EARLY_END = "768"
SIDE = 299  # of its images

# Images per pass on a CPU, for any batch: one takes 14 MB in the first layers (two of 64 x 147 x 147). With four,
# `ddo fid` stays below 1.5 GB; eight are no faster and need 1.6 GB, 256 would need 4 GB.
CPU_BATCH = 4


class InceptionExtractor(Extractor):
    """torch-fidelity's "inception-v3-compat", with the bilinear resize to 299 of TensorFlow 1.

    pool (B, 2048): global averages, for FID, KID, precision and recall. logits (B, 1008): without bias, for the
    Inception Score of ADM and torch-fidelity. spatial (B, 2023): first 7 channels of the 1x1 branch of block
    mixed_6 (Mixed_6d here) after its ReLU, flattened in TensorFlow's order (row, column, channel), for sFID (Nash et
    al. 2021, arXiv 2103.03841; ADM's reference files).

    state: the network's tensors. Raises ValueError if they do not fit.
    """

    key = "fid"
    outputs: tuple[str, ...] = ("pool", "logits", "spatial")
    resize = "299 x 299, bilinear without antialiasing, corners as in TensorFlow 1"
    network_name = "inception-v3-compat"

    def __init__(
        self, state: dict[str, Tensor], digest: str, device: Device = "cpu", precision: Precision = "float32"
    ) -> None:
        content, is_published = weights.content_sha256(state), digest == weights.PUBLISHED["fid"].sha256
        super().__init__(self.network_name, 2048, digest, device, precision, content, is_published)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # imports for seconds

        # Its constructor unpickles a file without restriction, so it gets one that was written here.
        with tempfile.NamedTemporaryFile() as file, torch.random.fork_rng(devices=[]):  # it draws initial weights
            torch.save(state, file)
            file.seek(0)
            del state  # 95 MB, unless the caller keeps it
            try:
                network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], feature_extractor_weights_path=file
                )
            except RuntimeError as error:  # of load_state_dict: missing and unexpected keys, shapes
                raise ValueError(str(error)) from None
        # On CPUs channels_last is 1.5 times as fast, with differences by rounding only.
        self.network = network.to(self.device, memory_format=torch.channels_last)

    def _extract(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        step = CPU_BATCH if self.device.type == "cpu" else max(len(images), 1)
        parts = [self._pass(part, outputs) for part in images.split(step)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _pass(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}

        def keep(_module: object, _inputs: object, output: Tensor) -> None:  # (B, 192, 17, 17), after the ReLU
            if "spatial" in outputs:
                features["spatial"] = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)

        names = [name for name in outputs if name != "spatial"]
        # The network reads this list in every pass, and stops at its last entry.
        self.network.features_list = [_FIDELITY_NAMES[name] for name in names] or [_EARLY_END]
        with self.network.Mixed_6d.branch1x1.register_forward_hook(keep):
            values = self.network(images.contiguous(memory_format=torch.channels_last))
        return features | (dict(zip(names, values, strict=True)) if names else {})


class CleanInceptionExtractor(InceptionExtractor):
    """The same network behind clean-fid's resize (arXiv 2104.11222): distances compare with its mode "clean"."""

    outputs = ("pool",)
    resize = "299 x 299, bicubic with antialiasing, not rounded"
    network_name = "inception-v3-clean"

    def _pass(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        resized = to_device(clean_resized(images.cpu()), self.device)
        # The network takes 8 bits only, of which these are none: they come in behind its own resize.
        pixels = ((resized - 128) / 128).contiguous(memory_format=torch.channels_last)
        blank = images.new_zeros((len(images), 3, SIDE, SIDE))
        with self.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _module, _inputs: (pixels,)):
            return super()._pass(blank, outputs)


def clean_resized(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) on the CPU -> float32 (B, 3, 299, 299) in [0, 255], each channel alone, as clean-fid."""
    planes = [
        np.asarray(Image.fromarray(plane.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for plane in images.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(planes)).clamp(0, 255).view(-1, 3, SIDE, SIDE)


def from_file(
    file: weights.WeightFile, device: Device = "cpu", precision: Precision = "float32", mode: Mode = "legacy"
) -> InceptionExtractor:
    """Inception-v3 with a file of `weights.find`. Raises CheckpointError if it is not of this network."""
    network = CleanInceptionExtractor if mode == "clean" else InceptionExtractor
    remedy = f"give {WEIGHTS_FILE} (torch-fidelity's and pytorch-fid's) or its tensors as .safetensors"
    try:
        return network(weights.read_tensors(file, remedy), file.sha256, device, precision)
    except ValueError as error:
        raise CheckpointError(f"{file.label} does not fit Inception-v3 ({reason(error)}); {remedy}") from None
