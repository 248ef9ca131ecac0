"""`make bench`: ratios measured side by side in one process, alternating, so that a busy machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ddo_cli.data.images import open_images
from ddo_cli.likelihood import generate, repeat_draw
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import ddo_loss
from ddo_cli.recipe import SamplingRecipe, load
from ddo_cli.rng import RowRng

REPEATS = 15
BATCH = 64


def alternating(first: Callable[[], None], second: Callable[[], None], repeats: int = REPEATS) -> tuple[float, float]:
    """Median seconds of each, measured in turn after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 1):
        for function, found in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if number:
                found.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def ddo_step_against_plain_step() -> None:
    """Both take 2 x 64 images through the model, forward and backward, and an Adam step; DDO adds the reference."""
    recipe = load("quickstart")
    device = torch.device("cpu")
    model, _ = registry.load_model(recipe.model.ckpt, device)
    ref, _ = registry.load_model(recipe.model.ckpt, device)
    ref.requires_grad_(False)
    data = open_images(recipe.data.source, 2 * BATCH)
    x = model.encode(torch.from_numpy(data.items))
    label = torch.from_numpy(data.labels)
    half = model.draw(BATCH, RowRng.for_rows("bench", rows=range(BATCH)))
    draw = repeat_draw(half, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    settings = recipe.finetune

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def plain() -> None:
        step(-model(x, label, draw).mean() / x[0].numel())

    def ddo() -> None:
        with torch.no_grad():
            ref_prediction = ref.predict(x, label, draw)
        r = model(x, label, draw, ref_prediction)
        step(ddo_loss(r[:BATCH], r[BATCH:], settings.alpha, settings.beta).loss)

    ddo_time, plain_time = alternating(ddo, plain)
    print(f"DDO step / plain step on the same {2 * BATCH} images: {ddo_time / plain_time:.3f} (floor 4/3 = 1.333)")
    print(f"  {ddo_time * 1e3:.0f} ms against {plain_time * 1e3:.0f} ms, {torch.get_num_threads()} threads")


def sampling_against_one_by_one() -> None:
    """The default path, against the plainest correct one: the same sampler on one image at a time."""
    recipe = load("quickstart")
    model, file = registry.load_model(recipe.model.ckpt, torch.device("cpu"))
    spec = SamplingRecipe(**file.header["sampling"])
    num = 64
    made: dict[str, torch.Tensor] = {}

    def batched() -> None:
        made["batched"] = torch.cat([b.items for b in generate(model, range(num), spec, batch=spec.batch)])

    def one_by_one() -> None:
        made["plain"] = torch.cat([b.items for b in generate(model, range(num), spec, batch=1)])

    fast, slow = alternating(batched, one_by_one, repeats=5)
    apart = (made["batched"].int() - made["plain"].int()).abs()
    print(f"sampling, batches against one by one: {slow / fast:.2f} times faster ({num / fast:.0f} images/s)")
    print(f"  largest difference {int(apart.max())} of 255 in {float((apart > 0).float().mean()):.1e} of the values")


if __name__ == "__main__":
    ddo_step_against_plain_step()
    sampling_against_one_by_one()
