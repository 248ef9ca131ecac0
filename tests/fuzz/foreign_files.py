"""Small files of other programs, as their code writes them."""

import functools
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import var_models
from families import FAMILIES
from test_diffusers import make_folder
from test_dit_files import official, trained
from test_edm2_files import random_model as edm2_model
from test_edm2_files import snapshot, stored_tensors
from test_foreign import network, official_names, official_tensors, random_model

from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators


@functools.cache
def seeds() -> dict[str, bytes]:
    """Contents by name: networks of EDM and EDM2, and state dicts of ADM, Discriminator Guidance, VAR and DiT."""
    with pytest.MonkeyPatch.context() as patch:
        names = official_names(patch, Path("ran"))
        edm = {"ema": network(names, official_tensors(random_model()))}
        edm2 = snapshot(names, stored_tensors(edm2_model()))
        pickles = {"edm.pkl": pickle.dumps(edm, 4), "edm2.pkl": pickle.dumps(edm2, 4)}
    name, shape, options = FAMILIES["adm-unet"]
    adm = registry.build(registry.config_of(name, shape, 10, options, {})).state_dict()
    config = discriminators.config_of(
        "classifier", "adm-classifier", (3, 32, 32), 10, {"width": 32, "channel_mult": [1, 2], "attention": [16]}
    )
    classifier = discriminators.build("classifier", config).state_dict()
    var, vae = var_models.official_files(var_models.build())
    states = {
        "adm.pt": {key.removeprefix("net."): tensor for key, tensor in adm.items()}, "classifier.pt": classifier,
        "var.pth": var, "vae.pth": vae, "dit.pt": official("sit"), "trained-dit.pt": trained("dit", model="DiT-XL/2"),
        "nested.pth": {"trainer": {"var_wo_ddp": var, "vae_local": vae}}, "other.pt": {"x": torch.zeros(3)},
    }  # fmt: skip
    pickles |= {name: _saved(content) for name, content in states.items()}
    pickles["old.pt"] = _saved(states["other.pt"], _use_new_zipfile_serialization=False)
    return pickles


@functools.cache
def diffusers_folder() -> dict[str, bytes]:
    """A pipeline's folder, by name of file."""
    with tempfile.TemporaryDirectory() as place:
        make_folder(Path(place))
        return {str(file.relative_to(place)): file.read_bytes() for file in Path(place).rglob("*") if file.is_file()}


def _saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()
