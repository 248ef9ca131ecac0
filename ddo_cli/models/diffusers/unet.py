"""A UNet2DModel of the library diffusers, under this program's preconditioning.

The network is the library's own, built from its `config.json`; its scheduler's configuration says at which noise
levels it was trained and what it predicts. Both stay in the options as the folder had them, so that they can be
exported again.
"""

import inspect
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from ddo_cli import extras
from ddo_cli.codec import PixelCodec
from ddo_cli.diffusion import precond
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.errors import UsageError, printable
from ddo_cli.models import registry
from ddo_cli.models.registry import register
from ddo_cli.recipe.schema import SamplingRecipe

NAME = "diffusers-unet"
UNET_CLASS = "UNet2DModel"
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
PREDICTIONS: dict[str, precond.Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

Config = dict[str, Any]


def library() -> ModuleType:
    """diffusers, imported where it is needed because that takes seconds. Raises UsageError where it is missing."""
    for module in ("models.unets.unet_2d", "schedulers.scheduling_utils"):
        extras.imported(f"a {NAME} needs", f"diffusers.{module}", "diffusers")
    return extras.imported(f"a {NAME} needs", "diffusers", "diffusers")


# --- What the two configurations say

# Far above what any network of the library has; our choice, so that a damaged configuration builds nothing huge. Some
# schedulers take steps^2 operations.
_Steps = Annotated[int, Field(ge=1, le=10_000)]
_Size = Annotated[int, Field(ge=1, le=1 << 16)]
_Level = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Values(BaseModel):
    """Base of what both configurations must hold before the library gets them, which checks the rest."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Unet(Values):
    sample_size: _Size | list[_Size] | tuple[_Size, ...] | None = None
    in_channels: _Size = 3
    out_channels: _Size = 3
    block_out_channels: list[_Size] | tuple[_Size, ...] = Field([], max_length=16)
    down_block_types: list[str] | tuple[str, ...] = Field([], max_length=16)
    up_block_types: list[str] | tuple[str, ...] = Field([], max_length=16)
    layers_per_block: int = Field(2, ge=1, le=64)
    norm_num_groups: _Size | None = 32
    attention_head_dim: _Size | None = None
    num_class_embeds: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    num_train_timesteps: _Steps | None = None
    act_fn: str = ""
    time_embedding_type: str = ""


class _Scheduler(Values):
    class_name: str = Field(alias="_class_name")
    num_train_timesteps: _Steps = 1000
    beta_start: _Level = 1e-4
    beta_end: _Level = 0.02
    beta_schedule: str = ""
    trained_betas: Annotated[list[_Level], Field(max_length=10_000)] | None = None
    prediction_type: str = ""
    variance_type: str | None = None
    timestep_type: str | None = None
    clip_sample: bool = True
    clip_sample_range: _Level = 1.0
    thresholding: bool = False
    sigma_min: _Level | None = None
    sigma_max: _Level | None = None
    sigma_data: _Level = 0.5


def check_values(schema: type[Values], config: Config) -> None:
    """Raises ValueError that names the first value of a wrong kind."""
    try:
        schema.model_validate(config)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"] if str(part) in config or isinstance(part, int))
        raise ValueError(f"{place} = {_shown(problem['input'])}: {problem['msg'].lower()}") from None


def _shown(value: Any) -> str:
    return printable(repr(value), 60)


class Process(NamedTuple):
    """The diffusion that a scheduler's configuration describes."""

    preconditioner: precond.Preconditioner
    sigma_min: float
    sigma_max: float
    sigma_data: float
    learned_variance: bool


def with_defaults(name: str, config: Config) -> Config:
    """All arguments of a class of the library, by a configuration that has some. Raises ValueError for unknown ones."""
    signature = inspect.signature(getattr(library(), name).__init__)
    known = {key: value.default for key, value in signature.parameters.items() if key != "self"}
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(
            f"{printable(', '.join(map(repr, unknown)), 80)}: the installed diffusers has no such argument of a "
            f"{name}; install the version that wrote the folder"
        )
    return known | given


def unet_arguments(unet: Config) -> Config:
    """The library's arguments of the network, each default written out, sample_size a number.

    Raises ValueError if we cannot use them.
    """
    if (name := unet.get("_class_name", UNET_CLASS)) != UNET_CLASS:
        shown = printable(str(name), 60)
        raise ValueError(f"the network is a {shown}; only a {UNET_CLASS}, unconditional or with class labels, fits")
    full = with_defaults(UNET_CLASS, unet)
    check_values(_Unet, full)
    if isinstance(size := full["sample_size"], (list, tuple)) and len(set(size)) == 1:
        full["sample_size"] = size[0]
    wrong = [
        (full["time_embedding_type"] == "fourier", "time_embedding_type", "positional or learned (discrete steps)"),
        (bool(full["center_input_sample"]), "center_input_sample", "false, for images in [-1, 1]"),
        (full["class_embed_type"] is not None, "class_embed_type", "null, an embedding of the class number"),
        (full["in_channels"] not in (1, 3), "in_channels", "1 or 3, for images; latents are not supported"),
        (not isinstance(full["sample_size"], int), "sample_size", "the side of square images"),
    ]
    if problems := [f"{key} = {_shown(full[key])} must be {must}" for bad, key, must in wrong if bad]:
        raise ValueError("; ".join(problems))
    if full["sample_size"] % (step := 2 ** (len(full["block_out_channels"]) - 1)):
        raise ValueError(
            f"sample_size = {full['sample_size']} must be a multiple of {step}, since its images are halved "
            f"{len(full['block_out_channels']) - 1} times; correct it to the side of the images that it was trained on"
        )
    return full


def check_layers(unet: Config, num_tensors: int) -> None:
    """Raises ValueError for more layers than so many tensors can be of, before they are built."""
    full = unet_arguments(unet)
    layers = full["layers_per_block"] * len(full["down_block_types"])
    if 16 * layers > num_tensors:  # on the way down and up each has two norms and two convolutions, with biases
        raise ValueError(f"it has {layers} layers of layers_per_block, and its weights are {num_tensors} tensors")


def process(scheduler: Config) -> Process:
    """The diffusion of a scheduler's configuration; a key it lacks has that class's default.

    Raises ValueError for a scheduler that is no noise schedule of discrete steps, nor EDM's.
    """
    diffusers = library()
    check_values(_Scheduler, scheduler)
    name = scheduler["_class_name"]
    discrete = {each.name for each in diffusers.schedulers.scheduling_utils.KarrasDiffusionSchedulers}
    if name not in (discrete | set(EDM_SCHEDULERS)):
        raise ValueError(
            f"the scheduler is a {printable(name, 60)}; give the one that the network was trained with, such as "
            "DDPMScheduler, DDIMScheduler or EDMEulerScheduler"
        )
    make = getattr(diffusers, name)
    arguments = inspect.signature(make.__init__).parameters  # folders keep keys of a scheduler they had before
    try:
        with torch.device("cpu"):  # the network may be under construction without memory
            made = make(**{key: value for key, value in scheduler.items() if key in arguments})
    except Exception as error:  # whatever the library makes of the values
        raise ValueError(f"{name} refuses its configuration: {_reason(error)}") from None
    config = scheduler | dict(made.config)
    prediction = config.get("prediction_type", "epsilon")
    if name in EDM_SCHEDULERS:
        if prediction != "epsilon":
            raise ValueError(f"prediction_type = {_shown(prediction)} of {name} must be 'epsilon', which is EDM's F")
        edm = precond.Edm(config["sigma_data"])
        return Process(edm, config["sigma_min"], config["sigma_max"], config["sigma_data"], False)
    wrong = [
        (prediction not in PREDICTIONS, "prediction_type", f"one of {', '.join(PREDICTIONS)}"),
        (bool(config.get("rescale_betas_zero_snr")), "rescale_betas_zero_snr", "false: its last noise level is inf"),
        (config.get("variance_type") == "learned", "variance_type", "fixed, or learned_range as ADM's"),
        (config.get("timestep_type") == "continuous", "timestep_type", "discrete, the step's number"),
    ]
    if problems := [f"{key} = {_shown(config[key])} must be {must}" for bad, key, must in wrong if bad]:
        raise ValueError("; ".join(problems))
    if not bool(((made.betas > 0) & (made.betas < 1)).all()):
        raise ValueError("its betas are not all between 0 and 1; correct beta_start, beta_end or trained_betas")
    levels = precond.Discrete(precond.sigmas_of_betas(made.betas), PREDICTIONS[prediction])
    learned = config.get("variance_type") == "learned_range"
    return Process(levels, levels.sigma_min, levels.sigma_max, 0.5, learned)


def _reason(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0] or type(error).__name__, 120)


def check_pass(model: nn.Module) -> None:
    """Raises ValueError if the network cannot be evaluated on its own images: the library tells it only there.

    model: a DiffusersModel, built on the meta device.
    """
    assert isinstance(model, DiffusersModel), "another kind of model"
    try:
        with torch.no_grad(), torch.device("meta"):
            model.net(torch.zeros(1, *model.codec.shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    except Exception as error:  # whatever the library's layers make of it
        raise ValueError(f"{UNET_CLASS} cannot be evaluated on images of its sample_size: {_reason(error)}") from None


def config_of(unet: Config, scheduler: Config) -> Config:
    """The configuration of the model that the two make, as `registry.build` takes it. Raises ValueError."""
    full, diffusion = unet_arguments(unet), process(scheduler)
    shape = (full["in_channels"], full["sample_size"], full["sample_size"])
    options = {"unet": unet, "scheduler": scheduler, **diffusion._asdict()}
    del options["preconditioner"]  # which follows from the scheduler
    return registry.config_of(NAME, shape, full["num_class_embeds"] or 0, options, {})


# --- The model


class DiffusersUnet(nn.Module):
    """net(x, c_noise, label) -> F around the library's network. unet: its configuration."""

    adapter_targets = ("to_q", "to_k", "to_v", "to_out")

    def __init__(self, unet: Config):
        super().__init__()
        full = unet_arguments(unet)
        network = library().UNet2DModel
        try:
            self.unet = network(**full)
        except Exception as error:  # whatever the library makes of the values
            raise ValueError(f"{UNET_CLASS} refuses its configuration: {_reason(error)}") from None
        self.told_labels = bool(full["num_class_embeds"])
        if self.told_labels:
            table = self.unet.class_embedding
            self.unet.class_embedding = _Labels(table.num_embeddings, table.embedding_dim)
        self.whole_steps = full["time_embedding_type"] == "learned"  # a table's row

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F (B, C or 2 C, H, W). c_noise: float (B,). label: int64 (B,), -1 = no label; ignored without classes."""
        time = c_noise.long() if self.whole_steps else c_noise
        return self.unet(x, time, class_labels=label if self.told_labels else None, return_dict=False)[0]


class _Labels(nn.Embedding):
    """Rows of the labels, zeros for -1. The library's networks know no such label until they are finetuned with it."""

    def forward(self, label: Tensor) -> Tensor:
        rows: Tensor = super().forward(label.clamp(min=0))  # (B, E)
        return rows * (label >= 0)[:, None]


class DiffusersModel(DiffusionModel):
    """A denoiser that knows images without labels only if its training dropped labels."""

    def check_sampling(self, spec: SamplingRecipe) -> None:
        """Adds: guidance needs a model that dropped labels in training."""
        super().check_sampling(spec)
        if spec.cfg_scale not in (None, 1.0) and not self.draw_options.label_dropout:
            raise UsageError(
                f"sampling.cfg_scale = {spec.cfg_scale} needs a model that also learned images without labels, and "
                "this one did not; leave it out, or finetune with label_dropout above 0 first"
            )


class DiffusersUnetOptions(DiffusionOptions):
    """Both configurations as in a folder of diffusers; the others follow from them, see `config_of`."""

    precond: Literal["scheduler"] = "scheduler"  # type: ignore[assignment]  # in place of the names of single processes
    unet: Config  # unet/config.json
    scheduler: Config  # scheduler/scheduler_config.json


@register(NAME, DiffusersUnetOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: DiffusersUnetOptions, draw_options: DiffusionDrawOptions
) -> DiffusersModel:
    """A denoiser of square uint8 images. Raises ValueError if shape or classes are not those of the configuration."""
    full, diffusion = unet_arguments(options.unet), process(options.scheduler)
    made_for = (full["in_channels"], full["sample_size"], full["sample_size"])
    if tuple(shape) != made_for or num_classes != (full["num_class_embeds"] or 0):
        raise ValueError(f"unet makes images of shape {made_for} with num_class_embeds = {full['num_class_embeds']}")
    outputs = made_for[0] * (2 if diffusion.learned_variance else 1)
    if full["out_channels"] != outputs or options.learned_variance != diffusion.learned_variance:
        raise ValueError(
            f"unet.out_channels = {full['out_channels']} must be {outputs} with the scheduler's variance_type = "
            f"{options.scheduler.get('variance_type')!r}, and learned_variance = {diffusion.learned_variance}"
        )
    net = DiffusersUnet(options.unet)
    return DiffusersModel(net, PixelCodec(shape), num_classes, options, draw_options, diffusion.preconditioner)
