"""Recipe keys of everything that is trained, and the section that all groups of keys are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Precision = Literal["float32", "tf32", "bf16", "fp16"]
MAX_STD = 0.289  # of a power-function average: that of the plain mean over all of training is 0.28868
T = TypeVar("T", bound="TrainRecipe")


class Section(BaseModel):
    """A group of keys; a key that nothing reads is an error, and values are never converted in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _problem(key: Iterable[str | int], value: Any, text: str, kind: str = "refused") -> InitErrorDetails:
    """What is wrong with one key inside a section; `schema.messages` puts place, key and value before the text."""
    return InitErrorDetails(type=PydanticCustomError(kind, "{text}", {"text": text}), loc=tuple(key), input=value)


class TrainRecipe(Section):
    """What `pretrain` and `finetune` share."""

    prefix: ClassVar[str] = ""  # of the keys, as messages name them
    dropout: ClassVar[bool] = True  # whether layers of dropout are on

    lr: float = Field(1e-4, gt=0)
    warmup: int = Field(0, ge=0)  # images of linear warm-up
    # After the warm-up: cosine ends at 0; inverse-sqrt falls from `decay_images` on as 1 / sqrt(images) (EDM2);
    # linear falls to `lr_final`, after having stayed at the top for `lr_hold` (VAR).
    lr_schedule: Literal["constant", "cosine", "inverse-sqrt", "linear"] = "constant"
    decay_images: int | None = Field(None, ge=1)  # of inverse-sqrt
    lr_hold: float = Field(0.05, ge=0, lt=1)  # of linear: share of the images after the warm-up
    lr_final: float = Field(0.1, ge=0, le=1)  # of linear: share of lr
    batch: int = Field(64, ge=1)  # real images per optimizer step, over all processes
    micro_batch: int | None = Field(None, ge=1)  # real images per forward pass of one process; None: its whole share
    ema_half_life: float = Field(500.0, ge=0)  # images; 0: no averaging
    # Power-function averages in place of the half-life: their relative standard deviations (EDM2's sigma_rel). The
    # first one is scored and promoted; the others lie beside the candidates, for `ddo ema`.
    ema_widths: list[Annotated[float, Field(gt=0, lt=MAX_STD)]] = Field(default_factory=list)
    optimizer: Literal["adam", "adamw"] = "adam"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    # adam: added to the gradient of every weight. adamw: each step takes lr * weight_decay off the weight itself, but
    # not off vectors and what else the model exempts.
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float | None = Field(None, gt=0)  # largest gradient norm
    precision: Precision = "float32"  # of the network passes; log-ratios are float32 always. fp16: loss is scaled
    activation_checkpointing: bool = False  # less memory for one more forward pass of each block
    sharding: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, averages and optimizer are spread over the processes
    log_every: int = Field(10, ge=1)  # steps
    save_every: int = Field(20, ge=1)  # steps between saves of what resuming needs

    @field_validator("ema_widths")
    @classmethod
    def _told_apart(cls, widths: list[float]) -> list[float]:
        if len({f"{width:.3f}" for width in widths}) < len(widths):  # their files are named with three digits
            raise PydanticCustomError("widths", "the widths must differ in their first three digits")
        return widths

    @model_validator(mode="after")
    def _decays(self: T) -> T:
        if self.lr_schedule == "inverse-sqrt" and self.decay_images is None:
            text = "inverse-sqrt needs decay_images, from which on the rate falls; EDM2's sizes use 35 or 70 thousand "
            raise ValidationError.from_exception_data(
                type(self).__name__, [_problem(["lr_schedule"], self.lr_schedule, text + "batches")]
            )
        return self


class PretrainRecipe(TrainRecipe):
    """Maximum likelihood."""

    prefix: ClassVar[str] = "pretrain."

    images: int = Field(96_000, ge=1)
    ema_ramp: float | None = Field(0.05, gt=0)  # half-life at most this share of the images seen (EDM)
    snapshot_every: int | None = Field(None, ge=1)  # images between averaged weights kept for `ddo ema`; None: the end


_POSITIVE = TypeAdapter(Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)])


def _coefficient(value: Any) -> float | tuple[float, ...]:
    """A positive number, or several different ones; a list of one is that number."""
    try:
        if not isinstance(value, (list, tuple)):
            return _POSITIVE.validate_python(value)
        values = tuple(_POSITIVE.validate_python(one) for one in value)
    except ValidationError as error:  # a plain message: that of a union would name the key's alternatives
        message = error.errors()[0]["msg"]
        raise PydanticCustomError("coefficient", "{message}", {"message": message}) from None
    if not values or len(set(values)) < len(values):
        raise PydanticCustomError("coefficient", "a sweep needs one value or several different ones, e.g. [1, 2, 4]")
    return values if len(values) > 1 else values[0]


Coefficient = Annotated[float | tuple[float, ...], BeforeValidator(_coefficient)]


# What a run has once for all its rounds.
_OF_THE_RUN = ("rounds", "from_round", "precision", "sharding", "fake_as", "keep_candidates")


def _numbers(value: Any) -> Any:
    """The keys "17" of JSON and of the command line as the numbers they stand for."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: inner for key, inner in value.items()}


class FinetuneRecipe(TrainRecipe):
    """Direct Discriminative Optimization (arXiv 2503.01103)."""

    prefix: ClassVar[str] = "finetune."
    dropout: ClassVar[bool] = False  # with it, r is not 0 for equal weights

    rounds: int = Field(4, ge=1)
    alpha: Coefficient = 4.0  # weight of the fake term; a list is swept in each round, all pairs with beta's
    beta: Coefficient = 0.05  # scale of the log-ratio; goes about as 1 / dimension; ditto
    divide_by_alpha: bool = False  # loss / max(alpha, 1), as VAR's trainer does
    images_per_round: int = Field(7680, ge=1)
    num_fake: int = Field(4096, ge=1, le=100_000_000)  # samples of the reference per round
    fake_as: Literal["images", "latents"] | None = None  # what is kept of them; None: as the model does (README)
    reference_precision: Literal["float32", "bf16"] = "float32"  # of its weights; bf16 moves the log-ratio: measured
    draw: dict[str, Any] = Field(default_factory=dict)  # training randomness in place of the reference's (p_std, ...)
    eval_every: int = Field(3840, ge=1)  # images between candidates of a round
    keep_candidates: Literal["all", "best"] = "all"  # on disk, once a round is over
    max_denoising_ratio: float = Field(2.0, gt=1)  # stop when the plain loss on real images exceeds this x reference's
    sweep_rungs: int = Field(3, ge=1)  # of a sweep: 3 halve the nodes at 1/4 and 1/2 of a round, 1 keeps them all
    sweep_images: int | None = Field(None, ge=2)  # per score at a rung; None: half of metric.num_images
    # Keys of this section with their values from a round on, later ones on top: {17: {draw: {p_std: 3.0}, lr: 2e-5}}.
    from_round: Annotated[dict[Annotated[int, Field(ge=2)], dict[str, Any]], BeforeValidator(_numbers)] = Field(
        default_factory=dict
    )

    def of_round(self, number: int) -> FinetuneRecipe:
        """What round `number` runs with. draw is replaced key by key."""
        given = self._given(number)
        return FinetuneRecipe.model_validate(self.model_dump(exclude={"from_round"}) | given) if given else self

    def _given(self, number: int) -> dict[str, Any]:
        """The values in force in a round that are not this section's own."""
        found: dict[str, Any] = {}
        for _, values in sorted(item for item in self.from_round.items() if item[0] <= number):
            draw = values.get("draw", {})
            if isinstance(draw, dict):
                draw = {**self.draw, **found.get("draw", {}), **draw}
            found |= values | ({"draw": draw} if "draw" in values else {})
        return found

    @model_validator(mode="after")
    def _rounds_can_run(self) -> FinetuneRecipe:
        """Every round's values make a section of their own. Problems are told at the override that brings them in."""
        problems = list(self._problems_of_rounds())
        if problems:
            raise ValidationError.from_exception_data("FinetuneRecipe", problems)
        return self

    def _problems_of_rounds(self) -> Iterator[InitErrorDetails]:
        known: set[tuple[Any, str]] = set()
        for number, values in sorted(self.from_round.items()):
            for key in _OF_THE_RUN:
                if key in values:
                    yield _problem(["from_round", number, key], values[key], "is of all rounds; remove it here")
            given = {key: value for key, value in self._given(number).items() if key not in _OF_THE_RUN}
            try:
                FinetuneRecipe.model_validate(self.model_dump(exclude={"from_round"}) | given)
            except ValidationError as error:
                for one in error.errors():
                    if (one["loc"], one["msg"]) not in known:
                        known.add((one["loc"], one["msg"]))
                        yield _problem(["from_round", number, *one["loc"]], one["input"], one["msg"], one["type"])


class DiscriminatorRecipe(TrainRecipe):
    """Training of a real-or-generated discriminator (arXiv 2211.17091). Defaults: the published CIFAR-10 run."""

    prefix: ClassVar[str] = "discriminator."

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

    prefix: ClassVar[str] = "classifier."

    name: str = "time-encoder-classifier"  # a registered classifier
    options: dict[str, Any] = Field(default_factory=dict)  # its constructor options
    held_out: int = Field(1024, ge=16)  # images for the accuracy
    time: Literal["importance", "uniform", "model"] = "uniform"  # density of t; rows are not weighted
    t_min: float = Field(1e-5, gt=0, lt=1)
    images: int = Field(500_000, ge=1)
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-7, ge=0)
    ema_half_life: float = Field(0.0, ge=0)
