"""Small models and recipes that train in a second."""

import functools
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads cost more than they bring

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import launch
from matplotlib.figure import Figure
from PIL import Image

from ddo_cli import checkpoint, cli, console
from ddo_cli.data import embedded
from ddo_cli.data.digits import render_digits
from ddo_cli.engines import scoring
from ddo_cli.models import registry
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import charts

CPU = torch.device("cpu")
TINY_UNET = {"patch": 4, "widths": [16], "depths": [1], "emb_width": 16}
TINY_TRANSFORMER = {"width": 16, "depth": 1, "heads": 2}
TINY_EDM2 = {"width": 4, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16], "head_width": 4}
TINY_DIT = {
    "width": 16,
    "depth": 2,
    "heads": 2,
    "patch": 8,
    "codec": "rgb",
    "precond": "ddpm",
    "learned_variance": True,
}
TINY_VQVAE = {
    "channels": 4, "channel_mult": [1, 1, 2], "num_blocks": 1, "groups": 2, "z_channels": 4, "vocabulary": 16,
    "patch_nums": [1, 2, 4, 8],
}  # fmt: skip
# Name, shape, options and sampling of the tiny model of each kind.
TINY = {
    "diffusion": ("patch-unet", (3, 32, 32), TINY_UNET, {"sampler": "heun", "steps": 3, "batch": 8}),
    "autoregressive": ("pixel-transformer", (1, 8, 8), TINY_TRANSFORMER, {"batch": 8}),
    "edm2": ("edm2-unet", (3, 32, 32), TINY_EDM2, {"sampler": "euler", "steps": 2, "batch": 8, "dtype": "float32"}),
    "dit": ("dit", (3, 32, 32), TINY_DIT, {"sampler": "ddpm", "steps": 2, "batch": 8}),
    "var": ("var", (3, 32, 32), {"depth": 2, "width": 16, "heads": 2, "vqvae": TINY_VQVAE}, {"batch": 8}),
}
KINDS = tuple(TINY)


def kinds(*quick: str) -> list[Any]:
    """Every kind of model, as parameters of a test; those that are not named are slow."""
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Decoded images are kept here, not in the home of who runs the tests; nor are weights looked for there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        for network in ("INCEPTION", "DINOV2", "CLIP"):
            patch.delenv(f"DDO_{network}_WEIGHTS", raising=False)
        patch.setenv("DDO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _collected_once():
    """What outlives one garbage collection is left out of the next: libraries, above all. Each fit makes six, which
    took 0.3 s each."""
    collect = gc.collect

    def collect_and_freeze(*generation: int) -> int:
        count = collect(*generation)
        gc.freeze()
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", collect_and_freeze)
        gc.collect()
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks():
    """Files of tests need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _plain_process():
    """Undoes what a command run in this process leaves: JSON output, flushed denormals (hypothesis refuses them)."""
    console.use_json(False)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Of tests marked gpu: the card; the CPU with DDO_TEST_DEVICE=cpu, which shows mistakes of the tests themselves."""
    name = os.environ.get("DDO_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


@pytest.fixture(autouse=True, scope="session")
def _digits_rendered_once():
    """A set of the embedded digits, which takes 0.2 s, is rendered once."""
    render = functools.cache(
        lambda num, seed, levels: render_digits(np.frombuffer(levels, np.uint8).reshape(-1, 8, 8), num, seed)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            embedded,
            "render_digits",
            lambda levels, num, seed: tuple(part.copy() for part in render(num, seed, levels.tobytes())),
        )
        yield


_REAL = scoring.GRID_SEEDS, Figure.savefig, charts.svg


@pytest.fixture(autouse=True, scope="session")
def _no_pictures():
    """Figures are one black pixel, charts empty, and grids have one image: they take most of a tiny run."""
    pixel = Image.new("RGB", (1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "GRID_SEEDS", range(1))
        patch.setattr(Figure, "savefig", lambda _, path, **__: pixel.save(path, "png"))
        patch.setattr(charts, "svg", lambda _: "<svg ></svg>")
        yield


@pytest.fixture
def real_pictures(monkeypatch):
    """They are drawn after all."""
    grid, savefig, svg = _REAL
    monkeypatch.setattr(scoring, "GRID_SEEDS", grid)
    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(charts, "svg", svg)


def make_checkpoint(path: Path, kind: str = "diffusion", seed: int = 0, **header) -> str:
    """A random model as `ddo pretrain` would leave it."""
    name, shape, options, sampling = TINY[kind]
    config = registry.config_of(name, shape, 10, options, {})
    torch.manual_seed(seed)
    model = registry.build(config)
    for parameter in model.parameters():  # no layer stays at its zero initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    header = {"kind": "model", "config": config, "sampling": sampling, "provenance": [], **header}
    checkpoint.save(path, model.state_dict(), header)
    return str(path)


def tiny_recipe(ckpt: str, kind: str = "diffusion", *overrides: str) -> Recipe:
    """Two rounds of six steps, scored on 32 images."""
    data = "embedded:digits8" if kind == "autoregressive" else "embedded:digits32"
    settings = [
        f"data.source={data}",
        *([] if kind == "autoregressive" else ["data.num=64"]),
        "sampling={batch: 8, sampler: null, steps: null, sigma_min: null, sigma_max: null}",
        "metric={name: fd_embedded, num_images: 16, repeats: 2}",
        "finetune={draw: {}, rounds: 2, alpha: 1.0, beta: 0.05, lr: 1.0e-3, warmup: 0, batch: 4, images_per_round: 24, "
        "num_fake: 16, eval_every: 12, ema_half_life: 8.0, log_every: 2, save_every: 2, max_denoising_ratio: 50.0}",
    ]
    return load("quickstart", [*settings, *overrides], {"model.ckpt": ckpt})


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """The processes of `torchrun --nproc-per-node 2 ...`, which must succeed."""
    done = launch(*arguments, processes=processes)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def ddo(tmp_path, monkeypatch, capsys):
    """Runs a command line in this process and in an empty directory; it must end with `code`, without a traceback."""

    def run(*arguments: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        command = ["ddo", *map(str, arguments)]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        done = subprocess.CompletedProcess(command, ended.value.code, *capsys.readouterr())
        assert code in (None, done.returncode), done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


TINY_ENCODER = {"widths": [8], "depths": [1], "emb_width": 16}


def tiny_disc_recipe(ckpt: str, *overrides: str) -> Recipe:
    """Twelve steps of a discriminator of 32 x 32 images, evaluated every four."""
    settings = [
        "data={source: embedded:digits32, num: 96}",
        "sampling={sampler: euler, steps: 2, batch: 16}",
        "metric={name: fd_embedded, num_images: 32, repeats: 1}",
        f"discriminator={{options: {TINY_ENCODER}, num_fake: 64, held_out: 16, images: 96, eval_every: 32, batch: 8, "
        "lr: 1.0e-3, patience: 9, ema_half_life: 16.0, log_every: 2, save_every: 2}",
        "guidance={dg_weight: 2.0}",
    ]
    return load("quickstart", [*settings, *overrides], {"model.ckpt": ckpt})


def make_discriminator(path: Path, ckpt: str, seed: int = 0, scale: float = 0.1, **changes) -> str:
    """A random discriminator of `ckpt`, as `ddo train-disc` would leave it. changes: of its header's trained_on."""
    from ddo_cli.data.images import open_images
    from ddo_cli.data.items import digest
    from ddo_cli.models.discriminators import registry as discriminators

    model, file = registry.load_model(ckpt, CPU)
    name, options = (
        ("time-encoder", TINY_ENCODER) if len(model.codec.shape) == 3 else ("time-mlp", {"width": 16, "depth": 2})
    )
    config = discriminators.config_of("discriminator", name, model.codec.shape, model.num_classes, options)
    torch.manual_seed(seed)
    network = discriminators.build("discriminator", config)
    for parameter in network.parameters():  # the head starts at zero, which would be no guidance
        torch.nn.init.normal_(parameter, std=scale)
    recipe = tiny_disc_recipe(ckpt)
    header = {
        "kind": "discriminator",
        "config": config,
        "process": discriminators.PROCESS,
        "trained_on": {
            "model": ckpt,
            "model_sha256": file.sha256,
            "data_sha256": digest(open_images(recipe.data.source, recipe.data.num)),
            "sampling": None,
            **changes,
        },
        "guidance": recipe.guidance.model_dump(mode="json"),
        "provenance": [{"command": "train-disc", "recipe": recipe.model_dump(mode="json")}],
    }
    checkpoint.save(path, network.state_dict(), header)
    return str(path)


class Positions:
    """A stream of training rows that are their own positions."""

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor]:
        return (torch.arange(start, stop),)


def fit_events(model, objective, path: Path, settings, steps: int, until: int | None = None, evaluate_at=()):
    """All events of a `loop.fit` with its state and log in `path`. objective: (wrapped, positions, rng) -> Loss."""
    from ddo_cli.trainable import Objective
    from ddo_cli.training import loop
    from ddo_cli.training.meter import Meter

    plan = loop.Plan(
        title="x", steps=steps, settings=settings, key=(0,), state_file=path / "state", owner="",
        last_good=lambda: "none", evaluate_at=frozenset(evaluate_at), until=until,
    )  # fmt: skip
    both = Objective(lambda positions, rng: (positions, rng), lambda wrapped, batch: objective(wrapped, *batch))
    return list(loop.fit(model, both, Positions(), plan, Meter(path / "log", {}, settings.batch, CPU)))
