"""Parsers of data: image sets of every kind, and caches."""

import gzip
import importlib.util
import io
import struct
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import Target
from hypothesis import strategies as st
from mutations import NAMES, Inputs, dumps, files, json_near, near, within
from PIL import Image
from seeds import (
    CPU,
    SET,
    npy,
    npz,
    outer_near,
    picture,
    pixels,
    split_header,
    tensors_file,
    weights_near,
    zip_near,
    zipped,
)
from test_cifar import array, batch, labels_of

from ddo_cli.data import cache, latents
from ddo_cli.data.images import open_images
from ddo_cli.data.inspection import Inspection
from ddo_cli.data.pictures import FORMATS
from ddo_cli.data.stream import open_stream
from ddo_cli.engines.fid import cache as fid_cache
from ddo_cli.engines.fid import feature_cache
from ddo_cli.metrics.accumulators import ChunkedMoments, FeatureStore


def items(place: Path) -> None:
    """Opens the set in `place`, by both readers."""
    source = str(place / SET) if (place / SET).exists() else str(next(place.glob(f"{SET}.*"), place / SET))
    opened = open_images(source)
    opened.items[: min(len(opened.items), 4)]
    if opened.encoded is None and opened.items.ndim == 4:
        for _ in open_stream(source).batches(4):
            pass


def of_npz() -> Inputs:
    labels, one_hot = np.arange(3), np.eye(3, dtype=np.float32)
    whole = (
        npz(arr_0=pixels(), arr_1=labels), npz(zipfile.ZIP_DEFLATED, samples=pixels(), label=one_hot),
        npz(images=np.asfortranarray(pixels()), labels=labels.astype(np.uint8)), npz(samples=np.zeros((3, 2), "f4")),
        npz(images=pixels(channels=1).transpose(0, 3, 1, 2)), npz(images=np.array([{}], dtype=object)),
    )  # fmt: skip
    array, label = near([npy(pixels()), npy(np.zeros((3, 2)))]), near([npy(labels), npy(one_hot)])
    inner = zip_near(images__npy=array, labels__npy=npy(labels)) | zip_near(
        images__npy=npy(pixels()), labels__npy=label
    )
    one = files(set__npz=near(whole) | inner)
    return one | within(SET, files(a__npz=near(whole), b__npz=whole[0], **{"log.txt": b"x"}))


def of_images(form: str) -> Callable[[], Inputs]:
    options: list[tuple[str, dict[str, Any]]] = [("RGB", {})]
    options += {
        "PNG": [("P", {"transparency": 3}), ("L", {"transparency": 3}), ("RGBA", {}), ("1", {}), ("LA", {})],
        "JPEG": [("L", {"progressive": True}), ("CMYK", {})],
        "WEBP": [("RGB", {"lossless": True}), ("RGBA", {})],
        "TIFF": [
            ("L", {"compression": "tiff_lzw"}), ("CMYK", {"compression": "tiff_adobe_deflate"}),
            ("1", {"compression": "group4"}),
        ],
        "GIF": [("P", {"save_all": True, "append_images": [Image.new("P", (8, 8))]}), ("L", {})],
        "BMP": [("L", {}), ("P", {}), ("1", {})],
        "PPM": [("L", {}), ("1", {})],
    }[form]  # fmt: skip

    def inputs() -> Inputs:
        seeds = [picture(form, mode, **option) for mode, option in options]
        plain = picture(form)
        whole = files(**{"a.png": near(seeds), "b.png": plain})
        return within(SET, whole) | within(SET, files(**{"a.png": plain, "b.png": near(seeds)}))

    return inputs


def of_zips() -> Inputs:
    png = picture("PNG")
    labels = {"labels": [["a.png", 0], ["b/c.png", 1]]}
    members = {"a__png": near([png]) | st.just(png), "b/c__png": png, "dataset__json": json_near([labels])}
    written = st.sampled_from([name for name in NAMES if "\udcff" not in name])  # which no zip has
    named = (
        st.lists(written, min_size=1, max_size=3)
        .map("/".join)
        .map(lambda name: zipped({f"{name}.png": png, f"{name}/b.png": png}))
    )
    return files(set__zip=zip_near(**members) | named)


def of_indices() -> Inputs:
    png = picture("PNG")
    index = json_near([{"labels": [["a.png", 0], ["b/c.png", 1]]}, {"labels": None}])
    flat = {"a.png": png, "b/c.png": png}
    return within(SET, files(**flat, dataset__json=index)) | within(f"{SET}/outer", files(**flat, dataset__json=index))


def of_folders() -> Inputs:
    """Files and folders of odd names."""
    png = picture("PNG")
    name = st.sampled_from([name for name in NAMES if len(name.encode(errors="surrogateescape")) < 200])
    place = st.lists(name, min_size=1, max_size=3).map("/".join)
    ends = st.sampled_from(("", ".png", ".PNG", ".gif", ".tif", ".eps", ".npz", ".txt", ".json", ".safetensors"))
    named = st.dictionaries(st.builds(lambda a, b: f"{SET}/{a}{b}", place, ends), st.just(png), min_size=1, max_size=5)
    return named


def of_latents() -> Inputs:
    array = np.zeros((8, 2, 2), np.float32)
    name = f"{latents.EDM2_NAME}00000000"
    index = json_near([{"labels": [[f"{name}.npy", 0]]}])
    one = files(**{f"{name}.npy": near([npy(array)]), f"{latents.EDM2_NAME}00000001.npy": npy(array)})
    labelled = files(**{f"{name}.npy": npy(array), "dataset.json": index})
    return within(SET, one) | within(SET, labelled) | files(set__zip=zip_near(**{f"{name}.npy": near([npy(array)])}))


def of_encoded() -> Inputs:
    with tempfile.TemporaryDirectory() as place:
        file = latents.shard_file(Path(place), 0)
        latents.write_shard(file, torch.zeros(3, 2, 2, 2), torch.arange(3), {"x": 1})
        shard, digest = file.read_bytes(), latents.read_info(file).sha256
    manifest = {
        "format": latents.FORMAT, "encoder": "x", "image_shape": [3, 16, 16], "num_classes": 3, "complete": True,
        "shards": [{"num": 3, "sha256": digest}],
    }  # fmt: skip
    told = files(**{file.name: shard, latents.MANIFEST: json_near([manifest])})
    held = files(**{file.name: weights_near([shard]), latents.MANIFEST: dumps(manifest)})
    return within(SET, told) | within(SET, held)


def of_samples() -> Inputs:
    tensors = {
        "items": torch.from_numpy(pixels().transpose(0, 3, 1, 2).copy()),
        "labels": torch.arange(3),
        "seeds": torch.arange(3),
    }
    head, body = split_header(tensors_file(tensors, kind="x"))
    del head["__metadata__"]
    shard = struct.pack("<Q", len(dumps(head))) + dumps(head) + body
    told = {"num": 3, "seeds": "0-2", "batch": 3, "complete": True, "nfe": 4, "disc_nfe": 0}
    shards, pngs, arrays = ({"format": form, **told} for form in ("shards", "png", "npz"))
    pngs["labels"] = [0, 1, 2]
    images = {f"{seed:06d}.png": picture("PNG") for seed in range(3)}
    each = (
        files(**{"shard-000000.safetensors": shard, "manifest.json": json_near([shards])}),
        files(**{"shard-000000.safetensors": outer_near(shard), "manifest.json": dumps(shards)}),
        files(**images, **{"manifest.json": json_near([pngs])}),
        files(**{"samples.npz": npz(arr_0=pixels()), "manifest.json": json_near([arrays])}),
    )
    return within(SET, st.one_of(*each))


def of_cifar() -> Inputs:
    content = batch(array(np.zeros((3, 3072), np.uint8)), labels_of([0, 1, 2]))
    names = [f"data_batch_{number}" for number in range(1, 6)]

    def tar(compressed: bool) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name in names:
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return gzip.compress(file.getvalue(), 1, mtime=0) if compressed else file.getvalue()

    plain, packed = tar(False), tar(True)
    unpacked = files(**{name: near([content]) if name == names[0] else content for name in names})
    zipped_tar = near([plain]).map(lambda raw: gzip.compress(raw, 1, mtime=0)) | near([packed])
    return files(set__tar=near([plain])) | files(**{"set.tar.gz": zipped_tar}) | within(SET, unpacked)


def of_tars() -> Inputs:
    """Shards of webdataset, alone and in a folder."""

    def tar(form: int, *rows: int) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name, content in [(f"{row}.{kind}", content) for row in rows for kind, content in sample]:
                member = tarfile.TarInfo(name if form != tarfile.PAX_FORMAT else f"{'long' * 30}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return file.getvalue()

    sample = (("png", picture("PNG")), ("txt", b"a red cup"))
    whole = [tar(form, 0, 1) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    shards = files(a__tar=near(whole), b__tar=tar(tarfile.USTAR_FORMAT, 2))
    return files(set__tar=near(whole)) | within(SET, shards)


def of_parquet() -> Inputs:
    import pyarrow
    from pyarrow import parquet

    def table(compression: str, **columns: Any) -> bytes:
        file, images = io.BytesIO(), [{"bytes": picture("PNG"), "path": f"{row}.png"} for row in range(3)]
        parquet.write_table(pyarrow.table({"image": images} | columns), file, row_group_size=2, compression=compression)
        return file.getvalue()

    whole = [table("snappy", text=["a", "b", "c"]), table("zstd", label=[0, 1, 0]), table("none", caption=["a"] * 3)]
    return files(set__parquet=near(whole)) | within(SET, files(a__parquet=near(whole[:1]), b__parquet=whole[0]))


# --- Caches


def of_decoded() -> Inputs:
    image = npy(pixels(4000, 2).transpose(0, 3, 1, 2))[:200]
    rest = bytes(4000 * 12 - 72)
    return files(**{"cache/x.npy": near([image]).map(lambda head: head + rest)})


def decoded(place: Path) -> None:
    """Takes an entry of decoded images, which must be a miss where it is damaged."""
    with mock.patch.dict("os.environ", {"DDO_CACHE": str(place / "cache")}):
        entry = cache._entry("x", "0" * 32)
        assert entry is not None
        (place / "cache" / "x.npy").rename(entry)
        if (found := cache.existing("x", "0" * 32, 4000)) is not None:
            assert found == entry
        items = cache.kept("x", "0" * 32, 4000, lambda: (3, 2, 2), lambda array: array.fill(1))
        assert items is not None
        assert items.shape[0] == 4000


def of_features() -> Inputs:
    moments = {"n": np.array(3), "mean": np.zeros(4), "scatter": np.zeros((4, 4))}
    seeds = [npz(**moments), npz(**_inspection().state()), npz(features=np.zeros((3, 4), "f4"))]
    inner = zip_near(n__npy=near([npy(np.array(3))]), mean__npy=near([npy(np.zeros(4))]), scatter__npy=npy(np.eye(4)))
    return files(**{"x.npz": near(seeds) | inner})


def _inspection() -> Inspection:
    images = Inspection(np.arange(3) % 2, 2)
    images.update(np.arange(3), torch.from_numpy(pixels().transpose(0, 3, 1, 2).copy()))
    return images


def features(place: Path) -> None:
    """Restores what passes accumulate from an entry, which must be a miss where it is damaged."""
    extractor = types.SimpleNamespace(is_fixed=True, device=CPU, protocol=lambda: {"x": 1})
    content = (place / "x.npz").read_bytes()
    with mock.patch.dict("os.environ", {"DDO_CACHE": str(place / "cache")}):
        images = _inspection()
        accumulators: list[Any] = [ChunkedMoments(3, 4, 1), FeatureStore(3, 4)]
        for accumulator in accumulators:
            entry = feature_cache._path(
                fid_cache._key(images, extractor, accumulator.kept, accumulator.kind), "features"
            )  # type: ignore[arg-type]
            assert entry is not None
            entry.parent.mkdir(parents=True, exist_ok=True)
            entry.write_bytes(content)
        source = types.SimpleNamespace(num=3, shape=(3, 4, 4), identity="x", labels=images.labels, num_classes=2)
        entry = feature_cache._path(fid_cache._set_key(source), "sets")  # type: ignore[arg-type]
        assert entry is not None
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_bytes(content)
        fid_cache.restore(images, extractor, accumulators)  # type: ignore[arg-type]
        fid_cache.inspection(source)  # type: ignore[arg-type]


TARGETS = (
    Target("npz", of_npz, items),
    *(Target(form.lower(), of_images(form), items) for form in FORMATS),
    Target("zip", of_zips, items),
    Target("dataset.json", of_indices, items),
    Target("folders", of_folders, items),
    Target("npy", of_latents, items),
    Target("encoded", of_encoded, items),
    Target("samples", of_samples, items),
    Target("cifar", of_cifar, items),
    Target("tar", of_tars, items),
    *([Target("parquet", of_parquet, items)] if importlib.util.find_spec("pyarrow") else []),
    Target("decoded", of_decoded, decoded),
    Target("features", of_features, features),
)
