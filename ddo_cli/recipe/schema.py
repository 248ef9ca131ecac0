"""Schema of all recipe keys: type, default, description, and the messages about values that do not fit.

Needs no torch and no file; `load` reads files.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ddo_cli.diffusion.samplers import SAMPLERS
from ddo_cli.errors import RecipeError
from ddo_cli.recipe.training import (
    ClassifierRecipe,
    DiscriminatorRecipe,
    FinetuneRecipe,
    Precision,
    PretrainRecipe,
    Section,
    TrainRecipe,
)

__all__ = ["Precision", "TrainRecipe"]  # also from here

DEFAULT_RECIPE = "quickstart"


class DataRecipe(Section):
    """The real data."""

    source: str = Field(
        "embedded:digits32",
        description="Real images: a folder, zip, npz, CIFAR-10's .tar.gz, embedded:<name>, or what `ddo encode` made.",
    )
    num: int | None = Field(None, ge=1, description="Use this many images. Default: all.")
    hflip: bool = Field(False, description="Mirror each real training image left to right with probability 1/2.")
    cache: bool = Field(
        True,
        exclude=True,  # changes no result, so a run may continue with another value
        description="Keep decoded images on disk for later runs.",
    )


class ModelRecipe(Section):
    """The network that `pretrain` trains, and the checkpoint that the other commands start from."""

    name: str = Field("patch-unet", description="A registered model.")
    file: str | None = Field(None, description="Python file that registers your own model.")
    options: dict[str, Any] = Field(default_factory=dict, description="Constructor options of the model.")
    draw: dict[str, Any] = Field(
        default_factory=dict, description="Randomness of pretraining: p_mean, label_dropout, ..."
    )
    ckpt: str = Field("embedded:digits32", description="Model to improve or guide: a weight file or embedded:<name>.")


def _respacing(value: Any) -> Any:
    """250 and [10, 15, 20] as text: YAML reads respacing=250 as a number."""
    parts = value if isinstance(value, list) else [value]
    return ",".join(map(str, parts)) if parts and all(type(part) is int for part in parts) else value


_RESPACING = Field(pattern=r"^(ddim\d{1,5}|\d{1,5}(,\d{1,5})*)$")
# Keys that only EDM's samplers read; one of GENERALISED selects the generalised sampler.
CHURN = ("s_churn", "s_min", "s_max", "s_noise")
GENERALISED = ("discretization", "schedule", "scaling", "step_ratio")


def _sampler(value: Any) -> Any:
    if value is not None and value not in list(SAMPLERS):
        message = f"no sampler has this name{nearest(str(value), SAMPLERS)}; known: {', '.join(SAMPLERS)}"
        raise PydanticCustomError("sampler", "{message}", {"message": message})
    return value


class SamplingRecipe(Section):
    """How samples are drawn. Default of a key: the model's own. A key that the model does not read is an error."""

    batch: int = Field(256, ge=1, description="Images per network pass; changes only the rounding of results.")
    sampler: Annotated[str | None, BeforeValidator(_sampler)] = Field(
        None, description=f"One of {', '.join(SAMPLERS)}."
    )
    steps: int | None = Field(None, ge=1, le=10_000, description="Sampling steps.")
    labels: Literal["balanced", "random", "position"] | None = Field(
        None,
        description="Class labels: balanced (seed modulo classes), position (place in the list of seeds modulo "
        "classes), or random as EDM's scripts draw them.",
    )
    precision: Precision | None = Field(None, description="Precision of network passes. Default: float32.")
    dtype: Literal["float64", "float32"] | None = Field(
        None, description="Type of the sampler's state. Default: float64."
    )
    spacing: Literal["karras", "vp", "steps"] | None = Field(
        None,
        description="Noise levels: karras (EDM), vp (evenly in the time of the VP-SDE), or steps (training steps of a "
        "model with discrete ones). Default: steps, or else vp, for ddim and ddpm; karras for the others.",
    )
    respacing: Annotated[Annotated[str, _RESPACING] | None, BeforeValidator(_respacing)] = Field(
        None, description="Of spacing steps: 250, ddim25 or 10,15,20."
    )
    sigma_min: float | None = Field(None, gt=0, description="Smallest noise level.")
    sigma_max: float | None = Field(None, gt=0, description="Largest noise level.")
    rho: float | None = Field(None, gt=0, description="Exponent of the Karras spacing.")
    s_churn: float | None = Field(None, ge=0, description="EDM's stochasticity S_churn (heun and euler).")
    s_min: float | None = Field(None, ge=0, description="Smallest noise level with churn.")
    s_max: float | None = Field(None, gt=0, description="Largest noise level with churn.")
    s_noise: float | None = Field(None, gt=0, description="Standard deviation of the churn's noise.")
    discretization: Literal["vp", "ve", "iddpm", "edm"] | None = Field(
        None,
        description="Time steps of EDM's generalised sampler (heun or euler), used for its ablations and baselines. It "
        "is chosen by setting this key, schedule, scaling or step_ratio. Default: edm.",
    )
    schedule: Literal["vp", "ve", "linear"] | None = Field(
        None, description="Generalised sampler: noise schedule. Default: linear."
    )
    scaling: Literal["vp", "none"] | None = Field(
        None, description="Generalised sampler: signal scaling. Default: none."
    )
    step_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Generalised sampler: place of Heun's second evaluation within a step. Default: 1.",
    )
    clip_denoised: bool | None = Field(None, description="Clip the denoised image to [-1, 1] in each step (ADM).")
    cfg_scale: float | None = Field(None, ge=0, description="Scale of classifier-free guidance, 1 = off.")
    cfg_sigma_min: float | None = Field(
        None, ge=0, description="Guidance only above this noise level (arXiv 2404.07724)."
    )
    cfg_sigma_max: float | None = Field(None, gt=0, description="Guidance only up to this noise level.")
    temperature: float | None = Field(None, gt=0, description="Autoregressive models: softmax temperature.")
    top_k: int | None = Field(None, ge=1, description="Autoregressive models: sample from the k most likely values.")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Autoregressive models: sample from the most likely values, of probability p.",
    )
    smooth: bool | None = Field(
        None,
        description="VAR: mix codes with Gumbel-softmax weights, not sample them; for pictures, not for scores.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "SamplingRecipe":
        for low, high in (("sigma_min", "sigma_max"), ("cfg_sigma_min", "cfg_sigma_max")):
            at_low, at_high = getattr(self, low), getattr(self, high)
            if at_low is not None and at_high is not None and at_low >= at_high:
                raise ValueError(f"{low} = {at_low} must be below {high} = {at_high}")
        return self

    def merged(self, **given: Any) -> "SamplingRecipe":
        """This recipe with its values replaced by the given ones that are not None. Raises RecipeError.

        A given sampler or number of steps also drops the stored values that do not go with it: the published settings
        of a file must not forbid another sampler.
        """
        try:
            stored, given = self.model_dump(), {key: value for key, value in given.items() if value is not None}
            if "steps" in given or "respacing" in given:  # both count steps
                stored |= {"steps": None, "respacing": None}
            sampler = SAMPLERS.get(given.get("sampler", ""))
            if sampler and not sampler.churns:
                stored |= dict.fromkeys(CHURN)
            if sampler and not sampler.generalised:
                stored |= dict.fromkeys(GENERALISED)
            if sampler and sampler.spacing == "snapped":
                stored |= dict.fromkeys(("spacing", "respacing"))
            if given.get("cfg_scale") == 1:
                stored |= dict.fromkeys(("cfg_sigma_min", "cfg_sigma_max"))
            return SamplingRecipe(**(stored | given))
        except ValidationError as error:
            raise RecipeError("\n".join(messages(error, "sampling", {}))) from None


# Benchmarks with published results in `metrics.published`.
Benchmark = Literal[
    "cifar10-uncond", "cifar10-cond", "ffhq64", "afhqv2-64", "imagenet64", "imagenet256", "imagenet512"
]  # fmt: skip


def _benchmark(value: Any) -> Any:
    known = get_args(Benchmark)
    if value is not None and value not in known:
        near = nearest(value, known) if isinstance(value, str) else ""
        message = f"no published figures are known of it{near}; known: {', '.join(known)}"
        raise PydanticCustomError("benchmark", "{message}", {"message": message})
    return value


class MetricRecipe(Section):
    """How a model is scored. Lower is better for every metric."""

    name: Literal["fd_embedded", "fid", "fd_dinov2", "fd_clip", "js"] = Field("fd_embedded", description="Metric.")
    ref: str | None = Field(None, description="Reference images or statistics. Default: the training data.")
    num_images: int = Field(4096, ge=2, le=250_000, description="Images per score.")
    repeats: int = Field(
        3, ge=1, le=4, description="Ranges of seeds over which the scores of promoted models are averaged."
    )
    weights: str | None = Field(None, description="Inception weights of the FID.")
    benchmark: Annotated[Benchmark | None, BeforeValidator(_benchmark)] = Field(
        None, description="Benchmark whose published results are shown beside the score."
    )
    extractor: str | None = Field(None, description="For fd_embedded: an extractor of `ddo train-extractor`.")


class GuidanceRecipe(Section):
    """How a discriminator guides sampling (arXiv 2211.17091)."""

    dg_weight: float = Field(
        1.0, ge=0, description="Guidance weight in a step's predictor; 0 = off, 1 aims at the data."
    )
    dg_weight_2nd: float = Field(0.0, ge=0, description="Guidance weight in the step's corrector (heun).")
    time_min: float = Field(0.01, ge=0, le=1, description="Guide only at VP times from here on, in [0, 1].")
    time_max: float = Field(1.0, ge=0, le=1, description="Guide only at VP times up to here, in [0, 1].")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Weight over time; linear and cosine fall with t (our choice; the paper gives none)."
    )
    boost: bool = Field(False, description="Churn and a doubled weight for samples with negative log-ratio.")
    boost_churn_period: int = Field(5, ge=1, description="Steps between churns of boosted samples.")
    boost_weight_period: int = Field(2, ge=1, description="Steps between doubled weights of boosted samples.")
    boost_churn: float = Field(4.0, ge=0, description="S_churn of boosted samples.")

    @model_validator(mode="after")
    def _ordered(self) -> "GuidanceRecipe":
        if self.time_min >= self.time_max:
            raise ValueError(f"time_min = {self.time_min} must be below time_max = {self.time_max}")
        if self.boost and not self.dg_weight:
            raise ValueError("boost = true needs dg_weight above 0, since it acts on the log-ratio that guides")
        return self

    def merged(self, **given: Any) -> "GuidanceRecipe":
        """This recipe with its values replaced by the given ones that are not None. Raises RecipeError."""
        try:
            values = self.model_dump() | {k: v for k, v in given.items() if v is not None}
            if given.get("dg_weight") == 0 and not given.get("boost"):
                values["boost"] = False  # the stored boost has no guidance to act on
            return GuidanceRecipe(**values)
        except ValidationError as error:
            raise RecipeError("\n".join(messages(error, "command line", {}))) from None


class Recipe(Section):
    """A whole recipe file."""

    name: str = Field(
        DEFAULT_RECIPE,
        pattern=r"^[.]*[A-Za-z0-9_-][A-Za-z0-9._-]*$",  # a directory below runs/
        description="Name of the recipe; runs are written to runs/<name>.",
    )
    seed: int = Field(0, ge=0, description="Seed of all random numbers.")
    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    sampling: SamplingRecipe = SamplingRecipe()
    metric: MetricRecipe = MetricRecipe()
    pretrain: PretrainRecipe = PretrainRecipe()
    finetune: FinetuneRecipe = FinetuneRecipe()
    discriminator: DiscriminatorRecipe = DiscriminatorRecipe()
    guidance: GuidanceRecipe = GuidanceRecipe()
    classifier: ClassifierRecipe = ClassifierRecipe()

    def of_round(self, number: int) -> "Recipe":
        """The recipe of round `number` of a finetuning."""
        return self.model_copy(update={"finetune": self.finetune.of_round(number)})


# --- Messages about mistakes


def fields(schema: Any = None, prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """Every recipe key, in the order of a file: its dotted name, the section that it is in, and its field."""
    for name, field in (schema or Recipe).model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", schema or Recipe, field


def all_keys() -> list[str]:
    """Dotted names of every recipe key."""
    return [name for name, _, _ in fields()]


def nearest_key(key: str) -> str:
    """ " (did you mean '...'?)" for a misspelt key or one without its section; empty if nothing is near."""
    if override := re.match(r"finetune\.from_round\.\d+\.", key):
        return nearest(key[override.end() :], FinetuneRecipe.model_fields)
    known = all_keys()
    same_end = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    section = key.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == section]
    near = same_end or difflib.get_close_matches(key, inside, 1) or difflib.get_close_matches(key, known, 1)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def nearest(word: str, known: Any) -> str:
    """ " (did you mean '...'?)" for a misspelt word; empty if nothing is near."""
    near = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def messages(error: ValidationError, path: str, places: dict[str, str]) -> Iterator[str]:
    """One line per problem: place, key, value and remedy. places: where a key was given, if not in `path`."""
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        place = places.get(key, path)
        if problem["type"] == "extra_forbidden":
            yield f"{place}: unknown key '{key}'{nearest_key(key)}"
        elif not key:
            yield f"{place}: {problem['msg'].removeprefix('Value error, ')}"
        else:
            remedy = problem["msg"][:1].lower() + problem["msg"][1:].removeprefix("Value error, ")
            yield f"{place}: {key} = {problem['input']!r}: {remedy}"
