"""`ddo doctor`: what of this machine matters to the program, on one screen, for an issue."""

import os
import platform
import shutil
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddo_cli import __version__, checkpoint
from ddo_cli.data.stream import available_cores
from ddo_cli.errors import CheckpointError, visible
from ddo_cli.files import cache_directory, sha256
from ddo_cli.metrics.extractors import weights
from ddo_cli.metrics.extractors.select import EMBEDDED_EXTRACTOR

GIB = 2**30
WIDTH = 80  # of the screen
PACKAGES = ("torchvision", "torch-fidelity", "numpy", "scipy", "safetensors", "pydantic", "typer")
OPTIONAL = ("diffusers", "transformers", "tensorboard", "wandb")  # imported by the commands that need them
VARIABLES = (
    "DDO_CACHE", "DDO_INCEPTION_WEIGHTS", "DDO_DINOV2_WEIGHTS", "DDO_CLIP_WEIGHTS", "DDO_VAE", "DDO_PIPELINE",
    "TORCH_HOME", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE",
)  # fmt: skip


def run() -> dict[str, Any]:
    """Versions, devices, disk, cache and weight files; `problems` is what will stand in a command's way."""
    problems: list[str] = []
    return {
        "ddo": {"version": __version__, "path": str(Path(__file__).resolve().parents[1])},
        "system": {"python": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "torch": _torch(),
        "devices": _devices(problems),
        "cpu": {"cores": available_cores(), "threads": torch.get_num_threads()},
        "disk": {"path": str(Path.cwd()), "free_gib": _free_gib(Path.cwd())},
        "cache": _cache(problems),
        "weights": {
            "fd_embedded": _embedded(),
            **{network: _weights(network, problems) for network in weights.PUBLISHED},
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    cudnn = torch.backends.cudnn.version() if torch.version.cuda is not None else None
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
    }


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    """The GPUs, with the precisions that their hardware has."""
    if not torch.cuda.is_available():
        if torch.version.cuda is not None and shutil.which("nvidia-smi"):
            problems.append("there is an NVIDIA driver, but torch sees no GPU: compare `nvidia-smi` and torch's CUDA")
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        has_tf32 = properties.major >= 8  # Ampere brought TF32 and bfloat16
        free, total = torch.cuda.mem_get_info(number)
        found.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": total / GIB,
                "free_gib": free / GIB,
                "precisions": ["float32", *(["tf32", "bf16"] if has_tf32 else []), "fp16"],
            }
        )
    return found


def _free_gib(path: Path) -> float:
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free / GIB


def _cache(problems: list[str]) -> dict[str, Any] | None:
    directory = cache_directory()
    if directory is None:
        return None
    sizes = [file.stat().st_size for file in directory.rglob("*") if file.is_file()]
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        problems.append(f"the cache {directory} cannot be written to; set DDO_CACHE to another directory, or to off")
    size = sum(sizes) / GIB
    return {"path": str(directory), "files": len(sizes), "size_gib": size, "free_gib": _free_gib(directory)}


def _embedded() -> dict[str, Any]:
    """The extractor that comes with the program."""
    file = checkpoint.resolve(EMBEDDED_EXTRACTOR)
    return {"path": str(file), "sha256": sha256(file), "is_published": True}


def _weights(network: weights.Network, problems: list[str]) -> dict[str, Any] | None:
    """The file that a score of this network would use; None if there is none."""
    try:
        file = weights.find(network)
    except CheckpointError as error:
        problems.append(str(error))
        return None
    return file and {"path": str(file.path), "sha256": file.sha256, "is_published": file.is_published}


# --- For people


def screen(found: dict[str, Any]) -> str:
    """The figures of `run` in lines of at most 80 characters; the home directory is ~."""
    versions, torch_, cache = found["packages"], found["torch"], found["cache"]
    cuda = f"CUDA {torch_['cuda']}, cuDNN {torch_['cudnn']}" if torch_["cuda"] else "built without CUDA"
    rows = [
        ("ddo", f"{found['ddo']['version']} in {found['ddo']['path']}"),
        ("python", f"{found['system']['python']}, {found['system']['platform']}"),
        ("torch", f"{torch_['version']}, {cuda}"),
        *((f"gpu {number}", _gpu(device)) for number, device in list(enumerate(found["devices"]))[:4]),
        *([("gpus", f"{len(found['devices'])} in all")] if len(found["devices"]) > 4 else []),
        *([] if found["devices"] else [("gpu", "none; auto is float32 on a CPU")]),
        ("cpu", f"{found['cpu']['cores']} cores, {found['cpu']['threads']} threads of torch"),
        ("disk", f"{found['disk']['free_gib']:,.1f} GiB free here"),
        ("cache", _of_cache(cache) if cache else "off"),
        *((network, _of_weights(network, file)) for network, file in found["weights"].items()),
        *(("", line) for line in _listed(versions)),
        *(("environment", f"{name}={value}") for name, value in found["environment"].items()),
    ]
    lines = [_line(f"{title:<12} {_at_home(text)}") for title, text in rows]
    for problem in found["problems"]:  # in full
        lines += textwrap.wrap(f"PROBLEM: {problem}", WIDTH, break_on_hyphens=False)
    return "\n".join(lines)


def _gpu(device: dict[str, Any]) -> str:
    memory = f"{device['free_gib']:.1f} of {device['memory_gib']:.1f} GiB free"
    name = device["name"].removeprefix("NVIDIA ")
    return f"{name} ({device['compute_capability']}), {memory}; {' '.join(device['precisions'])}"


def _of_cache(cache: dict[str, Any]) -> str:
    return (
        f"{cache['size_gib']:,.2f} GiB in {cache['files']:,} files, {cache['free_gib']:,.1f} GiB free; {cache['path']}"
    )


def _of_weights(network: Any, file: dict[str, Any] | None) -> str:
    title = weights.PUBLISHED[network].title if network in weights.PUBLISHED else "digits"
    if file is None:
        return f"{title}: no weights found"
    return f"{title}: {file['sha256'][:12]}{'' if file['is_published'] else ' (not the published)'} {file['path']}"


def _listed(versions: dict[str, str | None]) -> list[str]:
    """ "numpy 2.1, scipy 1.14, ..." on as many lines as it takes."""
    lines = [""]
    for name, version in versions.items():
        part = f"{name} {version or 'missing'}"
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= WIDTH - 14 else [*lines, part]
    return lines


def _at_home(text: str) -> str:
    home = os.path.expanduser("~")
    return text.replace(f"{home}/", "~/") if len(home) > 1 else text


def _line(text: str) -> str:
    """On one line of the screen: the middle of a longer one is left out, since a path's end tells most."""
    text = visible(text)
    return text if len(text) <= WIDTH else f"{text[: WIDTH // 2 - 3]}...{text[-WIDTH // 2 :]}"
