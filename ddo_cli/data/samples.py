"""Sample sets on disk: generated items, labels and seeds, written batch by batch so that sampling can be resumed.

`shards`: shard-000000.safetensors, ... with tensors `items`, `labels`, `seeds`, one file per batch; items are
          images or points; if manifest.json says `latents`, x itself (float32 latents or int32 tokens); if it says
          `encoded`, what the model's encoder makes of the image.
`png`:    <seed:06d>.png, and labels in manifest.json.
`npz`:    samples.npz with `arr_0` (N, H, W, C) as ADM's tools read it, `labels` and `seeds`.

manifest.json holds the settings; a set of other settings is refused, never mixed in.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ddo_cli import dist, ledger, rundir
from ddo_cli.checkpoint import load_tensors, write_tensors
from ddo_cli.data import cache
from ddo_cli.data.items import count_classes
from ddo_cli.data.readers import TENSOR_ERRORS, Contents, join_tensors
from ddo_cli.diffusion.rejection import Cost
from ddo_cli.errors import DataError, reason
from ddo_cli.files import parse_json, read_bounded, read_json, remove, replacing, write_json
from ddo_cli.generation import Batch, num_batches

Format = Literal["png", "npz", "shards"]
MANIFEST = "manifest.json"
RESULTS = ("complete", "nfe", "disc_nfe", "cost", "labels")  # keys of a manifest that are no settings
_WRITERS = 16  # threads: images are encoded on all cores, and file systems sync those that wait together in one go
MAX_SEED = 2**32 - 1  # generators keep 32 bits
MAX_SEEDS = 5_000_000  # of a set; our choice, four times ImageNet


class SampleSet(NamedTuple):
    """A complete set, ordered by seed."""

    items: np.ndarray
    labels: np.ndarray
    seeds: np.ndarray
    manifest: dict[str, Any]


class Writer:
    """Writes a set's batches, each process its own, and says which are still missing. Its `out_dir` is claimed first.

    made_by: everything the items depend on (weights' hash, sampling recipe, classes), stored in the manifest.
    """

    def __init__(self, out: Path, form: Format, seeds: Sequence[int], batch: int, made_by: dict[str, Any]):
        self.out, self.form = out, form
        self.seeds, self.batch, self.num_batches = sorted(seeds), batch, num_batches(len(seeds), batch)
        self.manifest = {"format": form, "num": len(seeds), "seeds": spell_seeds(self.seeds), "batch": batch, **made_by}
        self.out_dir = rundir.OutDir(
            out, MANIFEST, dict(self.manifest), "sample set", "another sample set", RESULTS,
            lambda manifest: manifest.get("format") in get_args(Format),
        )  # fmt: skip

    def missing(self) -> list[int]:
        """Numbers of the batches that are not on disk yet, or of which a file is gone."""
        is_complete = self.form == "png" and manifest_of(self.out).get("complete")  # then without parts
        return [
            number
            for number in range(self.num_batches)
            if not ((is_complete or self._shard(number).is_file()) and self._has_pictures(number))
        ]

    def _has_pictures(self, number: int) -> bool:
        """Whether all PNG files of a batch are there."""
        seeds = self.seeds[number * self.batch : (number + 1) * self.batch] if self.form == "png" else []
        return all((self.out / f"{seed:06d}.png").is_file() for seed in seeds)

    def write(self, batch: Batch) -> None:
        """Stores a batch. PNG files and shards get their final names once they are complete, a batch's part at last."""
        if self.form == "png":
            with ThreadPoolExecutor(_WRITERS) as pool:
                list(pool.map(self._write_png, batch.items, batch.seeds.tolist()))  # raises the first error
        tensors = {"labels": batch.label, "seeds": batch.seeds, "nfe": torch.tensor([batch.nfe, batch.disc_nfe])}
        if batch.cost is not None:
            tensors["cost"] = batch.cost
        if self.form != "png":
            # Samplers use wider types; stored as float32 / int32.
            dtype = {torch.float64: torch.float32, torch.int64: torch.int32}.get(batch.items.dtype, batch.items.dtype)
            tensors["items"] = batch.items.to(dtype)
        write_tensors(self._shard(batch.number), tensors)

    def _write_png(self, item: Tensor, seed: int) -> None:
        pixels = item[0] if len(item) == 1 else item.permute(1, 2, 0)
        with replacing(self.out / f"{seed:06d}.png") as temporary:
            Image.fromarray(pixels.numpy()).save(temporary, format="png")

    def finish(self) -> dict[str, Any]:
        """Completes the manifest (and the npz) once every process has written its batches; returns the manifest."""
        dist.barrier()
        is_complete = self.form == "png" and manifest_of(self.out).get("complete")  # but for some files
        if dist.is_main() and not is_complete:
            shards = [self._read(number) for number in range(self.num_batches)]
            labels = torch.cat([shard["labels"] for shard in shards])
            passes = torch.stack([shard["nfe"] for shard in shards]).amax(0)
            self.manifest |= {"complete": True, "nfe": int(passes[0]), "disc_nfe": int(passes[1])}
            if all("cost" in shard for shard in shards):
                columns = torch.cat([shard["cost"] for shard in shards]).T  # in the order of the seeds
                cost = dict(zip(Cost._fields, columns.tolist(), strict=True))
                means = {key: round(sum(cost[key]) / len(self.seeds), 2) for key in ("nfe", "disc_nfe")}
                self.manifest |= {"cost": cost, **means}
            if self.form == "npz":
                items = torch.cat([shard["items"] for shard in shards]).numpy()
                with replacing(self.out / "samples.npz") as temporary, open(temporary, "wb") as file:
                    channels_last = items.transpose(0, 2, 3, 1) if items.ndim == 4 else items
                    np.savez(file, arr_0=channels_last, labels=labels.numpy(), seeds=np.array(self.seeds))
            if self.form == "png":
                self.manifest["labels"] = labels.tolist()
            write_json(self.out / MANIFEST, self.manifest)
        dist.barrier()
        return self.complete() or {}

    def complete(self) -> dict[str, Any] | None:
        """The manifest of a set that is complete, with every file where it belongs."""
        manifest: dict[str, Any] = read_json(self.out / MANIFEST)
        if not manifest.get("complete") or not all(path.is_file() for path in self._files()):
            return None
        if dist.is_main() and self.form != "shards":
            for part in self.out.glob(".part-*"):
                remove(part)
        return manifest

    def _files(self) -> list[Path]:
        """What the set consists of, beside its manifest."""
        if self.form == "npz":
            return [self.out / "samples.npz"]
        if self.form == "png":
            return [self.out / f"{seed:06d}.png" for seed in self.seeds]
        return [self._shard(number) for number in range(self.num_batches)]

    def _shard(self, number: int) -> Path:
        # Parts of the other formats are hidden: they are gone when the set is complete.
        return self.out / f"{'' if self.form == 'shards' else '.part-'}shard-{number:06d}.safetensors"

    def _read(self, number: int) -> dict[str, Tensor]:
        """A part. If damaged, it is removed, so that the same command draws it again."""
        try:
            return load_tensors(self._shard(number))
        except SafetensorError as error:
            remove(self._shard(number))
            raise DataError(
                f"{self._shard(number)} was damaged ({reason(error)}) and is removed; run the same command again"
            ) from None


def open_samples(path: Path) -> SampleSet:
    """A complete set of format `shards`, in memory. Raises DataError if a part is missing or damaged."""
    contents, seeds, manifest = open_shards(path)
    return SampleSet(contents.reader.read(np.arange(len(seeds))), contents.labels, seeds, manifest)


def open_shards(path: Path) -> tuple[Contents, np.ndarray, dict[str, Any]]:
    """Contents (items not read yet), seeds int64 (N,) and manifest of such a set. Raises DataError likewise."""
    manifest = read_json(path / MANIFEST)
    check_complete(path, manifest)
    num, batch = manifest.get("num"), manifest.get("batch")
    if type(num) is not int or type(batch) is not int or min(num, batch) < 1:
        raise DataError(f"{path / MANIFEST} is damaged (num {num!r}, batch {batch!r}); remove the set and sample again")
    files = []
    for number in range(num_batches(num, batch)):
        # By name, since network file systems list new files late.
        files.append(path / f"shard-{number:06d}.safetensors")
        if not files[-1].is_file():
            name = files[-1].name
            raise DataError(f"{path} has no {name}, which its manifest counts; remove the set and sample again")
    for name, problem in ledger.near(path).problems(path).items():
        raise DataError(f"{path}: {name} {problem}; run the command that made the set again, which mends it")
    try:
        items, *columns = (join_tensors(files, key) for key in ("items", "labels", "seeds"))
        if any(column.num != num for column in (items, *columns)):
            raise ValueError(f"{items.num} items where the manifest says {num}")
    except TENSOR_ERRORS as error:
        what = f"{path} holds a damaged shard ({reason(error)})"
        raise DataError(f"{what}; remove the directory and sample again") from None
    labels, seeds = (column.read(np.arange(num)).astype(np.int64) for column in columns)
    key = cache.key_of(path, files, [file.name for file in files])
    return Contents(items, labels, count_classes(labels), key), seeds, manifest


def check_complete(path: Path, manifest: dict[str, Any]) -> None:
    """Raises DataError for the manifest of a set that is still being made."""
    if not manifest.get("complete"):
        raise DataError(f"{path} is an unfinished sample set; run the command that made it again, it continues")


def image_entries(source: str, manifest: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Names of the files of a set in the format png, by seed, and their labels int64 (N,)."""
    try:
        names = [f"{seed:06d}.png" for seed in parse_seeds(manifest["seeds"])]
        labels = np.array(manifest["labels"], dtype=np.int64)
        if labels.shape != (len(names),):
            raise ValueError(f"{len(names)} seeds and {labels.size} labels")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(f"{source}: {MANIFEST} is damaged ({reason(error)}); remove the set and sample again") from None
    return names, labels


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a folder; empty if there is none, or a file of another program."""
    return read_dict(path / MANIFEST)


def read_dict(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none, or one that holds something else."""
    try:
        content = parse_json(read_bounded(file))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a sample set; empty where `path` is something else."""
    file = path / MANIFEST
    return read_json(file) if file.is_file() else {}


def parse_seeds(text: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]. Raises ValueError on anything else, and on a seed given twice."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if max(int(first), int(last or 0)) > MAX_SEED:
            raise ValueError(f"seeds end at {MAX_SEED}")
        if dash and int(last) < int(first):
            raise ValueError(f"{part.strip()} ends before it begins")
        if len(seeds) + max(int(last or 0) - int(first), 0) >= MAX_SEEDS:
            raise ValueError(f"more than {MAX_SEEDS:,} seeds")
        seeds += range(int(first), int(last) + 1) if dash else [int(first)]
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError("no seed, or one given twice")
    return seeds


def spell_seeds(seeds: Sequence[int]) -> str:
    """The shortest spelling that `parse_seeds` reads back, for seeds in increasing order."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
