"""One setting of alpha and beta inside a round of DDO: its training and its candidates; the halving of many."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ddo_cli import checkpoint, console, dist
from ddo_cli.engines.ddo import sweep
from ddo_cli.engines.ddo.round import Networks, Round
from ddo_cli.engines.ddo.sweep import Setting, survivors
from ddo_cli.errors import NumericsError
from ddo_cli.files import read_json, remove, write_json
from ddo_cli.models import adapters
from ddo_cli.training import loop
from ddo_cli.training.ema import snapshot_name
from ddo_cli.training.meter import Meter
from ddo_cli.training.state import drop_state

TRAIN_STATE = "train-state.safetensors"


class Trial:
    """One setting. Its scores are kept in `metrics.json` of its directory, so a killed run does nothing twice."""

    def __init__(self, of_round: Round, networks: Networks, setting: Setting):
        self.is_node = of_round.plan.has_nodes
        self.round, self.networks, self.setting = of_round, networks, setting
        self.settings, self.scoring = of_round.recipe.finetune, of_round.chain.scoring
        self.title, self.path = of_round.title, of_round.path
        # Of log, checkpoints and saved state: settings that the recipe does not tell.
        self.tags: dict[str, Any] = setting._asdict() if self.is_node else {}
        if self.is_node:
            self.title, self.path = f"{self.title} {setting.title}", self.path / "nodes" / setting.directory
        self.file = self.path / "metrics.json"
        known = dist.from_main(read_json(self.file) if self.file.is_file() else {})
        self.candidates: dict[str, dict[str, float]] = known.get("candidates", {})  # step -> figures, first seed range
        self.rungs: dict[str, dict[str, float]] = known.get("rungs", {})  # step -> figures on fewer images
        self.diverged: dict[str, Any] = known.get("diverged", {})  # at which step, and why
        self.reached = max(map(int, self.rungs), default=0)  # the step that training has come to
        self.is_scoring = False
        self.steps, self.candidates_at = of_round.plan.steps, of_round.plan.candidates_at
        watch, batch = of_round.chain.watch, self.settings.batch
        prefix = "control/" if of_round.chain.is_control else f"{setting.directory}/" if self.is_node else ""
        self.saw = partial(watch.saw, batch=batch, series=prefix, title=self.title, before=of_round.images_before)

    def train(self, until: int) -> None:
        """Trains on to a rung and scores the averaged weights there; on the way to the last rung, all candidates.

        One of several trials that diverges drops out; alone it raises NumericsError.
        """
        is_last = until == self.steps
        if self.diverged or (self.is_over if is_last else str(until) in self.rungs):
            return
        try:
            if is_last and self._score_kept():
                return
            model = self.networks.fresh()
            task = self.networks.task
            objective = task.objective(model, self.setting)
            fitted = loop.fit(model, objective, task.stream, self._plan(until), self._meter())
            with contextlib.closing(fitted) as events:
                for event in events:
                    match event:
                        case loop.Stepped(step, figures):
                            self._check(step, figures)
                        case loop.Evaluate():
                            self._evaluate(event, is_last)
                        case loop.Finished(step, averages) if not is_last:
                            self.rungs[str(step)] = self._measure(step, averages.whole(), self.round.plan.images)
                            self._write()
                    self.saw(event)
                    if is_last and self.is_over:
                        break
        except NumericsError as error:
            # Samples that are not finite are met by one process only: the others wait for its share of the score.
            if not self.is_node or (self.is_scoring and dist.world_size() > 1):
                raise
            self._drop_out(error)

    def drop(self) -> None:
        """Deletes training state and unscored candidates."""
        if dist.is_main():
            drop_state(self.path / TRAIN_STATE)
            for step in self.candidates_at:
                if str(step) not in self.candidates:
                    for width in (None, *self.settings.ema_widths[1:]):
                        remove(self.candidate_file(step, width))

    def candidate_file(self, step: int, width: float | None = None) -> Path:
        """Averaged weights after a step. width: of a further average; None: those that are scored."""
        return self.path / "checkpoints" / snapshot_name(step, width)

    def record(self) -> dict[str, Any]:
        """The trial as a row of a sweep's table, JSON-ready."""
        outcome, stopped_at = "stopped", max(map(int, self.rungs), default=0)
        if str(self.steps) in self.candidates:
            outcome, stopped_at = "finished", self.steps
        elif self.is_early:
            outcome, stopped_at = "ended early", self.last_step
        if self.diverged:
            outcome, stopped_at = "diverged", self.diverged["step"]
        return {
            **self.setting._asdict(),
            "rungs": self._by_step(self.rungs),
            "candidates": self._by_step(self.candidates),
            "stopped_at": stopped_at,
            "outcome": outcome,
            **({"reason": self.diverged["reason"]} if self.diverged else {}),
        }

    @property
    def is_over(self) -> bool:
        """Whether the last candidate is scored, or the trial ended before it."""
        return str(self.steps) in self.candidates or self.is_early

    def score_at(self, until: int) -> float:
        """What training to a rung has come to, to compare with others: at the last one the best candidate's score.

        Infinite where it diverged before.
        """
        if until == self.steps:
            return min(map(sweep.rank, self._scores()), default=math.inf)
        rung = self.rungs.get(str(until))
        return sweep.rank(rung[self.scoring.key]) if rung else math.inf

    @property
    def score_at_end(self) -> float:
        """The last candidate's score, which may be worse than the best one's; infinite of a trial that diverged."""
        return math.inf if self.diverged else sweep.rank(self._scores()[-1])

    @property
    def is_early(self) -> bool:
        """Whether scores have risen again, and training ended before the last candidate (finetune.patience)."""
        is_last = str(self.steps) in self.candidates
        return not is_last and sweep.is_past_best(self._scores(), self.settings.patience)

    @property
    def last_step(self) -> int:
        """The step at which training ended, of a trial that is over."""
        return max(map(int, (*self.rungs, *self.candidates)))

    # --- Training

    def _plan(self, until: int) -> loop.Plan:
        number, chain = self.round.number, self.round.chain
        owner = f"{chain.title}round {number} of {self.networks.ref_sha256}"
        return loop.Plan(
            title=self.title,
            steps=self.steps,
            settings=self.settings,
            key=(chain.recipe.seed, number),
            state_file=self.path / TRAIN_STATE,
            owner=" ".join([owner, *([self.setting.title] if self.tags else [])]),
            last_good=self._last_good,
            evaluate_at=frozenset(self.candidates_at),
            until=until,
        )

    def _meter(self) -> Meter:
        tags, chain = {"round": self.round.number, **self.tags}, self.round.chain
        return Meter(chain.log_file, tags, self.settings.batch, chain.device, self._figures)

    def _figures(self, means: dict[str, float]) -> dict[str, float]:
        """Of a line of the log. beta · std(r) tells whether beta fits."""
        figures = self.networks.task.figures(means)
        return {**figures, **({"beta_r_std": self.setting.beta * figures["r_std"]} if "r_std" in figures else {})}

    def _preview_file(self, step: int) -> Path | None:
        """Images of a candidate beside the reference's, on the same seeds; None of a density."""
        return None if self.scoring.density is not None else self.path / "previews" / f"step-{step:06d}.png"

    def _check(self, step: int, figures: dict[str, float] | None) -> None:
        self.reached = step
        ratio = figures.get("denoising_ratio", 0.0) if figures else 0.0  # a control has no reference to compare with
        if not ratio <= self.settings.max_denoising_ratio:  # NaN is refused too
            raise NumericsError(
                f"{self.title}: by step {step} the plain loss on real images has grown to {ratio:.3g} times the "
                f"reference's (finetune.max_denoising_ratio = {self.settings.max_denoising_ratio}), the model "
                f"diverges; the last good checkpoint is {self._last_good()}; lower finetune.lr = {self.settings.lr} or "
                f"finetune.beta = {self.setting.beta} and choose another --out"
            )

    def _last_good(self) -> str | Path:
        return max((self.path / "checkpoints").glob("step-*.safetensors"), default=self.round.ref_file)

    def _drop_out(self, error: NumericsError) -> None:
        what, _, _ = str(error).partition(";")  # the rest is how to mend a run of this setting alone
        console.warn(f"{self.title} drops out: {what.removeprefix(f'{self.title}: ')}")
        self.diverged = {"step": error.step or self.reached, "reason": what}
        self._write()

    # --- Candidates

    def _evaluate(self, event: loop.Evaluate, is_last: bool) -> None:
        """Keeps a candidate, and scores it on the way to the last rung."""
        step = event.step
        if str(step) not in self.candidates:
            for width, tensors in event.averages.further():
                self._keep(step, tensors, width)
            averages = event.averages.whole()
            if not self.candidates and (idle := adapters.idle(averages)):
                console.warn(
                    f"{self.title}: {len(idle)} layers of finetune.adapter.targets did not change, such as {idle[0]}: "
                    "the network does not call them; leave them out"
                )
            self._keep(step, averages)
            if is_last:
                self._score(step, averages)
        if is_last:
            event.figures, event.picture = self.candidates[str(step)], self._preview_file(step)

    def _keep(self, step: int, averages: dict[str, Tensor], width: float | None = None) -> None:
        if dist.is_main():
            *older, link = self.networks.header["provenance"]
            header = {**self.networks.header, "provenance": [*older, {**link, **self.tags}], "step": step}
            for std in [width] if width is not None else self.settings.ema_widths[:1]:
                # A round begins anew: its averages know nothing of the images before.
                header["ema"] = {"std": std, "images": step * self.settings.batch}
            checkpoint.save(self.candidate_file(step, width), averages, header)

    def _score_kept(self) -> bool:
        """Scores the candidates that were kept unscored on the way to earlier rungs; whether that ends the trial."""
        for step in self.candidates_at:
            if self.is_over:
                return True
            if step <= max(map(int, self.rungs), default=0) and str(step) not in self.candidates:
                self._score(step, checkpoint.load(self.candidate_file(step), kind="model").tensors)
        return self.is_over

    def _score(self, step: int, averages: dict[str, Tensor]) -> None:
        self.candidates[str(step)] = self._measure(step, averages)
        if (preview := self._preview_file(step)) is not None:
            self.scoring.preview(self.networks.before, self.networks.scratch, preview)
        self._write()
        if self.is_early:
            console.info(
                f"{self.title}: ends after {step * self.settings.batch:,} images, since {self.settings.patience} "
                f"candidates in a row were no better than the best one (finetune.patience)"
            )

    def _measure(self, step: int, averages: dict[str, Tensor], images: int | None = None) -> dict[str, float]:
        """The figures of averaged weights. Empties `averages`.

        With sharded weights nothing else holds the gathered averages, so they free their memory before the score.
        """
        self.reached, self.is_scoring = max(self.reached, step), True
        self.networks.scratch.load_state_dict(averages)
        averages.clear()
        figures = self.scoring.run(self.networks.scratch, 0, images=images)
        self.is_scoring = False
        return figures

    def _write(self) -> None:
        if dist.is_main():
            known = {"rungs": self.rungs, "diverged": self.diverged}
            write_json(self.file, {"candidates": self.candidates, **{key: v for key, v in known.items() if v}})

    def _scores(self) -> list[float]:
        return [each["score"] for each in self._by_step(self.candidates)]

    def _by_step(self, figures: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
        return [{"step": step, "score": figures[str(step)][self.scoring.key]} for step in sorted(map(int, figures))]


def halving(trials: Sequence[Trial], rungs: Sequence[sweep.Rung]) -> Iterator[tuple[Trial, int]]:
    """What to train how far: to each rung in turn, those that the scores at the one before have left."""
    alive, reached = trials, 0
    for step, num_trials in rungs:
        if reached:
            alive = better_half(trials, alive, reached, num_trials)
        for trial in alive:
            yield trial, step
        reached = step


def better_half(trials: Sequence[Trial], alive: Sequence[Trial], step: int, num: int) -> list[Trial]:
    """The `num` of `alive` with the best scores at the rung of step `step`. Deletes the training state of the others.

    A rung is decided by scores that all lie on disk, so a killed run decides alike.
    """
    key = trials[0].scoring.key
    # Not those that have not diverged: a continued run decides again, and some have diverged since.
    scored = [trial for trial in alive if str(step) in trial.rungs]
    kept = survivors([trial.rungs[str(step)][key] for trial in scored], num)
    alive = [scored[i] for i in kept]
    titles = ", ".join(trial.setting.title for trial in alive)
    title = trials[0].round.title
    console.info(f"{title}: after step {step} {len(alive)} of {len(trials)} go on: {titles}")
    for trial in trials:
        if trial not in alive:
            trial.drop()
    return alive


def candidates_of(trials: Sequence[Trial]) -> Iterator[tuple[Trial, int]]:
    """Every scored candidate, as trial and step. Raises NumericsError if all diverged before their first one."""
    if not any(trial.candidates for trial in trials):
        settings = trials[0].settings
        reason = next(trial.diverged["reason"] for trial in trials if trial.diverged)
        raise NumericsError(
            f"{trials[0].round.title}: every node that the sweep kept diverges before its first candidate ({reason}); "
            f"lower finetune.lr = {settings.lr}, finetune.eval_every or beta, and choose another --out"
        )
    for trial in trials:
        yield from ((trial, step) for step in sorted(map(int, trial.candidates)))
