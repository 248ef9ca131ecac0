"""Parsers of weight files: ours, statistics, and those of other programs."""

import functools
import io
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import foreign_files
import numpy as np
import torch
from families import FAMILIES
from harness import Target
from hypothesis import strategies as st
from mutations import NAMES, ODD, Inputs, files, json_near, near
from seeds import (
    CPU,
    EXTRACTOR,
    FILE,
    SET,
    models,
    networks,
    npy,
    npz,
    outer_near,
    pixels,
    states,
    tensors_file,
    weights_near,
    zip_near,
)
from tiny_pipeline import KINDS

from ddo_cli import checkpoint
from ddo_cli.engines.sampling import guides
from ddo_cli.engines.sampling.sample import spec_of
from ddo_cli.engines.weights import convert
from ddo_cli.metrics import references
from ddo_cli.metrics.extractors import weights as published
from ddo_cli.metrics.extractors.select import load_extractor
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.var import tokenizers, vqvae
from ddo_cli.training.state import read_state


def model(place: Path) -> None:
    """Loads a model, and its defaults of sampling."""
    loaded = registry.load_model(place / FILE, CPU)
    spec = spec_of(loaded.checkpoint)
    loaded.model.check_sampling(spec)


def network(place: Path) -> None:
    """Loads a file as what its header says that it is."""
    file = place / FILE
    kind = checkpoint.read_header(file)["kind"]
    if kind in ("discriminator", "classifier"):
        loaded = discriminators.load(kind, file, CPU)
        if kind == "discriminator":
            shape = tuple(loaded.checkpoint.header["config"]["shape"])
            with mock.patch.object(registry, "load_model", return_value=_guided(len(shape))):
                guides.choose(str(file), "x", {}, device=CPU, force=True)
    elif kind == tokenizers.KIND:
        _, shape, options = FAMILIES["var"]
        vqvae.load_into(vqvae.Vqvae(shape, vqvae.VqvaeOptions.model_validate(options["vqvae"])), file)
    else:
        load_extractor(str(file))


@functools.cache
def _guided(dimensions: int) -> registry.Loaded:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / FILE
        file.write_bytes(models()["mlp" if dimensions == 1 else "patch-unet"])
        return _load(file, CPU)


_load = registry.load_model  # not the one that `network` patches


def state(place: Path) -> None:
    read_state(place / FILE, "x")


def of_published() -> Inputs:
    content = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    file = io.BytesIO()
    torch.save(content, file)
    old = io.BytesIO()
    torch.save(content, old, _use_new_zipfile_serialization=False)
    tensors = tensors_file(content, kind="x")
    return files(**{"a.pth": near([file.getvalue(), old.getvalue()])}) | files(**{FILE: outer_near(tensors)})


def read_published(place: Path) -> None:
    """Tensors of a feature network."""
    path = next(place.iterdir())
    published.read_tensors(published.WeightFile(path, "", False, str(path)), "give another file")


# --- References


def of_references() -> Inputs:
    moments = {"mu": np.zeros(4), "sigma": np.eye(4)}
    adm = {**moments, "mu_s": np.zeros(4), "sigma_s": np.eye(4), "arr_0": pixels()}
    arrays = npz(**moments, num_images=np.array(9), extractor=np.array("x")), npz(zipfile.ZIP_DEFLATED, **adm)
    edm2 = pickle.dumps({"num_images": 9, "fid": moments, "fd_dinov2": moments})
    tensors = {
        "pool.mean": torch.zeros(64).double(),
        "pool.cov": torch.eye(64).double(),
        "pool.features": torch.zeros(9, 64),
    }
    own = tensors_file(
        tensors, kind=references.KIND, metric="fd_embedded", protocol=_extractor().protocol(), data={"num_images": 9}
    )
    inner = zip_near(
        mu__npy=near([npy(np.zeros(4))]), sigma__npy=near([npy(np.eye(4))]), num_images__npy=near([npy(np.array(9))])
    )
    return st.one_of(
        files(**{"ref.npz": near(arrays) | inner}), files(**{"ref.pkl": near([edm2])}),
        files(**{"ref.safetensors": weights_near([own])}),
    )  # fmt: skip


@functools.cache
def _extractor() -> Any:
    return load_extractor(EXTRACTOR)


def reference(place: Path) -> None:
    """Reads statistics, and checks that they fit an extractor."""
    path = next(place.iterdir())
    if references.is_reference(path):
        file = references.read_reference(path)
        if file.images is not None:
            for _ in file.images.batches(2):
                pass
        file.statistics(_extractor())
        file.features(_extractor())


# --- Files of other programs


def of_pickles() -> Inputs:
    return st.one_of(*(files(**{name: near([content])}) for name, content in foreign_files.seeds().items()))


def converted(place: Path) -> None:
    """What `ddo convert` makes of a file, without writing it."""
    convert.run(next(place.iterdir()), place / "out.safetensors", dry_run=True)


def converted_with(*settings: str) -> Callable[[Path], None]:
    """Likewise of a state dict, with what the file does not tell."""

    def read(place: Path) -> None:
        options: dict[str, Any] = {"vae": place / "vae.pth"} if (place / "vae.pth").exists() else {}
        if (place / "trunk.safetensors").exists():
            options = {"trunk": str(place / "trunk.safetensors"), "model": str(place / "m.safetensors")}
        convert.run(place / "a.pth", place / "out.safetensors", settings=settings, dry_run=True, **options)

    return read


def of_networks(kind: str) -> Callable[[], Inputs]:
    """Pickles near those of this kind of network."""
    return lambda: files(**{"a.pkl": near(foreign_files.pickled_networks(kind), 2)})


TYPES = (torch.float16, torch.bfloat16, torch.int64, torch.complex64, torch.bool)


def of_states(kind: str) -> Inputs:
    """State dicts of this kind with other names, shapes, types and values, in both formats of torch.save."""

    @st.composite
    def changed(draw: Any) -> bytes:
        content: dict[Any, Any] = dict(foreign_files.state_dicts()[kind][0])
        for _ in range(draw(st.integers(0, 3))):
            name = draw(st.sampled_from(sorted(content, key=str))) if content else "x"
            tensor = content.get(name)
            can_be_copied = isinstance(tensor, torch.Tensor) and tensor.numel() <= 1 << 24
            match draw(st.integers(0, 7)):
                case 0:
                    content.pop(name, None)
                case 1:
                    content[draw(st.sampled_from((*NAMES, name.replace("0", "9"), f"module.{name}")))] = tensor
                case 2:
                    content[name] = draw(st.sampled_from(ODD))
                case 3:
                    shape = draw(st.lists(st.sampled_from((0, 1, 2, 3, 64, 65, 2**20)), max_size=3))
                    content[name] = torch.zeros(()).expand(shape)  # one number, of whatever shape
                case 4 if can_be_copied:
                    content[name] = torch.cat([tensor] * draw(st.integers(2, 3))) if tensor.ndim else tensor[None]
                case 5 if isinstance(tensor, torch.Tensor):
                    content[name] = tensor[: draw(st.integers(0, 2))] if tensor.ndim else tensor
                case 6 if can_be_copied:
                    content[name] = tensor.to(draw(st.sampled_from(TYPES)))
                case 7 if can_be_copied and tensor.is_floating_point():
                    content[name] = torch.full_like(tensor, draw(st.sampled_from((float("nan"), float("inf"), 0.0))))
        if draw(st.integers(0, 9)) == 9:
            content = {draw(st.sampled_from(("ema", "model", "state_dict", "x"))): content}
        return foreign_files.saved(content, _use_new_zipfile_serialization=draw(st.integers(0, 2)) < 2)

    whole = changed()
    others = foreign_files.state_dicts()[kind][1]
    return files(**{**others, "a.pth": whole | whole.flatmap(lambda content: near([content]))})


def of_diffusers() -> Inputs:
    return of_folder(foreign_files.diffusers_folder())


def of_pipelines() -> Inputs:
    """What `convert` reads of them: not tokenizers and text encoders."""
    return st.one_of(*(of_folder(foreign_files.text_pipeline(kind), ("tok", "text")) for kind in KINDS))


def of_folder(folder: dict[str, bytes], unread: tuple[str, ...] = ()) -> Inputs:
    """Folders near one. unread: beginnings of names that are left alone."""
    configs = {
        name: json.loads(content)
        for name, content in folder.items()
        if name.endswith(".json") and not name.startswith(unread)
    }
    each = []
    for name, config in configs.items():
        each += [files(**{**folder, name: json_near([config])})] * 2
    weights = next(name for name in folder if name.startswith(("unet/diff", "transformer/diff")))
    return st.one_of(*each, files(**{**folder, weights: outer_near(folder[weights])})).map(
        lambda contents: {f"{SET}/{name}": content for name, content in contents.items()}
    )


def of_ours(seeds: Callable[[], Iterable[bytes]]) -> Callable[[], Inputs]:
    """Weight files near these."""
    return lambda: files(**{FILE: weights_near(seeds())})


TARGETS = (
    Target("models", of_ours(lambda: models().values()), model),
    Target("networks", of_ours(lambda: networks().values()), network),
    Target("state", of_ours(lambda: [states()]), state),
    Target("published", of_published, read_published),
    Target("references", of_references, reference),
    Target("pickles", of_pickles, converted),
    *(
        Target(name, of_networks(kind), converted)
        for name, kind in (("edm", "SongUNet"), ("edm-adm", "DhariwalUNet"), ("edm2", "edm2"))
    ),
    *(
        Target(kind, functools.partial(of_states, kind), converted_with(*settings))
        for kind, settings in {
            "adm": ("qkv=legacy", "schedule=linear", "size=8", "head_channels=64"),
            "classifier": (),
            "discriminator": (),
            "dit": ("arch=sit", "heads=4"),
            "var": ("patch_nums=1,2",),
            "vae": ("patch_nums=1,2",),
        }.items()
    ),
    Target("diffusers", of_diffusers, converted),
    Target("pipelines", of_pipelines, converted),
)
