"""What samplers and guides share: the denoiser that they call, and the state of one run.

Torch is imported for its types only; see `samplers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Denoiser(Protocol):
    """D(x; sigma) of one batch, its labels and network already bound.

    sigma: a scalar on the CPU, whatever the device of x, so that decisions by it never wait for a GPU; or (B,) on the
    device of x where samples differ, which nothing in a sampler's loop may read. stage: "predictor" for the first
    evaluation of a step, "corrector" for a further one; guides may weigh the two differently.
    """

    def __call__(self, x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor: ...


@dataclass
class Trace:
    """State shared by sampler and guides while a batch is drawn, and the evaluations spent so far."""

    nfe: int = 0
    disc_nfe: int = 0
    variance: Tensor | None = None  # learned variance v in [-1, 1] of the last evaluation (arXiv 2102.09672, eq. 15)
    larger_variance: bool = False  # without one, DDPM's noise has its larger variance, beta, and not beta~
    log_ratio: Tensor | None = None  # (B,), of the last predictor evaluation; +inf outside the guide's window
    levels: Tensor | None = None  # on the CPU: the values that rows' levels have, where boosting set them apart
    keeps_climb: bool = False  # set by a sampler that adds the gradients of guides by itself, see `samplers.ancestral`
    climb: Tensor | None = None  # then, the sum of their w sigma^2 grad_x L since the sampler cleared it


def filled(value: Tensor, x: Tensor) -> Tensor:
    """A value of the CPU for every row of x, (B,) on its device; one per row, (B, ...), is left as it is.

    Filled in, because a copy would wait until the GPU has done all work that it was given.
    """
    return x.new_full((len(x),), float(value), dtype=value.dtype) if value.ndim == 0 else value


def rows_of(values: Tensor, x: Tensor) -> Tensor:
    """One value per row, (B,) or scalar, in a shape that multiplies x (B, ...)."""
    return values if values.ndim == 0 else values.view(-1, *[1] * (x.ndim - 1))
