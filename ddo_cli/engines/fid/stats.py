"""`ddo stats`: feature statistics of an image set, as a reference for `ddo fid`; the file names their extractor."""

from pathlib import Path
from typing import Any

import torch

from ddo_cli import console, dist
from ddo_cli.data.pictures import Preparation
from ddo_cli.data.stream import ImageStream, open_stream
from ddo_cli.engines.fid import one_pass
from ddo_cli.engines.fid.one_pass import Wanted
from ddo_cli.errors import CheckpointError, DataError, UsageError
from ddo_cli.metrics import references
from ddo_cli.metrics.extractors.base import Extractor, Mode
from ddo_cli.metrics.extractors.select import Metric, select_extractor
from ddo_cli.metrics.uncertainty import merged
from ddo_cli.recipe.load import differing_keys

KINDS = ("pool", "spatial")  # of features whose moments are kept, where the extractor has them


def run(
    data: str,
    out: Path,
    *,
    metric: Metric = "fid",
    weights: str | None = None,
    extractor: str | None = None,
    features: bool = False,
    mode: Mode = "legacy",
    num: int | None = None,
    resize: tuple[int, int] | None = None,
    batch: int = 256,
    device: torch.device,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes mean and covariance of the features of `data` to `out`, and returns what they describe.

    metric, weights, extractor, mode: as `select_extractor` takes them; features: whether each image's pool features are
    kept too (4 N F bytes), for KID, precision and recall; num: use so many images; resize: width and height, where
    sizes are mixed. Images are shared out over the processes that torchrun started. An `out` of the same images and
    extractor is left as it is, any other refused.
    Raises DataError, CheckpointError or UsageError for what cannot be used.
    """
    if out.suffix.lower() != ".safetensors" or out.is_dir():
        raise UsageError(
            f"--out {out} must be a file that ends in .safetensors, such as {out.with_suffix('')}.safetensors"
        )
    chosen = select_extractor(metric, weights, extractor, device, mode=mode)
    preparation = Preparation(*resize) if resize else None
    stream = open_stream(data, num, preparation)
    if stream.num < 2:
        raise DataError(f"{data} holds one image; a covariance needs at least two, and thousands to mean something")
    protocol = chosen.protocol()
    described = {"name": data, "num_images": stream.num, "num_classes": stream.num_classes, "shape": list(stream.shape)}
    described["resize"] = preparation.protocol if preparation else None
    result = {
        "out": str(out), "metric": chosen.key, "num_images": stream.num, "features": features, **protocol,
        "extractor_sha256": chosen.sha256, **({"resize": described["resize"]} if preparation else {}),
    }  # fmt: skip
    if out.exists():
        return {**result, "data_digest": _unchanged(out, stream, batch, chosen, {**described, "features": features})}
    if dry_run:
        return result
    if stream.num <= chosen.num_features:
        console.warn(
            f"{data}: {stream.num} images for {chosen.num_features} features leave the covariance rank-deficient, and "
            "distances from it far too large; use more images"
        )
    wanted = Wanted(chosen, moments=tuple(kind for kind in KINDS if kind in chosen.outputs), features=features)
    # Without the cache: `out` itself keeps the features.
    (taken,), inspection, _ = one_pass.run(
        stream, [wanted], f"features of {data}", batch=batch, workers=None, device=device, cache=False
    )
    for warning in inspection.warnings(data):
        console.warn(warning)
    described["digest"] = inspection.digest()
    if dist.is_main():
        moments = {kind: merged(chunks.result()).statistics() for kind, chunks in taken.moments.items()}
        stored = {} if taken.features is None else {"pool": taken.features.result()}
        references.save_reference(out, moments, stored, metric=chosen.key, protocol=protocol, data=described)
    return {**result, "data_digest": described["digest"]}


def _unchanged(out: Path, stream: ImageStream, batch: int, extractor: Extractor, described: dict[str, Any]) -> str:
    """The digest of the images, if `out` is of the same ones and of this extractor. Raises UsageError otherwise."""
    try:
        held = references.read_reference(out)
        held.statistics(extractor)
    except (DataError, CheckpointError) as error:
        raise UsageError(f"--out {out} exists and is of something else ({error}); choose another name") from None
    theirs = {**(held.data or {}), "features": "pool" in held.shapes}
    ours = {key: value for key, value in described.items() if key != "name"}  # which differs for a folder and its zip
    lines = differing_keys(ours, {key: theirs.get(key) for key in ours})
    if not lines:
        workers = stream.default_workers(extractor.device, batch)
        digest: str = dist.from_main(stream.digest(batch, workers) if dist.is_main() else "")
        lines = differing_keys({"digest": digest}, {"digest": theirs.get("digest")})
    if lines:
        raise UsageError(
            f"--out {out} exists and is of other images (there -> here): {'; '.join(lines)}; choose another name, or "
            "remove it"
        )
    console.info(f"{out} is finished; nothing to do")
    return digest
