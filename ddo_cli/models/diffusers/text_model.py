"""A network of the library diffusers that draws images of prompts, under this program's preconditioning.

What differs between Stable Diffusion, SDXL and the others is said by their `family.Family`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ddo_cli.diffusion import samplers, sampling_plan
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.errors import UsageError, reason
from ddo_cli.likelihood import Sampled
from ddo_cli.models import registry
from ddo_cli.models.diffusers import texts
from ddo_cli.models.diffusers.families import FAMILIES
from ddo_cli.models.diffusers.family import FACTOR, Condition, Family
from ddo_cli.models.diffusers.unet import Config, library
from ddo_cli.models.registry import register
from ddo_cli.models.vae_codec import Scaling, StabilityCodec, per_channel
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

NAME = "text-to-image"
PREFIX = "net.network."  # of the network's tensors in our model


def config_of(
    family: Family, network: Config, scheduler: Config, encoder: texts.Encoder, side: int, affine: tuple[Any, Any]
) -> Config:
    """The configuration of the model, as `registry.build` takes it; of no prompts yet. Raises ValueError.

    side: of images in pixels. affine: of latents, see `Family.affine`.
    """
    diffusion = family.process(scheduler)
    options = {
        "family": family.name, "network": network, "scheduler": scheduler,
        "pipeline": encoder.place, "text_encoder": encoder.digest, "vae_scale": affine[0], "vae_shift": affine[1],
        **diffusion._asdict(), "sigma_data": 1.0,
    }  # fmt: skip
    del options["preconditioner"]  # which follows from the scheduler
    state_shape = _state_shape(family, family.arguments(network), side)
    draw = {**family.draw(scheduler, state_shape), "label_dropout": family.label_dropout}
    return registry.config_of(NAME, (3, side, side), 0, options, draw)


def _state_shape(family: Family, full: Config, side: int) -> tuple[int, ...]:
    """Of x. Raises ValueError for a side that the network cannot take."""
    multiple, largest = family.multiple(full), family.largest(full)
    if not 1 <= side <= largest or side % multiple:
        raise ValueError(f"images have a side of {side} pixels, and {multiple} must divide it, at most {largest}")
    small = side // (FACTOR * family.patch)
    return full["in_channels"], small, small


class TextNet(nn.Module):
    """net(x, c_noise, label) -> F around the library's network. label: number of a prompt, -1 for none."""

    def __init__(self, family: Family, network: Config, encoder: texts.Encoder, prompts: texts.Prompts):
        super().__init__()
        self.family, self.encoder, self.prompts = family, encoder, prompts
        self.adapter_targets = family.targets
        full, made_by = family.arguments(network), getattr(library(), family.network)
        try:
            self.network = made_by(**full)
        except Exception as error:  # whatever the library makes of the values
            raise ValueError(f"{family.network} refuses its configuration: {reason(error)}") from None

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F (B, C, h, w). c_noise: float (B,)."""
        condition: Condition = texts.rows(self.encoder, self.prompts, label)
        return self.family.evaluate(self.network, x, c_noise, condition)

    def units(self) -> Sequence[nn.Module]:
        """Blocks of the network, for activation checkpointing."""
        return self.family.units(self.network)


class TextOptions(DiffusionOptions):
    """Both configurations as in a pipeline's folder, and where its text encoders and autoencoder are."""

    precond: Literal["scheduler"] = "scheduler"  # type: ignore[assignment]  # in place of the names of single processes
    family: str  # a key of `FAMILIES`
    network: Config  # its config.json
    scheduler: Config  # scheduler/scheduler_config.json
    pipeline: str  # the folder
    text_encoder: str  # hash of its text encoders, see `texts.digest_of`
    vae_scale: float | tuple[float, ...]  # of latents, see `Family.affine`
    vae_shift: float | tuple[float, ...]
    prompts: tuple[str, ...] = ()  # that the labels mean
    negative_prompt: str = texts.NONE  # that the label -1 means


class PipelineCodec(StabilityCodec):
    """The autoencoder of a pipeline's folder, which nothing but $DDO_PIPELINE replaces."""

    def __init__(self, shape: tuple[int, ...], state_shape: tuple[int, ...], options: TextOptions):
        family = FAMILIES[options.family]
        channels = state_shape[0]

        def column(values: float | tuple[float, ...]) -> Tensor:
            return per_channel((values,) * channels if isinstance(values, float) else values)

        scale = column(options.vae_scale)
        scaling = Scaling(scale, -column(options.vae_shift) * scale, low=-1)
        super().__init__(shape, options.pipeline, scaling, channels // family.patch**2, family.patch, family.vae)

    def place(self) -> tuple[str, str]:
        remedy = f"copy the folder again, or set {texts.VARIABLE} to that of the whole pipeline"
        return str(Path(texts.place_of(self.vae), "vae")), remedy


class TextToImage(DiffusionModel):
    """A denoiser whose labels are the numbers of prompts, and whose default steps are those of the pipeline."""

    net: TextNet

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
        """As in `sampling_plan.sigmas`; but where nothing else is asked for, those of the pipeline's own steps."""
        cut = (spec.sigma_min, spec.sigma_max, spec.respacing, samplers.find(spec.sampler).sigma_min)
        is_plain = sampling_plan.spacing_of(spec, self.precond) in ("steps", "flow") and cut == (None,) * 4
        if not is_plain or sampling_plan.generalised_choice(spec) is not None:
            return super().sigmas(spec)
        assert isinstance(self.options, TextOptions)
        steps, shape = sampling_plan.steps_of(spec), self.codec.state_shape
        levels = self.net.family.levels(self.options.scheduler, self.precond, steps, shape)
        return levels.to(sampling_plan.dtype_of(spec))

    def sample(self, label: Tensor, rng: RowRng, spec: SamplingRecipe, x0: Tensor | None = None) -> Sampled:
        """As for every diffusion model; where steps end above 0, the variance-preserving state, which pipelines decode.

        Stable Diffusion's scheduler ends at the lowest level that it was trained at (`set_alpha_to_one` false).
        """
        found, last = super().sample(label, rng, spec, x0), self.sigmas(spec)[-1]
        return found if not last or x0 is not None else found._replace(x=found.x / (1 + last**2).sqrt())


@register(NAME, TextOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: TextOptions, draw_options: DiffusionDrawOptions
) -> TextToImage:
    """A denoiser of latents of square RGB images. Raises ValueError if shape or labels are not the configuration's."""
    if (family := FAMILIES.get(options.family)) is None:
        raise ValueError(f"family = {options.family!r} must be one of {', '.join(FAMILIES)}")
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or num_classes != len(options.prompts):
        raise ValueError("it makes square RGB images, with a label for each of its prompts")
    state_shape = _state_shape(family, family.arguments(options.network), shape[1])
    diffusion = family.process(options.scheduler)
    encoder = texts.Encoder(options.family, options.pipeline, options.text_encoder)
    net = TextNet(family, options.network, encoder, texts.Prompts(options.prompts, options.negative_prompt))
    codec = PipelineCodec(shape, state_shape, options)
    return TextToImage(net, codec, num_classes, options, draw_options, diffusion.preconditioner)
