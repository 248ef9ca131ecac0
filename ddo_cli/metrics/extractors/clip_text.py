"""CLIP with both of its encoders, for the CLIP score (arXiv 2104.08718), of a folder that transformers has written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli import console
from ddo_cli.errors import CheckpointError, UsageError, printable, reason
from ddo_cli.extras import imported
from ddo_cli.files import sha256
from ddo_cli.metrics.extractors.base import Precision
from ddo_cli.metrics.extractors.vit import ClipExtractor, VisionExtractor
from ddo_cli.metrics.extractors.weights import WeightFile
from ddo_cli.precision import Device, inference_precision

KEY = "clip"
SCALE = 100.0  # as torchmetrics has it; the paper's is 2.5
_REMEDY = "give a folder as CLIPModel.save_pretrained writes it (--weights clip=FOLDER; in a recipe metric.weights)"
_TEXTS = 256  # captions per pass


class _Images(nn.Module):
    """Normalised images -> embeddings (B, E)."""

    def __init__(self, clip: Any):
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection

    def forward(self, x: Tensor) -> Tensor:
        embeddings: Tensor = self.visual_projection(self.vision_model(pixel_values=x).pooler_output)
        return embeddings


class ClipTextExtractor(VisionExtractor):
    """Image embeddings of CLIP with its own preprocessing, and embeddings of texts in the same space."""

    key, network_name, colours = KEY, "clip-of-transformers", ClipExtractor.colours

    def __init__(self, clip: Any, tokenizer: Any, file: WeightFile, device: Device, precision: Precision):
        self.size = clip.config.vision_config.image_size
        self.resize = f"shorter side to {self.size}, bicubic with antialiasing; centre crop (transformers)"
        super().__init__(_Images(clip), clip.config.projection_dim, file, device, precision)
        self.text_model = clip.text_model.to(self.device).eval().requires_grad_(False)
        self.text_projection = clip.text_projection.to(self.device).requires_grad_(False)
        self.tokenizer, self.length = tokenizer, clip.config.text_config.max_position_embeddings

    def _resized(self, x: Tensor) -> Tensor:
        """By the calls of CLIP's image processor in transformers: of bytes, and cropped from half the margin on."""
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        resized = resize(x.to(torch.uint8), [self.size], InterpolationMode.BICUBIC, antialias=True)
        top, left = ((side - self.size) // 2 for side in resized.shape[2:])
        return resized[:, :, top : top + self.size, left : left + self.size].to(torch.float32)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, E) of texts, each computed once."""
        different = list(dict.fromkeys(texts))
        if cut := [text for text in different if len(self.tokenizer(text).input_ids) > self.length]:
            shown = printable(repr(cut[0]), 60)
            console.warn(f"{len(cut)} captions are longer than CLIP's {self.length} tokens and cut, such as {shown}")
        parts = []
        for start in range(0, len(different), _TEXTS):
            batch = self.tokenizer(
                different[start : start + _TEXTS], padding="max_length", max_length=self.length, truncation=True,
                return_tensors="pt",
            ).to(self.device)  # fmt: skip
            with inference_precision(self.precision, self.device):
                hidden = self.text_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                parts.append(self.text_projection(hidden.pooler_output).to(torch.float32))
        row_of = {text: row for row, text in enumerate(different)}
        return torch.cat(parts)[torch.tensor([row_of[text] for text in texts], device=self.device)]


def scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(cos, 0) of each image (N, E) and its caption (N, E), (N,)."""
    return SCALE * F.cosine_similarity(images.double(), texts.double()).clamp(min=0)


def load(path: str | None, device: Device = "cpu", precision: Precision = "float32") -> ClipTextExtractor:
    """CLIP of a folder. Raises CheckpointError for one that does not hold it, UsageError without one."""
    if path is None:
        raise UsageError(f"the metric 'clip' needs the weights of CLIP; {_REMEDY}")
    transformers = imported("the metric 'clip' needs", "transformers", "t2i")
    folder, file = Path(path), Path(path, "model.safetensors")
    if not folder.is_dir():
        raise CheckpointError(f"{path} does not exist, or is no folder; {_REMEDY}", missing=path)
    for needed in (file, folder / "config.json"):
        if not needed.is_file():
            raise CheckpointError(f"{path} holds no {needed.name}; {_REMEDY}")
    transformers.utils.logging.disable_progress_bar()  # for a file that loads at once
    try:
        clip, found = transformers.CLIPModel.from_pretrained(
            folder, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # of transformers, tokenizers or safetensors, as the failure may be
        raise CheckpointError(f"{path}: CLIP cannot be loaded ({reason(error, 80)}); {_REMEDY}") from None
    if lacking := found["missing_keys"]:
        raise CheckpointError(f"{path} lacks weights of CLIP, such as {printable(min(lacking), 60)}; {_REMEDY}")
    return ClipTextExtractor(clip, tokenizer, WeightFile(file, sha256(file), False, path), device, precision)
