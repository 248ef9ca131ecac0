"""Schema of every recipe key: what a recipe may hold, its defaults, and the messages about what it may not.

Torch-free, and knows no file; `recipe` reads files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
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

__all__ = ["Precision", "TrainRecipe"]  # for those who need no more than a schema of training

DEFAULT_RECIPE = "quickstart"


class DataRecipe(Section):
    """The real data."""

    source: str = "embedded:digits32"  # embedded:<name>, a folder, a zip or npz of images, or CIFAR-10's .tar.gz
    num: int | None = Field(None, ge=1)  # use this many items (renderings of an embedded set); None: all
    hflip: bool = False  # each real training image is mirrored (left to right) half of the time
    # Whether decoded images are kept on disk for later runs. Changes no result, so a run may continue with another.
    cache: bool = Field(True, exclude=True)


class ModelRecipe(Section):
    """The network that `pretrain` trains, and the reference that `finetune-ddo` starts from."""

    name: str = "patch-unet"  # a registered model
    file: str | None = None  # Python file that registers the user's own model
    options: dict[str, Any] = Field(default_factory=dict)  # constructor options, checked by the model
    draw: dict[str, Any] = Field(
        default_factory=dict
    )  # randomness of pretraining (p_mean, p_std, label_dropout), ditto
    ckpt: str = "embedded:digits32"  # reference of finetune-ddo: a weight file or embedded:<name>


def _respacing(value: Any) -> Any:
    """250 and [10, 15, 20] as the texts they stand for: YAML reads respacing=250 as a number."""
    parts = value if isinstance(value, list) else [value]
    return ",".join(map(str, parts)) if parts and all(type(part) is int for part in parts) else value


_RESPACING = Field(pattern=r"^(ddim\d{1,5}|\d{1,5}(,\d{1,5})*)$")
CHURN = ("s_churn", "s_min", "s_max", "s_noise")  # keys that only EDM's samplers read
GENERALISED = ("discretization", "schedule", "scaling", "step_ratio")  # ditto; one of them asks for the generalised one


def _sampler(value: Any) -> Any:
    if value is not None and value not in list(SAMPLERS):
        message = f"no sampler has this name{nearest(str(value), SAMPLERS)}; known: {', '.join(SAMPLERS)}"
        raise PydanticCustomError("sampler", "{message}", {"message": message})
    return value


class SamplingRecipe(Section):
    """How samples are drawn. None: the model's default. A key that the model does not read is an error."""

    batch: int = Field(256, ge=1)  # images per network pass; another batch changes rounding only
    sampler: Annotated[str | None, BeforeValidator(_sampler)] = Field(None, description=", ".join(SAMPLERS))
    steps: int | None = Field(None, ge=1, le=10_000)
    # balanced: seed modulo classes; random: as EDM's scripts draw; position: place in the list of seeds modulo classes.
    labels: Literal["balanced", "random", "position"] | None = None
    precision: Literal["float32", "tf32", "bf16", "fp16"] | None = None  # of network passes; None: float32
    dtype: Literal["float64", "float32"] | None = None  # of state and noise levels; None: float64, EDM2's is float32
    # Of noise levels: karras (EDM's), vp (evenly in the time of the VP-SDE), or steps (the training steps of a model
    # that knows discrete ones). None: steps or else vp for ddim and ddpm, karras for the others.
    spacing: Literal["karras", "vp", "steps"] | None = None
    # Of spacing steps: 250, ddim25 or 10,15,20.
    respacing: Annotated[Annotated[str, _RESPACING] | None, BeforeValidator(_respacing)] = None
    sigma_min: float | None = Field(None, gt=0)
    sigma_max: float | None = Field(None, gt=0)
    rho: float | None = Field(None, gt=0)  # curvature of Karras spacing
    s_churn: float | None = Field(None, ge=0)  # EDM's stochasticity (heun and euler)
    s_min: float | None = Field(None, ge=0)
    s_max: float | None = Field(None, gt=0)
    s_noise: float | None = Field(None, gt=0)
    # EDM's generalised sampler (heun or euler), with which its ablations and baselines were drawn; one of these asks
    # for it. Defaults then: edm, linear, none, 1.
    discretization: Literal["vp", "ve", "iddpm", "edm"] | None = None
    schedule: Literal["vp", "ve", "linear"] | None = None
    scaling: Literal["vp", "none"] | None = None
    step_ratio: float | None = Field(None, gt=0, le=1)  # where in a step Heun's second evaluation lies, 1 = at its end
    clip_denoised: bool | None = None  # keep the denoised image in [-1, 1] at each step, as ADM does
    cfg_scale: float | None = Field(None, ge=0)  # classifier-free guidance, 1 = off
    cfg_sigma_min: float | None = Field(None, ge=0)  # guided at noise levels above this one only,
    cfg_sigma_max: float | None = Field(None, gt=0)  # and up to this one (arXiv 2404.07724)
    temperature: float | None = Field(None, gt=0)  # autoregressive models
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    smooth: bool | None = None  # VAR: codes mixed by their probability, for pictures and not for scores

    @model_validator(mode="after")
    def _ordered(self) -> SamplingRecipe:
        for low, high in (("sigma_min", "sigma_max"), ("cfg_sigma_min", "cfg_sigma_max")):
            at_low, at_high = getattr(self, low), getattr(self, high)
            if at_low is not None and at_high is not None and at_low >= at_high:
                raise ValueError(f"{low} = {at_low} must be below {high} = {at_high}")
        return self

    def merged(self, **given: Any) -> SamplingRecipe:
        """This recipe with the given values that are not None in place of its own. Raises RecipeError.

        Own values that only another way of sampling reads go when a sampler or a count is given: a file's published
        settings must not forbid the sampler that is asked for.
        """
        try:
            own, given = self.model_dump(), {key: value for key, value in given.items() if value is not None}
            if "steps" in given or "respacing" in given:  # both count steps
                own |= {"steps": None, "respacing": None}
            sampler = SAMPLERS.get(given.get("sampler", ""))
            if sampler and not sampler.churns:
                own |= dict.fromkeys(CHURN)
            if sampler and not sampler.generalised:
                own |= dict.fromkeys(GENERALISED)
            if sampler and sampler.spacing == "snapped":
                own |= dict.fromkeys(("spacing", "respacing"))
            if given.get("cfg_scale") == 1:
                own |= dict.fromkeys(("cfg_sigma_min", "cfg_sigma_max"))
            return SamplingRecipe(**(own | given))
        except ValidationError as error:
            raise RecipeError("\n".join(messages(error, "sampling", {}))) from None


# Those that `metrics.published` holds figures of.
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
    """What scores a model: lower is better for each of them."""

    name: Literal["fd_embedded", "fid", "fd_dinov2", "fd_clip", "js"] = "fd_embedded"
    ref: str | None = None  # reference images or statistics; None: the training data
    num_images: int = Field(4096, ge=2, le=250_000)  # images per score
    repeats: int = Field(3, ge=1, le=4)  # sampling-seed ranges averaged for promoted models; candidates use the first
    weights: str | None = None  # Inception weights of `fid`
    benchmark: Annotated[Benchmark | None, BeforeValidator(_benchmark)] = None  # whose published figures are shown
    extractor: str | None = None  # of fd_embedded: one of `ddo train-extractor` instead of the embedded one


class GuidanceRecipe(Section):
    """How a discriminator guides sampling (arXiv 2211.17091)."""

    dg_weight: float = Field(1.0, ge=0)  # of a step's predictor; 0 = off, 1 aims at the data, more goes beyond
    dg_weight_2nd: float = Field(0.0, ge=0)  # of its corrector (heun)
    time_min: float = Field(0.01, ge=0, le=1)  # guided only at VP times in [time_min, time_max]
    time_max: float = Field(1.0, ge=0, le=1)
    decay: Literal["constant", "linear", "cosine"] = "constant"  # weight over time, chosen by us
    boost: bool = False  # churn and doubled weight for samples whose log-ratio is negative
    boost_churn_period: int = Field(5, ge=1)  # steps
    boost_weight_period: int = Field(2, ge=1)  # steps
    boost_churn: float = Field(4.0, ge=0)  # S_churn of boosted samples

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceRecipe:
        if self.time_min >= self.time_max:
            raise ValueError(f"time_min = {self.time_min} must be below time_max = {self.time_max}")
        if self.boost and not self.dg_weight:
            raise ValueError("boost = true needs dg_weight above 0, since it acts on the log-ratio that guides")
        return self

    def merged(self, **given: Any) -> GuidanceRecipe:
        """This recipe with the given values that are not None in place of its own. Raises RecipeError."""
        try:
            values = self.model_dump() | {k: v for k, v in given.items() if v is not None}
            if given.get("dg_weight") == 0 and not given.get("boost"):
                values["boost"] = False  # stored with the discriminator, and nothing to boost
            return GuidanceRecipe(**values)
        except ValidationError as error:
            raise RecipeError("\n".join(messages(error, "command line", {}))) from None


class Recipe(Section):
    """A whole recipe file."""

    name: str = Field(DEFAULT_RECIPE, pattern=r"^[.]*[A-Za-z0-9_-][A-Za-z0-9._-]*$")  # a directory below runs/
    seed: int = Field(0, ge=0)
    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    sampling: SamplingRecipe = SamplingRecipe()
    metric: MetricRecipe = MetricRecipe()
    pretrain: PretrainRecipe = PretrainRecipe()
    finetune: FinetuneRecipe = FinetuneRecipe()
    discriminator: DiscriminatorRecipe = DiscriminatorRecipe()
    guidance: GuidanceRecipe = GuidanceRecipe()
    classifier: ClassifierRecipe = ClassifierRecipe()

    def of_round(self, number: int) -> Recipe:
        """The recipe as round `number` of a finetuning runs it."""
        return self.model_copy(update={"finetune": self.finetune.of_round(number)})


# ---------------------------------------------------------------------------------------------------------------------
# Messages about mistakes


def all_keys(schema: type[BaseModel] | None = None, prefix: str = "") -> list[str]:
    """Dotted names of every recipe key."""
    keys: list[str] = []
    for name, field in (schema or Recipe).model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += all_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def nearest_key(key: str) -> str:
    """ " (did you mean '...'?)" for a misspelt or unqualified key; empty where nothing is near."""
    if override := re.match(r"finetune\.from_round\.\d+\.", key):
        return nearest(key[override.end() :], FinetuneRecipe.model_fields)
    known = all_keys()
    same_end = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    section = key.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == section]
    found = same_end or difflib.get_close_matches(key, inside, 1) or difflib.get_close_matches(key, known, 1)
    return f" (did you mean {' or '.join(repr(name) for name in found)}?)" if found else ""


def nearest(word: str, known: Any) -> str:
    """ " (did you mean '...'?)" for a misspelt word; empty where nothing is near."""
    found = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def messages(error: ValidationError, path: str, places: dict[str, str]) -> Iterator[str]:
    """One line per problem: place, key, value and remedy. places: of single keys, where they are not from `path`."""
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
