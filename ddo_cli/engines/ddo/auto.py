"""`finetune.beta = auto`: a round finds its beta by short trainings that are scored.

alpha and beta fix the log-ratio at which training settles, about log(alpha) / beta. How far is best depends on how
wrong the reference is (docs/explanation/alpha-and-beta.md), and no figure of training tells that: scores of samples do.

1. A round begins at the beta of the round before, round 1 at one that goes as 1 / dimension.
2. That beta, half and twice of it are each trained for half of the round and scored; while the best one is at an end,
   one more beyond it.
3. So are the best one divided by and times the root of 2. The round's beta is the best one of all.

Scores are kept on disk as those of a sweep's nodes: a killed run comes to the same beta.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ddo_cli import console
from ddo_cli.engines.ddo import reference
from ddo_cli.engines.ddo.round import Networks, Round
from ddo_cli.engines.ddo.sweep import Plan, Setting, rank
from ddo_cli.engines.ddo.trial import Trial
from ddo_cli.errors import NumericsError

MOST_TRIALS = 9  # 5 at least; 7 span a factor of 64, then 2 finer ones
# Where the search begins: the log-ratio at which training settles, in nats per dimension, and the least |log alpha|
# that counts. They give the quickstart's best betas, and decide how many trials are needed, not where they end.
SETTLED, LEAST = 0.05, 0.1


def find(this: Round, networks: Networks, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entries of the round's record that tell its alpha, its beta and how that was found. before: other rounds'."""
    alpha = this.plan.settings[0].alpha
    start = before[-1].get("beta") if before else None  # none where the round before was told its beta
    if start is None:
        start = first(alpha, math.prod(networks.scratch.codec.shape))
    scores = _scores(this, networks, alpha, start)
    if min(scores.values()) == math.inf:
        raise NumericsError(
            f"{this.title}: training diverges with every beta from {min(scores):g} to {max(scores):g}; lower "
            f"finetune.lr = {this.recipe.finetune.lr:g}, or set beta, and choose another --out"
        )
    beta = _best(scores)
    if networks.precision_error is not None:
        reference.check_error(this.recipe, networks.precision_error, beta, this.number, this.chain.device)
    tried = [{"beta": each, "score": score if score < math.inf else None} for each, score in sorted(scores.items())]
    told = ", ".join(f"{each:g}: {score:.4g}" for each, score in sorted(scores.items()))
    end = " (at the end of what was tried)" if is_at_end(scores) else ""
    console.info(f"{this.title}: beta {beta:g} by {this.chain.scoring.key} of short trainings ({told}){end}")
    return {**Setting(alpha, beta)._asdict(), "tried": tried}


def forecast(plan: Plan) -> dict[str, Any]:
    """What `--dry-run` tells of the search."""
    return {"beta_auto": {"trials_at_most": MOST_TRIALS, "steps_of_a_trial": plan.short}}


def first(alpha: float | None, dimensions: int) -> float:
    """Where round 1 begins. alpha shifts r to -log(alpha) / beta; at alpha 1 something else ends its growth."""
    shift = abs(math.log(alpha)) if alpha is not None else 0.0  # pairs: what moves both images alike cancels
    return _rounded(max(shift, LEAST) / (SETTLED * dimensions))


def _scores(this: Round, networks: Networks, alpha: float | None, start: float) -> dict[float, float]:
    """Scores of short trainings by beta: `start`, half and twice of it, on while the best one is at an end, and closer
    around it.
    """
    scores: dict[float, float] = {}

    def score(beta: float, *factors: float) -> None:
        for value in (_rounded(beta * factor) for factor in factors):
            scores[value] = _score(this, networks, Setting(alpha, value))

    score(start, 0.5, 1, 2)
    while is_at_end(scores) and len(scores) < MOST_TRIALS - 2:
        best = _best(scores)
        score(best, 0.5 if best == min(scores) else 2)
    score(_best(scores), math.sqrt(0.5), math.sqrt(2))
    return scores


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


def _rounded(beta: float) -> float:
    """Three digits, as a user would write them."""
    return float(f"{beta:.3g}")
