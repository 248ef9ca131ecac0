"""Small models and recipes that train in a second."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads cost more than they bring

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddo_cli import checkpoint, console
from ddo_cli.models import registry
from ddo_cli.recipe import Recipe, load

CPU = torch.device("cpu")
TINY_UNET = {"patch": 4, "widths": [16], "depths": [1], "emb_width": 16}
TINY_TRANSFORMER = {"width": 16, "depth": 1, "heads": 2}
KINDS = ("diffusion", "autoregressive")


@pytest.fixture(autouse=True)
def _plain_console():
    console.use_json(False)


def make_checkpoint(path: Path, kind: str = "diffusion", seed: int = 0, **header) -> str:
    """A random model as `ddo pretrain` would leave it."""
    if kind == "diffusion":
        config = registry.config_of("patch-unet", (3, 32, 32), 10, TINY_UNET, {})
        sampling = {"sampler": "heun", "steps": 3, "batch": 8}
    else:
        config = registry.config_of("pixel-transformer", (1, 8, 8), 10, TINY_TRANSFORMER, {})
        sampling = {"batch": 8}
    torch.manual_seed(seed)
    model = registry.build(config)
    for parameter in model.parameters():  # no layer stays at its zero initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    header = {"kind": "model", "config": config, "sampling": sampling, "provenance": [], **header}
    checkpoint.save(path, model.state_dict(), header)
    return str(path)


def tiny_recipe(ckpt: str, kind: str = "diffusion", *overrides: str) -> Recipe:
    """Two rounds of six steps, scored on 32 images."""
    data = "embedded:digits32" if kind == "diffusion" else "embedded:digits8"
    settings = [
        f"data.source={data}",
        *(["data.num=64"] if kind == "diffusion" else []),
        "sampling={batch: 8}",
        "metric={name: fd_embedded, num_images: 32, repeats: 2}",
        "finetune={rounds: 2, alpha: 1.0, beta: 0.05, lr: 1.0e-3, batch: 4, images_per_round: 24, num_fake: 16, "
        "eval_every: 12, ema_half_life: 8.0, log_every: 2, save_every: 2, max_denoising_ratio: 50.0}",
    ]
    return load("quickstart", [*settings, *overrides], {"model.ckpt": ckpt})


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node 2 ...`, which must succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done
