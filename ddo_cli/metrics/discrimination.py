"""Cross-entropy, accuracy and calibration of a discriminator on held-out items, by noise level."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli import dist
from ddo_cli.diffusion import vp_sde
from ddo_cli.objectives.discriminator import discriminator_loss, reliability
from ddo_cli.rng import BLOCK, RowRng
from ddo_cli.transfer import to_device

LEVELS = 8  # strata of equal probability under the training density of t
BATCH = 256
Items = tuple[Tensor, Tensor]  # x0 in model space (N, ...) and labels (N,)


class _Part(NamedTuple):
    """Logits for a batch in one stratum, (b,) each; t and weight on the CPU."""

    level: int
    t: Tensor
    logit_real: Tensor
    logit_fake: Tensor
    weight: Tensor


class HeldOut:
    """Held-out real and generated items with fixed noise.

    Every item is noised once in each of LEVELS strata of the training density of t, so that the mean over strata
    estimates the training objective, and every checkpoint is evaluated on the same states.
    """

    def __init__(
        self, real: Items, fake: Items, law: vp_sde.TimeLaw, seed: int, device: torch.device, batch: int = BATCH
    ):
        """real, fake: equally many. batch: items per network pass."""
        self.real, self.fake, self.law, self.seed, self.device = real, fake, law, seed, device
        self.batch = -(-batch // BLOCK) * BLOCK  # noise is drawn in blocks of rows

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> dict[str, Any]:
        """`bce`, `accuracy`, `calibration_error`, and `levels` with the same for each stratum; equal on every process.

        bce: mean of the cross-entropies of real and generated rows, in nats; log 2 at chance.
        """
        size = len(self.real[0])
        tasks = [(level, start) for level in range(LEVELS) for start in range(0, size, self.batch)]
        share = _read([self._logits(network, level, start) for level, start in dist.shard(tasks)])
        parts = [part for rank in dist.gathered(share) for part in rank]
        levels = [_summary([part for part in parts if part.level == level]) for level in range(LEVELS)]
        logit_real = torch.cat([part.logit_real for part in parts])
        logit_fake = torch.cat([part.logit_fake for part in parts])
        return {
            "bce": sum(level["bce"] for level in levels) / LEVELS,
            "accuracy": sum(level["accuracy_real"] + level["accuracy_fake"] for level in levels) / (2 * LEVELS),
            "calibration_error": reliability(logit_real, logit_fake).error,
            "levels": levels,
        }

    def _logits(self, network: nn.Module, level: int, start: int) -> _Part:
        stop = min(start + self.batch, len(self.real[0]))
        rng = RowRng.for_rows("held-out", self.seed, level, rows=range(start, stop))
        times = self.law.times((level + rng.rand(dtype=torch.float64)) / LEVELS)  # (b,)
        t = to_device(times.t, self.device)
        logits = []
        for x0, label in (self.real, self.fake):
            eps = to_device(rng.randn(x0.shape[1:]), self.device)
            states = noisy(to_device(x0[start:stop], self.device), t, eps)
            logits.append(network(states, t, to_device(label[start:stop], self.device)))
        weight = torch.ones_like(times.t) if times.weight is None else times.weight
        return _Part(level, times.t, logits[0], logits[1], weight)


def _read(parts: list[_Part]) -> list[_Part]:
    """The parts with their logits on the CPU, copied at once: each copy from a GPU waits for it."""
    if not parts:
        return parts
    logits = torch.cat([logit for part in parts for logit in (part.logit_real, part.logit_fake)]).cpu()
    sides = iter(logits.split([len(part.t) for part in parts for _ in range(2)]))
    return [part._replace(logit_real=next(sides), logit_fake=next(sides)) for part in parts]


def noisy(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """m(t) x0 + s(t) eps, of x0's shape and type. t: (B,)."""
    m, s = (scale.to(x0.dtype).view(-1, *[1] * (x0.ndim - 1)) for scale in (vp_sde.mean_scale(t), vp_sde.std(t)))
    return m * x0 + s * eps


def _summary(parts: list[_Part]) -> dict[str, Any]:
    t, logit_real, logit_fake, weight = (torch.cat(column) for column in list(zip(*parts, strict=True))[1:])
    objective = discriminator_loss(logit_real, logit_fake, weight, weight)
    curve = reliability(logit_real, logit_fake)
    real, fake = (torch.nn.functional.softplus(z) * weight for z in (-logit_real, logit_fake))
    return {
        "sigma_min": float(vp_sde.sigma_of(t.min())),
        "sigma_max": float(vp_sde.sigma_of(t.max())),
        "bce": float(objective.loss),
        "bce_real": float(real.mean()),
        "bce_fake": float(fake.mean()),
        "accuracy_real": float(objective.accuracy_real),
        "accuracy_fake": float(objective.accuracy_fake),
        "calibration_error": curve.error,
        # Bins without rows are left out: NaN is not JSON.
        "reliability": [
            [p, o, int(n)]
            for p, o, n in zip(curve.predicted.tolist(), curve.observed.tolist(), curve.num, strict=True)
            if not math.isnan(p)
        ],
    }
