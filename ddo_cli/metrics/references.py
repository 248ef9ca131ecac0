"""Reference files: feature statistics to compare generated images with, and perhaps the images or features themselves.

| file | holds |
|---|---|
| EDM's .npz | `mu`, `sigma`; the extractor is not named, so it is not checked |
| ADM's VIRTUAL_*.npz | `mu`, `sigma`, `mu_s`, `sigma_s` of the whole data, and 10,000 images `arr_0` |
| EDM2's .pkl | {"num_images", "fid": {"mu", "sigma"}, "fd_dinov2": {...}}: a metric names its extractor |
| .safetensors of `ddo stats` | moments, perhaps features, and the protocol that made them |
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddo_cli import checkpoint, npz
from ddo_cli.errors import CheckpointError, DataError, printable, reason
from ddo_cli.metrics import stats
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.stats import Statistics
from ddo_cli.recipe.load import differing_keys
from ddo_cli.safe_pickle import Array, read_pickle

KIND = "statistics"  # of our checkpoints
SUFFIXES = (".npz", ".pkl", ".safetensors")
UNNAMED = ""  # key for the statistics of a file that names no metric
FORMATS = "EDM's .npz, EDM2's .pkl, ADM's VIRTUAL_*_labeled.npz, a .safetensors of `ddo stats`, or images"
_SOURCES = {  # files that have these features
    "pool": "one of `ddo stats --metric {key}`, or images",
    "spatial": "ADM's VIRTUAL_*_labeled.npz, one of `ddo stats --metric {key}`, or images",
}
SPATIAL_FEATURES = 2023  # of sFID: 7 channels of 17 x 17


class Images(NamedTuple):
    """The images in a reference file, not read yet: their number and shape (C, H, W)."""

    member: npz.Member
    num: int
    shape: tuple[int, ...]
    is_channels_last: bool

    def batches(self, batch: int) -> Iterator[Tensor]:
        """uint8 (b, C, H, W), in order; memory for one batch. Raises DataError if the file is damaged."""
        try:
            for rows in self.member.rows(batch):
                images = torch.from_numpy(rows.copy())
                yield images.permute(0, 3, 1, 2).contiguous() if self.is_channels_last else images
        except npz.DAMAGE as error:
            raise DataError(f"{self.member.path} cannot be read to its end ({reason(error)}); copy it again") from None


class ReferenceFile(NamedTuple):
    """Content of a file of statistics.

    sets: statistics by metric key ("fid", "fd_dinov2", ..., UNNAMED) and kind of features ("pool", "spatial");
    num_images: that the statistics were computed of, and protocol: `Extractor.protocol`, if known; shapes: of stored
    features by kind; data: name, content hash and sizes of the images that `ddo stats` read.
    """

    path: Path
    sets: Mapping[str, Mapping[str, Statistics]]
    num_images: int | None = None
    images: Images | None = None
    protocol: dict[str, Any] | None = None
    shapes: Mapping[str, tuple[int, ...]] = {}
    data: dict[str, Any] | None = None

    @property
    def content(self) -> str:
        """Summary for messages."""
        kinds = {key: ", ".join(sorted(statistics)) for key, statistics in sorted(self.sets.items())}
        return "; ".join(f"{key or 'an extractor that it does not name'}: {kind}" for key, kind in kinds.items())

    def statistics(self, extractor: Extractor, kind: str = "pool") -> Statistics:
        """The moments to compare this extractor's features with.

        Raises DataError if there are none, if another protocol made them, or if they are not valid moments.
        """
        statistics = self._of(extractor).get(kind)
        if statistics is None:
            raise DataError(
                f"{self.path} holds {self.content} features, and no {kind} features of {extractor.name}; give "
                + _SOURCES[kind].format(key=extractor.key)
            )
        size = extractor.num_features if kind == "pool" else SPATIAL_FEATURES
        stats.fits(f"{self.path} ({kind})" if kind != "pool" else str(self.path), statistics, size, extractor.name)
        return statistics

    def features(self, extractor: Extractor, kind: str = "pool") -> Tensor:
        """Features (N, F) float32 of every image. Raises DataError if the file has none, or as `statistics` does."""
        self._of(extractor)
        if kind not in self.shapes:
            content = "the images" if self.images is not None else "moments only"
            raise DataError(
                f"{self.path} holds {content}, not the features of each image; give one of `ddo stats --features`, or "
                "images"
            )
        features = _tensor(self.path, f"{kind}.features")
        if features.shape[1] != extractor.num_features or not torch.isfinite(features).all():
            raise DataError(
                f"{self.path}: its {kind} features {tuple(features.shape)} are not finite numbers (N, "
                f"{extractor.num_features}); the file is damaged, compute it again"
            )
        return features

    def _of(self, extractor: Extractor) -> Mapping[str, Statistics]:
        """Statistics by kind. Raises DataError if the metric or the protocol is not the extractor's."""
        statistics = self.sets.get(extractor.key, self.sets.get(UNNAMED))
        if statistics is None:
            raise DataError(
                f"{self.path} holds {self.content} features, and nothing of {extractor.key} ({extractor.name}); give "
                + _SOURCES["pool"].format(key=extractor.key)
            )
        if self.protocol is not None and (lines := differing_keys(extractor.protocol(), self.protocol)):
            raise DataError(
                f"{self.path} cannot be compared with features of {extractor.name}, since they were made differently "
                f"(there -> here): {'; '.join(map(_shortened, lines))}; give the same options as for `ddo stats`, or "
                "images"
            )
        return statistics


def is_reference(path: str | Path) -> bool:
    """Whether this is a file of statistics and not a set of images; an .npz with both is one."""
    file = Path(path)
    suffix = file.suffix.lower()
    return suffix in SUFFIXES and not file.is_dir() and (suffix != ".npz" or stats.holds_statistics(file))


def read_reference(path: str | Path) -> ReferenceFile:
    """Reads a file of statistics. Raises DataError or CheckpointError."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path} does not exist; give {FORMATS}", missing=str(path))
    read = {".npz": _read_npz, ".pkl": _read_pickle, ".safetensors": _read_own}.get(file.suffix.lower())
    if read is None:
        raise DataError(f"{path} is no file of statistics; give {FORMATS}")
    return read(file)


# --- EDM and ADM


def _read_npz(path: Path) -> ReferenceFile:
    pool = stats.read_npz(path)
    arrays = npz.members(path)
    kinds = {"pool": pool}
    if {"mu_s", "sigma_s"} & arrays.keys():
        kinds["spatial"] = stats.read_npz(path, "mu_s", "sigma_s")._replace(extractor=pool.extractor)
    images = _images(arrays["arr_0"]) if "arr_0" in arrays else None
    return ReferenceFile(path, {UNNAMED: kinds}, pool.num_images, images)


def _images(member: npz.Member) -> Images:
    shape = member.shape
    last = len(shape) == 4 and shape[3] in (1, 3)  # as ADM's; preferred if both readings fit
    if member.dtype != np.uint8 or len(shape) != 4 or shape[0] < 2 or not (last or shape[1] in (1, 3)):
        raise DataError(
            f"{member.path}: {member.name} is {member.dtype} {shape}; it must be uint8 images (N, H, W, C) or (N, C, "
            "H, W), N >= 2; copy the file again"
        )
    return Images(member, shape[0], (shape[3], *shape[1:3]) if last else shape[1:], last)


# --- EDM2


def _read_pickle(path: Path) -> ReferenceFile:
    try:
        content = read_pickle(path, FORMATS)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    metrics = {key: value for key, value in content.items() if type(value) is dict} if type(content) is dict else {}
    if not metrics or not all(type(key) is str and {"mu", "sigma"} <= value.keys() for key, value in metrics.items()):
        raise DataError(
            f"{path} is a pickle without statistics: it needs the keys 'num_images' and, for each metric such as "
            f"'fid', 'mu' and 'sigma'; give {FORMATS}"
        )
    num_images = content.get("num_images")
    if num_images is not None and (type(num_images) is not int or num_images < 2):
        raise DataError(f"{path}: num_images = {printable(str(num_images), 40)} is no number of images; copy it again")
    sets = {}
    for key, arrays in metrics.items():
        where = f"{path} ({printable(key, 40)})"
        values = [arrays[name].values for name in ("mu", "sigma") if type(arrays[name]) is Array]
        mean, cov = values if len(values) == 2 else (None, None)
        if mean is None or cov is None:
            raise DataError(f"{where}: mu and sigma must be arrays of numbers; copy the file again")
        sets[key] = {"pool": stats.of_arrays(where, mean, cov, num_images)}
    return ReferenceFile(path, sets, num_images)


# --- Ours


def save_reference(
    path: Path,
    moments: Mapping[str, Statistics],
    features: Mapping[str, Tensor],
    *,
    metric: str,
    protocol: dict[str, Any],
    data: dict[str, Any],
) -> None:
    """Writes moments and features by kind, atomically. metric: their key; data: with `num_images`, see `ddo stats`."""
    tensors = {f"{kind}.features": rows for kind, rows in features.items()}
    for kind, statistics in moments.items():
        tensors |= {f"{kind}.mean": statistics.mean, f"{kind}.cov": statistics.cov}
    checkpoint.save(path, tensors, {"kind": KIND, "metric": metric, "protocol": protocol, "data": data})


def _read_own(path: Path) -> ReferenceFile:
    header = checkpoint.read_header(path, KIND)
    metric, protocol, data = (header.get(key) for key in ("metric", "protocol", "data"))
    num = data.get("num_images") if isinstance(data, dict) else None
    if not isinstance(metric, str) or not isinstance(protocol, dict) or type(num) is not int or num < 2:
        raise DataError(f"{path}: its header does not say what made it (metric, protocol, data); compute it again")
    assert isinstance(data, dict)  # it had a number of images
    with checkpoint.open_tensors(path) as content:
        shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    kinds = {}
    for kind in ("pool", "spatial"):
        if {f"{kind}.mean", f"{kind}.cov"} & shapes.keys() or kind == "pool":
            mean, cov = (_tensor(path, f"{kind}.{part}").numpy() for part in ("mean", "cov"))
            kinds[kind] = stats.of_arrays(str(path), mean, cov, num)
    stored = {kind: shapes[f"{kind}.features"] for kind in ("pool", "spatial") if f"{kind}.features" in shapes}
    if any(len(shape) != 2 or shape[0] != num for shape in stored.values()):
        raise DataError(f"{path}: its features {stored} are not those of {num} images; compute it again")
    return ReferenceFile(path, {metric: kinds}, num, None, protocol, stored, data)


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with checkpoint.open_tensors(path) as content:
            tensor: Tensor = content.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} has no whole '{name}' ({reason(error)}); compute it again with `ddo stats`") from None
    if tensor.dtype not in (torch.float32, torch.float64):
        raise DataError(f"{path}: '{name}' is {tensor.dtype}; it must be float32 or float64, compute it again")
    return tensor


def _shortened(line: str) -> str:
    """ "key: theirs -> ours" with hashes cut to 8 digits."""
    return " ".join(f"{word[:8]}.." if len(word) == 64 else word for word in printable(line, 1000).split(" "))
