"""What TF32, bf16 and fp16 do to the log-ratio and to the gradient of DDO, for a small network of each family.

`python benchmarks/precision.py [--json FILE] [--families edm-unet,var]`: minutes on one core.

A network is pretrained for a moment in float32 and then trained by DDO in float32, as model against its frozen copy.
After k steps the same batch, with the same draws, goes through model and reference in each format:
  spread    standard deviation of r over the batch's rows, float32
  error     root mean square of (r in the format - r in float32), in nats; both networks in the format
  gradient  |g in the format - g| / |g| of the loss
bf16 and fp16 are autocast, as in training, and fp16 has its loss scaled; its products are computed in float32 and then
rounded. A CPU has no TF32: operands of every matrix product and convolution, of backward passes too, are rounded to 10
bits, to the nearest, and summed in float32. Inside fused attention only queries, keys and values are rounded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ddo_cli.data.images import open_images
from ddo_cli.data.pairs import Pairs, Shuffled
from ddo_cli.engines.pretrain.model import likelihood_objective
from ddo_cli.generation import generate
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import DdoBatch, ddo_batch, ddo_step
from ddo_cli.precision import training_precision
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import StepRng

CPU = torch.device("cpu")
FORMATS = ("tf32", "bf16", "fp16")
STEPS = (0, 1, 3, 10, 30)  # of DDO
PRETRAINING = 40  # steps
ROWS = 8  # real ones, and as many generated ones
ALPHA, BETA, LR = 4.0, 0.05, 1e-4  # of the recipe quickstart
LOSS_SCALE = 2.0**11
VQVAE = {"channels": 8, "channel_mult": [1, 1, 2], "num_blocks": 1, "groups": 2, "z_channels": 8, "vocabulary": 64,
         "patch_nums": [1, 2, 4, 8]}  # fmt: skip
# Name, options and a short way to sample.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patch-unet": ({}, {"sampler": "heun", "steps": 8}),  # the embedded one
    "edm-unet": (
        {"channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16]},
        {"sampler": "euler", "steps": 4},
    ),
    "edm2-unet": (
        {"width": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16], "head_width": 16},
        {"sampler": "euler", "steps": 4},
    ),
    "adm-unet": (
        {
            "width": 16,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attention": [16],
            "num_head_channels": 16,
            "group_channels": 4,
        },
        {"sampler": "euler", "steps": 4},
    ),
    "var": ({"depth": 4, "width": 128, "heads": 4, "vqvae": VQVAE}, {}),
}


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


class TensorFloat32(TorchDispatchMode):
    """Rounds the operands of products and convolutions to TF32's 10 bits."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in PRODUCTS or "scaled_dot_product" in name:
            # A bias is added in float32.
            args = [rounded(arg) if isinstance(arg, Tensor) and arg.ndim > 1 else arg for arg in args]
        return function(*args, **(kwargs or {}))


class WideProducts(TorchDispatchMode):
    """Products and convolutions of float16 in float32, as tensor cores sum; most CPUs take ages for them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        halves = [arg for arg in args if isinstance(arg, Tensor) and arg.dtype == torch.float16]
        if function.overloadpacket.__name__ not in PRODUCTS or not halves:
            return function(*args, **(kwargs or {}))
        out = function(*[arg.float() if isinstance(arg, Tensor) else arg for arg in args], **(kwargs or {}))
        return tree_map(lambda value: value.half() if isinstance(value, Tensor) else value, out)


def rounded(x: Tensor) -> Tensor:
    """float32 with a significand of 10 stored bits, to the nearest, ties to even; other types as they are."""
    if x.dtype != torch.float32:
        return x
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def in_format(name: str) -> contextlib.AbstractContextManager[Any]:
    """Modes of a format, for a forward or a backward pass; float32: none."""
    if name == "tf32":
        return TensorFloat32()
    return WideProducts() if name == "fp16" else contextlib.nullcontext()


def model_of(family: str, real: Any) -> LikelihoodModel:
    """The embedded patch-unet, or a network that has been trained for a moment."""
    if family == "patch-unet":
        return registry.load_model("embedded:digits32", CPU).model
    torch.manual_seed(0)
    config = registry.config_of(family, real.shape, real.num_classes, FAMILIES[family][0], {})
    model = registry.build(config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    objective, stream = likelihood_objective(model), Shuffled(real.items, real.labels, "pretrain", 0)
    for step in range(PRETRAINING):
        model.train()
        model.before_step()
        batch = objective.batch(*stream.rows(step * ROWS, (step + 1) * ROWS), StepRng((0,), step, range(ROWS)))
        optimizer.zero_grad()
        objective.loss(model, batch).loss.backward()
        optimizer.step()
    model.before_step()
    return model.eval()


def step_of(
    model: LikelihoodModel, ref: LikelihoodModel, batch: DdoBatch, name: str, scale: float = LOSS_SCALE
) -> tuple[Tensor, Tensor]:
    """r of the rows, and the flat gradient of the loss."""
    kept: list[Tensor] = []

    def wrapped(*args: Any) -> Tensor:
        kept.append(model(*args))
        return kept[0]

    model.zero_grad()
    scale = scale if name == "fp16" else 1.0
    with in_format(name), training_precision("float32" if name == "tf32" else name, CPU):  # type: ignore[arg-type]
        loss = ddo_step(model, wrapped, batch, ref=ref, settings=DdoSettings(ALPHA, BETA)).loss  # type: ignore[arg-type]
    with in_format(name):
        (scale * loss).backward()
    flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    gradient = torch.cat(flat) / scale
    if not gradient.isfinite().all() and scale > 1:  # training leaves the step out and halves the scale
        return step_of(model, ref, batch, name, scale / 2)
    return kept[0].detach(), gradient


def measure(family: str) -> list[dict[str, Any]]:
    """Rows of the table: one for each number of steps."""
    real = open_images("embedded:digits32")
    ref = model_of(family, real)
    model = copy.deepcopy(ref)
    ref.requires_grad_(False)
    spec = SamplingRecipe(**FAMILIES[family][1])
    (fake,) = generate(ref, range(4 * ROWS), spec, batch=4 * ROWS)
    pairs = Pairs(
        Shuffled(real.items, real.labels, "real", 0), Shuffled(fake.items.numpy(), fake.label.numpy(), "fake", 0)
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
    held = ddo_batch(model, *pairs.rows(10_000, 10_000 + ROWS), StepRng((1,), 0, range(ROWS)))
    table = []
    for k in range(max(STEPS) + 1):
        if k in STEPS:
            r, gradient = step_of(model, ref, held, "float32")
            row: dict[str, Any] = {"family": family, "k": k, "spread": float(r.std(correction=0))}
            for name in FORMATS:
                ours, ours_gradient = step_of(model, ref, held, name)
                row[name] = {
                    "error": float((ours - r).square().mean().sqrt()),
                    "bias": float((ours - r).mean()),
                    "gradient": float((ours_gradient - gradient).norm() / gradient.norm()),
                }
            table.append(row)
        model.before_step()
        batch = ddo_batch(model, *pairs.rows(k * ROWS, (k + 1) * ROWS), StepRng((0,), k, range(ROWS)))
        optimizer.zero_grad()
        ddo_step(model, model, batch, ref=ref, settings=DdoSettings(ALPHA, BETA)).loss.backward()
        optimizer.step()
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """The table for people."""
    heads = ["family", "k", "spread of r", *(f"{name} error" for name in FORMATS), *(f"{n} gradient" for n in FORMATS)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in table:
        share = [f" ({row[name]['error'] / row['spread']:.1%})" if row["spread"] else "" for name in FORMATS]
        errors = [f"{row[name]['error']:.2g}{part}" for name, part in zip(FORMATS, share, strict=True)]
        gradients = [f"{row[name]['gradient']:.1%}" for name in FORMATS]
        cells = [row["family"], str(row["k"]), f"{row['spread']:.3g}", *errors, *gradients]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of them, between commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    table, start = [], time.time()
    for family in options.families.split(","):
        table += measure(family)
        print(f"{family}: {time.time() - start:.0f} s", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(table, indent=1))
    print(markdown(table))


if __name__ == "__main__":
    main()
