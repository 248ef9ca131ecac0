import io
import json
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from ddo_cli.data import image_files, images
from ddo_cli.data.digits import render_digits
from ddo_cli.data.embedded import EMBEDDED_SETS
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet
from ddo_cli.data.sources import open_source
from ddo_cli.errors import DataError


def some_items(num: int = 6, channels: int = 3, size: int = 5, seed: int = 0) -> np.ndarray:
    """Higher than wide, so that a swapped axis shows."""
    return np.random.default_rng(seed).integers(0, 256, (num, channels, size + 2, size), dtype=np.uint8)


def encoded(item: np.ndarray, form: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(item[0] if len(item) == 1 else item.transpose(1, 2, 0)).save(buffer, form, **options)
    return buffer.getvalue()


def write_folder(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


WRITERS = {
    "folder": lambda root, content: write_folder(root / "set", content),
    "zip": lambda root, content: write_zip(root / "set.zip", content),
}
either = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


def index(labels) -> bytes:
    return json.dumps({"labels": labels}).encode()


def assert_holds(found: ItemSet, items: np.ndarray, labels=None, num_classes: int = 0) -> None:
    assert found.items.dtype == items.dtype
    np.testing.assert_array_equal(found.items, items)
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == (list(labels) if labels is not None else [-1] * len(items))
    assert found.num_classes == num_classes


# ---------------------------------------------------------------------------------------------------------------------
# Folders and zips


@either
@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_in_the_order_of_names(tmp_path, write, channels):
    items = some_items(12, channels)
    names = [f"{name}.png" for name in "lkjihgfedcba"]
    found = open_images(str(write(tmp_path, dict(zip(names, map(encoded, items), strict=True)))))
    assert_holds(found, items[::-1])
    assert found.name.startswith(str(tmp_path / "set"))


@either
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("webp", {"lossless": True}),
        ("bmp", {}),
        ("jpeg", {"quality": 100}),
        ("PNG", {}),
        ("tiff", {}),
        ("ppm", {}),
    ],
)
def test_formats(tmp_path, write, form, options):
    flat = np.full((3, 3, 8, 8), 128, np.uint8)  # which JPEG keeps
    content = {f"{row}.{form}": encoded(item, form, **options) for row, item in enumerate(flat)}
    assert_holds(open_images(str(write(tmp_path, content))), flat)


@either
def test_what_is_no_image_is_passed_over(tmp_path, write):
    item = some_items(1)
    other = dict.fromkeys(("readme.txt", "._a.png", "__MACOSX/a.png", ".hidden/a.png"), b"junk")
    assert_holds(open_images(str(write(tmp_path, {"x/a.png": encoded(item[0]), **other}))), item)


@either
def test_labels_of_dataset_json(tmp_path, write):
    items = some_items(3)
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png"]
    content = dict(zip(names, map(encoded, items), strict=True))
    labels = [[names[2], 1], [names[0], 4], [names[1], 0], ["elsewhere.png", 9]]
    assert_holds(
        open_images(str(write(tmp_path, {**content, "dataset.json": index(labels)}))), items, [4, 0, 1], num_classes=5
    )
    # null says none, although there are subfolders
    assert_holds(open_images(str(write(tmp_path, {**content, "dataset.json": index(None)}))), items)


def test_labels_of_subfolders(tmp_path, capsys):
    items = some_items(4)
    names = ["cat/a.png", "cat/deep/b.png", "dog/a.png", "eel/a.png"]
    root = write_folder(tmp_path / "set", dict(zip(names, map(encoded, items), strict=True)))
    (root / "bee").mkdir()
    assert_holds(open_images(str(root)), items, [0, 0, 1, 2], num_classes=3)
    assert "no classes, and the others are numbered without them: bee" in " ".join(capsys.readouterr().err.split())
    assert_holds(open_images(str(root / "cat")), items[:2])  # not all in subfolders, or in one only
    capsys.readouterr()
    assert open_images(str(root)).num_classes == 3
    assert "3 classes from folder names: 0 cat, 1 dog, 2 eel" in capsys.readouterr().err
    (root / "zebra.png").write_bytes(encoded(items[0]))
    assert open_images(str(root)).num_classes == 0
    assert "no labels, since zebra.png lies beside the folders cat, dog, eel" in capsys.readouterr().err
    # The directories of an archive without dataset.json are no classes, as in EDM.
    zipped = write_zip(tmp_path / "set.zip", dict(zip(names, map(encoded, items), strict=True)))
    assert_holds(open_images(str(zipped)), items)


@pytest.mark.parametrize(
    ("folders", "labels", "said"),
    [
        (["0", "1", "2", "10"], [0, 1, 10, 2], "4 classes from folder names: 0 0, 1 1, 2 2, 10 10"),
        (["1", "2", "10"], [1, 10, 2], "3 classes from folder names: 1 1"),
        (["a", "1", "b"], [0, 1, 2], "0 1, 1 a, 2 b"),
        (["000000", "001000", "002000"], None, "folders 000000, 001000, 002000 are taken for shards, not classes"),
        (["00000", "00001"], None, "folders 00000, 00001 are taken for shards"),
        (["part_0", "Part-1"], None, "folders Part-1, part_0 are taken for shards"),
        (["rank0", "rank1", "rank10"], None, "folders rank0, rank1, rank10 are taken for shards"),
        (["train", "val"], None, "folders train, val are taken for splits, not classes; to use one of them, give"),
        (["train2017", "val2017"], None, "folders train2017, val2017 are taken for splits"),
        (["all/cat", "all/dog"], [0, 1], "set/all/: 2 classes from folder names: 0 cat, 1 dog"),
        (["a/b/00000", "a/b/00001"], None, "folders 00000, 00001 are taken for shards"),
        (["a/train", "a/val"], None, "to use one of them, give"),
    ],
)
def test_what_folder_names_mean(tmp_path, capsys, folders, labels, said):
    items = some_items(len(folders))
    content = {f"{folder}/{row}.png": encoded(items[row]) for row, folder in enumerate(sorted(folders))}
    found = open_images(str(write_folder(tmp_path / "set", content)))
    assert_holds(found, items, labels, max(labels) + 1 if labels else 0)
    assert said in " ".join(capsys.readouterr().err.split())


def test_two_folders_of_one_number(tmp_path):
    content = {f"{folder}/a.png": encoded(some_items(1)[0]) for folder in ("1", "01", "2")}
    with pytest.raises(DataError, match="two folders of class 1"):
        open_images(str(write_folder(tmp_path / "set", content)))


@either
def test_dataset_json_in_an_outer_folder(tmp_path, write, capsys):
    items = some_items(2)
    content = {"outer/00000/a.png": encoded(items[0]), "outer/b.png": encoded(items[1])}
    labels = {"outer/dataset.json": index([["00000/a.png", 3], ["b.png", 1]])}
    assert_holds(open_images(str(write(tmp_path, content | labels))), items, [3, 1], num_classes=4)
    assert "labels are those of outer/dataset.json" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"outer/dataset\.json, whose labels do not cover stray\.png"):
        open_images(str(write(tmp_path, {**content, **labels, "stray.png": encoded(items[0])})))
    (tmp_path / "two").mkdir()
    two = {"a/x.png": encoded(items[0]), "b/x.png": encoded(items[1])}
    two |= {f"{name}/dataset.json": index([["x.png", 0]]) for name in "ab"}
    with pytest.raises(DataError, match=r"holds 2 files dataset\.json"):
        open_images(str(write(tmp_path / "two", two)))


@either
def test_an_image_listed_twice(tmp_path, write):
    content = {"a.png": encoded(some_items(1)[0]), "dataset.json": index([["a.png", 1], ["a.png", 2]])}
    with pytest.raises(DataError, match=r"lists a\.png more than once"):
        open_images(str(write(tmp_path, content)))


@either
def test_what_is_left_out_is_said(tmp_path, write, capsys):
    content = {"a.png": encoded(some_items(1)[0]), "b.tga": b"x", "c.tga": b"x", "d.svg": b"x", "log.txt": b"x"}
    (tmp_path / "two").mkdir()
    assert len(open_images(str(write(tmp_path / "two", content))).items) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "files that are no images are left out: 1 .txt" in said
    assert "warning:" in said
    assert "pictures of other formats are left out: 2 .tga, 1 .svg; convert them to PNG" in said
    content = {"a.png": encoded(some_items(1)[0]), "b/more.zip": b"x", "c.npy": b"x"}
    (tmp_path / "three").mkdir()
    assert open_source(str(write(tmp_path / "three", content)), None, in_memory=False).warnings == (
        f"{write(tmp_path / 'three', content)}: files that may hold images are left out: 1 .npy, 1 .zip; give one of "
        "them",
    )


def test_postscript_is_never_started(tmp_path, monkeypatch):
    """Whatever the name says: Pillow would start Ghostscript for it."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 7\n%%EndComments\n%%EOF\n"
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        open_images(str(write_folder(tmp_path / "set", {"a.png": content})))


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "LA", "RGBA"])
@pytest.mark.parametrize("is_clear", [True, False])
def test_transparency_in_every_form(tmp_path, mode, is_clear):
    """A transparent palette entry or colour is seen like an alpha channel."""
    image = Image.new("RGB", (4, 4), (0, 0, 0))
    image.putpixel((1, 1), (255, 255, 255))
    image = image.convert(mode)
    options = {}
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.new("L", (4, 4), 0 if is_clear else 255))
    elif is_clear:
        options = {"transparency": {"P": image.getpixel((0, 0)), "L": 0, "RGB": (0, 0, 0)}[mode]}
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set" / "a.png", **options)
    if is_clear:
        with pytest.raises(DataError, match="transparent pixels"):
            open_images(str(tmp_path / "set"))
    else:
        found = open_images(str(tmp_path / "set")).items
        assert found.shape[1] == (1 if mode in ("L", "LA") else 3)
        assert found[0, :, 1, 1].tolist() == [255] * found.shape[1]


@either
def test_what_of_a_file_is_not_read_is_said_once(tmp_path, write, capsys):
    frames = [Image.fromarray(item.transpose(1, 2, 0)) for item in some_items(2, size=8)]
    gif, jpeg, exif = io.BytesIO(), io.BytesIO(), Image.Exif()
    frames[0].save(gif, "gif", save_all=True, append_images=frames[1:])
    exif[0x0112] = 6
    frames[0].save(jpeg, "jpeg", exif=exif)
    content = {"a.gif": gif.getvalue(), "b.gif": gif.getvalue(), "c.jpg": jpeg.getvalue()}
    assert open_images(str(write(tmp_path, content))).items.shape == (3, 3, 10, 8)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("of animated files, such as a.gif, the first frame is read") == 1
    assert said.count("EXIF orientation, as of c.jpg, is not applied") == 1


def test_links_are_followed_once(tmp_path):
    items = some_items(2)
    root = write_folder(tmp_path / "real", {"a.png": encoded(items[0]), "b.png": encoded(items[1])})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x").symlink_to(root)
    (root / "loop").symlink_to(root)
    assert_holds(open_images(str(tmp_path / "set")), items)


def test_a_link_inside_a_set_is_no_class(tmp_path, capsys):
    """Whichever of the two the file system lists first."""
    items = some_items(3)
    names = ["cat/a.png", "dog/a.png", "eel/a.png"]
    root = write_folder(tmp_path / "set", dict(zip(names, map(encoded, items), strict=True)))
    for alias, target in {"ant": "eel", "zoo": "cat", "up": "."}.items():
        (root / alias).symlink_to(root / target)
    assert_holds(open_images(str(root)), items, [0, 1, 2], num_classes=3)
    assert "links to folders that are read anyway are not followed: ant, up, zoo" in capsys.readouterr().err


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(1, 9), ask=st.integers(1, 9), labelled=st.booleans())
def test_num_takes_the_same_rows_of_every_source(tmp_path_factory, seed, num, ask, labelled):
    root = tmp_path_factory.mktemp("num")
    items, labels = some_items(num, seed=seed % 100), np.random.default_rng(seed).integers(0, 4, num)
    content = {f"{row}.png": encoded(item) for row, item in enumerate(items)}
    entries = [[f"{row}.png", int(label)] for row, label in enumerate(labels)] if labelled else None
    sources = [write(root, {**content, "dataset.json": index(entries)}) for write in WRITERS.values()]
    np.savez(root / "set.npz", images=items, **({"labels": labels} if labelled else {}))
    for source in [*sources, root / "set.npz"]:
        if ask > num:
            with pytest.raises(DataError, match=f"holds {num} items, fewer than the {ask}"):
                open_images(str(source), ask)
            continue
        rows = np.arange(num)
        if ask < num:  # EDM's choice
            np.random.RandomState(0).shuffle(rows)
            rows = np.sort(rows[:ask])
        classes = int(labels.max()) + 1 if labelled else 0
        assert_holds(open_images(str(source), ask), items[rows], labels[rows] if labelled else None, classes)


def test_many_files_are_read_by_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MANY", 10)
    monkeypatch.setattr(images, "CHUNK", 7)
    decode, used = image_files.ImageFiles.item, set()
    monkeypatch.setattr(image_files.ImageFiles, "item", lambda *args: used.add(threading.get_ident()) or decode(*args))
    items = some_items(40)
    content = {f"{row:02d}.png": encoded(item) for row, item in enumerate(items)}
    for write in WRITERS.values():
        assert_holds(open_images(str(write(tmp_path, content))), items)
    assert used - {threading.get_ident()}
    for name in ("33.png", "21.png"):
        content[name] = b"junk"
    with pytest.raises(DataError, match=r"set: 21\.png cannot be read"):
        open_images(str(write_folder(tmp_path / "set", content)))


@either
def test_more_images_than_there_are(tmp_path, write):
    content = {f"{row}.png": encoded(item) for row, item in enumerate(some_items(3))}
    with pytest.raises(DataError, match=r"set(\.zip)? holds 3 items, fewer than the 4 asked for; lower num"):
        open_images(str(write(tmp_path, content)), 4)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with folders and zips


@either
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b"", "b.png cannot be read as an image"),
        (b"junk", "b.png cannot be read as an image"),
        (encoded(some_items(1, size=40)[0])[:-500], "b.png cannot be read as an image"),
        (encoded(some_items(1, size=6)[0]), r"b\.png is 6x8 RGB where the first image, a\.png, is 5x7 RGB"),
        (encoded(some_items(1, channels=1)[0]), r"b\.png is 5x7 grey where the first image, a\.png, is 5x7 RGB"),
    ],
    ids=["empty", "junk", "truncated", "size", "mode"],
)
def test_the_offending_file_is_named(tmp_path, write, wrong, match):
    good = encoded(some_items(1)[0])
    with pytest.raises(DataError, match=match):
        open_images(str(write(tmp_path, {"a.png": good, "b.png": wrong, "c.png": good})))


def save_mode(path: Path, mode: str, image: Image.Image | None = None) -> Path:
    path.mkdir()
    (image or Image.new("RGB", (4, 4), (255, 255, 255))).convert(mode).save(
        path / f"a.{'jpg' if mode == 'CMYK' else 'png'}"
    )
    return path


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("P", 3), ("CMYK", 3), ("RGBA", 3)])
def test_modes_that_convert(tmp_path, mode, channels):
    found = open_images(str(save_mode(tmp_path / "set", mode)))
    np.testing.assert_array_equal(found.items, np.full((1, channels, 4, 4), 255, np.uint8))


def test_modes_that_would_lose_something(tmp_path):
    with pytest.raises(DataError, match="16 bits"):
        open_images(str(save_mode(tmp_path / "deep", "I;16", Image.new("I", (4, 4), 60000))))
    with pytest.raises(DataError, match="transparent"):
        open_images(str(save_mode(tmp_path / "clear", "RGBA", Image.new("RGBA", (4, 4), (1, 2, 3, 4)))))


@either
def test_no_images(tmp_path, write):
    with pytest.raises(DataError, match="holds no images"):
        open_images(str(write(tmp_path, {"readme.txt": b"hello"})))


@either
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "malformed"),
        (b"\xff\xfe\x00", "malformed"),
        (b"[]", "malformed"),
        (b'{"label": []}', "malformed"),
        (index(3), "malformed"),
        (index([["a.png"]]), "malformed"),
        (index([[["a.png"], 1]]), "malformed"),
        (index([]), "no label for a.png"),
        (index([["b.png", 1]]), "no label for a.png"),
        (index([["a.png", "cat"]]), "'cat', not a class number"),
        (index([["a.png", [0.5, 1.0]]]), "not a class number"),
        (index([["a.png", True]]), "not a class number"),
        (index([["a.png", -1]]), "not a class number"),
        (index([["a.png", 2**40]]), "not a class number"),
    ],
)
def test_wrong_dataset_json(tmp_path, write, content, match):
    with pytest.raises(DataError, match=r"dataset\.json.*" + match):
        open_images(str(write(tmp_path, {"a.png": encoded(some_items(1)[0]), "dataset.json": content})))


def test_damaged_zip(tmp_path):
    path = tmp_path / "set.zip"
    path.write_bytes(b"junk")
    with pytest.raises(DataError, match="not a whole zip"):
        open_images(str(path))
    whole = write_zip(path, {"a.png": encoded(some_items(1)[0]), "b.png": encoded(some_items(1)[0])}).read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="not a whole zip"):
        open_images(str(path))
    path.write_bytes(whole.replace(b"IHDR", b"IHDX", 1))  # a checksum that does not fit
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        open_images(str(path))


def test_sources_that_are_none(tmp_path):
    with pytest.raises(DataError, match="missing does not exist"):
        open_images(str(tmp_path / "missing"))
    (tmp_path / "a.png").write_bytes(encoded(some_items(1)[0]))
    with pytest.raises(DataError, match="neither a folder nor"):
        open_images(str(tmp_path / "a.png"))
    with pytest.raises(DataError, match="num = 0"):
        open_images("embedded:toy2d", 0)


def test_unreadable_files_are_named(tmp_path):
    root = write_folder(tmp_path / "set", {"a.png": encoded(some_items(1)[0])})
    (root / "b.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        open_images(str(root))
    assert os.path.islink(root / "b.png")


# ---------------------------------------------------------------------------------------------------------------------
# Sample sets


def write_samples(root: Path, form: str, items: np.ndarray, labels: np.ndarray, extra: dict | None = None) -> Path:
    """As data.samples lays a set out; seeds 999998 and on, whose file names sort in another order."""
    root.mkdir()
    seeds = np.arange(999_998, 999_998 + len(items))
    spelt = f"{seeds[0]}-{seeds[-1]}"
    manifest = {"format": form, "num": len(items), "seeds": spelt, "batch": 4, "complete": True, **(extra or {})}
    if form == "png":
        write_folder(root, {f"{seed:06d}.png": encoded(item) for seed, item in zip(seeds, items, strict=True)})
        manifest.setdefault("labels", labels.tolist())
    elif form == "npz":
        channels_last = items.transpose(0, 2, 3, 1) if items.ndim == 4 else items
        np.savez(root / "samples.npz", arr_0=channels_last, labels=labels, seeds=seeds)
    else:
        for number, start in enumerate(range(0, len(items), 4)):
            part = {
                name: torch.from_numpy(array[start : start + 4].copy())
                for name, array in (("items", items), ("labels", labels), ("seeds", seeds))
            }
            save_file(part, root / f"shard-{number:06d}.safetensors")
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.mark.parametrize("form", ["shards", "png", "npz"])
def test_sample_sets(tmp_path, form):
    items, labels = some_items(6), np.arange(6) % 3
    assert_holds(open_images(str(write_samples(tmp_path / "a", form, items, labels))), items, labels, 3)
    none = np.full(6, -1)
    assert_holds(open_images(str(write_samples(tmp_path / "b", form, items, none))), items)
    with pytest.raises(DataError, match="unfinished"):
        open_images(str(write_samples(tmp_path / "c", form, items, labels, {"complete": False})))


def test_sample_set_of_points(tmp_path):
    points = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    for form in ("shards", "npz"):
        assert_holds(open_images(str(write_samples(tmp_path / form, form, points, np.full(6, -1)))), points)


def test_damaged_sample_sets(tmp_path):
    items, labels = some_items(6), np.arange(6) % 3
    shards = write_samples(tmp_path / "shards", "shards", items, labels)
    (shards / "shard-000001.safetensors").unlink()
    with pytest.raises(DataError, match="has no shard-000001"):
        open_images(str(shards))
    (shards / "shard-000001.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="damaged"):
        open_images(str(shards))
    for number, wrong in enumerate([[0], "x", [0.5, "a"] * 3, None]):
        png = write_samples(tmp_path / f"png{number}", "png", items, labels, {"labels": wrong})
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            open_images(str(png))
    png = write_samples(tmp_path / "missing", "png", items, labels)
    (png / "999999.png").unlink()
    with pytest.raises(DataError, match=r"999999\.png cannot be read"):
        open_images(str(png))


def test_a_manifest_of_another_program_means_nothing(tmp_path):
    items = some_items(1)
    for number, content in enumerate([b"junk", b"[]", b'{"format": "zarr"}', b'{"format": []}']):
        root = write_folder(tmp_path / str(number), {"a.png": encoded(items[0]), "manifest.json": content})
        assert_holds(open_images(str(root)), items)


# ---------------------------------------------------------------------------------------------------------------------
# Embedded sets


def raw_digits() -> tuple[np.ndarray, np.ndarray]:
    with np.load(Path(image_files.__file__).parent.parent / "assets" / "digits.npz") as content:
        return content["levels"], content["labels"]


def test_embedded_digits32():
    levels, classes = raw_digits()
    for name, seed in (("digits32", 0), ("digits32-b", 1)):
        images, rows = render_digits(levels, 50, seed)
        assert_holds(open_images(f"embedded:{name}", 50), images, classes[rows], 10)
    default = open_images("embedded:digits32")
    assert default.items.shape == (16384, 3, 32, 32)
    assert default.items.dtype == np.uint8


def test_embedded_digits16():
    """Means of 2 x 2 pixels of the larger renderings."""
    for name in ("digits16", "digits16-b"):
        small, large = open_images(f"embedded:{name}", 50), open_images(f"embedded:{name.replace('16', '32')}", 50)
        assert small.items.shape == (50, 3, 16, 16)
        means = large.items.astype(np.float64).reshape(50, 3, 16, 2, 16, 2).mean((3, 5))
        np.testing.assert_array_equal(small.items, np.floor(means + 0.5))
        np.testing.assert_array_equal(small.labels, large.labels)


def test_embedded_digits8():
    levels, classes = raw_digits()
    found = open_images("embedded:digits8")
    assert_holds(found, np.floor(levels[:, None] * 255.0 / 16 + 0.5).astype(np.uint8), classes, 10)
    np.testing.assert_array_equal(np.rint(found.items / 255 * 16)[:, 0], levels)  # levels come back
    part = open_images("embedded:digits8", 100)
    assert len(part.items) == 100
    assert set(part.labels.tolist()) == set(range(10))
    with pytest.raises(DataError, match="holds 1797 items"):
        open_images("embedded:digits8", 2000)


def test_embedded_toy2d():
    found, other = open_images("embedded:toy2d"), open_images("embedded:toy2d-b")
    assert (found.items.shape, found.items.dtype) == ((16384, 2), np.float32)
    assert (found.num_classes, set(found.labels.tolist())) == (0, {-1})
    assert np.abs(found.items.mean(0)).max() < 0.03  # mean 0 and deviation 0.5: six standard errors
    assert (found.items != other.items).all()
    np.testing.assert_array_equal(open_images("embedded:toy2d").items, found.items)


def test_embedded_sets_are_listed():
    assert {"digits16", "digits16-b", "digits32", "digits32-b", "digits8", "toy2d"} <= set(EMBEDDED_SETS)
    for name in EMBEDDED_SETS:
        assert len(open_images(f"embedded:{name}", 5).items) == 5
    with pytest.raises(DataError, match=r"embedded:cifar does not come.*embedded:digits32"):
        open_images("embedded:cifar")
