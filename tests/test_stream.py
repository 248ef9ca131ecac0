import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import torchrun
from PIL import Image
from test_cifar import batches as cifar_batches
from test_cifar import write_tar, write_unpacked

from ddo_cli.data import image_files, readers, stream
from ddo_cli.data import images as image_sets
from ddo_cli.data.images import open_images
from ddo_cli.data.inspection import Inspection, balance
from ddo_cli.data.samples import Writer
from ddo_cli.data.stream import open_stream
from ddo_cli.errors import DataError
from ddo_cli.generation import Batch

NUM = 23
CPU = torch.device("cpu")


def some_items(num: int = NUM, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Higher than wide, so that a swapped axis shows."""
    return np.random.default_rng(seed).integers(0, 256, (num, channels, 7, 5), dtype=np.uint8)


def encoded(item: np.ndarray, form: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(item[0] if len(item) == 1 else item.transpose(1, 2, 0)).save(buffer, form, **options)
    return buffer.getvalue()


def contents(items: np.ndarray, labels=None) -> dict[str, bytes]:
    found = {f"{'ab'[row > 12]}/{row:03d}.png": encoded(item) for row, item in enumerate(items)}
    if labels is not None:
        pairs = [[name, int(label)] for name, label in zip(found, labels, strict=True)]
        found["dataset.json"] = json.dumps({"labels": pairs}).encode()
    return found


def write_folder(root: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def write_npz(path: Path, save=np.savez, **arrays: np.ndarray) -> Path:
    save(path, **arrays)
    return path


def write_npz_folder(root: Path) -> Path:
    root.mkdir()
    for part, items in enumerate(np.array_split(some_items(), 3)):
        save = np.savez_compressed if part == 1 else np.savez
        save(root / f"{part}.npz", samples=items.transpose(0, 2, 3, 1), label=np.eye(4)[np.arange(len(items)) % 3])
    return root


def write_samples(root: Path, form: str) -> Path:
    items = torch.from_numpy(some_items())
    writer = Writer(root, form, range(100, 100 + NUM), 8, {"weights": "x"})
    for number, rows in enumerate(torch.arange(NUM).split(8)):
        writer.write(Batch(number, items[rows], rows % 5, rows + 100, 18))
    writer.finish()
    return root


def channels_last(items: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(items.transpose(0, 2, 3, 1))


LABELS = np.arange(NUM) % 4
KINDS = {
    "folder": lambda root: write_folder(root / "set", {n[2:]: c for n, c in contents(some_items()).items()}),
    "subfolders": lambda root: write_folder(root / "set", contents(some_items())),
    "labelled folder": lambda root: write_folder(root / "set", contents(some_items(), LABELS)),
    "grey folder": lambda root: write_folder(root / "set", contents(some_items(channels=1))),
    "zip": lambda root: write_zip(root / "set.zip", contents(some_items(), LABELS)),
    "deflated zip": lambda root: write_zip(root / "set.zip", contents(some_items()), zipfile.ZIP_DEFLATED),
    "zip of another method": lambda root: write_zip(root / "set.zip", contents(some_items()), zipfile.ZIP_LZMA),
    "npz": lambda root: write_npz(root / "set.npz", arr_0=channels_last(some_items()), arr_1=LABELS),
    "npz channels first": lambda root: write_npz(root / "set.npz", images=some_items()),
    "npz compressed": lambda root: write_npz(
        root / "set.npz", np.savez_compressed, samples=channels_last(some_items()), label=np.eye(4)[LABELS]
    ),
    "npz in Fortran order": lambda root: write_npz(root / "set.npz", images=np.asfortranarray(some_items())),
    "folder of npz": lambda root: write_npz_folder(root / "set"),
    "sample set png": lambda root: write_samples(root / "set", "png"),
    "sample set npz": lambda root: write_samples(root / "set", "npz"),
    "sample set shards": lambda root: write_samples(root / "set", "shards"),
    "CIFAR tar": lambda root: write_tar(root / "cifar-10-python.tar.gz", cifar_batches()),
    "CIFAR folder": lambda root: write_unpacked(root / "cifar-10-batches-py", cifar_batches()),
    "embedded": lambda root: "embedded:digits8",
}


def read(found: stream.ImageStream, batch: int = 5, rows=None, **options) -> np.ndarray:
    """All images, whose rows must be those asked for, in batches of the right size."""
    parts, seen = [], []
    for own, images in found.batches(batch, rows, **options):
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert len(own) == len(images) <= batch
        parts.append(images.numpy().copy())
        seen += own.tolist()
    assert seen == list(range(found.num) if rows is None else rows)
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The same as open_images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num", [None, 9])
def test_every_kind_equals_open_images(tmp_path, kind, num):
    source = str(KINDS[kind](tmp_path))
    expected, found = open_images(source, num), open_stream(source, num)
    assert (found.num, found.shape, found.name) == (len(expected.items), expected.items.shape[1:], expected.name)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.labels.dtype == np.int64
    assert found.num_classes == expected.num_classes
    np.testing.assert_array_equal(read(found), expected.items)
    rows = np.random.default_rng(1).permutation(found.num)[:13]
    np.testing.assert_array_equal(read(found, 4, rows), expected.items[rows])
    assert found.num_lossy == 0
    # A process that is started afresh gets the reader pickled.
    copy = pickle.loads(pickle.dumps(found.reader))
    np.testing.assert_array_equal(copy.read(found.positions[rows]), expected.items[rows])


@pytest.mark.parametrize("kind", ["labelled folder", "deflated zip", "zip of another method", "npz compressed"])
def test_workers_change_nothing(tmp_path, kind):
    found = open_stream(str(KINDS[kind](tmp_path)))
    rows = np.random.default_rng(2).permutation(NUM)
    state = torch.get_rng_state()
    for workers in (0, 1, 2):
        np.testing.assert_array_equal(read(found, 4, rows, workers=workers), some_items()[rows])
    assert torch.equal(torch.get_rng_state(), state)  # a pass over images draws no random numbers


def test_batches_travel_without_shared_memory(tmp_path, monkeypatch):
    found = open_stream(str(KINDS["zip"](tmp_path)))
    monkeypatch.setattr(stream, "_fits_shared_memory", lambda size: False)
    np.testing.assert_array_equal(read(found, 4, workers=2), some_items())


def test_a_pass_can_be_left_early_and_rows_can_be_none(tmp_path):
    found = open_stream(str(KINDS["zip"](tmp_path)))
    passed = found.batches(4, workers=1)
    assert next(passed)[0].tolist() == [0, 1, 2, 3]
    passed.close() if hasattr(passed, "close") else None
    del passed
    assert list(found.batches(4, np.arange(0), workers=2)) == []
    with pytest.raises(ValueError, match="batch = 0"):
        found.batches(0)


def test_an_array_kept_decoded_is_used_and_none_is_written(tmp_path, monkeypatch):
    for module in (image_sets, stream):
        monkeypatch.setattr(module, "MANY", 10)
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    source = KINDS["labelled folder"](tmp_path)
    assert isinstance(open_stream(str(source)).reader, image_files.ImageFiles)
    assert not (tmp_path / "cache").exists()
    expected = open_images(str(source))
    found = open_stream(str(source))
    assert isinstance(found.reader, readers.ArrayFile)
    np.testing.assert_array_equal(read(found), expected.items)
    np.testing.assert_array_equal(found.labels, expected.labels)
    (source / "a" / "000.png").write_bytes(encoded(some_items(1, seed=9)[0]) + b"longer")
    assert isinstance(open_stream(str(source)).reader, image_files.ImageFiles)


def test_temporary_files_go_with_the_reader(tmp_path, monkeypatch):
    source = str(KINDS["npz compressed"](tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found = open_stream(source)
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    child = os.fork()
    if child == 0:  # its copy is dropped, the file is not its own
        found = None
        os._exit(0)
    os.waitpid(child, 0)
    np.testing.assert_array_equal(read(found), some_items())
    del found
    assert list((tmp_path / "temporary").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_truncated_image_is_one_line_naming_it(tmp_path, kind, workers):
    content = contents(some_items())
    content["a/012.png"] = content["a/012.png"][:60]
    content["b/021.png"] = b"also bad, and later"
    write = {
        "folder": lambda: write_folder(tmp_path / "set", content),
        "zip": lambda: write_zip(tmp_path / "s.zip", content),
    }
    found = open_stream(str(write[kind]()))
    with pytest.raises(DataError, match=r"a/012\.png cannot be read as an image") as error:
        read(found, 2, workers=workers)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("other", [some_items(1, channels=1)[0], some_items(1)[0][:, :6]])
def test_mixed_sizes_and_modes_are_refused_as_in_open_images(tmp_path, other, workers):
    source = str(write_zip(tmp_path / "set.zip", contents(some_items()) | {"b/021.png": encoded(other)}))
    with pytest.raises(DataError) as expected:
        open_images(source)
    with pytest.raises(DataError) as found:
        read(open_stream(source), workers=workers)
    assert str(found.value) == str(expected.value)
    assert "b/021.png" in str(found.value)


class Dying(readers.Memory):
    decodes = True

    def read(self, rows):
        if 9 in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(rows)


def test_a_killed_worker_is_a_message():
    found = stream.ImageStream("set", Dying(some_items()), np.arange(NUM), LABELS, 4)
    with pytest.raises(DataError, match="set: a process that decodes images has ended") as error:
        read(found, 2, workers=1)
    assert "\n" not in str(error.value)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # nothing is raised into the caller's code later


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((3, 4, 4, 3), np.float32)}, "float32 .* round and store"),
        ({"arr_0": np.zeros((3, 2))}, "points of 2 numbers, not images"),
        ({"arr_0": np.zeros((3, 4, 4, 2), np.uint8)}, "without an axis of 1 or 3"),
        ({"arr_0": np.zeros((3, 4, 4, 3), np.int64)}, "must be uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "N >= 1"),
        ({"arr_0": np.array([{}, {}])}, "an array of objects"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "feature statistics, not images"),
        ({"arr_0": some_items(), "arr_1": np.array([1, 2])}, "one class number for each of the 23"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        open_stream(str(write_npz(tmp_path / "set.npz", **arrays)))


def test_damaged_files(tmp_path):
    whole = write_npz(tmp_path / "whole.npz", np.savez_compressed, images=some_items()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    (tmp_path / "bent.npz").write_bytes(middle)
    (tmp_path / "cut.zip").write_bytes(KINDS["zip"](tmp_path).read_bytes()[:-30])
    for name in ("cut.npz", "bent.npz", "cut.zip"):
        with pytest.raises(DataError, match=name):
            read(open_stream(str(tmp_path / name)))
    source = write_npz(tmp_path / "shrinking.npz", images=some_items())
    found = open_stream(str(source))
    os.truncate(source, 500)
    with pytest.raises(DataError, match="has changed since it was opened"):
        read(found)


def test_a_changed_byte_in_a_zip_is_noticed(tmp_path):
    flat = np.full((1, 3, 16, 16), 7, np.uint8)
    path = write_zip(tmp_path / "set.zip", {f"{row}.bmp": encoded(flat[0], "bmp") for row in range(3)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"1.bmp") + 300] ^= 4  # a pixel, which Pillow would take as it is
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"1\.bmp cannot be read .*CRC"):
        read(open_stream(str(path)))


def test_what_is_refused_like_open_images(tmp_path):
    (tmp_path / "empty").mkdir()
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    samples = KINDS["sample set shards"](tmp_path)
    next(iter(sorted(samples.glob("shard-*")))).unlink()
    for source in (tmp_path / "empty", tmp_path / "empty.zip", tmp_path / "none", samples):
        with pytest.raises(DataError) as expected:
            open_images(str(source))
        with pytest.raises(DataError) as found:
            open_stream(str(source))
        assert str(found.value) == str(expected.value)
    with pytest.raises(DataError, match="points"):
        open_stream("embedded:toy2d")
    with pytest.raises(DataError, match="fewer than the 24 asked for"):
        open_stream(str(KINDS["zip"](tmp_path)), 24)


def test_lossy_files_are_recognised(tmp_path):
    flat = some_items(4)
    png = {f"{row}.png": encoded(item) for row, item in enumerate(flat)}
    jpeg, webp = encoded(flat[0], "jpeg"), encoded(flat[0], "webp", lossless=True)
    cases = {
        "png": (png, 0),
        "some": (png | {"x.jpg": jpeg, "y.JPEG": jpeg}, 2),
        "disguised": (dict.fromkeys(png, jpeg), 4),
        "webp": (png | {"x.webp": encoded(flat[0], "webp")}, 1),
        "lossless": (dict.fromkeys(("a.webp", "b.webp"), webp), 0),
        "both": ({"a.webp": webp, "b.jpg": jpeg}, 1),
    }
    for name, (content, num) in cases.items():
        found = open_stream(str(write_zip(tmp_path / f"{name}.zip", content)))
        assert found.num_lossy == num, name


# ---------------------------------------------------------------------------------------------------------------------
# Inspection


def inspected(items: np.ndarray, labels=None, num_classes: int = 0) -> Inspection:
    found = Inspection(np.full(len(items), -1) if labels is None else labels, num_classes)
    for rows in np.array_split(np.arange(len(items)), 3):
        found.update(rows, torch.from_numpy(items[rows]))
    return found


def test_inspection():
    items = some_items()
    items[5], items[20], items[7] = items[2], items[2], items[8]
    found = inspected(items, LABELS, 6)
    assert (found.num, found.num_duplicates) == (NUM, 3)
    assert (found.low, found.high) == (items.min(), items.max())
    assert found.counts.tolist() == [6, 6, 6, 5, 0, 0]
    assert len(found.warnings("set")) == 1
    assert found.warnings("set")[0].startswith("set: 3 of 23 images are exact copies")
    assert inspected(some_items()).warnings("set") == []
    assert found.digests.nbytes == 16 * NUM
    (same,) = inspected(np.repeat(some_items(1), 6, axis=0)).warnings("set")
    assert "all 6 images are the same" in same
    assert "no value is above 1" in inspected(some_items() // 128).warnings("set")[0]
    assert not [line for line in inspected(some_items() // 100).warnings("set") if "no value" in line]


def test_the_digest_knows_content_only(tmp_path):
    sources = ["labelled folder", "zip", "npz", "npz compressed", "folder of npz", "sample set shards"]
    digests = {
        open_stream(str(KINDS[kind](tmp_path / kind))).digest(4) for kind in sources if not (tmp_path / kind).mkdir()
    }
    assert len(digests) == 1
    items = some_items()
    assert digests == {inspected(items[::-1]).digest()}
    changed = items.copy()
    changed[3, 1, 2, 2] ^= 1
    others = [changed, items[:-1], np.concatenate([items, items[:1], items[:1]]), items.transpose(0, 1, 3, 2)]
    assert len({inspected(other).digest() for other in others} | digests) == 5


def test_balance():
    even = np.repeat(np.arange(10), 5)
    assert balance(even, 10) is None
    assert balance(np.full(7, -1), 0) is None
    moved = even.copy()
    moved[0] = 9
    message = balance(moved, 10)
    assert "2 of 10 do not have 5 images: 0 (4), 9 (6)" in message
    assert balance(np.delete(even, 15), 10) is None  # 49 images cannot be balanced better
    assert balance(np.arange(4096) % 10, 10) is None
    assert "1 of 10 do not have 5 images: 3 (3)" in balance(np.delete(even, [15, 16]), 10)
    assert "1 of 11 do not have 5 images: 10 (0)" in balance(even, 11)
    assert "labels go up to 9 where there are 9" in balance(even, 9)
    assert "1 of 51 images have no label" in balance(np.append(even, -1), 10)
    assert "and 95 more" in balance(np.arange(100) ** 2 // 100, 100) or "more" in balance(np.arange(50), 100)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_shares_are_whole_batches(tmp_path, monkeypatch):
    found = open_stream(str(KINDS["npz"](tmp_path)))
    alone = [rows.tolist() for rows, _ in found.batches(4, found.share(4))]
    assert [row for rows in alone for row in rows] == list(range(NUM))
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = {}
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        shared[rank] = [rows.tolist() for rows, _ in found.batches(4, found.share(4))]
    assert sorted(rows for found in shared.values() for rows in found) == alone
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("RANK", "8")
    assert found.share(4).tolist() == []


def test_two_processes_find_the_same(tmp_path):
    items = some_items()
    items[20], items[0] = items[1], 0  # copies, and the extremes, seen by different processes
    source = write_npz(tmp_path / "set.npz", images=items, labels=LABELS)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        from ddo_cli import dist
        from ddo_cli.data.inspection import Inspection
        from ddo_cli.data.stream import open_stream
        dist.init("cpu")
        found = open_stream({str(source)!r})
        inspection = Inspection(found.labels, found.num_classes)
        for rows, images in found.batches(4, found.share(4)):
            inspection.update(rows, images)
        assert inspection.num < {NUM}
        inspection.all_reduce()
        line = [inspection.num, inspection.num_duplicates, inspection.low, inspection.high, inspection.digest()]
        open({str(tmp_path)!r} + f"/{{dist.rank()}}", "w").write(repr((line, inspection.counts.tolist())))
        dist.shutdown()
        """)
    )
    torchrun(str(script))
    one = inspected(items, LABELS, 4)
    expected = repr(([NUM, 1, one.low, one.high, one.digest()], one.counts.tolist()))
    assert [(tmp_path / name).read_text() for name in "01"] == [expected] * 2


def test_default_workers(tmp_path, monkeypatch):
    many = stream.ImageStream("set", Dying(np.zeros((5000, 1, 1, 1), np.uint8)), np.arange(5000), np.zeros(5000), 0)
    few = stream.ImageStream("set", many.reader, np.arange(300), np.zeros(300), 0)
    arrays = stream.ImageStream("set", readers.Memory(many.reader.items), many.positions, many.labels, 0)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(stream, "available_cores", lambda: 6)
    found = [many.default_workers(cuda, 64), many.default_workers(CPU, 64), few.default_workers(cuda, 64)]
    assert found == [5, 1, 0]
    assert arrays.default_workers(cuda, 64) == 0
    for threads, expected in ((1, 2), (6, 0), (12, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert many.default_workers(CPU, 64) == expected
    monkeypatch.setattr(stream, "available_cores", lambda: 1)
    assert many.default_workers(cuda, 64) == 0


MEMORY = """
import resource, sys
import numpy as np
from ddo_cli.data.stream import open_stream
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
open_stream(sys.argv[1], 8)  # what one pass of any size needs
list(open_stream(sys.argv[1], 512).batches(256))
before, total = peak(), 0
for rows, images in open_stream(sys.argv[1]).batches(256):
    total += int(images.sum())
print(peak() - before, total)
"""


@pytest.mark.parametrize("save", [pytest.param(np.savez, marks=pytest.mark.slow), np.savez_compressed])
def test_memory_does_not_grow_with_the_set(tmp_path, save):
    """30,000 images of 32 x 32 (92 MB) pass through less than 30 MB."""
    items = np.zeros((30_000, 32, 32, 3), np.uint8)
    items[:, 0, 0, 0] = np.arange(30_000) % 251
    save(tmp_path / "set.npz", arr_0=items)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "set.npz")]
    environment = {**os.environ, "PYTHONPATH": str(Path(stream.__file__).parent.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, total = done.stdout.split()
    assert int(total) == items.sum()
    assert float(grown) < 30
