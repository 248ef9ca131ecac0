"""Inputs of `ddo edit`: a model with its guide, noise levels and source images, checked before anything runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddo_cli import checkpoint, console
from ddo_cli.data.images import open_images
from ddo_cli.data.items import INDEX, ItemSet, check_fits, check_images
from ddo_cli.diffusion.denoiser import DiffusionModel, as_diffusion
from ddo_cli.engines.sampling import guides
from ddo_cli.errors import DataError, UsageError
from ddo_cli.files import sha256
from ddo_cli.likelihood import NO_LABEL
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.recipe.schema import GuidanceRecipe, SamplingRecipe

DEFAULT_MODEL = "embedded:digits16"


class Editor(NamedTuple):
    """The model, a discriminator of it if there is one, and the settings of guidance; None: no guidance."""

    base: DiffusionModel
    file: checkpoint.Checkpoint
    disc: discriminators.Loaded | None
    settings: GuidanceRecipe | None

    def model(self, is_guided: bool) -> DiffusionModel:
        """The model, guided if `is_guided` and there is a discriminator with a weight."""
        if not is_guided or self.disc is None or self.settings is None:
            return self.base
        guide = guides.discriminator_guide(self.disc.network, self.settings, self.base)
        return self.base.guided_by([guide])

    def guided_by(self) -> dict[str, Any]:
        """What identifies the guide; empty without one."""
        if self.disc is None or self.settings is None:
            return {}
        return {"discriminator_sha256": self.disc.checkpoint.sha256, **self.settings.model_dump(mode="json")}

    def announce(self, spec: SamplingRecipe) -> None:
        """Prints on stderr whether there is guidance, and if not why."""
        if self.disc is None:
            how = f": no discriminator below {guides.RUNS}/ was trained against it"
        elif self.settings is None:
            how = ": its weight is 0"
        else:
            guides.warn_of_other_sampler(self.disc, spec)
            how = f", and guided by {self.disc.checkpoint.path}, weight {self.settings.dg_weight:g}"
        console.info(f"{self.file.path} edits without guidance{how}")


def choose(
    disc: str | None, ckpt: str | None, given: dict[str, Any], use_guidance: bool, *, force: bool, device: torch.device
) -> Editor:
    """The model and the discriminator, see `edit.run`. Raises UsageError or CheckpointError."""
    given = {key: value for key, value in given.items() if value is not None}
    if not use_guidance:
        if given.get("dg_weight"):
            raise UsageError(f"--no-guidance and --dg-weight {given['dg_weight']:g} contradict; leave one of them out")
        given = {"dg_weight": 0.0, "dg_weight_2nd": 0.0}
    if given.get("dg_weight") == 0:
        given["boost"] = False  # the boost stored with the discriminator would be refused at weight 0
    if disc is None:
        name = ckpt or DEFAULT_MODEL
        file = guides.newest_discriminator(sha256(checkpoint.resolve(name)))
        if file is None:
            return _without_discriminator(name, given, device)
        disc, ckpt = str(file), name
    chosen = guides.choose(disc, ckpt, given, device=device, force=force)
    is_on = chosen.settings.dg_weight or chosen.settings.dg_weight_2nd
    base = guides.diffusion_model(chosen.model)
    return Editor(base, chosen.model.checkpoint, chosen.discriminator, chosen.settings if is_on else None)


def _without_discriminator(name: str, given: dict[str, Any], device: torch.device) -> Editor:
    loaded = registry.load_model(name, device)
    kind = type(loaded.model).__name__
    base = as_diffusion(
        loaded.model, f"{name} is a {kind}; editing starts from a noise level, so it needs a diffusion model"
    )
    if given and given.get("dg_weight") != 0:
        options = ", ".join(f"{key} = {value}" for key, value in given.items())
        raise UsageError(
            f"{options} needs a discriminator, and none below {guides.RUNS}/ was trained against {name}; train one "
            f"(ddo train-disc --ckpt {name}), or give it with --disc FILE"
        )
    return Editor(base, loaded.checkpoint, None, None)


def check_levels(levels: Sequence[float], spec: SamplingRecipe, base: DiffusionModel) -> list[float]:
    """The levels in increasing order. Raises UsageError for one outside the sampler's range, or given twice."""
    low, high = base.bounds(spec)
    for sigma in levels:
        if not low < sigma <= high:
            raise UsageError(
                f"--level {sigma:g} must lie above the sampler's sigma_min = {low:g} and not above its sigma_max = "
                f"{high:g}; choose another noise level, in units of pixels in [-1, 1]"
            )
        base.check_sampling(spec.merged(sigma_max=sigma))  # of discrete steps, too few may lie below a low level
    if len({f"{sigma:g}" for sigma in levels}) < len(levels):  # as directories are named
        raise UsageError(f"--level {','.join(f'{sigma:g}' for sigma in levels)} names a level twice; leave one out")
    return sorted(levels)


def check_outside(out: Path, source: str) -> None:
    """Raises UsageError if `out` lies in the source folder, since the next run would read it as sources."""
    folder = Path(source).resolve()
    if folder.is_dir() and folder in (out.resolve(), *out.resolve().parents):
        raise UsageError(
            f"--out {out} lies inside {source}, so that the same command would take edited images for sources; choose "
            "another --out"
        )


def open_sources(source: str, num: int, label: int | None, base: DiffusionModel) -> ItemSet:
    """The first `num` images with the labels to sample with, checked to fit. Raises DataError or UsageError."""
    if len(base.codec.shape) != 3:
        raise UsageError(
            f"ddo edit needs images, and this model draws items of shape {base.codec.shape}; use another --ckpt"
        )
    if guides.prompts_of(base) is not None:
        raise UsageError("ddo edit takes no prompts, which this model draws images of; use another --ckpt")
    if label is not None and not 0 <= label < base.num_classes:
        has = f"has classes 0 to {base.num_classes - 1}" if base.num_classes else "has no classes: leave it out"
        raise UsageError(f"--label {label} is not possible; this model {has}")
    opened = open_images(source)
    check_images(opened, "give the images that are to be edited")
    check_fits(opened, base, num_classes=0)
    items, labels = opened.items[:num], opened.labels[:num]
    if not base.num_classes:
        labels = np.full(len(items), NO_LABEL)
    elif label is not None:
        labels = np.full(len(items), label)
    elif labels.min() < 0:
        raise DataError(
            f"{source} has images without label, and the model has {base.num_classes} classes; say with --label CLASS "
            f"what they are to become, or add labels ({INDEX}, or a subfolder per class)"
        )
    elif labels.max() >= base.num_classes:
        raise DataError(
            f"{source} has an image of class {labels.max()}, and the model has classes 0 to {base.num_classes - 1}; "
            "say with --label CLASS what the images are to become, or correct the labels"
        )
    return ItemSet(items, labels.astype(np.int64), source, base.num_classes)
