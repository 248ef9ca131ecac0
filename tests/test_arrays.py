"""Sources of .npz files."""

from pathlib import Path

import numpy as np
import pytest
from test_images import assert_holds, encoded, some_items

from ddo_cli.data.images import open_images
from ddo_cli.errors import DataError


@pytest.mark.parametrize("key", ["arr_0", "samples", "images"])
@pytest.mark.parametrize("label_key", [None, "label", "labels", "arr_1"])
@pytest.mark.parametrize(("channels", "last"), [(1, True), (1, False), (3, True), (3, False)])
def test_npz(tmp_path, key, label_key, channels, last):
    items, labels = some_items(channels=channels), np.array([0, 2, 1, 0, 0, 1], dtype=np.uint8)
    arrays = {key: items.transpose(0, 2, 3, 1) if last else items}
    if label_key:
        arrays[label_key] = labels
    np.savez(tmp_path / "set.npz", **arrays)
    found = open_images(str(tmp_path / "set.npz"))
    assert_holds(found, items, labels if label_key else None, 3 if label_key else 0)
    assert found.items.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64, bool])
def test_npz_with_one_hot_labels(tmp_path, dtype):
    """As Discriminator Guidance's sampler writes them: samples channels last, label one-hot float32."""
    items, labels = some_items(), [0, 2, 1, 0, 0, 1]
    one_hot = np.eye(10)[labels].astype(dtype)
    np.savez(tmp_path / "set.npz", samples=items.transpose(0, 2, 3, 1), label=one_hot)
    assert_holds(open_images(str(tmp_path / "set.npz")), items, labels, 10)  # classes that no item has count
    assert open_images(str(tmp_path / "set.npz"), 3).num_classes == 10


@pytest.mark.parametrize(
    "row", [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.5, 0.0], [np.nan, 1.0, 0.0], [2.0, 0.0, 0.0]]
)
def test_npz_rows_that_are_not_one_hot(tmp_path, row):
    one_hot = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    one_hot[4] = row
    np.savez(tmp_path / "set.npz", images=some_items(), label=one_hot)
    with pytest.raises(DataError, match=r"set\.npz: label is float64 \(6, 3\), and row 4 is not one-hot"):
        open_images(str(tmp_path / "set.npz"))


def test_npz_with_a_column_of_labels(tmp_path):
    np.savez(tmp_path / "set.npz", images=some_items(), labels=np.ones((6, 1), int))  # not one-hot of a single class
    with pytest.raises(DataError, match=r"labels is int64 \(6, 1\)"):
        open_images(str(tmp_path / "set.npz"))


def write_npzs(root: Path, parts: dict[str, dict[str, np.ndarray]]) -> Path:
    root.mkdir(parents=True)
    for name, arrays in parts.items():
        np.savez(root / name, **arrays)
    return root


@pytest.mark.parametrize("labelled", [False, True])
def test_folder_of_npz_files(tmp_path, labelled):
    """Discriminator Guidance's layout: files of any numbers, in the order of their names as texts."""
    items, labels = some_items(6), np.array([3, 1, 2, 0, 1, 3])

    def part(rows: slice) -> dict[str, np.ndarray]:
        extra = {"label": np.eye(10, dtype=np.float32)[labels[rows]]} if labelled else {}
        return {"samples": items[rows].transpose(0, 2, 3, 1), **extra}

    parts = {"samples_10.npz": slice(0, 2), "samples_9.npz": slice(3, 6), "samples_2.npz": slice(2, 3)}
    root = write_npzs(tmp_path / "set", {name: part(rows) for name, rows in parts.items()})
    expected = (items, labels, 10) if labelled else (items,)
    assert_holds(open_images(str(root)), *expected)
    assert len(open_images(str(root), 4).items) == 4
    with pytest.raises(DataError, match="set holds 6 items, fewer than the 7"):
        open_images(str(root), 7)
    # The trainer's own concatenation, left beside them, is not counted a second time; alone it is the set.
    np.savez(root / "gen_data_for_discriminator_training.npz", **part(slice(0, 6)))
    (root / ".hidden").write_bytes(b"")
    assert_holds(open_images(str(root)), *expected)
    for name in parts:
        (root / name).unlink()
    assert_holds(open_images(str(root)), *expected)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"samples": some_items(2)}, r"b\.npz holds samples where the first file, a\.npz, holds label, samples"),
        (
            {"samples": some_items(2, size=6), "label": np.array([0, 1])},
            r"b\.npz holds 6x8 RGB where .*a\.npz.* 5x7 RGB",
        ),
        ({"samples": some_items(2, 1), "label": np.array([0, 1])}, r"b\.npz holds 5x7 grey where .*a\.npz.* 5x7 RGB"),
        ({"samples": np.zeros((2, 2)), "label": np.array([0, 1])}, r"b\.npz holds points of 2 numbers where"),
        ({"samples": some_items(2), "label": np.array([0])}, r"b\.npz: label is int64 \(1,\).*each of the 2 items"),
        ({"other": some_items(2)}, r"b\.npz holds only other"),
    ],
)
def test_npz_files_that_do_not_belong_together(tmp_path, other, match):
    first = {"samples": some_items(2), "label": np.array([0, 1])}
    with pytest.raises(DataError, match=match):
        open_images(str(write_npzs(tmp_path / "set", {"a.npz": first, "b.npz": other, "c.npz": first})))


def test_folder_of_npz_files_and_others(tmp_path):
    root = write_npzs(tmp_path / "set", {"a.npz": {"samples": some_items(2)}})
    (root / "b.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"b\.npz is not a whole \.npz"):
        open_images(str(root))
    (root / "c.png").write_bytes(encoded(some_items(1)[0]))
    with pytest.raises(DataError, match=r"images in \.npz files \(a\.npz\) and others beside them \(c\.png\)"):
        open_images(str(root))  # one of the two would be left out
    (root / "a.npz").unlink()
    assert len(open_images(str(root)).items) == 1  # b.npz is no set


def test_folders_of_published_code(tmp_path, capsys):
    """DG's generate.py leaves a contact sheet beside each file; guided-diffusion its logs."""
    items = some_items(4)
    for form in ("samples", "arr_0"):
        root = write_npzs(tmp_path / form, {f"samples_{n}.npz": {form: items[2 * n : 2 * n + 2]} for n in range(2)})
        for n in range(2):
            (root / f"sample_{n}.png").write_bytes(encoded(some_items(1, size=20)[0]))
        (root / "log.txt").write_text("creating model and diffusion...")
        np.testing.assert_array_equal(open_images(str(root)).items, items)
        said = " ".join(capsys.readouterr().err.split())
        assert "those of 2 .npz files; left out: log.txt, sample_0.png, sample_1.png" in said


def test_statistics_beside_images_are_left_out(tmp_path, capsys):
    root = write_npzs(tmp_path / "set", {"fid-refs.npz": {"mu": np.zeros(3), "sigma": np.eye(3)}})
    (root / "a.png").write_bytes(encoded(some_items(1)[0]))
    assert len(open_images(str(root)).items) == 1
    assert "left out: 1 .npz of statistics" in capsys.readouterr().err


def test_arrays_in_a_subfolder(tmp_path):
    """Of a folder of DG's runs the contact sheets are no set."""
    root = write_npzs(tmp_path / "set" / "run", {"samples_0.npz": {"samples": some_items(2)}})
    with pytest.raises(DataError, match=r"images in .npz files \(run/samples_0.npz\) below; give that"):
        open_images(str(tmp_path / "set"))
    (root / "sample_0.png").write_bytes(encoded(some_items(1)[0]))
    with pytest.raises(DataError, match=r"images in .npz files \(run/samples_0.npz\) and others beside them"):
        open_images(str(tmp_path / "set"))


def test_arrays_of_unknown_names_are_told(tmp_path, capsys):
    """Labels under another name would be lost in silence."""
    np.savez(tmp_path / "set.npz", images=some_items(2), targets=np.arange(2), seeds=np.arange(2))
    assert_holds(open_images(str(tmp_path / "set.npz")), some_items(2))
    assert "set.npz: not read: targets; labels are label or labels or arr_1" in capsys.readouterr().err


def test_npz_of_points(tmp_path):
    points = np.random.default_rng(0).normal(size=(5, 2))
    np.savez(tmp_path / "set.npz", points)
    assert_holds(open_images(str(tmp_path / "set.npz")), points.astype(np.float32))


IMAGES = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": IMAGES}, "holds only x; it needs"),
        ({"mu": np.zeros(2), "sigma": np.eye(2)}, "feature statistics"),
        ({"images": IMAGES.astype(np.float32)}, r"images is float32 \(4, 8, 8, 3\)"),
        ({"images": IMAGES.astype(np.int64)}, "images is int64"),
        ({"images": IMAGES[0]}, "must be uint8 images"),
        ({"images": IMAGES[:0]}, "must be uint8 images"),
        ({"images": np.zeros((4, 8, 8, 4), np.uint8)}, "without an axis of 1 or 3"),
        ({"images": np.array([[1.0, np.nan]])}, "not finite"),
        ({"images": np.array([{}], dtype=object)}, "not a whole .npz"),
        ({"images": IMAGES, "labels": np.zeros(3, int)}, r"labels is int64 \(3,\).*4 items"),
        ({"images": IMAGES, "labels": np.zeros((4, 10), int)}, "one class number for each"),
        ({"images": IMAGES, "labels": np.zeros(4)}, "labels is float64"),
        ({"images": IMAGES, "labels": np.array([0, 1, -2, 0])}, r"holds -2\.\.1"),
        (
            {"images": IMAGES, "labels": np.full(4, 2**20)},
            r"holds 1048576..1048576; classes count from 0, .* below 1,04",
        ),
    ],
)
def test_wrong_npz(tmp_path, arrays, match):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=match):
        open_images(str(tmp_path / "set.npz"))


def test_damaged_npz(tmp_path):
    path = tmp_path / "set.npz"
    np.save(tmp_path / "one.npy", IMAGES)
    np.savez_compressed(path, images=some_items(20))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", b"junk", whole[:-30], bytes(flipped), (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"not a whole \.npz"):
            open_images(str(path))
