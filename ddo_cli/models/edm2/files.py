"""EDM2's pickles: the averaged network inside one -> a configuration of `registry` and tensors under our names."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddo_cli.errors import CheckpointError, printable
from ddo_cli.models import registry, snapshots
from ddo_cli.models.edm2.published import PUBLISHED
from ddo_cli.models.snapshots import Network, Snapshot
from ddo_cli.models.vae_codec import CHANNELS, DEFAULT_VAE, EDM2, FACTOR
from ddo_cli.safe_pickle import Array, Record

# Constructor of the network: argument -> our option, its default there.
_ARGUMENTS = {
    "model_channels": ("width", 192),
    "channel_mult": ("channel_mult", [1, 2, 3, 4]),
    "num_blocks": ("num_blocks", 3),
    "attn_resolutions": ("attn_resolutions", [16, 8]),
    "channels_per_head": ("head_width", 64),
}
# Without an option of ours: the one value of every published file.
_FIXED: dict[str, Any] = {
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
    "resample_filter": [1, 1],
    "logvar_channels": 128,
}
_MOST_BLOCKS = 500  # the published have 36; our choice, so that a hostile file costs a second at most
_NAME = re.compile(r"-(?P<kimg>\d{7})-(?P<std>0\.\d{3})\.pkl")


def is_edm2(snapshot: Snapshot) -> bool:
    """Whether the averaged network is one of EDM2's."""
    return snapshot.outer.class_name == "Precond"


def read(path: str | Path, snapshot: Snapshot) -> Network:
    """The averaged network (`ema`) of an EDM2 .pkl; its autoencoder is told by the configuration.

    Raises CheckpointError if the file holds another network or encoder, or its tensors do not fit.
    """
    encoder = snapshot.content.get("encoder")
    return snapshots.read_network(
        path, snapshot, "unet", lambda state, classes: _config(state, classes[1], encoder, path), _names
    )


def ema_of(name: str) -> dict[str, float | int] | None:
    """Which average a file holds, by its published name: relative width `std` and number of training `images`.

    The name gives thousands of images; the count itself is a multiple of 1024.
    """
    if not (match := _NAME.search(name)):
        return None
    return {"std": float(match["std"]), "images": (int(match["kimg"]) * 1000 + 999) // 1024 * 1024}


def _as_evaluated(name: str, stored: dict[str, Tensor]) -> Tensor:
    """The tensor as EDM2's code evaluates it.

    It computes g / sqrt(fan-in), which scales the filters, in the stored type: in float16 files it is rounded. We keep
    the float32 gain that gives the same quotient; the stored one would be off by about 1e-4 relative.
    """
    tensor = stored[name]
    prefix, _, last = name.rpartition(".")
    layer = {"emb_gain": "emb_linear.weight", "out_gain": "out_conv.weight"}.get(last)
    if layer is None:
        return tensor
    weight = stored.get(f"{prefix}.{layer}")
    if tensor.dtype == torch.float16 and weight is not None:
        root = math.sqrt(weight[0].numel())
        tensor = (tensor / root).to(torch.float32) * root
    return tensor.reshape(1)


class _Names:
    """Official names <-> ours. stored: the file's tensors."""

    def __init__(self, stored: dict[str, Tensor]):
        self.stored = stored

    def from_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        if name.startswith("net."):
            raise KeyError(f"unexpected {name}")
        return re.sub(r"^unet\.", "net.", name), _as_evaluated(name, self.stored)

    def to_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return re.sub(r"^net\.", "unet.", name), tensor.reshape(()) if name.endswith("_gain") else tensor


# --- Configuration


def _config(state: dict[str, Any], network: str, encoder: Any, path: str | Path) -> dict[str, Any]:
    """Configuration of the preconditioned network, from the arguments it was made with, and of its encoder."""
    if network != "UNet":
        raise CheckpointError(f"{path} holds a Precond around a {printable(network)}; EDM2's network is a UNet")
    given = snapshots.arguments(state, {*_ARGUMENTS, *_FIXED, *snapshots.READ}, path)
    for key, known in _FIXED.items():
        if (value := given.get(key, known)) != known:
            raise CheckpointError(
                f"{path}: {key} = {printable(repr(value))} of its UNet; every published file has {known}, and this "
                "program knows nothing else"
            )
    options = {ours: given.get(theirs, default) for theirs, (ours, default) in _ARGUMENTS.items()}
    options["sigma_data"] = snapshots.number(state["sigma_data"], "sigma_data")
    channels, side, num_classes = snapshots.shape_of(state)
    shape = (channels, side, side)
    if _is_latent(encoder, path):
        if channels != CHANNELS:
            raise CheckpointError(f"{path}: its network has {channels} channels and its autoencoder {CHANNELS}")
        options["codec"], shape = "sd-vae", (3, FACTOR * side, FACTOR * side)
    return registry.config_of("edm2-unet", shape, num_classes, options, {})


def _is_latent(encoder: Any, path: str | Path) -> bool:
    """Whether the network sees latents of the published autoencoder, and not pixels. Raises CheckpointError."""
    if encoder is None:
        return False  # pixels, as EDM2's program takes it
    if not isinstance(encoder, Record):
        raise TypeError("an encoder that is no object")
    if encoder.class_name == "StandardRGBEncoder":
        return False
    if encoder.class_name != "StabilityVAEEncoder":
        raise CheckpointError(
            f"{path} draws with a {printable(encoder.class_name)}; what can be converted has a StandardRGBEncoder or a "
            "StabilityVAEEncoder"
        )
    state = encoder.state or {}
    if type(vae := state["vae_name"]) is not str:
        raise TypeError("its autoencoder has no name")
    if vae != DEFAULT_VAE:
        raise CheckpointError(f"{path}: its autoencoder is {printable(vae[:80])!r}; published files have {DEFAULT_VAE}")
    for key, known in (("scale", EDM2.scale), ("bias", EDM2.bias)):
        array = state[key]
        values = array.values if isinstance(array, Array) else None
        if values is None or values.shape != (CHANNELS,) or not np.allclose(values, known.flatten().numpy(), rtol=1e-5):
            raise CheckpointError(
                f"{path}: the {key} of its latents is not that of every published file, and this program knows no other"
            )
    return True


def _names(config: dict[str, Any], stored: dict[str, Tensor]) -> _Names:
    """Raises ValueError if there are too few tensors for so many blocks: building them could take hours."""
    options, num_tensors = config["options"], len(stored)
    blocks = len(options["channel_mult"]) * (2 * options["num_blocks"] + 3)
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"{blocks} blocks are more than any network of its kind has")
    if 4 * blocks > num_tensors:  # a gain, two convolutions and a linear layer
        raise ValueError(f"{num_tensors} tensors are too few")
    return _Names(stored)


def published_as(config: dict[str, Any]) -> str | None:
    """The published network of this configuration, whatever the noise levels it was trained with."""
    for name, entry in PUBLISHED.items():
        model, shape, num_classes, options, draw = entry.config
        known = registry.config_of(model, shape, num_classes, options, draw)
        if {**known, "draw": None} == {**config, "draw": None}:
            return name
    return None
