"""`ddo finetune-ddo`: rounds of Direct Discriminative Optimization by self-play (arXiv 2503.01103).

Round k: the reference draws a fake set to disk; a copy of it is trained to tell data from that set by its own
log-likelihood ratio; candidates are scored on a fixed schedule; the best one, if it beats the reference, is the
reference of round k + 1. Several values of alpha or beta are swept inside each round by successive halving. Every
stage leaves its result on disk, so a killed run continues where it was.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_fits, digest
from ddo_cli.data.pairs import Pairs, Shuffled
from ddo_cli.data.samples import open_samples
from ddo_cli.engines import estimate
from ddo_cli.engines.ddo import reference, sweep
from ddo_cli.engines.ddo import report as finetune_report
from ddo_cli.engines.ddo.node import TRAIN_STATE, MakeLoss, Node, Shared, halve
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import RecipeError
from ddo_cli.files import read_json, replacing, sha256, write_json
from ddo_cli.likelihood import LikelihoodModel, check_labels, map_draw, repeat_draw
from ddo_cli.metrics import published
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import ddo_loss
from ddo_cli.precision import set_training_precision
from ddo_cli.recipe.schema import Recipe, SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.training import loop
from ddo_cli.training.ema import snapshot_name

FIRST_FAKE_SEED = 1_000_000  # beyond the seeds of scores


def run(recipe: Recipe, out: Path, *, device: torch.device, dry_run: bool = False) -> dict[str, Any]:
    """Finetunes recipe.model.ckpt in rounds and returns what layout promises of `finetune-ddo --json`.

    The same call on an unfinished run continues it; on a finished one it returns the stored result.
    Raises NumericsError when the loss is not finite or the plain loss on data diverges.
    """
    registry.load_file(recipe.model.file)
    reference = registry.load_model(recipe.model.ckpt, device, recipe.finetune.draw)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache)
    check_fits(real, reference.model, recipe.data.hflip)
    spec = _sampling(recipe, reference)
    scoring = Scoring(recipe, real, spec, device)
    plans = _plans(recipe, reference, scoring)
    identity = {"reference_sha256": reference.checkpoint.sha256, "data_sha256": digest(real), **scoring.identity}
    rundir.RunDir(out).check("finetune-ddo", recipe, **identity)
    if dry_run:
        expected = estimate.of_finetuning(recipe, reference, plans, real, scoring)
        return {**_dry_run(recipe, out, reference.model, plans[0]), "estimate": expected}
    set_training_precision(recipe.finetune.precision)
    with rundir.locked(out) as run_dir:
        state = run_dir.claim("finetune-ddo", recipe, **identity)
        if run_dir.is_finished(state):
            return _result(recipe, run_dir, state, scoring.key)
        if "reference" not in state:
            console.info(f"scoring the reference {recipe.model.ckpt}")
            scoring.picture(reference.model, out / "reference.png")
            repeats = _repeats(scoring, reference.model, out / "reference-scores.json", [])
            state = run_dir.advance(reference={"repeats": repeats, "score": _mean(repeats, scoring.key)}, rounds=[])
        console.info(f"reference: {scoring.key} {state['reference']['score']:.4g}")
        del reference  # each round loads its own
        _drop_candidates(recipe, run_dir, state["rounds"])
        for number in range(len(state["rounds"]) + 1, recipe.finetune.rounds + 1):
            this_round = _Round(number, recipe, run_dir, real, spec, scoring, plans[number - 1], device)
            state = run_dir.advance(rounds=[*state["rounds"], this_round.run(state)])
            _drop_candidates(recipe, run_dir, state["rounds"])
        if dist.is_main():
            _copy(_reference_file(recipe, run_dir, len(state["rounds"])), run_dir.final)
            finetune_report.write(run_dir, recipe, state, scoring.key)
        state = run_dir.advance(finished=True)
        return _result(recipe, run_dir, state, scoring.key)


class _Round:
    """One round: fake set, training, selection."""

    def __init__(
        self,
        number: int,
        recipe: Recipe,
        run_dir: rundir.RunDir,
        real: ItemSet,
        spec: SamplingRecipe,
        scoring: Scoring,
        plan: sweep.Plan,
        device: torch.device,
    ):
        self.whole, self.recipe = recipe, recipe.of_round(number)
        self.number, self.run_dir, self.real = number, run_dir, real
        self.spec, self.scoring, self.plan, self.device = spec, scoring, plan, device
        self.path = _round_path(run_dir, number)
        self.title = f"round {number}/{recipe.finetune.rounds}"

    def run(self, state: dict[str, Any]) -> dict[str, Any]:
        """The round's record: candidates, the best one's figures, and whether it was promoted."""
        ref_file = _reference_file(self.recipe, self.run_dir, self.number - 1)
        before = state["rounds"][-1] if state["rounds"] else state["reference"]
        error = reference.check_precision(self.recipe, ref_file, self.real, self.number, self.device)
        self._draw_fake_set(ref_file)
        nodes = self._train(ref_file)
        record = self._promote(ref_file, nodes, before) | ({} if error is None else {"reference_error": error})
        self._drop_train_state()
        if self.plan.is_sweep:
            console.show(console.table(*finetune_report.sweep_table(record, self.recipe, self.scoring.key)))
        return record

    def _draw_fake_set(self, ref_file: str | Path) -> None:
        before = sum(self.whole.finetune.of_round(number).num_fake for number in range(1, self.number))
        first = FIRST_FAKE_SEED + before  # rounds do not overlap
        seeds = range(first, first + self.recipe.finetune.num_fake)
        sampling = self.spec.model_dump()
        reference = registry.load_model(ref_file, self.device)
        sample.run(
            reference, seeds, self.path / "samples", form="shards", sampling=sampling,
            keep=sample.kept_of_fakes(reference.model, self.recipe.finetune.fake_as, self.spec),
            device=self.device, title=f"{self.title} fake set",
        )  # fmt: skip

    def _train(self, ref_file: str | Path) -> list[Node]:
        """Trains every setting, or as far as the sweep takes it, and scores its candidates."""
        draw = self.recipe.finetune.draw
        ref = reference.load(ref_file, self.recipe.finetune, self.device)
        shared = Shared(
            number=self.number,
            title=self.title,
            recipe=self.recipe,
            plan=self.plan,
            ref_file=ref_file,
            ref=ref.model,
            ref_sha256=ref.checkpoint.sha256,
            scratch=registry.load_model(ref_file, self.device, draw).model,
            header=self._header(ref.checkpoint),
            make_loss=self._make_loss(),
            scoring=self.scoring,
            log_file=self.run_dir.log_file,
            device=self.device,
        )
        if not self.plan.is_sweep:
            node = Node(shared, self.plan.settings[0], self.path, is_swept=False)
            node.finish()
            return [node]
        places = [(setting, self.path / "nodes" / setting.directory) for setting in self.plan.settings]
        nodes = [Node(shared, setting, path, is_swept=True) for setting, path in places]
        halve(nodes, self.plan)
        return nodes

    def _make_loss(self) -> MakeLoss:
        """What makes the loss of a node. Data order and draws are the same for all: a paired comparison."""
        settings, seed = self.recipe.finetune, self.recipe.seed
        fake = open_samples(self.path / "samples")
        hflip = self.recipe.data.hflip
        pairs = Pairs(
            Shuffled(self.real.items, self.real.labels, "real", seed, self.number, hflip=hflip),
            Shuffled(fake.items, fake.labels, "fake", seed, self.number),
        )

        def make(model: LikelihoodModel, ref: LikelihoodModel, setting: sweep.Setting) -> Any:
            def loss(wrapped: nn.Module, rows: loop.Rows) -> loop.Loss:
                base = rows.step * settings.batch
                real, fake = pairs.rows(base + rows.start, base + rows.stop)
                n = len(real.items)
                rng = RowRng.for_rows("encode", seed, self.number, rows.step, rows=range(rows.start, rows.stop))
                x = torch.cat([model.encode(side.items.to(self.device), rng) for side in (real, fake)])  # (2n, ...)
                label = torch.cat([real.label, fake.label]).to(self.device)
                rng = RowRng.for_rows("ddo", seed, self.number, rows.step, rows=range(rows.start, rows.stop))
                half = map_draw(lambda tensor: tensor.to(self.device), model.draw(n, rng))
                draw = repeat_draw(half, 2)  # one draw for real and fake, model and reference
                with torch.no_grad():
                    ref_prediction = ref.predict(x, label, draw)
                r = wrapped(x, label, draw, ref_prediction)  # (2n,)
                ddo = ddo_loss(
                    r[:n], r[n:], setting.alpha, setting.beta,
                    fake_weight=1 - half.drop.to(r.dtype), divide_by_alpha=settings.divide_by_alpha,
                )  # fmt: skip
                ref_loss = -ref.log_lik(ref_prediction[:n], x[:n], half).mean()
                # log_lik of the model on data is the reference's plus r, so no further pass is needed.
                log = {**ddo._asdict(), "ref_loss": ref_loss}
                return loop.Loss(log.pop("loss"), log)

            return loss

        return make

    def _promote(self, ref_file: str | Path, nodes: list[Node], before: dict[str, Any]) -> dict[str, Any]:
        """Scores the best candidate on the further seed ranges and makes it the reference if it is better."""
        key = self.scoring.key
        found = [(node, step) for node in nodes for step in sorted(map(int, node.candidates))]
        node, step = min(found, key=lambda pair: sweep.rank(pair[0].candidates[str(pair[1])][key]))
        first, file = node.candidates[str(step)], node.candidate_file(step)
        candidate = registry.load_model(file, self.device)
        repeats = _repeats(self.scoring, candidate.model, self.path / "best-scores.json", [first])
        score = _mean(repeats, key)
        promoted = score < before["score"]
        best = self.path / "best.safetensors"
        if dist.is_main():
            _copy(file if promoted else ref_file, best)
            self.scoring.picture(candidate.model, self.path / "grid.png")
        kept = "promoted" if promoted else f"NOT better than the reference ({before['score']:.4g}), which is kept"
        images = step * self.recipe.finetune.batch
        console.info(f"{node.title}: {key} {score:.4g} after {images} images, {kept}")
        return {
            "round": self.number,
            "score": score if promoted else before["score"],
            "best_images": images,
            "promoted": promoted,
            "candidate_score": score,
            "repeats": repeats if promoted else before["repeats"],
            "candidates": node.candidates,
            **(self._sweep_record(nodes, node) if self.plan.is_sweep else {}),
        }

    def _sweep_record(self, nodes: list[Node], best: Node) -> dict[str, Any]:
        """The best node's setting, every node's course, and what they cost."""
        records = [node.record() for node in nodes]
        spent, full = sweep.cost(records, self.plan.candidates_at, self.plan.costs)
        return {**best.setting._asdict(), "nodes": records, "cost": spent, "full_cost": full}

    def _drop_train_state(self) -> None:
        """Removes what only resuming needed: optimizer state does not cross rounds.

        Every candidate has its score on disk, so a run killed before the round's record is written trains no more.
        """
        if dist.is_main():
            for place in [self.path, *self.path.glob("nodes/*")]:
                loop.drop_state(place / TRAIN_STATE)

    def _header(self, ref: checkpoint.Checkpoint) -> dict[str, Any]:
        """Header of this round's checkpoints: the reference's configuration and a longer chain of provenance."""
        link = {
            "command": "finetune-ddo",
            "round": self.number,
            "reference_sha256": ref.sha256,
            "recipe": self.whole.model_dump(mode="json"),
        }
        return {
            "kind": "model",
            "config": ref.header["config"],
            "sampling": self.spec.model_dump(mode="json", exclude_none=True),
            "provenance": [*ref.header.get("provenance", []), link],
        }


def _sampling(recipe: Recipe, reference: registry.Loaded) -> SamplingRecipe:
    """The recipe's sampling, where it leaves something open the reference's own."""
    given = {key: getattr(recipe.sampling, key) for key in recipe.sampling.model_fields_set}
    spec = sample.spec_of(reference.checkpoint, **given)
    reference.model.check_sampling(spec)
    return spec


def _plans(recipe: Recipe, reference: registry.Loaded, scoring: Scoring) -> list[sweep.Plan]:
    """What each round does. Raises RecipeError or UsageError where one of them could not be run."""
    config, plans = reference.checkpoint.header["config"], []
    for number in range(1, recipe.finetune.rounds + 1):
        settings = recipe.finetune.of_round(number)
        draw = {**config["draw"], **settings.draw}
        place = f"round {number}: finetune.draw"
        if found := registry.problems(config["name"], config["options"], draw, place):
            raise RecipeError("\n".join(found))
        sample.kept_of_fakes(reference.model, settings.fake_as, scoring.spec)
        check_labels(scoring.spec, reference.model.num_classes, settings.num_fake)
        loop.check(reference.model, settings)
        plans.append(sweep.plan_of(recipe.of_round(number), partial(scoring.passes, reference.model)))
    return plans


def _reference_file(recipe: Recipe, run_dir: rundir.RunDir, rounds_done: int) -> str | Path:
    """The weights that the next round starts from."""
    return _round_path(run_dir, rounds_done) / "best.safetensors" if rounds_done else recipe.model.ckpt


def _round_path(run_dir: rundir.RunDir, number: int) -> Path:
    return run_dir.path / f"round-{number:02d}"


def _drop_candidates(recipe: Recipe, run_dir: rundir.RunDir, rounds: list[dict[str, Any]]) -> None:
    """Of finished rounds, and only there: a killed run may promote again. All averages of the best step stay."""
    if recipe.finetune.keep_candidates == "all" or not dist.is_main():
        return
    for record in rounds:
        path, settings = _round_path(run_dir, record["round"]), recipe.finetune.of_round(record["round"])
        best = path
        if "nodes" in record:
            best = path / "nodes" / sweep.Setting(record["alpha"], record["beta"]).directory
        step = record["best_images"] // settings.batch
        kept = {best / "checkpoints" / snapshot_name(step, width) for width in (None, *settings.ema_widths[1:])}
        for file in path.rglob("checkpoints/step-*.safetensors"):
            if file not in kept:
                file.unlink()


def _copy(source: str | Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(checkpoint.resolve(source), temporary)


def _repeats(
    scoring: Scoring, model: LikelihoodModel, file: Path, known: list[dict[str, float]]
) -> list[dict[str, float]]:
    """Figures of every range of sampling seeds; each is kept in `file`, since a large score takes hours."""
    found = dist.from_main(read_json(file, list) if file.is_file() else known)
    for repeat in range(len(found), scoring.repeats):
        found = [*found, scoring.run(model, repeat)]
        if dist.is_main():
            write_json(file, found)
    return found


def _mean(repeats: list[dict[str, float]], key: str) -> float:
    return sum(figures[key] for figures in repeats) / len(repeats)


def _result(recipe: Recipe, run_dir: rundir.RunDir, state: dict[str, Any], key: str) -> dict[str, Any]:
    rounds = state["rounds"]
    if not any(record["promoted"] for record in rounds):
        console.warn(f"no round improved on the reference: {run_dir.final} is the reference {recipe.model.ckpt} itself")
    kept = ("round", "score", "best_images", "promoted")
    swept = ("alpha", "beta", "nodes")
    fraction, benchmark = sweep.fraction_spent(rounds), recipe.metric.benchmark
    return {
        "out": str(run_dir.path),
        "final": str(run_dir.final),
        "metric": key,
        "metric_images": None if recipe.metric.name == "js" else recipe.metric.num_images,  # js is of a density
        "reference_score": state["reference"]["score"],
        "final_score": rounds[-1]["score"],
        **({} if fraction is None else {"sweep_cost": fraction}),
        **({} if benchmark is None else {"published": [one._asdict() for one in published.rows(benchmark, key)]}),
        "rounds": [
            {
                **{name: record[name] for name in (*kept, *(swept if "nodes" in record else ()))},
                "checkpoint": str(_reference_file(recipe, run_dir, record["round"])),
            }
            for record in rounds
        ],
    }


def _dry_run(recipe: Recipe, out: Path, model: LikelihoodModel, plan: sweep.Plan) -> dict[str, Any]:
    settings = recipe.finetune
    return {
        "out": str(out),
        "dry_run": True,
        "reference": recipe.model.ckpt,
        "reference_sha256": sha256(checkpoint.resolve(recipe.model.ckpt)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": settings.rounds,
        "steps_per_round": plan.steps,
        "pairs_per_step": settings.batch,
        "fake_images_per_round": settings.num_fake,
        "network_rows_per_step": {
            "model_forward_backward": 2 * settings.batch,
            "reference_forward": 2 * settings.batch,
        },
        **(plan.forecast() if plan.is_sweep else {}),
        **finetune_report.settings_by_round(recipe),
    }
