"""Tensors by name in the .pt and .pth files of published networks, and of the programs that train them.

A training checkpoint holds the weights beside others of its own, below names that wrappers have added: the network is
found by the name of one of its tensors, wherever it lies, and averaged weights are preferred.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ddo_cli import checkpoint, foreign, torch_files
from ddo_cli.errors import CheckpointError, printable
from ddo_cli.safe_pickle import Record

# Within names of tensors: torch.compile, FSDP and activation checkpointing wrap modules at any depth.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DEEPEST = 4  # dicts within dicts; our choice, two more than known trainers have
_FEW = 6  # names in a message
_AVERAGED = re.compile(r"(^|[._])ema(?![a-z])|averag")
_PLAIN = {"", "module", "model", "net", "network", "state_dict", "model_state_dict"}


class Weights(NamedTuple):
    """The tensors of a network. place: where in the file they lie, "" = they are all that it holds.

    settings: what the trainer was called with (an argparse.Namespace called args), by name.
    averages: the averaged parameters, where a trainer keeps them as a list without names (torch_ema, score_sde).
    """

    tensors: dict[str, Tensor]
    place: str
    left_out: list[str]
    settings: dict[str, Any] = {}  # noqa: RUF012
    averages: list[Tensor] | None = None

    @property
    def notes(self) -> dict[str, str]:
        """What was chosen and what was not read, for people."""
        chosen = {"weights": self.place} if self.place else {}
        return chosen | ({"not_read": _listed(self.left_out)} if self.left_out else {})


def read(path: str | Path, expected: str, marks: Sequence[str]) -> Weights:
    """The network of a file of `torch.save`, its tensors in their order and types.

    Their numbers may be fewer than their shapes say; see `check_size`.
    marks: a tensor's name by which each network that is looked for is known; the first one in the file decides.
    expected: for messages, what could have been given. Raises CheckpointError if there is no such network, or if one of
    several cannot be chosen.
    """
    content = torch_files.read(checkpoint.resolve(path), str(path), expected)
    found = next(filter(None, (list(_networks(content, mark)) for mark in marks)), [])
    if not found and torch_files.is_state_dict(content):
        _refuse_known(path, expected)
        return Weights(_apart(content), "", [])  # the reader of the family says what is missing
    if not found:
        _refuse(content, path, expected)
    groups = [
        [network for network in found if _AVERAGED.search(network.place.split(".")[-1])],
        [network for network in found if _AVERAGED.search(network.place)],
        found,
        [network for network in found if set(network.place.split(".")) <= _PLAIN],
    ]
    if chosen := next((group[0] for group in groups if len(group) == 1), None):
        averages = _averages(content)
        return chosen._replace(tensors=_apart(chosen.tensors), settings=_settings(content), averages=averages)
    places = _listed([network.place or "its top" for network in found])
    raise CheckpointError(
        f"{path} holds several networks ({places}); save the one to convert by itself, by torch.save of its tensors"
    )


def _settings(content: Any) -> dict[str, Any]:
    args = content.get("args") if isinstance(content, dict) else None
    state = args.state if isinstance(args, Record) and args.class_name == "Namespace" else None
    return {key: value for key, value in (state or {}).items() if isinstance(key, str)}


def _averages(content: Any) -> list[Tensor] | None:
    ema = content.get("ema") if isinstance(content, dict) else None
    shadows = ema.get("shadow_params") if isinstance(ema, dict) else None
    is_list = isinstance(shadows, list) and bool(shadows) and all(isinstance(each, Tensor) for each in shadows)
    return shadows if is_list else None


def _networks(content: Any, mark: str) -> Iterator[Weights]:
    """Every network with a tensor of this name in nested dicts, under whatever prefix its tensors' names have."""
    for place, entries in _dicts(content, (), set()):
        names = {_WRAPPERS.sub("", key): value for key, value in entries.items()}
        prefixes = {name.removesuffix(mark) for name in names if name.endswith(mark)}
        # More than _FEW are none of a trainer's, and one among them cannot be chosen.
        for prefix in sorted(prefix for prefix in prefixes if prefix.endswith(".") or not prefix)[: _FEW + 1]:
            inside = {
                name[len(prefix) :]: value
                for name, value in names.items()
                if name.startswith(prefix) and isinstance(value, Tensor)
            }
            others = [name for name in names if not name.startswith(prefix) or name[len(prefix) :] not in inside]
            beside = [name for name in content if place and name != place[0]]
            yield Weights(inside, ".".join(filter(None, (*place, prefix.rstrip(".")))), [*beside, *others])


def _dicts(content: Any, place: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Dicts with names for keys within dicts, each once, and where they lie."""
    is_named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if is_named and id(content) not in seen and len(place) < _DEEPEST:
        seen.add(id(content))
        yield place, content
        for key, value in content.items():
            yield from _dicts(value, (*place, key), seen)


# --- Files without a network of ours


def _refuse(content: Any, path: str | Path, expected: str) -> None:
    """Raises the CheckpointError that says what the file is instead."""
    _refuse_known(path, expected)
    for _, names in _dicts(content, (), set()):
        if names.keys() >= {"state", "param_groups"} and not any(key in content for key in ("model", "ema")):
            beside = weights_beside(Path(path))
            remedy = f"give {beside}, which lies beside it" if beside else "give the file of the averaged weights (ema)"
            raise CheckpointError(f"{path} is the state of an optimizer, not of a network; {remedy}")
    what = f"holds {_listed(list(content))}" if isinstance(content, dict) else f"holds a {type(content).__name__}"
    raise CheckpointError(f"{path} {what}, not a bare state dict of a known network; {expected}")


def _refuse_known(path: str | Path, expected: str) -> None:
    """Raises CheckpointError for a network of a family that is none of ours."""
    if what := foreign.network_of(checkpoint.resolve(path)):
        raise CheckpointError(f"{path} holds {what}; {expected}")


def weights_beside(path: Path) -> str | None:
    """The name of the averaged weights, else the weights, that a trainer left beside a file of it: those of the same
    step where the names tell it.
    """
    step = re.search(r"\d{4,}", path.name)
    names = sorted(file.name for file in path.absolute().parent.iterdir() if file.suffix in (".pt", ".pkl", ".pth"))
    for start in ("ema", "network-snapshot", "model"):
        found = [name for name in names if name.startswith(start) and name != path.name]
        same = [name for name in found if step and step[0] in name]
        if same or found:
            return (same or found)[-1]
    return None


def _listed(names: list[Any]) -> str:
    shown = printable(", ".join(str(name)[:40] for name in names[:_FEW]), 120)
    return shown + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, sharing no memory; those that repeat numbers stay as they are, for `check_size` to refuse."""
    seen, apart = set(), {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shares = storage.data_ptr() in seen and tensor.numel() * tensor.element_size() <= storage.nbytes()
        seen.add(storage.data_ptr())
        apart[key] = tensor.clone() if shares else tensor
    return apart


def check_size(tensors: Iterable[Tensor], path: str | Path) -> None:
    """Raises CheckpointError if the tensors have more numbers than the file could hold."""
    torch_files.check_size(tensors, checkpoint.resolve(path), str(path))


def misfits(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    shown: Callable[[str, Tensor], str] = lambda key, tensor: key,
) -> list[str]:
    """How tensors differ from those of a network's state dict, one line each, sorted. shown: a tensor's name there."""
    problems = [f"missing {shown(key, tensor)}" for key, tensor in expected.items() if key not in tensors]
    problems += [f"unexpected {shown(key, tensor)}" for key, tensor in tensors.items() if key not in expected]
    problems += [
        f"{shown(key, tensor)} of shape {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in tensors and (tensors[key].shape != tensor.shape or not tensors[key].is_floating_point())
    ]
    return sorted(problems)
