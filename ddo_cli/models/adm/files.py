"""ADM's diffusion models in OpenAI's .pt files: bare state dicts, whose configuration is read off the shapes."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import CheckpointError
from ddo_cli.models import registry
from ddo_cli.models.adm import keys as adm_keys
from ddo_cli.models.adm import published as adm_published
from ddo_cli.models.adm.published import Described
from ddo_cli.models.adm.unet import AdmUnetOptions

EXPECTED = "this program reads the published ADMs, ADM classifiers, DG discriminators, VARs, DiTs and SiTs"
MARK = "input_blocks.0.0.weight"  # a tensor of every file of this kind, see `pt_files.read`


class AdmFile(NamedTuple):
    """A .pt as it was read. tensors: of our model, float32; stored: the file's own, in their order and types."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    stored: dict[str, Tensor]
    described: Described


def options_of(config: dict[str, Any]) -> AdmUnetOptions:
    """The options of a configuration, checked."""
    return AdmUnetOptions.model_validate(config["options"])


def is_unet(tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors are those of a U-Net; a classifier has no way up."""
    return any(key.startswith("output_blocks.") for key in tensors)


def unet(stored: dict[str, Tensor], path: str | Path, told: adm_published.Told = adm_published.Told()) -> AdmFile:  # noqa: B008 (immutable)
    """The model of a file's tensors, which must be of honest size (`pt_files.check_size`).

    told: where shapes do not tell. Raises CheckpointError for other tensors, for the upsampler, and where something
    must be told.
    """
    described = adm_published.described({key: tuple(tensor.shape) for key, tensor in stored.items()}, str(path), told)
    if described.in_channels != described.channels:
        raise CheckpointError(
            f"{path} is an upsampler: beside a noisy image of {described.size}x{described.size} it reads one to "
            "enlarge, which no command here has; convert the diffusion model of the size you want"
        )
    shape = (described.channels, described.size, described.size)
    config = registry.config_of("adm-unet", shape, described.num_classes, described.options, {})
    options = options_of(config)
    tensors = {}
    for key, tensor in stored.items():
        name, value = adm_keys.from_openai(key, tensor.to(torch.float32), described.order, options)
        tensors[name] = value.contiguous()
    return AdmFile(config, tensors, stored, described)
