"""Memory of drawing a batch of samples: `model.sample` itself, run on tensors without content.

One pass of `predict` is no measure of it: what a model keeps between passes (keys and values of earlier tokens), and a
batch that guidance doubles, may outweigh the pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.precision import inference_precision
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.training import memory

STEPS = 2  # of a sampler that counts them: its later ones need no more than the second
# Operations that are followed, at most; each takes a quarter of a millisecond or more. The published sizes of VAR, EDM,
# EDM2 and ADM have 1300 to 8700.
LONGEST = 10_000
WHOLE = "a whole sample"


class SampleCost(NamedTuple):
    """Most bytes alive at once beyond the weights, and what was followed for it: WHOLE, or what there is instead."""

    peak: int
    traced: str


def of(model: LikelihoodModel, spec: SamplingRecipe, device: torch.device) -> SampleCost:
    """The cost of a batch, inside `memory.imagined`; of the model nothing else should be asked afterwards.

    A model that asks what its tensors hold cannot always be followed: peak is 0 then, and `traced` tells why.
    """
    if not model.codec.is_discrete and not spec.respacing:
        spec = spec.model_copy(update={"steps": min(spec.steps or STEPS, STEPS)})
    label = torch.zeros((spec.batch,), dtype=torch.int64, device=device)
    rng, traced = RowRng(range(spec.batch)), [WHOLE]

    def drawn() -> None:
        with contextlib.suppress(_Enough), _Followed():
            model.sample(label, rng, spec)
            return
        traced[0] = f"the first {LONGEST} operations of a sample"

    try:
        with torch.no_grad(), inference_precision(spec.precision or "float32", device), _units_run_once(model):
            peak = memory.cost(drawn, model).peak
    except Exception as error:  # a user's network may do anything; the run itself is not at stake
        reason = str(error).strip().split("\n")[0]
        return SampleCost(0, f"one pass ({type(error).__name__}: {reason})"[:200])
    return SampleCost(peak, traced[0])


class _Enough(Exception):
    """So many operations were followed as there may be."""


class _Followed(TorchDispatchMode):
    """Counts operations, and says yes to what is asked of tensors' contents.

    Yes is what makes samplers go on: all values are finite, there is a next level, this level lies in the window.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left = LONGEST

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _Enough
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------------------
# Equal units


@contextlib.contextmanager
def _units_run_once(model: LikelihoodModel) -> Iterator[None]:
    """Inside, a unit is not run where one like it was, on tensors of the same form: a sample has thousands of such.

    Under autocast each is run at least once, for the copy of its weights that autocast keeps.
    """
    known: dict[Any, tuple[int, Any]] = {}
    units = list(model.units())
    before = [unit.__dict__.get("forward") for unit in units]
    for unit in units:
        unit.forward = _remembered(unit, known)
    try:
        yield
    finally:
        for unit, forward in zip(units, before, strict=True):
            del unit.forward
            if forward is not None:
                unit.forward = forward


def _remembered(unit: nn.Module, known: dict[Any, tuple[int, Any]]) -> Callable[..., Any]:
    """The unit's forward pass; from the second time on its memory is taken and given back, and nothing computed."""
    forward, kind, was_run = unit.forward, _kind(unit), False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal was_run
        given = tree_leaves((args, kwargs))
        device = next(leaf for leaf in given if isinstance(leaf, Tensor)).device
        key = (kind, tuple(map(_form, given)))
        if key in known and (was_run or not torch.is_autocast_enabled(device.type)):
            peak, out = known[key]
            torch.empty(peak, dtype=torch.uint8, device=device)
            return tree_map_only(_Form, lambda one: torch.empty(one.shape, dtype=one.dtype, device=one.device), out)
        found: list[Any] = []
        inputs = nn.Module()  # whose memory, like the weights', was there before
        for i, leaf in enumerate(given):
            if isinstance(leaf, Tensor):
                inputs.register_buffer(str(i), leaf)
        was_run = True
        peak = memory.cost(lambda: found.append(forward(*args, **kwargs)), unit, inputs).peak
        known[key] = peak, tree_map_only(Tensor, _form, found[0])
        return found[0]

    return run


class _Form:
    """What the memory of a computation depends on of a tensor; comparable."""

    def __init__(self, tensor: Tensor):
        self.shape, self.stride = tuple(tensor.shape), tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Form) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.shape, self.stride, self.dtype))


def _form(leaf: Any) -> Any:
    return _Form(leaf) if isinstance(leaf, Tensor) else repr(leaf)


def _kind(unit: nn.Module) -> str:
    """What two units have in common that compute alike: their parts, with plain attributes and the weights' forms."""
    parts = []
    for part in unit.modules():
        plain = {name: value for name, value in vars(part).items() if isinstance(value, (bool, int, float, str, tuple))}
        weights = {name: tuple(one.shape) for name, one in part.named_parameters(recurse=False)}
        parts.append((type(part).__qualname__, plain, weights))
    return repr(parts)
