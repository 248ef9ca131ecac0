"""What `finetune-ddo` prints with `--json`, from the state of a finished run."""

from typing import Any

from ddo_cli import console
from ddo_cli.engines.ddo import report, sweep
from ddo_cli.engines.ddo.round import Chain
from ddo_cli.metrics import published


def result_of(chain: Chain, state: dict[str, Any]) -> dict[str, Any]:
    """chain: DDO's. A control is told of where there is one."""
    recipe, rounds = chain.recipe, state["rounds"]
    key, control = chain.scoring.key, chain._replace(name="control")
    if not any(record["promoted"] for record in rounds):
        console.warn(f"no round improved on the reference: {chain.final} is the reference {recipe.model.ckpt} itself")
    if ending := report.ending(recipe, rounds):
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
        **report.improvements(state, key),
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
