"""`finetune.beta = auto`: a round finds its beta by short trainings that are scored.

alpha and beta fix the log-ratio at which training settles, about log(alpha) / beta. How far is best depends on how
wrong the reference is (docs/explanation/alpha-and-beta.md), and no figure of training tells that: scores of samples do.

1. In round 1 a probe gives the scale of r, and by it a first beta. Later rounds begin at the beta of the round before.
2. That beta, half and twice of it are each trained for a quarter of the round and scored; while the best one is at an
   end, one more beyond it.
3. The round's beta is the lowest point of a parabola through the best one and its neighbours.

Scores and beta are kept on disk: a killed run goes on with the same ones.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddo_cli import console, dist, rundir
from ddo_cli.engines.ddo import reference
from ddo_cli.engines.ddo.round import Networks, Round
from ddo_cli.engines.ddo.sweep import Plan, Setting, rank
from ddo_cli.engines.ddo.trial import Trial
from ddo_cli.errors import NumericsError
from ddo_cli.files import read_json, write_json
from ddo_cli.models import registry
from ddo_cli.training import loop
from ddo_cli.training.meter import Meter

PROBE_STEPS = 40  # a few dozen; the learning rate rises over the first half
MOST_TRIALS = 7  # 3 at least; 7 span a factor of 64
SHARE = 0.5  # of the probe's last r that a round is to settle at. Right for the quickstart; it only places the search
FILE = "auto.json"


def find(this: Round, networks: Networks, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entries of the round's record that tell its alpha, its beta and how that was found. before: other rounds'."""
    file = this.path / FILE
    rundir.remove_damaged(file, "beta is searched again")
    known: dict[str, Any] = dist.from_main(read_json(file) if file.is_file() else {})
    alpha = this.plan.settings[0].alpha
    if "first" not in known:
        beta = before[-1].get("beta") if before else None  # none where the round before was told its beta
        known |= {"first": beta} if beta is not None else _first(alpha, _probe(this, networks))
        _write(file, known)
    scores = _scores(this, networks, alpha, known["first"])
    if min(scores.values()) == math.inf:
        raise NumericsError(
            f"{this.title}: training diverges with every beta from {min(scores):g} to {max(scores):g}; lower "
            f"finetune.lr = {this.recipe.finetune.lr:g}, or set beta, and choose another --out"
        )
    beta = _rounded(lowest(scores))
    if networks.precision_error is not None:
        reference.check_error(this.recipe, networks.precision_error, beta, this.number, this.chain.device)
    tried = [{"beta": each, "score": score if score < math.inf else None} for each, score in sorted(scores.items())]
    told = ", ".join(f"{each:g}: {score:.4g}" for each, score in sorted(scores.items()))
    end = " (at the end of what was tried)" if is_at_end(scores) else ""
    console.info(f"{this.title}: beta {beta:g} by {this.chain.scoring.key} of short trainings ({told}){end}")
    return {**Setting(alpha, beta)._asdict(), "auto": {**known, "tried": tried}}


def forecast(plan: Plan) -> dict[str, Any]:
    """What `--dry-run` tells of the search."""
    return {"beta_auto": {"probe_steps": PROBE_STEPS, "trials_at_most": MOST_TRIALS, "steps_of_a_trial": plan.short}}


def _probe(this: Round, networks: Networks) -> dict[str, float]:
    """Figures of r after PROBE_STEPS of a copy of the reference, which nothing holds back: alpha = 1, beta near 0."""
    settings, chain = this.recipe.finetune, this.chain
    model = registry.load_model(this.ref_file, chain.device, settings.draw).model
    objective = networks.task.objective(model, Setting(1.0, 0.1 / math.prod(model.codec.shape)))
    own = {"warmup": settings.batch * PROBE_STEPS // 2, "lr_schedule": "constant", "log_every": PROBE_STEPS // 4}
    plan = loop.Plan(
        title=f"{this.title} probe",
        steps=PROBE_STEPS + 1,  # the last one is not taken: nothing is saved
        settings=settings.model_copy(update={**own, "save_every": 10**9}),
        key=(chain.recipe.seed, this.number),
        state_file=this.path / "probe-without-a-state",
        owner="probe",
        last_good=lambda: this.ref_file,
    )
    meter = Meter(this.path / "probe.jsonl", {}, settings.batch, chain.device, networks.task.figures)
    figures: dict[str, float] = {}
    with contextlib.closing(loop.fit(model, objective, networks.task.stream, plan, meter)) as events:
        for event in events:
            assert isinstance(event, loop.Stepped), "nothing is evaluated"
            figures = event.figures or figures
            if event.step == PROBE_STEPS:
                break
    return figures


def _first(alpha: float | None, figures: Mapping[str, float]) -> dict[str, float]:
    """beta at which training settles at SHARE of the probe's root mean square of r.

    Where all images move alike, alpha shifts r to -log(alpha) / beta. At alpha = 1 the loss is, for small beta r,
    -beta margin / 2 + beta^2 r^2 / 4: lowest, along one direction of the weights, where beta rms(r) = margin / rms(r).
    """
    rms = math.hypot(figures["r_std"], (figures["r_real"] + figures["r_fake"]) / 2)
    shift = math.log(alpha) if alpha is not None else 0.0  # pairs: what moves both images alike cancels
    settled = math.hypot(shift, figures["margin"] / rms) if rms > 0 else math.nan
    first = settled / (SHARE * rms) if rms > 0 else math.nan
    if not (math.isfinite(first) and first > 0):
        raise NumericsError("finetune.beta = auto: the probe does not move the model; set beta, or raise finetune.lr")
    return {"first": _rounded(first), "probe_r_rms": rms, "probe_margin": figures["margin"]}


def _scores(this: Round, networks: Networks, alpha: float | None, first: float) -> dict[float, float]:
    """Scores of short trainings by beta: `first`, half and twice of it, and on while the best one is at an end."""
    scores: dict[float, float] = {}
    betas = [_rounded(first * factor) for factor in (0.5, 1, 2)]
    while True:
        for beta in betas:
            scores[beta] = _score(this, networks, Setting(alpha, beta))
        if not is_at_end(scores) or len(scores) >= MOST_TRIALS:
            return scores
        best = _best(scores)
        betas = [_rounded(best / 2 if best == min(scores) else best * 2)]


def _score(this: Round, networks: Networks, setting: Setting) -> float:
    """The score after a short training, infinite where it diverges."""
    trial, step = Trial(this, networks, setting, is_node=True), this.plan.short
    trial.train(step)
    trial.drop()
    return math.inf if trial.diverged else rank(trial.rungs[str(step)][this.chain.scoring.key])


def _best(scores: Mapping[float, float]) -> float:
    """Of equal ones the largest: where all diverge, the search goes on upwards, to smaller changes of the model."""
    return min(scores, key=lambda beta: (scores[beta], -beta))


def is_at_end(scores: Mapping[float, float]) -> bool:
    """Whether the best beta is the smallest or the largest of those tried."""
    return _best(scores) in (min(scores), max(scores))


def lowest(scores: Mapping[float, float]) -> float:
    """The beta of the lowest point of the parabola through the best one and its neighbours, in logarithms.

    Where the best one has a neighbour on one side only, or one that diverged, it is the best one itself.
    """
    betas, best = sorted(scores), _best(scores)
    at = betas.index(best)
    near = betas[max(at - 1, 0) : at + 2]
    if len(near) < 3 or not all(0 < scores[beta] < math.inf for beta in near):
        return best
    x0, x1, x2 = (math.log(beta) for beta in near)
    y0, y1, y2 = (math.log(scores[beta]) for beta in near)
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)  # slopes between: at most 0, at least 0
    if left == right:
        return best
    middle, further = (x0 + x1) / 2, (x1 + x2) / 2
    return math.exp(middle - left * (further - middle) / (right - left))


def _rounded(beta: float) -> float:
    """Three digits, as a user would write them."""
    return float(f"{beta:.3g}")


def _write(file: Path, content: dict[str, Any]) -> None:
    if dist.is_main():
        write_json(file, content)
