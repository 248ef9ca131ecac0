"""Folders of text-to-image pipelines as diffusers writes them -> our models.

    model_index.json                              the pipeline's class and its parts
    unet/, scheduler/                             as in `files`
    text_encoder/, tokenizer/                     read where prompts are encoded, see `texts`
    vae/                                          read where images are encoded or decoded, see `vae_codec`

Weights of the UNet go into a weight file, the other parts stay where they are: the file names the folder.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ddo_cli import checkpoint, console, dist
from ddo_cli.diffusion.precond import Discrete
from ddo_cli.errors import CheckpointError, RecipeError, UsageError, printable
from ddo_cli.files import cache_directory, sha256
from ddo_cli.models import registry
from ddo_cli.models.diffusers import files, text_unet, texts
from ddo_cli.models.diffusers import unet as diffusers_unet
from ddo_cli.models.diffusers.files import INDEX, PREFIX, Folder

PARTS = ("unet", "scheduler", "vae", *texts.PARTS)
CLASSES = ("StableDiffusionPipeline",)
# Networks that few-step distillation has made: their estimate is of no noise level's denoiser.
_DISTILLED = re.compile(r"turbo|lightning|hyper-?sd|schnell|\blcm\b|sdxs|dmd2?\b", re.IGNORECASE)
_DISTILLED_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
_UNREAD = (
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "requires_safety_checker",
    "force_zeros_for_empty_prompt",
)
SAMPLING = {"sampler": "ddim", "steps": 50, "cfg_scale": 7.5, "batch": 4}  # of the library's pipeline; images at once


def is_pipeline(path: str | Path) -> bool:
    """Whether this is the folder of a pipeline with a text encoder."""
    index = Path(path) / INDEX
    return index.is_file() and any(key.startswith("text_encoder") for key in files.json_of(index))


def read(folder: Path) -> Folder:
    """The model of a pipeline's folder, without prompts; tensors in float32.

    Raises CheckpointError for a pipeline of another kind or a distilled network, UsageError where a library is missing.
    """
    index = files.json_of(folder / INDEX)
    if (name := str(index.get("_class_name"))) not in CLASSES:
        raise CheckpointError(
            f"{folder} is a {printable(name, 60)}; of text-to-image pipelines {' and '.join(CLASSES)} (Stable "
            "Diffusion 1.x and 2.x) can be used"
        )
    found = files.find(folder, has_text=True)
    assert found.scheduler is not None, "see find"
    raw = files.json_of(found.network)
    scheduler = {**files.public(files.json_of(found.scheduler)), "steps_offset": 1}  # which the pipeline sets, too
    _refuse_distilled(folder, raw, scheduler, str(index.get("_name_or_path", "")))
    for part in ("vae", *texts.PARTS):
        if not (folder / part).is_dir():
            raise CheckpointError(f"{folder} has no {part}/, which its pipeline needs; copy the whole folder")
    vae = files.json_of(folder / "vae" / "config.json")
    encoder = texts.Encoder(str(folder.resolve()), texts.digest_of(folder))
    try:
        config = text_unet.config_of(
            files.public(raw), scheduler, encoder, vae.get("scaling_factor", 0.18215), vae.get("shift_factor") or 0.0
        )
        tensors = {PREFIX + key: tensor for path in found.weights for key, tensor in files.tensors_of(path).items()}
        with torch.device("meta"):
            model = registry.build(config)
        files.check_fit(tensors, model.state_dict(), found.weights[0].parent)
    except (ValueError, RecipeError) as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from None
    return Folder(config, tensors, SAMPLING, {**files.choices(folder, found.weights[0]), **_notes(index, scheduler)})


def _refuse_distilled(folder: Path, unet: dict[str, Any], scheduler: dict[str, Any], origin: str) -> None:
    names = [folder.name, origin, str(unet.get("_name_or_path", ""))]
    what = next((name for name in names if _DISTILLED.search(name)), None)
    if scheduler.get("_class_name") in _DISTILLED_SCHEDULERS:
        what = scheduler["_class_name"]
    if what:
        raise CheckpointError(
            f"{folder} is distilled to few steps, as {printable(what, 60)} tells: its estimate is no denoiser's, and "
            "ratios of its likelihoods mean little; give the base that it was made of"
        )


def _notes(index: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, Any]:
    known = diffusers_unet.process(scheduler).preconditioner
    assert isinstance(known, Discrete), "see config_of"
    left = sorted(key for key in _UNREAD if isinstance(index.get(key), list) and index[key][0])
    own = scheduler["_class_name"]
    return {
        "pipeline": index["_class_name"],
        "predicts": known.prediction,
        "scheduler": own if own == "DDIMScheduler" else f"{own}, whose noise levels are drawn from by ddim",
        **({"left_out": ", ".join(left)} if left else {}),
    }


def digest_of(folder: Path) -> str:
    """One SHA-256 of the files that a model needs: those of `files.digest_of`, text encoder and autoencoder."""
    total = hashlib.sha256(files.digest_of(files.find(folder, has_text=True)).encode())
    total.update(texts.digest_of(folder).encode())
    for path in sorted((folder / "vae").glob("*.json")) + sorted((folder / "vae").glob("*.safetensors")):
        total.update(f"{path.name} {sha256(path)}\n".encode())
    return total.hexdigest()


def weight_file(folder: Path) -> Path:
    """The weight file that `ddo convert` would make of a pipeline's folder, made in the cache when it is first needed.

    Raises UsageError where there is no cache.
    """
    key = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for part in PARTS for path in (folder / part).glob("*")):
        stat = path.stat()
        key.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = cache_directory()
    if cache is None:
        raise UsageError(f"{folder} is read into the cache, which DDO_CACHE turns off; give the file of `ddo convert`")
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", folder.resolve().name)[:40]
    file = cache / "pipelines" / f"{stem}-{key.hexdigest()[:16]}.safetensors"
    if dist.is_main() and not file.is_file():
        content = read(folder)
        for note, value in content.notes.items():
            console.info(f"{folder}: {note} {value}")
        size = sum(tensor.nbytes for tensor in content.tensors.values())
        console.info(f"{folder}: its {text_unet.UNET_CLASS} is written to {file} ({size / 1e9:.1f} GB), once")
        link = {"command": "convert", "source": folder.resolve().name, "source_sha256": digest_of(folder)}
        link |= files.licence_of(folder)
        header = {"kind": "model", "config": content.config, "sampling": content.sampling, "provenance": [link]}
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(file, content.tensors, header)
    dist.barrier()
    return file
