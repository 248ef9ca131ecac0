import io
import json
import multiprocessing
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from ddo_cli import console
from ddo_cli.data import cache, images
from ddo_cli.data.image_files import ImageFiles
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, digest
from ddo_cli.data.pairs import Shuffled
from ddo_cli.errors import DataError
from ddo_cli.metrics.scorer import share_of_batches
from ddo_cli.recipe.load import load, to_yaml

NUM = 12


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch) -> Path:
    """A cache of its own for sets of ten images and more."""
    monkeypatch.setattr(images, "MANY", 10)
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    cache._warn_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def decodes(monkeypatch) -> list[str]:
    """Names of the files that are decoded."""
    names: list[str] = []
    decode = ImageFiles.item
    monkeypatch.setattr(ImageFiles, "item", lambda self, row: names.append(self.names[row]) or decode(self, row))
    return names


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Lines on the console."""
    lines: list[str] = []
    monkeypatch.setattr(console, "info", lines.append)
    monkeypatch.setattr(console, "warn", lambda line: lines.append(f"warning: {line}"))
    return lines


def some_items(seed: int = 0, num: int = NUM, size: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 3, size + 2, size), dtype=np.uint8)


def contents(items: np.ndarray, labels: list[int] | None = None) -> dict[str, bytes]:
    found = {}
    for row, item in enumerate(items):
        buffer = io.BytesIO()
        Image.fromarray(item.transpose(1, 2, 0)).save(buffer, "bmp")  # of one size whatever the pixels
        found[f"{row:02d}.bmp"] = buffer.getvalue()
    if labels is not None:
        found["dataset.json"] = json.dumps({"labels": [[f"{row:02d}.bmp", k] for row, k in enumerate(labels)]}).encode()
    return found


def write_folder(root: Path, content: dict[str, bytes]) -> Path:
    (root / "set").mkdir(exist_ok=True)
    for name, data in content.items():
        (root / "set" / name).write_bytes(data)
    return root / "set"


def write_zip(root: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return root / "set.zip"


def write_samples(root: Path, content: dict[str, bytes]) -> Path:
    """A sample set of `ddo sample --format png`."""
    path = write_folder(root, {f"{row:06d}.png": data for row, data in enumerate(content.values())})
    manifest = {"format": "png", "num": NUM, "seeds": f"0-{NUM - 1}", "complete": True, "labels": [-1] * NUM}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


each = pytest.mark.parametrize("write", [write_folder, write_zip, write_samples])
either = pytest.mark.parametrize("write", [write_folder, write_zip])


def is_mapped(found: ItemSet) -> bool:
    return isinstance(found.items.base, np.memmap)


def entries(kept: Path) -> list[Path]:
    return sorted(kept.glob("*.npy"))


@each
def test_a_set_is_decoded_once(tmp_path, write, kept, decodes, said):
    items = some_items()
    path = write(tmp_path, contents(items))
    first = open_images(str(path))
    assert len(decodes) > NUM
    decodes.clear()
    second = open_images(str(path))
    assert decodes == []
    for found in (first, second):
        np.testing.assert_array_equal(found.items, items)
        assert is_mapped(found)
        assert (found.items.dtype, found.items.flags.writeable) == (np.uint8, False)
    (entry,) = entries(kept)
    assert entry.name.startswith("set")
    assert [str(entry) in line for line in said] == [True, True]
    assert "kept in" in said[0]
    assert "taken from" in said[1]
    assert not list(kept.glob("*.part"))


@either
def test_labels_are_read_anew(tmp_path, write, decodes):
    """Even where only dataset.json has changed: they are no part of what is kept."""
    items = some_items()
    labels = [[row % 3 for row in range(NUM)], [row % 4 for row in range(NUM)], None]
    for expected in labels:
        found = open_images(
            str(
                write(tmp_path, contents(items, expected) | ({} if expected else {"dataset.json": b'{"labels": null}'}))
            )
        )
        assert found.labels.tolist() == (expected or [-1] * NUM)
        np.testing.assert_array_equal(found.items, items)


@each
@pytest.mark.parametrize("change", ["content", "time", "size"])
def test_a_changed_source_is_decoded_anew(tmp_path, write, kept, decodes, change):
    path = write(tmp_path, contents(some_items()))
    os.utime(path, ns=(0, 10**18))
    open_images(str(path))
    decodes.clear()
    other = some_items(seed=1) if change != "size" else some_items(seed=1, size=9)
    if change != "time":
        path = write(tmp_path, contents(other))
    file = path if path.is_file() else sorted(path.glob("*[0-9].[bp][mn][pg]"))[-1]
    if change != "size":  # same length, another time
        os.utime(file, ns=(0, 10**18 + 1))
    found = open_images(str(path))
    assert decodes
    np.testing.assert_array_equal(found.items, some_items() if change == "time" else other)
    assert len(entries(kept)) == 2


def test_another_choice_or_place_is_another_entry(tmp_path, kept, decodes, monkeypatch):
    path = write_folder(tmp_path, contents(some_items(num=NUM + 3)))
    whole = open_images(str(path))
    part = open_images(str(path), NUM)
    assert (len(whole.items), len(part.items)) == (NUM + 3, NUM)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy, copy_function=shutil.copy2)
    open_images(str(copy))
    assert len(entries(kept)) == 3
    decodes.clear()
    monkeypatch.chdir(tmp_path)  # a relative name of the same place
    np.testing.assert_array_equal(open_images("set").items, whole.items)
    np.testing.assert_array_equal(open_images("set", NUM).items, part.items)
    assert decodes == []
    for file in path.iterdir():  # as out of an archive
        os.utime(file, ns=(0, 10**18))
    open_images("set")
    (path / "00.bmp").rename(path / "zz.bmp")  # same sizes and times in another order
    found = open_images("set")
    np.testing.assert_array_equal(found.items, np.roll(whole.items, -1, axis=0))


def test_few_images_are_not_kept(tmp_path, kept):
    found = open_images(str(write_folder(tmp_path, contents(some_items(num=9)))))
    assert not is_mapped(found)
    assert not kept.exists()


@pytest.mark.parametrize("value", ["off", "", None])
def test_the_cache_can_be_turned_off(tmp_path, kept, monkeypatch, said, value):
    path = write_folder(tmp_path, contents(some_items()))
    if value is not None:
        monkeypatch.setenv("DDO_CACHE", value)
    found = open_images(str(path), cache=value is not None)
    np.testing.assert_array_equal(found.items, some_items())
    assert not is_mapped(found)
    assert not kept.exists()
    assert said == []


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "cache"
    monkeypatch.delenv("DDO_CACHE")
    assert cache.directory() == tmp_path / "xdg" / "ddo"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.directory() == tmp_path / "home" / ".cache" / "ddo"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"junk"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: np.save(path, np.zeros((NUM - 1, 3, 7, 5), np.uint8)),
        lambda path: np.save(path, np.zeros((NUM, 3, 7, 5), np.float32)),
        lambda path: np.save(path, np.array([{}] * NUM, dtype=object)),
    ],
)
def test_a_damaged_entry_is_replaced(tmp_path, kept, decodes, damage):
    path = write_folder(tmp_path, contents(some_items()))
    open_images(str(path))
    damage(entries(kept)[0])
    for expected in (True, False):
        decodes.clear()
        np.testing.assert_array_equal(open_images(str(path)).items, some_items())
        assert bool(decodes) == expected


def test_an_image_that_does_not_fit_leaves_nothing(tmp_path, kept):
    content = contents(some_items())
    content["07.bmp"] = b"junk"
    path = write_folder(tmp_path, content)
    for _ in range(2):
        with pytest.raises(DataError, match=r"set: 07\.bmp cannot be read as an image"):
            open_images(str(path))
    (path / "07.bmp").unlink()
    (path / "07.bmp").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"set: 07\.bmp cannot be read as an image"):
        open_images(str(path))
    assert [entry for entry in kept.iterdir() if not entry.name.endswith(".lock")] == []


def test_a_full_disk_is_said_once(tmp_path, kept, monkeypatch, said):
    path = write_folder(tmp_path, contents(some_items()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage._replace(free=cache.MARGIN + NUM * 105 - 1))
    for _ in range(2):
        found = open_images(str(path))
        np.testing.assert_array_equal(found.items, some_items())
        assert not is_mapped(found)
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    assert f"cannot be kept in {kept}" in said[0]
    assert "DDO_CACHE" in said[0]
    assert not entries(kept)
    monkeypatch.setattr(shutil, "disk_usage", lambda where: usage._replace(free=cache.MARGIN + NUM * 105))
    assert is_mapped(open_images(str(path)))


def no_space(*args) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_meanwhile(tmp_path, kept, monkeypatch, said):
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    path = write_folder(tmp_path, contents(some_items()))
    np.testing.assert_array_equal(open_images(str(path)).items, some_items())
    assert [line for line in said if "No space left" in line]
    assert [entry for entry in kept.iterdir() if not entry.name.endswith(".lock")] == []


def test_a_directory_that_cannot_be(tmp_path, monkeypatch, said):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "file" / "cache"))
    found = open_images(str(write_folder(tmp_path, contents(some_items()))))
    np.testing.assert_array_equal(found.items, some_items())
    assert [line[:8] for line in said] == ["warning:"]


def test_what_a_killed_process_left_is_removed(tmp_path, kept):
    path = write_folder(tmp_path, contents(some_items()))
    open_images(str(path))
    (entry,) = entries(kept)
    entry.unlink()
    left, other = kept / f".{entry.name}.elsewhere-1.part", kept / ".other.npy.elsewhere-1.part"
    for part in (left, other):
        part.write_bytes(b"half")
    open_images(str(path))
    assert not left.exists()
    assert other.exists()


def opened(path: Path, found) -> None:
    items = open_images(str(path))
    found.put((digest(items), is_mapped(items)))


def test_processes_that_race_share_an_entry(tmp_path, kept):
    path = write_zip(tmp_path, contents(some_items()))
    context = multiprocessing.get_context("fork")  # which has everything imported
    found = context.Queue()
    processes = [context.Process(target=opened, args=(path, found)) for _ in range(3)]
    for process in processes:
        process.start()
    expected = digest(ItemSet(some_items(), np.full(NUM, -1), "x", 0))
    assert [found.get(timeout=60) for _ in processes] == [(expected, True)] * 3
    for process in processes:
        process.join()
    assert len(entries(kept)) == 1


def test_the_second_process_waits(tmp_path, kept, said, monkeypatch):
    path = write_folder(tmp_path, contents(some_items()))
    open_images(str(path))
    (entry,) = entries(kept)
    content = entry.read_bytes()
    entry.unlink()
    other = FileLock(kept / f".{entry.name}.lock", thread_local=False)  # as another process would hold it
    other.acquire()

    def finished(line: str) -> None:  # the other writes the entry while this one waits
        said.append(line)
        if other.is_locked:
            entry.write_bytes(content)
            other.release()

    monkeypatch.setattr(console, "info", finished)
    monkeypatch.setattr(ImageFiles, "item", lambda *args: pytest.fail("decoded a second time"))
    np.testing.assert_array_equal(open_images(str(path)).items, some_items())
    assert "another process makes its decoded images" in said[1]


def test_everything_takes_a_mapped_set(tmp_path):
    items = some_items()
    mapped = open_images(str(write_folder(tmp_path, contents(items, [row % 3 for row in range(NUM)]))))
    plain = mapped._replace(items=items)
    assert is_mapped(mapped)
    assert digest(mapped) == digest(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of tensors over memory that cannot be written to
        for only in (None, np.array([3, 1, 7])):
            for hflip in (False, True):
                rows = [
                    Shuffled(each.items, each.labels, "x", only=only, hflip=hflip).rows(2, 9)
                    for each in (mapped, plain)
                ]
                assert torch.equal(rows[0].items, rows[1].items)
                assert type(mapped.items[np.array([1, 2])]) is np.ndarray
        batches = [torch.cat(list(share_of_batches(each.items, 5))) for each in (mapped, plain)]
        assert torch.equal(batches[0], batches[1])
        batches[0].zero_()
    np.testing.assert_array_equal(mapped.items, items)


def test_the_recipe_key_changes_no_run():
    """It is read, and left out of what a run is compared by."""
    on, off = load("quickstart", []), load("quickstart", ["data.cache=false"])
    assert (on.data.cache, off.data.cache) == (True, False)
    assert on.model_dump() == off.model_dump()
    assert to_yaml(on) == to_yaml(off)
