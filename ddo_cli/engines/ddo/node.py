"""One setting of alpha and beta inside a round of DDO: its training, its candidates, and the halving of many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli import checkpoint, console, dist
from ddo_cli.engines.ddo.sweep import Plan, Setting, survivors
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import NumericsError
from ddo_cli.files import read_json, write_json
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import r_std
from ddo_cli.recipe.schema import Recipe
from ddo_cli.training import loop
from ddo_cli.training.ema import snapshot_name

TRAIN_STATE = "train-state.safetensors"
# (model, reference, setting) -> the loss that `loop.fit` takes
MakeLoss = Callable[[LikelihoodModel, LikelihoodModel, Setting], Any]


class Shared(NamedTuple):
    """What all nodes of a round have in common: data order and draws, too, so that they are compared in pairs."""

    number: int  # of the round
    title: str
    recipe: Recipe
    plan: Plan
    ref_file: str | Path
    ref: LikelihoodModel  # frozen
    ref_sha256: str
    scratch: LikelihoodModel  # holds averaged weights while they are scored
    header: dict[str, Any]  # of every checkpoint
    make_loss: MakeLoss
    scoring: Scoring
    log_file: Path
    device: torch.device


class Node:
    """One setting. What it found is kept in `metrics.json` of its directory, so a killed run does nothing twice."""

    def __init__(self, shared: Shared, setting: Setting, path: Path, is_swept: bool):
        self.shared, self.setting, self.path = shared, setting, path
        self.title = f"{shared.title} {setting.title}" if is_swept else shared.title
        self.tags: dict[str, Any] = setting._asdict() if is_swept else {}  # of log, checkpoints and saved state
        self.file = path / "metrics.json"
        found = dist.from_main(read_json(self.file) if self.file.is_file() else {})
        self.candidates: dict[str, dict[str, float]] = found.get("candidates", {})  # step -> figures, first seed range
        self.rungs: dict[str, dict[str, float]] = found.get("rungs", {})  # step -> figures on fewer images
        self.diverged: dict[str, Any] = found.get("diverged", {})  # at which step, and why
        self.reached = max(map(int, self.rungs), default=0)  # the step that training has come to
        self.is_scoring = False
        self.steps, self.candidates_at = shared.plan.steps, shared.plan.candidates_at

    def finish(self) -> None:
        """Trains to the end of the round and scores every candidate."""
        trained = max(map(int, self.rungs), default=0)
        for step in self.candidates_at:
            if step <= trained and str(step) not in self.candidates:  # kept unscored on the way to the last rung
                self._score(step, checkpoint.load(self.candidate_file(step), kind="model").tensors)
        if str(self.steps) not in self.candidates:
            self._train(self.steps, self._keep_and_score, wants_averages=False)

    def climb(self, step: int, images: int) -> None:
        """Trains to a rung and scores the averaged weights there; candidates on the way are kept, not scored."""
        if str(step) not in self.rungs:
            ema = self._train(step, self._keep)
            self.rungs[str(step)] = self._measure(step, ema, images)
            self._write()

    def give_up(self, error: NumericsError) -> None:
        """Records that the node diverged."""
        what, _, _ = str(error).partition(";")  # the rest is how to mend a run of this setting alone
        console.warn(f"{self.title} leaves the sweep: {what.removeprefix(f'{self.title}: ')}")
        self.diverged = {"step": self.reached, "reason": what}
        self._write()

    def drop(self) -> None:
        """Removes what only going on needs: the saved state, and candidates that nobody scored."""
        if dist.is_main():
            loop.drop_state(self.path / TRAIN_STATE)
            for step in self.candidates_at:
                if str(step) not in self.candidates:
                    for width in (None, *self.shared.recipe.finetune.ema_widths[1:]):
                        self.candidate_file(step, width).unlink(missing_ok=True)

    def candidate_file(self, step: int, width: float | None = None) -> Path:
        """Averaged weights after a step. width: of a further average; None: those that are scored."""
        return self.path / "checkpoints" / snapshot_name(step, width)

    def record(self) -> dict[str, Any]:
        """What a sweep's table tells of the node, JSON-ready."""
        key = self.shared.scoring.key
        outcome, stopped_at = "stopped", max(map(int, self.rungs), default=0)
        if str(self.steps) in self.candidates:
            outcome, stopped_at = "finished", self.steps
        if self.diverged:
            outcome, stopped_at = "diverged", self.diverged["step"]
        return {
            **self.setting._asdict(),
            "rungs": _by_step(self.rungs, key),
            "candidates": _by_step(self.candidates, key),
            "stopped_at": stopped_at,
            "outcome": outcome,
            **({"reason": self.diverged["reason"]} if self.diverged else {}),
        }

    def _train(
        self, until: int, evaluate: Callable[[int, dict[str, Tensor]], str], wants_averages: bool = True
    ) -> dict[str, Tensor]:
        """Continues to step `until` of the round; returns the averaged weights, if wanted."""
        shared, settings = self.shared, self.shared.recipe.finetune
        model = registry.load_model(shared.ref_file, shared.device, settings.draw).model
        loss = shared.make_loss(model, shared.ref, self.setting)

        def counted(wrapped: torch.nn.Module, rows: loop.Rows) -> loop.Loss:
            self.reached = rows.step + 1
            found: loop.Loss = loss(wrapped, rows)
            return found

        plan = loop.Plan(
            title=self.title,
            steps=self.steps,
            recipe=settings,
            loss=counted,
            state_file=self.path / TRAIN_STATE,
            log_file=shared.log_file,
            log_tags={"round": shared.number, **self.tags},
            last_good=self._last_good,
            evaluate_at=frozenset(self.candidates_at),
            evaluate=evaluate,
            keep=self._keep_further,
            check=self._check,
            derived=_figures,
            until=until,
            wants_averages=wants_averages,
            owner=" ".join(
                [f"round {shared.number} of {shared.ref_sha256}", *([self.setting.title] * bool(self.tags))]
            ),
        )
        return loop.fit(model, plan, shared.device)

    def _keep(self, step: int, ema: dict[str, Tensor]) -> str:
        self._write_candidate(step, ema, self.candidate_file(step), *self.shared.recipe.finetune.ema_widths[:1])
        return ""

    def _keep_further(self, step: int, width: float, ema: dict[str, Tensor]) -> None:
        self._write_candidate(step, ema, self.candidate_file(step, width), width)

    def _write_candidate(self, step: int, ema: dict[str, Tensor], file: Path, width: float | None = None) -> None:
        if dist.is_main():
            *older, link = self.shared.header["provenance"]
            header = {**self.shared.header, "provenance": [*older, {**link, **self.tags}], "step": step}
            if width is not None:  # a round begins anew: its averages know nothing of the images before
                header["ema"] = {"std": width, "images": step * self.shared.recipe.finetune.batch}
            checkpoint.save(file, ema, header)

    def _keep_and_score(self, step: int, ema: dict[str, Tensor]) -> str:
        if str(step) not in self.candidates:
            self._keep(step, ema)
            self._score(step, ema)
        key = self.shared.scoring.key
        return f"{key} {self.candidates[str(step)][key]:.4g} at step {step}"

    def _score(self, step: int, ema: dict[str, Tensor]) -> None:
        self.candidates[str(step)] = self._measure(step, ema)
        self._write()

    def _measure(self, step: int, ema: dict[str, Tensor], images: int | None = None) -> dict[str, float]:
        """The figures of averaged weights. Empties `ema`.

        Where weights are sharded it alone holds the whole averages: a score should not have them beside its own copy.
        """
        self.reached, self.is_scoring = max(self.reached, step), True
        self.shared.scratch.load_state_dict(ema)
        ema.clear()
        figures = self.shared.scoring.run(self.shared.scratch, 0, images=images)
        self.is_scoring = False
        return figures

    def _check(self, step: int, record: dict[str, float]) -> None:
        settings, ratio = self.shared.recipe.finetune, record["denoising_ratio"]
        if not ratio <= settings.max_denoising_ratio:  # NaN is refused too
            raise NumericsError(
                f"{self.title}: by step {step} the plain loss on real images has grown to {ratio:.3g} times the "
                f"reference's (finetune.max_denoising_ratio = {settings.max_denoising_ratio}), the model diverges; "
                f"the last good checkpoint is {self._last_good()}; lower finetune.lr = {settings.lr} or "
                f"finetune.beta = {self.setting.beta} and choose another --out"
            )

    def _last_good(self) -> str | Path:
        return max((self.path / "checkpoints").glob("step-*.safetensors"), default=self.shared.ref_file)

    def _write(self) -> None:
        if dist.is_main():
            known = {"rungs": self.rungs, "diverged": self.diverged}
            write_json(self.file, {"candidates": self.candidates, **{key: v for key, v in known.items() if v}})


def halve(nodes: Sequence[Node], plan: Plan) -> None:
    """Runs a sweep: at each rung the better nodes go on, and those of the last one are trained and scored in full.

    A rung is decided by scores that all lie on disk, so a killed run decides alike; then the losers' states go.
    Raises NumericsError if no node has come to a candidate because they diverge.
    """
    alive, key = list(nodes), nodes[0].shared.scoring.key
    for rung, following in itertools.pairwise(plan.rungs):
        for node in alive:
            _attempt(node, Node.climb, rung.step, plan.images)
        # Not those that have not diverged: a continued run decides again, and some have diverged since.
        alive = [node for node in alive if str(rung.step) in node.rungs]
        kept = survivors([node.rungs[str(rung.step)][key] for node in alive], following.num_nodes)
        alive = [alive[i] for i in kept]
        titles = ", ".join(node.setting.title for node in alive)
        console.info(f"{nodes[0].shared.title}: after step {rung.step} {len(alive)} of {len(nodes)} go on: {titles}")
        for node in nodes:
            if node not in alive:
                node.drop()
    for node in alive:
        _attempt(node, Node.finish)
    if not any(node.candidates for node in nodes):
        settings = nodes[0].shared.recipe.finetune
        reason = next(node.diverged["reason"] for node in nodes if node.diverged)
        raise NumericsError(
            f"{nodes[0].shared.title}: every node that the sweep kept diverges before its first candidate ({reason}); "
            f"lower finetune.lr = {settings.lr}, finetune.eval_every or beta, and choose another --out"
        )


def _attempt(node: Node, work: Callable[..., None], *args: int) -> None:
    """Calls work(node, *args), unless the node has diverged or now does."""
    if not node.diverged:
        try:
            work(node, *args)
        except NumericsError as error:
            if node.is_scoring and dist.world_size() > 1:
                raise  # found in one process's samples: the others wait for their sum
            node.give_up(error)


def _figures(means: dict[str, float]) -> dict[str, float]:
    """A line of the log, of the means over its rows."""
    spread = r_std(means["r_real"], means["r_fake"], means.pop("r_square"))
    return {**means, "r_std": spread, "denoising_ratio": (means["ref_loss"] - means["r_real"]) / means["ref_loss"]}


def _by_step(found: dict[str, dict[str, float]], key: str) -> list[dict[str, Any]]:
    return [{"step": step, "score": found[str(step)][key]} for step in sorted(map(int, found))]
