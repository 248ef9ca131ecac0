"""One round of self-play: where it lies, the reference it starts from, its fake set, and what its trials share.

Rounds follow one another in a chain: that of DDO, or that of its control, which is trained by maximum likelihood.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddo_cli import checkpoint, rundir
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.data.items import ItemSet, named_classes
from ddo_cli.data.pairs import Shuffled, compared
from ddo_cli.data.samples import open_samples
from ddo_cli.engines.ddo import reference, report
from ddo_cli.engines.ddo.sweep import Plan, Setting
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.engines.watch import Watch
from ddo_cli.errors import UsageError
from ddo_cli.files import replacing
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import adapters
from ddo_cli.objectives.ddo import DdoSettings, r_std
from ddo_cli.objectives.ddo_step import ddo_objective
from ddo_cli.objectives.likelihood import plain_objective
from ddo_cli.recipe.schema import FinetuneRecipe, Recipe, SamplingRecipe
from ddo_cli.trainable import Objective
from ddo_cli.training.feed import Stream

FIRST_FAKE_SEED = 1_000_000  # beyond the seeds of scores


class Chain(NamedTuple):
    """Rounds that each start from the best model so far, at first recipe.model.ckpt.

    name: "rounds", those of DDO, or "control": the same real images, draws, steps and rule of promotion with the plain
    loss. Its records are kept in the state under this name.
    """

    name: str
    recipe: Recipe
    plans: Sequence[Plan]  # of each round
    run_dir: rundir.RunDir
    scoring: Scoring
    device: torch.device
    watch: Watch

    @property
    def is_control(self) -> bool:
        """Whether it is trained without discrimination."""
        return self.name == "control"

    @property
    def path(self) -> Path:
        """The directory of its rounds."""
        return self.run_dir.path / "control" if self.is_control else self.run_dir.path

    @property
    def final(self) -> Path:
        """The weights that it ends with."""
        return self.path / self.run_dir.final.name

    @property
    def log_file(self) -> Path:
        """The log of its training."""
        return self.path / self.run_dir.log_file.name

    @property
    def title(self) -> str:
        """Begins its lines for people."""
        return "control, " if self.is_control else ""

    def records(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Its finished rounds."""
        records: list[dict[str, Any]] = state.get(self.name, [])
        return records

    def is_done(self, state: dict[str, Any]) -> bool:
        """Whether nothing is left to train. A control goes through as many rounds as DDO did, promoted or not."""
        records = self.records(state)
        return len(records) >= len(state.get("rounds", [])) if self.is_control else is_over(self.recipe, records)

    def path_of(self, number: int) -> Path:
        """The directory of round `number`."""
        return self.path / f"round-{number:02d}"

    def next_path(self, state: dict[str, Any]) -> Path:
        """The directory of the round that comes next."""
        return self.path_of(len(self.records(state)) + 1)

    def weights_after(self, rounds: int) -> str | Path:
        """The reference that so many rounds have led to."""
        return self.path_of(rounds) / "best.safetensors" if rounds else self.recipe.model.ckpt


def is_over(recipe: Recipe, rounds: Sequence[dict[str, Any]]) -> bool:
    """Whether all rounds are done, or the last ones, under the settings of the next, led to no promotion."""
    settings, done = recipe.finetune, len(rounds)
    if done >= settings.rounds or settings.patience_rounds is None:
        return done >= settings.rounds
    last = range(done - settings.patience_rounds + 1, done + 1)
    if last.start < 1 or any(rounds[number - 1]["promoted"] for number in last):
        return False
    following = settings.of_round(done + 1)
    return all(settings.of_round(number) == following for number in last)


class Round(NamedTuple):
    """Round k of a chain. Its reference is the best model of round k - 1."""

    number: int
    chain: Chain

    @property
    def recipe(self) -> Recipe:
        """With the values that hold in this round."""
        return self.chain.recipe.of_round(self.number)

    @property
    def plan(self) -> Plan:
        """What it does."""
        return self.chain.plans[self.number - 1]

    @property
    def path(self) -> Path:
        """The round's directory."""
        return self.chain.path_of(self.number)

    @property
    def ref_file(self) -> str | Path:
        """Weights of the reference."""
        return self.chain.weights_after(self.number - 1)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.chain.title}round {self.number}/{self.chain.recipe.finetune.rounds}"

    @property
    def images_before(self) -> int:
        """Images that the rounds before have trained on."""
        records = self.chain.records(self.chain.run_dir.state())
        return report.images_before(self.chain.recipe, records)[self.number - 1]

    def draw_fakes(self, real: ItemSet) -> None:
        """Draws the fake set from the reference to disk, or what an interrupted run left to draw."""
        whole, settings = self.chain.recipe, self.recipe.finetune
        before = sum(whole.finetune.of_round(number).num_fake for number in range(1, self.number))
        first = FIRST_FAKE_SEED + before  # rounds do not overlap
        loaded = reference.told(reference.start_of(self.recipe, self.ref_file, self.chain.device), real)
        spec = fake_spec(settings, self.chain.scoring.spec, loaded.checkpoint)
        sample.run(
            loaded, range(first, first + settings.num_fake), self.path / "samples", form="shards",
            sampling=spec.model_dump(), keep=sample.kept_of_fakes(loaded.model, settings.fake_as, spec),
            device=self.chain.device, title=f"{self.title} fake set",
        )  # fmt: skip

    def networks(self, real: ItemSet, rejected: ItemSet | None) -> "Networks":
        """What every trial of the round trains with; the fake set is drawn first. rejected: of dpo.

        Raises UsageError if the precision is too low for round 1's log-ratios.
        """
        recipe, file, device = self.recipe, self.ref_file, self.chain.device
        # The same order of real images for DDO and its control.
        images = Shuffled(real.items, real.labels, "real", recipe.seed, self.number, hflip=recipe.data.hflip)
        other = None if rejected is None else (rejected.items, rejected.labels)
        precision_error = None
        if not self.chain.is_control:
            precision_error = reference.check_precision(recipe, file, real, self.number, device)
            if recipe.finetune.num_drawn:
                self.draw_fakes(real)
                fake = open_samples(self.path / "samples")
                other = fake.items, fake.labels
        loaded = reference.told(reference.start_of(recipe, file, device), real)
        start, fresh = loaded.checkpoint, reference.copies_of(loaded, recipe.finetune.draw)
        scratch = fresh() if adapters.is_in(loaded.model) else loaded.model
        if self.chain.is_control:
            task = Task(images, lambda model, _: plain_objective(model), dict)
        else:
            ref = reference.frozen(fresh(), recipe.finetune, device)
            rows = compared(recipe.finetune.objective, images, other, ref.num_classes, recipe.seed, self.number)
            task = ddo_task(ref, rows, recipe.finetune, precision_error)
        made_by = self.chain.recipe.told("data", "model", "sampling", "metric", "finetune")
        del made_by["finetune"]["control"]  # it asks for a twin, and changes no weight of DDO
        link = {
            "command": "finetune-ddo",
            **({"control": True} if self.chain.is_control else {}),
            "round": self.number,
            "reference_sha256": start.sha256,
            "recipe": made_by,
            **named_classes(real),
        }
        header: dict[str, Any] = {
            "kind": "model",
            "config": start.header["config"],
            **{key: start.header[key] for key in ("adapter", "base") if key in start.header},
            "sampling": self.chain.scoring.spec.model_dump(mode="json", exclude_none=True, exclude={"compile"}),
            "provenance": [*start.header.get("provenance", []), link],
        }
        before = self.chain.scoring.few(scratch)
        return Networks(task, start.sha256, fresh, scratch, header, precision_error, before)


def fake_spec(settings: FinetuneRecipe, spec: SamplingRecipe, file: Checkpoint) -> SamplingRecipe:
    """How a reference of this file draws a fake set. spec: how its scores are drawn.

    Raises UsageError for guidance of a reference that knows no images without label.
    """
    if settings.fake_cfg is None:
        return spec
    config = file.header["config"]
    is_known = config["num_classes"] and config["draw"].get("label_dropout")
    if settings.fake_cfg != 1 and not is_known:
        lacks = "was trained without dropping labels" if config["num_classes"] else "has no classes or captions"
        raise UsageError(
            f"finetune.fake_cfg = {settings.fake_cfg:g} guides away from what the model draws without label, and "
            f"{file.path} {lacks}; leave it out"
        )
    return spec.merged(cfg_scale=settings.fake_cfg)


class Task(NamedTuple):
    """What a round trains for."""

    stream: Stream
    objective: Callable[[LikelihoodModel, Setting], Objective]
    figures: Callable[[dict[str, float]], dict[str, float]]  # means of what the loss logs -> a line of the log


def ddo_task(ref: LikelihoodModel, rows: Stream, settings: FinetuneRecipe, precision_error: float | None) -> Task:
    """To tell real images from what `rows` has beside them, by the log-ratio to the frozen `ref`."""

    def objective(model: LikelihoodModel, setting: Setting) -> Objective:
        return ddo_objective(model, ref, DdoSettings(*setting, settings.divide_by_alpha, settings.objective))

    return Task(rows, objective, partial(_ddo_figures, precision_error))


def _ddo_figures(precision_error: float | None, means: dict[str, float]) -> dict[str, float]:
    """The error of r, where there is one, beside the spread of r."""
    spread = r_std(means["r_real"], means["r_fake"], means.pop("r_square"))
    return {
        **means,
        "r_std": spread,
        **({} if precision_error is None else {"precision_error": precision_error}),
        "denoising_ratio": (means["ref_loss"] - means["r_real"]) / means["ref_loss"],
    }


class Networks(NamedTuple):
    """Shared by the trials of a round. Data order and draws, too: they are compared in pairs."""

    task: Task
    ref_sha256: str
    fresh: Callable[[], LikelihoodModel]  # the model that each trial trains, equal to the reference
    scratch: LikelihoodModel  # holds averaged weights while they are scored
    header: dict[str, Any]  # of every checkpoint: the reference's configuration and a longer chain of provenance
    precision_error: float | None  # of r, in nats, on the first batch; None in float32
    before: np.ndarray | None = None  # images of the reference, to be seen beside a candidate's


def copy_weights(source: str | Path, target: Path) -> None:
    """Copies a weight file, or an embedded one, to its final name at once."""
    with replacing(target) as temporary:
        shutil.copyfile(checkpoint.resolve(source), temporary)
