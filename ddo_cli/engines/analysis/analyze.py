"""`ddo analyze`: the effect of discriminator guidance on a model, in the paper's quantities (arXiv 2211.17091)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from ddo_cli import console, dist, rundir
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_fits, describe_items, digest, holds_images
from ddo_cli.data.pairs import split
from ddo_cli.engines import captions, pages
from ddo_cli.engines.analysis import analyses, report
from ddo_cli.engines.analysis.regeneration import regeneration
from ddo_cli.engines.analysis.subject import Finding, Settings, Subject
from ddo_cli.engines.sampling import guides, sample
from ddo_cli.errors import CheckpointError, DataError, UsageError, reason
from ddo_cli.files import read_json, write_json
from ddo_cli.models import registry
from ddo_cli.precision import settled
from ddo_cli.recipe.schema import Recipe, SamplingRecipe, nearest

ANALYSES: dict[str, Callable[[Subject, Settings], Finding]] = {
    "gain": analyses.gain,
    "trajectory": analyses.trajectory,
    "nfe": analyses.nfe,
    "regeneration": regeneration,
    "density": analyses.density,
}
NAMES = ("out", "discriminator", "model", "data")  # are stored but not compared: the hashes identify the content
ON_REQUEST = ("nfe",)  # takes minutes; the others take seconds


def run(
    disc: str | None,
    ckpt: str | None,
    out: Path,
    *,
    what: str | None = None,
    data: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 (immutable)
    sampling: dict[str, Any] | None = None,
    guidance: dict[str, Any] | None = None,
    force: bool = False,
    device: torch.device,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes <name>.json and <name>.png of each analysis into `out`; returns the main figures of each under its name.

    what: names between commas, or "all"; None: all that take seconds.
    data: real items that the discriminator was not trained on; None: those held out from its training.
    disc, ckpt, sampling, guidance, force: as for `guide_sample.run`.
    """
    chosen = guides.choose(disc, ckpt, guidance or {}, device=device, force=force)
    base, file = guides.diffusion_model(chosen.model), chosen.discriminator.checkpoint
    spec = sample.spec_of(chosen.model.checkpoint, **(sampling or {}))
    guides.warn_of_other_sampler(chosen.discriminator, spec)
    spec = settled(spec, device)
    recipe = _recipe_of(file)
    real, rows = _held_out(recipe, data, file.header["trained_on"].get("data_sha256"), chosen.model, file.path)
    base.check_sampling(spec)  # of a model that reads text once it is told the captions
    guide = guides.discriminator_guide(chosen.discriminator.network, chosen.settings, base)
    subject = Subject(base, guide, spec, recipe or Recipe(), real, rows, device)
    names = select(what, subject)
    _check(subject, settings, names)
    shown = {
        "out": str(out), "discriminator": file.path, "model": chosen.model.checkpoint.path,
        "dg_weight": chosen.settings.dg_weight, "data": real.name, "held_out": len(rows),
    }  # fmt: skip
    identity = {
        **shown, "discriminator_sha256": file.sha256, "model_sha256": chosen.model.checkpoint.sha256,
        "data_sha256": digest(real), "guidance": chosen.settings.model_dump(mode="json"),
        "sampling": spec.model_dump(mode="json"),
    }  # fmt: skip
    _check_place(out, identity)
    if dry_run:
        low, high = subject.window()
        plan = {"sampler": spec.sampler, "steps": spec.steps, "sigma_guided": f"{low:.3g} to {high:.3g}"}
        return {**shown, "analyses": names, **plan, "dry_run": True}
    summaries = {}
    with rundir.locked(out):
        _check_place(out, identity)
        for name in names:
            finding = ANALYSES[name](subject, settings)
            if dist.is_main():
                # The picture second: without its JSON file, a picture counts as another program's.
                write_json(out / f"{name}.json", {"analysis": name, **identity, **finding.content})
                finding.draw(out / f"{name}.png")
                console.info(f"{name}: {out / name}.png and .json")
            summaries[name] = finding.summary
        if dist.is_main():
            report.write(out)
        dist.barrier()
    return {**shown, **summaries}


def _check_place(out: Path, identity: dict[str, Any]) -> None:
    """Raises RunError unless `out` is new or holds only analyses of the same discriminator, data and settings."""
    if not dist.is_main():
        return
    files = [file for file in (out / f"{name}.json" for name in ANALYSES) if file.is_file()]
    names = [f"{file.stem}{end}" for file in files for end in (".json", ".png")]
    rundir.check_free(out, "analyses alone", [*names, pages.FILE] if files else names)
    ours = {key: value for key, value in identity.items() if key not in NAMES}
    for file in files:
        stored = read_json(file)
        rundir.check_same(f"{file} holds figures of something else", ours, {key: stored.get(key) for key in ours})


def table_of(out: Path) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """The gain by noise level, as columns and rows of a table."""
    return report.gain_table(read_json(out / "gain.json"))[1:3]


# --- What to analyse


def select(what: str | None, subject: Subject) -> list[str]:
    """The analyses to do, in the order of ANALYSES. Raises UsageError for unknown ones and those that do not apply."""
    reasons = _inapplicable(subject)
    possible = [name for name in ANALYSES if name not in reasons]
    if what is None:
        return [name for name in possible if name not in ON_REQUEST]
    asked = {name.strip() for name in what.split(",")}
    for name in sorted(asked - ANALYSES.keys() - {"all"}):
        known = f"{', '.join(ANALYSES)} between commas, or all"
        raise UsageError(f"--what {name} is not known{nearest(name, ANALYSES)}; use some of {known}")
    for name in sorted(asked & reasons.keys()):
        raise UsageError(f"--what {name} does not apply here: {reasons[name]}; use some of {', '.join(possible)}")
    return possible if "all" in asked else [name for name in possible if name in asked]


def _inapplicable(subject: Subject) -> dict[str, str]:
    """Reasons why analyses cannot be done, by name."""
    reasons = {}
    if subject.real.encoded is not None:
        reasons["regeneration"] = f"it compares images, and these data are {describe_items(subject.real)}: give --data"
        if subject.recipe.metric.ref is None:
            reasons["nfe"] = f"it scores images, and these data are {describe_items(subject.real)}: give --data"
    elif not holds_images(subject.real):
        reasons["regeneration"] = "it compares images, and these data are points"
        reasons["nfe"] = "it scores images, and these data are points, whose density is that of infinitely many steps"
    if subject.recipe.metric.name != "js":
        reasons["density"] = "it needs points of known density, as in a recipe with metric.name = js"
    elif subject.spec.s_churn:
        reasons["density"] = f"s_churn = {subject.spec.s_churn:g}, and the density exists for the ODE only"
    return reasons


def _check(subject: Subject, settings: Settings, names: list[str]) -> None:
    """Raises UsageError for what would fail after minutes, and warns of what has no effect."""
    low, high = subject.window()
    if low >= high:
        raise UsageError(
            f"guidance at VP times {subject.guide.time_min} to {subject.guide.time_max} never acts on this sampler's "
            "noise levels; change --time-min and --time-max, or sigma_min and sigma_max"
        )
    if not subject.guide.weight:
        console.warn("dg_weight is 0: guided and plain figures will be the same; the gain is still given at weight 1")
    bottom, top = subject.base.bounds(subject.spec)[0], subject.base.bounds(SamplingRecipe())[1]
    if "regeneration" in names and not bottom < settings.noise_level <= top:
        raise UsageError(
            f"--noise-level {settings.noise_level} must lie above the sampler's sigma_min = {bottom:g} and not above "
            f"the model's sigma_max = {top:g}"
        )
    for steps in settings.steps_list:
        subject.base.check_sampling(subject.spec.merged(steps=steps))


# --- Held-out data


def _recipe_of(file: Checkpoint) -> Recipe | None:
    """The recipe that trained a discriminator; None for one that `ddo train-disc` did not make."""
    link = (file.header.get("provenance") or [{}])[-1]
    if link.get("command") != "train-disc":
        return None
    try:
        return Recipe.model_validate(link["recipe"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(
            f"{file.path} holds a recipe that this version cannot read ({reason(error)}); train it again with ddo "
            "train-disc"
        ) from None


def _held_out(
    recipe: Recipe | None, data: str | None, trained_sha256: str | None, model: registry.Loaded, file: str
) -> tuple[ItemSet, np.ndarray]:
    """Real items, and the rows that the discriminator was not trained on, known by the hash of its training data.

    Raises DataError or UsageError.
    """
    if recipe is None and data is None:
        raise UsageError(f"{file} does not name the data it was trained on; give real items held out from it by --data")
    try:
        real = open_images(data or recipe.data.source, recipe.data.num if recipe and not data else None)  # type: ignore[union-attr]
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error} (the data that {file} was trained on; others can be given by --data)") from None
    if recipe is not None and digest(real) == trained_sha256:
        rows = split(len(real.items), recipe.discriminator.held_out, "real", recipe.seed).held_out
    elif data is None:
        raise DataError(
            f"{real.name} has changed since {file} was trained on it, so which items were held out is not known; give "
            "items that it has not seen by --data"
        )
    else:
        rows = np.arange(len(real.items))
        console.info(f"{data}: all {len(rows)} items are taken for held out; the gain is too large on trained ones")
    check_fits(real, captions.told(model, real).model)
    if len(rows) < 2:
        raise DataError(f"{real.name} holds {len(rows)} held-out item; a standard error needs two, and sense hundreds")
    return real, rows
