"""`make bench`: ratios measured side by side in one process, alternating, so that a busy machine slows both alike."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import fid
import torch

from ddo_cli.data.images import open_images
from ddo_cli.data.pairs import Shuffled
from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.guidance import GradientGuide
from ddo_cli.engines.pretrain.model import likelihood_objective
from ddo_cli.generation import generate
from ddo_cli.metrics.discrimination import noisy
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_objective
from ddo_cli.objectives.discriminator import discriminator_loss
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng, StepRng

REPEATS = 15
BATCH = 64


def alternating(first: Callable[[], None], second: Callable[[], None], repeats: int = REPEATS) -> tuple[float, float]:
    """Median seconds of each, measured in turn after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 1):
        for function, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if number:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def ddo_step_against_plain_step() -> None:
    """Both take 2 x 64 images through the model, forward and backward, and an Adam step; DDO adds the reference."""
    recipe = load("quickstart")
    device = torch.device("cpu")
    model, _ = registry.load_model(recipe.model.ckpt, device)
    ref, _ = registry.load_model(recipe.model.ckpt, device)
    ref.requires_grad_(False)
    data = open_images(recipe.data.source, 2 * BATCH)
    items, label = torch.from_numpy(data.items), torch.from_numpy(data.labels)
    real, fake = (items[:BATCH], label[:BATCH]), (items[BATCH:], label[BATCH:])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    objective = ddo_objective(model, ref, DdoSettings(recipe.finetune.alpha, recipe.finetune.beta))
    likelihood = likelihood_objective(model)

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def plain() -> None:
        step(likelihood.loss(model, likelihood.batch(items, label, StepRng((0,), 0, range(2 * BATCH)))).loss)

    def ddo() -> None:
        step(objective.loss(model, objective.batch(real, fake, StepRng((0,), 0, range(BATCH)))).loss)

    ddo_time, plain_time = alternating(ddo, plain)
    print(f"DDO step / plain step on the same {2 * BATCH} images: {ddo_time / plain_time:.3f} (floor 4/3 = 1.333)")
    print(f"  {ddo_time * 1e3:.0f} ms against {plain_time * 1e3:.0f} ms, {torch.get_num_threads()} threads")


def sampling_against_one_by_one() -> None:
    """Sampling in batches against the same sampler on one image at a time."""
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


def default_discriminator() -> torch.nn.Module:
    """The quickstart's discriminator with weights that do not vanish; its speed does not depend on training."""
    settings = load("quickstart").discriminator
    config = discriminators.config_of("discriminator", settings.name, (3, 32, 32), 10, settings.options)
    network = discriminators.build("discriminator", config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return network


def discriminator_step_against_its_network() -> None:
    """A whole training step (batch, noise, loss, Adam) against the network's forward and backward pass alone."""
    model, _ = registry.load_model("embedded:digits32", torch.device("cpu"))
    data = open_images("embedded:digits32", 4 * BATCH)
    stream = Shuffled(data.items, data.labels, "bench")
    network = default_discriminator()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-6, weight_decay=1e-7)
    rows = stream.rows(0, 2 * BATCH)
    x0, label = model.codec.encode(rows.items), rows.label
    t = vp_sde.importance_sampled_time(torch.rand(2 * BATCH))
    states = noisy(x0, t, torch.randn(x0.shape))

    def bare() -> None:
        logit = network(states, t, label)
        discriminator_loss(logit[:BATCH], logit[BATCH:]).loss.backward()

    def step() -> None:
        batch = stream.rows(0, 2 * BATCH)
        rng = RowRng.for_rows("bench", 0, rows=range(2 * BATCH))
        times = vp_sde.importance_sampled_time(rng.rand(dtype=torch.float64))
        x = noisy(model.codec.encode(batch.items), times, rng.randn(model.codec.shape))
        logit = network(x, times, batch.label)
        optimizer.zero_grad()
        discriminator_loss(logit[:BATCH], logit[BATCH:]).loss.backward()
        optimizer.step()

    step_time, bare_time = alternating(step, bare)
    speed = 2 * BATCH / step_time
    print(f"discriminator step / its network alone: {step_time / bare_time:.3f} ({speed:.0f} images/s)")


def guided_against_unguided() -> None:
    """8 Euler steps, 7 of them guided; the floor is the passes alone: the model's forward, and at each guided step the
    discriminator's forward and its backward to the input."""
    model, file = registry.load_model("embedded:digits32", torch.device("cpu"))
    model.requires_grad_(False)
    spec = SamplingRecipe(**file.header["sampling"])
    network = default_discriminator().requires_grad_(False)
    guide = GradientGuide(network, weight=1.0)
    num = 256
    x, label = torch.randn(num, *model.codec.shape), torch.arange(num) % 10
    sigma, t = torch.tensor(1.0), torch.full((num,), 0.26, dtype=torch.float64)
    counts = {}

    def sampling(guides: list[GradientGuide]) -> Callable[[], None]:
        def run() -> None:
            batch = next(generate(model.guided_by(guides), range(num), spec, batch=num))
            counts[bool(guides)] = batch.disc_nfe

        return run

    def model_pass() -> None:
        with torch.no_grad():
            model.denoise(x, sigma, label)

    def disc_pass() -> None:
        x_vp = x.clone().requires_grad_()
        torch.autograd.grad(network(x_vp, t, label).sum(), x_vp)

    guided_time, plain_time = alternating(sampling([guide]), sampling([]), repeats=7)
    model_time, disc_time = alternating(model_pass, disc_pass, repeats=7)
    steps = spec.steps or 18
    floor = (steps * model_time + counts[True] * disc_time) / (steps * model_time)
    print(f"guided / unguided sampling: {guided_time / plain_time:.3f} (passes alone: {floor:.3f})")
    print(f"  {counts[True]} of {steps} steps guided; {num / guided_time:.0f} against {num / plain_time:.0f} images/s")


BENCHMARKS: dict[str, tuple[Callable[[], None], ...]] = {
    "ddo": (ddo_step_against_plain_step,),
    "sample": (sampling_against_one_by_one,),
    "disc": (discriminator_step_against_its_network, guided_against_unguided),
    "fid": (fid.run,),  # minutes
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, help="run this one alone")
    only = parser.parse_args().only
    for name, functions in BENCHMARKS.items():
        if only in (None, name):
            for function in functions:
                function()
