"""Features of vision transformers: DINOv2 ViT-L/14 for FD-DINOv2 as in EDM2, and CLIP ViT-B/32.

Both networks are built from installed code, never from downloaded code.
"""

import hashlib
import io
import warnings
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli.errors import CheckpointError, UsageError, reason
from ddo_cli.metrics.extractors import weights
from ddo_cli.metrics.extractors.base import Extractor, Precision
from ddo_cli.metrics.extractors.dinov2 import DinoV2
from ddo_cli.precision import Device

SIZE = 224  # pixels per side, of both networks

DINOV2_SIZES = {"width": 1024, "depth": 24, "heads": 16}
CLIP_SIZES = {"width": 768, "layers": 12, "patch": 32, "features": 512}


class VisionExtractor(Extractor):
    """A network of normalised images (B, 3, 224, 224) -> (B, F), after a resize without cropping.

    colours: mean and standard deviation of the channels in training, for images in [0, 1].
    """

    network_name: str
    colours: tuple[Sequence[float], Sequence[float]]

    def __init__(
        self, network: nn.Module, num_features: int, file: weights.WeightFile, device: Device, precision: Precision
    ) -> None:
        content = weights.content_sha256(network.state_dict())
        super().__init__(self.network_name, num_features, file.sha256, device, precision, content, file.is_published)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in self.colours)

    def _extract(self, images: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
        x = self._resized(images.to(torch.float32)) / 255  # (B, 3, 224, 224)
        return {"pool": self.network((x - self.mean) / self.std)}

    @abstractmethod
    def _resized(self, x: Tensor) -> Tensor:
        """Float images (B, 3, H, W) in 0..255, resized to the network's size."""


class DinoV2Extractor(VisionExtractor):
    """Class token of DINOv2 ViT-L/14, for FD-DINOv2, with EDM2's resize (arXiv 2312.02696).

    torch-fidelity's "dinov2-vit-l-14" resizes bilinearly without antialiasing, so its scores differ.
    """

    key, network_name = "fd_dinov2", "dinov2-vit-l-14-bicubic-antialias"
    colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
    resize = "224 x 224, bicubic with antialiasing, not clamped"

    def _resized(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True)


class ClipExtractor(VisionExtractor):
    """Image embedding of CLIP ViT-B/32, equal to torch-fidelity's "clip-vit-b-32" with its preprocessing.

    CLIP's own preprocessing (bicubic, then a crop) gives other scores.
    """

    key, network_name = "fd_clip", "clip-vit-b-32"
    colours = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    resize = "224 x 224, bilinear without antialiasing, corners as in TensorFlow 1"

    def _resized(self, x: Tensor) -> Tensor:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(x, size=(SIZE, SIZE), align_corners=False)


# --- Loading


def load_dinov2(
    path: str | None = None, device: Device = "cpu", precision: Precision = "float32", download: bool = False
) -> DinoV2Extractor:
    """DINOv2 with published weights, searched by `weights.find`.

    Raises CheckpointError if they are missing, damaged, or of another network (of another size, or with registers).
    """
    file = weights.require("fd_dinov2", path, download)
    remedy = f"give {weights.PUBLISHED['fd_dinov2'].names[0]} or its tensors as .safetensors"
    state = weights.read_tensors(file, remedy)
    with torch.device("meta"):  # no need to initialise 300 million parameters
        network = DinoV2(**DINOV2_SIZES)
    try:
        network.load_state_dict({key: tensor.to(torch.float32) for key, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{file.label} does not fit DINOv2 ViT-L/14 ({reason(error)}); {remedy}") from None
    return DinoV2Extractor(network, DINOV2_SIZES["width"], file, device, precision)


def load_clip(
    path: str | None = None, device: Device = "cpu", precision: Precision = "float32", download: bool = False
) -> ClipExtractor:
    """CLIP ViT-B/32 with published weights, searched by `weights.find`.

    The published file is a TorchScript archive, that is, code; it is opened only with the published hash. Other weights
    are read from .safetensors or .pth. Raises CheckpointError if they are missing, damaged, or of another network, and
    UsageError if the installed torch-fidelity has no CLIP.
    """
    try:
        from torch_fidelity.feature_extractor_clip import build_model
    except ImportError:
        raise UsageError("fd_clip needs torch-fidelity 0.4 or newer; run `pip install -U torch-fidelity`") from None
    file = weights.require("fd_clip", path, download)
    remedy = f"give the published {weights.PUBLISHED['fd_clip'].names[0]}, or its tensors as .safetensors"
    state = _archived(file) if file.is_published else weights.read_tensors(file, remedy)
    try:
        sizes = _clip_sizes(state)
        if sizes != CLIP_SIZES:
            raise ValueError(f"its sizes are {sizes} instead of {CLIP_SIZES}")
        with torch.random.fork_rng(devices=[]):  # build_model draws initial weights
            # float32, but rounded to float16, as the published weights are.
            network = build_model(dict(state), torch.float32).visual
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file.label} does not fit CLIP ViT-B/32 ({reason(error)}); {remedy}") from None
    return ClipExtractor(network, sizes["features"], file, device, precision)


def _archived(file: weights.WeightFile) -> dict[str, Tensor]:
    """Tensors of the published archive. It is hashed again, in case the file has changed since."""
    content = file.path.read_bytes()
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise CheckpointError(f"{file.label} has just been changed; start again when nothing writes to it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but the published format
        module = torch.jit.load(io.BytesIO(content), map_location="cpu")
    return dict(module.state_dict())


def _clip_sizes(state: dict[str, Tensor]) -> dict[str, int]:
    """The sizes in `CLIP_SIZES`, from a file's tensors. Raises KeyError for a file of another network."""
    patches = state["visual.conv1.weight"]  # (width, 3, patch, patch)
    return {
        "width": patches.shape[0],
        "layers": sum(key.startswith("visual.") and key.endswith(".attn.in_proj_weight") for key in state),
        "patch": patches.shape[-1],
        "features": state["text_projection"].shape[1],
    }
