"""What follows the training of a round: its best candidate is scored anew, and is the next reference if it is better.

Three kinds of seeds keep the figures honest. A candidate is chosen on one range, where the best of many looks better
than it is. It is promoted by its improvement on other ranges, in pairs with the reference. What is reported comes from
a third kind, on which nothing is decided. See docs/explanation/scores.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.engines import pages
from ddo_cli.engines.ddo import report, sweep
from ddo_cli.engines.ddo.round import Chain, Round, copy_weights
from ddo_cli.engines.ddo.trial import TRAIN_STATE, Trial, candidates_of
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import RunError
from ddo_cli.files import read_json, remove, write_json
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.metrics.uncertainty import Mean, improvement, mean
from ddo_cli.training.ema import snapshot_name
from ddo_cli.training.state import drop_state

Figures = dict[str, float]  # of one range of seeds


def promote(this: Round, trials: list[Trial], before: dict[str, Any]) -> dict[str, Any]:
    """Scores the round's best candidate on fresh seeds and makes it the reference if it is better.

    before: the record of the reference. Returns the round's record: the figures of the model that the round leads to,
    the best candidate's improvement, and whether it was promoted.
    """
    scoring = this.chain.scoring
    key = scoring.key
    trial, step = min(candidates_of(trials), key=lambda pair: sweep.rank(pair[0].candidates[str(pair[1])][key]))
    source, file = trial.candidate_file(step), this.path / "best-scores.json"
    candidate, chosen_by = trial.networks.scratch, {"0": trial.candidates[str(step)]}
    candidate.load_state_dict(checkpoint.load(source, kind="model").tensors)
    promotion = scores_on(scoring.promotion_ranges, scoring, candidate, file, chosen_by)
    gain = improvement(_of(key, before["promotion"]), _of(key, promotion))
    promoted = is_better(gain, this.recipe.finetune.margin)
    images = step * this.recipe.finetune.batch
    told = f"{trial.title}: after {images} images {key} {gain.as_improvement} than the reference on fresh seeds"
    console.info(f"{told}, {'promoted' if promoted else 'NOT promoted: the reference is kept'}")
    repeats = before["repeats"]
    if promoted:
        repeats = scores_on(scoring.table_ranges, scoring, candidate, file, chosen_by)
    if dist.is_main():
        copy_weights(source if promoted else this.ref_file, this.path / "best.safetensors")
        scoring.picture(candidate, this.path / "grid.png")
    record = {
        "round": this.number,
        "score": mean(_of(key, repeats)).value,
        "best_images": images,
        "promoted": promoted,
        "improvement": gain._asdict(),
        "promotion": promotion if promoted else before["promotion"],
        "repeats": repeats,
        "candidates": trial.candidates,
    }
    if this.plan.has_nodes:
        nodes = [each.record() for each in trials]
        record |= {**trial.setting._asdict(), "nodes": nodes}
        if this.plan.is_sweep:
            spent, full = sweep.cost(nodes, this.plan.candidates_at, this.plan.costs)
            record |= {"cost": spent, "full_cost": full}
        console.show(console.table(*report.sweep_table(record, this.recipe, key)[:3]))
    if this.recipe.finetune.patience is not None:
        record |= {"trained_images": trial.last_step * this.recipe.finetune.batch, "ended_early": trial.is_early}
    if dist.is_main():  # optimizer state does not cross rounds, and every candidate has its score on disk
        for place in (this.path, *this.path.glob("nodes/*")):
            drop_state(place / TRAIN_STATE)
    return record


def is_better(gain: Mean, margin: float) -> bool:
    """Whether an improvement is one, and at least `margin` standard errors. NaN is none."""
    return gain.value > 0 and gain.value >= margin * (gain.std_error or 0.0)


def record_of_start(scoring: Scoring, model: LikelihoodModel, file: Path) -> dict[str, Any]:
    """The record of the reference that a run starts from."""
    promotion = scores_on(scoring.promotion_ranges, scoring, model, file)
    repeats = scores_on(scoring.table_ranges, scoring, model, file)
    return {"promotion": promotion, "repeats": repeats, "score": mean(_of(scoring.key, repeats)).value}


def scores_on(
    ranges: Sequence[int], scoring: Scoring, model: LikelihoodModel, file: Path, known: Mapping[str, Figures] = {}
) -> list[Figures]:
    """Figures on these ranges of seeds. Each is kept in `file` by its range, since a large score takes hours.

    known: figures that are there already, by range.
    """
    rundir.remove_damaged(file, "the scores are taken again")
    scores: dict[str, Figures] = dist.from_main({**known, **(read_json(file) if file.is_file() else {})})
    for number in ranges:
        if str(number) not in scores:
            scores[str(number)] = scoring.run(model, number)
            if dist.is_main():
                write_json(file, scores)
    return [scores[str(number)] for number in ranges]


def mend_weights(chain: Chain, records: Sequence[dict[str, Any]]) -> None:
    """Copies weights of finished rounds again where they are damaged or missing, and what they are copies of is not.

    Raises RunError if the next round, or the result, needs some that cannot be mended.
    """
    if not dist.is_main():
        return
    files = chain.run_dir.ledger
    for record in records:
        best = chain.path_of(record["round"]) / "best.safetensors"
        problem = files.problem(best) if best.is_file() else "is missing"
        if problem is None:
            continue
        source = chain.weights_after(record["round"] - 1)
        if record["promoted"]:
            source = best_candidate(chain, record)
        if files.is_good(checkpoint.resolve(source)):
            copy_weights(source, best)
            console.info(f"{best} is copied again from {source}")
        elif record is records[-1]:
            raise RunError(f"{best} {problem}, and so is {source}; restore one of them from a copy")


def needed(chains: Sequence[Chain], run_dir: rundir.RunDir, state: dict[str, Any], name: str) -> str | None:
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


def drop_candidates(chain: Chain, records: Sequence[dict[str, Any]]) -> None:
    """With finetune.keep_candidates = best: of finished rounds, since a killed round may promote again.

    All averages of the best step stay.
    """
    if chain.recipe.finetune.keep_candidates == "all" or not dist.is_main():
        return
    for record in records:
        settings = chain.recipe.finetune.of_round(record["round"])
        kept = {best_candidate(chain, record, width) for width in (None, *settings.ema_widths[1:])}
        for file in chain.path_of(record["round"]).rglob("checkpoints/step-*.safetensors"):
            if file not in kept:
                remove(file)


def best_candidate(chain: Chain, record: dict[str, Any], width: float | None = None) -> Path:
    """The best candidate's file of a finished round. width: of a further average."""
    path = chain.path_of(record["round"])
    if "nodes" in record:
        path = path / "nodes" / sweep.Setting(record["alpha"], record["beta"]).directory
    step = record["best_images"] // chain.recipe.finetune.of_round(record["round"]).batch
    return path / "checkpoints" / snapshot_name(step, width)


def _of(key: str, figures: Sequence[Figures]) -> list[float]:
    return [one[key] for one in figures]
