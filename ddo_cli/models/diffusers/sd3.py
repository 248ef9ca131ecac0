"""Stable Diffusion 3 and 3.5: an SD3Transformer2DModel with flow matching (arXiv 2403.03206).

Convention of the network: its time is 1000 n, n the share of noise; its input (1 - n) x0 + n eps; it estimates the
velocity eps - x0. That is `precond.Flow`, reversed. Latents are those of the autoencoder minus its shift, times its
scaling factor. The pipeline's steps are even in n before the shift s n / (1 + (s - 1) n) of its scheduler, which is 3
in the published ones. The condition is the last but one states of two CLIP encoders side by side, filled up with zeros,
followed by T5's last state; and both CLIP encoders' projected outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddo_cli.errors import printable
from ddo_cli.models.diffusers.family import FACTOR, Condition, FlowFamily, Parts, linear_shift
from ddo_cli.models.diffusers.unet import Config

T5_LENGTH = 256  # of the pipeline


class StableDiffusion3(FlowFamily):
    """3 and 3.5."""

    name, title = "sd3", "Stable Diffusion 3"
    pipeline, network = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
    texts = {
        "tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer", "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_3": "T5TokenizerFast", "text_encoder_3": "T5EncoderModel",
    }  # fmt: skip
    fixed = {"patch_size": 2}
    # Without add_q_proj: the last block's queries of the text change nothing.
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "to_add_out")
    sampling = {"sampler": "flow-euler", "steps": 28, "cfg_scale": 7.0, "batch": 1}

    def check(self, full: Config) -> None:
        side, largest = full["sample_size"], full["pos_embed_max_size"]
        if not isinstance(side, int) or not 2 <= side <= 2 * int(largest or 0) or side % 2:
            raise ValueError(
                f"sample_size = {printable(repr(side), 40)} must be an even side of latents, at most twice "
                f"pos_embed_max_size = {printable(repr(largest), 40)}"
            )

    def side(self, full: Config, vae: Config) -> int:
        return int(FACTOR * full["sample_size"])

    def multiple(self, full: Config) -> int:
        return 2 * FACTOR

    def largest(self, full: Config) -> int:
        return int(2 * FACTOR * full["pos_embed_max_size"])

    def dynamic_shift(self, scheduler: Config, num_steps: int, num_tokens: int) -> float:
        return linear_shift(scheduler, num_tokens, max_shift=1.16)

    def shares(self, num_steps: int) -> None:
        return None

    def encode(self, parts: Parts, text: str) -> Condition:
        (first, pooled), (second, pooled_2) = parts.clip("", text), parts.clip("_2", text)
        long = parts["text_encoder_3"](parts.tokens("tokenizer_3", text, T5_LENGTH)["input_ids"])[0][0]
        clip = torch.cat([first, second], dim=-1)
        clip = F.pad(clip, (0, long.shape[-1] - clip.shape[-1]))
        return {"tokens": torch.cat([clip, long]), "pooled": torch.cat([pooled, pooled_2])}

    def evaluate(self, network: Any, x: Tensor, c_noise: Tensor, condition: Condition) -> Tensor:
        pooled, time = condition["pooled"], 1000 * c_noise
        return network(x, condition["tokens"], pooled_projections=pooled, timestep=time, return_dict=False)[0]

    def units(self, network: Any) -> Sequence[nn.Module]:
        return list(network.transformer_blocks)
