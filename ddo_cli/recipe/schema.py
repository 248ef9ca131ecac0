"""Schema of all recipe keys: type, default, description, and the messages about values that do not fit.

Needs no torch and no file; `load` reads files.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ddo_cli.diffusion.samplers import CHOICES, SAMPLERS
from ddo_cli.errors import RecipeError, printable
from ddo_cli.recipe.training import (
    ClassifierRecipe,
    DiscriminatorRecipe,
    FinetuneRecipe,
    Precision,
    PretrainRecipe,
    Section,
    TrainRecipe,
    key,
)

__all__ = ["Precision", "TrainRecipe"]  # also from here

DEFAULT_RECIPE = "quickstart"


class DataRecipe(Section):
    """The real data."""

    source: str = key(
        "embedded:digits16",
        "Real images: a folder, zip, tar, parquet, npz, CIFAR-10's .tar.gz, embedded:<name>, or a set of `ddo encode`.",
    )
    rejected: str | None = key(
        None,
        "For finetune.objective = dpo: the worse image beside each one of data.source, by file name where both are "
        "image files, else by position.",
    )
    num: int | None = key(None, "Use this many images. Default: all.", ge=1)
    hflip: bool = key(False, "Mirror each real training image left to right with probability 1/2.")
    # Excluded since it changes no result, so a run may continue with another value.
    cache: bool = key(True, "Keep decoded images on disk for later runs.", exclude=True)


class ModelRecipe(Section):
    """The network that `pretrain` trains, and the checkpoint that the other commands start from."""

    name: str = key("patch-unet", "A registered model.")
    file: str | None = key(None, "Python file that registers your own model.")
    options: dict[str, Any] = key({}, "Constructor options of the model.")
    draw: dict[str, Any] = key({}, "Randomness of pretraining: p_mean, label_dropout, ...")
    ckpt: str = key("embedded:digits16", "Model to improve or guide: a weight file, run directory or embedded:<name>.")


def _respacing(value: Any) -> Any:
    """250 and [10, 15, 20] as text: YAML reads respacing=250 as a number."""
    parts = value if isinstance(value, list) else [value]
    return ",".join(map(str, parts)) if parts and all(type(part) is int for part in parts) else value


_RESPACING = Field(pattern=r"^(ddim\d{1,5}|\d{1,5}(,\d{1,5})*)$")
LARGEST_SIGMA = 1e8  # and its inverse the smallest; our choice, far beyond every model, so that no power overflows
# Keys that only EDM's samplers read; one of GENERALISED selects the generalised sampler.
CHURN = ("s_churn", "s_min", "s_max", "s_noise")
CFG = ("cfg_sigma_min", "cfg_sigma_max", "cfg_scale_low", "cfg_sigma_low", "cfg_channels")  # of cfg_scale alone
GENERALISED = ("discretization", "schedule", "scaling", "step_ratio")


def _one_of(names: Collection[str], problem: str) -> BeforeValidator:
    """Refuses a value that is neither None nor one of the names; the message has the nearest and all of them."""

    def check(value: Any) -> Any:
        if value is not None and (not isinstance(value, str) or value not in names):
            message = f"{problem}{nearest(str(value), names)}; known: {', '.join(names)}"
            raise PydanticCustomError("unknown", "{message}", {"message": message})
        return value

    return BeforeValidator(check)


class SamplingRecipe(Section):
    """How samples are drawn. Default of a key: the model's own. A key that the model does not read is an error."""

    batch: int = key(256, "Images per network pass; changes only the rounding of results.", ge=1)
    sampler: Annotated[str | None, _one_of(SAMPLERS, "no sampler has this name")] = key(
        None, f"One of {', '.join(SAMPLERS)}."
    )
    steps: int | None = key(None, "Sampling steps.", ge=1, le=10_000)
    labels: Literal["balanced", "random", "position"] | None = key(
        None,
        "Class labels: balanced (seed modulo classes), position (place in the list of seeds modulo "
        "classes), or random as EDM's scripts draw them.",
    )
    rng: Literal["cpu", "cuda"] | None = key(
        None,
        "Generator of each image's noise. cuda: the numbers that torch's CUDA generator draws from the seed, whatever "
        "the device. Default: cpu.",
    )
    precision: Precision | None = key(
        None, "Precision of network passes. auto: tf32 on a GPU, float32 on a CPU. Default: the model's own, else auto."
    )
    compile: bool | None = key(None, "torch.compile the network; the first batches take minutes. Default: no.")
    dtype: Literal["float64", "float32"] | None = key(None, "Type of the sampler's state. Default: float64.")
    spacing: Literal["karras", "vp", "steps"] | None = key(
        None,
        "Noise levels: karras (EDM), vp (evenly in the time of the VP-SDE), or steps (training steps of a "
        "model with discrete ones). Default: steps, or else vp, for ddim and ddpm; karras for the others.",
    )
    respacing: Annotated[Annotated[str, _RESPACING] | None, BeforeValidator(_respacing)] = key(
        None, "Of spacing steps: 250, ddim25 or 10,15,20."
    )
    sigma_min: float | None = key(
        None, "Smallest noise level: a standard deviation, where pixels lie in [-1, 1].", ge=1 / LARGEST_SIGMA
    )
    sigma_max: float | None = key(None, "Largest noise level, as sigma_min.", gt=0, le=LARGEST_SIGMA)
    rho: float | None = key(None, "Exponent of the Karras spacing.", ge=0.1, le=100)
    s_churn: float | None = key(None, "EDM's stochasticity S_churn (heun and euler).", ge=0)
    s_min: float | None = key(None, "Smallest noise level with churn, as sigma_min.", ge=0)
    s_max: float | None = key(None, "Largest noise level with churn, as sigma_min.", gt=0)
    s_noise: float | None = key(None, "Standard deviation of the churn's noise.", gt=0)
    discretization: Literal["vp", "ve", "iddpm", "edm"] | None = key(
        None,
        "Time steps of EDM's generalised sampler (heun or euler), used for its ablations and baselines. It "
        "is chosen by setting this key, schedule, scaling or step_ratio. Default: edm.",
    )
    schedule: Literal["vp", "ve", "linear"] | None = key(None, "Generalised sampler: noise schedule. Default: linear.")
    scaling: Literal["vp", "none"] | None = key(None, "Generalised sampler: signal scaling. Default: none.")
    step_ratio: float | None = key(
        None, "Generalised sampler: place of Heun's second evaluation within a step. Default: 1.", gt=0, le=1
    )
    clip_denoised: bool | None = key(None, "Clip the denoised image to [-1, 1] in each step (ADM).")
    ddpm_variance: Literal["small", "large"] | None = key(
        None,
        "Variance of ddpm's noise, where the model has not learned it: beta~ (small), or beta (large). Default: small.",
    )
    last_step: Literal["heun", "euler", "mean"] | None = key(
        None,
        "Last step of flow-heun: heun (SiT) or euler (REPA); of flow-sde: mean, the SDE's without noise, or euler, the "
        "ODE's. Default: heun, mean.",
    )
    tolerance: float | None = key(
        None,
        "Relative error of a step of flow-dopri5, which chooses its steps so; the absolute one is a thousandth of it. "
        "Default: 1e-3 (SiT's).",
        ge=1e-10,
        le=0.1,
    )
    diffusion_form: Literal["sigma", "decreasing"] | None = key(
        None, "Noise of flow-sde over time, in SiT's names. Default: sigma (REPA's, too)."
    )
    cfg_scale: float | None = key(None, "Scale of classifier-free guidance, 1 = off.", ge=0)
    cfg_sigma_min: float | None = key(None, "Guidance only above this noise level (arXiv 2404.07724).", ge=0)
    cfg_sigma_max: float | None = key(None, "Guidance only up to this noise level.", gt=0)
    cfg_scale_low: float | None = key(None, "Another cfg_scale at noise levels up to cfg_sigma_low.", ge=0)
    cfg_sigma_low: float | None = key(None, "Noise level up to which cfg_scale_low is used.", gt=0)
    cfg_channels: int | None = key(
        None, "Guide the first so many channels only (3 of DiT's and SiT's 4). Default: all.", ge=1
    )
    temperature: float | None = key(None, "Autoregressive models: softmax temperature.", gt=0)
    top_k: int | None = key(None, "Autoregressive models: sample from the k most likely values.", ge=1)
    top_p: float | None = key(
        None, "Autoregressive models: sample from the most likely values, of probability p.", gt=0, le=1
    )
    smooth: bool | None = key(
        None, "VAR: mix codes with Gumbel-softmax weights, not sample them; for pictures, not for scores."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "SamplingRecipe":
        for low, high in (("sigma_min", "sigma_max"), ("cfg_sigma_min", "cfg_sigma_max")):
            at_low, at_high = getattr(self, low), getattr(self, high)
            if at_low is not None and at_high is not None and at_low >= at_high:
                raise ValueError(f"{low} = {at_low} must be below {high} = {at_high}")
        if (self.cfg_scale_low is None) != (self.cfg_sigma_low is None):
            raise ValueError("cfg_scale_low and cfg_sigma_low belong together; give both, or neither")
        return self

    def merged(self, **given: Any) -> "SamplingRecipe":
        """This recipe with its values replaced by the given ones that are not None. Raises RecipeError.

        A given sampler or number of steps also drops the stored values that do not go with it: the published settings
        of a file must not forbid another sampler.
        """
        sampler = SAMPLERS.get(given.get("sampler") or "")
        drops = (
            (("steps", "respacing"), given.get("steps") or given.get("respacing")),  # both count steps
            (CHURN, sampler and not sampler.churns),
            (GENERALISED, sampler and not sampler.generalised),
            (("spacing", "respacing"), sampler and sampler.spacing in ("snapped", "flow", "sde")),
            (("dtype",), sampler and sampler.spacing == "flow"),
            (("steps",), sampler and sampler.is_adaptive),
            (("tolerance",), sampler and not sampler.is_adaptive),
            *(((key,), sampler and getattr(self, key) not in sampler.choices.get(key, ())) for key in CHOICES),
            (("ddpm_variance",), sampler and sampler.name != "ddpm"),
            (CFG, given.get("cfg_scale") == 1),
        )
        dropped = {key: None for keys, applies in drops if applies for key in keys}
        return _merged(self, dropped, given, "sampling")


S = TypeVar("S", bound=Section)


def _merged(stored: S, changes: dict[str, Any], given: dict[str, Any], place: str) -> S:
    """`stored` with the changes, and then with the given values that are not None. Raises RecipeError."""
    values = stored.model_dump() | changes | {key: value for key, value in given.items() if value is not None}
    try:
        return type(stored)(**values)
    except ValidationError as error:
        raise RecipeError("\n".join(messages(error, place, {}))) from None


# Benchmarks with published results in `metrics.published`.
Benchmark = Literal[
    "cifar10-uncond", "cifar10-cond", "ffhq64", "afhqv2-64", "celeba64", "imagenet64", "imagenet256", "imagenet512"
]  # fmt: skip


class MetricRecipe(Section):
    """How a model is scored. Lower is better for every metric."""

    name: Literal["fd_embedded", "fid", "fd_dinov2", "fd_clip", "clip", "js"] = key(
        "fd_embedded",
        "Metric. clip: 100 minus the CLIP score of images and their captions, of a text-to-image model.",
    )
    ref: str | None = key(None, "Reference images or statistics. Default: the training data.")
    num_images: int = key(4096, "Images per score.", ge=2, le=250_000)
    repeats: int = key(
        3, "Ranges of seeds in a mean score; finetune-ddo promotes by so many and reports so many others.", ge=1, le=4
    )
    weights: str | None = key(None, "Weights of the metric's network, such as Inception's; of clip a folder of CLIP.")
    benchmark: Annotated[Benchmark | None, _one_of(get_args(Benchmark), "no published figures are known of it")] = key(
        None, "Benchmark whose published results are shown beside the score."
    )
    extractor: str | None = key(None, "For fd_embedded: an extractor of `ddo train-extractor`.")


class GuidanceRecipe(Section):
    """How a discriminator guides sampling (arXiv 2211.17091)."""

    dg_weight: float = key(1.0, "Guidance weight in a step's predictor; 0 = off, 1 aims at the data.", ge=0)
    dg_weight_2nd: float = key(0.0, "Guidance weight in the step's corrector (heun).", ge=0)
    time_min: float = key(0.01, "Guide only at VP times from here on, in [0, 1].", ge=0, le=1)
    time_max: float = key(1.0, "Guide only at VP times up to here, in [0, 1].", ge=0, le=1)
    decay: Literal["constant", "linear", "cosine"] = key(
        "constant", "Weight over time; linear and cosine fall with t (our choice; the paper gives none)."
    )
    boost: bool = key(False, "Churn and a doubled weight for samples with negative log-ratio.")
    boost_churn_period: int = key(5, "Steps between churns of boosted samples.", ge=1)
    boost_weight_period: int = key(2, "Steps between doubled weights of boosted samples.", ge=1)
    boost_churn: float = key(4.0, "S_churn of boosted samples.", ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "GuidanceRecipe":
        if self.time_min >= self.time_max:
            raise ValueError(f"time_min = {self.time_min} must be below time_max = {self.time_max}")
        if self.boost and not self.dg_weight:
            raise ValueError("boost = true needs dg_weight above 0, since it acts on the log-ratio that guides")
        return self

    def merged(self, **given: Any) -> "GuidanceRecipe":
        """This recipe with its values replaced by the given ones that are not None. Raises RecipeError."""
        without = given.get("dg_weight") == 0 and not given.get("boost")  # a stored boost has no guidance to act on
        return _merged(self, {"boost": False} if without else {}, given, "command line")


class Recipe(Section):
    """A whole recipe file."""

    name: str = key(
        DEFAULT_RECIPE,
        "Name of the recipe; runs are written to runs/<name>.",
        pattern=r"^[.]*[A-Za-z0-9_-][A-Za-z0-9._-]*$",  # a directory below runs/
    )
    seed: int = key(0, "Seed of all random numbers.", ge=0)
    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    sampling: SamplingRecipe = SamplingRecipe()
    metric: MetricRecipe = MetricRecipe()
    pretrain: PretrainRecipe = PretrainRecipe()
    finetune: FinetuneRecipe = FinetuneRecipe()
    discriminator: DiscriminatorRecipe = DiscriminatorRecipe()
    guidance: GuidanceRecipe = GuidanceRecipe()
    classifier: ClassifierRecipe = ClassifierRecipe()

    @model_validator(mode="after")
    def _has_pairs(self) -> "Recipe":
        objective, rejected = self.finetune.objective, self.data.rejected
        if objective == "dpo" and rejected is None:
            raise ValueError("finetune.objective = dpo compares pairs; give the worse image of each as data.rejected")
        if objective != "dpo" and rejected is not None:
            raise ValueError(
                f"data.rejected = {printable(rejected, 80)} is read by finetune.objective = dpo alone, which is "
                f"{objective} here; leave it out, or set dpo"
            )
        return self

    def told(self, *sections: str) -> dict[str, Any]:
        """Name, seed and these sections, JSON-ready: what provenance tells of a command that reads no others."""
        return self.model_dump(mode="json", include={"name", "seed", *sections})

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


_LONGEST_KEY = 60  # characters that are compared with known ones: the time grows with their square


def nearest_key(key: str) -> str:
    """ " (did you mean '...'?)" for a misspelt key or one without its section; empty if nothing is near."""
    if override := re.match(r"finetune\.from_round\.\d+\.", key):
        return nearest(key[override.end() :], FinetuneRecipe.model_fields)
    known, key = all_keys(), key[:_LONGEST_KEY]
    same_end = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    section = key.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == section]
    near = same_end or difflib.get_close_matches(key, inside, 1) or difflib.get_close_matches(key, known, 1)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def nearest(word: str, known: Any) -> str:
    """ " (did you mean '...'?)" for a misspelt word; empty if nothing is near."""
    near = difflib.get_close_matches(word[:_LONGEST_KEY], list(known), 1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def messages(error: ValidationError, path: str, places: dict[str, str]) -> Iterator[str]:
    """One line per problem: place, key, value and remedy. places: where a key was given, if not in `path`."""
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        place, shown = places.get(key, path), printable(key, 80)
        if problem["type"] == "extra_forbidden":
            yield f"{place}: unknown key '{shown}'{nearest_key(key)}"
        elif not key:
            yield f"{place}: {problem['msg'].removeprefix('Value error, ')}"
        else:
            remedy = problem["msg"][:1].lower() + problem["msg"][1:].removeprefix("Value error, ")
            yield f"{place}: {shown} = {printable(repr(problem['input']), 80)}: {remedy}"
