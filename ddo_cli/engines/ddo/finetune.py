"""`ddo finetune-ddo`: rounds of Direct Discriminative Optimization by self-play (arXiv 2503.01103), or of a relative.

Round k: the reference draws a fake set to disk; a copy of it is trained to tell data from that set by its own
log-likelihood ratio; candidates are scored on a fixed schedule; the best one, if it beats the reference, is the
reference of round k + 1. Several values of alpha or beta are swept inside each round by successive halving. A control,
where it is asked for, goes through rounds of its own afterwards, trained by maximum likelihood. Every stage leaves its
result on disk, so a killed run continues where it was.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_enough, check_fits, digest
from ddo_cli.data.items import identity as identity_of
from ddo_cli.engines import dry_run as dry_runs
from ddo_cli.engines import pages, training_run
from ddo_cli.engines.ddo import auto, promotion, reference, sweep
from ddo_cli.engines.ddo import report as finetune_report
from ddo_cli.engines.ddo.page import page
from ddo_cli.engines.ddo.rejected import open_rejected
from ddo_cli.engines.ddo.round import FIRST_FAKE_SEED, Chain, Networks, Round, copy_weights
from ddo_cli.engines.ddo.trial import Trial, better_half
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.engines.watch import Watch
from ddo_cli.errors import RecipeError, UsageError
from ddo_cli.files import sha256
from ddo_cli.generation import check_labels
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.metrics import published
from ddo_cli.models import registry
from ddo_cli.recipe.schema import Recipe, SamplingRecipe
from ddo_cli.training import loop


def run(
    recipe: Recipe,
    out: Path,
    *,
    device: torch.device,
    dry_run: bool = False,
    measure: bool = True,
    log_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Finetunes recipe.model.ckpt in rounds; returns the object that `finetune-ddo --json` prints.

    The same call on an unfinished run continues it; on a finished one it returns the stored result.
    Raises NumericsError when the loss is not finite or the plain loss on data diverges.
    """
    registry.load_file(recipe.model.file)
    if (ckpt := registry.file_of(recipe.model.ckpt)) != recipe.model.ckpt:  # of a pipeline's folder
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"ckpt": ckpt})})
    loaded = reference.start_of(recipe, ckpt, device)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache, loaded.model.codec)
    loaded = reference.told(loaded, real)
    check_fits(real, loaded.model, recipe.data.hflip, every_class=True)
    spec = _sampling(recipe, loaded)
    _check_objective(recipe, loaded.model)
    rejected = None if recipe.data.rejected is None else open_rejected(recipe, real, loaded.model)
    scoring = Scoring(recipe, real, spec, device)
    plans = _plans(recipe, loaded, scoring, real)
    identity = {
        "reference_sha256": loaded.checkpoint.sha256, **identity_of(real), **scoring.identity,
        **({} if rejected is None else {"rejected_sha256": digest(rejected)}),
        **training_run.precision_of(recipe.finetune, spec, device),
    }  # fmt: skip
    run_dir = rundir.RunDir(out)
    run_dir.check("finetune-ddo", recipe, **identity)
    if dry_run:
        plan = _dry_run(recipe, out, loaded.model, plans[0])
        return plan | dry_runs.of_finetuning(recipe, loaded, plans, real, rejected, scoring) if measure else plan
    watch = Watch(run_dir, recipe, page, log_to)
    chains = [Chain("rounds", recipe, plans, run_dir, scoring, device, watch)]
    if recipe.finetune.control:
        chains.append(Chain("control", recipe, [plan.of_control() for plan in plans], run_dir, scoring, device, watch))
    with training_run.claimed("finetune-ddo", recipe, out, identity, partial(_needed, chains)) as (_, state), watch:
        for chain in chains:
            promotion.mend_weights(chain, chain.records(state))
        is_done, finals = all(_is_done(chain, state) for chain in chains), [chain.final for chain in chains]
        if is_done and run_dir.is_finished(state, *finals):
            if dist.is_main() and pages.is_behind(run_dir, state):
                watch.finish(state)
            return _result(recipe, chains[0], state)
        if state.get("finished"):  # more rounds, or a control: those files that a run ends with are to be written again
            state = run_dir.advance(finished=False)
        if "reference" not in state:
            console.info(f"scoring the reference {recipe.model.ckpt}")
            scoring.picture(loaded.model, out / "reference.png")
            record = promotion.record_of_start(scoring, loaded.model, out / "reference-scores.json")
            state = run_dir.advance(metric=scoring.key, reference=record, rounds=[])
        watch.measured("round", {scoring.key: state["reference"]["score"]}, 0, out / "reference.png")
        console.info(f"reference: {scoring.key} {state['reference']['score']:.4g}")
        del loaded  # each round loads its own
        for chain in chains:
            state = _train(chain, real, rejected, state)
        watch.finish(state)
        state = training_run.finish(run_dir)
        return _result(recipe, chains[0], state)


def _is_done(chain: Chain, state: dict[str, Any]) -> bool:
    """Whether nothing is left to train. A control goes through as many rounds as DDO did, promoted or not."""
    records = chain.records(state)
    return len(records) >= len(state.get("rounds", [])) if chain.is_control else _is_over(chain.recipe, records)


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


def _train(chain: Chain, real: ItemSet, rejected: ItemSet | None, state: dict[str, Any]) -> dict[str, Any]:
    """Goes through the rounds of a chain that are left; returns the state of the run."""
    records = chain.records(state)
    if dist.is_main():
        chain.path.mkdir(exist_ok=True)
    promotion.drop_candidates(chain, records)
    while not _is_done(chain, state):
        this = Round(len(records) + 1, chain)
        networks = this.networks(real, rejected)
        trials = auto.search(this, networks, records) if this.plan.is_auto else _swept(this, networks)
        record = promotion.promote(this, trials, records[-1] if records else state["reference"])
        if networks.precision_error is not None:
            record["precision_error"] = networks.precision_error
        records = [*records, record]
        state = chain.run_dir.advance(**{chain.name: records})
        _tell(this, record)
        promotion.drop_candidates(chain, records)
        del networks, trials  # the next round's models take their memory
    if dist.is_main():
        copy_weights(chain.weights_after(len(records)), chain.final)
    return state


def _tell(this: Round, record: dict[str, Any]) -> None:
    """Sends what a round has come to, and writes the page."""
    chain = this.chain
    images = this.images_before + record.get("trained_images", this.plan.steps * this.recipe.finetune.batch)
    figures = {chain.scoring.key: record["score"], "promoted": float(record["promoted"])}
    chain.watch.measured("control/round" if chain.is_control else "round", figures, images, this.path / "grid.png")
    chain.watch.refresh()


def _swept(this: Round, networks: Networks) -> list[Trial]:
    """Every setting of the plan, trained as far as its rungs let it; without a sweep one, to the end."""
    trials = [Trial(this, networks, setting) for setting in this.plan.settings]
    alive, reached = trials, 0
    for step, num_trials in this.plan.rungs:
        if reached:
            alive = better_half(trials, alive, reached, num_trials)
        for trial in alive:
            trial.train(step)
        reached = step
    return trials


def _needed(chains: Sequence[Chain], run_dir: rundir.RunDir, state: dict[str, Any], name: str) -> str | None:
    """For `RunDir.inspect`. Of finished rounds their weights, which `mend_weights` looks after; of the round that comes
    next its candidates and their scores.
    """
    path = run_dir.path / name
    if path.name in ("best.safetensors", "final.safetensors", pages.FILE):
        return ""
    here = next((place for chain in chains if (place := chain.next_path(state)) in path.parents), None)
    if here is None:
        return "" if path.name == "reference-scores.json" and "reference" not in state else None
    is_read = path.name == "metrics.json" or path.parent.name == "checkpoints"
    if is_read and here.exists():  # to remove it is a user's way to begin the round again
        return f"restore it from a copy, or remove {here}, and the round begins again"
    return None if path.suffix == ".png" else ""


def _sampling(recipe: Recipe, start: registry.Loaded) -> SamplingRecipe:
    """The recipe's sampling; what it does not set is the reference's."""
    given = {key: getattr(recipe.sampling, key) for key in recipe.sampling.model_fields_set}
    spec = sample.spec_of(start.checkpoint, **given)
    start.model.check_sampling(spec)
    return spec


def _check_objective(recipe: Recipe, model: LikelihoodModel) -> None:
    """Says which keys that are set the objective does not read. Raises UsageError for a model that it does not fit."""
    settings = recipe.finetune
    if settings.objective == "cca" and model.num_classes < 2:
        kind = "has one class" if model.num_classes else "is unconditional"
        raise UsageError(
            f"finetune.objective = cca compares images under right and wrong labels, and {recipe.model.ckpt} {kind}; "
            "use ddo or spin, or a model of several classes"
        )
    if settings.objective == "spin" and settings.num_fake < model.num_classes:
        raise UsageError(
            f"finetune.objective = spin compares images of one class, and finetune.num_fake = {settings.num_fake} is "
            f"less than the model's {model.num_classes} classes; raise it"
        )
    if unread := [name for name in settings.unread if name in settings.model_fields_set]:
        names = ", ".join(f"finetune.{name} = {getattr(settings, name)}" for name in unread)
        console.info(f"not read by finetune.objective = {settings.objective}: {names}")


def _plans(recipe: Recipe, start: registry.Loaded, scoring: Scoring, real: ItemSet) -> list[sweep.Plan]:
    """The plan of each round. Raises RecipeError, DataError or UsageError if one of them cannot be run."""
    config, plans = start.checkpoint.header["config"], []
    for number in range(1, recipe.finetune.rounds + 1):
        settings = recipe.finetune.of_round(number)
        draw = {**config["draw"], **settings.draw}
        place = f"round {number}: finetune.draw"
        if problems := registry.problems(config["name"], config["options"], draw, place):
            raise RecipeError("\n".join(problems))
        loop.check(start.model, settings)
        check_enough(real.name, len(real.items), settings.batch, "finetune.batch")
        if settings.num_drawn:
            sample.kept_of_fakes(start.model, settings.fake_as, scoring.spec)
            check_labels(scoring.spec, start.model.num_classes, settings.num_fake)
            check_enough("a fake set (finetune.num_fake)", settings.num_fake, settings.batch, "finetune.batch")
        if settings.margin and scoring.density is None and scoring.repeats == 1:
            raise UsageError(
                f"finetune.margin = {settings.margin:g} counts standard errors, which one range of seeds does not "
                "tell; set metric.repeats to 2 or more, or leave the margin out"
            )
        plans.append(sweep.plan_of(recipe.of_round(number), partial(scoring.passes, start.model)))
    last = (scoring.table_ranges.stop * recipe.metric.num_images) - 1
    if scoring.density is None and last >= FIRST_FAKE_SEED:
        raise UsageError(
            f"metric.num_images = {recipe.metric.num_images} and metric.repeats = {scoring.repeats} take seeds up to "
            f"{last}, and those of fake sets begin at {FIRST_FAKE_SEED}; lower one of them"
        )
    return plans


def _result(recipe: Recipe, chain: Chain, state: dict[str, Any]) -> dict[str, Any]:
    """chain: DDO's. A control is told of where there is one."""
    rounds, key, control = state["rounds"], chain.scoring.key, chain._replace(name="control")
    if not any(record["promoted"] for record in rounds):
        console.warn(f"no round improved on the reference: {chain.final} is the reference {recipe.model.ckpt} itself")
    if ending := finetune_report.ending(recipe, rounds):
        console.info(ending)
    fraction, benchmark = sweep.fraction_spent(rounds), recipe.metric.benchmark
    twin = control.records(state)
    of_control = {} if not twin else {
        "final": str(control.final), "final_score": twin[-1]["score"], "rounds": _rounds(control, state)
    }  # fmt: skip
    return {
        "out": str(chain.run_dir.path),
        "final": str(chain.final),
        "metric": key,
        "metric_images": None if recipe.metric.name == "js" else recipe.metric.num_images,  # js is of a density
        "metric_repeats": chain.scoring.repeats,
        "precision": state["precision"],
        "reference_score": state["reference"]["score"],
        "final_score": rounds[-1]["score"],
        **finetune_report.improvements(state, key),
        **({"ended_early": True} if ending else {}),
        **({} if fraction is None else {"sweep_cost": fraction}),
        **({} if benchmark is None else {"published": [row._asdict() for row in published.rows(benchmark, key)]}),
        "rounds": _rounds(chain, state),
        **({"control": of_control} if of_control else {}),
    }


def _rounds(chain: Chain, state: dict[str, Any]) -> list[dict[str, Any]]:
    kept = ("round", "score", "best_images", "promoted", "improvement", "alpha", "beta", "nodes")
    return [
        {
            **{name: record[name] for name in kept if name in record},
            "checkpoint": str(chain.weights_after(record["round"])),
        }
        for record in chain.records(state)
    ]


def _dry_run(recipe: Recipe, out: Path, model: LikelihoodModel, plan: sweep.Plan) -> dict[str, Any]:
    settings = recipe.finetune
    return {
        "out": str(out),
        "dry_run": True,
        "reference": recipe.model.ckpt,
        "reference_sha256": sha256(checkpoint.resolve(recipe.model.ckpt)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rounds": settings.rounds,
        "steps_per_round": plan.steps,
        "pairs_per_step": settings.batch,
        "fake_images_per_round": settings.num_drawn,
        "network_rows_per_step": {
            "model_forward_backward": 2 * settings.batch,
            "reference_forward": 2 * settings.batch,
            **({"control_forward_backward": settings.batch} if settings.control else {}),
        },
        **(plan.forecast() if plan.is_sweep else {}),
        **(auto.forecast(plan) if plan.is_auto else {}),
        **finetune_report.early_stop(settings),
        **finetune_report.settings_by_round(recipe),
    }
