"""Folders of the library diffusers: a UNet2DModel with its scheduler -> ours, and back.

    model_index.json                                  which pipeline, and of which parts; may be missing
    unet/config.json                                  arguments of the network
    unet/diffusion_pytorch_model.safetensors          its tensors: also .bin, or shards with an index
    scheduler/scheduler_config.json                   the noise schedule

Older folders have all files side by side.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from ddo_cli import checkpoint, console, torch_files
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.diffusion.precond import Discrete
from ddo_cli.errors import CheckpointError, DdoError, RecipeError, RunError, UsageError, printable
from ddo_cli.files import DAMAGED, raise_disk_error, read_json, replacing, sha256, write_json
from ddo_cli.models import registry
from ddo_cli.models.diffusers import from_adm as diffusers_adm
from ddo_cli.models.diffusers import unet as diffusers_unet
from ddo_cli.models.diffusers.unet import Config
from ddo_cli.recipe import syntax

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model"
AVERAGED = "unet_ema"  # of the library's training script
PREFIX = "net.unet."  # of the network's tensors in our model
DDPM_STEPS, DDIM_STEPS = 250, 50  # of the default sampling: ADM's number (arXiv 2105.05233), and the DDIM pipeline's
# Attention layers written before version 0.15.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Found(NamedTuple):
    """The files of a folder: configurations of network and scheduler, and the weights in one file or in shards."""

    network: Path
    scheduler: Path | None  # a UNet2DModel always has one
    weights: list[Path]


class Folder(NamedTuple):
    """What a folder holds: configuration and tensors of our model, defaults of sampling, and what to tell the user."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sampling: dict[str, Any]
    notes: dict[str, Any]


# --- Reading


def read(folder: Path) -> Folder:
    """The model of a pipeline's folder, or of its unet folder beside the scheduler's; tensors in float32.

    Raises CheckpointError if it is no UNet2DModel that we can use, UsageError where the library is missing.
    """
    unet_path, scheduler_path, weights = find(folder)
    assert scheduler_path is not None, "see find"
    unet, scheduler = public(json_of(unet_path)), public(json_of(scheduler_path))
    try:
        config = diffusers_unet.config_of(unet, scheduler)
        tensors = {PREFIX + name: tensor for path in weights for name, tensor in tensors_of(path).items()}
        diffusers_unet.check_layers(unet, len(tensors))
        with torch.device("meta"):
            model = registry.build(config)
        check_fit(tensors, model.state_dict(), weights[0].parent)
        diffusers_unet.check_pass(model)
    except (ValueError, RecipeError) as error:
        raise CheckpointError(f"{folder} cannot be converted: {error}") from None
    notes = {**choices(folder, weights[0]), **_notes(scheduler, tensors)}
    return Folder(config, tensors, _sampling(scheduler, config["shape"][1]), notes)


def digest_of(found: Found) -> str:
    """One SHA-256 of the files that `read` reads."""
    total = hashlib.sha256()
    for path in (found.network, *([found.scheduler] if found.scheduler else []), *found.weights):
        total.update(f"{path.name} {sha256(path)}\n".encode())
    return total.hexdigest()


def find(folder: Path) -> Found:
    """The files of a folder: both configurations, and the weights in one file or in shards.

    Raises CheckpointError if a file is missing, or if there are parts of another kind of pipeline.
    """
    inside = [folder / name for name in ("unet", AVERAGED) if (folder / name).is_dir()]
    unet_folder = inside[0] if inside else folder
    unet = unet_folder / "config.json"
    if not unet.is_file():
        raise CheckpointError(
            f"{folder} holds no config.json and no unet/config.json; give a folder of diffusers with a UNet2DModel"
        )
    homes = [folder]
    if not (folder / INDEX).is_file():
        parents = folder.resolve().parents  # of the pipeline, if this is its unet, or a checkpoint of its training
        homes += parents[:1] if unet_folder != folder else parents[:2]
    for home in homes:
        if (home / INDEX).is_file():
            _check_parts(home / INDEX)
    name = "scheduler_config.json"
    places = [home / "scheduler" / name for home in homes] + [home / name for home in homes[:2]]
    schedulers = [path for path in places if path.is_file()]
    if not schedulers:
        raise CheckpointError(
            f"{folder} has no scheduler/{name}, which says at which noise levels the network was trained; give the "
            "pipeline's folder"
        )
    return Found(unet, schedulers[0], weights_of(unet_folder))


def _check_parts(index: Path) -> None:
    parts = {key: value for key, value in json_of(index).items() if not key.startswith("_")}
    if others := sorted(key for key, value in parts.items() if key not in ("unet", "scheduler") and value):
        raise CheckpointError(
            f"{index} names {printable(', '.join(others), 60)} beside unet and scheduler: its network works on latents "
            "or other conditions, and this program converts networks of images"
        )


def weights_of(folder: Path) -> list[Path]:
    """The file of the tensors, or its shards; safetensors where both are there, another precision where it is alone."""
    variants = {
        match[1]
        for path in folder.iterdir()
        if (match := re.fullmatch(rf"{WEIGHTS}\.([a-z0-9_]+)\.(?:safetensors|bin)", path.name))
        or (match := re.fullmatch(rf"{WEIGHTS}\.(?:safetensors|bin)\.index\.([a-z0-9_]+)\.json", path.name))
    }
    for variant in ("", f".{min(variants)}" if len(variants) == 1 else ""):
        for suffix in (".safetensors", ".bin"):
            whole = folder / f"{WEIGHTS}{variant}{suffix}"
            index = folder / f"{WEIGHTS}{suffix}.index{variant}.json"
            if whole.is_file():
                return [whole]
            if index.is_file() and (shards := _shards(index)):
                return shards
    others = ", ".join(sorted(path.name for path in folder.glob(f"{WEIGHTS}*"))) or "none"
    raise CheckpointError(
        f"{folder} lacks {WEIGHTS}.safetensors (or .bin); files with such a name: {printable(others, 120)}; rename "
        "the one to convert"
    )


class _Index(BaseModel):
    weight_map: dict[str, str]


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it."""
    try:
        names = sorted(set(_Index.model_validate(json_of(index)).weight_map.values()))
    except ValidationError:
        raise CheckpointError(f"{index} has no weight_map from tensors to files; copy the folder again") from None
    if missing := [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]:
        listed = printable(", ".join(missing), 80)
        raise CheckpointError(f"{index} names {listed}, not found beside it; copy the folder again")
    return [index.parent / name for name in names]


def choices(folder: Path, weights: Path) -> dict[str, str]:
    """What was chosen where a folder holds more than one set of weights, or a rounded one, for people."""
    notes = {}
    if match := re.match(rf"{WEIGHTS}\.((?:fp|bf|f)\d+)\b", weights.name):
        notes["weights"] = f"{weights.name}, rounded to {match[1]}: others are not in the folder"
    if weights.parent.name == AVERAGED:
        notes["weights"] = f"{AVERAGED}, which are averaged"
    elif (averaged := weights.parent.parent / AVERAGED).is_dir():
        notes["averaged"] = f"{averaged} lies beside it; to convert the averaged weights, give that"
    return notes


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by today's names, float32."""
    content = torch_files.read_tensors(path, str(path), "copy it again, or give the network's own weights")
    old = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")
    return {old.sub(lambda m: f"{m[1]}{_OLD_NAMES[m[2]]}.", name): tensor.float() for name, tensor in content.items()}


def check_fit(tensors: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    """Raises CheckpointError unless the tensors have the names and shapes of `expected`. where: their folder."""
    problems = [
        *(f"{name} is missing" for name in expected.keys() - tensors.keys()),
        *(f"{name} is not of this network" for name in tensors.keys() - expected.keys()),
        *(
            f"{name} has shape {tuple(tensors[name].shape)} and not {tuple(expected[name].shape)}"
            for name in expected.keys() & tensors.keys()
            if tensors[name].shape != expected[name].shape
        ),
    ]
    if problems:
        first = "; ".join(sorted(problem.removeprefix(PREFIX) for problem in problems)[:3])
        raise CheckpointError(
            f"{where}: tensors do not fit config.json: {len(problems)} problems, the first: {printable(first, 120)}; "
            "copy the folder again, or install the version of diffusers that wrote it"
        )


def _sampling(scheduler: Config, side: int) -> dict[str, Any]:
    """Default sampling settings: the scheduler's kind of sampler, with fewer steps than it was trained on."""
    name, known = scheduler["_class_name"], diffusers_unet.process(scheduler).preconditioner
    if not isinstance(known, Discrete):
        return {"sampler": "heun", "steps": 18 if side <= 32 else 40}  # arXiv 2206.00364, table 2
    sampler, steps = ("ddpm", DDPM_STEPS) if name.startswith("DDPM") else ("ddim", DDIM_STEPS)
    clips = _clips(scheduler) and not _left_out(scheduler)
    larger = sampler == "ddpm" and str(scheduler.get("variance_type")).startswith("fixed_large")
    variance = {"ddpm_variance": "large"} if larger else {}
    return {"sampler": sampler, "steps": min(steps, len(known.sigmas)), "clip_denoised": clips, **variance}


def _clips(scheduler: Config) -> bool:
    # Only these two have the key; the library's default is to clip.
    return scheduler["_class_name"].startswith(("DDPM", "DDIM")) and bool(scheduler.get("clip_sample", True))


def _left_out(scheduler: Config) -> dict[str, str]:
    """What the scheduler does to denoised images, and no sampler here: then they are not clipped at all."""
    if scheduler.get("thresholding"):
        return {"left_out": "thresholding: denoised images are neither thresholded nor clipped"}
    limit = scheduler.get("clip_sample_range", 1.0)
    return {"left_out": f"clip_sample_range = {limit}: not clipped"} if _clips(scheduler) and limit != 1 else {}


def _notes(scheduler: Config, tensors: dict[str, Tensor]) -> dict[str, Any]:
    known = diffusers_unet.process(scheduler).preconditioner
    return {
        **_left_out(scheduler),
        "scheduler": scheduler["_class_name"],
        "predicts": known.prediction if isinstance(known, Discrete) else "EDM's F",
        "noise_levels": len(known.sigmas) if isinstance(known, Discrete) else "all",
        "stored_tensors": len(tensors),
    }


def licence_of(folder: Path) -> dict[str, str]:
    """{"licence": ...} as the model card of a folder states it; empty without a card, or where it states none."""
    card = folder / "README.md"
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2) if card.is_file() else []
    try:
        head = syntax.parse(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except ValueError:
        return {}
    head = head if isinstance(head, dict) else {}
    stated = head.get("license_name") if head.get("license") == "other" else head.get("license")
    return {"licence": printable(stated, 60)} if isinstance(stated, str) else {}


def json_of(path: Path) -> Config:
    """A configuration. Raises CheckpointError if the file is damaged."""
    try:
        content: dict[str, Any] = read_json(path)
    except RunError as error:
        raise CheckpointError(str(error).replace(DAMAGED, "copy it again")) from None
    return content


def public(config: Config) -> Config:
    """Without the library's private keys (its version, the name on the hub)."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}


# --- Writing


def write_folder(file: Checkpoint, out: Path, dry_run: bool = False) -> dict[str, Any]:
    """Writes a checkpoint as a folder of diffusers; returns what `export` prints of it.

    Reads the folder again before it gets its name and compares every tensor.
    Raises UsageError if `out` exists, CheckpointError if the library has no such architecture.
    """
    unet, scheduler, tensors = _theirs(file)
    is_there = out.exists()
    if is_there and not _holds(out, unet, scheduler, tensors):
        raise UsageError(f"--out {out} exists and holds something else; choose another name, or remove it")
    network, process, pipeline = diffusers_unet.UNET_CLASS, scheduler["_class_name"], None
    if process not in diffusers_unet.EDM_SCHEDULERS:  # whose input no pipeline of unet and scheduler scales
        pipeline = "DDIMPipeline" if process == "DDIMScheduler" else "DDPMPipeline"
    result = {
        "out": str(out),
        "family": "diffusers",
        "network": network,
        "scheduler": process,
        "pipeline": pipeline or "none",
        "checkpoint_sha256": file.sha256,
        "num_tensors": len(tensors),
    }
    if dry_run:
        return {**result, "verified": False, "dry_run": True}
    if is_there:
        console.info(f"{out} is finished; nothing to do")
        return {**result, "verified": True}
    with replacing(out) as folder:
        write_json(folder / "unet" / "config.json", unet)
        checkpoint.write_tensors(folder / "unet" / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        if pipeline:
            parts = {"unet": ["diffusers", network], "scheduler": ["diffusers", process]}
            write_json(folder / INDEX, {"_class_name": pipeline, **parts})
        if not _holds(folder, unet, scheduler, tensors):
            raise CheckpointError(f"{out}: what was written reads back different; it was removed, so try again")
    return {**result, "verified": True}


def _holds(folder: Path, unet: Config, scheduler: Config, tensors: dict[str, Tensor]) -> bool:
    """Whether a folder has these configurations and tensors."""
    try:
        held = read(folder).tensors
        configs = [read_json(folder / name) for name in ("unet/config.json", "scheduler/scheduler_config.json")]
    except DdoError as error:
        raise_disk_error(error)
        return False
    same = held.keys() == {PREFIX + name for name in tensors} and configs == json.loads(json.dumps([unet, scheduler]))
    return same and all(torch.equal(held[PREFIX + name], tensor.cpu().float()) for name, tensor in tensors.items())


def _theirs(file: Checkpoint) -> tuple[Config, Config, dict[str, Tensor]]:
    """Both configurations and the tensors, as the library has them."""
    config = registry.check_config(file.header.get("config"), file.path)
    if config["name"] == diffusers_unet.NAME:
        unet, scheduler = config["options"]["unet"], config["options"]["scheduler"]
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in file.tensors.items()}
    elif config["name"] == "adm-unet":
        try:
            unet, scheduler = diffusers_adm.configs(config)
        except ValueError as error:
            raise CheckpointError(f"{file.path} cannot become a folder of diffusers: {error}") from None
        tensors = diffusers_adm.tensors(file.tensors, config)
    else:
        raise CheckpointError(
            f"{file.path} holds the network {config['name']}, which diffusers does not have; it has "
            f"{diffusers_unet.NAME} and adm-unet"
        )
    return {"_class_name": diffusers_unet.UNET_CLASS, **unet}, scheduler, tensors
