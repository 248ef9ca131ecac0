"""Adapters: low-rank changes of some layers as the trained part, beside a frozen base (LoRA, arXiv 2106.09685).

    W = W_base + alpha / rank B A      B starts at 0, so that the network starts as the base

The layers are those of the library peft. Networks that differ in their adapters share the base's weights, see `twin`:
model, reference and the one that is scored take the memory of one network. The state dict of a network with an adapter
is the adapter, and so are its files; they name their base by its hash.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call

from ddo_cli import checkpoint, extras
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.errors import CheckpointError, UsageError, printable, problem_of, reason
from ddo_cli.files import sha256
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import half
from ddo_cli.recipe.training import AdapterRecipe

NAME = "default"  # peft's own; a network has one adapter
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what peft adapts by further layers beside it


def library() -> ModuleType:
    """peft, imported where it is needed because that takes seconds. Raises UsageError where it is missing."""
    return extras.imported("adapters need", "peft", "lora")


# --- The layers


def _layers(model: nn.Module) -> Iterator[str]:
    """Names of the trainable layers that an adapter fits: with a matrix of weights, and nothing inside."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_matrix = weight is not None and weight.ndim > 1 and weight.requires_grad
        is_odd = getattr(module, "groups", 1) != 1 or getattr(module, "padding_mode", "zeros") != "zeros"
        if is_matrix and not isinstance(module, nn.Embedding) and not is_odd and not any(module.children()):
            yield name


def _without_number(name: str) -> str:
    """`hidden` for `hidden.0`: layers of a list have one name."""
    return re.sub(r"(\.\d+)+$", "", name)


def _matched(model: LikelihoodModel, targets: Sequence[str]) -> list[str]:
    """Full names of the layers that the targets, ends of their names, mean. Raises UsageError for a wrong target."""
    layers = list(_layers(model))
    names = sorted({_without_number(name).rpartition(".")[2] for name in layers})
    here = printable(", ".join(names), 120) if names else "none that an adapter fits"
    key, kind = "finetune.adapter.targets", type(getattr(model, "net", model)).__name__
    if not targets:
        raise UsageError(f"{key}: a {kind} has no layers that are adapted by default; its layers: {here}; name some")
    found = []
    for target in targets:
        ends = [name for name in layers if f".{name}".endswith(f".{target}")]
        ends += [name for name in layers if f".{_without_number(name)}".endswith(f".{target}")]
        if not ends:
            raise UsageError(f"{key}: no layer of this {kind} is called {printable(target, 40)!r}; its layers: {here}")
        found += ends
    return sorted(set(found), key=layers.index)


@cache
def _weight_layer() -> type[nn.Module]:
    """For layers with a `forward` of their own, such as EDM2's, which normalises filters: they compute with W."""
    from peft.tuners.lora import LoraLayer

    class WeightLora(nn.Module, LoraLayer):
        base_layer: Any
        lora_A: Any
        lora_B: Any
        scaling: Any
        update_layer: Any

        def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: float, **_: Any):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            weight = module._parameters["weight"]
            assert weight is not None, "see _layers"
            return weight[0].numel(), len(weight)

        def get_delta_weight(self, adapter: str) -> Tensor:
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            with torch.autocast(a.device.type, enabled=False):
                delta: Tensor = (b @ a).view_as(self.base_layer.weight) * self.scaling[adapter]
            return delta

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            weight = self.base_layer.weight + self.get_delta_weight(NAME)
            return functional_call(self.base_layer, {"weight": weight}, args, kwargs)

    return WeightLora


def _inject(model: LikelihoodModel, settings: AdapterRecipe, seed: int) -> None:
    """Puts an adapter into the network; everything else is frozen. seed: of A, drawn layer by layer."""
    library()
    from peft import LoraConfig, inject_adapter_in_model

    names = _matched(model, settings.targets)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="|".join(map(re.escape, names)), bias="none"
    )
    kinds = {type(model.get_submodule(name)) for name in names}.difference(_PLAIN)
    config._register_custom_module({kind: _weight_layer() for kind in kinds})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=NAME)
    if settings.base_precision == "bf16" and not half.keep(model):
        kind = type(getattr(model, "net", model)).__name__
        raise UsageError(
            f"finetune.adapter.base_precision = bf16: a {kind} has no linear maps or convolutions of torch's own, and "
            "others are not stored so; leave it out"
        )
    model.eval()
    model.register_state_dict_post_hook(_only_adapter)
    model.register_load_state_dict_post_hook(_base_is_there)


def _is_of_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _only_adapter(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if not _is_of_adapter(name)]:
        del state[name]


def _base_is_there(model: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if _is_of_adapter(name)]


# --- Networks with an adapter


def is_in(model: nn.Module) -> bool:
    """Whether the network has an adapter."""
    return hasattr(model, "peft_config")


def loading_device(settings: Mapping[str, Any], device: torch.device) -> torch.device:
    """Where a base is loaded and given its adapter: on the CPU if it is stored in bf16, since it may not fit otherwise.

    settings: of the adapter.
    """
    return torch.device("cpu") if settings.get("base_precision") == "bf16" else device


def twin(model: LikelihoodModel) -> LikelihoodModel:
    """A network with an adapter of its own, equal to the model's; all other weights are the model's own tensors."""
    shared = [parameter for name, parameter in model.named_parameters() if not _is_of_adapter(name)]
    return copy.deepcopy(model, {id(part): part for part in (*shared, *model.buffers(), model.codec)})


def add(model: LikelihoodModel, file: Checkpoint, settings: AdapterRecipe, seed: int, base: str) -> Checkpoint:
    """Puts a new adapter into a model that was loaded from a whole file, or checks that of an adapter's file.

    base: name of the whole file, or of what it is a copy of. Returns the file with the header entries of the model's
    own files. Raises UsageError for targets that the network does not have, or settings other than those of the adapter
    that is there.
    """
    given = settings.model_copy(update={"targets": settings.targets or list(model.adapter_targets)})
    if not is_in(model):
        origin = {"path": _found_again(base), "sha256": file.sha256}
        _inject(model, given, seed)
        return file._replace(header={**file.header, "adapter": given.model_dump(mode="json"), "base": origin})
    stored = AdapterRecipe.model_validate(file.header["adapter"])
    if given != stored:
        told = ", ".join(f"{key} = {value}" for key, value in stored if value != getattr(given, key))
        raise UsageError(
            f"finetune.adapter: {file.path} holds an adapter with {printable(told, 120)}; set the same, or start from "
            "`ddo export --merge` of it"
        )
    return file


def _found_again(path: str) -> str:
    """How an adapter names its base: from every directory."""
    return path if path.startswith(checkpoint.EMBEDDED) else str(checkpoint.resolve(path).resolve())


def idle(tensors: dict[str, Tensor]) -> list[str]:
    """Layers of a trained adapter that are still those of the base: a network that reads `layer.weight` passes them by.

    tensors: the adapter's.
    """
    ends = f".lora_B.{NAME}.weight"
    return [name.removesuffix(ends) for name, tensor in tensors.items() if name.endswith(ends) and not tensor.any()]


# --- Files


def base_of(file: Checkpoint) -> str | None:
    """The base's file for an adapter's one, where it was or beside the adapter; None for other files.

    Raises CheckpointError where neither is it.
    """
    if "base" not in file.header:
        return None
    checkpoint.require(file, "base.path", "base.sha256", "adapter.targets")
    path, digest = file.header["base"]["path"], file.header["base"]["sha256"]
    beside = checkpoint.resolve(file.path).parent / Path(path).name
    is_embedded = path.startswith(checkpoint.EMBEDDED)
    named = checkpoint.resolve(path) if is_embedded else Path(path)
    places = [place for place in (named, beside) if place.is_file()]
    for place in places:
        if sha256(place) == digest:
            return str(path) if is_embedded else str(place)
    problem = "is another file now" if places else "is not there"
    raise CheckpointError(
        f"{file.path} is an adapter, and its base {path} {problem}; put the file with the SHA-256 {digest[:16]}... "
        "there, or beside the adapter"
    )


def fill(model: LikelihoodModel, file: Checkpoint) -> None:
    """Puts the adapter of a file into its base. Raises CheckpointError if it does not fit."""
    library()
    if is_in(model):
        raise CheckpointError(f"{file.path} has a damaged header (its base is an adapter, too); copy the file again")
    try:
        _inject(model, AdapterRecipe.model_validate(file.header["adapter"]), 0)
        model.load_state_dict(file.tensors)
    except ValidationError as error:
        what = f"adapter.{problem_of(error)}"
        raise CheckpointError(f"{file.path} has a damaged header ({what}); copy the file again") from None
    except (UsageError, RuntimeError) as error:
        what = reason(error, 100)
        raise CheckpointError(f"{file.path}: the adapter does not fit its base ({what}); copy the file again") from None


def merged(model: LikelihoodModel, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a whole model that computes the same, up to rounding. base: those of the base's file."""
    tensors = dict(base)
    with torch.no_grad():
        for name, layer in _adapted(model):
            weight = tensors[f"{name}.weight"]
            delta = layer.get_delta_weight(NAME).to(weight)
            tensors[f"{name}.weight"] = weight + delta.view_as(weight)
    return tensors


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight"))
