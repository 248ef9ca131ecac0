"""EDM's pickles: the averaged network inside one -> a configuration of `registry` and tensors under our names."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddo_cli.diffusion import precond, vp_sde
from ddo_cli.errors import CheckpointError, printable
from ddo_cli.models import registry, snapshots
from ddo_cli.models.adm.keys import EdmKeys
from ddo_cli.models.adm.unet import AdmUnetOptions, level_widths
from ddo_cli.models.edm import keys as edm_keys
from ddo_cli.models.snapshots import Names, Network, Snapshot

# Constructors of the networks: their argument -> our option, its default there.
_SONG = {
    "model_channels": ("channels", 128),
    "channel_mult": ("channel_mult", [1, 2, 2, 2]),
    "channel_mult_emb": ("channel_mult_emb", 4),
    "num_blocks": ("num_blocks", 4),
    "attn_resolutions": ("attn_resolutions", [16]),
    "embedding_type": ("embedding", "positional"),
    "channel_mult_noise": ("channel_mult_noise", 1),
    "encoder_type": ("encoder", "standard"),
    "resample_filter": ("resample_filter", [1, 1]),
    "augment_dim": ("augment_dim", 0),
}
_ADM = {
    "model_channels": ("width", 192),
    "channel_mult": ("channel_mult", [1, 2, 3, 4]),
    "num_blocks": ("num_blocks", 3),
    "attn_resolutions": ("attention", [32, 16, 8]),
    "augment_dim": ("augment_dim", 0),
}
# Our network, its arguments, and those without an option of ours, with the one value of every published file.
_NETWORKS: dict[str, tuple[str, dict[str, tuple[str, Any]], dict[str, Any]]] = {
    "SongUNet": ("edm-unet", _SONG, {"decoder_type": "standard"}),
    "DhariwalUNet": ("adm-unet", _ADM, {"channel_mult_emb": 4}),
}

# Preconditioners: our name, and the constants that ours has. sigma_data is an option; the noise range of an EDM file is
# 0 to infinity, and ours are the sampler's defaults.
_PRECONDS: dict[str, tuple[precond.PrecondName, dict[str, float]]] = {
    "EDMPrecond": ("edm", {}),
    "VPPrecond": (
        "vp",
        {
            "beta_d": vp_sde.BETA_1 - vp_sde.BETA_0,
            "beta_min": vp_sde.BETA_0,
            "M": precond.Vp.last_step + 1,
            "epsilon_t": precond.Vp.t_min,
        },
    ),
    "VEPrecond": ("ve", {"sigma_min": precond.Ve.sigma_min, "sigma_max": precond.Ve.sigma_max}),
    "iDDPMPrecond": ("iddpm", {"C_1": precond.IDDPM_C1, "C_2": precond.IDDPM_C2, "M": precond.NUM_STEPS}),
}
_HEAD_CHANNELS = 64  # of DhariwalUNet, which has no argument for it
_READ = snapshots.READ | {
    "model_type", "label_dropout", "sigma_min", "sigma_max", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2",
}  # fmt: skip


def read_edm(path: str | Path, snapshot: Snapshot | None = None) -> Network:
    """The averaged network (`ema`) of an EDM .pkl: one of its four preconditioners around DDPM++, NCSN++ or ADM.

    snapshot: the file's content, if it has been read.
    Raises CheckpointError if the file is missing, damaged, refused by `read_pickle`, or holds another network.
    """
    snapshot = snapshot or snapshots.open_snapshot(path)
    return snapshots.read_network(path, snapshot, "model", lambda state, classes: _config(state, classes, path), _names)


def _config(state: dict[str, Any], classes: tuple[str, str], path: str | Path) -> dict[str, Any]:
    """Configuration of a preconditioned network, from the arguments it was made with."""
    outer, network = classes
    if outer not in _PRECONDS or network not in _NETWORKS:
        raise CheckpointError(
            f"{path} holds a {printable(outer)} around a {printable(network)}; what can be converted is "
            f"{', '.join(_PRECONDS)} around {' or '.join(_NETWORKS)}"
        )
    (kind, constants), (name, arguments, fixed) = _PRECONDS[outer], _NETWORKS[network]
    given = snapshots.arguments(state, {*arguments, *fixed, *_READ}, path)
    for key, known in {**fixed, **constants}.items():
        value = given.get(key, known) if key in fixed else snapshots.number(state[key], key)
        if value != known and not (isinstance(value, float) and abs(value - known) < 1e-9):  # 20 - 0.1 is not 19.9
            raise CheckpointError(
                f"{path}: {key} = {value!r} of its {network if key in fixed else outer}; every published "
                f"file has {known}, and this program knows nothing else"
            )
    options = {ours: given.get(theirs, default) for theirs, (ours, default) in arguments.items()}
    options |= {"precond": kind, "learned_variance": kind == "iddpm"}  # asks the network for twice the channels
    if kind == "edm":
        options["sigma_data"] = snapshots.number(state["sigma_data"], "sigma_data")
    channels, side, num_classes = snapshots.shape_of(state)
    if name == "adm-unet":
        options["group_channels"] = 4  # EDM's norms
        options["attention"] = _attention(options, side, path)
    draw = {"label_dropout": given.get("label_dropout", 0)}  # a dropped label is a row of zeros there as here
    return registry.config_of(name, (channels, side, side), num_classes, options, draw)


def _attention(options: dict[str, Any], side: int, path: str | Path) -> list[int]:
    """The sides at which EDM's network attends: a level with fewer channels than a head's 64 has no head there."""
    widths = level_widths(options["width"], options["channel_mult"])
    if widths[-1] < _HEAD_CHANNELS:
        raise CheckpointError(
            f"{path}: its coarsest level has {widths[-1]} channels, fewer than the {_HEAD_CHANNELS} of a head, so that "
            "it attends nowhere; this program builds ADM's U-Net with attention in the middle only"
        )
    narrow = {side >> level for level, width in enumerate(widths) if width < _HEAD_CHANNELS}
    return [each for each in options["attention"] if each not in narrow]


# --- Tensors


class _SongNames:
    """Names of DDPM++ and NCSN++; their tensors are the same."""

    def __init__(self, size: int):
        self.size = size

    def from_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name == "u":
            return None
        with contextlib.suppress(KeyError):
            if edm_keys.official_name(ours := edm_keys.own_name(name), self.size) == name:
                return ours, tensor
        raise KeyError(f"unexpected {name}")

    def to_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return edm_keys.official_name(name, self.size), tensor


def _names(config: dict[str, Any], stored: dict[str, Tensor]) -> Names:
    """Raises ValueError if there are too few tensors for so many blocks (building them could take hours), or if the
    noise levels of an iDDPMPrecond are not ours.
    """
    options, size = config["options"], config["shape"][1]
    blocks = len(options["channel_mult"]) * (2 * options["num_blocks"] + 1)
    if 10 * blocks > len(stored):  # two norms, two convolutions and a linear layer, each with a bias
        raise ValueError(f"{len(stored)} tensors are too few")
    if "u" in stored:
        levels = torch.cat([precond.edm_cosine_sigmas().flip(0), torch.zeros(1)])
        # rtol: the rounding of a long recursion.
        if stored["u"].shape != levels.shape or not torch.allclose(stored["u"].to(levels), levels, rtol=1e-3):
            raise ValueError("its noise levels 'u' are not those of the cosine schedule")
    return _SongNames(size) if config["name"] == "edm-unet" else EdmKeys(size, AdmUnetOptions.model_validate(options))
