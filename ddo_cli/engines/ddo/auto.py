"""`finetune.beta = auto`: a round finds its beta by trainings that are scored.

alpha and beta fix the log-ratio at which training settles, about log(alpha) / beta. How far is best depends on how
wrong the reference is (docs/explanation/alpha-and-beta.md), and no figure of training tells that: scores of samples do.

1. A round begins at the beta of the round before, round 1 at one that goes as 1 / dimension.
2. That beta, half and twice of it are each trained for half of the round and scored; while the best one is at an end,
   and going there was worth it, one more beyond it.
3. So are the best one divided by and times the root of 2.
4. The best one goes on to the end of the round. Half of a round misleads both ways: where betas are too large, smaller
   ones have not settled yet; where they are too small, half a round is too short to overshoot in. So the one beside it
   goes to the end, too: the larger one if the score has risen again, else the better one. While the later one ends
   better, the next on that side follows.

Trials are nodes as those of a sweep: a killed run goes on with what is on disk.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddo_cli import console
from ddo_cli.engines.ddo import reference
from ddo_cli.engines.ddo.round import Networks, Round
from ddo_cli.engines.ddo.sweep import Plan, Setting
from ddo_cli.engines.ddo.trial import Trial
from ddo_cli.errors import NumericsError

MOST_SHORT = 9  # 5 at least; 7 span a factor of 64, then 2 finer ones
MOST_WHOLE = 4  # 2 at least
# Where a score is less than this better than its neighbour's, the search does not go on beyond it. For small betas the
# loss is linear and Adam's step does not depend on its scale, so that beta no longer counts.
WORTH = 0.02
# Where the search begins: the log-ratio at which training settles, in nats per dimension, and the least |log alpha|
# that counts. They give the quickstart's best betas, and decide how many trials are needed, not where they end.
SETTLED, LEAST = 0.05, 0.1


def search(this: Round, networks: Networks, before: Sequence[dict[str, Any]]) -> list[Trial]:
    """Every trial, by beta; the best ones are trained to the end. before: the records of other rounds."""
    alpha, plan = this.plan.settings[0].alpha, this.plan
    start = before[-1].get("beta") if before else None  # none where the round before was told its beta
    if start is None:
        start = first(alpha, math.prod(networks.scratch.codec.shape))
    trials: dict[float, Trial] = {}

    def score(beta: float, until: int) -> float:
        trial = trials.setdefault(beta, Trial(this, networks, Setting(alpha, beta)))
        trial.train(until)
        return trial.score_at(until)

    short = explored(start, lambda beta: score(beta, plan.short))
    if min(short.values()) == math.inf:
        raise NumericsError(
            f"{this.title}: training diverges with every beta from {min(short):g} to {max(short):g}; lower "
            f"finetune.lr = {this.recipe.finetune.lr:g}, or set beta, and choose another --out"
        )

    def at_end(beta: float) -> float:
        score(beta, plan.steps)
        return trials[beta].score_at_end

    whole = finished(short, at_end)
    for trial in trials.values():
        trial.drop()
    beta = best_of({beta: trials[beta].score_at(plan.steps) for beta in whole})
    if networks.precision_error is not None:
        reference.check_error(this.recipe, networks.precision_error, beta, this.number, this.chain.device)
    end = ", at the end of what was tried" if beta in (min(trials), max(trials)) else ""
    console.info(f"{this.title}: beta {beta:g} by {this.chain.scoring.key} of {len(trials)} trainings{end}")
    return [trials[beta] for beta in sorted(trials)]


def forecast(plan: Plan) -> dict[str, Any]:
    """What `--dry-run` tells of the search."""
    most = {"trials_at_most": MOST_SHORT, "whole_trials_at_most": MOST_WHOLE}
    return {"beta_auto": {**most, "steps_of_a_trial": plan.short}}


def first(alpha: float | None, dimensions: int) -> float:
    """Where round 1 begins. alpha shifts r to -log(alpha) / beta; at alpha 1 something else ends its growth."""
    shift = abs(math.log(alpha)) if alpha is not None else 0.0  # pairs: what moves both images alike cancels
    return _rounded(max(shift, LEAST) / (SETTLED * dimensions))


def explored(start: float, score: Callable[[float], float]) -> dict[float, float]:
    """Scores by beta: of `start`, half and twice of it, beyond the best one while it is at an end, and around it."""
    scores: dict[float, float] = {}

    def add(beta: float, *factors: float) -> None:
        for value in (_rounded(beta * factor) for factor in factors):
            scores[value] = score(value)

    add(start, 0.5, 1, 2)
    while len(scores) < MOST_SHORT - 2:
        best = best_of(scores)
        ordered = sorted(scores, reverse=best == max(scores))
        is_worth = scores[best] < (1 - WORTH) * scores[ordered[1]] or scores[best] == math.inf
        if best != ordered[0] or not is_worth:
            break
        add(best, 2 if best == max(scores) else 0.5)
    add(best_of(scores), math.sqrt(0.5), math.sqrt(2))
    return scores


def finished(short: Mapping[float, float], score: Callable[[float], float]) -> dict[float, float]:
    """Scores at the end of whole trainings by beta: downhill from the best short one."""
    best = best_of(short)
    whole, around = {best: score(best)}, {side: _next(short, best, side) for side in (-1, 1)}
    has_risen = whole[best] > (1 + WORTH) * short[best]
    is_up = has_risen or short.get(around[1], math.inf) < short.get(around[-1], math.inf)
    side = 1 if is_up else -1
    beta, following = best, around[side]
    while len(whole) < MOST_WHOLE and short.get(following, 0.0) < math.inf:  # not where a short one has diverged
        whole[following] = score(following)
        if not whole[following] < (1 - WORTH) * whole[beta]:
            break
        beta, following = following, _next(short, following, side)
    return whole


def _next(scores: Mapping[float, float], beta: float, side: int) -> float:
    """Of those tried the next one below (side -1) or above (side 1), or one beyond them."""
    others = [other for other in scores if (other - beta) * side > 0]
    return min(others, key=lambda other: abs(other - beta)) if others else _rounded(beta * math.sqrt(2) ** side)


def best_of(scores: Mapping[float, float]) -> float:
    """Of equal ones the largest: where all diverge, the search goes on upwards, to smaller changes of the model."""
    return min(scores, key=lambda beta: (scores[beta], -beta))


def _rounded(beta: float) -> float:
    """Three digits, as a user would write them."""
    return float(f"{beta:.3g}")
