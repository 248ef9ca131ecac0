"""Arithmetic of a sweep over alpha and beta: successive halving (Jamieson, Talwalkar: arXiv 1502.07943), and its cost.

All nodes train to the first rung; the better half by score trains on to the next one, and so on; those of the last
rung train to the end of the round. Plain numbers only: no model, no file.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ddo_cli.engines import training_run
from ddo_cli.errors import UsageError
from ddo_cli.recipe.schema import FinetuneRecipe, Recipe


class Setting(NamedTuple):
    """What a node of the sweep trains with."""

    alpha: float | None  # None: the objective has none
    beta: float  # NaN: not found yet (finetune.beta = auto)

    @property
    def title(self) -> str:
        """For people: "alpha 4 beta 0.05"."""
        alpha = "" if self.alpha is None else f"alpha {_short(self.alpha)} "
        return f"{alpha}beta {_short(self.beta)}"

    @property
    def directory(self) -> str:
        """Name of the node's directory, different for every setting."""
        return self.title.replace(" ", "-")


class Rung(NamedTuple):
    """Training pauses after `step`, which `num_nodes` nodes reach. The last rung is the end of the round."""

    step: int
    num_nodes: int


class Costs(NamedTuple):
    """Prices in forward passes of one row; a backward pass counts as two."""

    step: int  # of training
    rung: int  # of a score at a rung
    candidate: int  # of a candidate's score


class Plan(NamedTuple):
    """What every round does: one setting, or several with the sweep's rungs and prices."""

    settings: list[Setting]
    steps: int
    candidates_at: list[int]  # steps after which averaged weights are kept and scored, the last one among them
    rungs: list[Rung]
    images: int  # per score at a rung
    costs: Costs

    @property
    def is_sweep(self) -> bool:
        """Whether there is a grid to choose from."""
        return len(self.settings) > 1

    @property
    def is_auto(self) -> bool:
        """Whether the round has to find its beta."""
        return math.isnan(self.settings[0].beta)

    @property
    def has_nodes(self) -> bool:
        """Whether several settings are trained and compared, each in a directory of its own."""
        return self.is_sweep or self.is_auto

    @property
    def short(self) -> int:
        """Steps of the short trainings of a search for beta."""
        return -(-self.steps // 2)

    def of_control(self) -> "Plan":
        """The same steps and candidates, with no coefficients to sweep."""
        return self._replace(settings=[Setting(0.0, 0.0)], rungs=[Rung(self.steps, 1)])

    def forecast(self) -> dict[str, Any]:
        """What `--dry-run` tells of a sweep."""
        spent, full = cost(planned(self.rungs, self.candidates_at), self.candidates_at, self.costs)
        return {
            "nodes": [setting._asdict() for setting in self.settings],
            "rungs": [rung._asdict() for rung in self.rungs],
            "sweep_images": self.images,
            "sweep_cost": spent / full,
        }


def plan_of(recipe: Recipe, passes: Callable[[int], int]) -> Plan:
    """The plan of a recipe. passes: price of a score of so many images, asked only for a sweep.

    Raises UsageError where the recipe's sweep cannot be run.
    """
    finetune, num_images = recipe.finetune, recipe.metric.num_images
    settings = settings_of(finetune)
    steps = training_run.num_steps(finetune.images_per_round, finetune.batch)
    every = training_run.steps_between("finetune.eval_every", finetune.eval_every, finetune.batch, steps)
    candidates_at = [*range(every, steps, every), steps]
    images = finetune.sweep_images or max(num_images // 2, 2)
    alone = Plan(settings, steps, candidates_at, [Rung(steps, 1)], images, Costs(0, 0, 0))
    if len(settings) == 1 and not alone.is_auto:
        return alone
    if images > num_images:
        raise UsageError(
            f"finetune.sweep_images = {images} is more than metric.num_images = {num_images}, on which the sweep's "
            "last nodes are scored; lower it"
        )
    if alone.is_auto:
        if alone.short == steps:
            raise UsageError(
                f"a round of {steps} steps is too short for finetune.beta = auto, which trains for half of it; "
                "raise finetune.images_per_round"
            )
        return alone
    rungs = rungs_of(len(settings), steps, finetune.sweep_rungs)
    rows = 2 * finetune.batch  # real and fake
    training = 3 * rows + rows  # the model's forward and backward pass, the reference's forward pass
    return Plan(settings, steps, candidates_at, rungs, images, Costs(training, passes(images), passes(num_images)))


def too_early(plan: Plan, settings: FinetuneRecipe) -> str:
    """What to tell of a sweep that compares averages before half of them is trained weights; else empty."""
    images, half_life = plan.rungs[0].step * settings.batch, settings.ema_half_life
    if len(plan.rungs) == 1 or settings.ema_widths or images >= half_life:
        return ""
    return (
        f"the sweep drops nodes after {images:,} images already, when averages of finetune.ema_half_life = "
        f"{half_life:,.0f} images are mostly the reference still; lower it, or finetune.sweep_rungs"
    )


def settings_of(recipe: FinetuneRecipe) -> list[Setting]:
    """Every pair of an alpha and a beta, in the recipe's order; one pair: no sweep."""
    alpha = None if "alpha" in recipe.unread else recipe.alpha
    beta = math.nan if recipe.beta == "auto" else recipe.beta
    alphas = alpha if isinstance(alpha, tuple) else (alpha,)
    betas = beta if isinstance(beta, tuple) else (beta,)
    return [Setting(*pair) for pair in itertools.product(alphas, betas)]


def rungs_of(num_nodes: int, steps: int, most: int) -> list[Rung]:
    """Rungs at ..., 1/4, 1/2 and 1 of `steps`, each reached by half the nodes of the one before, rounded down.

    At most as many as halve the nodes down to one, so that few nodes are compared late rather than early.
    Raises UsageError if there are fewer steps than rungs need.
    """
    count = min(most, num_nodes.bit_length())  # log2 of the nodes, rounded down, plus 1
    rungs = [Rung(-(-steps // 2 ** (count - 1 - k)), num_nodes >> k) for k in range(count)]
    if any(rung.step == following.step for rung, following in itertools.pairwise(rungs)):
        raise UsageError(
            f"a round of {steps} steps is too short for a sweep with {count} rungs; raise finetune.images_per_round "
            "or lower finetune.sweep_rungs"
        )
    return rungs


def survivors(scores: Sequence[float], num: int) -> list[int]:
    """Positions of the `num` lowest scores, in their order in the grid; equal scores: the earlier; NaN is the worst."""
    return sorted(sorted(range(len(scores)), key=lambda i: rank(scores[i]))[:num])


def rank(score: float) -> float:
    """A score as a key to sort by, which NaN is not."""
    return math.inf if math.isnan(score) else score


def is_past_best(scores: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` scores, in the order of training, are no better than the best one before them."""
    if patience is None or not scores:
        return False
    best = min(range(len(scores)), key=lambda i: rank(scores[i]))  # of equal ones the earliest
    return len(scores) - 1 - best >= patience


def cost(nodes: Sequence[dict[str, Any]], candidates_at: Sequence[int], costs: Costs) -> tuple[int, int]:
    """What was spent on these nodes' records, and what training every node in full with all its candidates costs.

    A node that diverged costs the same either way, so its part of the full grid ends where it did.
    The fake set and the repeated scores of the round's best are shared, the same either way, and not counted.
    """
    spent = full = 0
    for node in nodes:
        end = node["stopped_at"] if node["outcome"] == "diverged" else candidates_at[-1]
        spent += node["stopped_at"] * costs.step + len(node["rungs"]) * costs.rung
        spent += len(node["candidates"]) * costs.candidate
        full += end * costs.step + sum(step <= end for step in candidates_at) * costs.candidate
    return spent, full


def fraction_spent(rounds: Sequence[dict[str, Any]]) -> float | None:
    """Share of the full grid's cost that the rounds' sweeps took; None without a sweep."""
    swept = [record for record in rounds if "cost" in record]
    return sum(record["cost"] for record in swept) / sum(record["full_cost"] for record in swept) if swept else None


def planned(rungs: Sequence[Rung], candidates_at: Sequence[int]) -> list[dict[str, Any]]:
    """Records as `cost` reads them, of a round in which no node diverges."""
    records = []
    for number in range(rungs[0].num_nodes):
        reached = [rung.step for rung in rungs if number < rung.num_nodes]
        is_finished = len(reached) == len(rungs)
        records.append(
            {
                "stopped_at": reached[-1],
                "outcome": "finished" if is_finished else "stopped",
                "rungs": [{"step": step} for step in reached if step != rungs[-1].step],
                "candidates": [{"step": step} for step in candidates_at] if is_finished else [],
            }
        )
    return records


def _short(value: float) -> str:
    """As few digits as tell the value from any other."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
