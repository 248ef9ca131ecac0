"""Peak memory and time of a DDO step of SiT-XL/2 with random weights: the whole network, or an adapter of rank 16.

    python benchmarks/adapters.py whole
    python benchmarks/adapters.py adapter

The steps are the training loop's, of 2 real and 2 fake rows in float32, with recomputed blocks, Adam's moments and
averages. The weights lie in a temporary file of 2.7 GB, as a converted file would. Linux.
"""

import argparse
import contextlib
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ddo_cli import checkpoint
from ddo_cli.data.pairs import Pairs, Shuffled
from ddo_cli.engines.ddo import reference
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_objective
from ddo_cli.recipe.load import load
from ddo_cli.training import loop
from ddo_cli.training.meter import Meter

CPU = torch.device("cpu")
PAIRS, STEPS = 2, 3
SETTINGS = (
    f"finetune.batch={PAIRS}", "finetune.activation_checkpointing=true", "finetune.precision=float32",
    "finetune.log_every=1000", "finetune.save_every=1000",
)  # fmt: skip


def write_random(file: Path, depth: int) -> None:
    """A SiT-XL/2 of `depth` blocks whose layers keep the magnitude of their input."""
    config = registry.config_of("dit", (3, 256, 256), 1000, {"depth": depth, "precond": "flow"}, {})
    model = registry.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    checkpoint.save(file, model.state_dict(), {"kind": "model", "config": config, "sampling": {}, "provenance": []})


def peak() -> float:
    """GiB of this process at most: of all its life, or since `/proc/self/clear_refs` was written."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def steps(file: Path, adapter: bool) -> None:
    """Measures all steps but the first, which makes Adam's moments."""
    more = (f"model.ckpt={file}", *(["finetune.adapter={kind: lora, rank: 16}"] if adapter else []))
    recipe = load("imagenet256-sit-xl", [*SETTINGS, *more])
    settings = recipe.finetune
    start = reference.start_of(recipe, file, CPU)
    copy = reference.copies_of(start, settings.draw)
    ref, model = reference.frozen(copy(), settings, CPU), copy()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    del start
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, 64, *model.codec.state_shape), dtype=np.float32)
    labels = np.arange(64)
    stream = Pairs(Shuffled(latents[0], labels, "real"), Shuffled(latents[1], labels, "fake"))
    plan = loop.Plan("step", 1000, settings, (), file.parent / "state", "step", lambda: "none")
    meter = Meter(file.parent / "log.jsonl", {}, settings.batch, CPU)
    objective = ddo_objective(model, ref, DdoSettings(settings.alpha, settings.beta))
    with contextlib.closing(loop.fit(model, objective, stream, plan, meter)) as events:
        next(events)
        loading = peak()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = time.process_time()
        for _ in range(STEPS):
            next(events)
    seconds = (time.process_time() - before) / STEPS
    print(
        f"{trained:,} trained weights, peak {peak():.1f} GiB ({loading:.1f} up to the end of the first step), "
        f"{seconds:.0f} core-seconds a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["whole", "adapter"])
    parser.add_argument("--depth", type=int, default=28, help="blocks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "sit.safetensors"
        writer = multiprocessing.get_context("spawn").Process(target=write_random, args=(file, args.depth))
        writer.start()  # so that its memory is not counted
        writer.join()
        steps(file, args.kind == "adapter")


if __name__ == "__main__":
    main()
