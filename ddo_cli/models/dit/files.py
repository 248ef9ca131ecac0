"""Files of DiT, SiT and REPA: the names of their tensors, and what tells the three apart.

All three write the same names. One file of DiT-XL/2 and one of SiT-XL/2 have the same shapes, too, and the wrong choice
gives noise and no error. So what no file tells is asked for.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ddo_cli.models.dit.transformer import DitOptions

MARK = "x_embedder.proj.weight"  # a tensor of every file of this kind, see `pt_files.read`
Arch = Literal["dit", "sit", "repa"]

_OURS, _LAST, _VARIANCE = "net.", "final_layer.linear", "final_layer.variance"


# --- Names


def from_official(stored: Mapping[str, Tensor], options: DitOptions) -> dict[str, Tensor]:
    """Our tensors of a published file's: the last layer's rows of F and of a variance lie apart.

    Rows of the published layer belong to (pixel of the patch, channel), F's channels before the variance's.
    """
    tensors = {_OURS + name: tensor for name, tensor in stored.items()}
    if options.learned_variance or options.unused_variance:
        for kind in ("weight", "bias"):
            both = tensors.pop(f"{_OURS}{_LAST}.{kind}").unflatten(0, (options.patch**2, 2, -1))
            for i, layer in enumerate((_LAST, _VARIANCE)):
                tensors[f"{_OURS}{layer}.{kind}"] = both[:, i].flatten(0, 1).contiguous()
    return tensors


def to_official(tensors: Mapping[str, Tensor], options: DitOptions) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    stored = {name.removeprefix(_OURS): tensor for name, tensor in tensors.items()}
    if options.learned_variance or options.unused_variance:
        for kind in ("weight", "bias"):
            parts = [stored.pop(f"{layer}.{kind}") for layer in (_LAST, _VARIANCE)]
            pixels = [part.unflatten(0, (options.patch**2, -1)) for part in parts]
            stored[f"{_LAST}.{kind}"] = torch.stack(pixels, dim=1).flatten(0, 2)
    return stored
