"""Z-Image: a ZImageTransformer2DModel with flow matching.

Convention of the network: its time is 1 - n, n the share of noise; its input (1 - n) x0 + n eps; it estimates x0 - eps,
which the pipeline negates. That is `precond.Flow`, not reversed. Latents are those of the autoencoder minus its shift,
times its scaling factor. The pipeline's guidance_scale is cfg_scale - 1. The condition is the last but one hidden state
of Qwen3, of the prompt as a user's message, without padding: `length` says how many of the tokens are the prompt's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli.errors import printable
from ddo_cli.models.diffusers.family import FACTOR, Condition, FlowFamily, Parts, image_side, linear_shift
from ddo_cli.models.diffusers.unet import Config

LENGTH = 512  # tokens of the pipeline
_LONGEST = 1 << 16  # positions along an axis; our choice, so that a damaged configuration builds nothing huge


class ZImage(FlowFamily):
    """Z-Image."""

    name, title = "z-image", "Z-Image"
    pipeline, network = "ZImagePipeline", "ZImageTransformer2DModel"
    texts = {"tokenizer": "Qwen2TokenizerFast", "text_encoder": "Qwen3Model"}
    fixed = {"siglip_feat_dim": None}
    sampling = {"sampler": "flow-euler", "steps": 50, "cfg_scale": 6.0, "batch": 1}
    reversed = False

    def check(self, full: Config) -> None:
        if (list(full["all_patch_size"]), list(full["all_f_patch_size"])) != ([2], [1]):
            raise ValueError(f"all_patch_size and all_f_patch_size must be [2] and [1], as in {self.title}")
        if not all(isinstance(length, int) and 1 <= length <= _LONGEST for length in full["axes_lens"]):
            raise ValueError(f"axes_lens = {printable(repr(full['axes_lens']), 60)} must be numbers up to {_LONGEST}")

    def side(self, full: Config, vae: Config) -> int:
        return image_side(vae)

    def multiple(self, full: Config) -> int:
        return 2 * FACTOR

    def largest(self, full: Config) -> int:
        return int(2 * FACTOR * min(full["axes_lens"][1:]))

    def dynamic_shift(self, scheduler: Config, num_steps: int, num_tokens: int) -> float:
        return linear_shift(scheduler, num_tokens, max_shift=1.15)

    def encode(self, parts: Parts, text: str) -> Condition:
        (state,), mask = parts.chat(text, LENGTH, thinking=True, layers=(-2,))
        own = state[mask]
        return {"tokens": F.pad(own, (0, 0, 0, LENGTH - len(own))), "length": mask.sum()}

    def evaluate(self, network: Any, x: Tensor, c_noise: Tensor, condition: Condition) -> Tensor:
        lengths = condition["length"].tolist()
        prompts = [tokens[:length] for tokens, length in zip(condition["tokens"], lengths, strict=True)]
        frames = list(x.unsqueeze(2).unbind())  # an image is a film of one
        return torch.stack(network(frames, c_noise, prompts, return_dict=False)[0]).squeeze(2)

    def units(self, network: Any) -> Sequence[nn.Module]:
        return [*network.noise_refiner, *network.context_refiner, *network.layers]
