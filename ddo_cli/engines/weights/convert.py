"""`ddo convert`: published weight files of other programs to ours, without running the code inside them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ddo_cli import checkpoint, console, foreign
from ddo_cli.errors import CheckpointError, UsageError, printable
from ddo_cli.files import sha256
from ddo_cli.models import pt_files, registry, snapshots
from ddo_cli.models.adm import files as adm_files
from ddo_cli.models.adm import published as adm_published
from ddo_cli.models.diffusers import files as diffusers_files
from ddo_cli.models.diffusers import pipelines
from ddo_cli.models.discriminators import files as dg_files
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.dit import diffusers as dit_diffusers
from ddo_cli.models.dit import files as dit_files
from ddo_cli.models.edm import files as edm_files
from ddo_cli.models.edm import score_sde
from ddo_cli.models.edm2 import files as edm2_files
from ddo_cli.models.var import files as var_files
from ddo_cli.models.var import tokenizers
from ddo_cli.recipe.schema import GuidanceRecipe, nearest

SMALL = 32  # side up to which EDM samples in 18 steps; 40 above (arXiv 2206.00364, table 2)
# Of ImageNet 64x64 (ibid., table 5), which the published ADM network of EDM's is for.
_IMAGENET = {"sampler": "heun", "steps": 256, "s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
_EDM2 = {"sampler": "heun", "steps": 32, "dtype": "float32"}  # arXiv 2312.02696, as its program draws
_ADM = {"sampler": "ddpm", "steps": 250, "clip_denoised": True}  # arXiv 2105.05233
_FLOAT16 = "its authors run it in float16; here it runs in float32, unless a precision is asked for"
_HUB = re.compile(r"[\w-]+/[\w.-]*[^./]")  # the name of a repository, such as google/ddpm-cifar10-32
FORMATS, FORMAT_NAMES = (".pkl", ".pt", ".pth"), ".pkl, .pt or .pth"


class Content(NamedTuple):
    """The content of a foreign file, under our names."""

    family: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sampling: dict[str, Any] = {}  # noqa: RUF012
    notes: dict[str, Any] = {}  # noqa: RUF012 (what else to tell the user)
    kind: str = "model"
    extra: dict[str, Any] = {}  # noqa: RUF012 (further entries of the header)


def run(
    source: Path,
    out: Path,
    *,
    model: str | None = None,
    trunk: str | None = None,
    vae: Path | None = None,
    settings: Sequence[str] = (),
    verify: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes `out` and returns the object that `convert --json` prints.

    source: a .pkl of EDM or EDM2 (the averaged weights); a .pt or .pth of an ADM diffusion model, an ADM classifier or
    a published discriminator; a .pt of a DiT or SiT; a .pth of VAR or its tokenizer; or a folder of diffusers with a
    UNet2DModel or a DiTTransformer2DModel and its scheduler. model, trunk: the model that a discriminator guides, and
    the converted classifier under it.
    settings: KEY=VALUE texts, see `parse_settings`, for what a file of ADM's, DG's, DiT's or VAR does not contain,
    and the size of images of a text-to-image pipeline.
    vae: the tokenizer of a VAR. verify: read the written file again and compare every tensor.
    Raises CheckpointError if the file cannot be used, UsageError where an option does not fit it.
    """
    if not source.exists():
        hub = (
            f" (of Hugging Face: hf download {source} --local-dir {source.name})" if _HUB.fullmatch(str(source)) else ""
        )
        raise UsageError(f"{source} does not exist; give a {FORMAT_NAMES} file, or a folder of diffusers{hub}")
    if vae is not None and not vae.is_file():
        raise UsageError(f"--vae {vae} is no file; give the .pth of the tokenizer, e.g. vae_ch160v4096z32.pth")
    if out.suffix in FORMATS:
        raise UsageError(f"--out {out} would be taken for a file of another format; name it {out.stem}.safetensors")
    given = parse_settings(settings)
    digest = _digest(source) if source.is_dir() else sha256(source)
    link = {"command": "convert", "source": source.resolve().name, "source_sha256": digest}
    link |= diffusers_files.licence_of(source)
    if vae is not None:
        link |= {"vae": vae.resolve().name, "vae_sha256": sha256(vae)}
    is_there = out.exists() and not dry_run
    taken = UsageError(f"--out {out} exists and holds something else; choose another name, or remove it")
    if is_there and not _is_of(out, link):  # before the work
        raise taken
    content = _read(source, model, trunk, given, vae)
    kind, config = content.kind, content.config
    if odd := [name for name, tensor in content.tensors.items() if not bool(tensor.isfinite().all())]:
        raise CheckpointError(
            f"{source}: {len(odd)} tensors have numbers that are not finite, {odd[0]} is the first; "
            "the file is damaged or its training has diverged: download it again"
        )
    for option, value in (("--model", model), ("--trunk", trunk)):
        if value is not None and kind != "discriminator":
            raise UsageError(f"{option} is for discriminators, and {source} holds a {kind}; leave it out")
    if vae is not None and config["name"] != "var":
        raise UsageError(f"--vae is for VAR's transformers, and {source} holds a {config['name']}; leave it out")
    sampling = {"sampling": content.sampling} if content.sampling else {}
    result = {
        "out": str(out),
        "family": content.family,
        "kind": kind,
        "network": config["name"],
        "shape": config["shape"],
        **({"num_classes": config["num_classes"]} if "num_classes" in config else {}),
        "num_tensors": len(content.tensors),
        "num_parameters": _num_parameters(kind, config),
        **{key: config["options"][key] for key in ("precond", "learned_variance") if key in config["options"]},
        **content.notes,
        **sampling,
        "source": link["source"],
        "source_sha256": digest,
    }
    if dry_run:
        return {**result, "dry_run": True}
    header = {"kind": kind, "config": config, **sampling, **content.extra, "provenance": [link]}
    if not is_there:
        checkpoint.save(out, content.tensors, header)
    elif checkpoint.difference(out, content.tensors, header):
        raise taken
    else:
        console.info(f"{out} is finished; nothing to do")
    if verify:
        if wrong := checkpoint.difference(out, content.tensors, header):
            raise CheckpointError(f"{out}: {wrong} differs from what was converted; remove it and convert again")
        result["verified"] = True
    return result


def _digest(folder: Path) -> str:
    """One SHA-256 of the files of a folder of diffusers that are read."""
    if pipelines.is_pipeline(folder):
        return pipelines.digest_of(folder)
    found = dit_diffusers.find(folder)
    return diffusers_files.digest_of(diffusers_files.find(folder) if found is None else found)


def _is_of(out: Path, link: dict[str, Any]) -> bool:
    """Whether a file was converted from the same one."""
    try:
        return checkpoint.read_header(out).get("provenance") == [link]
    except CheckpointError:
        return False


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """The KEY=VALUE texts: values of `adm_published.Told`, of `dit.files.Told`, or patch_nums, a VAR's sides.

    Raises UsageError for anything else, and for a key that comes twice.
    """
    values: dict[str, Any] = {}
    for text in settings:
        key, _, value = text.partition("=")
        if key in values:
            raise UsageError(f"{key} is told twice; leave one out")
        if key in _WORDS and value in _WORDS[key]:
            values[key] = _WORDS[key][value]
        elif key in _NUMBERS and value.isascii() and value.isdecimal() and len(value) < 7 and int(value):
            values[key] = int(value)
            if key == "steps" and not _STEPS[0] <= values[key] <= _STEPS[1]:
                low, high = _STEPS
                raise UsageError(
                    f"{text}: schedules have {low} to {high:,} steps; give the diffusion_steps of its training"
                )
        elif key == "patch_nums" and (sides := _sides(value)):
            values[key] = sides
        else:
            known = {**{key: "|".join(words) for key, words in _WORDS.items()}, **dict.fromkeys(_NUMBERS, "<number>")}
            known["patch_nums"] = "1,2,3,... (growing sides)"
            if key in known:
                raise UsageError(f"'{printable(text)}' cannot be used; write {key}={known[key]}")
            raise UsageError(f"'{printable(text)}' cannot be used{nearest(key, known)}; known: {', '.join(known)}")
    return values


_TRUTHS = {"true": True, "false": False}
_WORDS: dict[str, dict[str, Any]] = {
    "arch": {arch: arch for arch in dit_files.MEANINGS},
    "qkv": {"legacy": "legacy", "new": "new"},
    "schedule": {"linear": "linear", "cosine": "cosine"},
    "rescale": _TRUTHS,
    "updown": _TRUTHS,
    "scale_shift": _TRUTHS,
    "unbounded": _TRUTHS,
}
_STEPS = (21, 100_000)  # of fewer, the linear schedule's last beta would be 1
_NUMBERS = ("size", "steps", "heads", "head_channels")


def _sides(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4); empty for anything but increasing sides that start with 1."""
    if not re.fullmatch(r"1(,\d{1,3}){1,31}", text):
        return ()
    sides = tuple(map(int, text.split(",")))
    return sides if list(sides) == sorted(set(sides)) else ()


def _foreign(source: Path) -> str:
    """What a file of another program is, for a message; empty if that cannot be told."""
    if source.suffix == ".ckpt":
        return "a checkpoint of PyTorch Lightning or TensorFlow by its name, "
    if source.suffix == ".bin":
        return "weights of a transformers or diffusers folder by its name, "
    try:
        with checkpoint.open_tensors(source) as content:
            if "ddo" in (content.metadata() or {}):
                return "a file that ddo wrote and needs no conversion, "
    except (SafetensorError, OSError, ValueError):
        return ""
    return f"{foreign.network_of(source) or 'a safetensors file of another program'}, "


def _read(source: Path, model: str | None, trunk: str | None, given: dict[str, Any], vae: Path | None) -> Content:
    """The file's content, of any family."""
    if source.is_dir() and pipelines.is_pipeline(source):
        if unknown := given.keys() - {"size"}:
            raise UsageError(f"{source} is a pipeline, of which only size can be told; leave {min(unknown)} out")
        folder = pipelines.read(source, given.get("size"))
        return Content("diffusers", folder.config, folder.tensors, folder.sampling, folder.notes)
    if given and source.suffix not in (".pt", ".pth"):
        raise UsageError(f"{source} tells its configuration itself; KEY=VALUE is for .pt and .pth files")
    if source.is_dir() and (found := dit_diffusers.find(source)) is not None:
        dit = dit_diffusers.read(source, found)
        return Content("diffusers", dit.config, dit.tensors, dit_files.SAMPLING["dit"], dit.notes)
    if source.is_dir():
        folder = diffusers_files.read(source)
        return Content("diffusers", folder.config, folder.tensors, folder.sampling, folder.notes)
    if source.suffix not in FORMATS:
        raise UsageError(
            f"{source} is {_foreign(source)}no file of published weights; give a {FORMAT_NAMES} file, or a folder of "
            "diffusers"
        )
    if source.suffix == ".pkl":
        snapshot = snapshots.open_snapshot(source)
        return _edm2(source, snapshot) if edm2_files.is_edm2(snapshot) else _edm(source, snapshot)
    marks = (var_files.MARK, adm_files.MARK, dit_files.MARK, var_files.MARK_OF_VAE, score_sde.MARK)
    weights = pt_files.read(source, adm_files.EXPECTED, marks)
    content = _of_tensors(source, weights, model, trunk, given, vae)
    return content._replace(notes={**weights.notes, **_averaged_beside(source), **content.notes})


def _of_tensors(
    source: Path,
    weights: pt_files.Weights,
    model: str | None,
    trunk: str | None,
    given: dict[str, Any],
    vae: Path | None,
) -> Content:
    """What the tensors of a .pt or .pth make, of any family."""
    stored = weights.tensors
    pt_files.check_size(stored.values(), source)
    if dit_files.is_dit(stored):
        return _dit(source, weights, given)
    if score_sde.is_score_sde(stored):
        return _score_sde(source, weights, given)
    if "unbounded" in given:
        raise UsageError(f"{source} is no file of score_sde, and unbounded is for those; leave it out")
    if "arch" in given:
        raise UsageError(f"{source} is no file of DiT or SiT, and arch is for those; leave it out")
    if var_files.is_var(stored) or var_files.is_vae(stored):
        return _var(source, stored, given, vae)
    if "patch_nums" in given:
        raise UsageError(f"{source} is no file of VAR, and patch_nums is for those; leave it out")
    told = adm_published.Told(**given)
    if adm_files.is_unet(stored):
        return _adm(source, stored, told)
    return _discriminator_guidance(source, model, trunk, told)


def _averaged_beside(source: Path) -> dict[str, str]:
    """A note where a trainer has left averaged weights beside the ones that are converted."""
    beside = pt_files.weights_beside(source) if source.name.startswith("model") else None
    return {"averaged": f"{beside} lies beside it; samples are drawn of averaged weights"} if beside else {}


def _edm(source: Path, snapshot: snapshots.Snapshot) -> Content:
    """A network of EDM's pickles, with its published way of sampling."""
    file = edm_files.read_edm(source, snapshot)
    side, is_adm = file.config["shape"][-1], file.config["name"] == "adm-unet"
    sampling = _IMAGENET if is_adm else {"sampler": "heun", "steps": 18 if side <= SMALL else 40}
    notes: dict[str, Any] = {"classes_found": " around ".join(file.classes), "stored_tensors": len(file.stored)}
    notes |= {"note": _FLOAT16} if file.half else {}
    return Content("edm", file.config, file.tensors, sampling, notes)


def _edm2(source: Path, snapshot: snapshots.Snapshot) -> Content:
    """A network of EDM2's pickles, with its published way of sampling and, by the file's name, which average it is."""
    file = edm2_files.read(source, snapshot)
    ema = edm2_files.ema_of(source.name)
    notes = {
        "published_as": edm2_files.published_as(file.config) or "no published size",
        "stored_tensors": len(file.stored),
        "stored_dtype": str(file.stored["unet.out_conv.weight"].dtype).removeprefix("torch."),
        **({"ema": ema} if ema else {}),
        **({"note": _FLOAT16} if file.half else {}),
    }
    return Content("edm2", file.config, file.tensors, _EDM2, notes, extra={"ema": ema} if ema else {})


def _adm(source: Path, stored: dict[str, Tensor], told: adm_published.Told) -> Content:
    """An ADM diffusion model, with the published way of sampling."""
    file = adm_files.unet(stored, source, told)
    notes = {
        "published_as": file.described.name or "no published one: as you told",
        "qkv": file.described.order,
        **_assumed(file.described.assumed),
        "stored_tensors": len(stored),
    }
    options = file.config["options"]
    sampling = {**_ADM, "steps": min(_ADM["steps"], options["num_steps"])}
    if not options["learned_variance"]:
        sampling["ddpm_variance"] = "large"  # of that code, which knows no other
    return Content("adm", file.config, file.tensors, sampling, notes)


def _assumed(assumed: dict[str, Any]) -> dict[str, str]:
    """What neither the file nor the user tells, for the user to check."""
    return {"assumed": ", ".join(f"{key}={str(value).lower()}" for key, value in assumed.items())} if assumed else {}


def _dit(source: Path, weights: pt_files.Weights, given: dict[str, Any]) -> Content:
    """A DiT or SiT, with the way of sampling of its published figure."""
    if unknown := given.keys() - set(dit_files.Told._fields):
        raise UsageError(f"{source} is a DiT or SiT, of which arch and heads can be told; leave {min(unknown)} out")
    file = dit_files.read(weights.tensors, source, dit_files.Told(**given), weights.settings)
    notes = {**file.notes, "stored_tensors": len(weights.tensors)}
    return Content("dit", file.config, file.tensors, dit_files.SAMPLING[file.arch], notes)


def _score_sde(source: Path, weights: pt_files.Weights, given: dict[str, Any]) -> Content:
    """A DDPM++ of score_sde or Soft Truncation, with the way of sampling of the latter's published figure."""
    if unknown := given.keys() - set(score_sde.Told._fields):
        raise UsageError(
            f"{source} is a DDPM++ of score_sde, of which size and unbounded can be told; leave {min(unknown)} out"
        )
    file = score_sde.read(weights, source, score_sde.Told(**given))
    others = weights._replace(left_out=[name for name in weights.left_out if name != "ema"])  # which has been read
    notes = {**others.notes, **file.notes, "stored_tensors": len(weights.tensors)}
    return Content("score_sde", file.config, file.tensors, score_sde.SAMPLING, notes)


def _var(source: Path, stored: dict[str, Tensor], given: dict[str, Any], vae: Path | None) -> Content:
    """A transformer with its tokenizer, or a tokenizer by itself."""
    if given.keys() - {"patch_nums"}:
        raise UsageError(f"{source} is of VAR, of which only patch_nums can be told; leave the other KEY=VALUE out")
    if var_files.is_vae(stored):
        file = var_files.vae_file(stored, source, **given)
        return Content("var", file.config, file.tensors, notes=file.notes, kind=tokenizers.KIND)
    file = var_files.var(stored, source, vae, **given)
    return Content("var", file.config, file.tensors, var_files.SAMPLING, file.notes)


def _discriminator_guidance(source: Path, model: str | None, trunk: str | None, told: adm_published.Told) -> Content:
    """An ADM classifier, or a discriminator with the settings that `guide-sample` reads."""
    header = {} if model is None else checkpoint.read_header(model, kind="model")
    num_classes = header["config"]["num_classes"] if header else 0
    file = dg_files.read(source, trunk=trunk, num_classes=num_classes, told=told)
    extra: dict[str, Any] = {"process": discriminators.PROCESS}
    notes = _assumed(file.assumed)
    if file.kind == "classifier":
        return Content("adm", file.config, file.tensors, notes=notes, kind=file.kind, extra=extra)
    if model is None:
        raise UsageError(f"{source} is a discriminator; say with --model which converted model it guides")
    trained_on = {"model": model, "model_sha256": sha256(checkpoint.resolve(model)), "sampling": None}
    # As in the published runs: weight 2; with labels weight 1 and boosting.
    conditional = bool(file.config["num_classes"])
    guidance = GuidanceRecipe(dg_weight=1.0 if conditional else 2.0, boost=conditional)
    extra |= {"trained_on": trained_on, "guidance": guidance.model_dump(mode="json")}
    return Content("dg", file.config, file.tensors, notes=notes, kind=file.kind, extra=extra)


def _num_parameters(kind: str, config: dict[str, Any]) -> int:
    if kind in ("model", tokenizers.KIND):
        with torch.device("meta"):
            network: nn.Module = registry.build(config) if kind == "model" else tokenizers.build(config)
    else:  # built for real, since a discriminator reads its trunk from a file
        network = discriminators.build(kind, config)
    return sum(parameter.numel() for parameter in network.parameters())
