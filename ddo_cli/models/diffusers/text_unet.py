"""A UNet2DConditionModel of the library diffusers that draws images of prompts: Stable Diffusion 1.x and 2.x.

Convention of the network: its time is the step's number, 0 to 999; its input is the variance-preserving state
alpha x0 + s eps (here x / sqrt(1 + sigma^2)); it estimates eps, or v = alpha eps - s x0, as the scheduler says. That is
`precond.Discrete` on the levels of the scheduler's betas. Latents are those of the pipeline's autoencoder times its
scaling factor; the condition is the last hidden state of the text encoder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ddo_cli.diffusion import sampling_plan
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.precond import Discrete
from ddo_cli.errors import UsageError, printable, reason
from ddo_cli.likelihood import Sampled
from ddo_cli.models import registry
from ddo_cli.models.diffusers import texts
from ddo_cli.models.diffusers.unet import Config, library, process, with_defaults
from ddo_cli.models.registry import register
from ddo_cli.models.vae_codec import CHANNELS, FACTOR, Scaling, StabilityCodec
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

NAME = "text-unet"
UNET_CLASS = "UNet2DConditionModel"
LABEL_DROPOUT = 0.1  # of Stable Diffusion's training
# Arguments that would add inputs or change what the network estimates, and their values in Stable Diffusion 1 and 2.
_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_embedding_type": "positional",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
}


def unet_arguments(unet: Config) -> Config:
    """The library's arguments of the network, each default written out. Raises ValueError if we cannot use them."""
    if (name := unet.get("_class_name")) != UNET_CLASS:
        raise ValueError(f"the network is a {printable(str(name), 60)}; a {UNET_CLASS} of Stable Diffusion 1 or 2 fits")
    full = with_defaults(UNET_CLASS, unet)
    if full["time_cond_proj_dim"] is not None:
        raise ValueError(
            f"time_cond_proj_dim = {full['time_cond_proj_dim']}: it is distilled from guided samples (a consistency "
            "model), and its estimate is of no likelihood; give the base that it was distilled from"
        )
    odd = [f"{key} = {printable(repr(full[key]), 40)} must be {value}" for key, value in _FIXED.items()
           if full[key] != value]  # fmt: skip
    if odd:
        raise ValueError(f"{'; '.join(odd)}, as in Stable Diffusion 1 and 2")
    side = full["sample_size"]
    halved = 2 ** (len(full["block_out_channels"]) - 1)
    if not isinstance(side, int) or not 1 <= side <= 1 << 12 or side % halved:
        raise ValueError(f"sample_size = {printable(repr(side), 40)} must be a side of latents that {halved} divides")
    return full


def config_of(
    unet: Config, scheduler: Config, encoder: texts.Encoder, vae_scale: float, vae_shift: float = 0.0
) -> Config:
    """The configuration of the model, as `registry.build` takes it; of no prompts yet. Raises ValueError."""
    full, diffusion = unet_arguments(unet), process(scheduler)
    options = {
        "unet": unet, "scheduler": scheduler, "pipeline": encoder.place, "text_encoder": encoder.digest,
        "vae_scale": vae_scale, "vae_shift": vae_shift, **diffusion._asdict(), "sigma_data": 1.0,
    }  # fmt: skip
    known = options.pop("preconditioner")
    levels = known.sigmas.log()  # training draws steps uniformly: mean and deviation of ln sigma over them
    draw = {"p_mean": round(levels.mean().item(), 3), "p_std": round(levels.std().item(), 3)}
    side = FACTOR * full["sample_size"]
    return registry.config_of(NAME, (3, side, side), 0, options, {**draw, "label_dropout": LABEL_DROPOUT})


class TextUnet(nn.Module):
    """net(x, c_noise, label) -> F around the library's network. label: number of a prompt, -1 for none."""

    adapter_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, unet: Config, encoder: texts.Encoder, prompts: texts.Prompts):
        super().__init__()
        self.encoder, self.prompts = encoder, prompts
        full, network = unet_arguments(unet), library().UNet2DConditionModel
        try:
            self.unet = network(**full)
        except Exception as error:  # whatever the library makes of the values
            raise ValueError(f"{UNET_CLASS} refuses its configuration: {reason(error)}") from None

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F (B, 4, h, w). c_noise: float (B,)."""
        condition = texts.rows(self.encoder, self.prompts, label)  # (B, L, E)
        return self.unet(x, c_noise, encoder_hidden_states=condition, return_dict=False)[0]

    def units(self) -> Sequence[nn.Module]:
        """Blocks of the network, for activation checkpointing."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]


class TextUnetOptions(DiffusionOptions):
    """Both configurations as in a pipeline's folder, and where its text encoder and autoencoder are."""

    precond: Literal["scheduler"] = "scheduler"  # type: ignore[assignment]  # in place of the names of single processes
    unet: Config  # unet/config.json
    scheduler: Config  # scheduler/scheduler_config.json
    pipeline: str  # the folder
    text_encoder: str  # hash of its text encoder, see `texts.digest_of`
    vae_scale: float = Field(0.18215, gt=0)
    vae_shift: float = 0.0
    prompts: tuple[str, ...] = ()  # that the labels mean
    negative_prompt: str = texts.NONE  # that the label -1 means


class TextToImage(DiffusionModel):
    """A denoiser whose labels are the numbers of prompts, and whose default steps are those of the pipeline."""

    net: TextUnet

    def tell(self, prompts: Sequence[str], negative: str) -> dict[str, Any]:
        """Gives labels these prompts, and -1 the prompt `negative`; returns the configuration's entries that change."""
        self.num_classes, self.net.prompts = len(prompts), texts.Prompts(tuple(prompts), negative)
        changed = {"prompts": tuple(prompts), "negative_prompt": negative}
        self.options = self.options.model_copy(update=changed)
        return {"num_classes": self.num_classes, "options": self.options.model_dump(mode="json")}

    def check_sampling(self, spec: SamplingRecipe) -> None:
        """Adds: without prompts there is nothing to draw."""
        if not self.num_classes:
            raise UsageError(
                "this model draws images of prompts, and none is given; add --prompt TEXT or --prompts FILE, or train "
                "it on images with captions"
            )
        super().check_sampling(spec)

    def sigmas(self, spec: SamplingRecipe) -> Tensor:
        """As in `sampling_plan.sigmas`; but where nothing else is asked for, those of the pipeline's DDIM."""
        cut = (spec.sigma_min, spec.sigma_max, spec.respacing)
        is_plain = sampling_plan.spacing_of(spec, self.precond) == "steps" and cut == (None, None, None)
        if not is_plain or sampling_plan.generalised_choice(spec) is not None:
            return super().sigmas(spec)
        assert isinstance(self.options, TextUnetOptions)
        assert isinstance(self.precond, Discrete)
        levels = ddim_sigmas(self.options.scheduler, self.precond.sigmas, sampling_plan.steps_of(spec))
        return levels.to(sampling_plan.dtype_of(spec))

    def sample(self, label: Tensor, rng: RowRng, spec: SamplingRecipe, x0: Tensor | None = None) -> Sampled:
        """As for every diffusion model; where steps end above 0, the variance-preserving state, which pipelines decode.

        Stable Diffusion's scheduler ends at the lowest level that it was trained at (`set_alpha_to_one` false).
        """
        found, last = super().sample(label, rng, spec, x0), self.sigmas(spec)[-1]
        return found if not last or x0 is not None else found._replace(x=found.x / (1 + last**2).sqrt())


def ddim_sigmas(scheduler: Config, sigmas: Tensor, num_steps: int) -> Tensor:
    """Decreasing levels of diffusers' DDIMScheduler with this configuration, (num_steps + 1,), of the trained `sigmas`.

    Raises UsageError for more steps than there are levels.
    """
    num = len(sigmas)
    if num_steps > num:
        raise UsageError(f"sampling.steps = {num_steps}: the model was trained at {num} noise levels; give fewer")
    spacing, offset = scheduler.get("timestep_spacing", "leading"), scheduler.get("steps_offset", 0)
    if spacing == "leading":
        steps = torch.arange(num_steps).flip(0) * (num // num_steps) + offset
    elif spacing == "trailing":
        steps = (num - torch.arange(num_steps, dtype=torch.float64) * (num / num_steps)).round().long() - 1
    else:  # linspace
        steps = torch.linspace(0, num - 1, num_steps, dtype=torch.float64).round().long().flip(0)
    last = sigmas.new_zeros(1) if scheduler.get("set_alpha_to_one", True) else sigmas[:1]
    return torch.cat([sigmas[steps.clamp(max=num - 1)], last])


@register(NAME, TextUnetOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: TextUnetOptions, draw_options: DiffusionDrawOptions
) -> TextToImage:
    """A denoiser of latents of square RGB images. Raises ValueError if shape or labels are not the configuration's."""
    full, diffusion = unet_arguments(options.unet), process(options.scheduler)
    side = FACTOR * full["sample_size"]
    if tuple(shape) != (3, side, side) or num_classes != len(options.prompts):
        raise ValueError(f"unet makes images of {side}x{side} RGB, with a label for each of its prompts")
    if diffusion.learned_variance:
        raise ValueError("variance_type = 'learned_range' must be fixed, as in Stable Diffusion 1 and 2")
    encoder = texts.Encoder(options.pipeline, options.text_encoder)
    net = TextUnet(options.unet, encoder, texts.Prompts(options.prompts, options.negative_prompt))
    scale = torch.full((CHANNELS, 1, 1), options.vae_scale, device="cpu")
    scaling = Scaling(scale, -options.vae_shift * scale, low=-1)
    codec = StabilityCodec(shape, str(Path(options.pipeline, "vae")), scaling)
    return TextToImage(net, codec, num_classes, options, draw_options, diffusion.preconditioner)
