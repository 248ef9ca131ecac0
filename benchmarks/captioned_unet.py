"""A U-Net on patches that reads captions of a few known words: `--model-file benchmarks/captioned_unet.py`.

What makes a network text to image for this program: its options have `prompts` and `negative_prompt`, and its model has
`tell`, by which labels become the numbers of prompts. Word embeddings are a part of the network and trained with it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddo_cli.codec import PixelCodec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel
from ddo_cli.errors import UsageError
from ddo_cli.models.registry import register
from ddo_cli.models.sides import square
from ddo_cli.models.toy.patch_unet import PatchUNet, PatchUNetOptions


class Options(PatchUNetOptions):
    words: tuple[str, ...]  # all that captions may hold
    length: int = 5  # most words of a caption
    prompts: tuple[str, ...] = ()  # that the labels mean
    negative_prompt: str = ""  # that the label -1 means


class CaptionedUNet(PatchUNet):
    """net(x, c_noise, label) -> F. label: the number of a prompt, -1 for none."""

    ids: Tensor  # (prompts + 1, length): a row of the table for each word at its place; that of the label -1 is last

    def __init__(self, channels: int, side: int, options: Options):
        super().__init__(channels, side, 0, options.patch, options.widths, options.depths, options.emb_width)
        self.rows = {word: k for k, word in enumerate(("", *options.words))}
        self.length = options.length
        self.words = nn.Embedding(len(self.rows) * self.length, options.emb_width)
        self.read = nn.Sequential(nn.SiLU(), nn.Linear(options.emb_width, options.emb_width))
        self.tell(options.prompts, options.negative_prompt)

    def tell(self, prompts: Sequence[str], negative: str) -> None:
        ids = torch.tensor([self._ids_of(text) for text in (*prompts, negative)], device=self.words.weight.device)
        self.register_buffer("ids", ids, persistent=False)

    def _ids_of(self, text: str) -> list[int]:
        words = text.split()
        unknown = [word for word in words if word not in self.rows]
        if unknown or len(words) > self.length:
            what = f"the word {unknown[0]!r} is not known" if unknown else f"it has more than {self.length} words"
            raise UsageError(f"prompt {text[:60]!r}: {what}; known: {', '.join(filter(None, self.rows))}")
        words += [""] * (self.length - len(words))
        return [place * len(self.rows) + self.rows[word] for place, word in enumerate(words)]

    def embedding(self, c_noise: Tensor, label: Tensor) -> Tensor:
        """(B, E): that of the noise level, plus what is read."""
        return super().embedding(c_noise, label) + self.read(self.words(self.ids[label]).sum(1))


class CaptionedModel(DiffusionModel):
    net: CaptionedUNet

    def tell(self, prompts: Sequence[str], negative: str) -> dict[str, Any]:
        """Gives labels these prompts; returns the entries of the configuration that change."""
        self.num_classes = len(prompts)
        self.net.tell(prompts, negative)
        self.options = self.options.model_copy(update={"prompts": tuple(prompts), "negative_prompt": negative})
        return {"num_classes": self.num_classes, "options": self.options.model_dump(mode="json")}


@register("captioned-unet", Options, DiffusionDrawOptions)
def build(shape: tuple[int, ...], num_classes: int, options: Options, draw_options: DiffusionDrawOptions) -> Any:
    net = CaptionedUNet(*square(shape), options).to(memory_format=torch.channels_last)
    return CaptionedModel(net, PixelCodec(shape), num_classes, options, draw_options)
