"""Inception-v3 as FID uses it: the network of torch-fidelity, fed with weights that are read safely."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddo_cli.errors import CheckpointError
from ddo_cli.metrics.extractors import weights
from ddo_cli.metrics.extractors.base import Extractor, Precision, short

WEIGHTS_FILE = weights.PUBLISHED["fid"].names[0]  # what FIDs rest on
SPATIAL_CHANNELS = 7  # of the block's 768, as ADM's sFID keeps: 17 x 17 x 7 = 2023 numbers

# Our outputs by the names of torch-fidelity. Its "768" ends the pass right behind the block that "spatial" is of.
_THEIRS = {"pool": "2048", "logits": "logits_unbiased"}
_EARLY_END = "768"

# Images of a pass on a CPU, whatever batch is asked for: one takes 14 MB in the first layers (two of 64 x 147 x 147).
# Four keep all of `ddo fid` below 1.5 GB; eight are no faster and come to 1.6 GB, 256 would take 4 GB.
CPU_BATCH = 4


class InceptionExtractor(Extractor):
    """Inception-v3 as torch-fidelity runs it ("inception-v3-compat", bilinear resize to 299 as TensorFlow 1's).

    pool (B, 2048): global averages, for FID, KID, precision and recall. logits (B, 1008): without the bias, as the
    Inception Score of ADM and of torch-fidelity has them. spatial (B, 2023): the first 7 channels of the 1x1 branch of
    block mixed_6 (Mixed_6d here) after its ReLU, flattened as TensorFlow lays them out (row, column, channel), for
    sFID (Nash et al. 2021, arXiv 2103.03841; ADM's reference files).

    state: the network's tensors. Raises ValueError if they do not fit.
    """

    key = "fid"
    outputs = ("pool", "logits", "spatial")
    resize = "299 x 299, bilinear without antialiasing, corners as in TensorFlow 1"

    def __init__(
        self,
        state: dict[str, Tensor],
        digest: str,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
        is_published: bool = False,
    ) -> None:
        content = weights.content_sha256(state)
        super().__init__("inception-v3-compat", 2048, digest, device, precision, content, is_published)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # imports for seconds

        # Its constructor unpickles a file without restriction. It gets one that we have just written ourselves.
        with tempfile.NamedTemporaryFile() as file, torch.random.fork_rng(devices=[]):  # it initialises weights first
            torch.save(state, file)
            file.seek(0)
            del state  # 95 MB, where the caller keeps none
            try:
                network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], feature_extractor_weights_path=file
                )
            except RuntimeError as error:  # of load_state_dict: missing and unexpected keys, shapes
                raise ValueError(str(error)) from None
        # Its convolutions are 1.5 times as fast on CPUs with the channels innermost, and differ by rounding only.
        self.network = network.to(self.device, memory_format=torch.channels_last)

    def _extract(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        step = CPU_BATCH if self.device.type == "cpu" else max(len(images), 1)
        parts = [self._pass(part, outputs) for part in images.split(step)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _pass(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        asked = [name for name in outputs if name != "spatial"]
        # The network reads this list in every pass, and ends where its last entry is reached.
        self.network.features_list = [_THEIRS[name] for name in asked] or [_EARLY_END]
        with self._spatial("spatial" in outputs) as found:
            values = self.network(images.contiguous(memory_format=torch.channels_last))
        return {**(dict(zip(asked, values, strict=True)) if asked else {}), **found}

    @contextlib.contextmanager
    def _spatial(self, wanted: bool) -> Iterator[dict[str, Tensor]]:
        """Gets the key "spatial" in a pass inside the block, if wanted."""
        found: dict[str, Tensor] = {}

        def keep(_module: object, _inputs: object, output: Tensor) -> None:  # (B, 192, 17, 17), after the ReLU
            found["spatial"] = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)

        handle = self.network.Mixed_6d.branch1x1.register_forward_hook(keep) if wanted else None
        try:
            yield found
        finally:
            if handle is not None:
                handle.remove()


def load_inception(
    path: str | None, device: torch.device | str = "cpu", precision: Precision = "float32", download: bool = False
) -> InceptionExtractor:
    """Inception-v3 with the weights of a file: .safetensors, or a .pth of tensors only, read without running code.

    path: None for the places where `weights.find` looks. Raises CheckpointError if it is missing, not such a file, or
    of another network.
    """
    return from_found(weights.require("fid", path, download), device, precision)


def from_found(
    found: weights.Found, device: torch.device | str = "cpu", precision: Precision = "float32"
) -> InceptionExtractor:
    """The same for a file that `weights.find` found."""
    remedy = f"give {WEIGHTS_FILE} (torch-fidelity's and pytorch-fid's) or its tensors as .safetensors"
    try:
        return InceptionExtractor(
            weights.read_tensors(found, remedy), found.sha256, device, precision, found.is_published
        )
    except ValueError as error:
        raise CheckpointError(f"{found.label} does not fit Inception-v3 ({short(error)}); {remedy}") from None
