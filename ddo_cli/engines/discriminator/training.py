"""The training of a discriminator: its rows and its loss, its candidates, and what is measured of each."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.codec import Encodable
from ddo_cli.data.items import ItemSet
from ddo_cli.data.pairs import Examples, Pairs, Shuffled, split
from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.guidance import GradientGuide
from ddo_cli.engines import training_run
from ddo_cli.engines.discriminator import features as disc_features
from ddo_cli.engines.discriminator import report as disc_report
from ddo_cli.engines.discriminator.features import CachedRows
from ddo_cli.engines.discriminator.setup import Setup, eval_steps
from ddo_cli.engines.sampling import guides
from ddo_cli.engines.watch import Watch
from ddo_cli.files import read_json, write_json
from ddo_cli.generation import encoded
from ddo_cli.metrics import gain as gains
from ddo_cli.metrics.discrimination import HeldOut, noisy
from ddo_cli.models.discriminators.on_trunk import TrunkDiscriminator
from ddo_cli.objectives.discriminator import discriminator_loss
from ddo_cli.rng import StepRng
from ddo_cli.trainable import Loss, Objective, Trainable
from ddo_cli.training import loop
from ddo_cli.training.state import drop_state

# The held-out loss counts as settled where the second half of the images gained at most this share of the total,
# log 2 - BCE. Half, because the end of a learning rate's decay is always flat. Our choice; the paper gives none.
STILL_FALLING = 0.2


class _Batch(NamedTuple):
    """n real and n generated rows; tensors have the real rows first."""

    real: Encodable
    fake: Encodable
    label: Tensor  # (2n,)
    t: Tensor  # (2n,), float64
    weight: Tensor | None  # (2n,), float32, of each row's loss; None: 1
    eps: Tensor  # (2n, ...)


class Training:
    """The loop's loss and evaluations."""

    def __init__(self, setup: Setup, run_dir: rundir.RunDir, fake: ItemSet, log_to: Sequence[str]):
        recipe, device, base = setup.recipe, setup.device, setup.base
        self.recipe, self.settings, self.spec, self.device = recipe, recipe.discriminator, setup.spec, device
        self.run_dir, self.base, self.network, self.header = run_dir, base, setup.network, setup.header(fake)
        draw = base.draw_options
        weighted = self.settings.weighting == "likelihood"
        law = (self.settings.time, weighted, self.settings.t_min, draw.p_mean, draw.p_std, draw.distribution)
        self.law = vp_sde.TimeLaw(*law)
        streams, held = [], []
        for side, items in (("real", setup.real), ("fake", fake)):
            rows = split(len(items.items), self.settings.held_out, side, recipe.seed)
            hflip = recipe.data.hflip and side == "real"
            streams.append(Shuffled(items.items, items.labels, side, recipe.seed, only=rows.train, hflip=hflip))
            x0 = encoded(base, items.items, rows.held_out, side, recipe.seed, device=device)
            held.append((x0, torch.from_numpy(items.labels[rows.held_out])))
        self.pairs = Pairs(*streams)
        self.real_held_out = held[0]
        self.held_out = HeldOut(held[0], held[1], self.law, recipe.seed, device, self.settings.micro_batch or 256)
        self.file, self.watch = run_dir.path / "metrics.json", Watch(run_dir, recipe, disc_report.page, log_to)
        self.evaluations: dict[str, dict[str, Any]] = dist.from_main(self._known() if dist.is_main() else {})

    def _known(self) -> dict[str, dict[str, Any]]:
        """Evaluations that were done before. All are done again, with the training, if checkpoints are gone."""
        known: dict[str, dict[str, Any]] = read_json(self.file)["evaluations"] if self.file.is_file() else {}
        if all(self.candidate(int(step)).is_file() for step in known):
            return known
        console.warn(f"{self.run_dir.path}: checkpoints are missing; the discriminator is trained again")
        drop_state(training_run.state_file(self.run_dir))
        return {}

    def run(self) -> None:
        """Trains until the held-out loss has settled, or the images are used up."""
        settings = self.settings
        steps = training_run.num_steps(settings.images, settings.batch)
        every = eval_steps(settings)
        evaluate_at = [*range(every, steps - every // 2, every), steps]
        plan, meter = training_run.plan_of(
            self.run_dir, self.recipe, "discriminator", steps, settings, self.device, evaluate_at
        )
        candidates, objective, stream = self.candidate(0).parent, Objective(self.batch, self.loss), self.stream()
        if isinstance(stream, CachedRows):
            objective = Objective(stream.batch, self.loss_of_features)
        plan = plan._replace(last_good=lambda: max(candidates.glob("step-*"), default="none yet"))
        with contextlib.closing(loop.fit(self.network, objective, stream, plan, meter)) as events, self.watch:
            for event in events:
                if isinstance(event, loop.Evaluate):
                    event.figures = self.evaluate(event.step, event.averages.whole())
                self.watch.saw(event, settings.batch, title="discriminator")
                if isinstance(event, loop.Evaluate) and self.settled():
                    break

    def stream(self) -> Pairs | CachedRows:
        """The rows to train on: real and generated items, or features of the frozen trunk that are kept on disk."""
        if not self.settings.cached_images:
            return self.pairs
        assert isinstance(self.network, TrunkDiscriminator), "size_of has checked it"
        trained_on = self.header["trained_on"]
        content = {
            "data": trained_on["data_sha256"], "fake": trained_on["fake_sha256"],
            "encoder": self.base.codec.encoder_id(), "hflip": self.recipe.data.hflip, "device": self.device.type,
            "draw": self.base.draw_options.model_dump(mode="json"),
        }  # fmt: skip
        return disc_features.cached(
            self.network, self.batch, self.states, self.pairs, self.law, self.settings, self.recipe.seed, content,
            f"{self.recipe.name}-trunk", self.device,
        )  # fmt: skip

    def batch(self, real: Examples, fake: Examples, rng: StepRng) -> _Batch:
        """Real and generated rows, each with a time and noise of its own."""
        row_rng = rng("disc")
        u = row_rng.rand((2,), dtype=torch.float64).T.flatten()  # (2n,), real rows first
        eps = row_rng.randn((2, *self.base.codec.state_shape)).transpose(0, 1).flatten(0, 1)  # (2n, ...)
        t, weight = self.law.times(u)
        inputs = [self.base.codec.prepare(side.items, row_rng) for side in (real, fake)]
        weight = None if weight is None else weight.to(torch.float32)
        return _Batch(inputs[0], inputs[1], torch.cat([real.label, fake.label]), t, weight, eps)

    def loss(self, wrapped: nn.Module, batch: _Batch) -> Loss:
        """Cross-entropy of real and generated rows."""
        return _cross_entropy(wrapped(self.states(batch), batch.t, batch.label), batch.weight)

    def loss_of_features(self, wrapped: nn.Module, batch: disc_features.FeatureBatch) -> Loss:
        """The same of rows whose features are known."""
        return _cross_entropy(wrapped(None, batch.t, batch.label, batch.features), batch.weight)

    def states(self, batch: _Batch) -> Tensor:
        """Noisy states (2n, ...), real rows first."""
        x0 = torch.cat([self.base.codec.encode(*side) for side in (batch.real, batch.fake)])
        return noisy(x0, batch.t, batch.eps)

    def evaluate(self, step: int, ema: dict[str, Tensor]) -> dict[str, float]:
        """Keeps the checkpoint of a step and its held-out figures; returns the main ones."""
        if str(step) not in self.evaluations:
            live = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
            self.network.load_state_dict(ema)
            self.network.eval()
            figures = self.held_out.evaluate(self.network)
            self.network.load_state_dict(live)
            self.evaluations[str(step)] = figures
            if dist.is_main():
                self.keep(f"checkpoints/{self.candidate(step).name}", ema, step, figures)
                write_json(self.file, {"evaluations": self.evaluations})
        figures = self.evaluations[str(step)]
        return {f"heldout_{key}": figures[key] for key in ("bce", "accuracy", "calibration_error")}

    def guide(self, step: int) -> GradientGuide:
        """The guide of a step's checkpoint, whose weights the network takes."""
        self.network.load_state_dict(checkpoint.load(self.candidate(step)).tensors)
        return self.guide_of(self.network)

    def guide_of(self, network: Trainable) -> GradientGuide:
        """Guidance by a network with the recipe's settings."""
        network = network.eval().requires_grad_(False)
        return guides.discriminator_guide(network, self.recipe.guidance, self.base)

    def gain(self, guide: GradientGuide) -> dict[str, Any] | None:
        """The gain on the held-out real items at the recipe's weight, see `metrics.gain`; None if it is not finite, or
        if the guide never acts at the sampler's noise levels.
        """
        bounds = guides.window(self.base, guide, self.spec)
        if bounds[0] >= bounds[1]:
            return None
        x0, label = self.real_held_out
        seed, weight = self.recipe.seed, guide.weight or 1.0  # at weight 0 there is nothing to measure
        found = gains.measure(self.base, guide, x0, label, self.spec, bounds, seed=seed, device=self.device)
        figures = {"weight": weight, **found.figures(weight)}
        return figures if all(math.isfinite(level["gain"]) for level in figures["levels"]) else None

    def gain_of(self, step: int) -> dict[str, Any] | None:
        """... of a step's checkpoint, measured once."""
        figures = self.evaluations[str(step)]
        if "gain" not in figures:
            figures["gain"] = self.gain(self.guide(step))
            if dist.is_main():
                write_json(self.file, {"evaluations": self.evaluations})
        gain: dict[str, Any] | None = figures["gain"]
        return gain

    def keep(self, name: str, tensors: dict[str, Tensor], step: int, figures: dict[str, Any]) -> None:
        """Writes a weight file of the run with its held-out figures."""
        held_out = {key: figures[key] for key in ("bce", "accuracy", "calibration_error")}
        held_out |= {"gain": brief(figures["gain"])} if "gain" in figures else {}
        checkpoint.save(self.run_dir.path / name, tensors, {**self.header, "step": step, "heldout": held_out})

    def candidate(self, step: int) -> Path:
        """The file of a step's averaged weights, which `guide-sample --disc` takes as well."""
        return self.run_dir.path / "checkpoints" / f"step-{step:06d}.safetensors"

    def settled(self) -> bool:
        """Whether `patience` evaluations in a row brought no better held-out loss."""
        bce = [figures["bce"] for _, figures in by_step(self.evaluations)]
        return bool(bce) and bce.index(min(bce)) < len(bce) - self.settings.patience

    def has_settled(self) -> bool:
        """... or the second half of the images gained at most STILL_FALLING of the total."""
        history = [(step, figures["bce"]) for step, figures in by_step(self.evaluations)]
        early = [bce for step, bce in history if step <= history[-1][0] / 2]
        best = min(bce for _, bce in history)
        return self.settled() or bool(early and min(early) - best <= STILL_FALLING * (math.log(2) - best))


def _cross_entropy(logit: Tensor, weight: Tensor | None) -> Loss:
    """logit, weight: (2n,), real rows first."""
    n = len(logit) // 2
    weights = (None, None) if weight is None else weight.split(n)
    figures = discriminator_loss(logit[:n], logit[n:], *weights)._asdict()
    return Loss(figures.pop("loss"), figures)


def by_step(evaluations: dict[str, dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(step, figures) in the order of training."""
    return sorted((int(step), figures) for step, figures in evaluations.items())


def brief(gain: dict[str, Any] | None) -> dict[str, Any] | None:
    """Figures of the gain without those of each noise level."""
    return gain and {key: value for key, value in gain.items() if key != "levels"}
