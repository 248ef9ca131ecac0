"""`ddo train-disc`: a time-dependent real-or-generated discriminator of one model (arXiv 2211.17091).

The model draws a generated set to disk; real and generated items are noised by the same forward process; a network
learns to tell them apart at every noise level. Its logit estimates log p_data - log p_model, whose gradient is what the
model's score lacks. The model itself is not trained.
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.codec import Encodable
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_fits, digest
from ddo_cli.data.items import identity as identity_of
from ddo_cli.data.pairs import Examples, Pairs, Shuffled, split
from ddo_cli.data.samples import manifest_of
from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.diffusion.guidance import GradientGuide
from ddo_cli.engines import captions, training_run
from ddo_cli.engines.discriminator import data as disc_data
from ddo_cli.engines.discriminator import features as disc_features
from ddo_cli.engines.discriminator import report as disc_report
from ddo_cli.engines.discriminator.features import CachedRows
from ddo_cli.engines.sampling import guides, sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.engines.watch import Watch
from ddo_cli.files import cache_directory, read_json, sha256, write_json
from ddo_cli.generation import check_labels, encoded
from ddo_cli.metrics import gain as gains
from ddo_cli.metrics.discrimination import HeldOut, noisy
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.discriminators.on_trunk import TrunkDiscriminator
from ddo_cli.objectives.discriminator import discriminator_loss
from ddo_cli.recipe.schema import Recipe, SamplingRecipe
from ddo_cli.rng import StepRng, seed_from
from ddo_cli.trainable import Loss, Objective, Trainable
from ddo_cli.training import loop
from ddo_cli.training.state import drop_state

# The held-out loss counts as settled where the second half of the images gained at most this share of the total,
# log 2 - BCE. Half, because the end of a learning rate's decay is always flat. Our choice; the paper gives none.
STILL_FALLING = 0.2

WRITTEN_LAST = ("best.safetensors", "final.safetensors", "untrained.safetensors")


def run(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    force: bool = False,
    dry_run: bool = False,
    log_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains recipe.discriminator against recipe.model.ckpt and returns the object that `train-disc --json` prints.

    The same call on an unfinished run continues it; on a finished one it returns the stored result.
    force: takes a generated set that another model, or an unknown one, has drawn.
    Raises DataError or UsageError for sets that cannot be told apart in a useful way.
    """
    settings = recipe.discriminator
    registry.load_file(recipe.model.file)
    loaded = registry.load_model(recipe.model.ckpt, device)
    base = guides.diffusion_model(loaded)
    loaded.model.requires_grad_(False)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache, base.codec)
    loaded = captions.told(loaded, real)
    label_use = disc_data.labels_seen(loaded, settings)
    check_fits(real, base, recipe.data.hflip, num_classes=label_use)
    # What the recipe does not set is the checkpoint's.
    spec = sample.spec_of(loaded.checkpoint, **recipe.sampling.model_dump(exclude_unset=True))
    base.check_sampling(spec)
    given = disc_data.given_set(loaded, real, label_use, settings, force) if settings.fake is not None else None
    config = discriminators.config_of(
        "discriminator", settings.name, base.codec.state_shape, label_use, settings.options
    )
    network = _untrained(config, recipe, device)
    loop.check(network, settings)
    cached_bytes = disc_features.size_of(network, settings)
    scoring = Scoring(recipe, real, spec, device) if settings.select == "fid" else None
    guide = guides.discriminator_guide(network, recipe.guidance, base)
    if scoring is not None:
        scoring.check(boosts=guide.boost is not None)
        guides.check_acts(base, guide, spec)
    if given is None:
        disc_data.check_sizes(len(real.items), settings.num_fake, real.name, settings)
        disc_data.check_classes(real, settings.num_fake, label_use)
        check_labels(spec, base.num_classes, settings.num_fake)
    identity = {"model_sha256": loaded.checkpoint.sha256, **identity_of(real), "config": config}
    identity |= {"fake_sha256": digest(given)} if given is not None else {}
    identity |= scoring.identity if scoring is not None else {}
    identity |= training_run.precision_of(settings, spec, device)
    rundir.RunDir(out).check("train-disc", recipe, **identity)
    if dry_run:
        return {
            "out": str(out), "dry_run": True, "model": recipe.model.ckpt, "data": real.name,
            "discriminator": settings.name, "parameters": sum(p.numel() for p in network.parameters()),
            "fake": settings.fake or f"{settings.num_fake} to draw", "images": settings.images, "batch": settings.batch,
            **({"cached_features": f"{cached_bytes / 1e9:.3g} GB in {cache_directory()}"} if cached_bytes else {}),
            **({"control": "the untrained network: held-out figures and no training"} if settings.control else {}),
        }  # fmt: skip
    with training_run.claimed("train-disc", recipe, out, identity, _needed) as (run_dir, state):
        best, untrained = run_dir.path / "best.safetensors", run_dir.path / "untrained.safetensors"
        if not run_dir.is_finished(state, run_dir.final, best, *([untrained] if settings.control else [])):
            fake = given or disc_data.draw(recipe, spec, run_dir, label_use, real, device)
            header = _header(recipe, loaded, config, spec, real, fake)
            training = _Training(recipe, run_dir, base, network, real, fake, header, spec, device, log_to)
            if not state.get("finished") or len(training.evaluations) < state["evaluations"]:
                training.run()  # else only a file written at the end was lost
            state = _finish(training, scoring, _untrained(config, recipe, device) if settings.control else None)
        keys = ("heldout_bce", "heldout_accuracy", "calibration_error", "settled", "best_images", "selected_by")
        result = {**training_run.result(run_dir, state, *keys), "gain": _brief(state["gain"]), "best": str(best)}
        if state.get("untrained"):
            result["control"] = {
                "file": str(untrained),
                **state["untrained"],
                "gain": _brief(state["untrained"]["gain"]),
            }
        return result


def _untrained(config: dict[str, Any], recipe: Recipe, device: torch.device) -> Trainable:
    """The network before its first step, equal in every process and call."""
    torch.manual_seed(seed_from("init", recipe.seed))  # weights are the only thing drawn from the global generator
    return discriminators.build("discriminator", config).to(device)


def _brief(gain: dict[str, Any] | None) -> dict[str, Any] | None:
    """Figures of the gain without those of each noise level."""
    return gain and {key: value for key, value in gain.items() if key != "levels"}


def _needed(run_dir: rundir.RunDir, state: dict[str, Any], name: str) -> str | None:
    """For `RunDir.inspect`: the checkpoints, from which the best one is chosen, and their held-out figures."""
    path, checkpoints = run_dir.path / name, run_dir.path / "checkpoints"
    if path.name in (*WRITTEN_LAST, "guided-scores.json") or "samples" in path.parts:
        return ""
    if not state.get("finished") and (path.parent == checkpoints or path.name == "metrics.json"):
        # To remove the directory is a user's way to train again on the same generated set.
        again = f"restore it from a copy, or remove {checkpoints}, and the discriminator is trained again"
        return again if checkpoints.exists() else ""
    return None


def default_out(recipe: Recipe, ckpt: str | None) -> Path:
    """runs/<recipe>-disc; for a model given by --ckpt with the start of its hash, so that models keep apart."""
    name = f"{recipe.name}-disc" if ckpt is None else f"{recipe.name}-disc-{sha256(checkpoint.resolve(ckpt))[:8]}"
    return guides.RUNS / name


def table_of(out: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """The final checkpoint's held-out figures by noise level, for people."""
    return disc_report.table(rundir.RunDir(out).state()["levels"])


def compared(out: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """... those of all levels together, beside the control's."""
    return disc_report.compared(rundir.RunDir(out).state())


# --- Training


class _Batch(NamedTuple):
    """n real and n generated rows; tensors have the real rows first."""

    real: Encodable
    fake: Encodable
    label: Tensor  # (2n,)
    t: Tensor  # (2n,), float64
    weight: Tensor | None  # (2n,), float32, of each row's loss; None: 1
    eps: Tensor  # (2n, ...)


class _Training:
    """The loop's loss and evaluations."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: rundir.RunDir,
        base: DiffusionModel,
        network: Trainable,
        real: ItemSet,
        fake: ItemSet,
        header: dict[str, Any],
        spec: SamplingRecipe,
        device: torch.device,
        log_to: Sequence[str],
    ):
        self.spec = spec
        self.recipe, self.settings, self.run_dir, self.device = recipe, recipe.discriminator, run_dir, device
        self.base, self.network, self.header = base, network, header
        draw = base.draw_options
        weighted = self.settings.weighting == "likelihood"
        law = (self.settings.time, weighted, self.settings.t_min, draw.p_mean, draw.p_std, draw.distribution)
        self.law = vp_sde.TimeLaw(*law)
        streams, held = [], []
        for side, items in (("real", real), ("fake", fake)):
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
        every = max(settings.eval_every // settings.batch, 1)
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
        held_out |= {"gain": _brief(figures["gain"])} if "gain" in figures else {}
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


def _finish(training: _Training, scoring: Scoring | None, untrained: Trainable | None) -> dict[str, Any]:
    """Writes best, final, untrained, pictures and report; returns the run's state."""
    run_dir, settings = training.run_dir, training.settings
    evaluations, settled = dict(by_step(training.evaluations)), training.has_settled()
    best = min(evaluations, key=lambda step: evaluations[step]["bce"])
    scores = _scores(training, scoring) if scoring is not None else {}
    if settings.select == "gain":
        gained = {step: (training.gain_of(step) or {"gain": -math.inf})["gain"] for step in evaluations}
        chosen = max(gained, key=lambda step: gained[step])
    else:
        chosen = min(scores, key=lambda step: scores[step]) if scores else best
    gain = {step: training.gain_of(step) for step in (best, chosen)}[chosen]
    if evaluations[best]["accuracy"] < 0.51:
        console.warn(
            "held-out accuracy is at chance: guidance has nothing to correct, or the discriminator needs more training "
            "(--images, --lr)"
        )
    elif not settled:
        console.warn(
            f"the held-out loss was still falling after {settings.images} images (discriminator.images): the "
            "discriminator is not trained to the end, and guidance may help less or do harm; raise --images"
        )
    if warning := guides.harm(gain):
        console.warn(warning)
    if dist.is_main():
        for name, step in (("best", best), ("final", chosen)):
            tensors = checkpoint.load(training.candidate(step)).tensors
            training.keep(f"{name}.safetensors", tensors, step, evaluations[step])
    control: dict[str, Any] = run_dir.state().get("untrained", {})
    if untrained is not None:
        guide = training.guide_of(untrained)
        control = {**training.held_out.evaluate(untrained), "gain": training.gain(guide)}
        if dist.is_main():
            training.keep("untrained.safetensors", untrained.state_dict(), 0, control)
        control = {key: control[key] for key in ("bce", "accuracy", "calibration_error", "gain")}
    figures = {
        "heldout_bce": evaluations[chosen]["bce"],
        "heldout_accuracy": evaluations[chosen]["accuracy"],
        "calibration_error": evaluations[chosen]["calibration_error"],
        "gain": gain,
        "levels": evaluations[chosen]["levels"],
        **({"untrained": control} if control else {}),
        "settled": settled,
        "best_images": chosen * settings.batch,
        "batch": settings.batch,
        "evaluations": len(evaluations),
        "selected_by": settings.select,
        "scores": {str(step): value for step, value in scores.items()},
    }
    training.watch.finish({**run_dir.state(), **figures})
    return training_run.finish(run_dir, **figures)


def _scores(training: _Training, scoring: Scoring) -> dict[int, float]:
    """The recipe's metric of samples guided by each checkpoint, by step; each is kept on disk."""
    file = training.run_dir.path / "guided-scores.json"
    rundir.remove_damaged(file, "the scores are taken again")
    scores: dict[str, float] = dist.from_main(read_json(file) if file.is_file() else {})
    for step, _ in by_step(training.evaluations):
        if str(step) in scores:
            continue
        scores[str(step)] = scoring.run(training.base.guided_by([training.guide(step)]), 0)[scoring.key]
        console.info(f"guided by step {step}: {scoring.key} {scores[str(step)]:.4g}")
        if dist.is_main():
            write_json(file, scores)
    return {int(step): value for step, value in scores.items()}


def _header(
    recipe: Recipe, loaded: registry.Loaded, config: dict[str, Any], spec: SamplingRecipe, real: ItemSet, fake: ItemSet
) -> dict[str, Any]:
    """What `guide-sample` checks and starts from."""
    settings = recipe.discriminator
    drawn = manifest_of(Path(settings.fake)).get("sampling") if settings.fake else spec.model_dump(mode="json")
    trained_on = {
        "model": recipe.model.ckpt, "model_sha256": loaded.checkpoint.sha256, "data_sha256": digest(real),
        "fake_sha256": digest(fake), "num_fake": len(fake.items), "sampling": drawn,
    }  # fmt: skip
    made_by = recipe.told("data", "model", "sampling", "metric", "discriminator", "guidance")
    del made_by["discriminator"]["control"]  # may be added to a finished run, whose weights stay as they are
    link = {"command": "train-disc", "recipe": made_by, **trained_on}
    return {
        "kind": "discriminator", "config": config, "process": discriminators.PROCESS,
        "trained_on": trained_on, "guidance": recipe.guidance.model_dump(mode="json"),
        "provenance": [*loaded.checkpoint.header.get("provenance", []), link],
    }  # fmt: skip
