"""`ddo train-disc`: a time-dependent real-or-generated discriminator of one model (arXiv 2211.17091).

The model draws a generated set to disk; real and generated items are noised by the same forward process; a network
learns to tell them apart at every noise level. Its logit estimates log p_data - log p_model, whose gradient is what the
model's score lacks. The model itself is not trained.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.engines import training_run
from ddo_cli.engines.discriminator import data as disc_data
from ddo_cli.engines.discriminator import report as disc_report
from ddo_cli.engines.discriminator.setup import prepare, untrained
from ddo_cli.engines.discriminator.training import Training, brief, by_step
from ddo_cli.engines.sampling import guides
from ddo_cli.engines.scoring import Scoring
from ddo_cli.files import read_json, sha256, write_json
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report.numbers import readable
from ddo_cli.trainable import Trainable

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
    setup = prepare(recipe, device, force)
    rundir.RunDir(out).check("train-disc", recipe, **setup.identity)
    if dry_run:
        return setup.forecast(out)
    control = recipe.discriminator.control
    claimed = training_run.claimed("train-disc", recipe, out, setup.identity, setup.network, device, _needed)
    with claimed as (run_dir, state):
        best, blank = run_dir.path / "best.safetensors", run_dir.path / "untrained.safetensors"
        if not run_dir.is_finished(state, run_dir.final, best, *([blank] if control else [])):
            fake = setup.given or disc_data.draw(recipe, setup.spec, run_dir, setup.label_use, setup.real, device)
            training = Training(setup, run_dir, fake, log_to)
            if not state.get("finished") or len(training.evaluations) < state["evaluations"]:
                training.run()  # else only a file written at the end was lost
            state = _finish(training, setup.scoring, untrained(setup.config, recipe, device) if control else None)
        keys = ("heldout_bce", "heldout_accuracy", "calibration_error", "settled", "best_images", "selected_by")
        result = {**training_run.result(run_dir, state, *keys), "gain": brief(state["gain"]), "best": str(best)}
        if figures := state.get("untrained"):
            result["control"] = {"file": str(blank), **figures, "gain": brief(figures["gain"])}
        return result


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


def _finish(training: Training, scoring: Scoring | None, control: Trainable | None) -> dict[str, Any]:
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
    blank: dict[str, Any] = run_dir.state().get("untrained", {})
    if control is not None:
        figures_of = {**training.held_out.evaluate(control), "gain": training.gain(training.guide_of(control))}
        if dist.is_main():
            training.keep("untrained.safetensors", control.state_dict(), 0, figures_of)
        blank = {key: figures_of[key] for key in ("bce", "accuracy", "calibration_error", "gain")}
    figures = {
        "heldout_bce": evaluations[chosen]["bce"],
        "heldout_accuracy": evaluations[chosen]["accuracy"],
        "calibration_error": evaluations[chosen]["calibration_error"],
        "gain": gain,
        "levels": evaluations[chosen]["levels"],
        **({"untrained": blank} if blank else {}),
        "settled": settled,
        "best_images": chosen * settings.batch,
        "batch": settings.batch,
        "evaluations": len(evaluations),
        "selected_by": settings.select,
        "scores": {str(step): value for step, value in scores.items()},
    }
    training.watch.finish({**run_dir.state(), **figures})
    return training_run.finish(run_dir, **figures)


def _scores(training: Training, scoring: Scoring) -> dict[int, float]:
    """The recipe's metric of samples guided by each checkpoint, by step; each is kept on disk."""
    file = training.run_dir.path / "guided-scores.json"
    rundir.remove_damaged(file, "the scores are taken again")
    scores: dict[str, float] = dist.from_main(read_json(file) if file.is_file() else {})
    for step, _ in by_step(training.evaluations):
        if str(step) in scores:
            continue
        scores[str(step)] = scoring.run(training.base.guided_by([training.guide(step)]), 0)[scoring.key]
        console.info(f"guided by step {step}: {scoring.key} {readable(scores[str(step)])}")
        if dist.is_main():
            write_json(file, scores)
    return {int(step): value for step, value in scores.items()}
