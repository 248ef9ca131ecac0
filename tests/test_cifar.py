import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ddo_cli.data import cifar
from ddo_cli.data.images import open_images
from ddo_cli.errors import DataError

FOLDER = "cifar-10-batches-py"
NUM = 3  # images of a batch


def text(content: bytes) -> bytes:
    """A str of Python 2."""
    return (
        b"U" + bytes([len(content)]) + content
        if len(content) < 256
        else b"T" + struct.pack("<i", len(content)) + content
    )


def array(
    rows: np.ndarray, *, kind: bytes = b"u1", shape: tuple[int, int] | None = None, fortran: bool = False
) -> bytes:
    """An array as numpy under Python 2 pickles it."""
    height, width = shape or rows.shape
    empty = b"cnumpy.core.multiarray\n_reconstruct\nq\x10cnumpy\nndarray\nq\x11K\x00\x85q\x12U\x01bq\x13\x87q\x14Rq\x15"
    dtype = b"cnumpy\ndtype\nq\x16" + text(kind) + b"q\x17K\x00K\x01\x87q\x18Rq\x19"
    dtype += b"(K\x03U\x01|q\x1aNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x1bb"
    size = b"M" + struct.pack("<H", height) + b"M" + struct.pack("<H", width) + b"\x86q\x1c"
    raw = rows.tobytes("F" if fortran else "C")
    return empty + b"(K\x01" + size + dtype + (b"\x88" if fortran else b"\x89") + text(raw) + b"tq\x1db"


def labels_of(labels: list[int]) -> bytes:
    return b"]q\x04(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"


def batch(data: bytes, labels: bytes, number: int = 1) -> bytes:
    """A batch as Python 2's cPickle wrote it, protocol 2."""
    title = text(b"training batch %d of 5" % number) + b"q\x03"
    names = b"]q\x05(" + text(b"a_s_000001.png") + text(b"b_s_000002.png") + b"e"
    items = (b"U\x0bbatch_labelq\x02" + title, b"U\x06labelsq\x06" + labels, b"U\x04dataq\x07" + data)
    return b"\x80\x02}q\x01(" + b"".join(items) + b"U\x09filenamesq\x08" + names + b"u."


def some_rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (NUM, 3072), dtype=np.uint8)


def some_labels(seed: int) -> list[int]:
    return [(seed + row) % 10 for row in range(NUM)]


def batches(**changes: bytes) -> dict[str, bytes]:
    """Contents by file name: five training batches, and a test batch of other images."""
    content = {f"data_batch_{n}": batch(array(some_rows(n)), labels_of(some_labels(n)), n) for n in range(1, 6)}
    content |= {"test_batch": batch(array(some_rows(9)), labels_of([9] * NUM)), "batches.meta": b"junk"}
    return content | changes


def write_tar(path: Path, content: dict[str, bytes]) -> Path:
    """In another order than the batches' own, as the published file."""
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name in sorted(content, reverse=True):
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content[name])
            archive.addfile(member, io.BytesIO(content[name]))
    return path


def write_unpacked(path: Path, content: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, raw in content.items():
        (path / name).write_bytes(raw)
    return path


WRITERS = {
    "tar.gz": lambda root, content: write_tar(root / "cifar-10-python.tar.gz", content),
    "tar": lambda root, content: write_tar(root / "cifar.tar", content),
    "folder": lambda root, content: write_unpacked(root / FOLDER, content),
}
each = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


def test_the_written_layout_is_a_pickle():
    """The bytes above are what Python's own unpickler takes for a batch; here it reads what this file wrote."""
    found = pickle.loads(batch(array(some_rows(0)), labels_of([4, 0, 9])), encoding="bytes")
    np.testing.assert_array_equal(found[b"data"], some_rows(0))
    assert found[b"labels"] == [4, 0, 9]


@each
def test_training_images_in_the_order_of_batches(tmp_path, write):
    found = open_images(str(write(tmp_path, batches())))
    rows = np.concatenate([some_rows(n) for n in range(1, 6)])
    assert found.items.shape == (5 * NUM, 3, 32, 32)
    assert (found.items.dtype, found.labels.dtype) == (np.uint8, np.int64)
    for row, image in zip(rows, found.items, strict=True):  # 1024 red numbers first, line by line
        assert image[0].ravel().tolist() == row[:1024].tolist()
        assert image[2, 31, 1] == row[2048 + 31 * 32 + 1]
    assert found.labels.tolist() == [label for n in range(1, 6) for label in some_labels(n)]
    assert found.num_classes == 10
    found.items[0] = 0  # its own memory


def test_num_takes_rows_in_order(tmp_path):
    path = write_tar(tmp_path / "set.tgz", batches())
    whole, part = open_images(str(path)), open_images(str(path), 4)
    rows = np.arange(5 * NUM)
    np.random.RandomState(0).shuffle(rows)
    np.testing.assert_array_equal(part.items, whole.items[np.sort(rows[:4])])
    with pytest.raises(DataError, match=r"holds 15 items, fewer than the 16 asked for"):
        open_images(str(path), 16)


def test_an_array_in_fortran_order(tmp_path):
    plain = open_images(str(write_tar(tmp_path / "a.tgz", batches())))
    turned = batch(array(some_rows(2), fortran=True), labels_of(some_labels(2)))
    found = open_images(str(write_tar(tmp_path / "b.tgz", batches(data_batch_2=turned))))
    np.testing.assert_array_equal(found.items, plain.items)


GOOD, LABELS = array(some_rows(1)), labels_of([1, 2, 3])


@each
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (b"", "not a whole pickle"),
        (b"junk", "not a whole pickle"),
        (batch(GOOD, LABELS)[:-1000], "not a whole pickle"),
        (batch(GOOD, labels_of([1, 2])), "3 images and 2 labels"),
        (batch(GOOD, labels_of([1, 2, 10])), r"not one of 0\.\.9"),
        (batch(GOOD, b"](\x88\x88\x88e"), r"not one of 0\.\.9"),
        (batch(GOOD, b"K\x03"), "TypeError"),
        (batch(array(some_rows(1)[:, :3071]), LABELS), "not \\(N, 3072\\)"),
        (batch(array(some_rows(1)[:0]), labels_of([])), "not a whole batch"),
        (batch(array(some_rows(1), shape=(4, 3072)), LABELS), "wrong length"),
        (batch(array(some_rows(1), kind=b"f4"), LABELS), "wrong length"),
        (batch(array(some_rows(1), kind=b"i1"), LABELS), "no array of uint8"),
        (batch(b"K\x01", LABELS), "not a whole batch"),
        (batch(GOOD, LABELS).replace(b"U\x06labels", b"U\x06coarse"), "KeyError"),
        (b"\x80\x02T\xff\xff\xff\x7f.", "not a whole pickle"),  # a text of 2 GB that is not there
        (b"\x80\x02}(\x85U\x01au.", "not a whole pickle"),
        (b"\x80\x02cnumpy\ndtype\nU\x01x\x85\x81.", "not a whole pickle"),
        (b"\x80\x02}K\x01r\xff\xff\xff\xff.", "not a whole batch"),  # a memo of 4 billion places
    ],
)
def test_damaged_batches_are_named(tmp_path, write, wrong, match):
    path = write(tmp_path, batches(data_batch_4=wrong))
    with pytest.raises(DataError, match=f"(?s){path.name}: data_batch_4.*{match}"):
        open_images(str(path))


@each
def test_a_missing_batch_is_named(tmp_path, write):
    content = batches()
    del content["data_batch_3"]
    with pytest.raises(DataError, match=r"has no data_batch_3; give cifar-10-python"):
        open_images(str(write(tmp_path, content)))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@each
def test_nothing_of_a_pickle_is_run(tmp_path, write):
    sign = tmp_path / "sign"
    for protocol in range(6):
        root = tmp_path / str(protocol)
        root.mkdir()
        evil = pickle.dumps({b"data": Evil(sign), b"labels": [1]}, protocol)
        path = write(root, batches(data_batch_1=evil))
        with pytest.raises(DataError, match="data_batch_1"):
            open_images(str(path))
        assert not sign.exists()
    pickle.loads(evil)
    assert sign.exists()  # the pickle does what it is meant to do where pickles are run


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"cposix\nsystem\nU\x06touch x\x85R.", r"refused: it names 'posix\.system'"),
        (b"\x80\x02cbuiltins\neval\nU\x011\x85R.", r"names 'builtins\.eval'"),
        (b"\x80\x02cnumpy\nload\nU\x01x\x85R.", r"names 'numpy\.load'"),
        (b"(U\x01xios\nsystem\n.", "uses the pickle operation INST"),
        (b"\x80\x02\x82\x01.", "uses the pickle operation EXT1"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "names 'os.system'"),
        (b"\x80\x02U\x01xQ.", "uses the pickle operation BINPERSID"),
    ],
)
def test_hostile_batches_are_refused(tmp_path, raw, match):
    path = write_tar(tmp_path / "set.tar.gz", batches(data_batch_1=raw))
    with pytest.raises(DataError, match=f"{match}.*nothing was run"):
        open_images(str(path))


def test_damaged_tars(tmp_path):
    path = write_tar(tmp_path / "set.tar.gz", batches())
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[:-200], gzip.compress(b"junk" * 500), whole[:100] + b"\0" + whole[101:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"set\.tar\.gz (is not a whole|has no data_batch)"):
            open_images(str(path))


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_BATCH", 60_000)
    large = batches(data_batch_2=b"\0" * 60_001)
    with pytest.raises(DataError, match="data_batch_2 has 0 MB, a batch of CIFAR-10 31"):
        open_images(str(write_tar(tmp_path / "a.tgz", large)))
    with pytest.raises(DataError, match="data_batch_2 has 0 MB"):
        open_images(str(write_unpacked(tmp_path / FOLDER, large)))
    # A small file that unpacks to more than memory should hold: no more than the limit is unpacked.
    monkeypatch.setattr(cifar, "MAX_TAR", 1 << 20)
    bomb = write_tar(tmp_path / "b.tgz", batches(other=b"\0" * (32 << 20)))
    assert bomb.stat().st_size < 1 << 18
    tracemalloc.start()
    with pytest.raises(DataError, match="unpacks to more than 1 MB"):
        open_images(str(bomb))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
