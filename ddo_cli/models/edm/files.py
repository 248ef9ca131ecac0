"""EDM's pickles: the averaged network inside one -> a configuration of `registry` and tensors under our names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddo_cli.diffusion import precond, vp_sde
from ddo_cli.errors import CheckpointError, RecipeError, printable
from ddo_cli.models import pt_files, registry
from ddo_cli.models.adm.keys import EdmKeys
from ddo_cli.models.adm.unet import AdmUnetOptions
from ddo_cli.models.edm import keys as edm_keys
from ddo_cli.safe_pickle import Record, Storage, read_pickle, read_with_storages

__all__ = ["Converted", "EdmFile", "edm_checkpoint", "read_edm", "read_pickle"]

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
# Read apart or of no use here: dropout stays off, since model and reference share their draw; half precision is the
# caller's choice.
_READ = {
    "img_resolution", "img_channels", "label_dim", "model_type", "label_dropout", "dropout", "use_fp16", "sigma_data",
    "sigma_min", "sigma_max", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2",
}  # fmt: skip
_LONGEST = 64  # of a list or text among the arguments; chosen by us, far above every published one
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError, RecipeError)


class Converted(NamedTuple):
    """The configuration that `registry.build` takes, and the tensors of that model's state dict."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


class Names(Protocol):
    """Official names and tensors <-> ours. None: a constant that we compute. Raises KeyError for another name."""

    def from_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None: ...

    def to_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor]: ...


class EdmFile(NamedTuple):
    """A pickle as it was read. tensors: as in `Converted`; stored: official names, views of `storages`.

    classes: of the preconditioner and its network. half: there it runs in float16 on CUDA.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    stored: dict[str, Tensor]
    storages: list[Storage]
    names: Names
    classes: tuple[str, str]
    half: bool


def edm_checkpoint(path: str | Path) -> Converted:
    """The averaged network of an EDM .pkl, float32; see `read_edm`."""
    file = read_edm(path)
    return Converted(file.config, file.tensors)


class Pickled(NamedTuple):
    """A network-snapshot of EDM or EDM2, read and not yet looked at. outer: its averaged network, preconditioned."""

    content: dict[Any, Any]
    outer: Record
    storages: list[Storage]


def open_network(path: str | Path) -> Pickled:
    """The content of a network-snapshot. Raises CheckpointError if `read_pickle` refuses it or it has no `ema`."""
    content, storages = read_with_storages(path)
    outer = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(outer, Record):
        raise CheckpointError(f"{path} holds no averaged network under the key 'ema'; give a network-snapshot of EDM")
    return Pickled(content, outer, storages)


def read_edm(path: str | Path, pickled: Pickled | None = None) -> EdmFile:
    """The averaged network (`ema`) of an EDM .pkl: one of its four preconditioners around DDPM++, NCSN++ or ADM.

    pickled: the file's content, if it has been read.
    Raises CheckpointError if the file is missing, damaged, refused by `read_pickle`, or holds another network.
    """
    _, outer, storages = pickled or open_network(path)
    try:
        classes, config = _config(outer, path)
        stored = dict(tensors_of(outer, "", set()))
        pt_files.check_size(stored.values(), path)
        _check_blocks(config, len(stored))
        _check_levels(stored)
        names = _names(config)
        tensors = dict(filter(None, (names.from_edm(key, tensor) for key, tensor in stored.items())))
        with torch.device("meta"):
            expected = registry.build(config).state_dict()
        half = bool((outer.state or {}).get("use_fp16"))
    except DAMAGE as error:
        raise CheckpointError(
            f"{path}: the network does not fit its description ({type(error).__name__}: {printable(str(error))}); "
            "download it again"
        ) from None
    check_fits(expected, tensors, names, path)
    own = {key: tensors[key].to(torch.float32).clone(memory_format=torch.contiguous_format) for key in expected}
    return EdmFile(config, own, stored, storages, names, classes, half)


def check_fits(expected: dict[str, Tensor], tensors: dict[str, Tensor], names: Names, path: str | Path) -> None:
    """Raises CheckpointError unless the tensors have the names and shapes of `expected`, a network's state dict."""

    def shown(key: str, tensor: Tensor) -> str:
        return printable(names.to_edm(key, tensor)[0])

    problems = [f"missing {shown(key, tensor)}" for key, tensor in expected.items() if key not in tensors]
    problems += [f"unexpected {shown(key, tensor)}" for key, tensor in tensors.items() if key not in expected]
    problems += [
        f"{shown(key, tensor)} of shape {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:5])
        raise CheckpointError(f"{path}: {len(problems)} tensors do not fit the network it describes: {listed}")


def _config(outer: Record, path: str | Path) -> tuple[tuple[str, str], dict[str, Any]]:
    """Class names and configuration of a preconditioned network, from the arguments it was made with."""
    state = outer.state or {}
    given = plain_arguments(state["_init_kwargs"])
    network = state["_modules"]["model"].class_name
    if outer.class_name not in _PRECONDS or network not in _NETWORKS:
        raise CheckpointError(
            f"{path} holds a {printable(outer.class_name)} around a {printable(network)}; what can be converted is "
            f"{', '.join(_PRECONDS)} around {' or '.join(_NETWORKS)}"
        )
    (kind, constants), (name, arguments, fixed) = _PRECONDS[outer.class_name], _NETWORKS[network]
    if unknown := sorted(given.keys() - arguments.keys() - fixed.keys() - _READ):
        listed = printable(", ".join(unknown))
        raise CheckpointError(f"{path}: the network was made with arguments that are not known: {listed}")
    if state["_init_args"] != ():
        raise CheckpointError(f"{path}: the network was made with arguments that have no name")
    for key, known in {**fixed, **constants}.items():
        value = given.get(key, known) if key in fixed else number(state[key], key)
        if value != known and not (isinstance(value, float) and abs(value - known) < 1e-9):  # 20 - 0.1 is not 19.9
            raise CheckpointError(
                f"{path}: {key} = {value!r} of its {network if key in fixed else outer.class_name}; every published "
                f"file has {known}, and this program knows nothing else"
            )
    options = {ours: given.get(theirs, default) for theirs, (ours, default) in arguments.items()}
    options |= {"precond": kind, "learned_variance": kind == "iddpm"}  # asks the network for twice the channels
    if kind == "edm":
        options["sigma_data"] = number(state["sigma_data"], "sigma_data")
    if name == "adm-unet":
        options["group_channels"] = 4  # EDM's norms
    channels, side, classes = (number(state[key], key, int) for key in ("img_channels", "img_resolution", "label_dim"))
    draw = {"label_dropout": given.get("label_dropout", 0)}  # a dropped label is a row of zeros there as here
    return (outer.class_name, network), registry.config_of(name, (channels, side, side), classes, options, draw)


def plain_arguments(given: Any) -> dict[str, Any]:
    """Arguments of a constructor: numbers, texts and short lists of them. Others could be nested without end."""
    if type(given) is not dict:
        raise TypeError("arguments that are not a dict")
    for key, value in given.items():
        parts = value if type(value) in (list, tuple) else (value,)
        plain = all(part is None or type(part) in (bool, int, float, str) for part in parts)
        short = len(parts) <= _LONGEST and all(type(part) is not str or len(part) <= _LONGEST for part in parts)
        if type(key) is not str or not plain or not short:
            raise TypeError(f"argument {printable(str(key))!r} is neither a number, a word nor a short list")
    return given


def number(value: Any, key: str, kind: type = float) -> Any:
    """`value`, a number of this kind. Raises TypeError or ValueError."""
    if type(value) not in (int, kind):
        raise TypeError(f"{key} is not a number")
    if kind is int and not 0 <= value < 2**31:
        raise ValueError(f"{key} is out of range")
    return value


def _check_blocks(config: dict[str, Any], num_tensors: int) -> None:
    """Raises ValueError if there are too few tensors for so many blocks: building them could take hours."""
    options = config["options"]
    blocks = len(options["channel_mult"]) * (2 * options["num_blocks"] + 1)
    if 10 * blocks > num_tensors:  # two norms, two convolutions and a linear layer, each with a bias
        raise ValueError(f"{num_tensors} tensors are too few")


def _check_levels(stored: dict[str, Tensor]) -> None:
    """Raises ValueError if the noise levels of an iDDPMPrecond are not ours, up to the rounding of a long recursion."""
    if "u" in stored:
        levels = torch.cat([precond.cosine_sigmas().flip(0), torch.zeros(1)])
        if stored["u"].shape != levels.shape or not torch.allclose(stored["u"].to(levels), levels, rtol=1e-3):
            raise ValueError("its noise levels 'u' are not those of the cosine schedule")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


class _SongNames:
    """Names of DDPM++ and NCSN++; their tensors are the same."""

    def __init__(self, size: int):
        self.size = size

    def from_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name == "u":
            return None
        try:
            own = edm_keys.own_name(name)
            known = edm_keys.official_name(own, self.size) == name
        except KeyError:
            known = False
        if not known:
            raise KeyError(f"unexpected {name}")
        return own, tensor

    def to_edm(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return edm_keys.official_name(name, self.size), tensor


def _names(config: dict[str, Any]) -> Names:
    size = config["shape"][1]
    if config["name"] == "edm-unet":
        return _SongNames(size)
    return EdmKeys(size, AdmUnetOptions.model_validate(config["options"]))


def tensors_of(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module in the order of its state dict: parameters, buffers, then children."""
    if not isinstance(module, Record) or id(module) in seen:  # twice: a file of cycles would never end
        raise ValueError(f"'{prefix.rstrip('.')}' is not a module of its own")
    seen.add(id(module))
    state = module.state or {}
    for name, tensor in (*state["_parameters"].items(), *state["_buffers"].items()):
        if tensor is not None:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"'{prefix}{name}' is not a tensor of floating-point numbers")
            yield prefix + name, tensor
    for name, child in state["_modules"].items():
        yield from tensors_of(child, f"{prefix}{name}.", seen)
