"""The contract between models and everything else: what DDO needs of a likelihood-based model.

    draw = model.draw(num_rows, rng)             all randomness of one estimate, made outside `forward`
    D = model.predict(x, label, draw)          the costly network pass
    log_lik = model.log_lik(D, x, draw)        (B,) per example, summed over dimensions
    r = model.log_ratio(D, D_ref, x, draw)     (B,) log p_model(x) - log p_ref(x), without cancellation
    x, nfe = model.sample(label, rng, spec)    new examples in model space

An image model may work on latents or tokens that a frozen network of its own makes of images. Items are then images or
what `latents` made of them beforehand; `encode` takes either.

Real and fake rows, model and reference share ONE draw: the ratio is a small difference of large numbers, and
independent noise would drown it (DDO, arXiv 2503.01103, section 3.2). Row i of a draw belongs to row i of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ddo_cli.diffusion.guidance import Guide
from ddo_cli.errors import UsageError
from ddo_cli.precision import Precision, inference_precision
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.trainable import Trainable

NO_LABEL = -1  # the label of an unconditional row
READ_BY_ALL = {"batch", "labels", "precision"}  # fields of SamplingRecipe that `generate` reads


class Draw(Protocol):
    """A NamedTuple of tensors whose first dimension is the row; `drop` (B,) marks rows that lose their label."""

    @property
    def drop(self) -> Tensor: ...


D = TypeVar("D", bound=Draw)


def map_draw(fn: Callable[[Tensor], Tensor], draw: D) -> D:
    """The draw with `fn` applied to each of its tensors."""
    return type(draw)(*map(fn, draw))  # type: ignore[call-overload]


def repeat_draw(draw: D, times: int) -> D:
    """The same randomness for `times` stacked batches: rows 0..B-1, then 0..B-1 again."""
    return map_draw(lambda tensor: torch.cat([tensor] * times), draw)


class Options(BaseModel):
    """Base of the option groups that models declare: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DrawOptions(Options):
    """How training randomness is drawn. Models add their own fields."""

    label_dropout: float = Field(0.0, ge=0, le=1)  # share of rows trained without their label (for CFG)


class Sampled(NamedTuple):
    """New examples in model space (B, ...) and the network evaluations spent on each."""

    x: Tensor
    nfe: int
    disc_nfe: int = 0  # evaluations of a guiding discriminator or classifier, each a forward and a backward pass


class LikelihoodModel(Trainable, ABC):
    """A model with a tractable log-likelihood, exact or a one-draw bound."""

    shardable = True

    DrawOptions: ClassVar[type[DrawOptions]] = DrawOptions
    # Fields of SamplingRecipe that this kind of model reads; setting another is a user's mistake.
    sampling_fields: ClassVar[frozenset[str]] = frozenset()

    # What a fake set keeps of an example: the image, or x itself, where `encode` takes x as an item.
    fake_as: ClassVar[Literal["images", "latents"]] = "images"

    shape: tuple[int, ...]  # of one item on disk, e.g. (3, 32, 32) for uint8 images, (2,) for points
    latent_shapes: tuple[tuple[int, ...], ...] = ()  # of the further items that `encode` takes: see `latents`
    num_classes: int  # 0: unconditional
    draw_options: Any  # an instance of DrawOptions

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one x in model space, whose dimensions the log-likelihood is summed over."""
        return self.shape

    @abstractmethod
    def encode(self, items: Tensor, rng: RowRng | None = None) -> Tensor:
        """Items as they lie on disk (uint8 images, float points, or precomputed latents) -> x in model space.

        rng: where the encoder is random, x is drawn with it; None: the mean.
        """

    def latents(self, items: Tensor) -> Tensor:
        """Images -> what `ddo encode` keeps of them, (B, ...): the costly and deterministic part of `encode`.

        Raises UsageError where a model has no such part.
        """
        raise UsageError(
            f"this model works on {'x'.join(map(str, self.shape))} items as they are, so there is nothing to encode; "
            "give the items themselves for training"
        )

    def encoder_id(self) -> str:
        """What `latents` depends on beside the images, e.g. a hash of the encoder's weights; "" where there is no such.

        A set that another encoder made is refused.
        """
        return ""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """x in model space -> items as they lie on disk; the inverse of `encode` on its image.

        TF32 where the caller's `arithmetic` is that; see `decoding_precision`.
        """

    @abstractmethod
    def draw(self, num_rows: int, rng: RowRng) -> Any:
        """All randomness of one likelihood estimate for `num_rows` rows: a NamedTuple with a field `drop`."""

    @abstractmethod
    def predict(self, x: Tensor, label: Tensor, draw: Any) -> Tensor:
        """The network pass. label: (B,) int64, -1 for none."""

    @abstractmethod
    def log_lik(self, prediction: Tensor, x: Tensor, draw: Any) -> Tensor:
        """Log-likelihood (exact) or its one-draw bound up to a constant, (B,), summed over dimensions, float32."""

    @abstractmethod
    def log_ratio(self, prediction: Tensor, ref_prediction: Tensor, x: Tensor, draw: Any) -> Tensor:
        """log_lik(prediction) - log_lik(ref_prediction), (B,), in the form that does not cancel, float32."""

    @abstractmethod
    def sample(self, label: Tensor, rng: RowRng, spec: SamplingRecipe, guides: Sequence[Guide] = ()) -> Sampled:
        """New examples, one per label and generator. guides: applied in their order, the last one outermost."""

    @abstractmethod
    def log_density(self, x: Tensor, label: Tensor, spec: SamplingRecipe, guides: Sequence[Guide] = ()) -> Tensor:
        """Log density of what `sample` draws, (B,) in nats, by whatever exact means the model has."""

    def forward(self, x: Tensor, label: Tensor, draw: Any, ref_prediction: Tensor | None = None) -> Tensor:
        """(B,): the log-ratio against a reference's prediction, or without one the log-likelihood.

        This is what is trained, and so what DistributedDataParallel sees.
        """
        prediction = self.predict(x, label, draw)
        if ref_prediction is None:
            return self.log_lik(prediction, x, draw)
        return self.log_ratio(prediction, ref_prediction, x, draw)

    def passes(self, spec: SamplingRecipe) -> int:
        """What a sample costs, in passes like `predict`'s. Here: each position once, and again without its label."""
        return 1 if spec.cfg_scale in (None, 1.0) else 2

    def check_sampling(self, spec: SamplingRecipe) -> None:
        """Raises UsageError if `spec` sets something that this model cannot honour."""
        for key in sorted(set(SamplingRecipe.model_fields) - self.sampling_fields - READ_BY_ALL):
            if getattr(spec, key) is not None:
                raise UsageError(
                    f"sampling.{key} = {getattr(spec, key)} has no effect on a {type(self).__name__}; remove it "
                    f"(it reads: {', '.join(sorted(self.sampling_fields))})"
                )

    def random_labels(self, rng: RowRng) -> Tensor:
        """Labels drawn from the items' own generators, (B,); `sample` must draw the same from fresh ones."""
        return rng.randint(self.num_classes)

    def check_guides(self, spec: SamplingRecipe, guides: Sequence[Guide]) -> None:
        """Raises UsageError if this model cannot be sampled with these guides."""
        if guides:
            raise UsageError(
                f"guides change a denoiser, and a {type(self).__name__} has none; use a diffusion model, or sample it "
                "without guidance"
            )


def drop_labels(label: Tensor, draw: Draw) -> Tensor:
    """Labels with -1 on the dropped rows, (B,)."""
    return torch.where(draw.drop, torch.full_like(label, NO_LABEL), label)


# ---------------------------------------------------------------------------------------------------------------------
# From seeds to items


class Batch(NamedTuple):
    """One canonical batch of generated items: number in the set, items as on disk, labels, seeds, network passes."""

    number: int
    items: Tensor  # (b, *shape), on the CPU; (b, *state_shape) for latents
    label: Tensor  # (b,)
    seeds: Tensor  # (b,)
    nfe: int
    disc_nfe: int = 0


def labels_of(seeds: Sequence[int], num_classes: int, classes: Sequence[int] | None = None) -> Tensor:
    """Class-balanced labels, (B,): seed modulo the number of classes, so a label depends on its own seed only."""
    if not num_classes:
        return torch.full((len(seeds),), NO_LABEL)
    chosen = torch.tensor(list(classes) if classes else range(num_classes))
    return chosen[torch.tensor(list(seeds)) % len(chosen)]


def check_labels(spec: SamplingRecipe, num_classes: int, num_seeds: int, classes: Sequence[int] | None = None) -> None:
    """Raises UsageError if a set of so many items cannot have the labels that `spec` asks for."""
    if spec.labels in ("random", "position") and (classes or not num_classes):
        why = "--classes chooses them" if classes else "this model has no classes"
        raise UsageError(f"sampling.labels = {spec.labels}: {why}; leave it out")
    if spec.labels == "position" and num_seeds % num_classes:
        raise UsageError(
            f"sampling.labels = position gives each of {num_classes} classes the same number of images, and "
            f"{num_seeds} seeds are no multiple of it; draw {-(-num_seeds // num_classes) * num_classes}, or use "
            "labels = balanced"
        )


def decoding_precision(spec: SamplingRecipe) -> Precision:
    """The arithmetic that `generate` decodes in: TensorFloat-32 wherever sampling is not in exact float32.

    An image has 8 bits, and published figures were decoded so: EDM2's autoencoder with the convolutions in TF32 that
    torch has by default, VAR's in half precision.
    """
    return "float32" if spec.precision in (None, "float32") else "tf32"


def num_batches(num_seeds: int, batch: int) -> int:
    """Batches that `generate` cuts a set into."""
    return -(-num_seeds // batch)


@torch.no_grad()
def generate(
    model: LikelihoodModel,
    seeds: Sequence[int],
    spec: SamplingRecipe,
    *,
    batch: int,
    classes: Sequence[int] | None = None,
    guides: Sequence[Guide] = (),
    only: Sequence[int] | None = None,
    as_given: Sequence[int] | None = None,
    as_latents: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Items of all seeds, one batch at a time.

    The set is always cut in the same way: seeds in increasing order, `batch` at a time, the last of several batches
    filled up by repeating its last seed. So kernels see the same sizes whatever the order of the seeds, the process
    count, or where an earlier attempt was interrupted.

    only: numbers of the batches to make (for several processes, or to continue); all by default.
    as_given: the set's seeds in the order that labels by position count; None: that of `seeds`.
    as_latents: leaves them in model space.

    Samples are drawn in the arithmetic of spec.precision, and decoded in TF32 (`decoding_precision`) where that is
    tf32, bf16 or fp16, in exact float32 otherwise. On a CPU images are decoded in float32.
    """
    model.check_guides(spec, guides)
    ordered = sorted(seeds)
    by_position = {}
    if spec.labels == "position" and model.num_classes and not classes:
        by_position = {seed: place for place, seed in enumerate(seeds if as_given is None else as_given)}
    size = min(batch, len(ordered))
    for number in range(num_batches(len(ordered), batch)) if only is None else only:
        own = ordered[number * batch : (number + 1) * batch]
        padded = own + [own[-1]] * (size - len(own))
        if spec.labels == "random" and model.num_classes and not classes:
            label = model.random_labels(RowRng(padded))
        else:
            numbers = [by_position[seed] for seed in padded] if by_position else padded
            label = labels_of(numbers, model.num_classes, classes)
        with inference_precision(spec.precision or "float32", device):
            sampled = model.sample(label.to(device), RowRng(padded), spec, guides)
        with inference_precision(decoding_precision(spec), device):
            items = (sampled.x if as_latents else model.decode(sampled.x)).cpu()[: len(own)]
        yield Batch(number, items, label[: len(own)], torch.tensor(own), sampled.nfe, sampled.disc_nfe)
