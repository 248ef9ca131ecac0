"""Time-dependent discriminators and classifiers by name, and the files that hold them.

A discriminator is a network (x_vp, t, label) -> logit (B,), an estimate of log p_data - log p_model at VP time t:
x_vp is the noisy state in VP coordinates (`diffusion.noise`), t float64 (B,) in [0, 1], label int64 (B,), -1 = none.
A noisy-image classifier is a network (x_vp, t) -> logits (B, classes) with `features(x_vp, t)` (B, C, h, w) before its
pooling head. It serves twice: as classifier guidance, and as the frozen trunk under a shallow discriminator (arXiv
2211.17091, section 4.3). A new one is a file here and a line in BUILTIN.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ddo_cli import checkpoint
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.diffusion import vp_sde
from ddo_cli.errors import CheckpointError, RecipeError, reason
from ddo_cli.models.catalog import Catalog, option_problems
from ddo_cli.models.loading import of_file
from ddo_cli.trainable import Trainable

BUILTIN = {
    "adm-discriminator": "ddo_cli.models.discriminators.adm_head",
    "time-encoder": "ddo_cli.models.discriminators.time_encoder",
    "time-mlp": "ddo_cli.models.discriminators.time_mlp",
    "trunk": "ddo_cli.models.discriminators.on_trunk",
}
CLASSIFIERS = {
    "adm-classifier": "ddo_cli.models.discriminators.adm_encoder",
    "time-encoder-classifier": "ddo_cli.models.discriminators.time_encoder",
}
# What x_vp and t mean to a network. Stored in its file; a file of another process is refused.
PROCESS = {"name": "vp-linear", "beta_0": vp_sde.BETA_0, "beta_1": vp_sde.BETA_1}


class Classifier(Protocol):
    """What a trunk must offer, see the module's docstring."""

    def features(self, x_vp: Tensor, t: Tensor) -> Tensor: ...

    def __call__(self, x_vp: Tensor, t: Tensor) -> Tensor: ...


_REMEDY = "a network of your own is registered by the Python file given as model.file"
_CATALOGS = {
    "discriminator": Catalog("discriminator.name", BUILTIN, _REMEDY),
    "classifier": Catalog("classifier.name", CLASSIFIERS, _REMEDY),
}
# Decorators of builders (shape, num_classes, options) -> Trainable.
register, register_classifier = _CATALOGS["discriminator"].register, _CATALOGS["classifier"].register


def config_of(
    kind: str, name: str, shape: tuple[int, ...], num_classes: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The configuration that a weight file carries, with every default written out.

    kind: "discriminator" or "classifier". shape: of a state in model space. num_classes: a discriminator's 0 means that
    it ignores labels. Raises RecipeError listing what is wrong with the options.
    """
    entry = _CATALOGS[kind].find(name)
    if lines := option_problems(f"{kind}.options", name, entry.options, options):
        raise RecipeError("\n".join(lines))
    values = entry.options.model_validate(options).model_dump(mode="json")
    return {"name": name, "shape": list(shape), "num_classes": num_classes, "options": values}


def build(kind: str, config: dict[str, Any]) -> Trainable:
    """The network of a configuration. Raises RecipeError if it cannot be built."""
    entry = _CATALOGS[kind].find(config["name"])
    shape = tuple(config["shape"])
    try:
        network = entry.build(shape, config["num_classes"], entry.options.model_validate(config["options"]))
    except ValueError as error:
        raise RecipeError(f"{kind} {config['name']} for states of shape {shape}: {error}") from None
    if not isinstance(network, Trainable):
        raise RecipeError(f"{kind} {config['name']} is a {type(network).__name__}; derive it from trainable.Trainable")
    return network


class Loaded(NamedTuple):
    """A frozen network in eval mode on its device, and the file it came from."""

    network: Trainable
    checkpoint: Checkpoint


def load(kind: str, path: str | Path, device: torch.device) -> Loaded:
    """A discriminator or classifier from its file. Raises CheckpointError if the file holds something else."""
    file = checkpoint.load(path, kind=kind)
    header = file.header
    if header.get("process") != PROCESS:
        raise CheckpointError(
            f"{path} was trained with the noise process {header.get('process')} where this program has {PROCESS}; "
            "train one with ddo train-disc"
        )
    checkpoint.require(file, "config.name", "config.shape", "config.num_classes", "config.options")
    if kind == "discriminator":
        checkpoint.require(file, "trained_on.model", "trained_on.model_sha256", "guidance")
    config = header["config"]
    try:
        if config["name"] in BUILTIN | CLASSIFIERS:
            network = of_file(lambda: build(kind, config), file, device)
        else:  # a user's code may compute with tensors as it builds, which the meta device does not allow
            network = build(kind, config)
            network.load_state_dict(file.tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: tensors do not fit the {kind} its header describes: {reason(error)}") from None
    return Loaded(network.to(device).eval().requires_grad_(False), file)
