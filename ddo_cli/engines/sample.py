"""`ddo sample`: a sample set on disk, each item a function of its own seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddo_cli import console, dist, pictures, rundir
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.data.samples import Format, Writer
from ddo_cli.diffusion.guidance import Guide
from ddo_cli.errors import UsageError
from ddo_cli.files import sweep
from ddo_cli.likelihood import LikelihoodModel, generate, num_batches
from ddo_cli.models import registry
from ddo_cli.schema import SamplingRecipe

GRID_ITEMS = 64


def run(
    ckpt: str | Path | registry.Loaded,
    seeds: Sequence[int],
    out: Path,
    *,
    form: Format | None = None,
    classes: Sequence[int] | None = None,
    sampling: dict[str, Any] | None = None,
    guides: Sequence[Guide] = (),
    guidance: dict[str, Any] | None = None,
    device: torch.device,
    title: str = "sampling",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Draws one item per seed into `out` and returns what layout promises of `sample --json`.

    sampling: values of SamplingRecipe in place of the checkpoint's own.
    form: None: png for images, npz for points.
    guides: applied to the model; guidance: what identifies them, for the set's manifest.
    Continues a set that an earlier run left unfinished; a finished one is left as it is.
    """
    model, file = ckpt if isinstance(ckpt, registry.Loaded) else registry.load_model(ckpt, device)
    spec = spec_of(file, **(sampling or {}))
    model.check_sampling(spec)
    model.check_guides(spec, guides)
    _check_classes(model, classes, spec)
    form = form or ("png" if len(model.shape) == 3 else "npz")
    if form == "png" and len(model.shape) != 3:
        raise UsageError(f"--format png needs images; this model draws items of shape {model.shape}: use shards or npz")
    made_by = {
        "checkpoint_sha256": file.sha256,
        "sampling": spec.model_dump(mode="json"),
        "classes": list(classes) if classes else None,
        **({"guidance": guidance} if guidance else {}),
    }
    found = {"out": str(out), "num_images": len(seeds), "checkpoint_sha256": file.sha256, "sampler": spec.sampler}
    if dry_run:
        return {**found, "batches": num_batches(len(seeds), spec.batch), "steps": spec.steps, "dry_run": True}
    warn_if_never_unconditional(model, spec)
    with rundir.locked(out):
        if dist.is_main():
            sweep(out)
        writer = Writer(out, form, seeds, spec.batch, made_by)
        # Files appear while processes read the directory: what is missing is for the main process to say.
        missing = dist.from_main(writer.missing())
        manifest = dist.from_main(writer.complete())
        speed = 0.0
        is_new = manifest is None
        if manifest is None:
            speed = _draw(model, writer, missing, spec, classes, guides, device, title)
            manifest = writer.finish()
        grid = grid_path(out)
        if dist.is_main() and (is_new or not grid.is_file()):
            first = writer.seeds[:GRID_ITEMS]
            made = generate(model, first, spec, batch=spec.batch, classes=classes, guides=guides, device=device)
            pictures.contact_sheet(np.concatenate([batch.items.numpy() for batch in made]), grid)
    return {
        **found,
        "nfe": manifest["nfe"],
        **({"disc_nfe": manifest["disc_nfe"]} if guides else {}),
        "images_per_second": round(speed, 2),
        "seeds": manifest["seeds"],
        "grid": str(grid),
    }


def spec_of(file: Checkpoint, **given: Any) -> SamplingRecipe:
    """The checkpoint's own sampling settings, with the given values that are not None in their place."""
    return SamplingRecipe(**file.header.get("sampling", {})).merged(**given)


def warn_if_never_unconditional(model: LikelihoodModel, spec: SamplingRecipe) -> None:
    """Warns of classifier-free guidance with a model that has always seen labels."""
    if spec.cfg_scale not in (None, 1.0) and not model.draw_options.label_drop:
        console.warn(
            f"cfg_scale = {spec.cfg_scale}: this model was trained without dropping labels (label_drop 0), so its "
            "unconditional half was never trained"
        )


def grid_path(out: Path) -> Path:
    """The contact sheet of a set: beside its directory, where no other program takes it for a sample."""
    place = out if out.name else out.resolve()  # "." has no name of its own
    return place.with_name(f"{place.name}-grid.png")


def _draw(
    model: LikelihoodModel,
    writer: Writer,
    missing: list[int],
    spec: SamplingRecipe,
    classes: Sequence[int] | None,
    guides: Sequence[Guide],
    device: torch.device,
    title: str,
) -> float:
    """Draws and stores the missing batches; returns items per second."""
    own = dist.shard(missing)
    done = len(writer.seeds) - len(missing) * spec.batch
    if done > 0:
        console.info(f"{writer.out}: continues, {done} of {len(writer.seeds)} items are there")
    drawn, start = 0, time.monotonic()
    with console.progress(title, min(len(own) * spec.batch, len(writer.seeds)), "items") as bar:
        made = generate(
            model, writer.seeds, spec, batch=spec.batch, classes=classes, guides=guides, only=own, device=device
        )
        for batch in made:
            writer.write(batch)
            drawn += len(batch.items)
            bar.advance(len(batch.items))
    return sum(dist.gathered(drawn)) / max(time.monotonic() - start, 1e-9)


def _check_classes(model: LikelihoodModel, classes: Sequence[int] | None, spec: SamplingRecipe) -> None:
    if spec.labels == "random" and (classes or not model.num_classes):
        why = "--classes chooses them" if classes else "this model has no classes"
        raise UsageError(f"sampling.labels = random: {why}; leave it out")
    if not classes:
        return
    if not model.num_classes:
        raise UsageError(f"--classes {','.join(map(str, classes))} needs a class-conditional model; leave it out")
    for value in classes:
        if not 0 <= value < model.num_classes:
            raise UsageError(f"--classes {value} is out of range; this model has classes 0 to {model.num_classes - 1}")
