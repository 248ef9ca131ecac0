"""`ddo fid` passes no images through a network twice: not the same files, nor copies of them, nor another order."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, torchrun
from PIL import Image

from ddo_cli import console
from ddo_cli.data.images import open_images
from ddo_cli.data.inspection import Inspection
from ddo_cli.engines.fid import fid
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.extractors.select import EMBEDDED_EXTRACTOR

NUM, REF = 100, 80
ALL = ("fid", "precision", "recall", "density", "coverage")
# The sums of a chunk are the same numbers, of the mean kept apart from a copy of it: a few units of the last place.
RTOL = 1e-9


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """folder: PNGs whose classes come in turn, the last an exact copy of the first; and reference sets."""
    root = tmp_path_factory.mktemp("sets")
    items = open_images("embedded:digits32-b", NUM).items.transpose(0, 2, 3, 1).copy()
    items[-1] = items[0]
    for number, image in enumerate(items):
        path = root / "folder" / f"{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    refs = open_images("embedded:digits32", 2 * REF)
    for name, rows in (("ref", slice(REF)), ("ref2", slice(REF, None))):
        np.savez(root / f"{name}.npz", images=refs.items[rows], labels=np.arange(REF) % 2)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """Numbers of images of every call of a network."""
    counts, extract = [], Extractor.extract

    def counted(self, images, *outputs):
        counts.append(len(images))
        return extract(self, images, *outputs)

    monkeypatch.setattr(Extractor, "extract", counted)
    return counts


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Numbers of images of every batch that was decoded."""
    counts, update = [], Inspection.update

    def counted(self, rows, images):
        counts.append(len(rows))
        update(self, rows, images)

    monkeypatch.setattr(Inspection, "update", counted)
    return counts


def score(source, ref, **options):
    settings = fid.Options(**{"extractor": EMBEDDED_EXTRACTOR, "batch": 64, **options})
    return fid.run(str(source), str(ref), settings, device=CPU)


def figures(found: dict) -> dict:
    kept = {key: value for key, value in found.items() if isinstance(value, float) and "per_second" not in key}
    return kept | {f"class {i}": value for i, value in enumerate(found.get("fd_embedded_per_class", []))}


def test_the_same_files_pass_no_network_again(root, passed, decoded):
    first = score(root / "folder", root / "ref.npz")
    assert sum(passed) == NUM + REF
    assert (first["images_from_cache"], first["images_per_second"] > 0) == (0, True)
    passed.clear(), decoded.clear()
    again = score(root / "folder", root / "ref.npz")
    assert not passed
    assert not decoded
    assert figures(again) == pytest.approx(figures(first), rel=RTOL)
    assert (again["images_from_cache"], again["images_per_second"]) == (NUM, None)
    assert again["content_digest"] == first["content_digest"]
    assert any("1 of 100 images are exact copies" in line for line in first["warnings"])
    assert again["warnings"] == first["warnings"]  # what the images themselves show is kept, too


def test_another_reference_passes_only_itself(root, passed):
    score(root / "folder", root / "ref.npz")
    passed.clear()
    found = score(root / "folder", root / "ref2.npz")
    assert sum(passed) == REF
    assert figures(found) == pytest.approx(figures(score(root / "folder", root / "ref2.npz", cache=False)), rel=RTOL)
    passed.clear()
    score(root / "ref2.npz", root / "folder")  # what was a reference is scored, and the other way round
    assert not passed


@pytest.mark.parametrize("kind", ["moved", "touched", "zip", "shuffled"])
def test_copies_are_decoded_once_and_pass_no_network(root, tmp_path, passed, decoded, kind):
    options = {"metrics": ALL, "uncertainty": True}
    first = score(root / "folder", root / "ref.npz", **options)
    copy = tmp_path / kind
    files = sorted((root / "folder").rglob("*.png"))
    if kind == "zip":
        copy = tmp_path / "copy.zip"
        with zipfile.ZipFile(copy, "w") as archive:
            for file in files:
                archive.write(file, f"{file.parent.name}/{file.name}")
    elif kind == "shuffled":
        copy.mkdir()
        for place, number in enumerate(np.random.default_rng(0).permutation(NUM)):
            shutil.copy(files[number], copy / f"{place:03d}.png")
    else:
        shutil.copytree(root / "folder", copy, copy_function=shutil.copy if kind == "touched" else shutil.copy2)
    passed.clear(), decoded.clear()
    found = score(copy, root / "ref.npz", **options)
    assert not passed
    assert sum(decoded) == NUM + 1, "the first image, which says that the others may be known, then all"
    expected = score(copy, root / "ref.npz", cache=False, **options)
    # The features of a shuffled set were computed in other batches: 1e-7 of a feature, and more of close sets.
    assert figures(found) == pytest.approx(figures(expected), rel=1e-5 if kind == "shuffled" else RTOL)
    if kind == "shuffled":  # other images make up the chunks
        assert found["fd_embedded_std_error"] != pytest.approx(first["fd_embedded_std_error"], rel=1e-3)
    passed.clear(), decoded.clear()
    score(copy, root / "ref.npz", **options)
    assert not decoded, "by now the copy's files are known"


def test_a_new_set_is_decoded_once(root, tmp_path, decoded):
    score(root / "folder", root / "ref.npz")
    items = open_images("embedded:digits32", 2 * NUM).items[NUM:]
    np.savez(tmp_path / "other.npz", images=items)
    decoded.clear()
    score(tmp_path / "other.npz", root / "ref.npz")
    assert sum(decoded) == NUM + 1


def test_other_pixels_are_no_copy(root, tmp_path, passed):
    """As many images, with the same first one."""
    first = score(root / "folder", root / "ref.npz")
    shutil.copytree(root / "folder", tmp_path / "copy")
    changed = tmp_path / "copy" / "1" / "001.png"
    with Image.open(changed) as image:
        pixels = np.asarray(image).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(changed)
    passed.clear()
    found = score(tmp_path / "copy", root / "ref.npz")
    assert sum(passed) == NUM
    assert found["content_digest"] != first["content_digest"]


def test_features_serve_every_metric_of_them(root, passed):
    """Of the reference's 80 images and of the set's, other metrics than were asked for first; labels, too."""
    score(root / "folder", root / "ref.npz", metrics=("precision", "recall"))
    passed.clear()
    options = {"metrics": ("fid", "density"), "uncertainty": True, "per_class": True}
    found = score(root / "folder", root / "ref.npz", **options)
    assert not passed
    expected = score(root / "folder", root / "ref.npz", cache=False, **options)
    assert figures(found) == pytest.approx(figures(expected), rel=RTOL)
    assert len(found["fd_embedded_per_class"]) == 2


def test_parts_of_a_set_are_sets(root, passed):
    first = score(root / "folder", root / "ref.npz", repeat=2)
    passed.clear()
    again = score(root / "folder", root / "ref.npz", repeat=2)
    assert not passed
    assert [one["fd_embedded"] for one in again["repeats"]] == pytest.approx(
        [one["fd_embedded"] for one in first["repeats"]], rel=RTOL
    )
    assert first["repeats"][0] != first["repeats"][1]


def test_an_error_leaves_what_the_plain_distance_needs(root, passed):
    score(root / "folder", root / "ref.npz", uncertainty=True)
    passed.clear()
    found = score(root / "folder", root / "ref.npz")
    assert not passed
    assert figures(found) == pytest.approx(figures(score(root / "folder", root / "ref.npz", cache=False)), rel=RTOL)


def test_without_the_cache_nothing_is_read_or_kept(root, cache, passed, monkeypatch):
    for _ in range(2):
        score(root / "folder", root / "ref.npz", cache=False)
    assert sum(passed) == 2 * (NUM + REF)
    assert not cache.exists()
    score(root / "folder", root / "ref.npz")
    monkeypatch.setenv("DDO_CACHE", "off")
    passed.clear()
    score(root / "folder", root / "ref.npz")
    assert sum(passed) == NUM + REF


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_damaged_entries_are_computed_again(root, cache, passed, monkeypatch, content):
    first = score(root / "folder", root / "ref.npz")
    for path in cache.rglob("*.npz"):
        if content is None:  # a whole file of other arrays
            np.savez(path, **{"0.n": np.array(3), "0.mean": np.full(64, np.nan), "digests": np.zeros((2, 2), np.int64)})
        else:
            path.write_bytes(content)
    lines: list[str] = []
    monkeypatch.setattr(console, "warn", lines.append)
    for expected in (NUM + REF, 0):
        passed.clear(), lines.clear()
        assert figures(score(root / "folder", root / "ref.npz")) == pytest.approx(figures(first), rel=RTOL)
        assert sum(passed) == expected
        assert any("is damaged and is computed again" in line for line in lines) == (expected > 0)


def test_other_images_of_the_same_identity_are_noticed(root, tmp_path):
    """Here moments of the old images are there, and features of the new ones: a figure of each would be a mixture."""
    for name, metrics in (("ref", ("fid",)), ("ref2", ("fid", "recall"))):
        shutil.copy(root / f"{name}.npz", tmp_path / "set.npz")
        os.utime(tmp_path / "set.npz", ns=(0, 0))
        found = score(tmp_path / "set.npz", root / "folder", metrics=metrics)
    expected = score(root / "ref2.npz", root / "folder", metrics=metrics, cache=False)
    assert figures(found) == pytest.approx(figures(expected), rel=RTOL)


def test_python_extractors_are_not_kept(root, tmp_path, passed):
    """Their file may read weights from others, whose changes nothing would tell."""
    (tmp_path / "mine.py").write_text(
        "def extractor(device):\n    return lambda images: images.flatten(1)[:, :64].float()\n"
    )
    for _ in range(2):
        passed.clear()
        score(root / "folder", root / "ref.npz", extractor=str(tmp_path / "mine.py"))
        assert sum(passed) == NUM + REF


def test_two_processes_share_the_cache_with_one(root, tmp_path, passed):
    """Kept by one process and found by two, in whole and in part; and the other way round."""

    def by_two(source: Path, metrics: tuple[str, ...]) -> dict:
        arguments = [source, "--ref", root / "ref.npz", "--extractor", EMBEDDED_EXTRACTOR, "--batch", 32, "--json"]
        done = torchrun("-m", "ddo_cli", "fid", *map(str, arguments), "--metrics", ",".join(metrics))
        return json.loads(done.stdout.strip().splitlines()[-1])

    first = score(root / "folder", root / "ref.npz")
    found = by_two(root / "folder", ("fid",))
    assert found["images_from_cache"] == NUM
    assert figures(found) == pytest.approx(figures(first), rel=RTOL)
    assert found["warnings"] == first["warnings"]
    found = by_two(root / "folder", ALL)  # moments are there, features are not
    assert found["images_from_cache"] == 0
    passed.clear()
    again = score(root / "folder", root / "ref.npz", metrics=ALL)
    assert not passed
    assert figures(again) == pytest.approx(figures(found), rel=RTOL)
    shutil.copytree(root / "folder", tmp_path / "copy")
    assert by_two(tmp_path / "copy", ALL)["images_from_cache"] == NUM


def test_a_lost_entry_is_written_anew_from_stored_features(root, cache, passed, monkeypatch):
    options = {"metrics": ("fid", "precision")}
    score(root / "folder", root / "ref.npz", **options)
    entries = {path: path.read_bytes() for path in (cache / "features").glob("*.npz")}
    lines: list[str] = []
    monkeypatch.setattr(console, "warn", lines.append)
    for path, content in entries.items():
        path.write_bytes(b"junk")
        for times in (1, 0):  # said once
            lines.clear()
            score(root / "folder", root / "ref.npz", **options)
            assert sum("is damaged" in line for line in lines) == times
        assert len(path.read_bytes()) == len(content)
