"""Folders of text-to-image pipelines as diffusers writes them -> our models.

    model_index.json                              the pipeline's class and its parts
    unet/ or transformer/, scheduler/             as in `files`
    text_encoder/, tokenizer/, ...                read where prompts are encoded, see `texts`
    vae/                                          read where images are encoded or decoded, see `vae_codec`

Weights of the network go into a weight file, the other parts stay where they are: the file names the folder.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddo_cli import checkpoint, console, dist, hub
from ddo_cli.errors import CheckpointError, RecipeError, UsageError, printable, reason
from ddo_cli.files import cache_directory, sha256
from ddo_cli.models import registry
from ddo_cli.models.diffusers import files, text_model, texts
from ddo_cli.models.diffusers.families import FAMILIES
from ddo_cli.models.diffusers.family import INDEX, Family
from ddo_cli.models.diffusers.files import Folder, Found
from ddo_cli.models.diffusers.text_model import PREFIX
from ddo_cli.models.loading import NO_NETWORK, SPARE, at_most

# Networks that few-step distillation has made: their estimate is of no noise level's denoiser.
_DISTILLED = re.compile(r"turbo|lightning|hyper-?sd|schnell|\blcm\b|sdxs|dmd2?\b|flux\.2-klein-(?!base)", re.IGNORECASE)
_DISTILLED_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
_GUIDED = ("FluxPipeline", "Flux2Pipeline")  # pipelines whose networks are distilled from guided samples
_VARIANTS = ("*.fp16*", "*.bf16*", "*.non_ema*")  # weights of the Hub that are there in float32, too
_UNREAD = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")


def is_pipeline(path: str | Path) -> bool:
    """Whether this is the folder of a pipeline with a text encoder."""
    index = Path(path) / INDEX
    return index.is_file() and any(key.startswith("text_encoder") for key in files.json_of(index))


def folder_of(name: str) -> Path | None:
    """The folder of a pipeline with a text encoder, by its path or its address on the Hub; None where it is neither.

    Of the Hub only what is read is fetched, after a look at what it is. Raises CheckpointError for a pipeline of
    another kind or a distilled network.
    """
    if not hub.is_address(name):
        return Path(name) if is_pipeline(name) else None
    index = hub.index_of(name, INDEX)
    if index is None or not is_pipeline(index.parent):
        return None
    family = _family(index.parent)
    _refuse_distilled(index.parent, {}, {}, files.json_of(index))
    parts = (family.part, "scheduler", "vae", *family.texts)
    wanted = [f"{part}/*.{ending}" for part in parts for ending in ("json", "txt", "model", "jinja", "safetensors")]
    console.info(f"{name}: a {family.pipeline}, fetched from the Hub unless it is in its cache")
    return hub.folder(name, [INDEX, *wanted], _VARIANTS)


def _names(folder: Path) -> list[str]:
    """What a folder is called, in the Hub's cache by the repository."""
    return [*(part for part in folder.resolve().parts if part.startswith("models--")), folder.resolve().name]


def _family(folder: Path) -> Family:
    """The family of a pipeline's folder. Raises CheckpointError for a class that is in none."""
    name = str(files.json_of(folder / INDEX).get("_class_name"))
    known = {family.pipeline: family for family in FAMILIES.values()}
    if name in _GUIDED:
        raise CheckpointError(
            f"{folder} is a {name}, whose network is distilled from guided samples: its estimate is no denoiser's, and "
            "ratios of its likelihoods mean little; give a base such as FLUX.2-klein-base"
        )
    if name not in known:
        raise CheckpointError(
            f"{folder} is a {printable(name, 60)}; of text-to-image pipelines {', '.join(sorted(known))} can be used"
        )
    return known[name]


def _find(folder: Path, family: Family) -> Found:
    """The files of network and scheduler. Raises CheckpointError where a part of the pipeline is missing."""
    for part in (family.part, "scheduler", "vae", *family.texts):
        if not (folder / part).is_dir():
            raise CheckpointError(f"{folder} has no {part}/, which its pipeline needs; copy the whole folder")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return Found(folder / family.part / "config.json", scheduler, files.weights_of(folder / family.part))


def read(folder: Path, side: int | None = None) -> Folder:
    """The model of a pipeline's folder, without prompts; tensors in float32.

    side: of images in pixels; None: that of the network's training. Raises CheckpointError for a pipeline of another
    kind or a distilled network, UsageError where a library is missing.
    """
    family, index = _family(folder), files.json_of(folder / INDEX)
    found = _find(folder, family)
    assert found.scheduler is not None, "see _find"
    network, scheduler = files.json_of(found.network), files.public(files.json_of(found.scheduler))
    scheduler |= family.scheduler
    _refuse_distilled(folder, network, scheduler, index)
    vae = files.json_of(folder / "vae" / "config.json")
    if (kind := vae.get("_class_name")) != family.vae:
        shown = printable(str(kind), 40)
        raise CheckpointError(f"{folder} has a {shown} in vae/, and {family.title} needs a {family.vae}")
    encoder = texts.Encoder(family.name, str(folder.resolve()), texts.digest_of(folder, family))
    try:
        network = files.public(network)
        full = family.arguments(network)
        if (channels := vae.get("latent_channels", 4) * family.patch**2) != full["in_channels"]:
            raise ValueError(f"in_channels = {full['in_channels']}, and its autoencoder makes {channels}")
        side = side or family.side(full, vae)
        config = text_model.config_of(family, network, scheduler, encoder, side, family.affine(vae, folder / "vae"))
        tensors = {PREFIX + key: tensor for path in found.weights for key, tensor in files.tensors_of(path).items()}
        with torch.device("meta"), at_most(2 * len(tensors) + SPARE):
            model = registry.build(config)
        files.check_fit(tensors, model.state_dict(), found.weights[0].parent)
    except (ValueError, RecipeError) as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from None
    except NO_NETWORK as error:
        what = f"{type(error).__name__}: {reason(error, 80)}"
        raise CheckpointError(f"{folder}: a config.json of it describes no network ({what}); copy it again") from None
    notes = {**files.choices(folder, found.weights[0]), **_notes(family, index, scheduler)}
    return Folder(config, tensors, dict(family.sampling), notes)


def _refuse_distilled(folder: Path, network: Any, scheduler: dict[str, Any], index: dict[str, Any]) -> None:
    names = [*_names(folder), *(str(part.get("_name_or_path", "")) for part in (index, network))]
    what = next((name for name in names if _DISTILLED.search(name)), None)
    if scheduler.get("_class_name") in _DISTILLED_SCHEDULERS:
        what = scheduler["_class_name"]
    if index.get("is_distilled"):
        what = f"is_distilled of {INDEX}"
    if what:
        raise CheckpointError(
            f"{folder} is distilled to few steps, as {printable(what, 60)} tells: its estimate is no denoiser's, and "
            "ratios of its likelihoods mean little; give the base that it was made of"
        )


def _notes(family: Family, index: dict[str, Any], scheduler: dict[str, Any]) -> dict[str, Any]:
    left = sorted(key for key in _UNREAD if isinstance(index.get(key), list) and index[key][0])
    return {
        "pipeline": family.pipeline,
        **family.notes(scheduler),
        **({"left_out": ", ".join(left)} if left else {}),
    }


def digest_of(folder: Path) -> str:
    """One SHA-256 of the files that a model needs: those of `files.digest_of`, text encoder and autoencoder."""
    family = _family(folder)
    total = hashlib.sha256(files.digest_of(_find(folder, family)).encode())
    total.update(texts.digest_of(folder, family).encode())
    for path in sorted((folder / "vae").glob("*.json")) + sorted((folder / "vae").glob("*.safetensors")):
        total.update(f"{path.name} {sha256(path)}\n".encode())
    return total.hexdigest()


def weight_file(folder: Path) -> Path:
    """The weight file that `ddo convert` would make of a pipeline's folder, made in the cache when it is first needed.

    Raises UsageError where there is no cache.
    """
    family = _family(folder)
    key = hashlib.sha256(f"{text_model.NAME} {folder.resolve()}".encode())
    parts = (family.part, "scheduler", "vae", *family.texts)
    for path in sorted([folder / INDEX, *(path for part in parts for path in (folder / part).glob("*"))]):
        stat = path.stat()
        key.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = cache_directory()
    if cache is None:
        raise UsageError(f"{folder} is read into the cache, which DDO_CACHE turns off; give the file of `ddo convert`")
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", _names(folder)[0].removeprefix("models--"))[:40]
    file = cache / "pipelines" / f"{stem}-{key.hexdigest()[:16]}.safetensors"
    if dist.is_main() and not file.is_file():
        content = read(folder)
        for note, value in content.notes.items():
            console.info(f"{folder}: {note} {value}")
        size = sum(tensor.nbytes for tensor in content.tensors.values())
        console.info(f"{folder}: its {family.network} is written to {file} ({size / 1e9:.1f} GB), once")
        link = {"command": "convert", "source": folder.resolve().name, "source_sha256": digest_of(folder)}
        link |= files.licence_of(folder)
        header = {"kind": "model", "config": content.config, "sampling": content.sampling, "provenance": [link]}
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(file, content.tensors, header)
    dist.barrier()
    return file


def made_again(header: Mapping[str, Any]) -> Path | None:
    """`weight_file` of the folder that a model was made of, or of $DDO_PIPELINE; None if neither holds the same files.

    header: of the model, or of an adapter of it.
    """
    config, links = header["config"], header.get("provenance", [])
    folder = texts.place_of(config["options"]["pipeline"])
    if not links or not is_pipeline(folder) or digest_of(folder) != links[0].get("source_sha256"):
        return None
    file = weight_file(folder)
    return file if checkpoint.read_header(file)["config"]["shape"] == config["shape"] else None
