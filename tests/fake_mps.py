"""A stand-in of an Apple GPU: tensors that say so, and compute on the CPU. It refuses float64, as Metal does."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps:0")
REFUSED = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."


class OnMps(torch.Tensor):
    """A tensor of the device; `content` holds its numbers."""

    @staticmethod
    def __new__(cls, content: torch.Tensor) -> "OnMps":
        if content.dtype == torch.float64:
            raise TypeError(REFUSED)
        made = torch.Tensor._make_wrapper_subclass(cls, content.shape, strides=content.stride(), dtype=content.dtype)
        made.content = content
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        if any(isinstance(one, torch.Tensor) and type(one) is not cls and one.ndim for one in leaves):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found mps:0 and cpu")
        inside = tree_map(lambda one: one.content if isinstance(one, cls) else one, (args, kwargs or {}))
        return tree_map(lambda one: cls(one) if isinstance(one, torch.Tensor) else one, func(*inside[0], **inside[1]))


class FakeMps(TorchFunctionMode):
    """Answers what tells or changes the device, before torch asks for the driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__ and isinstance(args[0], OnMps):
            return MPS
        if func is torch.Tensor.cpu and isinstance(args[0], OnMps):
            return args[0].content.clone()
        if func is torch.Tensor.to:
            given = [*args[1:], *(kwargs[key] for key in ("device", "dtype", "other") if key in kwargs)]
            places = [place_of(one) for one in given if place_of(one)]
            types = [getattr(one, "dtype", one) for one in given]
            types = [one for one in types if isinstance(one, torch.dtype)]
            here = places[0] if places else place_of(args[0])
            if isinstance(args[0], OnMps) and here == "mps":
                return func(args[0], *types) if types else args[0]
            content = args[0].content if isinstance(args[0], OnMps) else args[0]
            content = func(content, *types) if types else content
            return OnMps(content) if here == "mps" else content
        if place_of(kwargs.get("device")) == "mps":
            return OnMps(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def place_of(value: object) -> str:
    """The kind of a device, or of a tensor's; empty for anything else."""
    if isinstance(value, torch.Tensor):
        return "mps" if isinstance(value, OnMps) else "cpu"
    return str(value).partition(":")[0] if isinstance(value, (str, torch.device)) else ""
