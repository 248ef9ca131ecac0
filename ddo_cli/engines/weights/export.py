"""`ddo export`: a model as the published file it was converted from, so that its authors' programs can load it.

Or, without such a file, as a folder of diffusers, where that library has the architecture. An adapter is written as
that library's pipelines load it, or added to its base's weights first.

A pickle is neither run nor rewritten: its bytes are copied, and the raw numbers of each tensor replaced in place. The
rest (code, augmentation, training options) stays as its authors wrote it.
"""

import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli import checkpoint, console
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.engines.weights.convert import FORMAT_NAMES, FORMATS, parse_settings
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.files import raise_disk_error, replacing, sha256, system_error
from ddo_cli.models import adapters, pt_files, registry, snapshots
from ddo_cli.models.adm import files as adm_files
from ddo_cli.models.adm import keys as adm_keys
from ddo_cli.models.adm import published as adm_published
from ddo_cli.models.diffusers import files as diffusers_files
from ddo_cli.models.diffusers import lora as diffusers_lora
from ddo_cli.models.dit import files as dit_files
from ddo_cli.models.edm.files import read_edm
from ddo_cli.models.edm2 import files as edm2_files
from ddo_cli.models.var import files as var_files
from ddo_cli.safe_pickle import Storage

_INERT = ("dropout",)  # our options that change no tensor and no sample


class Original(NamedTuple):
    """A published file, which the written one will be like."""

    family: str
    config: dict[str, Any]  # of our model of it
    stored: dict[str, Tensor]  # its tensors, in its order and types
    to_theirs: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # from our names and tensors to the file's
    write: Callable[[dict[str, Tensor], Path], None]  # new values of `stored` into a file
    read: Callable[[Path], dict[str, Tensor]]  # the tensors of such a file


def run(
    ckpt: str,
    out: Path,
    *,
    like: Path | None = None,
    settings: Sequence[str] = (),
    merge: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes `out` and returns what `export --json` prints: out, family, num_tensors, verified, and more.

    like: the .pkl, .pt or .pth; None: `out` becomes a folder of diffusers. settings: those that `convert` was given,
    for a .pt that does not contain its whole configuration. merge: of an adapter, its base's weights with it; without
    `like`, `out` may be a weight file of this program, then.
    Constants of the file that are no tensors of our model stay as they are. Reads the written file again and compares
    every tensor bit for bit. Raises CheckpointError if the two are not of one architecture and preconditioning.
    """
    file = _whole(ckpt, merge)
    if like is None:
        return (
            _file(file, out, dry_run)
            if merge and out.suffix == ".safetensors"
            else _folder(file, out, settings, dry_run)
        )
    if not like.is_file():
        raise UsageError(f"--like {like} does not exist; give the published file that the model was converted from")
    if like.suffix not in FORMATS:
        raise UsageError(f"--like {like} is no file of published weights; give the {FORMAT_NAMES} that was converted")
    if out.suffix != like.suffix:
        raise UsageError(f"--out {out} must end in {like.suffix}, as --like {like.name} does: programs go by the name")
    if "base" in file.header:
        raise UsageError(f"{ckpt} is an adapter, and a file like {like} has no place for one; add --merge")
    original = _original(like, settings)
    _check_config(registry.check_config(file.header.get("config"), ckpt), original.config, ckpt, like)
    new = original.to_theirs(file.tensors)
    if odd := [key for key, tensor in new.items() if getattr(original.stored.get(key), "shape", None) != tensor.shape]:
        raise CheckpointError(f"{ckpt}: tensors{_listed(odd)} have no place of their shape in {like}")
    fitted = {key: tensor.to(original.stored[key].dtype) for key, tensor in new.items()}
    rounded = [key for key, tensor in fitted.items() if not torch.equal(tensor.to(new[key].dtype), new[key])]
    if rounded:
        console.warn(f"{like} stores {original.stored[rounded[0]].dtype}: {len(rounded)} tensors lose precision")
    result = {
        "out": str(out), "family": original.family,
        "like": like.name, "like_sha256": sha256(like), "checkpoint_sha256": file.sha256,
        "num_tensors": len(fitted), "kept": len(original.stored) - len(fitted), "rounded": len(rounded),
    }  # fmt: skip
    if dry_run:
        return {**result, "verified": False, "dry_run": True}
    # The unchanged tensors are copied, since `write` changes the storage that `stored` shares.
    expected = {key: fitted[key] if key in fitted else tensor.clone() for key, tensor in original.stored.items()}
    if out.exists():
        if not _holds(original, out, expected):
            raise UsageError(f"--out {out} exists and holds something else; choose another name, or remove it")
        console.info(f"{out} is finished; nothing to do")
        return {**result, "verified": True}
    with replacing(out) as temporary:
        original.write(expected, temporary)
        if not _holds(original, temporary, expected):
            raise CheckpointError(f"{out}: what was written reads back different; it was removed, so try again")
    return {**result, "verified": True}


def _holds(original: Original, path: Path, expected: dict[str, Tensor]) -> bool:
    """Whether a file like the original has these tensors, in their order and types."""
    try:
        held = original.read(path)
    except (CheckpointError, OSError) as error:
        raise_disk_error(error)
        return False
    return list(held) == list(expected) and all(_same(held[key], tensor) for key, tensor in expected.items())


def _whole(ckpt: str, merge: bool) -> Checkpoint:
    """The file to export: as it is, or of an adapter its base with it."""
    file = checkpoint.load(ckpt, kind="model")
    base = registry.base_of(file)
    if not merge:
        return file
    if base is None:
        raise UsageError(f"--merge has no effect: {ckpt} holds whole weights and no adapter; leave it out")
    model = registry.load_model(ckpt, torch.device("cpu")).model
    header = {key: value for key, value in file.header.items() if key not in ("base", "adapter")}
    link = {"command": "export", "adapter_sha256": file.sha256, "base_sha256": file.header["base"]["sha256"]}
    header["provenance"] = [*header.get("provenance", []), link]
    return file._replace(tensors=adapters.merged(model, checkpoint.load(base).tensors), header=header)


def _file(file: Checkpoint, out: Path, dry_run: bool) -> dict[str, Any]:
    """Writes a weight file of this program."""
    result = {
        "out": str(out), "family": "ddo", "checkpoint_sha256": file.sha256, "num_tensors": len(file.tensors)
    }  # fmt: skip
    if dry_run:
        return {**result, "verified": False, "dry_run": True}
    if out.exists():
        if (difference := checkpoint.difference(out, file.tensors, file.header)) is not None:
            raise UsageError(f"--out {out} exists and has another {difference}; choose another name, or remove it")
        console.info(f"{out} is finished; nothing to do")
    else:
        checkpoint.save(out, file.tensors, file.header)
    return {**result, "verified": checkpoint.difference(out, file.tensors, file.header) is None}


def _folder(file: Checkpoint, out: Path, settings: Sequence[str], dry_run: bool) -> dict[str, Any]:
    """Writes a folder of diffusers."""
    if settings or out.suffix in (".pkl", ".pt", ".pth", ".safetensors"):
        what = settings[0] if settings else f"--out {out}"
        raise UsageError(
            f"{what} asks for a published file: name with --like the one that the model was converted from; without "
            "it, --out is the name of a folder for diffusers"
        )
    write = diffusers_lora.write_folder if "base" in file.header else diffusers_files.write_folder
    return write(file, out, dry_run)


def _original(like: Path, settings: Sequence[str]) -> Original:
    """The file to write like, of any family."""
    given = parse_settings(settings)
    if like.suffix == ".pkl":
        if given:
            raise UsageError(f"{like} tells its configuration itself; KEY=VALUE is for the .pt of an ADM, DiT or SiT")
        return _edm(like)
    weights = pt_files.read(like, adm_files.EXPECTED, (var_files.MARK, adm_files.MARK, dit_files.MARK))
    if weights.place or weights.left_out:
        raise UsageError(
            f"--like {like} holds more than a network's tensors, and such files are not written; leave --like out of a "
            "model of your own training, and share the safetensors file"
        )
    stored = weights.tensors
    pt_files.check_size(stored.values(), like)
    if var_files.is_var(stored) or "patch_nums" in given:
        raise UsageError(f"{like} is of VAR, whose files are not written; the safetensors file is the model to share")
    if dit_files.is_dit(stored):
        return _dit(like, stored, given)
    return _adm(like, stored, adm_published.Told(**given))


def _edm(like: Path) -> Original:
    """An EDM pickle."""
    snapshot = snapshots.open_snapshot(like)
    if edm2_files.is_edm2(snapshot):
        raise UsageError(
            f"--like {like} is a file of EDM2, which can be converted but not written; give one of EDM or ADM"
        )
    file = read_edm(like, snapshot)

    def write(tensors: dict[str, Tensor], path: Path) -> None:
        for key, tensor in tensors.items():
            file.stored[key].copy_(tensor)  # writes into its storage, whatever its strides
        spoilt = [key for key, tensor in tensors.items() if not _same(file.stored[key], tensor)]
        if spoilt or _overlap(file.storages):
            raise CheckpointError(
                f"{like}: tensors that share their numbers{_listed(spoilt)} would become different; this file "
                "cannot be written in place"
            )
        shutil.copyfile(like, path)
        with open(path, "r+b") as stream:
            for values, offset in file.storages:
                stream.seek(offset)
                stream.write(values.view(torch.uint8).numpy().data if len(values) else b"")

    return Original(
        "edm", file.config, file.stored, _each(file.names.to_edm), write, lambda path: read_edm(path).stored
    )


def _adm(like: Path, stored: dict[str, Tensor], told: adm_published.Told) -> Original:
    """An ADM diffusion model, a bare state dict."""
    file = adm_files.unet(stored, like, told)
    return Original(
        "adm",
        file.config,
        stored,
        _each(partial(adm_keys.to_openai, order=file.described.order, options=adm_files.options_of(file.config))),
        _write_pt,
        lambda path: pt_files.read(path, adm_files.EXPECTED, (adm_files.MARK,)).tensors,
    )


def _dit(like: Path, stored: dict[str, Tensor], given: dict[str, Any]) -> Original:
    """A DiT or SiT, a bare state dict."""
    if unknown := given.keys() - set(dit_files.Told._fields):
        raise UsageError(f"{like} is a DiT or SiT, of which arch and heads can be told; leave {min(unknown)} out")
    config = dit_files.read(stored, like, dit_files.Told(**given)).config
    return Original(
        "dit",
        config,
        stored,
        lambda tensors: dit_files.to_official(tensors, dit_files.options_of(config)),
        _write_pt,
        lambda path: pt_files.read(path, adm_files.EXPECTED, (dit_files.MARK,)).tensors,
    )


def _each(to_theirs: Callable[[str, Tensor], tuple[str, Tensor]]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The map of all tensors, from that of one."""
    return lambda tensors: dict(to_theirs(name, tensor) for name, tensor in tensors.items())


def _write_pt(tensors: dict[str, Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(OrderedDict(tensors), file)
        except RuntimeError as error:  # torch ends the file after a failed write, too, and complains of that
            raise system_error(error) or error from None


# --- Checks


def _check_config(ours: dict[str, Any], theirs: dict[str, Any], ckpt: str, like: Path) -> None:
    """Raises CheckpointError unless both describe the same network in the same preconditioner."""

    def facts(config: dict[str, Any]) -> dict[str, Any]:
        options = {key: value for key, value in config["options"].items() if key not in _INERT}
        return {"name": config["name"], "shape": config["shape"], "num_classes": config["num_classes"], **options}

    actual, wanted = facts(ours), facts(theirs)
    if odd := [key for key in actual.keys() | wanted.keys() if actual.get(key) != wanted.get(key)]:
        odd = ["name"] if "name" in odd else sorted(odd)  # options of other networks have nothing in common
        listed = ", ".join(f"{key} {actual.get(key)} instead of {wanted.get(key)}" for key in odd)
        raise CheckpointError(
            f"{ckpt} is another model than {like}: {listed}; give with --like the file that it was converted from"
        )


def _overlap(storages: Sequence[Storage]) -> bool:
    """Whether storages with different numbers lie at the same offset: stored once and read twice."""
    first: dict[int, Tensor] = {}
    return any(not _same(first.setdefault(offset, values), values) for values, offset in storages)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits: NaN equals itself, and 0 is not -0."""
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def _listed(keys: Sequence[str]) -> str:
    return f" ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})" if keys else ""
