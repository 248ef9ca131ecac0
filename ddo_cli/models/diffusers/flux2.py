"""FLUX.2-klein-base: a Flux2Transformer2DModel with flow matching.

Convention of the network: its time is the share of noise n (which it multiplies by 1000); its input (1 - n) x0 + n eps;
it estimates the velocity eps - x0. That is `precond.Flow`, reversed. Packing: 2 x 2 positions of the autoencoder's 32
channels are one of x with 128, in the order of pixel_unshuffle, and these are normalised by the autoencoder's running
mean and variance (a batch norm's). A token is one position of x, with four coordinates: (0, row, column, 0), of text
(0, 0, 0, number). The shift of the pipeline's steps grows with the tokens and falls with the number of steps. The
condition is three hidden states of Qwen3 side by side, of the prompt as a user's message, padding included.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddo_cli.models.diffusers import files
from ddo_cli.models.diffusers.family import FACTOR, Condition, FlowFamily, Parts, image_side
from ddo_cli.models.diffusers.unet import Config

LENGTH, LAYERS = 512, (9, 18, 27)  # tokens and hidden states of the pipeline
# mu by the tokens, slope and value at 0, for 10 steps and for 200; above so many tokens it is that of 200.
_FEW, _MANY, _LARGE = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300


class Flux2(FlowFamily):
    """FLUX.2-klein-base."""

    name, title = "flux2", "FLUX.2-klein-base"
    pipeline, network = "Flux2KleinPipeline", "Flux2Transformer2DModel"
    texts = {"tokenizer": "Qwen2TokenizerFast", "text_encoder": "Qwen3Model"}
    vae = "AutoencoderKLFlux2"
    fixed = {"patch_size": 1}
    targets = ("to_q", "to_k", "to_v", "to_out", "to_qkv_mlp_proj")
    sampling = {"sampler": "flow-euler", "steps": 50, "cfg_scale": 4.0, "batch": 1}
    patch, tokens_of = 2, 1

    def check(self, full: Config) -> None:
        if full["guidance_embeds"]:
            raise ValueError(
                "guidance_embeds = true: it is distilled from guided samples, and its estimate is no denoiser's; give "
                f"{self.title}"
            )

    def side(self, full: Config, vae: Config) -> int:
        return image_side(vae)

    def multiple(self, full: Config) -> int:
        return self.patch * FACTOR

    def dynamic_shift(self, scheduler: Config, num_steps: int, num_tokens: int) -> float:
        few, many = (slope * num_tokens + first for slope, first in (_FEW, _MANY))
        return many if num_tokens > _LARGE else many + (few - many) * (200 - num_steps) / 190

    def affine(self, vae: Config, folder: Path) -> tuple[list[float], list[float]]:
        tensors = {key: tensor for file in files.weights_of(folder) for key, tensor in files.tensors_of(file).items()}
        try:
            mean, variance = tensors["bn.running_mean"], tensors["bn.running_var"]
        except KeyError as error:
            raise ValueError(f"vae/ has no {error.args[0]}, by which its latents are normalised") from None
        return (variance + vae.get("batch_norm_eps", 1e-4)).rsqrt().tolist(), mean.tolist()

    def encode(self, parts: Parts, text: str) -> Condition:
        states, _ = parts.chat(text, LENGTH, thinking=False, layers=LAYERS)
        return {"tokens": states.permute(1, 0, 2).flatten(1)}  # (L, 3 E)

    def evaluate(self, network: Any, x: Tensor, c_noise: Tensor, condition: Condition) -> Tensor:
        tokens, (height, width) = condition["tokens"], x.shape[2:]
        zero, of_text = (torch.arange(num, device=x.device) for num in (1, tokens.shape[1]))
        rows, columns = (torch.arange(num, device=x.device) for num in (height, width))
        found = network(
            x.flatten(2).transpose(1, 2),  # (B, h w, C)
            tokens,
            timestep=c_noise,
            img_ids=torch.cartesian_prod(zero, rows, columns, zero),
            txt_ids=torch.cartesian_prod(zero, zero, zero, of_text),
            return_dict=False,
        )[0]
        return found.transpose(1, 2).unflatten(2, (height, width))

    def units(self, network: Any) -> Sequence[nn.Module]:
        return [*network.transformer_blocks, *network.single_transformer_blocks]
