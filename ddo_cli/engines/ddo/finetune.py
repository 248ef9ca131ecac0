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

from ddo_cli import console, dist, rundir
from ddo_cli.engines import pages, training_run
from ddo_cli.engines.ddo import auto, promotion
from ddo_cli.engines.ddo.page import page
from ddo_cli.engines.ddo.result import result_of
from ddo_cli.engines.ddo.round import Round, copy_weights
from ddo_cli.engines.ddo.setup import Setup, prepare
from ddo_cli.engines.ddo.trial import Trial, halving
from ddo_cli.engines.panel import Panel
from ddo_cli.engines.watch import Watch
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report.numbers import readable


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
    loaded, setup = prepare(recipe, device)
    run_dir = rundir.RunDir(out)
    run_dir.check("finetune-ddo", setup.recipe, **setup.identity)
    if dry_run:
        return setup.forecast(loaded, out, measure)
    panel = Panel(setup.recipe)
    watch = Watch(run_dir, setup.recipe, page, log_to, panel)
    chains = setup.chains(run_dir, watch)
    claimed = training_run.claimed(
        "finetune-ddo", setup.recipe, out, setup.identity, loaded.model, device, partial(promotion.needed, chains)
    )
    with claimed as (_, state), watch, panel.shown():
        for chain in chains:
            promotion.mend_weights(chain, chain.records(state))
        is_done, finals = all(chain.is_done(state) for chain in chains), [chain.final for chain in chains]
        if is_done and run_dir.is_finished(state, *finals):
            if dist.is_main() and pages.is_behind(run_dir, state):
                watch.finish(state)
            return result_of(chains[0], state)
        if state.get("finished"):  # more rounds, or a control: those files that a run ends with are to be written again
            state = run_dir.advance(finished=False)
        panel.begins(out, loaded.model, device, state)
        state = _scored(loaded.model, setup, run_dir, watch, state)
        del loaded  # each round loads its own
        for chain in chains:  # that of DDO, and that of its control
            records = chain.records(state)
            if dist.is_main():
                chain.path.mkdir(exist_ok=True)
            promotion.drop_candidates(chain, records)
            while not chain.is_done(state):
                this = Round(len(records) + 1, chain)
                networks = this.networks(setup.real, setup.rejected)  # the reference draws the fake set
                if this.plan.is_auto:
                    trials = auto.search(this, networks, records)
                else:
                    trials = [Trial(this, networks, setting) for setting in this.plan.settings]
                    for trial, step in halving(trials, this.plan.rungs):  # without a sweep one trial, to the end
                        trial.train(step)
                    del trial
                record = promotion.promote(this, trials, records[-1] if records else state["reference"])
                if networks.precision_error is not None:
                    record["precision_error"] = networks.precision_error
                records = [*records, record]
                state = run_dir.advance(**{chain.name: records})
                _tell(this, record)
                promotion.drop_candidates(chain, records)
                del networks, trials  # the next round's models take their memory
            if dist.is_main():
                copy_weights(chain.weights_after(len(records)), chain.final)
        watch.finish(state)
        state = training_run.finish(run_dir)
        return result_of(chains[0], state)


def _scored(
    model: LikelihoodModel, setup: Setup, run_dir: rundir.RunDir, watch: Watch, state: dict[str, Any]
) -> dict[str, Any]:
    """Scores the reference that the run starts from, unless its figures are there; returns the state."""
    scoring, picture = setup.scoring, run_dir.path / "reference.png"
    if "reference" not in state:
        console.info(f"scoring the reference {setup.recipe.model.ckpt}")
        scoring.picture(model, picture)
        record = promotion.record_of_start(scoring, model, run_dir.path / "reference-scores.json")
        state = run_dir.advance(metric=scoring.key, reference=record, rounds=[])
    score = state["reference"]["score"]
    watch.measured("round", {scoring.key: score}, 0, picture)
    console.info(f"reference: {scoring.key} {readable(score)}")
    return state


def _tell(this: Round, record: dict[str, Any]) -> None:
    """Sends what a round has come to, and writes the page."""
    chain = this.chain
    images = this.images_before + record.get("trained_images", this.plan.steps * this.recipe.finetune.batch)
    figures = {chain.scoring.key: record["score"], "promoted": float(record["promoted"])}
    chain.watch.measured("control/round" if chain.is_control else "round", figures, images, this.path / "grid.png")
    chain.watch.refresh()
    if chain.watch.panel is not None:
        chain.watch.panel.rounds_of(chain.run_dir.state())
