"""What a round starts from, and its frozen reference: kept in fewer bytes, or spread over processes, if asked."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddo_cli import compilation, console, dist, sharding
from ddo_cli.data.items import ItemSet
from ddo_cli.data.pairs import Shuffled
from ddo_cli.engines.captions import told
from ddo_cli.errors import UsageError
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import adapters, registry
from ddo_cli.objectives.ddo_step import ddo_batch
from ddo_cli.precision import inference_precision, resolved
from ddo_cli.recipe.schema import FinetuneRecipe, Recipe
from ddo_cli.rng import StepRng
from ddo_cli.trainable import map_tensors
from ddo_cli.training import loop

# Largest error of beta r. Our choice; the paper gives none. A row's gradient weight is sigmoid(-beta r), so 0.1 changes
# it by 2.5 % where training starts. Beyond it, rounding competes with what a step changes; a stored reference's is the
# same for a given image in every epoch, so it does not average out.
LARGEST_ERROR = 0.1


def start_of(recipe: Recipe, file: str | Path, device: torch.device) -> registry.Loaded:
    """The model of a file as training begins with it: with the adapter that the recipe asks for.

    Raises UsageError for an adapter's file without that, or with another adapter.
    """
    settings = recipe.finetune.adapter
    place = adapters.loading_device(settings.model_dump(), device)
    loaded = registry.load_model(file, place, recipe.finetune.draw)
    if settings.kind:
        # A whole file within a run is a copy of the one that it started from: no round was promoted yet.
        own = adapters.add(loaded.model, loaded.checkpoint, settings, recipe.seed, recipe.model.ckpt)
        return registry.Loaded(loaded.model.to(device), own)
    if adapters.is_in(loaded.model):
        raise UsageError(
            f"{file} is an adapter: train it on with finetune.adapter = {{kind: lora}} and its settings, or all "
            "weights of what `ddo export --merge` makes of it"
        )
    return loaded


def copies_of(loaded: registry.Loaded, draw: dict[str, Any]) -> Callable[[], LikelihoodModel]:
    """Makes models equal to this one: anew of its file, or with an adapter twins that share its base."""
    if adapters.is_in(loaded.model):
        return partial(adapters.twin, loaded.model)
    file, device = loaded.checkpoint.path, next(loaded.model.parameters()).device
    prompts = loaded.checkpoint.header["config"]["options"].get("prompts")

    def copy() -> LikelihoodModel:
        again = registry.load_model(file, device, draw)
        return (again if prompts is None else registry.told(again, prompts)).model

    return copy


def frozen(model: LikelihoodModel, settings: FinetuneRecipe, device: torch.device) -> LikelihoodModel:
    """The model as the reference that training compares with."""
    model.before_step()  # as the model's first step does, so that r starts at exactly 0
    if settings.compilable and compilation.is_on(settings.compile, device):
        compilation.compile_network(model)
    if settings.reference_precision == "bf16":
        keep_bf16(model)
    if settings.sharding == "fsdp":
        sharding.shard(model, model.units(), methods=("predict", "log_lik"))
    return model.requires_grad_(False)


def keep_bf16(model: LikelihoodModel) -> None:
    """Stores the trainable weights in bf16, upcast block by block: the only error is their rounding.

    Under autocast to bf16 most layers then give the same bits.
    """
    for module, parameters in list(_blocks(model, set(model.units()))):
        kept = [
            (owner, name) for owner, name, weight in parameters if weight.requires_grad and weight.is_floating_point()
        ]
        for owner, name in kept:
            parameter = getattr(owner, name)
            parameter.data = parameter.data.to(torch.bfloat16)
        if kept:
            _Upcast(module, kept)


Place = tuple[nn.Module, str, nn.Parameter]


def _blocks(module: nn.Module, units: set[nn.Module]) -> Iterator[tuple[nn.Module, list[Place]]]:
    """Modules with the weights to upcast while they compute: units, and modules that contain none, with all their
    weights; the others with their own.
    """
    inside = list(module.modules())
    if module in units or not units.intersection(inside):
        yield (
            module,
            [(owner, name, weight) for owner in inside for name, weight in owner.named_parameters(recurse=False)],
        )
        return
    yield module, [(module, name, weight) for name, weight in module.named_parameters(recurse=False)]
    for child in module.children():
        yield from _blocks(child, units)


class _Upcast:
    """Hooks that put float32 copies in the place of weights while a module computes."""

    def __init__(self, module: nn.Module, places: Sequence[tuple[nn.Module, str]]):
        self.places, self.kept = places, list[nn.Parameter | None]()
        module.register_forward_pre_hook(self.upcast)
        module.register_forward_hook(self.restore, always_call=True)

    def upcast(self, module: nn.Module, args: Any) -> None:
        self.kept = [owner._parameters[name] for owner, name in self.places]
        for (owner, name), parameter in zip(self.places, self.kept, strict=True):
            owner._parameters[name] = parameter.to(torch.float32)  # type: ignore[assignment, union-attr]

    def restore(self, module: nn.Module, args: Any, out: Any) -> None:
        for (owner, name), parameter in zip(self.places, self.kept, strict=True):
            owner._parameters[name] = parameter
        self.kept = []


def precision_error(recipe: Recipe, file: str | Path, real: ItemSet, number: int, device: torch.device) -> float:
    """What the run's precision does to the log-ratio: its root mean square around 0, in nats.

    On round `number`'s first batch of real images: the reference as training computes it, against itself in float32.
    While training moves the model this far, errors of model and reference cancel less and less, and this is 0.5 to 2
    times what is left of them.
    """
    settings, seed = recipe.finetune, recipe.seed
    exact = told(start_of(recipe, file, device), real).model
    exact.before_step()
    rounded = exact
    if settings.reference_precision == "bf16":
        rounded = told(registry.load_model(file, device, settings.draw), real).model
        frozen(rounded, settings.model_copy(update={"sharding": "ddp"}), device)
    pairs = Shuffled(real.items, real.labels, "real", seed, number, hflip=recipe.data.hflip)
    square = torch.zeros((), device=device, dtype=torch.float64)
    for start, stop in loop.local_rows(settings.batch, settings.micro_batch):
        rows, rng = pairs.rows(start, stop), StepRng((seed, number), 0, range(start, stop))
        batch = map_tensors(lambda tensor: tensor.to(device), ddo_batch(exact, rows, rows, rng))
        x, label, draw = exact.codec.encode(*batch.real), batch.label[: stop - start], batch.draw
        with torch.no_grad():
            with inference_precision("float32", device):
                prediction = exact.predict(x, label, draw)
            with inference_precision(settings.precision, device):
                r = exact.log_ratio(rounded.predict(x, label, draw), prediction, x, draw)
        square += r.double().square().sum()
    return math.sqrt(float(dist.all_reduce_sum(square)) / settings.batch)


def check_precision(recipe: Recipe, file: str | Path, real: ItemSet, number: int, device: torch.device) -> float | None:
    """Says what the run's precision does to the log-ratio, and returns that figure; None where all is float32.

    Raises UsageError if it is too much, before the first round. Later rounds warn: their predecessors are done.
    A beta that the round finds is checked once it is known.
    """
    settings = recipe.finetune
    precision, in_bf16 = resolved(settings.precision, device), settings.reference_precision == "bf16"
    if precision == "float32" and not in_bf16:
        return None
    error = precision_error(recipe, file, real, number, device)
    if settings.beta != "auto":
        beta = max(settings.beta) if isinstance(settings.beta, tuple) else settings.beta
        check_error(recipe, error, beta, number, device)
    return error


def check_error(recipe: Recipe, error: float, beta: float, number: int, device: torch.device) -> None:
    """Says what this error of the log-ratio does at this beta; raises UsageError as `check_precision`."""
    settings = recipe.finetune
    precision, in_bf16 = resolved(settings.precision, device), settings.reference_precision == "bf16"
    names, remedies = [], []
    if precision != "float32":
        names.append(f"precision {precision}")
        better = "fp16, which has a tenth of the error, or float32" if precision == "bf16" else "float32"
        remedies.append(f"finetune.precision = {better}")
    if in_bf16:
        names.append("bf16 reference")
        remedies.append("finetune.reference_precision = float32")
    figures = f"log-ratio off by {error:.3g} nats (rms) on the first batch, times beta {beta * error:.3g}"
    effect = f"{' and '.join(names)}: {figures}"
    if not beta * error <= LARGEST_ERROR:  # NaN is refused too
        remedy = f"{effect}, more than {LARGEST_ERROR:g}; use {' and '.join(remedies)}"
        if number == 1:
            raise UsageError(remedy)
        console.warn(remedy)
    else:
        console.info(f"round {number}: {effect}{'; r does not start at exactly 0' if in_bf16 else ''}")
