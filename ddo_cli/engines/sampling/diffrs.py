"""DiffRS for `ddo guide-sample` (arXiv 2405.17880): its settings, and its limits, from a pilot set of fixed seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddo_cli import console, dist
from ddo_cli.data.samples import read_manifest
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.diffusion.guidance import Potential
from ddo_cli.diffusion.rejection import Limits, Rejection
from ddo_cli.errors import UsageError
from ddo_cli.generation import generate, num_batches
from ddo_cli.recipe.schema import GuidanceRecipe, SamplingRecipe

# Half of the published warm-up's ten batches of 100; our choice. Beyond the seeds of scores and of training sets.
PILOT_SEEDS = range(3_000_000, 3_000_512)
MAX_PASSES = 3  # times the evaluations of an image without rejection: 105 of 35, as published for CIFAR-10
BY_GRADIENT = ("dg_weight", "dg_weight_2nd", "decay", "boost", "boost_churn_period", "boost_weight_period")


class Options(NamedTuple):
    """percentile: of the limits, in [0, 1]; max_nfe: None: MAX_PASSES times an image without rejection."""

    percentile: float = 0.75
    max_nfe: int | None = None


def check(given: dict[str, Any], has_other_guides: bool) -> None:
    """Raises UsageError for guidance by a gradient: the discriminator's ratio is that to the plain model."""
    for key in BY_GRADIENT:
        if given.get(key):
            option = f"--{key.replace('_', '-')}"
            raise UsageError(
                f"{option} is of guidance by the discriminator's gradient, and --diffrs rejects by its value, which "
                "compares data with the plain model's samples; leave one of them out"
            )
    if has_other_guides:
        raise UsageError(
            "--diffrs compares data with the plain model's samples, so no other guide may change them; leave "
            "--guide-ckpt and --classifier out"
        )


def guide(
    base: DiffusionModel,
    potential: Potential,
    settings: GuidanceRecipe,
    options: Options,
    spec: SamplingRecipe,
    out: Path,
    *,
    classes: Sequence[int] | None,
    device: torch.device,
    dry_run: bool,
) -> tuple[Rejection, dict[str, Any]]:
    """The guide, and what a sample set's manifest records of it.

    The limits are those of the set in `out`, if it was begun with the same settings; else they are estimated.
    """
    max_nfe = options.max_nfe or MAX_PASSES * base.passes(spec)
    unlimited = Rejection(potential, None, settings.time_min, settings.time_max, max_nfe)
    base.guided_by([unlimited]).check_sampling(spec)
    record: dict[str, Any] = {
        "percentile": options.percentile, "max_nfe": max_nfe, "time_min": settings.time_min,
        "time_max": settings.time_max, "pilot": len(PILOT_SEEDS),
    }  # fmt: skip
    size = len(base.sigmas(spec))
    limits = dist.from_main(_known(out, record, size) if dist.is_main() else None)
    if limits is None and not dry_run:
        limits = _estimated(base, unlimited, options.percentile, spec, classes, device)
    if limits is not None:
        rows = {name: column.tolist() for name, column in limits._asdict().items()}
        # NaN, where nothing is tested, is not JSON.
        record["limits"] = {name: [None if v != v else v for v in values] for name, values in rows.items()}
    return Rejection(potential, limits, settings.time_min, settings.time_max, max_nfe), record


def _known(out: Path, record: dict[str, Any], size: int) -> Limits | None:
    """The limits that a set with the same settings was begun with."""
    try:
        stored = read_manifest(out)["guidance"]["diffrs"]
        values = [[float("nan") if v is None else float(v) for v in stored["limits"][name]] for name in Limits._fields]
    except (KeyError, TypeError, ValueError):
        return None
    is_same = {key: stored.get(key) for key in record} == record and all(len(column) == size for column in values)
    return Limits(*(torch.tensor(column, dtype=torch.float64) for column in values)) if is_same else None


def _estimated(
    base: DiffusionModel,
    unlimited: Rejection,
    percentile: float,
    spec: SamplingRecipe,
    classes: Sequence[int] | None,
    device: torch.device,
) -> Limits:
    """Percentiles over the pilot set; equal on every process."""
    model, parts = base.guided_by([unlimited]), []
    numbers = dist.shard(range(num_batches(len(PILOT_SEEDS), spec.batch)))
    with console.progress("pilot set of DiffRS", len(numbers), "batches") as bar:
        for number in numbers:
            only = [number]
            (drawn,) = generate(model, PILOT_SEEDS, spec, batch=spec.batch, classes=classes, only=only, device=device)
            assert unlimited.log_ratio is not None
            parts.append((number, unlimited.log_ratio[: len(drawn.items)]))
            bar.advance()
    every = dict(part for rank in dist.gathered(parts) for part in rank)
    return Limits.of(torch.cat([every[number] for number in sorted(every)]), percentile)
