"""`make gpu`: what only a GPU can tell, in sections ordered by worth. Each writes OUT/<section>.json as it goes.

    python benchmarks/gpu.py --out OUT --only tests,sampling,training,compiled
    python benchmarks/gpu.py --out OUT --only experiment --data cifar10-32x32.zip --seconds 300
    python benchmarks/gpu.py --out OUT --device cpu --tiny --data cifar10-32x32.zip   # tries the script itself

A case that fails is recorded with its traceback and the others go on; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddo_cli import dist
from ddo_cli.compilation import compile_network
from ddo_cli.data.images import open_images
from ddo_cli.data.pairs import Examples, Pairs, Shuffled
from ddo_cli.diffusion import vp_sde
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.fid import fid
from ddo_cli.engines.pretrain import extractor as train_extractor
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.engines.sampling import guide_sample, sample
from ddo_cli.generation import generate
from ddo_cli.likelihood import LikelihoodModel, repeat_draw
from ddo_cli.metrics.discrimination import noisy
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_objective
from ddo_cli.objectives.discriminator import discriminator_loss
from ddo_cli.precision import allow_tf32, inference_precision, training_precision
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import Recipe, SamplingRecipe, TrainRecipe
from ddo_cli.rng import RowRng, StepRng
from ddo_cli.trainable import Loss, Objective, Trainable, map_tensors
from ddo_cli.training import loop
from ddo_cli.training.meter import Meter

ROOT = Path(__file__).parent.parent
PRECISIONS = ("float32", "tf32", "bf16", "fp16")
START = time.monotonic()
GIB = 2**30


class Size(NamedTuple):
    """A network, and the batches that it is measured with."""

    name: str
    shape: tuple[int, ...]
    num_classes: int
    options: dict[str, Any]
    images: int  # of a pass of sampling
    pairs: int  # real rows of a DDO step, and as many fake ones
    sampling: dict[str, Any]


PATCH_UNET = {"patch": 2, "widths": [192, 288], "depths": [2, 4], "emb_width": 512}  # of recipes/cifar10-small
SIZES = {
    "DDPM++ 32": Size("edm-unet", (3, 32, 32), 0, {}, 512, 64, {"sampler": "heun", "steps": 4}),
    "patch-unet 32": Size("patch-unet", (3, 32, 32), 10, PATCH_UNET, 512, 512, {"sampler": "heun", "steps": 18}),
    "EDM2-S 64": Size("edm2-unet", (3, 64, 64), 1000, {}, 64, 16, {"sampler": "heun", "steps": 3, "dtype": "float32"}),
    "VAR-d16 256": Size("var", (3, 256, 256), 1000, {"depth": 16}, 50, 12, {}),
}
TINY = {
    "DDPM++ 32": {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
    "patch-unet 32": {"patch": 4, "widths": [16], "depths": [1], "emb_width": 16},
    "EDM2-S 64": {"width": 4, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16], "head_width": 4},
    "VAR-d16 256": {
        "depth": 2, "width": 16, "heads": 2,
        "vqvae": {
            "channels": 4, "channel_mult": [1, 1, 2], "num_blocks": 1, "groups": 2, "z_channels": 4, "vocabulary": 16,
            "patch_nums": [1, 2, 4, 8],
        },
    },
}  # fmt: skip


def sizes(args: argparse.Namespace) -> dict[str, Size]:
    known = {key: size for key, size in SIZES.items() if not args.networks or key in args.networks}
    if not args.tiny:
        return known
    return {key: size._replace(shape=(3, 32, 32), options=TINY[key], images=4, pairs=2) for key, size in known.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Figures


class Book:
    """The figures of one section: in a file that is written after each, and printed."""

    def __init__(self, name: str, args: argparse.Namespace, seconds: float):
        self.file, self.until, self.device = args.out / f"{name}.json", time.monotonic() + seconds, args.device
        self.record: dict[str, Any] = {
            "section": name, "tiny": args.tiny, "machine": machine(args.device), "figures": {}, "skipped": {},
            "failed": {},
        }  # fmt: skip
        say(f"--- {name}, {seconds:.0f} s")

    def note(self, key: str, value: Any) -> None:
        self.record["figures"][key] = value
        say(f"{key}: {json.dumps(short(value), default=str)}")
        self.write()

    def write(self) -> None:
        self.record["written_at_seconds"] = round(time.monotonic() - START, 1)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1, default=str))
        os.replace(temporary, self.file)

    @property
    def left(self) -> float:
        """Seconds of the section's budget."""
        return self.until - time.monotonic()

    def run(self, title: str, part: Callable[..., Any], *args: Any, needs: float = 0.0) -> None:
        """A part of the section, left out where fewer seconds are left than it needs."""
        if self.left < needs:
            self.record["skipped"][title] = f"{self.left:.0f} s were left, it needs about {needs:.0f}"
            say(f"{title} skipped: {self.record['skipped'][title]}")
        else:
            try:
                part(self, *args)
                loop.release(self.device)
            except Exception as error:
                self.record["failed"][title] = traceback.format_exc()
                say(f"{title} FAILED: {type(error).__name__}: {str(error)[:300]}")
                with contextlib.suppress(RuntimeError):  # of a device that is broken: the next section finds out
                    loop.release(self.device)
        self.write()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {time.monotonic() - START:6.1f} s  {text}", flush=True)


def short(value: Any) -> Any:
    """With four digits."""
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine(device: torch.device) -> dict[str, Any]:
    """Card and versions."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "gib": round(card.total_memory / GIB, 1), "cuda": torch.version.cuda}
        found |= {"processors": card.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def seconds(run: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Median seconds of a call after a warm-up, of as many calls as fit into the budget, one at least."""
    timed(run, device)
    found = [timed(run, device)]
    while sum(found) < budget and len(found) < 20:
        found.append(timed(run, device))
    return statistics.median(found)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def built(size: Size, device: torch.device) -> LikelihoodModel:
    """A random network whose layers keep the magnitude of their input, so that rounding shows as in a trained one."""
    torch.manual_seed(0)
    model = registry.build(registry.config_of(size.name, size.shape, size.num_classes, size.options, {})).to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("gain"):
                parameter.fill_(1.0)
    model.before_step()
    return model.eval()


def rows(model: LikelihoodModel, num: int, device: torch.device) -> tuple[Tensor, Tensor, Any]:
    """x, label and draw of a pass."""
    generator = torch.Generator().manual_seed(1)
    if model.codec.is_discrete:
        x = torch.randint(0, 16, (num, *model.codec.state_shape), generator=generator)
    else:
        x = torch.randn((num, *model.codec.state_shape), generator=generator) * 0.5
    label = torch.arange(num) % model.num_classes if model.num_classes else torch.full((num,), -1)
    given = (x, label, model.draw(num, RowRng.for_rows("gpu", rows=range(num))))
    return map_tensors(lambda tensor: tensor.to(device), given)


def flops_of(model: LikelihoodModel, device: torch.device) -> int:
    """Operations of a pass of one row."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.predict(*rows(model, 1, device))
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# The tests marked gpu


def tests(book: Book, args: argparse.Namespace) -> None:
    """In a process of its own, and ended when its time is over."""
    book.run("tests", _tests, args)


def _tests(book: Book, args: argparse.Namespace) -> None:
    report, log = args.work / "tests.xml", args.work / "tests.log"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "-v",
        "--tb=short",
        f"--junitxml={report}",
        "--durations=10",
    ]
    command += ["-p", "no:cacheprovider"]
    cores, processes = os.cpu_count() or 1, 1
    if args.device.type == "cuda" and importlib.util.find_spec("xdist") is not None:
        processes = 4  # the tests are small: one after the other they wait for Python
        command += ["-n", str(processes), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout=45"]  # one that hangs must not take the others' report with it
    if args.tiny:
        command += ["-m", "not slow", "-k", "rng or embedded or draws_do_not or densities or nccl or patch"]
    given = {
        "DDO_TEST_DEVICE": args.device.type, "OMP_NUM_THREADS": str(max(cores // processes, 1)),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }  # fmt: skip
    start, is_late = time.monotonic(), False
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **given},
            start_new_session=True,
        )
        try:
            process.wait(timeout=book.left)
        except subprocess.TimeoutExpired:
            is_late = True
            os.killpg(process.pid, 9)
            process.wait()
    lines = log.read_text().splitlines()
    summary = {"seconds": time.monotonic() - start, "exit": process.returncode, "ran out of time": is_late}
    measured, failures = {}, {}
    if report.is_file():
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            name = str(case.get("name"))
            if properties := {str(one.get("name")): one.get("value") for one in case.iter("property")}:
                measured[name] = {key: float(value or "nan") for key, value in properties.items()}
            for failure in (*case.iter("failure"), *case.iter("error")):
                failures[name] = (failure.text or "")[-3000:]
            summary[status] = summary.get(status := _status(case), 0) + 1
    book.record["measured"], book.record["failures"] = measured, failures
    if not report.is_file():
        book.record["log"] = lines[-60:]
    book.record["slowest"] = [line for line in lines if " call " in line or " setup " in line][-12:]
    for name, text in failures.items():
        say(f"  failed: {name}: {text.strip().splitlines()[-1][:160] if text.strip() else ''}")
    book.note("tests", summary)
    if process.returncode:
        raise RuntimeError(f"pytest ended with {process.returncode}, {len(failures)} failures")


def _status(case: xml.etree.ElementTree.Element) -> str:
    kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
    return kinds[0] if kinds else "passed"


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sampling(book: Book, args: argparse.Namespace) -> None:
    """Passes of a network and whole calls of `generate`, in each precision against plain float32."""
    book.run("ceilings", ceilings, args)
    for title, size in sizes(args).items():
        book.run(title, _sampling, args, title, size, PRECISIONS, needs=0 if args.tiny else 12)


def ceilings(book: Book, args: argparse.Namespace) -> None:
    """What the card gives at best: products of each format in TFLOP/s, a copy in TB/s."""
    side, found = 256 if args.tiny else 8192, {}
    for precision in PRECISIONS:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        a, b = (torch.randn(side, side, device=args.device).to(dtype) for _ in range(2))
        with inference_precision("tf32" if precision == "tf32" else "float32", args.device):
            found[precision] = 2 * side**3 / seconds(lambda a=a, b=b: a @ b, args.device, 0.3) / 1e12
    big = torch.randn(1 << (20 if args.tiny else 30), device=args.device)
    found["copy TB/s"] = 2 * big.numel() * 4 / seconds(big.clone, args.device, 0.1) / 1e12
    args.ceilings = found
    book.note("ceilings", found)


def _sampling(
    book: Book, args: argparse.Namespace, title: str, size: Size, precisions: tuple[str, ...], compiled: bool = False
) -> None:
    device, num = args.device, size.images
    model = built(size, device)
    flops, given = flops_of(model, device), rows(model, num, device)
    budget = 0.05 if args.tiny else 0.7
    if compiled:
        compile_network(model)
    for precision in precisions:
        if book.left < 3 and not args.tiny:
            book.record["skipped"][f"{title}, {precision}"] = "no time left"
            continue

        def one_pass(precision: str = precision) -> None:
            with torch.no_grad(), inference_precision(precision, device):
                model.predict(*given)

        first = timed(one_pass, device)  # compiles, where it does
        per_pass = seconds(one_pass, device, budget)
        spec = SamplingRecipe(**size.sampling, precision=precision, batch=num)
        whole, images = _generated(model, spec, num, device)
        if precision != "float32":
            again, images = _generated(model, spec, num, device)
            whole = min(whole, again)
        key = (title, precision)
        if precision == "float32":
            args.images[title] = images
        figures = {
            "first pass s": first, "pass ms": 1e3 * per_pass, "images/s of passes": num / per_pass,
            "TFLOP/s": flops * num / per_pass / 1e12, "generate s": whole, "images/s of generate": num / whole,
            "generate / its passes": whole / per_pass / _passes(model, spec),
        }  # fmt: skip
        if args.ceilings:
            figures["share of a product's rate"] = figures["TFLOP/s"] / args.ceilings[precision]
        if compiled:
            figures["speed-up over eager"] = args.passes[key] / per_pass if key in args.passes else None
        else:
            args.passes[key] = per_pass
        if (title, "float32") in args.passes:
            figures["speed-up over float32"] = args.passes[title, "float32"] / per_pass
        if title in args.images:
            apart = (images.int() - args.images[title].int()).abs().float()
            figures |= {"largest difference of 255": float(apart.max()), "mean difference": float(apart.mean())}
        if device.type == "cuda":
            figures["peak GiB"] = torch.cuda.max_memory_allocated(device) / GIB
            torch.cuda.reset_peak_memory_stats(device)
        book.note(f"{title}, {precision}{', compiled' if compiled else ''}", figures)
    if not compiled and "steps" in size.sampling:
        book.run(f"{title}, waiting", _waiting_of_sampling, args, title, model, size, needs=0 if args.tiny else 5)


def _generated(model: LikelihoodModel, spec: SamplingRecipe, num: int, device: torch.device) -> tuple[float, Tensor]:
    found: list[Tensor] = []

    def run() -> None:
        found.extend(batch.items for batch in generate(model, range(num), spec, batch=num, device=device))

    return timed(run, device), torch.cat(found)


def _passes(model: LikelihoodModel, spec: SamplingRecipe) -> int:
    """Passes that `generate` makes; an autoregressive model's scales together are one."""
    return 1 if model.codec.is_discrete else 2 * spec.steps - 1  # Heun's


def _waiting_of_sampling(book: Book, args: argparse.Namespace, title: str, model: LikelihoodModel, size: Size) -> None:
    """Synchronisations of a step of the sampler: the difference between runs of 2 and of 4 steps."""

    def counted(steps: int) -> Counter[str]:
        spec = SamplingRecipe(**{**size.sampling, "steps": steps}, precision="tf32", batch=size.images)
        return waits(lambda: _generated(model, spec, size.images, args.device), args.device)

    few, more = counted(2), counted(4)
    book.note(f"{title}: waits per step", {key: (more[key] - few[key]) / 2 for key in sorted(few | more)})
    book.note(f"{title}: waits of a batch of 2 steps", dict(few))


def waits(run: Callable[[], Any], device: torch.device) -> Counter[str]:
    """How often the CPU waited for the GPU, and how often it launched, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize(device)
    watched = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key in watched or "DtoH" in event.key or event.key.startswith(("cudaLaunchKernel", "cudaMemcpy")):
            found[event.key] += event.count
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Training


def training(book: Book, args: argparse.Namespace) -> None:
    """Steps of DDO and of a discriminator in the training loop, beside their forward and backward passes alone."""
    for title, size in sizes(args).items():
        book.run(f"DDO {title}", _ddo, args, title, size, PRECISIONS, needs=0 if args.tiny else 15)
    book.run("discriminator", _disc, args, needs=0 if args.tiny else 6)


def fake_data(model: LikelihoodModel, num: int = 2048) -> Pairs:
    """Random items, as real and as fake ones; tokens for models of tokens."""
    generator = np.random.default_rng(0)
    if model.codec.is_discrete:
        items = generator.integers(0, 16, (num, *model.codec.state_shape)).astype(np.int32)
    else:
        items = generator.integers(0, 256, (num, *model.codec.shape)).astype(np.uint8)
    labels = np.arange(num) % model.num_classes if model.num_classes else np.full(num, -1)
    return Pairs(Shuffled(items, labels, "real"), Shuffled(items[::-1].copy(), labels, "fake"))


class Speed(NamedTuple):
    """Of a call of `loop.fit`."""

    first: float  # seconds of the first step
    step: float  # seconds
    allocated: float  # GiB, at most
    reserved: float
    waits: dict[str, float]  # per step


def speed_of(
    model: Trainable, objective: Objective, stream: Any, settings: TrainRecipe, device: torch.device,
    budget: float, count: bool = False,
) -> Speed:  # fmt: skip
    """The training loop's own steps."""
    with tempfile.TemporaryDirectory() as path:
        place = Path(path)
        plan = loop.Plan("speed", 10**6, settings, (0,), place / "state", "speed", lambda: "none")
        meter = Meter(place / "log.jsonl", {}, settings.batch, device)
        with contextlib.closing(loop.fit(model, objective, stream, plan, meter)) as events:
            first = timed(lambda: next(events), device)
            timed(lambda: next(events), device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            once = timed(lambda: next(events), device)
            steps = max(min(int(budget / once), 50), 2)
            step = timed(lambda: [next(events) for _ in range(steps)], device) / steps
            peaks = [0.0, 0.0]
            if device.type == "cuda":
                peaks = [torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB]
            found: dict[str, float] = {}
            if count:
                few = waits(lambda: next(events), device)
                more = waits(lambda: [next(events) for _ in range(3)], device)
                found = {key: (more[key] - few[key]) / 2 for key in sorted(few | more)}
    return Speed(first, step, *peaks, found)


def quiet(batch: int, precision: str, **more: Any) -> TrainRecipe:
    """Settings of a run that neither logs nor saves."""
    settings = {"lr": 1e-4, "ema_half_life": 1000.0, "log_every": 10**9, "save_every": 10**9, **more}
    return TrainRecipe.model_validate({"batch": batch, "precision": precision, **settings})


def _ddo(
    book: Book, args: argparse.Namespace, title: str, size: Size, precisions: tuple[str, ...], compiled: bool = False
) -> None:
    device = args.device
    start = built(size, device)
    flops, stream = flops_of(start, device), fake_data(start)
    budget = 0.1 if args.tiny else 1.5
    for precision in precisions:
        if book.left < 4 and not args.tiny:
            book.record["skipped"][f"DDO {title}, {precision}"] = "no time left"
            continue
        model, ref = copy.deepcopy(start), copy.deepcopy(start).requires_grad_(False)
        if compiled:
            compile_network(model)
            compile_network(ref)
        objective = ddo_objective(model, ref, DdoSettings(1.0, 0.01))
        found = speed_of(
            model, objective, stream, quiet(size.pairs, precision), device, budget, count=precision == "tf32"
        )
        made = objective.batch(*stream.rows(0, size.pairs), StepRng((0,), 0, range(size.pairs)))
        batch = map_tensors(lambda tensor: tensor.to(device), made)

        def bare(
            model: Any = model, objective: Any = objective, batch: Any = batch, precision: str = precision
        ) -> None:
            with training_precision(precision, device):
                loss = objective.loss(model, batch)
            loss.loss.backward()
            model.zero_grad(set_to_none=True)

        allow_tf32(precision == "tf32")
        alone = seconds(bare, device, budget / 2)
        allow_tf32(False)
        num = 2 * size.pairs
        figures = {
            "first step s": found.first, "step ms": 1e3 * found.step, "rows/s": num / found.step,
            "TFLOP/s": 4 * flops * num / found.step / 1e12,  # two forward passes, and a backward pass of two
            "step / its passes": found.step / alone, "allocated GiB": found.allocated, "reserved GiB": found.reserved,
        }  # fmt: skip
        figures |= _error_of_r(model, ref, batch, precision, device)
        key = (f"DDO {title}", precision)
        if not compiled:
            args.passes[key] = found.step
        elif key in args.passes:
            figures["speed-up over eager"] = args.passes[key] / found.step
        if (key[0], "float32") in args.passes:
            figures["speed-up over float32"] = args.passes[key[0], "float32"] / found.step
        if found.waits:
            figures["per step"] = found.waits
        book.note(f"DDO {title}, {precision}{', compiled' if compiled else ''}", figures)
        del model, ref, objective, batch, bare
        loop.release(device)


@torch.no_grad()
def _error_of_r(model: Any, ref: Any, batch: Any, precision: str, device: torch.device) -> dict[str, float]:
    """Of this batch's log-ratios after the steps taken, against float32."""
    x, draw = torch.cat([model.codec.encode(*side) for side in (batch.real, batch.fake)]), repeat_draw(batch.draw, 2)
    found = []
    for one in (precision, "float32"):
        with inference_precision(one, device):
            predictions = [net.eval().predict(x, batch.label, draw) for net in (model, ref)]
            found.append(model.log_ratio(*predictions, x, draw).double())
    spread = float(found[1].std())
    error = float((found[0] - found[1]).square().mean().sqrt())
    return {"spread of r": spread, "error of r": error, "error of r / spread": error / spread if spread else math.nan}


class DiscBatch(NamedTuple):
    items: Tensor
    label: Tensor
    t: Tensor
    eps: Tensor


def disc_batch(real: Examples, fake: Examples, rng: StepRng) -> DiscBatch:
    row_rng = rng("disc")
    t = vp_sde.importance_sampled_time(row_rng.rand((2,), dtype=torch.float64).T.flatten())
    eps = row_rng.randn((2, *real.items.shape[1:])).transpose(0, 1).flatten(0, 1)
    return DiscBatch(torch.cat([real.items, fake.items]), torch.cat([real.label, fake.label]), t, eps)


def disc_loss(wrapped: Any, batch: DiscBatch) -> Loss:
    n = len(batch.t) // 2
    logit = wrapped(noisy(batch.items / 127.5 - 1, batch.t, batch.eps), batch.t, batch.label)
    return Loss(discriminator_loss(logit[:n], logit[n:]).loss, {})


def _disc(book: Book, args: argparse.Namespace) -> None:
    """The default discriminator of CIFAR-10."""
    device, pairs = args.device, 8 if args.tiny else 256
    config = discriminators.config_of("discriminator", "time-encoder", (3, 32, 32), 10, {})
    stream = fake_data(built(sizes(args)["patch-unet 32"], device))
    for precision in PRECISIONS:
        network = discriminators.build("discriminator", config).to(device)
        objective = Objective(disc_batch, disc_loss)
        budget, count = 0.1 if args.tiny else 1.0, precision == "tf32"
        found = speed_of(network, objective, stream, quiet(pairs, precision), device, budget, count=count)
        batch = disc_batch(*stream.rows(0, pairs), StepRng((0,), 0, range(pairs)))
        batch = map_tensors(lambda tensor: tensor.to(device), batch)

        def bare(network: Any = network, batch: Any = batch, precision: str = precision) -> None:
            with training_precision(precision, device):
                loss = disc_loss(network, batch)
            loss.loss.backward()
            network.zero_grad(set_to_none=True)

        allow_tf32(precision == "tf32")
        alone = seconds(bare, device, budget / 2)
        allow_tf32(False)
        figures = {
            "step ms": 1e3 * found.step, "rows/s": 2 * pairs / found.step, "step / its passes": found.step / alone,
            "allocated GiB": found.allocated, "reserved GiB": found.reserved,
        }  # fmt: skip
        book.note(f"discriminator, {precision}", figures | ({"per step": found.waits} if found.waits else {}))


def compiled(book: Book, args: argparse.Namespace) -> None:
    """torch.compile against the same without, where a network is one graph. Compiling takes most of the time."""
    known = sizes(args)
    if args.tiny:  # a compiler of a CPU takes a minute for each graph
        book.run(
            "patch-unet 32, compiled", _sampling, args, "patch-unet 32", known["patch-unet 32"], ("float32",), True
        )
        return
    for part, title, precisions, needs in (
        (_sampling, "DDPM++ 32", ("fp16",), 60),
        (_sampling, "patch-unet 32", ("tf32", "fp16"), 20),
        (_ddo, "DDPM++ 32", ("fp16",), 90),
        (_ddo, "patch-unet 32", ("fp16",), 30),
    ):
        book.run(f"{part.__name__} {title}, compiled", part, args, title, known[title], precisions, True, needs=needs)


# ---------------------------------------------------------------------------------------------------------------------
# The experiment


class Scale(NamedTuple):
    """How much of everything."""

    score: int  # images of a score
    ranges: int  # of seeds, of the scores that are reported
    fake: int  # images of a fake set
    pairs: int  # of a round of DDO
    disc: int  # images of a discriminator's training
    pretraining: int
    batch: int


FRESH_SEEDS = 5_000_000  # of reported scores: no round was selected by them


def experiment(book: Book, args: argparse.Namespace) -> None:
    """CIFAR-10 from nothing: a reference, two rounds of DDO, the control, guidance of either; a distance of each."""
    if args.data is None:
        raise SystemExit("--only experiment needs --data, EDM's archive of CIFAR-10 or another labelled set of 32 x 32")
    known: dict[str, Any] = {}
    book.run("data", _data, args)
    book.run("extractor", _extractor, args, known)
    book.run("plan", _plan, args, known)
    book.run("reference", _reference, args, known)
    book.run("reference, scored", _scored, args, known, "reference")
    book.run("DDO", _rounds, args, known, "DDO", 2, ["finetune.alpha=2.0", "finetune.beta=[0.01, 0.03]"])
    book.run("DDO, scored", _scored, args, known, "DDO")
    book.run("discriminator of the reference", _discriminator, args, known, "reference")
    for weight in (1.0, 2.0):
        book.run(f"reference guided by {weight:g}", _scored, args, known, "reference", weight)
    control = ["finetune.alpha=1.0e-6", "finetune.beta=1.0e-3"]
    book.run("control", _rounds, args, known, "control", 2, control, needs=0 if args.tiny else 15)
    book.run("control, scored", _scored, args, known, "control")
    book.run("discriminator of DDO's", _discriminator, args, known, "DDO", needs=0 if args.tiny else 15)
    book.run("DDO guided by 1", _scored, args, known, "DDO", 1.0)


def _data(book: Book, args: argparse.Namespace) -> None:
    os.environ["DDO_CACHE"] = str(args.work / "cache")
    start = time.monotonic()
    found = open_images(str(args.data))
    book.note("data", {"images": len(found.items), "seconds of decoding": time.monotonic() - start})


def _extractor(book: Book, args: argparse.Namespace, known: dict[str, Any]) -> None:
    if args.extractor is not None:
        known["extractor"] = args.extractor
        book.note("extractor", {"given": True})
        return
    file, start = args.work / "extractor.safetensors", time.monotonic()
    images = 256 if args.tiny else int(3000 * args.seconds)
    found = train_extractor.run(str(args.data), file, held_out=None, images=images, seed=0, device=args.device)
    took = time.monotonic() - start
    book.note("extractor", {"accuracy": found["heldout_accuracy"], "images": images, "seconds": took})
    known["extractor"] = file


def recipe(args: argparse.Namespace, known: dict[str, Any], *settings: str, ckpt: Any = None) -> Recipe:
    """recipes/cifar10-small at the experiment's scale."""
    common = [f"data.source={args.data}", f"metric.extractor={known['extractor']}", "metric.repeats=1"]
    common += [] if args.device.type == "cpu" else ["sampling.precision=fp16"]
    if (scale := known.get("scale")) is not None:
        common.append(f"metric.num_images={scale.score}")
    if args.tiny:
        common += ["data.num=512", "sampling.steps=2", "sampling.batch=32"]
        common.append("model.options={patch: 4, widths: [16], depths: [1], emb_width: 16}")
    return load("cifar10-small", [*common, *settings], {} if ckpt is None else {"model.ckpt": str(ckpt)})


def _plan(book: Book, args: argparse.Namespace, known: dict[str, Any]) -> None:
    """Speeds measured for two seconds each, and what of everything fits into the time that is left."""
    device = args.device
    if args.tiny:
        known["scale"] = Scale(64, 2, 64, 64, 64, 256, 16)
        book.note("plan", known["scale"]._asdict())
        return
    size = SIZES["patch-unet 32"]
    model = built(size, device)
    spec = SamplingRecipe(**size.sampling, precision="fp16" if device.type == "cuda" else "float32")
    _generated(model, spec, size.images, device)
    drawn = size.images / _generated(model, spec, size.images, device)[0]
    stream = fake_data(model, 8192)
    likelihood = pretrain.likelihood_objective(model)
    step = speed_of(model, likelihood, stream.real, quiet(512, PRETRAINING), device, 2.0).step
    ref = copy.deepcopy(model).requires_grad_(False)
    ddo = speed_of(
        model, ddo_objective(model, ref, DdoSettings(1.0, 0.01)), stream, quiet(512, FINETUNING), device, 2.0
    ).step
    config = discriminators.config_of("discriminator", "time-encoder", (3, 32, 32), 10, {})
    network = discriminators.build("discriminator", config).to(device)
    disc = speed_of(network, Objective(disc_batch, disc_loss), stream, quiet(512, "tf32"), device, 1.0).step
    # Scores: 1 of pretraining, 3 of DDO and 3 of the control; reported ones, two ranges each: 3 without guidance, and 3
    # with, which cost about twice as much; and 6 fake sets of two scores each.
    left, of_scores = 0.9 * book.left, 1 + 3 + 3 + 2 * 3 + 2 * 3 * 2 + 6 * 2
    score = int(min(max(0.35 * left * drawn / of_scores, 500), 5000))
    pairs = int(min(0.06 * left / ddo, 400)) * 512
    images = int(min(0.05 * left / disc, 600)) * 512
    others = of_scores * score / drawn + 4 * pairs / 512 * ddo + 2 * images / 512 * disc
    others += 40  # loading, files, pictures, statistics
    pretraining = int(max(left - others, 0.2 * left) / step) * 512
    known["scale"] = Scale(score, 2, 2 * score, pairs, images, pretraining, 512)
    speeds = {
        "images/s drawn": drawn,
        "ms of pretraining": 1e3 * step,
        "ms of DDO": 1e3 * ddo,
        "ms of disc": 1e3 * disc,
    }
    book.note("plan", {**known["scale"]._asdict(), **speeds, "seconds left": book.left, "seconds of the rest": others})


PRETRAINING, FINETUNING = "bf16", "fp16"  # precisions


def _reference(book: Book, args: argparse.Namespace, known: dict[str, Any]) -> None:
    scale, start = known["scale"], time.monotonic()
    settings = [
        f"pretrain.images={scale.pretraining}", f"pretrain.batch={scale.batch}", "pretrain.save_every=100000",
        f"pretrain.warmup={scale.pretraining // 20}", f"pretrain.precision={PRETRAINING}",
    ]  # fmt: skip
    found = pretrain.run(recipe(args, known, *settings), args.work / "pretrain", device=args.device)
    known["reference"] = found["final"]
    took = time.monotonic() - start
    book.note("reference", {"images": scale.pretraining, "seconds": took, found["metric"]: found["score"]})


def _rounds(
    book: Book, args: argparse.Namespace, known: dict[str, Any], title: str, rounds: int, given: list[str]
) -> None:
    scale, start, out = known["scale"], time.monotonic(), args.work / title
    settings = [
        f"finetune.rounds={rounds}", f"finetune.images_per_round={scale.pairs}", f"finetune.batch={scale.batch}",
        f"finetune.eval_every={scale.pairs}", f"finetune.warmup={scale.pairs // 4}",
        f"finetune.ema_half_life={scale.pairs / 8}", f"finetune.num_fake={scale.fake}",
        f"finetune.precision={FINETUNING}",
        "finetune.max_denoising_ratio=50.0", "finetune.save_every=100000", "finetune.log_every=20",
    ]  # fmt: skip
    found = finetune.run(recipe(args, known, *settings, *given, ckpt=known["reference"]), out, device=args.device)
    known[title] = found["final"]
    state = json.loads((out / "state.json").read_text())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figures = {
        "pairs a round": scale.pairs, "seconds": time.monotonic() - start, "reference": found["reference_score"],
        "rounds": [
            {
                key: one.get(key)
                for key in ("score", "promoted", "best_images", "improvement", "alpha", "beta", "precision_error")
            }
            for one in state["rounds"]
        ],
        "last line of the log": lines[-1],
        "images/s": statistics.median(line["images_per_second"] for line in lines),
    }  # fmt: skip
    book.note(title, figures)


def _discriminator(book: Book, args: argparse.Namespace, known: dict[str, Any], of: str) -> None:
    scale, start = known["scale"], time.monotonic()
    settings = [
        f"discriminator.num_fake={scale.fake}", f"discriminator.images={scale.disc}",
        f"discriminator.batch={scale.batch}", f"discriminator.eval_every={max(scale.disc // 4, 1)}",
        f"discriminator.held_out={16 if args.tiny else 500}", "discriminator.lr=1.0e-3",
        "discriminator.lr_schedule=cosine", f"discriminator.ema_half_life={scale.disc / 20}",
        "discriminator.save_every=100000", "discriminator.precision=tf32",
    ]  # fmt: skip
    found = train_disc.run(recipe(args, known, *settings, ckpt=known[of]), args.work / f"disc-{of}", device=args.device)
    known[f"disc {of}"] = found["final"]
    figures = {key: found[key] for key in ("heldout_bce", "heldout_accuracy", "settled")}
    book.note(f"discriminator of {of}", {**figures, "images": scale.disc, "seconds": time.monotonic() - start})


def _scored(book: Book, args: argparse.Namespace, known: dict[str, Any], of: str, weight: float = 0.0) -> None:
    """The distance of fresh seeds, with guidance where the weight is not 0."""
    scale, start, device = known["scale"], time.monotonic(), args.device
    ckpt, disc = known[of], known[f"disc {of}"] if weight else None
    title = f"{of} guided by {weight:g}" if weight else of
    place = args.work / title.replace(" ", "-")
    place = place.with_name(f"{place.name}-set")
    seeds = range(FRESH_SEEDS, FRESH_SEEDS + scale.ranges * scale.score)
    if disc is None:
        drawn = sample.run(ckpt, seeds, place, form="npz", device=device)
    else:
        drawn = guide_sample.run(disc, ckpt, seeds, place, form="npz", guidance={"dg_weight": weight}, device=device)
    options = fid.Options(extractor=str(known["extractor"]), repeat=scale.ranges)
    found = fid.run(str(place), str(args.data), options, device=device)
    values = {key: value for key, value in found.items() if key.startswith("fd") or key == "repeats"}
    figures = {**values, "images of a range": scale.score, "images/s": drawn["images_per_second"]}
    book.note(f"FD of {title}", {**figures, "seconds": time.monotonic() - start})


# ---------------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[Book, argparse.Namespace], None], float]] = {  # and seconds
    "tests": (tests, 90),
    "sampling": (sampling, 80),
    "training": (training, 80),
    "compiled": (compiled, 200),
    "experiment": (experiment, 300),
}


def is_broken(device: torch.device) -> bool:
    """Whether a kernel has failed in this process."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def main() -> int:
    faulthandler.register(signal.SIGTERM, chain=True)  # says where it was when `timeout` ends it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--out", type=Path, required=True, help="directory of the JSON files")
    parser.add_argument("--work", type=Path, help="directory of weights and images. Default: a temporary one.")
    parser.add_argument("--data", type=Path, help="CIFAR-10 for the experiment")
    parser.add_argument(
        "--extractor", type=Path, help="its extractor, of `ddo train-extractor`. Default: trained first."
    )
    parser.add_argument(
        "--networks", action="append", choices=tuple(SIZES), help="of sampling and training. Default: all."
    )
    parser.add_argument("--seconds", type=float, default=300, help="of the experiment")
    parser.add_argument("--total", type=float, default=math.inf, help="seconds of everything; later sections get less")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    args = parser.parse_args()
    if unknown := [name for name in args.only.split(",") if name not in SECTIONS]:
        parser.error(f"--only {unknown[0]}: choose among {', '.join(SECTIONS)}")
    args.device, failed = dist.init(args.device), []
    args.passes, args.images, args.ceilings = {}, {}, {}
    args.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        args.work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddo-gpu-")))
        args.work.mkdir(parents=True, exist_ok=True)
        names = args.only.split(",")
        for number, name in enumerate(names):
            # An error of a kernel stays with its process.
            if number and args.device.type == "cuda" and is_broken(args.device):
                say(f"the device fails; {','.join(names[number:])} in a new process")
                given = ["--only", ",".join(names[number:]), "--out", str(args.out), "--seconds", str(args.seconds)]
                given += ["--total", str(args.total - (time.monotonic() - START))]
                given += ["--data", str(args.data)] if args.data else []
                return subprocess.call([sys.executable, __file__, *given]) or 1
            section, most = SECTIONS[name]
            most = args.seconds if name == "experiment" else most
            book = Book(name, args, min(most, args.total - (time.monotonic() - START)))
            section(book, args)
            failed += [f"{name}: {title}" for title in book.record["failed"]]
    say(f"done; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
