"""`ddo sample`: a sample set on disk, each item a function of its own seed."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

from ddo_cli import console, dist, ledger, rundir
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.data.samples import Format, Writer, read_manifest, spell_seeds
from ddo_cli.engines.panel import what_and_where
from ddo_cli.errors import CheckpointError, UsageError, printable
from ddo_cli.generation import Batch, check_channels, check_labels, generate, num_batches, on_device
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.precision import settled
from ddo_cli.recipe.schema import SamplingRecipe, messages
from ddo_cli.report import pictures

GRID_ITEMS = 64
Keep = Literal["images", "encoded", "latents"]


def run(
    ckpt: str | Path | registry.Loaded,
    seeds: Sequence[int],
    out: Path,
    *,
    form: Format | None = None,
    classes: Sequence[int] | None = None,
    sampling: dict[str, Any] | None = None,
    guidance: dict[str, Any] | None = None,
    keep: Keep = "images",
    device: torch.device,
    title: str = "sampling",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Draws one item per seed into `out` and returns the object that `sample --json` prints.

    sampling: values of SamplingRecipe that override the checkpoint's.
    form: None: png for images, npz for points.
    guidance: what identifies the guides that steer the model, for the set's manifest.
    keep: the form in which examples are kept, see `kept_of_fakes`; all but images are for training and go into shards.
    Continues a set that an earlier run left unfinished; does nothing to a finished one.
    """
    model, file = ckpt if isinstance(ckpt, registry.Loaded) else registry.load_model(ckpt, device)
    spec = checked(model, file, seeds, classes, sampling or {}, device)
    form = form or ("png" if len(model.codec.shape) == 3 else "npz")
    if form == "png" and len(model.codec.shape) != 3:
        raise UsageError(
            f"--format png needs images; this model draws items of shape {model.codec.shape}: use shards or npz"
        )
    if keep != "images" and form != "shards":
        raise ValueError(f"{keep} examples are kept in shards only, not as {form}")
    model.codec.encoder_id()  # loads a separate autoencoder now, before anything is drawn
    decoder = "" if keep == "latents" else model.codec.decoder_id()
    made_by: dict[str, Any] = {
        "checkpoint_sha256": file.sha256,
        "sampling": spec.model_dump(mode="json"),
        "classes": list(classes) if classes else None,
        **_prompts_of(file),
        **({"seeds_as_given": spell_seeds(seeds)} if spec.labels == "position" else {}),  # which the labels follow
        **({"guidance": guidance} if guidance else {}),
        **({"decoder": decoder} if decoder else {}),
        **({keep: True} if keep != "images" else {}),
    }
    writer = Writer(out, form, seeds, spec.batch, made_by)
    writer.out_dir.check()
    place = out if out.name else out.resolve()  # "." has no name of its own
    # The contact sheet lies next to the set's directory: inside, other programs would read it as a sample.
    grid = place.with_name(f"{place.name}-grid.png")
    if dist.is_main() and not read_manifest(out):
        pictures.check_replaceable(grid)
    result = {"out": str(out), "num_images": len(seeds), "checkpoint_sha256": file.sha256, "sampler": spec.sampler}
    result["precision"] = spec.precision
    if dry_run:
        return {**result, "batches": num_batches(len(seeds), spec.batch), "nfe": model.passes(spec), "dry_run": True}
    warn_if_never_unconditional(file, spec)
    if spec.precision != "float32":
        console.info(f"{title}: precision {spec.precision}")
    draw = partial(drawn, model, spec=spec, classes=classes, as_given=seeds, device=device)
    with rundir.locked(out):
        writer.out_dir.claim()
        # Files appear while processes read the directory, so the main process decides what is missing.
        missing, complete = dist.from_main((writer.missing(), writer.complete()))
        there = f"all {len(seeds):,} items are there, in {out}"
        console.info(f"{title}: {there if complete else what_and_where(model, device, out)}")
        speed = 0.0 if complete else _draw(partial(draw, keep=keep), writer, missing, title)
        manifest = complete or writer.finish()
        if dist.is_main() and not (complete and grid.is_file()):
            batches = draw(writer.seeds[:GRID_ITEMS], keep="images")
            pictures.contact_sheet(np.concatenate([batch.items.numpy() for batch in batches]), grid)
            if (kept := ledger.of(out)) is not None:
                kept.note({grid: grid}, is_new=True)
    return {
        **result,
        "nfe": manifest["nfe"],
        **({"disc_nfe": manifest["disc_nfe"]} if {"discriminator_sha256", "classifier"} & set(guidance or ()) else {}),
        **(_summary(manifest["cost"]) if "cost" in manifest else {}),
        "images_per_second": round(speed, 2),
        "seeds": manifest["seeds"],
        "grid": str(grid),
    }


def _prompts_of(file: Checkpoint) -> dict[str, Any]:
    """The prompts of the labels, of a model that reads text, for the set's manifest."""
    options = file.header["config"]["options"]
    return {key: options[key] for key in ("prompts", "negative_prompt") if "prompts" in options}


def _summary(cost: dict[str, list[int]]) -> dict[str, Any]:
    """What images have cost where it differs: the largest number of evaluations, rejections of an image on average, and
    images at the bound. The manifest has it for each image.
    """
    rejections = sum(cost["rejections"]) / len(cost["rejections"])
    return {"nfe_max": max(cost["nfe"]), "rejections": round(rejections, 2), "at_bound": sum(cost["at_bound"])}


def checked(
    model: LikelihoodModel,
    file: Checkpoint,
    seeds: Sequence[int],
    classes: Sequence[int] | None,
    sampling: dict[str, Any],
    device: torch.device,
) -> SamplingRecipe:
    """The settings by which these seeds are drawn. Raises UsageError if the model cannot be sampled so."""
    spec = on_device(model, settled(spec_of(file, **sampling), device), device)
    model.check_sampling(spec)
    check_channels(model.codec.shape)
    check_labels(spec, model.num_classes, len(seeds), classes)
    if classes and not model.num_classes:
        raise UsageError(f"--classes {','.join(map(str, classes))} needs a class-conditional model; leave it out")
    for value in classes or ():
        if not 0 <= value < model.num_classes:
            raise UsageError(f"--classes {value} is out of range; this model has classes 0 to {model.num_classes - 1}")
    return spec


def with_prompts(loaded: registry.Loaded, texts: Sequence[str], negative: str | None) -> registry.Loaded:
    """The model with these prompts; () and None: those that its file holds. Raises UsageError for one without text."""
    if not texts and negative is None:
        return loaded
    options = loaded.checkpoint.header["config"]["options"]
    kept = options.get("prompts", ()), options.get("negative_prompt", "")
    return registry.told(loaded, texts or kept[0], kept[1] if negative is None else negative)


def spec_of(file: Checkpoint, **given: Any) -> SamplingRecipe:
    """The checkpoint's sampling settings, overridden by the given values that are not None. Raises CheckpointError."""
    try:
        stored = SamplingRecipe(**file.header.get("sampling", {}))
    except ValidationError as error:
        problems = "; ".join(messages(error, "sampling", {}))
        raise CheckpointError(
            f"{file.path} has a damaged header ({printable(problems)}); copy the file again"
        ) from None
    return stored.merged(**given)


def warn_if_never_unconditional(file: Checkpoint, spec: SamplingRecipe) -> None:
    """Warns of classifier-free guidance with a model that was never trained without labels."""
    if spec.cfg_scale not in (None, 1.0) and not file.header["config"]["draw"].get("label_dropout"):
        console.warn(
            f"cfg_scale = {spec.cfg_scale}: this model was trained without dropping labels (label_dropout 0), so its "
            "unconditional half was never trained"
        )


def _draw(draw: Callable[..., Iterator[Batch]], writer: Writer, missing: list[int], title: str) -> float:
    """Draws and stores the missing batches; returns items per second. draw: `drawn`, of seeds and batch numbers."""
    numbers = dist.shard(missing)
    done = len(writer.seeds) - len(missing) * writer.batch
    if done > 0:
        console.info(f"{writer.out}: continues, {done} of {len(writer.seeds)} items are there")
    drawn, start = 0, time.monotonic()
    with console.progress(title, min(len(numbers) * writer.batch, len(writer.seeds)), "items") as bar:
        for batch in draw(writer.seeds, only=numbers):
            writer.write(batch)
            drawn += len(batch.items)
            bar.advance(len(batch.items))
    return sum(dist.gathered(drawn)) / max(time.monotonic() - start, 1e-9)


def drawn(
    model: LikelihoodModel, seeds: Sequence[int], spec: SamplingRecipe, keep: Keep, device: torch.device, **more: Any
) -> Iterator[Batch]:
    """The batches of `generate`, with examples in the form that the set keeps: see `kept_of_fakes`."""
    for batch in generate(model, seeds, spec, batch=spec.batch, as_latents=keep == "latents", device=device, **more):
        if keep == "encoded":
            with torch.no_grad():
                batch = batch._replace(items=model.codec.latents(batch.items.to(device)).cpu())
        yield batch


def kept_of_fakes(model: LikelihoodModel, fake_as: str | None, spec: SamplingRecipe) -> Keep:
    """The form in which a fake set keeps examples: "latents", x itself (float32 or int32); "encoded", images encoded by
    the model's frozen encoder, once instead of at each visit; "images", where the model has no encoder.

    fake_as: latents or images; None: the model's choice for training.
    Raises UsageError for latents if the model takes none as items, or if its sampler draws none.
    """
    if (fake_as or model.codec.fake_as) != "latents":
        return "encoded" if model.codec.latent_shapes else "images"
    if tuple(model.codec.state_shape) not in model.codec.latent_shapes:
        raise UsageError(
            "fake_as = latents keeps what a model draws before it is decoded, and this model draws its items as they "
            "are; use images, or leave it out"
        )
    if spec.smooth:
        raise UsageError(
            "sampling.smooth = true draws mixtures of codes, which are no tokens: fake_as = latents cannot keep them; "
            "use fake_as = images"
        )
    return "latents"
