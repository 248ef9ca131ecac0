"""Small valid files of every kind, made by the program itself or by the libraries that write them."""

import functools
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import FAMILIES
from hypothesis import strategies as st
from mutations import Inputs, files, json_near, near
from PIL import Image

from ddo_cli import checkpoint
from ddo_cli.models import adapters, registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.var import tokenizers
from ddo_cli.recipe.training import AdapterRecipe

CPU = torch.device("cpu")
SET, FILE = "set", "a.safetensors"
EXTRACTOR = "embedded:extractor-digits32"


def pixels(num: int = 3, side: int = 4, channels: int = 3) -> np.ndarray:
    """uint8 (num, side, side, channels)."""
    return np.random.default_rng(0).integers(0, 256, (num, side, side, channels), dtype=np.uint8)


def picture(form: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(side=8)[0]).convert(mode).save(file, form, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            # Without the time of day: equal draws have to give equal bytes, or hypothesis stops.
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def npz(method: int = zipfile.ZIP_STORED, **arrays: np.ndarray) -> bytes:
    return zipped({f"{name}.npy": npy(array) for name, array in arrays.items()}, method)


def zip_near(**members: Inputs | bytes) -> st.SearchStrategy[bytes]:
    """Zips of such members, stored or compressed by one of the methods that Python reads; or damaged as a whole."""
    methods = st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    whole = st.builds(zipped, files(**members), methods)
    return whole | whole.flatmap(lambda content: near([content]))


def tensors_file(tensors: Mapping[str, torch.Tensor], **header: Any) -> bytes:
    """A safetensors file of ours with this header."""
    with tempfile.TemporaryDirectory() as place:
        checkpoint.save(Path(place) / FILE, dict(tensors), header)
        return (Path(place) / FILE).read_bytes()


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def weights_near(seeds: Iterable[bytes]) -> st.SearchStrategy[bytes]:
    """Weight files whose own header is mutated (most of them), or that of safetensors, or any byte."""
    seeds = list(seeds)
    parts = [split_header(seed) for seed in seeds]
    kept = [head for head, _ in parts if "ddo" in head.get("__metadata__", {})]
    bodies = {json.dumps(head, sort_keys=True): body for head, body in parts}

    def with_own(number: int, text: bytes) -> bytes:
        head, body = parts[number]
        shown = text.decode("utf-8", "replace")
        return joined(json.dumps({**head, "__metadata__": {"ddo": shown}}).encode(), body)

    def joined(head: bytes, body: bytes) -> bytes:
        return struct.pack("<Q", len(head)) + head + body

    own = st.integers(0, len(parts) - 1).flatmap(
        lambda number: json_near([json.loads(parts[number][0]["__metadata__"]["ddo"])]).map(
            functools.partial(with_own, number)
        )
    )
    outer = st.sampled_from([head for head, _ in parts]).flatmap(
        lambda head: json_near([head]).map(lambda text: joined(text, bodies[json.dumps(head, sort_keys=True)]))
    )
    ours = (own, own, own) if kept else ()
    return st.one_of(*ours, outer, near(seeds))


@functools.cache
def models() -> dict[str, bytes]:
    """A tiny model of each family, by name, and an adapter."""
    found = {}
    for family, (name, shape, options) in FAMILIES.items():
        model = registry.build(config := registry.config_of(name, shape, 10, options, {}))
        link = {"command": "finetune-ddo", "recipe": {"name": "x", "finetune": {"alpha": 1.0, "lr": 1e-4}}}
        header = {"kind": "model", "config": config, "sampling": {"steps": 3, "sampler": None}, "provenance": [link]}
        found[family] = tensors_file(model.state_dict(), **header)
    name = "embedded:digits16"
    base, file = registry.load_model(name, CPU)
    header = adapters.add(base, file, AdapterRecipe(kind="lora", rank=2), 0, name).header
    found["adapter"] = tensors_file(base.state_dict(), **header)
    return found


@functools.cache
def networks() -> dict[str, bytes]:
    """Discriminators, classifiers, a tokenizer, an extractor: by kind and name."""
    guidance = {"dg_weight": 2.0}
    trained_on = {"model": "embedded:digits32", "model_sha256": "0" * 64, "sampling": None}
    made = {}
    for kind, name, shape, options in (
        ("discriminator", "time-encoder", (3, 32, 32), {"widths": [8], "depths": [1], "emb_width": 16}),
        ("discriminator", "time-mlp", (2,), {"width": 16, "depth": 2}),
        ("classifier", "time-encoder-classifier", (3, 32, 32), {"widths": [8], "depths": [1], "emb_width": 16}),
    ):
        config = discriminators.config_of(kind, name, shape, 10, options)
        network = discriminators.build(kind, config)
        header = {"kind": kind, "config": config, "process": discriminators.PROCESS}
        header |= {"trained_on": trained_on, "guidance": guidance, "heldout": {"bce": 0.5}}
        made[f"{kind} {name}"] = tensors_file(network.state_dict(), **header)
    var = dict(FAMILIES["var"][2]["vqvae"])
    config = tokenizers.config_of("vqvae", (3, 32, 32), var)
    made["tokenizer"] = tensors_file(tokenizers.build(config).state_dict(), kind=tokenizers.KIND, config=config)
    extractor = checkpoint.load(EXTRACTOR)
    made["extractor"] = tensors_file(extractor.tensors, **extractor.header)
    return made


@functools.cache
def states() -> bytes:
    """What training leaves for resuming."""
    return tensors_file(
        {"model.x": torch.zeros(3)}, kind="train-state", step=4, metered_steps=0, owner="x", loss_scale={}
    )


def outer_near(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file without a header of ours, its own mutated."""
    head, body = split_header(content)
    return json_near([head]).map(lambda text: struct.pack("<Q", len(text)) + text + body) | near([content])
