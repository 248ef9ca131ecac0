"""Recipe keys of the training sections, and `Section`, the base of all sections."""

from collections.abc import Iterable
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

Precision = Literal["auto", "float32", "tf32", "bf16", "fp16"]
ObjectiveName = Literal["ddo", "cca", "spin", "dpo"]
MAX_STD = 0.289  # of a power-function average: that of the plain mean over all of training is 0.28868
T = TypeVar("T", bound="TrainRecipe")


class Section(BaseModel):
    """A group of keys. An unknown key is an error, and values are never converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


LARGEST_COUNT = 10**12  # images, steps and the like; our choice, a thousand times the longest published training


def key(default: Any, description: str, **bounds: Any) -> Any:
    """A recipe key with its meaning, as `ddo recipes --keys` prints it. bounds: ge, lt, pattern, ... of pydantic."""
    most = {"le": LARGEST_COUNT} if type(default) is int else {}
    return Field(default, description=description, **{**most, **bounds})


def _problem(key: Iterable[str | int], value: Any, text: str, kind: str = "refused") -> InitErrorDetails:
    """A problem with one key of a section; `schema.messages` puts place, key and value before the text."""
    return InitErrorDetails(type=PydanticCustomError(kind, "{text}", {"text": text}), loc=tuple(key), input=value)


class TrainRecipe(Section):
    """Optimisation: the keys that all training sections share."""

    prefix: ClassVar[str] = ""  # of the keys, as messages name them
    dropout: ClassVar[bool] = True  # whether layers of dropout are on

    lr: float = key(1e-4, "Learning rate.", gt=0)
    warmup: int = key(0, "Images over which the learning rate rises linearly from 0.", ge=0)
    lr_schedule: Literal["constant", "cosine", "inverse-sqrt", "linear"] = key(
        "constant",
        "Learning rate after the warm-up: cosine falls to 0; inverse-sqrt falls as 1 / sqrt(images) from "
        "decay_images on (EDM2); linear stays at lr for lr_hold, then falls to lr_final (VAR).",
    )
    decay_images: int | None = key(None, "Of inverse-sqrt: images after which the rate falls.", ge=1)
    lr_hold: float = key(0.05, "Of linear: share of the images after the warm-up.", ge=0, lt=1)
    lr_final: float = key(0.1, "Of linear: last learning rate, as a share of lr.", ge=0, le=1)
    batch: int = key(64, "Real images per optimizer step, over all processes.", ge=1)
    micro_batch: int | None = key(None, "Images per forward pass of a process. Default: its share of the batch.", ge=1)
    ema_half_life: float = key(500.0, "Half-life of the averaged weights in images; 0: none.", ge=0)
    ema_widths: list[Annotated[float, Field(gt=0, lt=MAX_STD)]] = key(
        [],
        "Power-function averages in place of the half-life: their relative standard deviations (EDM2's "
        "sigma_rel). The first is scored and promoted; the others are saved beside it for `ddo ema`.",
    )
    optimizer: Literal["adam", "adamw", "adamw8bit"] = key(
        "adam", "Optimizer. adamw8bit: AdamW whose moments take a byte each (bitsandbytes; extra `8bit`)."
    )
    adam_beta1: float = key(0.9, "Decay of Adam's first moment.", ge=0, lt=1)
    adam_beta2: float = key(0.999, "Decay of Adam's second moment.", ge=0, lt=1)
    adam_eps: float = key(1e-8, "Adam's epsilon.", gt=0)
    weight_decay: float = key(
        0.0,
        "adam: L2 penalty, added to the gradient of every weight. adamw, adamw8bit: decoupled, lr * weight_decay off "
        "the weight in each step, except for vectors and weights that the model exempts.",
        ge=0,
    )
    grad_clip: float | None = key(None, "Largest gradient norm. Default: no clipping.", gt=0)
    precision: Precision = key(
        "auto",
        "Precision of training passes; auto: tf32 on a GPU, float32 on a CPU. fp16 has loss scaling. "
        "Log-ratios, loss and averages are always float32.",
    )
    compile: bool | None = key(
        None, "torch.compile the network; the first steps take minutes. Weights and files are the same. Default: no."
    )
    activation_checkpointing: bool = key(False, "Recompute blocks in the backward pass: less memory, more time.")
    sharding: Literal["ddp", "fsdp"] = key("ddp", "fsdp shards weights, averages and optimizer state.")
    log_every: int = key(10, "Steps between log lines.", ge=1)
    save_every: int = key(20, "Steps between saves of the state that resuming needs.", ge=1)

    @field_validator("ema_widths")
    @classmethod
    def _distinct(cls, widths: list[float]) -> list[float]:
        if len({f"{width:.3f}" for width in widths}) < len(widths):  # their files are named with three digits
            raise PydanticCustomError("widths", "the widths must differ in their first three digits")
        return widths

    @property
    def compilable(self) -> bool:
        """Whether `compile` goes with the other keys; where it does not, asking for it is an error."""
        return self.sharding != "fsdp"

    @model_validator(mode="after")
    def _compiles(self: T) -> T:
        if self.compile and self.sharding == "fsdp":
            text = "does not go with sharding = fsdp, whose weights change place while blocks compute; leave one out"
            raise ValidationError.from_exception_data(type(self).__name__, [_problem(["compile"], True, text)])
        return self

    @model_validator(mode="after")
    def _moments_are_whole(self: T) -> T:
        if self.optimizer == "adamw8bit" and self.sharding == "fsdp":
            text = (
                "does not go with sharding = fsdp, which spreads moments of torch's own optimizers; use adamw, or ddp"
            )
            raise ValidationError.from_exception_data(
                type(self).__name__, [_problem(["optimizer"], self.optimizer, text)]
            )
        return self

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

    images: int = key(96_000, "Images to train on, counting repeats.", ge=1)
    ema_ramp: float | None = key(0.05, "Upper bound of the half-life, as a share of the images seen (EDM).", gt=0)
    snapshot_every: int | None = key(
        None, "Images between snapshots of averaged weights for `ddo ema`. Default: at the end only.", ge=1
    )


_POSITIVE = TypeAdapter(Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)])


def _coefficient(value: Any) -> float | tuple[float, ...]:
    """A positive number, or several different ones for a sweep; a list of one is that number."""
    try:
        if not isinstance(value, (list, tuple)):
            return _POSITIVE.validate_python(value)
        values = tuple(map(_POSITIVE.validate_python, value))
    except ValidationError as error:  # a plain message: pydantic's for a union names the key's alternatives
        message = error.errors()[0]["msg"]
        raise PydanticCustomError("coefficient", "{message}", {"message": message}) from None
    if not values or len(set(values)) < len(values):
        raise PydanticCustomError("coefficient", "a sweep needs one value or several different ones, e.g. [1, 2, 4]")
    return values if len(values) > 1 else values[0]


def _coefficient_or_auto(value: Any) -> float | tuple[float, ...] | str:
    if not isinstance(value, str):
        return _coefficient(value)
    if value != "auto":
        raise PydanticCustomError("coefficient", "must be a number, a list of numbers, or auto")
    return value


Coefficient = Annotated[float | tuple[float, ...], BeforeValidator(_coefficient)]
CoefficientOrAuto = Annotated[float | tuple[float, ...] | Literal["auto"], BeforeValidator(_coefficient_or_auto)]


# Keys that are the same in all rounds of a run.
_OF_THE_RUN = (
    "objective",
    "rounds",
    "patience_rounds",
    "from_round",
    "precision",
    "compile",
    "sharding",
    "fake_as",
    "keep_candidates",
    "control",
    "adapter",
)


def _numbers(value: Any) -> Any:
    """Round numbers as integers: JSON and the command line give them as text, such as "17"."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: inner for key, inner in value.items()}


# Keys that an objective does not read: a pair has no weight of its fake side; cca and dpo draw no samples.
_UNREAD: dict[ObjectiveName, tuple[str, ...]] = {
    "ddo": (),
    "cca": ("num_fake", "fake_as", "fake_cfg"),
    "spin": ("alpha", "divide_by_alpha"),
    "dpo": ("alpha", "divide_by_alpha", "num_fake", "fake_as", "fake_cfg"),
}


class AdapterRecipe(Section):
    """An adapter as the trained part, in place of all weights. Needs the extra `lora`."""

    kind: Literal["lora"] | None = key(None, "lora: low-rank changes (arXiv 2106.09685). Default: train all weights.")
    rank: int = key(16, "Rank of the changes.", ge=1, le=1024)
    alpha: float = key(16.0, "Their scale is alpha / rank.", gt=0)
    targets: list[Annotated[str, Field(min_length=1, max_length=200)]] = key(
        [],
        "Layers that are changed, by the ends of their names. Default: the network's projections of attention.",
        max_length=1000,
    )

    base_precision: Literal["float32", "bf16"] = key(
        "float32",
        "Storage of the frozen base's linear maps and convolutions, while the adapter is trained and drawn from. bf16 "
        "halves the base's memory and rounds it; r still starts at exactly 0.",
    )

    @model_validator(mode="after")
    def _has_kind(self) -> "AdapterRecipe":
        for name, value in self:
            if self.kind is None and value != type(self).model_fields[name].default:
                text = "has no effect without an adapter; set kind = lora, or leave it out"
                raise ValidationError.from_exception_data("AdapterRecipe", [_problem([name], value, text)])
        return self


class FinetuneRecipe(TrainRecipe):
    """Direct Discriminative Optimization (arXiv 2503.01103), and relatives."""

    prefix: ClassVar[str] = "finetune."
    dropout: ClassVar[bool] = False  # with it, r is not 0 for equal weights

    objective: ObjectiveName = key(
        "ddo",
        "Loss: ddo; cca, against real images under other labels; spin, in pairs of a real image and a sample; dpo, in "
        "pairs of data.source and data.rejected.",
    )
    rounds: int = key(4, "Rounds of self-play.", ge=1, le=1000)
    alpha: Coefficient = key(4.0, "Weight of the fake term. Several values, such as 1,2,4, are swept.")
    beta: CoefficientOrAuto = key(
        0.05,
        "Scale of the log-ratio (nats), about 1 / dimension. Several values are swept; auto: each round finds its own "
        "by short trainings.",
    )
    divide_by_alpha: bool = key(False, "Divide the loss by max(alpha, 1), as VAR's trainer does.")
    images_per_round: int = key(7680, "Real images per round.", ge=1)
    control: bool = key(
        False,
        "Train a control beside DDO: the same images, draws, steps and rule of promotion with the plain loss of "
        "pretraining. It may be asked for later.",
    )
    margin: float = key(
        0.0,
        "Promotion asks for an improvement on the reference of at least this many of its standard errors, paired over "
        "the ranges of seeds.",
        ge=0,
    )
    num_fake: int = key(4096, "Images drawn from the reference per round.", ge=1, le=100_000_000)
    fake_as: Literal["images", "latents"] | None = key(None, "How these samples are stored.")
    fake_cfg: float | None = key(
        None,
        "Scale of classifier-free guidance while they are drawn, in place of sampling.cfg_scale. 1: samples of the "
        "reference, which DDO compares with. Others are a heuristic: a guided image is no sample of the reference.",
        ge=0,
    )
    reference_precision: Literal["float32", "bf16"] = key(
        "float32", "Storage of the reference's weights. bf16 saves memory and changes the log-ratio a little."
    )
    draw: dict[str, Any] = key({}, "Randomness in place of the reference's, e.g. {p_std: 1.0}.")
    adapter: AdapterRecipe = AdapterRecipe()
    eval_every: int = key(3840, "Images between candidates of a round.", ge=1)
    patience: int | None = key(
        None, "End a round after this many candidates in a row without a better score. Default: never.", ge=1
    )
    patience_rounds: int | None = key(
        2,
        "End the run after this many rounds in a row without a promotion, under the same settings; null: never.",
        ge=1,
    )
    keep_candidates: Literal["all", "best"] = key("all", "Candidates kept on disk after a round.")
    max_denoising_ratio: float = key(
        2.0, "Stop when the model's plain loss on real images exceeds the reference's by this factor.", gt=1
    )
    sweep_rungs: int = key(3, "Sweep: 3 drops half of the settings at 1/4 and 1/2 of a round, 1 drops none.", ge=1)
    sweep_images: int | None = key(None, "Sweep: images per early score. Default: half of metric.num_images.", ge=2)
    from_round: Annotated[dict[Annotated[int, Field(ge=2)], dict[str, Any]], BeforeValidator(_numbers)] = key(
        {},
        "Other values of this section from a round on, e.g. {17: {draw: {p_std: 3.0}, lr: 2e-5}}; of two "
        "rounds the later one wins.",
    )

    def of_round(self, number: int) -> "FinetuneRecipe":
        """The settings of round `number`. draw is replaced key by key."""
        given = self._given(number)
        return FinetuneRecipe.model_validate(self.model_dump(exclude={"from_round"}) | given) if given else self

    def _given(self, number: int) -> dict[str, Any]:
        """The values of from_round that are in force in a round."""
        given: dict[str, Any] = {}
        for _, values in sorted(item for item in self.from_round.items() if item[0] <= number):
            draw = values.get("draw", {})
            if isinstance(draw, dict):
                draw = {**self.draw, **given.get("draw", {}), **draw}
            given |= values | ({"draw": draw} if "draw" in values else {})
        return given

    @property
    def unread(self) -> tuple[str, ...]:
        """Keys of this section that the objective does not read."""
        return _UNREAD[self.objective]

    @property
    def num_drawn(self) -> int:
        """Samples that a round draws from its reference to train against."""
        return 0 if "num_fake" in self.unread else self.num_fake

    @property
    def compilable(self) -> bool:
        return super().compilable and self.reference_precision != "bf16"

    @model_validator(mode="after")
    def _auto_has_one_alpha(self) -> "FinetuneRecipe":
        if self.beta == "auto" and isinstance(self.alpha, tuple):
            text = "does not go with several values of alpha; give one alpha, or the values of beta, too"
            raise ValidationError.from_exception_data("FinetuneRecipe", [_problem(["beta"], self.beta, text)])
        return self

    @model_validator(mode="after")
    def _reference_compiles(self) -> "FinetuneRecipe":
        if self.compile and self.reference_precision == "bf16":
            text = "does not go with reference_precision = bf16, whose blocks are upcast one by one; leave one out"
            raise ValidationError.from_exception_data("FinetuneRecipe", [_problem(["compile"], True, text)])
        return self

    @model_validator(mode="after")
    def _adapter_shares_its_base(self) -> "FinetuneRecipe":
        base = "does not go with an adapter, beside whose frozen base there is little to"
        odd = [("sharding", "fsdp", f"{base} shard; use ddp"), ("reference_precision", "bf16", f"{base} store anew")]
        for name, value, text in odd:
            if self.adapter.kind and getattr(self, name) == value:
                raise ValidationError.from_exception_data("FinetuneRecipe", [_problem([name], value, text)])
        return self

    @model_validator(mode="after")
    def _rounds_can_run(self) -> "FinetuneRecipe":
        """Every round's settings are valid. A problem is reported at the first round that has it."""
        problems: dict[Any, InitErrorDetails] = {}
        for number, values in sorted(self.from_round.items()):
            for name in _OF_THE_RUN:
                if name in values:
                    place: tuple[str | int, ...] = ("from_round", number, name)
                    problems[place] = _problem(place, values[name], "is of all rounds; remove it here")
            given = {name: value for name, value in self._given(number).items() if name not in _OF_THE_RUN}
            try:
                FinetuneRecipe.model_validate(self.model_dump(exclude={"from_round"}) | given)
            except ValidationError as error:
                for problem in error.errors():
                    text, place = problem["msg"], ("from_round", number, *problem["loc"])
                    described = _problem(place, problem["input"], text, problem["type"])
                    problems.setdefault((problem["loc"], text), described)
        if problems:
            raise ValidationError.from_exception_data("FinetuneRecipe", list(problems.values()))
        return self


class DiscriminatorRecipe(TrainRecipe):
    """Training of a real-or-generated discriminator (arXiv 2211.17091). Defaults: the published CIFAR-10 run."""

    prefix: ClassVar[str] = "discriminator."

    name: str = key("time-encoder", "A registered discriminator.")
    options: dict[str, Any] = key({}, "Its constructor options.")
    conditional: bool = key(True, "The discriminator sees the label, if the model has classes.")
    fake: str | None = key(None, "Generated images, of `ddo sample`. Default: drawn from model.ckpt.")
    num_fake: int = key(50_000, "Images to generate.", ge=1, le=100_000_000)
    held_out: int = key(1024, "Real images, and as many generated ones, held out for the loss.", ge=16)
    time: Literal["importance", "uniform", "model"] = key(
        "importance", "Density of the VP time t; model: the one that the model's own noise levels have."
    )
    t_min: float = key(1e-5, "Smallest VP time, in [0, 1], of importance and uniform.", gt=0, lt=1)
    weighting: Literal["none", "likelihood"] = key(
        "none", "likelihood: rows are weighted so that every density of t optimises importance's objective."
    )
    images: int = key(500_000, "Most real images to train on, counting repeats; as many generated ones.", ge=1)
    eval_every: int = key(25_000, "Images between checkpoints, each with its held-out loss.", ge=1)
    patience: int = key(4, "Stop after this many checkpoints in a row without a better loss.", ge=1)
    select: Literal["bce", "gain", "fid"] = key(
        "bce", "Final checkpoint: by held-out bce, by the held-out gain in nats, or by fid of guided samples."
    )
    cached_images: int = key(
        0,
        "Keep on disk the trunk's features of this many real images, as training draws them, and of as many generated "
        "ones. Training beyond them sees them again, with the same noise. 0: noise is always drawn anew.",
        ge=0,
    )
    control: bool = key(False, "Keep and measure the untrained network, too: untrained.safetensors.")
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-7, ge=0)
    ema_half_life: float = Field(0.0, ge=0)


class ClassifierRecipe(TrainRecipe):
    """Training of a noisy-image classifier: for classifier guidance, or as the trunk under a discriminator."""

    prefix: ClassVar[str] = "classifier."

    name: str = key("time-encoder-classifier", "A registered classifier.")
    options: dict[str, Any] = key({}, "Its constructor options.")
    held_out: int = key(1024, "Images held out to measure the accuracy.", ge=16)
    time: Literal["importance", "uniform", "model"] = key("uniform", "Density of the VP time t.")
    t_min: float = key(1e-5, "Smallest VP time, in [0, 1], of importance and uniform.", gt=0, lt=1)
    images: int = key(500_000, "Images to train on, counting repeats.", ge=1)
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-7, ge=0)
    ema_half_life: float = Field(0.0, ge=0)
