"""`ddo info`: the content of a checkpoint, sample set, encoded set or run directory."""

from pathlib import Path
from typing import Any

from ddo_cli import checkpoint, console, ledger, rundir
from ddo_cli.data import latents
from ddo_cli.data.samples import MANIFEST, read_dict
from ddo_cli.errors import RunError, UsageError
from ddo_cli.files import DAMAGED, read_json, sha256

DESCRIBING = (  # entries of a header that are shown unchanged
    "config", "adapter", "base", "process", "trained_on", "guidance", "heldout", "sampling", "step", "owner", "metric",
    "protocol", "data",
)  # fmt: skip


def run(path: str) -> dict[str, Any]:
    """A description of the file or directory; `holds` names its kind, `damaged` files that are not as they were
    written.
    """
    place = Path(path)
    if not place.is_dir():
        return _weight_file(path)
    description, files = _directory(path, place), ledger.near(place)
    damaged = files.problems(place)
    if files.directory == place.absolute() and (problem := files.own_problem()) is not None:
        damaged[ledger.LEDGER] = problem
    for name, problem in damaged.items():
        console.warn(f"{path}: {name} {problem}")
    return {**description, **({"damaged": damaged} if damaged else {})}


def _directory(path: str, place: Path) -> dict[str, Any]:
    if (place / MANIFEST).is_file():
        manifest = _json(place / MANIFEST)
        kind = "encoded set" if manifest.get("format") == latents.FORMAT else "sample set"
        # Without labels, and with the number of the shards instead of their hashes.
        short = {key: value for key, value in manifest.items() if key not in ("labels", "shards")}
        shards = manifest.get("shards")
        num_shards = {"shards": len(shards)} if isinstance(shards, list) else {}
        return {"holds": kind, "path": path, **short, **num_shards}
    run_dir = rundir.RunDir(place)
    if run_dir.state_file.is_file() or run_dir.state_before.is_file():
        return _run_directory(run_dir)
    if (place / "edit.json").is_file():
        return {"holds": "edited images", "path": path, **_json(place / "edit.json")}
    analyses = [content for file in sorted(place.glob("*.json")) if "analysis" in (content := read_dict(file))]
    if analyses:
        figures = {}  # the numbers among the results of `ddo analyze`, by analysis
        for content in analyses:
            numbers = {key: value for key, value in content.items() if isinstance(value, (int, float))}
            figures[str(content["analysis"])] = numbers
        return {"holds": "analyses", "path": path, **figures}
    raise UsageError(f"{path} is a directory with neither manifest.json nor state.json; ddo did not write it")


def _json(file: Path) -> dict[str, Any]:
    """The content of a file that has a name of ours. Raises RunError if it is damaged, or of another program."""
    try:
        content: dict[str, Any] = read_json(file)
    except RunError as error:
        raise RunError(str(error).replace(DAMAGED, "if ddo wrote it, restore it from a copy")) from None
    return content


def _weight_file(path: str) -> dict[str, Any]:
    file = checkpoint.load(path)
    description: dict[str, Any] = {
        "holds": f"checkpoint of kind '{file.header['kind']}'",
        "path": path,
        "sha256": file.sha256,
        "num_tensors": len(file.tensors),
        "num_parameters": sum(tensor.numel() for tensor in file.tensors.values()),
    }
    description |= {key: file.header[key] for key in DESCRIBING if key in file.header}
    if "provenance" in file.header:
        description["provenance"] = [_link(link) for link in file.header["provenance"]]
    return description


def _run_directory(run_dir: rundir.RunDir) -> dict[str, Any]:
    place, state = run_dir.path, run_dir.state()
    files = sorted(str(file.relative_to(place)) for file in place.rglob("*.safetensors") if "shard-" not in file.name)
    weights = {name: sha256(place / name) for name in files if "train-state" not in name}
    of_finetuning = {
        "reference_sha256": state.get("reference_sha256"),
        "reference_score": (state.get("reference") or {}).get("score"),
        **{
            name: [{key: record[key] for key in ("round", "score", "promoted")} for record in state.get(name, [])]
            for name in ("rounds", "control")
        },
    }
    return {
        "holds": f"run of {state.get('command', 'an unknown command')}",
        "path": str(place),
        "finished": bool(state.get("finished")),
        **{key: value for key, value in of_finetuning.items() if value},
        **{key: state[key] for key in ("score", "heldout_bce", "heldout_accuracy", "settled") if key in state},
        "sha256": weights,
    }


def _link(link: dict[str, Any]) -> dict[str, Any]:
    """A step of the provenance, with its recipe's name and main settings instead of the whole recipe."""
    short = {key: value for key, value in link.items() if key not in ("recipe", "classes")}
    recipe = link.get("recipe", {})
    sections = {"finetune-ddo": "finetune", "pretrain": "pretrain", "train-disc": "discriminator"}
    section = recipe.get(sections.get(link["command"], ""))
    keys = ("alpha", "beta", "lr", "batch", "images", "images_per_round")
    settings = {key: section[key] for key in keys if key in section} if isinstance(section, dict) else {}
    return {**short, "recipe": recipe.get("name"), **settings}
