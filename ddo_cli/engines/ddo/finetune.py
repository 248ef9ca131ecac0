"""`ddo finetune-ddo`: rounds of Direct Discriminative Optimization by self-play (arXiv 2503.01103).

Round k: the reference draws a fake set to disk; a copy of it is trained to tell data from that set by its own
log-likelihood ratio; candidates are scored on a fixed schedule; the best one, if it beats the reference, is the
reference of round k + 1. Several values of alpha or beta are swept inside each round by successive halving. Every
stage leaves its result on disk, so a killed run continues where it was.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_enough, check_fits
from ddo_cli.data.items import identity as identity_of
from ddo_cli.engines import dry_run as dry_runs
from ddo_cli.engines import training_run
from ddo_cli.engines.ddo import reference, sweep
from ddo_cli.engines.ddo import report as finetune_report
from ddo_cli.engines.ddo.round import Round, copy_weights, path_of, weights_after
from ddo_cli.engines.ddo.trial import TRAIN_STATE, Trial, better_half, candidates_of
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import RecipeError, RunError
from ddo_cli.files import read_json, remove, sha256, write_json
from ddo_cli.generation import check_labels
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.metrics import published
from ddo_cli.models import registry
from ddo_cli.recipe.schema import Recipe, SamplingRecipe
from ddo_cli.training import loop
from ddo_cli.training.ema import snapshot_name
from ddo_cli.training.state import drop_state


def run(
    recipe: Recipe, out: Path, *, device: torch.device, dry_run: bool = False, measure: bool = True
) -> dict[str, Any]:
    """Finetunes recipe.model.ckpt in rounds; returns the object that `finetune-ddo --json` prints.

    The same call on an unfinished run continues it; on a finished one it returns the stored result.
    Raises NumericsError when the loss is not finite or the plain loss on data diverges.
    """
    registry.load_file(recipe.model.file)
    loaded = registry.load_model(recipe.model.ckpt, device, recipe.finetune.draw)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache, loaded.model.codec)
    check_fits(real, loaded.model, recipe.data.hflip, every_class=True)
    spec = _sampling(recipe, loaded)
    scoring = Scoring(recipe, real, spec, device)
    plans = _plans(recipe, loaded, scoring, real)
    identity = {
        "reference_sha256": loaded.checkpoint.sha256, **identity_of(real), **scoring.identity,
        **training_run.precision_of(recipe.finetune, spec, device),
    }  # fmt: skip
    rundir.RunDir(out).check("finetune-ddo", recipe, **identity)
    if dry_run:
        plan = _dry_run(recipe, out, loaded.model, plans[0])
        return plan | dry_runs.of_finetuning(recipe, loaded, plans, real, scoring) if measure else plan
    with training_run.claimed("finetune-ddo", recipe, out, identity, _needed) as (run_dir, state):
        _mend_weights(recipe, run_dir, state.get("rounds", []))
        if _is_over(recipe, state.get("rounds", [])) and run_dir.is_finished(state, run_dir.final):
            if dist.is_main() and finetune_report.is_behind(run_dir, state):
                finetune_report.write(run_dir, recipe, state, scoring.key)
            return _result(recipe, run_dir, state, scoring.key)
        if state.get("finished"):  # more rounds: those files that a run ends with are to be written again
            state = run_dir.advance(finished=False)
        if "reference" not in state:
            console.info(f"scoring the reference {recipe.model.ckpt}")
            scoring.picture(loaded.model, out / "reference.png")
            repeats = _repeats(scoring, loaded.model, out / "reference-scores.json", [])
            state = run_dir.advance(reference={"repeats": repeats, "score": _mean(repeats, scoring.key)}, rounds=[])
        console.info(f"reference: {scoring.key} {state['reference']['score']:.4g}")
        del loaded  # each round loads its own
        _drop_candidates(recipe, run_dir, state["rounds"])

        while not _is_over(recipe, state["rounds"]):
            number = len(state["rounds"]) + 1
            this = Round(number, recipe, plans[number - 1], run_dir, scoring, device)
            error = reference.check_precision(this.recipe, this.ref_file, real, number, device)
            this.draw_fakes()
            networks = this.networks(real, error)
            trials = [Trial(this, networks, setting) for setting in this.plan.settings]
            alive, reached = trials, 0
            for step, num_trials in this.plan.rungs:  # without a sweep one rung, the end of the round
                if reached:
                    alive = better_half(trials, alive, reached, num_trials)
                for trial in alive:
                    trial.train(step)
                reached = step
            record = _promote(this, trials, state)
            if error is not None:
                record["precision_error"] = error
            state = run_dir.advance(rounds=[*state["rounds"], record])
            _drop_candidates(recipe, run_dir, state["rounds"])
            del networks, trials, alive, trial  # the next round's models take their memory

        if dist.is_main():
            copy_weights(weights_after(recipe, run_dir, len(state["rounds"])), run_dir.final)
            finetune_report.write(run_dir, recipe, state, scoring.key)
        state = training_run.finish(run_dir)
        return _result(recipe, run_dir, state, scoring.key)


def _is_over(recipe: Recipe, rounds: list[dict[str, Any]]) -> bool:
    """Whether all rounds are done, or the last ones, under the settings of the next, led to no promotion."""
    settings, done = recipe.finetune, len(rounds)
    if done >= settings.rounds or settings.patience_rounds is None:
        return done >= settings.rounds
    last = range(done - settings.patience_rounds + 1, done + 1)
    if last.start < 1 or any(rounds[number - 1]["promoted"] for number in last):
        return False
    following = settings.of_round(done + 1)
    return all(settings.of_round(number) == following for number in last)


def _needed(run_dir: rundir.RunDir, state: dict[str, Any], name: str) -> str | None:
    """For `RunDir.inspect`. Of finished rounds their weights, which `_mend_weights` looks after; of the round that
    comes next its candidates and their scores.
    """
    here, path = path_of(run_dir, len(state.get("rounds", [])) + 1), run_dir.path / name
    if path.name in ("best.safetensors", "final.safetensors", *finetune_report.FILES):
        return ""
    if here not in path.parents:
        return "" if path.name == "reference-scores.json" and "reference" not in state else None
    is_read = path.name == "metrics.json" or path.parent.name == "checkpoints"
    if is_read and here.exists():  # to remove it is a user's way to begin the round again
        return f"restore it from a copy, or remove {here}, and the round begins again"
    return None if path.suffix == ".png" else ""


def _mend_weights(recipe: Recipe, run_dir: rundir.RunDir, rounds: list[dict[str, Any]]) -> None:
    """Copies weights of finished rounds again where they are damaged or missing, and what they are copies of is not.

    Raises RunError if the next round, or the result, needs some that cannot be mended.
    """
    if not dist.is_main():
        return
    for record in rounds:
        best = path_of(run_dir, record["round"]) / "best.safetensors"
        problem = run_dir.ledger.problem(best) if best.is_file() else "is missing"
        if problem is None:
            continue
        source = weights_after(recipe, run_dir, record["round"] - 1)
        if record["promoted"]:
            source = _best_candidate(recipe, run_dir, record)
        if run_dir.ledger.is_good(checkpoint.resolve(source)):
            copy_weights(source, best)
            console.info(f"{best} is copied again from {source}")
        elif record is rounds[-1]:
            raise RunError(f"{best} {problem}, and so is {source}; restore one of them from a copy")


def _promote(this: Round, trials: list[Trial], state: dict[str, Any]) -> dict[str, Any]:
    """Scores the best candidate on the further seed ranges and makes it the reference if it is better.

    Returns the round's record: candidates, the best one's figures, and whether it was promoted.
    """
    before = state["rounds"][-1] if state["rounds"] else state["reference"]
    key, scoring = this.scoring.key, this.scoring
    trial, step = min(candidates_of(trials), key=lambda pair: sweep.rank(pair[0].candidates[str(pair[1])][key]))
    file = trial.candidate_file(step)
    candidate = registry.load_model(file, this.device)
    repeats = _repeats(scoring, candidate.model, this.path / "best-scores.json", [trial.candidates[str(step)]])
    score = _mean(repeats, key)
    promoted = score < before["score"]
    if dist.is_main():
        copy_weights(file if promoted else this.ref_file, this.path / "best.safetensors")
        scoring.picture(candidate.model, this.path / "grid.png")
    kept = "promoted" if promoted else f"NOT better than the reference ({before['score']:.4g}), which is kept"
    images = step * this.recipe.finetune.batch
    console.info(f"{trial.title}: {key} {score:.4g} after {images} images, {kept}")
    record = {
        "round": this.number,
        "score": score if promoted else before["score"],
        "best_images": images,
        "promoted": promoted,
        "candidate_score": score,
        "repeats": repeats if promoted else before["repeats"],
        "candidates": trial.candidates,
    }
    if this.plan.is_sweep:
        nodes = [each.record() for each in trials]
        spent, full = sweep.cost(nodes, this.plan.candidates_at, this.plan.costs)
        record |= {**trial.setting._asdict(), "nodes": nodes, "cost": spent, "full_cost": full}
        console.show(console.table(*finetune_report.sweep_table(record, this.recipe, key)))
    if this.recipe.finetune.patience is not None:
        record |= {"trained_images": trial.last_step * this.recipe.finetune.batch, "ended_early": trial.is_early}
    if dist.is_main():  # optimizer state does not cross rounds, and every candidate has its score on disk
        for place in (this.path, *this.path.glob("nodes/*")):
            drop_state(place / TRAIN_STATE)
    return record


def _sampling(recipe: Recipe, reference: registry.Loaded) -> SamplingRecipe:
    """The recipe's sampling; what it does not set is the reference's."""
    given = {key: getattr(recipe.sampling, key) for key in recipe.sampling.model_fields_set}
    spec = sample.spec_of(reference.checkpoint, **given)
    reference.model.check_sampling(spec)
    return spec


def _plans(recipe: Recipe, reference: registry.Loaded, scoring: Scoring, real: ItemSet) -> list[sweep.Plan]:
    """The plan of each round. Raises RecipeError, DataError or UsageError if one of them cannot be run."""
    config, plans = reference.checkpoint.header["config"], []
    for number in range(1, recipe.finetune.rounds + 1):
        settings = recipe.finetune.of_round(number)
        draw = {**config["draw"], **settings.draw}
        place = f"round {number}: finetune.draw"
        if problems := registry.problems(config["name"], config["options"], draw, place):
            raise RecipeError("\n".join(problems))
        sample.kept_of_fakes(reference.model, settings.fake_as, scoring.spec)
        check_labels(scoring.spec, reference.model.num_classes, settings.num_fake)
        loop.check(reference.model, settings)
        for name, num in ((real.name, len(real.items)), ("a fake set (finetune.num_fake)", settings.num_fake)):
            check_enough(name, num, settings.batch, "finetune.batch")
        plans.append(sweep.plan_of(recipe.of_round(number), partial(scoring.passes, reference.model)))
    return plans


def _drop_candidates(recipe: Recipe, run_dir: rundir.RunDir, rounds: list[dict[str, Any]]) -> None:
    """With finetune.keep_candidates = best: of finished rounds, since a killed round may promote again.

    All averages of the best step stay.
    """
    if recipe.finetune.keep_candidates == "all" or not dist.is_main():
        return
    for record in rounds:
        settings = recipe.finetune.of_round(record["round"])
        kept = {_best_candidate(recipe, run_dir, record, width) for width in (None, *settings.ema_widths[1:])}
        for file in path_of(run_dir, record["round"]).rglob("checkpoints/step-*.safetensors"):
            if file not in kept:
                remove(file)


def _best_candidate(recipe: Recipe, run_dir: rundir.RunDir, record: dict[str, Any], width: float | None = None) -> Path:
    """The best candidate's file of a finished round. width: of a further average."""
    path = path_of(run_dir, record["round"])
    if "nodes" in record:
        path = path / "nodes" / sweep.Setting(record["alpha"], record["beta"]).directory
    step = record["best_images"] // recipe.finetune.of_round(record["round"]).batch
    return path / "checkpoints" / snapshot_name(step, width)


def _repeats(
    scoring: Scoring, model: LikelihoodModel, file: Path, known: list[dict[str, float]]
) -> list[dict[str, float]]:
    """Figures of every range of sampling seeds; each is kept in `file`, since a large score takes hours."""
    rundir.remove_damaged(file, "the scores are taken again")
    scores = dist.from_main(read_json(file, list) if file.is_file() else known)
    for repeat in range(len(scores), scoring.repeats):
        scores = [*scores, scoring.run(model, repeat)]
        if dist.is_main():
            write_json(file, scores)
    return scores


def _mean(repeats: list[dict[str, float]], key: str) -> float:
    return sum(figures[key] for figures in repeats) / len(repeats)


def _result(recipe: Recipe, run_dir: rundir.RunDir, state: dict[str, Any], key: str) -> dict[str, Any]:
    rounds = state["rounds"]
    if not any(record["promoted"] for record in rounds):
        console.warn(f"no round improved on the reference: {run_dir.final} is the reference {recipe.model.ckpt} itself")
    if ending := finetune_report.ending(recipe, rounds):
        console.info(ending)
    kept = ("round", "score", "best_images", "promoted")
    swept = ("alpha", "beta", "nodes")
    fraction, benchmark = sweep.fraction_spent(rounds), recipe.metric.benchmark
    return {
        "out": str(run_dir.path),
        "final": str(run_dir.final),
        "metric": key,
        "metric_images": None if recipe.metric.name == "js" else recipe.metric.num_images,  # js is of a density
        "precision": state["precision"],
        "reference_score": state["reference"]["score"],
        "final_score": rounds[-1]["score"],
        **({"ended_early": True} if ending else {}),
        **({} if fraction is None else {"sweep_cost": fraction}),
        **({} if benchmark is None else {"published": [row._asdict() for row in published.rows(benchmark, key)]}),
        "rounds": [
            {
                **{name: record[name] for name in (*kept, *(swept if "nodes" in record else ()))},
                "checkpoint": str(weights_after(recipe, run_dir, record["round"])),
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
        **finetune_report.early_stop(settings),
        **finetune_report.settings_by_round(recipe),
    }
