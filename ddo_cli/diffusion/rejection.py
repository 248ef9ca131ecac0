"""Diffusion rejection sampling, DiffRS: states are accepted or rejected while an image is drawn (arXiv 2405.17880).

L_k is a discriminator's estimate of log p_data - log p_model at noise level k, k counting steps from the largest level.
A state that a step has brought from level k - 1 to k is accepted with probability min(1, exp(L_k - L_{k-1} - T_k)). A
rejected one gets noise back up to level k - 1, where it stays with probability min(1, exp(L_{k-1} - M_{k-1})), or goes
back by another level; one that is rejected at the first level with a test starts anew from fresh noise. T_k and M_k
stand for the logarithms of the largest ratios: percentiles over a pilot set without rejection, at least 0.

The published code estimates them on the way and restarts an image without limit. Here they are known beforehand and an
image's number of evaluations is bounded, so that an image is a function of its own seed and ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.guidance import Potential, potential_at
from ddo_cli.diffusion.trace import Denoiser, Trace
from ddo_cli.rng import RowRng
from ddo_cli.transfer import to_device

# Brings states (b, ...) of these rows of the batch (b,) from level k to k + 1.
Step = Callable[[Tensor, int, Tensor], Tensor]


class Limits(NamedTuple):
    """M and T in nats by noise level, (N + 1,) float64; NaN where nothing is tested."""

    marginal: Tensor
    step: Tensor

    @classmethod
    def of(cls, log_ratio: Tensor, percentile: float) -> "Limits":
        """Percentiles, in [0, 1], of a pilot's log-ratios (num, N + 1), of the levels and of the steps to them."""
        before = torch.cat([torch.full_like(log_ratio[:, :1], torch.nan), log_ratio[:, :-1]], dim=1)
        return cls(*(values.quantile(percentile, dim=0).clamp(min=0) for values in (log_ratio, log_ratio - before)))


class Cost(NamedTuple):
    """What each image has cost, (B,) int64: evaluations of model and discriminator, rejections, and whether a further
    one was not carried out because of `max_nfe`.
    """

    nfe: Tensor
    disc_nfe: Tensor
    rejections: Tensor
    at_bound: Tensor


@dataclass
class Rejection:
    """A guide that leaves the denoiser alone and by which `DiffusionModel.sample` rejects states.

    limits: None: nothing is rejected, as for a pilot set. time_min, time_max: levels whose VP time lies outside are
    not tested. max_nfe: evaluations of the model, and of the discriminator, for one image.
    log_ratio: L at each level when it was last tested (B, N + 1), of the last batch; NaN where nothing is tested.
    """

    potential: Potential
    limits: Limits | None
    time_min: float
    time_max: float
    max_nfe: int
    log_ratio: Tensor | None = None

    def steer(self, denoise: Denoiser, label: Tensor, trace: Trace) -> Denoiser:
        return denoise

    def tested(self, sigmas: Tensor) -> range:
        """Numbers of the levels that are tested."""
        t = vp_sde.time_of(sigmas)
        inside = ((t >= self.time_min) & (t <= self.time_max)).nonzero().flatten().tolist()
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def sample(
        self, step: Step, costs: list[int], start: Tensor, x: Tensor, sigmas: Tensor, label: Tensor, rng: RowRng
    ) -> tuple[Tensor, Cost]:
        """x0 (B, ...) and what each image has cost.

        costs: evaluations of the model in the step from each level, N. start: deviation of fresh noise.
        x: states at sigmas[0]. sigmas: decreasing, (N + 1,). rng: of the batch, one generator a row.

        All rows at the largest level step together, so that samplers see one noise level.
        """
        num, last, tested = len(x), len(sigmas) - 1, self.tested(sigmas)
        left = [sum(costs[k:]) for k in range(last + 1)]  # evaluations from a level to the end
        level = torch.zeros(num, dtype=torch.int64)
        cost = Cost(*(torch.zeros(num, dtype=torch.int64) for _ in Cost._fields))
        log_ratio = torch.full((num, last + 1), torch.nan, dtype=torch.float64)

        def settle(rows: Tensor, k: int) -> None:
            """Tests rows that have come to level k; those that are rejected go back until they are accepted."""
            came_by_step = k > tested.start
            while len(rows):
                found = potential_at(self.potential, x[rows], sigmas[k], label[rows]).cpu().to(torch.float64)
                cost.disc_nfe[rows] += 1
                log_ratio[rows, k] = found
                if self.limits is None:
                    return
                limit = self.limits.marginal[k]
                if came_by_step:
                    limit = self.limits.step[k] + log_ratio[rows, k - 1]
                rejected = found < limit + rng.of(rows).rand(dtype=torch.float64).log()
                back, is_fresh = (k - 1, False) if k > tested.start else (0, True)
                tests = len(range(max(back, tested.start), tested.stop))
                affordable = (cost.nfe[rows] + left[back] <= self.max_nfe) & (
                    cost.disc_nfe[rows] + tests <= self.max_nfe
                )
                cost.at_bound[rows] |= (rejected & ~affordable).long()
                rows = rows[rejected & affordable]
                if not len(rows):
                    return
                cost.rejections[rows] += 1
                eps = to_device(rng.of(rows).randn(x.shape[1:], dtype=x.dtype), x.device)
                x[rows] = start * eps if is_fresh else x[rows] + (sigmas[back] ** 2 - sigmas[k] ** 2).sqrt() * eps
                level[rows] = k = back
                came_by_step = False
                if k not in tested:
                    return

        x = x.clone()
        if 0 in tested:
            settle(torch.arange(num), 0)
        while (k := int(level.min())) < last:
            rows = (level == k).nonzero().flatten()
            x[rows] = step(x[rows], k, rows)
            cost.nfe[rows] += costs[k]
            level[rows] = k + 1
            if k + 1 in tested:
                settle(rows, k + 1)
        self.log_ratio = log_ratio
        return x, cost
