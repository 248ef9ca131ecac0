"""Tensors of ADM's U-Net in three files: ours (`adm_unet` in a DiffusionModel), OpenAI's .pt, EDM's pickle.

Names differ, and so does the order in which an attention layer's 3 C output channels are laid out. With d channels per
head, query, key or value (k = 0, 1, 2) number c of a head is the channel
    legacy       3 d head + d k + c      ours; OpenAI's default
    new          C k + d head + c        OpenAI's 64x64 model
    interleaved  3 d head + 3 c + k      EDM
The wrong order fits every shape and gives another function. All maps are exact both ways.
"""

from typing import Literal

import torch
from torch import Tensor

from ddo_cli.models.adm.layers import head_width
from ddo_cli.models.adm.unet import AdmUnetOptions, level_widths

Order = Literal["legacy", "new", "interleaved"]

_RES = {
    "in_layers.0": "norm0",
    "in_layers.2": "conv0",
    "emb_layers.1": "affine",
    "out_layers.0": "norm1",
    "out_layers.3": "conv1",
    "skip_connection": "skip",
}
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}
_ROOT = {
    "augment_emb": "map_augment",
    "time_embed.0": "map_layer0",
    "time_embed.2": "map_layer1",
    "label_emb": "map_label",
    "out.0": "out_norm",
    "out.2": "out_conv",
}
_OURS, _EDM = "net.", "model."
_CONSTANT = "resample_filter"  # EDM's buffers, of which we have none: the 2x2 mean of every halving and doubling
_LEVELS = "u"  # iDDPMPrecond's buffer: its noise levels, which our preconditioner computes

# --- Order of the channels


def reordered(qkv: Tensor, source: Order, target: Order, head_channels: int) -> Tensor:
    """The weight (3 C, ...) or bias (3 C,) of a qkv layer, its channels in another order; a contiguous copy."""
    rest = qkv.shape[1:]
    if source == "new":
        rows = qkv.reshape(3, -1, head_channels, *rest).movedim(0, 1)  # (heads, 3, d, ...)
    elif source == "legacy":
        rows = qkv.reshape(-1, 3, head_channels, *rest)
    else:
        rows = qkv.reshape(-1, head_channels, 3, *rest).movedim(2, 1)
    if target == "new":
        rows = rows.movedim(1, 0)
    elif target == "interleaved":
        rows = rows.movedim(1, 2)
    return rows.reshape(qkv.shape).clone(memory_format=torch.contiguous_format)


def _is_qkv(name: str) -> bool:
    return name.rpartition(".")[0].endswith(".qkv")


def _head_channels(qkv: Tensor, options: AdmUnetOptions) -> int:
    return head_width(len(qkv) // 3, options.num_head_channels, options.num_heads)


# --- OpenAI's files


def from_openai(name: str, tensor: Tensor, order: Order, options: AdmUnetOptions) -> tuple[str, Tensor]:
    """Our name and tensor of one in a published .pt file, whose qkv channels are in `order`."""
    if _is_qkv(name):
        tensor = reordered(tensor, order, "legacy", _head_channels(tensor, options))
    return _OURS + name, tensor


def to_openai(name: str, tensor: Tensor, order: Order, options: AdmUnetOptions) -> tuple[str, Tensor]:
    """The inverse of `from_openai`. Raises KeyError for a tensor that is not of the network."""
    if not name.startswith(_OURS):
        raise KeyError(name)
    if _is_qkv(name):
        tensor = reordered(tensor, "legacy", order, _head_channels(tensor, options))
    return name.removeprefix(_OURS), tensor


# --- EDM's files


class EdmKeys:
    """Tensors of EDM's DhariwalUNet inside its preconditioner <-> ours, for states of side `size`."""

    def __init__(self, size: int, options: AdmUnetOptions) -> None:
        self._options = options
        self._edm = _layers(size, options)  # our layer: EDM's
        self._ours = {theirs: ours for ours, theirs in self._edm.items()}

    def from_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Our name and tensor; None for the constants that our network has not.

        Raises KeyError for another name, ValueError if a filter is not the 2x2 mean.
        """
        layer, _, kind = name.removeprefix(_EDM).rpartition(".")
        if name == _LEVELS:
            return None
        if kind == _CONSTANT:
            if tensor.shape != (1, 1, 2, 2) or not bool((tensor == 0.25).all()):
                raise ValueError(f"{name} is not the 2x2 mean of ADM's U-Net")
            return None
        if not name.startswith(_EDM) or kind not in ("weight", "bias"):
            raise KeyError(name)
        ours = self._ours[layer]
        if layer == "map_label":
            tensor = tensor.t().contiguous()  # (E, K) of a linear layer without bias -> rows (K, E)
        elif ours.endswith((".qkv", ".proj_out")):
            tensor = tensor[..., 0] if kind == "weight" else tensor  # (C', C, 1, 1) -> (C', C, 1)
        if ours.endswith(".qkv"):
            tensor = reordered(tensor, "interleaved", "legacy", _head_channels(tensor, self._options))
        return f"{_OURS}{ours}.{kind}", tensor

    def to_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """The inverse of `from_edm`. Raises KeyError for a tensor that is not of the network."""
        if not name.startswith(_OURS):
            raise KeyError(name)
        layer, _, kind = name.removeprefix(_OURS).rpartition(".")
        theirs = self._edm[layer]
        if layer == "label_emb":
            tensor = tensor.t().contiguous()
        elif layer.endswith(".qkv"):
            tensor = reordered(tensor, "legacy", "interleaved", _head_channels(tensor, self._options))
        if layer.endswith((".qkv", ".proj_out")) and kind == "weight":
            tensor = tensor[..., None]
        return f"{_EDM}{theirs}.{kind}", tensor


def _layers(size: int, options: AdmUnetOptions) -> dict[str, str]:
    """EDM's name of each of our layers, including some that a network of these options lacks (skip_connection)."""
    last, blocks = len(level_widths(options.width, options.channel_mult)) - 1, options.num_blocks
    names = {**_ROOT, "input_blocks.0.0": f"enc.{size}x{size}_conv"}

    def add(ours: str, theirs: str, attends: bool = False) -> None:
        names.update({f"{ours}.0.{layer}": f"{theirs}.{name}" for layer, name in _RES.items()})
        if attends:
            names.update({f"{ours}.1.{layer}": f"{theirs}.{name}" for layer, name in _ATTENTION.items()})

    for level in range(last + 1):
        side, first = size >> level, level * (blocks + 1)  # first: the halving, or the first convolution
        attends = side in options.attention
        if level:
            add(f"input_blocks.{first}", f"enc.{side}x{side}_down")
        for i in range(blocks):
            add(f"input_blocks.{first + 1 + i}", f"enc.{side}x{side}_block{i}", attends)
    side = size >> last
    add("middle_block", f"dec.{side}x{side}_in0", attends=True)
    names.update({f"middle_block.2.{layer}": f"dec.{side}x{side}_in1.{name}" for layer, name in _RES.items()})
    for level in reversed(range(last + 1)):
        side, first = size >> level, (last - level) * (blocks + 1)
        attends = side in options.attention
        for i in range(blocks + 1):
            add(f"output_blocks.{first + i}", f"dec.{side}x{side}_block{i}", attends)
        if level:  # the doubling: EDM's next level begins with it, OpenAI's last block of this one ends with it
            ours, theirs = f"output_blocks.{first + blocks}.{2 if attends else 1}", f"dec.{2 * side}x{2 * side}_up"
            names.update({f"{ours}.{layer}": f"{theirs}.{name}" for layer, name in _RES.items()})
    return names
