"""`ddo ema`: averaged weights of any width, reconstructed after training from snapshots (EDM2, arXiv 2312.02696)."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli import checkpoint, console
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.files import sha256
from ddo_cli.models import registry
from ddo_cli.recipe.training import MAX_STD
from ddo_cli.report import pictures
from ddo_cli.report.pictures import Curve
from ddo_cli.training import profiles
from ddo_cli.training.profiles import Fit, Profile

# Distance from the wanted profile, relative to its norm, above which there is a warning. Our choice; the paper gives
# none. Eight evenly spaced snapshots of widths 0.05 and 0.10 come to 0.02 at 0.13, and to 0.10 at 0.03.
POOR = 0.05
_OF_A_FILE = ("source", "source_sha256")  # provenance of one published file, which differs between snapshots


class Snapshot(NamedTuple):
    """A weight file, and the width and end of its average."""

    file: Path
    profile: Profile
    header: dict[str, Any]


def run(
    sources: Sequence[Path], out: Path, *, std: float, at: int | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Writes the average of relative standard deviation `std` and a picture of its profile; returns their description.

    sources: weight files whose header names their average, or directories of them. at: images of training at which the
    average ends; None: those of the last snapshot. Later snapshots are left out.
    Raises UsageError or CheckpointError where the snapshots do not make one run, or cannot give that average.
    """
    if not 0 < std < MAX_STD:
        raise UsageError(f"--std {std:g} is no relative standard deviation; give one above 0 and below {MAX_STD}")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out} will be a weight file; name it {out.stem}.safetensors")
    picture = out.with_suffix(".png")
    if not out.exists():
        pictures.check_replaceable(picture)
    snapshots = _snapshots(sources)
    last = snapshots[-1].profile.images
    target = Profile(std, last if at is None else at)
    if not 0 < target.images <= last:
        raise UsageError(
            f"--at {at} is not within training: the last snapshot is of {last:,} images; give at most that"
        )
    used = [snapshot for snapshot in snapshots if snapshot.profile.images <= target.images]
    if not used:
        first = snapshots[0].profile.images
        raise UsageError(f"--at {at} lies before the first snapshot, of {first:,} images; give one from there on")
    fit = profiles.fit([snapshot.profile for snapshot in used], target)
    if fit.residual > POOR:
        console.warn(
            f"the snapshots miss {fit.residual:.1%} of this average's profile (see {picture.name}); take a width "
            "between those that were kept, or snapshots at more times"
        )
    result = {
        "out": str(out),
        "std": std,
        "gamma": profiles.gamma_of(std),
        "images": int(target.images),
        "residual": fit.residual,
        "noise_gain": fit.gain,
        "snapshots": [
            {"file": str(file), "std": profile.std, "images": int(profile.images), "weight": float(weight)}
            for (file, profile, _), weight in zip(used, fit.weights, strict=True)
        ],
    }
    if dry_run:
        return {**result, "dry_run": True}
    header = _header(used, fit, target)
    if not out.exists():
        checkpoint.save(out, combined(used, fit.weights), header)
    elif not _is_same(out, header):
        raise UsageError(f"--out {out} exists and holds something else; choose another name, or remove it")
    elif picture.exists():
        console.info(f"{out} is finished; nothing to do")
        return {**result, "picture": str(picture)}
    _picture(picture, used, fit, target)
    return {**result, "picture": str(picture)}


def _is_same(out: Path, header: dict[str, Any]) -> bool:
    """Whether a file is this average: its header names the snapshots by their hashes."""
    try:
        return checkpoint.read_header(out) == json.loads(json.dumps(header))
    except CheckpointError:
        return False


# --- Snapshots


def _snapshots(sources: Sequence[Path]) -> list[Snapshot]:
    """The snapshots of one run, by time and width. Raises UsageError or CheckpointError."""
    files = [file for source in sources for file in _files_of(source)]
    snapshots = sorted(map(_snapshot, files), key=lambda snapshot: (snapshot.profile.images, snapshot.profile.std))
    first = snapshots[0]
    for snapshot in snapshots[1:]:
        for what, value, expected in zip(("model", "run"), _origin(snapshot), _origin(first), strict=True):
            if value != expected:
                raise UsageError(
                    f"{snapshot.file} is of another {what} than {first.file}; give the snapshots of one training, and "
                    "of a finetuning those of one round"
                )
    for (file, profile, _), (next_file, next_profile, _) in itertools.pairwise(snapshots):
        if profile == next_profile:
            raise UsageError(
                f"{file} and {next_file} are the same average, {profile.std:.3f} at {int(profile.images):,} images; "
                "give one of them"
            )
    return snapshots


def _files_of(source: Path) -> list[Path]:
    """The snapshots of a directory, or the file itself."""
    if not source.is_dir():
        return [source]
    files = [*source.glob("step-*.safetensors"), *source.glob("checkpoints/step-*.safetensors")]
    if not files:
        inside = sorted({file.parent for file in source.rglob("step-*.safetensors")})
        remedy = f"give {inside[0]} or another one" if inside else "set ema_widths in a recipe, and a run writes them"
        raise UsageError(f"{source} holds no step-*.safetensors; {remedy}")
    return sorted(files)


def _snapshot(file: Path) -> Snapshot:
    header = checkpoint.read_header(file, kind="model")
    try:
        profile = Profile(float(header["ema"]["std"]), int(header["ema"]["images"]))
        profiles.gamma_of(profile.std)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file} does not tell of which power-function average it is a snapshot; train with ema_widths, or convert "
            "a published snapshot, whose name tells it"
        ) from None
    return Snapshot(file, profile, header)


def _origin(snapshot: Snapshot) -> tuple[Any, Any]:
    """(configuration, provenance without what differs between snapshots of one run)."""
    links = snapshot.header.get("provenance", [])
    kept = [{key: value for key, value in link.items() if key not in _OF_A_FILE} for link in links]
    return snapshot.header.get("config"), kept


# --- Their combination


def combined(snapshots: Sequence[Snapshot], weights: np.ndarray) -> dict[str, Tensor]:
    """Trained parameters as the weighted sum over the snapshots, in float32, then in the stored type.

    Other tensors are the last snapshot's. Files are read tensor by tensor, so memory holds the sums and little else.
    """
    last = snapshots[-1]
    config = registry.check_config(last.header.get("config"), str(last.file))
    with torch.device("meta"):
        network = registry.build(config)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    if "base" in last.header:  # of an adapter, which is all that its file holds
        trained = {name for name, _ in checkpoint.tensors(last.file)}
    sums: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, weights, strict=True):
        names = set()
        for name, tensor in checkpoint.tensors(snapshot.file):
            names.add(name)
            if name in trained:
                sums.setdefault(name, torch.zeros(tensor.shape)).add_(tensor.to(torch.float32), alpha=float(weight))
                if snapshot is last:
                    sums[name] = sums[name].to(tensor.dtype)
            elif snapshot is last:
                sums[name] = tensor
        if trained - names:
            raise CheckpointError(f"{snapshot.file} lacks {min(trained - names)}; it is not whole, so write it again")
    return sums


def _header(snapshots: Sequence[Snapshot], fit: Fit, target: Profile) -> dict[str, Any]:
    """The last snapshot's header with the new average and its provenance."""
    header = {key: value for key, value in snapshots[-1].header.items() if key != "step"}
    ema = {"std": target.std, "images": int(target.images)}
    origin = [
        {**profile._asdict(), "sha256": sha256(file), "weight": float(weight)}
        for (file, profile, _), weight in zip(snapshots, fit.weights, strict=True)
    ]
    link = {"command": "ema", **ema, "residual": fit.residual, "snapshots": origin}
    return {**header, "ema": ema, "provenance": [*header.get("provenance", []), link]}


def _picture(path: Path, snapshots: Sequence[Snapshot], fit: Fit, target: Profile) -> None:
    """The wanted profile and the fitted one, as densities over training."""
    times = np.linspace(0, target.images, 1001)[1:]
    parts = [profiles.density(snapshot.profile, times) * target.images for snapshot in snapshots]
    fitted = np.sum([weight * part for weight, part in zip(fit.weights, parts, strict=True)], axis=0)
    wanted, images = profiles.density(target, times) * target.images, times.tolist()
    panels = {
        f"weight of training's images, {fit.residual:.2%} off": [
            Curve(f"wanted, {target.std:.3f}", images, wanted.tolist()),
            Curve(f"of {len(snapshots)} snapshots", images, fitted.tolist()),
        ],
        "last snapshots": [
            Curve(f"{snapshot.profile.std:.3f}", images, part.tolist())
            for snapshot, part in zip(snapshots, parts, strict=True)
            if snapshot.profile.images == snapshots[-1].profile.images
        ],
    }
    pictures.curves(panels, path, "images")
