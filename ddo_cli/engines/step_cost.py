"""One micro-batch of training and one batch of sampling: what they take in memory and operations, and in seconds.

Memory and operations are counted on tensors without content (`training.memory`); seconds are of a network that is
built for it, on items of zeros, since a pass takes as long whatever its weights and items are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli import dist
from ddo_cli.engines import sample_cost
from ddo_cli.generation import decoding_precision
from ddo_cli.likelihood import LikelihoodModel, map_draw, repeat_draw
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import ddo_loss
from ddo_cli.precision import inference_precision
from ddo_cli.recipe.schema import FinetuneRecipe, SamplingRecipe, TrainRecipe
from ddo_cli.rng import RowRng
from ddo_cli.training import loop, memory, optim
from ddo_cli.training.ema import Averages
from ddo_cli.training.recompute import recompute_units

LONGEST = 3.0  # seconds that a pass is expected to take at most, to be timed: a dry run should not keep people waiting
REPEATED = 0.2  # seconds for which a short one is repeated; the fastest counts

ItemType = tuple[tuple[int, ...], torch.dtype]  # shape of one item as it lies on disk, and its type


class Setup(NamedTuple):
    """What decides the cost. items: of real data; for finetuning, also of the fake set."""

    config: dict[str, Any]  # of the model
    settings: TrainRecipe
    spec: SamplingRecipe
    items: Sequence[ItemType]
    device: torch.device
    draw: dict[str, Any] | None = None

    @property
    def pieces(self) -> int:
        """Micro-batches of one process in a step."""
        return len(loop.local_rows(self.settings.batch, self.settings.micro_batch))

    @property
    def micro_batch(self) -> int:
        """Rows of data in one of them."""
        return min(self.settings.micro_batch or self.settings.batch, -(-self.settings.batch // dist.world_size()))


class Passes(NamedTuple):
    """A traced model: its sizes in bytes, one micro-batch of training, and one batch of sampling."""

    weights: int
    trainable: int
    state: int  # of its state dict: what a file holds
    units: tuple[int, ...]  # trainable bytes of each unit
    reference: int
    piece: memory.Cost  # forward and backward pass
    predict: memory.Cost  # one pass of sampling
    decode: memory.Cost  # samples to images, once for each batch
    sample: sample_cost.SampleCost  # all of a batch but that
    per_sample: int  # passes of sampling


class Seconds(NamedTuple):
    """What those take, and the update of weights and averages after a step's last micro-batch."""

    piece: float
    update: float
    predict: float
    decode: float


def traced(setup: Setup) -> Passes:
    """Sizes and costs. Raises whatever a network does on tensors without content."""
    settings, device = setup.settings, setup.device
    with torch.device("meta"):
        model, ref = (registry.build(setup.config, setup.draw) for _ in range(2))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    draws, per_sample = _draws(model, setup), model.passes(setup.spec)
    if settings.activation_checkpointing:
        recompute_units(model)
    with memory.imagined():
        for one in (model, ref):
            memory.without_content(one, device)
        ref.requires_grad_(False)
        saved = _saved_by_bf16(ref, trained) if getattr(settings, "reference_precision", "float32") == "bf16" else 0
        if settings.sharding == "fsdp" and dist.world_size() > 1:  # their gradients are counted by hand: see `estimate`
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(_forget)
        draws = tuple(map_draw(lambda one: _zeros(one.shape, one.dtype, device), draw) for draw in draws)
        trial = _Trial(model, ref, setup, draws)
        some = min(setup.pieces, 2)  # the second one has gradients beside it

        def pieces() -> None:
            for _ in range(some):
                trial.piece()

        piece = memory.cost(pieces, model, ref)
        for parameter in model.parameters():
            parameter.grad = None
        return Passes(
            weights=(weights := memory.size(*model.parameters(), *model.buffers())),
            trainable=memory.size(*(p for p in model.parameters() if p.requires_grad)),
            state=memory.size(*model.state_dict().values()),
            units=tuple(memory.size(*(p for p in unit.parameters() if p.requires_grad)) for unit in model.units()),
            reference=(weights - saved) if isinstance(settings, FinetuneRecipe) else 0,
            piece=piece._replace(flops=piece.flops // some),
            predict=memory.cost(trial.predict, model, ref),
            decode=memory.cost(trial.decode, model, ref),
            sample=sample_cost.of(model, setup.spec, device),
            per_sample=per_sample,
        )


def timed(setup: Setup, guess: Seconds) -> dict[str, float]:
    """The fields of `Seconds` that a new network was timed for: those that, by `guess`, do not take long.

    Empty where it does not run, e.g. for want of memory. None is timed that would be spread over processes.
    """
    found: dict[str, float] = {}
    device = setup.device
    is_short = {"training": guess.piece <= LONGEST, "sampling": guess.predict + guess.decode <= LONGEST}
    if not any(is_short.values()) or (setup.settings.sharding == "fsdp" and dist.world_size() > 1):
        return found
    with contextlib.suppress(Exception):  # the run itself is not at stake
        with torch.device(device):
            model = registry.build(setup.config, setup.draw)
        draws = _draws(model, setup)
        if setup.settings.activation_checkpointing:
            recompute_units(model)
        model.to(device)
        trial = _Trial(model, model, setup, [map_draw(lambda one: one.to(device), draw) for draw in draws])
        if is_short["sampling"]:
            found |= {"predict": _seconds(trial.predict, device), "decode": _seconds(trial.decode, device)}
        if is_short["training"]:
            found |= {"piece": _seconds(trial.piece, device), "update": _seconds(trial.update(), device)}
    return found


class _Trial:
    """The parts of a run, each ready to be called, on items of zeros. ref may be the model itself."""

    def __init__(self, model: LikelihoodModel, ref: LikelihoodModel, setup: Setup, draws: Sequence[Any]):
        self.model, self.ref, self.setup = model, ref, setup
        self.draw, self.sampling_draw = draws
        ref.eval()
        model.train(not isinstance(setup.settings, FinetuneRecipe))
        images = torch.uint8 if len(model.codec.shape) == 3 else torch.float32
        with torch.no_grad():
            one = model.codec.encode(_zeros((1, *model.codec.shape), images, setup.device))
        self.type = one.dtype
        self.x = _zeros((setup.spec.batch, *one.shape[1:]), one.dtype, setup.device)
        self.label = _zeros((setup.spec.batch,), torch.int64, setup.device)

    def piece(self) -> None:
        """Adds the gradients of a micro-batch."""
        with inference_precision(self.setup.settings.precision, self.setup.device):
            loss = self._loss()
        loss.backward()

    def update(self) -> Callable[[], None]:
        """What ends a step, with moments and averages of its own."""
        model, settings = self.model, self.setup.settings
        optimizer, averages = optim.build(model, settings), Averages(model, settings)

        def run() -> None:
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
            averages.update(model, settings.batch)
            model.before_step()

        return run

    @torch.no_grad()
    def predict(self) -> None:
        """One pass of sampling."""
        with inference_precision(self.setup.spec.precision or "float32", self.setup.device):
            self.model.predict(self.x, self.label, self.sampling_draw)

    @torch.no_grad()
    def decode(self) -> None:
        """Samples to images."""
        with inference_precision(decoding_precision(self.setup.spec), self.setup.device):
            self.model.codec.decode(self.x)

    def _loss(self) -> Tensor:
        """Of a micro-batch of real items, and as many fake ones for DDO, with everything that the engines compute."""
        setup, model, n = self.setup, self.model, self.setup.micro_batch
        x = torch.cat(
            [
                # What is in model space already is not encoded: checks of tokens read them.
                _zeros((n, *shape), self.type, setup.device)
                if shape == model.codec.state_shape != model.codec.shape
                else model.codec.encode(_zeros((n, *shape), dtype, setup.device))
                for shape, dtype in setup.items
            ]
        )
        label = _zeros((len(x),), torch.int64, setup.device)
        if not isinstance(setup.settings, FinetuneRecipe):
            return -model(x, label, self.draw).mean()
        both = repeat_draw(self.draw, 2)
        with torch.no_grad():
            prediction = self.ref.predict(x, label, both)
        r: Tensor = model(x, label, both, prediction)
        loss = ddo_loss(r[:n], r[n:], 1.0, 1.0, fake_weight=1 - self.draw.drop.to(r.dtype)).loss
        self.ref.log_lik(prediction[:n], x[:n], self.draw)
        return loss


def _draws(model: LikelihoodModel, setup: Setup) -> Sequence[Any]:
    """The randomness of a micro-batch, and of a batch of sampling."""
    sizes = (setup.micro_batch, setup.spec.batch)
    return [model.draw(n, RowRng.for_rows("estimate", rows=range(n))) for n in sizes]


def _saved_by_bf16(ref: LikelihoodModel, trained: set[str]) -> int:
    """Bytes that a reference in bf16 saves."""
    return sum(memory.size(parameter) // 2 for name, parameter in ref.named_parameters() if name in trained)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


def matmul_speed(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product, measured for a fraction of a second."""
    side = 4096 if device.type == "cuda" else 512
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.ones(side, side, dtype=dtype, device=device)
    with inference_precision("tf32" if precision == "tf32" else "float32", device):
        return 2 * side**3 / _seconds(lambda: a @ a, device)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of the fastest call after the first one; of that alone where it takes long."""
    first = _once(run, device)
    if first > LONGEST:
        return first
    fastest, spent = float("inf"), 0.0
    while spent < REPEATED:
        taken = _once(run, device)
        fastest, spent = min(fastest, taken), spent + taken
    return fastest


def _once(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
