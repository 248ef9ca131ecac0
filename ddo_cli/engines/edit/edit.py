"""`ddo edit`: image to image by SDEdit (arXiv 2108.01073), with and without discriminator guidance.

Source images are noised to an intermediate level and sampled from there. A higher level brings the result closer to the
model's data (smaller distance) and further from the source (lower PSNR); discriminator guidance should improve that
trade-off (arXiv 2211.17091, Fig. 10). All levels, with and without guidance, share each image's noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddo_cli import compilation, console, dist, rundir
from ddo_cli.data.items import ItemSet, digest
from ddo_cli.data.samples import Format, Writer
from ddo_cli.engines.edit import inputs as edit_inputs
from ddo_cli.engines.edit import report as edit_report
from ddo_cli.engines.edit.inputs import Editor
from ddo_cli.engines.edit.report import Way
from ddo_cli.engines.sampling import sample
from ddo_cli.files import write_json
from ddo_cli.generation import Batch, num_batches
from ddo_cli.precision import inference_precision, settled
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import seed_from, seeded

STATE = "edit.json"
RESULTS = ("request", "source", "figures")  # keys that are no settings


def run(
    source: str,
    out: Path,
    levels: Sequence[float],
    *,
    num: int = 64,
    disc: str | None = None,
    ckpt: str | None = None,
    guidance: dict[str, Any] | None = None,
    use_guidance: bool = True,
    label: int | None = None,
    seed: int = 0,
    form: Format = "png",
    sampling: dict[str, Any] | None = None,
    ref: str | None = None,
    weights: str | None = None,
    extractor: str | None = None,
    force: bool = False,
    device: torch.device,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Edits the first `num` images of `source` from each noise level into `out`; returns the object of `edit --json`.

    disc: None: the newest discriminator below runs/ that was trained against the model; if there is none, no guidance.
    ckpt: None: the model that `disc` was trained against, or the embedded one.
    guidance: values of GuidanceRecipe that override the discriminator's; use_guidance False: weight 0.
    label: translate every image to this class; None: the labels of the source, where the model has classes.
    ref, weights, extractor: as for `fid.run`; ref None: the data that the discriminator was trained on.
    Sets of an earlier run with the same settings are kept; levels may be added.
    """
    editor = edit_inputs.choose(disc, ckpt, guidance or {}, use_guidance, force=force, device=device)
    base, has_guide = editor.base, editor.settings is not None
    asked = sample.spec_of(editor.file, **(sampling or {}))
    spec = settled(asked, device)
    editor.model(is_guided=has_guide).check_sampling(spec)
    levels = edit_inputs.check_levels(levels, spec, base)
    edit_inputs.check_outside(out, source)
    sources = edit_inputs.open_sources(source, num, label, base)
    ways = [Way(sigma, is_guided) for sigma in levels for is_guided in ((False, True) if has_guide else (False,))]
    made_by = {
        "checkpoint_sha256": editor.file.sha256, "sampling": spec.model_dump(mode="json"), "seed": seed,
        "label": label, "source_sha256": digest(sources), "num": len(sources.items), "format": form,
    }  # fmt: skip
    writers = {way: _writer(out, way, made_by, editor) for way in ways}
    out_dir = rundir.OutDir(out, STATE, made_by, "edited images", "other edited images", RESULTS)
    for claimed in (out_dir, *(writer.out_dir for writer in writers.values())):
        claimed.check()
    target = edit_report.open_target(ref, editor.disc, weights, extractor, sources, device)
    editor.announce(asked)
    sample.warn_if_never_unconditional(editor.file, spec)
    if label is not None and ref is None:
        console.warn(f"the distance is to all classes of {target.name}; give images of class {label} alone by --ref")
    shown = {
        "out": str(out), "num_images": len(sources.items), "source": source, "model": editor.file.path,
        "checkpoint_sha256": editor.file.sha256, "discriminator": editor.disc.checkpoint.path if editor.disc else None,
        "dg_weight": editor.settings.dg_weight if editor.settings else 0.0, "metric": target.extractor.key,
        "extractor": target.extractor.name, "reference": target.name,
    }  # fmt: skip
    if dry_run:
        plan = [{"sigma": way.sigma, "time": way.time, "guided": way.is_guided} for way in ways]
        batches = len(ways) * num_batches(len(sources.items), spec.batch)
        return {**shown, "levels": plan, "batches": batches, "steps": spec.steps, "dry_run": True}
    request = {"levels": levels, "guidance": editor.guided_by(), **target.identity}
    pictures = edit_report.pictures_of(out, len(sources.items))
    with rundir.locked(out):
        state = out_dir.claim()
        for writer in writers.values():
            writer.out_dir.claim()
        manifests = {way: dist.from_main(writer.complete()) for way, writer in writers.items()}
        is_whole = all(manifests.values()) and all(Path(path).is_file() for path in pictures.values())
        if dist.from_main(is_whole and state.get("request") == request):
            console.info(f"{out} is finished; nothing to do")
            return {**shown, **state["figures"], **pictures}
        complete = {
            way: manifests[way] or _draw(editor, spec, sources, seed, device, way, writer)
            for way, writer in writers.items()
        }
        figures = edit_report.write(out, sources.items, complete, target, spec.batch)
        if dist.is_main():
            write_json(out / STATE, {**made_by, "request": request, "source": source, "figures": figures})
        dist.barrier()
    return {**shown, **figures, **pictures}


def _writer(out: Path, way: Way, made_by: dict[str, Any], editor: Editor) -> Writer:
    """The sample set of one way; its "seeds" are the numbers of the source images."""
    form, num, sampling = made_by["format"], made_by["num"], made_by["sampling"]
    made_by = {**made_by, "sampling": {**sampling, "sigma_max": way.sigma}}
    made_by |= {"guidance": editor.guided_by()} if way.is_guided else {}
    return Writer(out / way.name, form, range(num), sampling["batch"], made_by)


@torch.no_grad()
def _draw(
    editor: Editor, spec: SamplingRecipe, sources: ItemSet, seed: int, device: torch.device, way: Way, writer: Writer
) -> dict[str, Any]:
    """Edits and stores the missing batches; returns the set's manifest.

    Batches are cut as `generate` cuts seeds, for the same reasons.
    The noise of an image is a function of its number and the seed. It differs from that of `ddo sample` for the same
    number: a source image that was itself drawn from this noise would not be independent of it.
    """
    spec, model, total = spec.merged(sigma_max=way.sigma), editor.model(way.is_guided), len(sources.items)
    if compilation.is_on(spec.compile, device):
        compilation.compile_network(model)
    numbers = dist.shard(dist.from_main(writer.missing()))
    num_here = sum(min(spec.batch, total - number * spec.batch) for number in numbers)
    with console.progress(way.title, num_here, "images") as bar:
        for number in numbers:
            rows = list(range(number * spec.batch, min((number + 1) * spec.batch, total)))
            padded = rows + [rows[-1]] * (min(spec.batch, total) - len(rows))
            x0 = model.codec.encode(torch.from_numpy(sources.items[padded]).to(device))
            label = torch.from_numpy(sources.labels[padded])
            rng = seeded([seed_from("edit", seed, row) for row in padded], spec.rng)
            with inference_precision(spec.precision, device):
                sampled = model.sample(label.to(device), rng, spec, x0)
            items = model.codec.decode(sampled.x).cpu()[: len(rows)]
            batch = Batch(number, items, label[: len(rows)], torch.tensor(rows), sampled.nfe, sampled.disc_nfe)
            writer.write(batch)
            bar.advance(len(rows))
    return writer.finish()
