"""Schema of every recipe key, YAML files and key=value overrides. All problems of a recipe are reported together.

One recipe serves every command: `pretrain` reads `model` and `pretrain`, `finetune-ddo` reads `finetune`, `train-disc`
reads `discriminator` and stores `guidance` for `guide-sample`; all read `data`, `sampling` and `metric`. Counts of
training are in images, as in the papers, not in steps.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddo_cli.errors import RecipeError

Precision = Literal["float32", "tf32", "bf16"]
DEFAULT_RECIPE = "quickstart"


class Section(BaseModel):
    """A group of keys; a key that nothing reads is an error, and values are never converted in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class DataRecipe(Section):
    """The real data."""

    source: str = "embedded:digits32"  # embedded:<name>, a folder, a zip or an npz of images
    num: int | None = Field(None, ge=1)  # use this many items (renderings of an embedded set); None: all


class ModelRecipe(Section):
    """The network that `pretrain` trains, and the reference that `finetune-ddo` starts from."""

    name: str = "patch-unet"  # a registered model
    file: str | None = None  # Python file that registers the user's own model
    options: dict[str, Any] = Field(default_factory=dict)  # constructor options, checked by the model
    draw: dict[str, Any] = Field(default_factory=dict)  # randomness of pretraining (p_mean, p_std, label_drop), ditto
    ckpt: str = "embedded:digits32"  # reference of finetune-ddo: a weight file or embedded:<name>


class SamplingRecipe(Section):
    """How samples are drawn. None: the model's default. A key that the model does not read is an error."""

    batch: int = Field(256, ge=1)  # images per network pass; another batch changes rounding only
    sampler: Literal["euler", "heun", "dpmpp-2m", "ddim", "ddpm"] | None = None
    steps: int | None = Field(None, ge=1, le=10_000)
    spacing: Literal["karras", "vp"] | None = (
        None  # of noise levels; None: vp (as DDPM's) for ddim and ddpm, else karras
    )
    sigma_min: float | None = Field(None, gt=0)
    sigma_max: float | None = Field(None, gt=0)
    rho: float | None = Field(None, gt=0)  # curvature of Karras spacing
    s_churn: float | None = Field(None, ge=0)  # EDM's stochasticity (heun and euler)
    s_min: float | None = Field(None, ge=0)
    s_max: float | None = Field(None, gt=0)
    s_noise: float | None = Field(None, gt=0)
    cfg_scale: float | None = Field(None, ge=0)  # classifier-free guidance, 1 = off
    temperature: float | None = Field(None, gt=0)  # autoregressive models
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> SamplingRecipe:
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min} must be below sigma_max = {self.sigma_max}")
        return self

    def merged(self, **given: Any) -> SamplingRecipe:
        """This recipe with the given values that are not None in place of its own. Raises RecipeError."""
        try:
            return SamplingRecipe(**(self.model_dump() | {k: value for k, value in given.items() if value is not None}))
        except ValidationError as error:
            raise RecipeError("\n".join(_messages(error, "sampling", {}))) from None


class MetricRecipe(Section):
    """What scores a model: lower is better for each of them."""

    name: Literal["fd_embedded", "fid", "js"] = "fd_embedded"
    ref: str | None = None  # reference images or statistics; None: the training data
    num_images: int = Field(4096, ge=2, le=250_000)  # images per score
    repeats: int = Field(3, ge=1, le=4)  # sampling-seed ranges averaged for promoted models; candidates use the first
    weights: str | None = None  # Inception weights of `fid`
    extractor: str | None = None  # of fd_embedded: one of `ddo train-extractor` instead of the embedded one


class TrainRecipe(Section):
    """What `pretrain` and `finetune` share."""

    lr: float = Field(1e-4, gt=0)
    warmup: int = Field(0, ge=0)  # images of linear warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    batch: int = Field(64, ge=1)  # real images per optimizer step, over all processes
    micro_batch: int | None = Field(None, ge=1)  # real images per forward pass of one process; None: its whole share
    ema_half_life: float = Field(500.0, ge=0)  # images; 0: no averaging
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)  # added to the gradient, as Adam's (not AdamW's)
    grad_clip: float | None = Field(None, gt=0)  # largest gradient norm
    precision: Precision = "float32"  # of the network passes; log-ratios are float32 always
    log_every: int = Field(10, ge=1)  # steps
    save_every: int = Field(20, ge=1)  # steps between saves of what resuming needs


class PretrainRecipe(TrainRecipe):
    """Maximum likelihood."""

    images: int = Field(96_000, ge=1)
    ema_ramp: float | None = Field(0.05, gt=0)  # half-life at most this share of the images seen (EDM)


class FinetuneRecipe(TrainRecipe):
    """Direct Discriminative Optimization (arXiv 2503.01103)."""

    rounds: int = Field(4, ge=1)
    alpha: float = Field(4.0, gt=0)  # weight of the fake term
    beta: float = Field(0.05, gt=0)  # scale of the log-ratio; goes about as 1 / dimension
    divide_by_alpha: bool = False  # loss / max(alpha, 1), as VAR's trainer does
    images_per_round: int = Field(7680, ge=1)
    num_fake: int = Field(4096, ge=1, le=100_000_000)  # samples of the reference per round
    draw: dict[str, Any] = Field(default_factory=dict)  # training randomness in place of the reference's (p_std, ...)
    eval_every: int = Field(3840, ge=1)  # images between candidates of a round
    max_denoising_ratio: float = Field(2.0, gt=1)  # stop when the plain loss on real images exceeds this x reference's


class DiscriminatorRecipe(TrainRecipe):
    """Training of a real-or-generated discriminator (arXiv 2211.17091). Defaults: the published CIFAR-10 run."""

    name: str = "time-encoder"  # a registered discriminator
    options: dict[str, Any] = Field(default_factory=dict)  # its constructor options
    conditional: bool = True  # sees the label, where the model has classes
    fake: str | None = None  # generated images; None: drawn from model.ckpt and kept in the run
    num_fake: int = Field(50_000, ge=1, le=100_000_000)  # images to draw
    held_out: int = Field(1024, ge=16)  # real images, and as many generated ones, that are not trained on
    time: Literal["importance", "uniform", "model"] = "importance"  # density of t; model: of the model's own sigma
    t_min: float = Field(1e-5, gt=0, lt=1)  # smallest t of importance and uniform
    weighting: Literal["none", "likelihood"] = "none"  # likelihood: every density of t has the objective of importance
    images: int = Field(500_000, ge=1)  # real images at most, repeats counted, with as many generated ones
    eval_every: int = Field(25_000, ge=1)  # images between checkpoints, each with its held-out loss
    patience: int = Field(4, ge=1)  # stop after so many checkpoints in a row without a better held-out loss
    select: Literal["bce", "fid"] = "bce"  # final checkpoint: best held-out loss, or best metric of guided samples
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-7, ge=0)
    ema_half_life: float = Field(0.0, ge=0)


class ClassifierRecipe(TrainRecipe):
    """Training of a noisy-image classifier: for classifier guidance, or as the trunk under a discriminator."""

    name: str = "time-encoder-classifier"  # a registered classifier
    options: dict[str, Any] = Field(default_factory=dict)  # its constructor options
    held_out: int = Field(1024, ge=16)  # images for the accuracy
    time: Literal["importance", "uniform", "model"] = "uniform"  # density of t; rows are not weighted
    t_min: float = Field(1e-5, gt=0, lt=1)
    images: int = Field(500_000, ge=1)
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-7, ge=0)
    ema_half_life: float = Field(0.0, ge=0)


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
            raise RecipeError("\n".join(_messages(error, "command line", {}))) from None


class Recipe(Section):
    """A whole recipe file."""

    name: str = Field(DEFAULT_RECIPE, pattern=r"^[A-Za-z0-9._-]+$")
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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def recipe_dirs() -> list[Path]:
    """Where named recipes live: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return [path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()]


def recipe_names() -> dict[str, Path]:
    """Names and files of the recipes that come with the package."""
    return {path.stem: path for root in recipe_dirs() for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by name. Raises RecipeError naming the nearest."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"recipe {name} does not exist; give a YAML file or one of: {', '.join(recipe_names())}")
        return path
    if name not in recipe_names():
        raise RecipeError(
            f"unknown recipe '{name}'{_nearest(name, recipe_names())}; known: {', '.join(recipe_names())}"
        )
    return recipe_names()[name]


def load(
    name: str = DEFAULT_RECIPE,
    overrides: Sequence[str] = (),
    given: dict[str, Any] | None = None,
    check: Callable[[Recipe], list[str]] | None = None,
) -> Recipe:
    """The recipe `name` with command-line values in place of its own.

    overrides: "section.key=value" strings; values are YAML.
    given: values of options by dotted key; those that are None are left alone.
    check: further problems of a valid recipe (for example of the model's own options).
    Raises RecipeError listing every problem.
    """
    path = find_recipe(name)
    try:
        content = _parse_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold keys such as 'name:' and 'finetune:', not {type(content).__name__}")
    content = {key: value for key, value in content.items() if value is not None}  # a section without keys
    values, problems = _parse_overrides(overrides)
    values |= {key: value for key, value in (given or {}).items() if value is not None}
    for key, value in values.items():
        try:
            _set(content, key, value)
        except TypeError as error:
            problems.append(f"command line: {key}={value}: {error}")
    places = dict.fromkeys(values, "command line")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("\n".join(problems + list(_messages(error, str(path), places)))) from None
    problems += check(recipe) if check else []
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Lines "key: theirs -> ours" of all keys whose values differ."""
    left, right = dict(_flatten(theirs)), dict(_flatten(ours))
    return [
        f"{key}: {left.get(key, 'absent')} -> {right.get(key, 'absent')}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key, "absent") != right.get(key, "absent")
    ]


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML text."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everywhere else; YAML 1.1 wants 1.0e-4."""


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values by key of "key=value" strings, and what is wrong with the others."""
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"'{override}' is not of the form section.key=value, e.g. finetune.lr=1e-4")
            continue
        try:
            values[key.strip()] = _parse_yaml(text)
        except yaml.YAMLError as error:
            problems.append(f"command line: '{override}' is not YAML: {' '.join(str(error).split())}")
    return values, problems


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise TypeError(f"'{section}' is a value, not a section; write {section}.<key>=value")
    content[last] = value


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def all_keys(schema: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of every recipe key."""
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += all_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def nearest_key(key: str) -> str:
    """ " (did you mean '...'?)" for a misspelt or unqualified key; empty where nothing is near."""
    known = all_keys()
    same_end = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    section = key.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == section]
    found = same_end or difflib.get_close_matches(key, inside, 1) or difflib.get_close_matches(key, known, 1)
    return f" (did you mean {' or '.join(repr(name) for name in found)}?)" if found else ""


def _nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def _messages(error: ValidationError, path: str, places: dict[str, str]) -> Iterator[str]:
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


def parse_sampling(overrides: Sequence[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Values of SamplingRecipe from "key=value" strings and flags, those that are None left out.

    Raises RecipeError listing every problem.
    """
    values, problems = _parse_overrides(overrides)
    for key in values.keys() - SamplingRecipe.model_fields.keys():
        near = _nearest(key, SamplingRecipe.model_fields)
        problems.append(f"command line: '{key}' is no sampling key{near}; write for example sigma_max=20")
        del values[key]
    values |= {key: value for key, value in flags.items() if value is not None}
    try:
        SamplingRecipe.model_validate(values)
    except ValidationError as error:
        problems += _messages(error, "command line", {})
    if problems:
        raise RecipeError("\n".join(problems))
    return values
