"""The contract between models and everything else: what DDO needs of a likelihood-based model.

    draw = model.draw(num_rows, rng)           all randomness of one estimate, made outside `forward`
    D = model.predict(x, label, draw)          the costly network pass
    log_lik = model.log_lik(D, x, draw)        (B,) per example, summed over dimensions
    r = model.log_ratio(D, D_ref, x, draw)     (B,) log p_model(x) - log p_ref(x), without cancellation
    x, nfe, _ = model.sample(label, rng, spec) new examples in model space

`model.codec` turns items on disk into states x in model space, and back.

Real and fake rows, model and reference share ONE draw: the ratio is a small difference of large numbers, and
independent noise would drown it (DDO, arXiv 2503.01103, section 3.2). Row i of a draw belongs to row i of x.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ddo_cli.codec import Codec
from ddo_cli.errors import UsageError
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.trainable import Trainable, map_tensors

NO_LABEL = -1  # the label of an unconditional row
READ_BY_ALL = {"batch", "compile", "labels", "rng", "precision"}  # fields that `generation.generate` reads


class Draw(Protocol):
    """A NamedTuple of tensors whose first dimension is the row; `drop` (B,) marks rows that lose their label."""

    @property
    def drop(self) -> Tensor: ...


D = TypeVar("D", bound=Draw)


def repeat_draw(draw: D, times: int) -> D:
    """The same randomness for `times` stacked batches: rows 0..B-1, then 0..B-1 again."""
    return map_tensors(lambda tensor: torch.cat([tensor] * times), draw)


def drop_labels(label: Tensor, draw: Draw) -> Tensor:
    """Labels with -1 on the dropped rows, (B,)."""
    return torch.where(draw.drop, torch.full_like(label, NO_LABEL), label)


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """(B, K) bool; a row of False for the label -1."""
    return label[:, None] == torch.arange(num_classes, device=label.device)


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
    cost: tuple[Tensor, ...] | None = None  # of each example, (B,) each, where they differ: see `diffusion.rejection`


class LikelihoodModel(Trainable, ABC):
    """A model with a tractable log-likelihood, exact or a one-draw bound.

    A new one sets `codec` and `num_classes` and implements the abstract methods. `x` is a batch of states in model
    space, `label` (B,) int64, -1 for none.
    """

    shardable = True

    codec: Codec
    num_classes: int  # 0: unconditional

    @abstractmethod
    def draw(self, num_rows: int, rng: RowRng) -> Any:
        """All randomness of one likelihood estimate for `num_rows` rows: a NamedTuple with a field `drop`."""

    @abstractmethod
    def predict(self, x: Tensor, label: Tensor, draw: Any) -> Tensor:
        """The network pass."""

    @abstractmethod
    def log_lik(self, prediction: Tensor, x: Tensor, draw: Any) -> Tensor:
        """Log-likelihood (exact) or its one-draw bound up to a constant, (B,), summed over dimensions, float32."""

    @abstractmethod
    def log_ratio(self, prediction: Tensor, ref_prediction: Tensor, x: Tensor, draw: Any) -> Tensor:
        """log_lik(prediction) - log_lik(ref_prediction), (B,), in the form that does not cancel, float32."""

    def forward(self, x: Tensor, label: Tensor, draw: Any, ref_prediction: Tensor | None = None) -> Tensor:
        """(B,): the log-ratio against a reference's prediction, or without one the log-likelihood.

        This is what is trained, and so what DistributedDataParallel sees.
        """
        prediction = self.predict(x, label, draw)
        if ref_prediction is None:
            return self.log_lik(prediction, x, draw)
        return self.log_ratio(prediction, ref_prediction, x, draw)

    @abstractmethod
    def sample(self, label: Tensor, rng: RowRng, spec: SamplingRecipe) -> Sampled:
        """New examples, one per label and generator."""

    @abstractmethod
    def log_density(self, x: Tensor, label: Tensor, spec: SamplingRecipe) -> Tensor:
        """Log density of what `sample` draws, (B,) in nats, by whatever exact means the model has."""

    def check_sampling(self, spec: SamplingRecipe) -> None:
        """Raises UsageError if `spec` sets something that this model cannot honour."""
        check_fields(self, spec, ())

    def passes(self, spec: SamplingRecipe) -> int:
        """Network evaluations per sample, in units of one `predict`; CFG doubles them."""
        return 1 if spec.cfg_scale in (None, 1.0) else 2

    def guided_by(self, guides: Sequence[Any]) -> "LikelihoodModel":
        """This model steered by guides, with the same weights. Raises UsageError for a model that has no denoiser."""
        if guides:
            raise UsageError(
                f"guides change a denoiser, and a {type(self).__name__} has none; use a diffusion model, or sample it "
                "without guidance"
            )
        return self


def check_fields(model: LikelihoodModel, spec: SamplingRecipe, fields: Collection[str]) -> None:
    """Raises UsageError if `spec` sets a field that is not among the model's `fields`, or guides without classes."""
    for key in sorted(set(SamplingRecipe.model_fields) - set(fields) - READ_BY_ALL):
        if getattr(spec, key) is not None:
            raise UsageError(
                f"sampling.{key} = {getattr(spec, key)} has no effect on a {type(model).__name__}; remove it "
                f"(it reads: {', '.join(sorted(fields))})"
            )
    if spec.cfg_scale not in (None, 1.0) and not model.num_classes:
        raise UsageError(f"sampling.cfg_scale = {spec.cfg_scale} needs a class-conditional model; leave it out")
