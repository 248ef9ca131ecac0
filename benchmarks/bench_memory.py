"""Memory and time of a training step of DDO, measured in a fresh process, against what `--dry-run` estimates.

    python benchmarks/bench_memory.py            every case, each in a process of its own
    python benchmarks/bench_memory.py NAME       that case

Measured is the growth of the largest resident set since a step of a tiny model, which imports what steps import (the
optimizer brings torch's compiler stack, 150 MB and more). The estimate leaves out workspaces of convolutions, and what
the heap adds is a guess. Speeds mean something on an idle machine only.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddo_cli.engines import estimate, step_cost
from ddo_cli.likelihood import repeat_draw
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import ddo_loss
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.recipe.training import FinetuneRecipe
from ddo_cli.rng import RowRng
from ddo_cli.training import loop

CPU = torch.device("cpu")
PATCH_UNET = {"widths": [256, 384, 512], "depths": [2, 2, 4], "emb_width": 512}
TRANSFORMER = {"width": 512, "depth": 12, "heads": 8}
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {  # model, shape, options, settings
    "patch-unet": ("patch-unet", (3, 64, 64), PATCH_UNET, {"batch": 32}),
    "patch-unet-micro": ("patch-unet", (3, 64, 64), PATCH_UNET, {"batch": 32, "micro_batch": 8}),
    "edm-unet": ("edm-unet", (3, 32, 32), {}, {"batch": 2}),
    "edm-unet-recompute": ("edm-unet", (3, 32, 32), {}, {"batch": 2, "activation_checkpointing": True}),
    "pixel-transformer": ("pixel-transformer", (1, 16, 16), TRANSFORMER, {"batch": 8}),
    "pixel-transformer-recompute": (
        "pixel-transformer", (1, 16, 16), TRANSFORMER, {"batch": 8, "activation_checkpointing": True},
    ),
}  # fmt: skip


def measured(config: dict[str, Any], settings: FinetuneRecipe, steps: int = 2) -> tuple[int, float]:
    """Growth of the resident set in bytes, and seconds of the second step, of training as `finetune-ddo` does it."""
    before = _resident()
    shape, times = tuple(config["shape"]), []
    with torch.no_grad():
        model, ref, scratch = (registry.build(config) for _ in range(3))
    ref.requires_grad_(False)

    def loss(wrapped: nn.Module, rows: loop.Rows) -> loop.Loss:
        times.append(time.perf_counter())
        n = rows.stop - rows.start
        x = torch.cat([model.encode(torch.zeros((n, *shape), dtype=torch.uint8)) for _ in range(2)])
        label = torch.zeros(2 * n, dtype=torch.int64)
        draw = repeat_draw(model.draw(n, RowRng.for_rows("bench", rows=range(n))), 2)
        with torch.no_grad():
            prediction = ref.predict(x, label, draw)
        r: Tensor = wrapped(x, label, draw, prediction)
        return loop.Loss(ddo_loss(r[:n], r[n:], 1.0, 0.01).loss, {})

    with tempfile.TemporaryDirectory() as place:
        plan = loop.Plan(
            title="bench", steps=steps, recipe=settings, loss=loss, state_file=Path(place) / "train-state.safetensors",
            log_file=Path(place) / "log.jsonl", log_tags={}, last_good=lambda: "nothing",
        )  # fmt: skip
        loop.fit(model, plan, CPU)
    pieces = len(loop.local_rows(settings.batch, settings.micro_batch))
    seconds = times[pieces * (steps - 1)] - times[pieces * (steps - 2)]
    assert all(p.device == CPU for p in scratch.parameters()), "held to the end"
    return _resident() - before, seconds


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(name: str) -> None:
    """Prints a JSON line: estimated and measured bytes and seconds."""
    model, shape, options, values = CASES[name]
    config = registry.config_of(model, shape, 10, options, {})
    settings = FinetuneRecipe(**values, save_every=1000)
    tiny = registry.config_of("patch-unet", (3, 8, 8), 0, {"widths": [4], "depths": [1], "emb_width": 4}, {})
    measured(tiny, FinetuneRecipe(batch=1, activation_checkpointing=True))
    found, seconds = measured(config, settings)
    item = (shape, torch.uint8)
    work = estimate.Work(steps=1, scored=0, fake=0, stored=0)
    expected = estimate.estimate(config, settings, SamplingRecipe(batch=1), [item, item], work, device=CPU)
    held = expected["bytes"]
    assert held["peak_in"] == "a training step", held
    speed = expected["flops"]["step"] / seconds / step_cost.matmul_speed(CPU, "float32")
    sizes = {"estimated": held["peak"] - held["program"], "measured": found}
    times = {"seconds": seconds, "estimated_seconds": expected["seconds"]["step"], "of_matmul_speed": speed}
    print(json.dumps({"case": name, **sizes, **times, "is_timed": expected["is_timed"]["training"]}))


def run() -> None:
    """Every case in a fresh process."""
    for name in CASES:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        line = json.loads(done.stdout)
        mib = {key: line[key] / 2**20 for key in ("estimated", "measured")}
        ratio = line["estimated"] / line["measured"]
        print(
            f"memory of a DDO step, {name}: estimated {mib['estimated']:,.0f} MiB, "
            f"measured {mib['measured']:,.0f} MiB, ratio {ratio:.3f}; {line['seconds']:.1f} s, estimated "
            f"{line['estimated_seconds']:.1f} s ({'timed' if line['is_timed'] else 'assumed'}), "
            f"{line['of_matmul_speed']:.2f} of a matrix product's speed"
        )


if __name__ == "__main__":
    if sys.argv[1:]:
        one(sys.argv[1])
    else:
        run()
