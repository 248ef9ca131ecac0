"""Small files of other programs, as their code writes them."""

import functools
import io
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import var_models
from conftest import make_checkpoint
from families import FAMILIES
from mutations import ODD
from test_adm_encoder import TINY, tiny_classifier, tiny_discriminator
from test_convert import openai_file, random_adm
from test_diffusers import make_folder
from test_dit_files import official, trained
from test_edm2_files import THEIRS, snapshot, stored_tensors
from test_edm2_files import random_model as edm2_model
from test_foreign import ADM, KINDS, NETWORK, network, official_names, official_tensors, pickled_network, random_model
from test_var_files import NARROW_VAE
from tiny_pipeline import make_pipeline

from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators

ODDITIES = 12  # networks of odd arguments


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
    var, vae = var_models.official_files(var_models.build(NARROW_VAE))
    states = {
        "adm.pt": {key.removeprefix("net."): tensor for key, tensor in adm.items()}, "classifier.pt": classifier,
        "var.pth": var, "vae.pth": vae, "dit.pt": official("sit"), "trained-dit.pt": trained("dit", model="DiT-XL/2"),
        "nested.pth": {"trainer": {"var_wo_ddp": var, "vae_local": vae}}, "other.pt": {"x": torch.zeros(3)},
    }  # fmt: skip
    pickles |= {name: saved(content) for name, content in states.items()}
    pickles["old.pt"] = saved(states["other.pt"], _use_new_zipfile_serialization=False)
    return pickles


@functools.cache
def pickled_networks(kind: str) -> list[bytes]:
    """EDM's pickles of each preconditioner around its network of this kind, then such of odd arguments."""
    with pytest.MonkeyPatch.context() as patch:
        names, rng = official_names(patch, Path("ran")), random.Random(0)
        if kind == "edm2":
            tensors = stored_tensors(edm2_model())
            contents = [snapshot(names, tensors), snapshot(names, tensors, encoder="StabilityVAEEncoder")]
            for _ in range(ODDITIES):
                odd = {rng.choice((*THEIRS, "img_resolution", "label_dim")): rng.choice(ODD)}
                contents.append(snapshot(names, tensors, **{rng.choice(("side", "classes")): rng.choice(ODD)}))
                contents.append(snapshot(names, tensors, given={**THEIRS, **odd}))
        else:
            contents = [pickled_network(names, precond, kind)[0] for precond in KINDS]
            model = random_model()
            base = NETWORK if kind == "SongUNet" else ADM
            for _ in range(2 * ODDITIES):
                odd = {rng.choice((*base, "img_resolution", "img_channels", "label_dim")): rng.choice(ODD)}
                contents.append({"ema": network(names, official_tensors(model), base={**base, **odd}, inner=kind)})
        return [pickle.dumps(content, 4) for content in contents]


@functools.cache
def state_dicts() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, bytes]]]:
    """State dicts by kind, with files of ours that their conversion needs."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        adm = torch.load(openai_file(random_adm(), place / "a.pt"))
        wide = {**TINY, "width": 64, "num_head_channels": 64}
        classifier = discriminators.load("classifier", tiny_classifier(place / "trunk.st", **wide), torch.device("cpu"))
        _, discriminator = tiny_discriminator(str(place / "trunk.st"), 0, width=64, num_head_channels=64)
        trunk, model = (place / "trunk.st").read_bytes(), Path(make_checkpoint(place / "m.st")).read_bytes()
    var, vae = var_models.official_files(var_models.build(NARROW_VAE))
    return {
        "dit": (official("sit"), {}), "var": (var, {"vae.pth": saved(vae)}), "vae": (vae, {}),
        "adm": (adm, {}), "classifier": (dict(classifier.network.state_dict()), {}),
        "discriminator": (dict(discriminator.head.state_dict()), {"trunk.safetensors": trunk, "m.safetensors": model}),
    }  # fmt: skip


@functools.cache
def diffusers_folder() -> dict[str, bytes]:
    """A pipeline's folder, by name of file."""
    with tempfile.TemporaryDirectory() as place:
        make_folder(Path(place))
        return _contents(Path(place))


@functools.cache
def text_pipeline(kind: str) -> dict[str, bytes]:
    """A text-to-image pipeline's folder, by name of file."""
    with tempfile.TemporaryDirectory() as place:
        return _contents(make_pipeline(Path(place), kind))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def saved(content: Any, **options: Any) -> bytes:
    """As torch.save writes it."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()
