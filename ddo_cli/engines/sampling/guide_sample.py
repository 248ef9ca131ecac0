"""`ddo guide-sample`: sampling with discriminator guidance (arXiv 2211.17091)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddo_cli import console
from ddo_cli.data.samples import Format
from ddo_cli.diffusion import samplers
from ddo_cli.engines.sampling import diffrs, guides, sample
from ddo_cli.engines.sampling.guides import Others
from ddo_cli.errors import UsageError
from ddo_cli.precision import settled
from ddo_cli.recipe.schema import GuidanceRecipe


def run(
    disc: str | None,
    ckpt: str | None,
    seeds: Sequence[int],
    out: Path,
    *,
    form: Format | None = None,
    classes: Sequence[int] | None = None,
    prompts: tuple[Sequence[str], str | None] = ((), None),
    sampling: dict[str, Any] | None = None,
    guidance: dict[str, Any] | None = None,
    others: Others = Others(),  # noqa: B008 (immutable)
    rejection: diffrs.Options | None = None,
    force: bool = False,
    device: torch.device,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Draws one guided item per seed into `out` and returns the object that `guide-sample --json` prints.

    disc: None: the newest discriminator below runs/; ckpt: None: the model that it was trained against.
    guidance: values of GuidanceRecipe that override those stored with the discriminator.
    prompts: as `sample.with_prompts` takes them.
    rejection: DiffRS in place of guidance by the gradient.
    With weight 0 and no other guide the items are those of `ddo sample`, bit for bit.
    """
    given = guidance or {}
    chosen = guides.choose(disc, ckpt, given, device=device, force=force)
    chosen = chosen._replace(model=sample.with_prompts(chosen.model, *prompts))
    base = guides.diffusion_model(chosen.model)
    file, settings = chosen.discriminator.checkpoint, chosen.settings
    spec = sample.spec_of(chosen.model.checkpoint, **(sampling or {}))
    if rejection is not None:
        diffrs.check(given, others != Others())
    else:
        _check_effect(settings, given, spec.sampler)
    guides.warn_of_other_sampler(chosen.discriminator, spec)
    if warning := guides.harm(file.header.get("heldout", {}).get("gain")):
        console.warn(warning)
    if rejection is not None:
        network = chosen.discriminator.network
        by_rejection, figures = diffrs.guide(
            base, guides.discriminator_guide(network, settings, base).potential, settings, rejection,
            settled(spec, device), out, classes=classes, device=device, dry_run=dry_run,
        )  # fmt: skip
        record = {"discriminator_sha256": file.sha256, "diffrs": figures}
        console.info(f"{chosen.model.checkpoint.path} with states rejected by {file.path}")
        drawn = sample.run(
            chosen.model._replace(model=base.guided_by([by_rejection])), seeds, out, form=form, classes=classes,
            sampling=sampling, guidance=record, device=device, title="sampling with rejection", dry_run=dry_run,
        )  # fmt: skip
        return {**drawn, "discriminator": file.path, "guidance": record}
    inner, record = guides.other_guides(others, base, device)
    guide = guides.discriminator_guide(chosen.discriminator.network, settings, base)
    guides.check_acts(base, guide, spec)
    record |= {"discriminator_sha256": file.sha256, **settings.model_dump(mode="json")}
    console.info(f"{chosen.model.checkpoint.path} guided by {file.path}, weight {settings.dg_weight:g}")
    every = guides.joined(inner, others, guide, chosen.discriminator.network, base)
    guided = chosen.model._replace(model=base.guided_by(every))
    drawn = sample.run(
        guided, seeds, out, form=form, classes=classes, sampling=sampling,
        guidance=record, device=device, title="guided sampling", dry_run=dry_run,
    )  # fmt: skip
    return {**drawn, "discriminator": file.path, "dg_weight": settings.dg_weight, "guidance": record}


def _check_effect(settings: GuidanceRecipe, given: dict[str, Any], sampler: str | None) -> None:
    """Raises UsageError for options that have no effect with the others."""
    if given.get("dg_weight_2nd") and not samplers.find(sampler).has_corrector:
        raise UsageError(f"--dg-weight-2nd is of heun's correctors, and sampler {sampler} has none; leave it out")
    for key in ("boost_churn_period", "boost_weight_period", "boost_churn"):
        if given.get(key) is not None and not settings.boost:
            raise UsageError(f"--{key.replace('_', '-')} {given[key]} has no effect without --boost; add it")
