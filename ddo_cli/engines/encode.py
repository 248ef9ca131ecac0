"""`ddo encode`: encodes an image set with a model's frozen encoder, once for all later training runs."""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddo_cli import console, dist, rundir
from ddo_cli.checkpoint import write_tensors
from ddo_cli.data import latents
from ddo_cli.data.inspection import LIMBS, Inspection
from ddo_cli.data.items import describe, wrong_shape
from ddo_cli.data.stream import ImageStream, open_stream
from ddo_cli.engines import captions
from ddo_cli.errors import DataError, RunError, UsageError
from ddo_cli.files import read_json, write_json
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.models.diffusers import texts

# Keys of a manifest that are no settings. The images may have moved, then those that are encoded are compared.
RESULTS = ("complete", "shards", "source_digest", "source", "source_identity")
TIMED = 8  # images whose encoding is timed for --dry-run
MARGIN = 1.05  # factor on the size on disk, for headers and file system blocks


def run(
    data: str,
    ckpt: str | Path | registry.Loaded,
    out: Path,
    *,
    num: int | None = None,
    shard: int = 1024,
    batch: int = 64,
    dtype: str | None = None,
    workers: int | None = None,
    device: torch.device,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes `model.codec.latents` of every image of `data` into `out`, a data source for training that model.

    num: number of images to use, chosen as by `data.num`; shard: images per file; batch: images per network pass;
    dtype: "float16" halves the size of latents; workers: processes that decode images, None: chosen for the machine.
    Images are shared out over the processes that torchrun started. The same call continues an unfinished set and does
    nothing to a finished one. Raises DataError, UsageError, CheckpointError or RunError.
    """
    model, file = ckpt if isinstance(ckpt, registry.Loaded) else registry.load_model(ckpt, device)
    stream = open_stream(data, num)
    if stream.shape != model.codec.shape:
        raise DataError(
            f"{data} holds {describe(stream.shape)} where the model needs {describe(model.codec.shape)}; "
            + wrong_shape(data, stream.shape, model.codec.shape)
        )
    encoder = _Encoder(model, texts.encoder_of(file.header["config"]), dtype, device)
    if encoder.texts is not None:
        captions.of(stream)
    shape, kind, speed = encoder.probe(stream, batch)
    manifest = {
        "format": latents.FORMAT, "encoder": model.codec.encoder_id(),
        "model": {"name": file.header["config"]["name"], "sha256": file.sha256},
        "image_shape": list(model.codec.shape), "shape": list(shape), "dtype": str(kind).removeprefix("torch."),
        "num": stream.num, "num_classes": stream.num_classes, "shard": shard,
        **({"captions": list(stream.captions)} if stream.captions else {}),
    }  # fmt: skip
    place = {"source": data, "source_identity": stream.identity}
    item_size = math.prod(shape) * kind.itemsize + 8
    if encoder.texts is not None:
        manifest["text_encoder"] = encoder.texts.digest
        item_size += sum(part.nbytes for part in texts.encode(encoder.texts, [texts.NONE], device).values())
    num_shards, size = -(-stream.num // shard), int(stream.num * item_size * MARGIN)
    result = {
        "out": str(out), "num_images": stream.num, "shape": list(shape), "dtype": manifest["dtype"],
        "encoder": manifest["encoder"], "shards": num_shards, "bytes": size,
    }  # fmt: skip
    out_dir = rundir.OutDir(
        out, latents.MANIFEST, manifest, "encoded set", "another encoded set", RESULTS,
        lambda manifest: manifest.get("format") == latents.FORMAT,
    )  # fmt: skip
    out_dir.check()
    if dry_run:
        plan = {"images_per_second": round(speed, 2), "seconds": round(stream.num / speed / dist.world_size())}
        return {**result, "bytes_free": _free(out), **plan, "dry_run": True}
    with rundir.locked(out):
        stored = out_dir.claim()
        missing = dist.from_main([n for n in range(num_shards) if not all(f.is_file() for f in encoder.files(out, n))])
        if place != {key: stored.get(key) for key in place}:
            there = sorted(set(range(num_shards)) - set(missing))
            if there and stream.identity != stored.get("source_identity"):  # else its path is only spelt otherwise
                _check_same(stream, out, there, shard, batch, workers)
                console.info(f"{out} is continued with source: {stored.get('source', 'unknown')} -> {data}")
            if dist.is_main():
                write_json(out / latents.MANIFEST, {**stored, **place})
        if stored.get("complete") and len(stored.get("shards", ())) == num_shards and not missing:
            console.info(f"{out} is finished; nothing to do")
            return {**result, "source_digest": stored["source_digest"]}
        if (needed := size * len(missing) // num_shards) > dist.from_main(_free(out)):
            raise RunError(
                f"{out}: {needed / 1e9:.1f} GB are to be written, and {_free(out) / 1e9:.1f} are free; make room"
            )
        speed = _write(encoder, stream, out, missing, shard, batch, workers)
        dist.barrier()
        if dist.is_main():
            infos = [latents.read_info(latents.shard_file(out, number)) for number in range(num_shards)]
            # `Inspection.digest` of all images, which is a sum over images, from the partial sums noted in the shards.
            whole = Inspection(stream.labels, stream.num_classes)
            whole.seen[:], whole.shape = 1, tuple(stream.shape)
            whole.total = np.sum([info.notes["digests"] for info in infos], axis=0, dtype=np.int64).reshape(LIMBS)
            latents.finish(out, {**manifest, **place, "source_digest": whole.digest()}, infos)
        dist.barrier()
        digest = read_json(out / latents.MANIFEST)["source_digest"]
    return {**result, "source_digest": digest, "images_per_second": round(speed, 2)}


class _Encoder:
    """A model's encoders and the type in which latents are stored. texts: of captions, if the model reads them."""

    def __init__(self, model: LikelihoodModel, texts: texts.Encoder | None, dtype: str | None, device: torch.device):
        self.model, self.texts, self.dtype, self.device = model, texts, dtype, device

    def files(self, out: Path, number: int) -> list[Path]:
        """The files of a shard."""
        return [latents.shard_file(out, number), *([latents.text_file(out, number)] if self.texts else [])]

    def write_texts(self, file: Path, captions: Sequence[str], rows: np.ndarray) -> None:
        """The embeddings of the captions of these rows; with row 0 also that of the empty prompt, of label -1."""
        labels = [*rows.tolist(), *([NO_LABEL] if 0 in rows else [])]
        assert self.texts is not None, "see files"
        table = texts.encode(self.texts, [captions[k] if k >= 0 else texts.NONE for k in labels], self.device)
        write_tensors(file, {**table, "labels": torch.tensor(labels)})

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (b, C, H, W) -> (b, ...) on the CPU."""
        encoded = self.model.codec.latents(images.to(self.device)).cpu()
        if self.dtype is None:
            return encoded
        if not encoded.is_floating_point():
            raise UsageError(f"--dtype {self.dtype}: this model's items are tokens, {encoded.dtype}; leave it out")
        encoded = encoded.to(getattr(torch, self.dtype))
        if not bool(encoded.isfinite().all()):
            raise UsageError(f"--dtype {self.dtype}: a latent is too large for it; leave it out")
        return encoded

    def probe(self, stream: ImageStream, batch: int) -> tuple[tuple[int, ...], torch.dtype, float]:
        """Shape and type of an encoded image, and images per second. Raises UsageError if the model has no encoder.

        The first pass, which loads and warms up, is not timed.
        """
        rows = np.arange(min(TIMED, batch, stream.num))
        _, images = next(iter(stream.batches(len(rows), rows)))
        self(images[:1])
        start = time.monotonic()
        encoded = self(images)
        return tuple(encoded.shape[1:]), encoded.dtype, len(rows) / max(time.monotonic() - start, 1e-9)


def _free(out: Path) -> int:
    """Free bytes on the disk of `out`."""
    return shutil.disk_usage(next(place for place in (out, *out.absolute().parents) if place.exists())).free


def _check_same(stream: ImageStream, out: Path, there: list[int], shard: int, batch: int, workers: int | None) -> None:
    """Raises DataError unless the images of the shards that are there are these. Collective."""
    workers = stream.default_workers(torch.device("cpu"), batch) if workers is None else workers
    numbers, other = dist.shard(there), list[int]()
    with console.progress(f"comparing {stream.name}", len(numbers), "shards") as bar:
        for number in numbers:
            rows = np.arange(number * shard, min((number + 1) * shard, stream.num))
            inspection, file = Inspection(stream.labels[rows]), latents.shard_file(out, number)
            for positions, images in stream.batches(batch, rows, workers):
                inspection.update(positions - rows[0], images)
            is_same = latents.read_info(file).notes["digests"] == inspection.total.tolist()
            if not is_same or not np.array_equal(latents.labels_of(file), stream.labels[rows]):
                other.append(number)
            bar.advance()
    if others := sorted(number for part in dist.gathered(other) for number in part):
        raise DataError(
            f"{out} holds {len(others)} shards of other images or labels than {stream.name}, "
            f"{latents.shard_file(out, others[0]).name} the first; give the images that it was begun with, or choose "
            "another --out"
        )


def _write(
    encoder: _Encoder, stream: ImageStream, out: Path, missing: list[int], shard: int, batch: int, workers: int | None
) -> float:
    """Encodes this process's share of the missing shards; images per second of all processes."""
    workers = stream.default_workers(encoder.device, batch) if workers is None else workers
    rows_of = {number: np.arange(number * shard, min((number + 1) * shard, stream.num)) for number in missing}
    shards_here = dist.shard(missing)
    num_here, start = sum(len(rows_of[number]) for number in shards_here), time.monotonic()
    with console.progress(f"encoding {stream.name}", num_here, "images") as bar:
        for number in shards_here:
            rows = rows_of[number]
            inspection, parts = Inspection(stream.labels[rows]), []
            for positions, images in stream.batches(batch, rows, workers):
                parts.append(encoder(images))
                inspection.update(positions - rows[0], images)
                bar.advance(len(images))
            notes = {"digests": inspection.total.tolist()}
            labels = torch.from_numpy(stream.labels[rows])
            if encoder.texts is not None:
                encoder.write_texts(latents.text_file(out, number), stream.captions, rows)
            latents.write_shard(latents.shard_file(out, number), torch.cat(parts), labels, notes)
    return sum(dist.gathered(num_here)) / max(time.monotonic() - start, 1e-9)
