"""Stable Diffusion with a UNet2DConditionModel: 1.x and 2.x, and XL.

Convention of the network: its time is the step's number, 0 to 999; its input is the variance-preserving state
alpha x0 + s eps (here x / sqrt(1 + sigma^2)); it estimates eps, or v = alpha eps - s x0, as the scheduler says. That is
`precond.Discrete` on the levels of the scheduler's betas. Latents are those of the pipeline's autoencoder times its
scaling factor. The condition is the last hidden state of the text encoder; in XL the last but one of two encoders side
by side, the second's projected output, and six numbers: the image's size, the corner of its crop, and the size again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddo_cli.diffusion.precond import Discrete, Preconditioner
from ddo_cli.errors import UsageError, printable
from ddo_cli.models.diffusers.family import FACTOR, NONE, Condition, Family, Parts
from ddo_cli.models.diffusers.unet import Config, Process, process
from ddo_cli.models.vae_codec import CHANNELS

# Schedulers whose last step goes to level 0, whatever set_alpha_to_one says.
_TO_ZERO = ("EulerDiscreteScheduler",)


class StableDiffusion(Family):
    """1.x and 2.x."""

    name, title = "sd", "Stable Diffusion 1 and 2"
    pipeline = "StableDiffusionPipeline"
    part, network = "unet", "UNet2DConditionModel"
    texts = {"tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModel"}
    scheduler = {"steps_offset": 1}
    fixed = {  # arguments that would add inputs or change what the network estimates
        "center_input_sample": False, "class_embed_type": None, "num_class_embeds": None, "addition_embed_type": None,
        "encoder_hid_dim": None, "encoder_hid_dim_type": None, "time_embedding_type": "positional",
        "in_channels": CHANNELS, "out_channels": CHANNELS,
    }  # fmt: skip
    sampling = {"sampler": "ddim", "steps": 50, "cfg_scale": 7.5, "batch": 4}

    def check(self, full: Config) -> None:
        if full["time_cond_proj_dim"] is not None:
            raise ValueError(
                f"time_cond_proj_dim = {full['time_cond_proj_dim']}: it is distilled from guided samples (a "
                "consistency model), and its estimate is of no likelihood; give the base that it was distilled from"
            )
        side, halved = full["sample_size"], 2 ** (len(full["block_out_channels"]) - 1)
        if not isinstance(side, int) or not 1 <= side <= 1 << 12 or side % halved:
            raise ValueError(
                f"sample_size = {printable(repr(side), 40)} must be a side of latents that {halved} divides"
            )

    def side(self, full: Config, vae: Config) -> int:
        return int(FACTOR * full["sample_size"])

    def multiple(self, full: Config) -> int:
        return FACTOR * 2 ** (len(full["block_out_channels"]) - 1)

    def process(self, scheduler: Config) -> Process:
        found = process(scheduler)
        if not isinstance(found.preconditioner, Discrete) or found.learned_variance:
            raise ValueError(f"{scheduler['_class_name']} must be of discrete steps with a fixed variance")
        return found

    def draw(self, scheduler: Config, state_shape: tuple[int, ...]) -> dict[str, Any]:
        """Training draws steps uniformly: mean and deviation of ln sigma over them."""
        known = self.process(scheduler).preconditioner
        assert isinstance(known, Discrete), "see process"
        levels = known.sigmas.log()
        return {"p_mean": round(levels.mean().item(), 3), "p_std": round(levels.std().item(), 3)}

    def notes(self, scheduler: Config) -> dict[str, str]:
        known, own = self.process(scheduler).preconditioner, scheduler["_class_name"]
        assert isinstance(known, Discrete), "see process"
        has_steps = own in ("DDIMScheduler", *_TO_ZERO)  # that ddim takes, too
        told = own if has_steps else f"{own}, whose noise levels are drawn from by ddim"
        return {"predicts": known.prediction, "scheduler": told}

    def levels(self, scheduler: Config, known: Preconditioner, num_steps: int, state_shape: tuple[int, ...]) -> Tensor:
        """Those of the library's DDIMScheduler, or EulerDiscreteScheduler, with this configuration."""
        assert isinstance(known, Discrete), "see process"
        sigmas, num = known.sigmas, len(known.sigmas)
        if num_steps > num:
            raise UsageError(f"sampling.steps = {num_steps}: the model was trained at {num} noise levels; give fewer")
        spacing, offset = scheduler.get("timestep_spacing", "leading"), scheduler.get("steps_offset", 0)
        if spacing == "leading":
            steps = torch.arange(num_steps).flip(0) * (num // num_steps) + offset
        elif spacing == "trailing":
            steps = (num - torch.arange(num_steps, dtype=torch.float64) * (num / num_steps)).round().long() - 1
        else:  # linspace
            steps = torch.linspace(0, num - 1, num_steps, dtype=torch.float64).round().long().flip(0)
        to_zero = scheduler.get("set_alpha_to_one", True) or scheduler["_class_name"] in _TO_ZERO
        return torch.cat([sigmas[steps.clamp(max=num - 1)], sigmas.new_zeros(1) if to_zero else sigmas[:1]])

    def encode(self, parts: Parts, text: str) -> Condition:
        return {"tokens": parts["text_encoder"](parts.tokens("tokenizer", text)["input_ids"])[0][0]}

    def evaluate(self, network: Any, x: Tensor, c_noise: Tensor, condition: Condition) -> Tensor:
        return network(x, c_noise, encoder_hidden_states=condition["tokens"], return_dict=False)[0]

    def units(self, network: Any) -> Sequence[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]


class StableDiffusionXl(StableDiffusion):
    """XL, whose empty prompt is zeros where its model_index.json says `force_zeros_for_empty_prompt`."""

    name, title = "sdxl", "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    texts = {
        **StableDiffusion.texts, "tokenizer_2": "CLIPTokenizer", "text_encoder_2": "CLIPTextModelWithProjection",
    }  # fmt: skip
    scheduler = {}
    told_by_index = ("force_zeros_for_empty_prompt",)
    fixed = {**StableDiffusion.fixed, "addition_embed_type": "text_time"}
    sampling = {"sampler": "ddim", "steps": 50, "cfg_scale": 5.0, "batch": 1}

    def encode(self, parts: Parts, text: str) -> Condition:
        (first, _), (second, pooled) = parts.clip("", text), parts.clip("_2", text)
        found = {"tokens": torch.cat([first, second], dim=-1), "pooled": pooled}
        is_zero = text == NONE and parts.index.get("force_zeros_for_empty_prompt", True)
        return {name: torch.zeros_like(tensor) for name, tensor in found.items()} if is_zero else found

    def evaluate(self, network: Any, x: Tensor, c_noise: Tensor, condition: Condition) -> Tensor:
        height, width = (float(FACTOR * side) for side in x.shape[2:])
        size = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
        added = {"text_embeds": condition["pooled"], "time_ids": size}
        tokens = condition["tokens"]
        return network(x, c_noise, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False)[0]
