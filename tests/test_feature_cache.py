import os

import numpy as np
import pytest

from ddo_cli import console
from ddo_cli.data.stream import open_stream
from ddo_cli.engines.fid import feature_cache

PROTOCOL = {"name": "inception", "sha256": "0" * 64, "resize": "bilinear", "precision": "float32"}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def some_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"mean": rng.normal(size=5), "cov": rng.normal(size=(5, 5)), "num": np.array(7)}


def test_what_is_stored_comes_back(directory):
    key = feature_cache.key_of("images", PROTOCOL, ["pool"])
    assert feature_cache.load(key) is None
    assert feature_cache.store(key, some_arrays())
    found = feature_cache.load(key)
    assert set(found) == {"mean", "cov", "num"}
    for name, array in some_arrays().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert [path.name for path in (directory / "features").iterdir()] == [f"{key}.npz"]
    assert feature_cache.store(key, some_arrays(1))
    np.testing.assert_array_equal(feature_cache.load(key)["cov"], some_arrays(1)["cov"])


def test_keys_differ_by_all_that_decides_the_numbers():
    key = feature_cache.key_of("images", PROTOCOL, ["pool", "spatial"])
    assert key == feature_cache.key_of("images", dict(reversed(PROTOCOL.items())), ["spatial", "pool"])
    others = [
        feature_cache.key_of("others", PROTOCOL, ["pool", "spatial"]),
        feature_cache.key_of("images", PROTOCOL, ["pool"]),
        *(feature_cache.key_of("images", {**PROTOCOL, name: "x"}, ["pool", "spatial"]) for name in PROTOCOL),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_the_identity_of_a_set_follows_its_files(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, images=np.zeros((4, 3, 2, 2), np.uint8))
    first = open_stream(str(path)).identity
    assert first == open_stream(str(path)).identity
    assert first != open_stream(str(path), 3).identity
    os.utime(path, ns=(0, 0))
    assert first != open_stream(str(path)).identity
    assert open_stream("embedded:digits8").identity not in (None, open_stream("embedded:digits8", 5).identity)


def test_a_damaged_entry_is_none_and_is_replaced(directory, monkeypatch):
    key = feature_cache.key_of("images", PROTOCOL, ["pool"])
    feature_cache.store(key, some_arrays())
    path = directory / "features" / f"{key}.npz"
    whole = path.read_bytes()
    lines: list[str] = []
    monkeypatch.setattr(console, "warn", lines.append)
    for content in (b"", b"junk", whole[:-9], whole[:100] + b"x" * 20 + whole[120:]):
        path.write_bytes(content)
        assert feature_cache.load(key) is None
        assert str(path) in lines.pop()
    assert feature_cache.store(key, some_arrays())
    assert feature_cache.load(key) is not None
    assert not lines


def test_entries_used_longest_ago_make_room(directory, monkeypatch):
    keys = [feature_cache.key_of(f"set {i}", PROTOCOL, []) for i in range(4)]
    for age, key in enumerate(keys[:3]):
        feature_cache.store(key, some_arrays())
        os.utime(directory / "features" / f"{key}.npz", (1000 + age, 1000 + age))
    size = (directory / "features" / f"{keys[0]}.npz").stat().st_size
    assert feature_cache.load(keys[0]) is not None  # used now: the second one is the oldest
    monkeypatch.setattr(feature_cache, "MAX_TOTAL", 3 * size)
    feature_cache.store(keys[3], some_arrays())
    assert {path.stem for path in (directory / "features").iterdir()} == {keys[0], keys[2], keys[3]}


def test_nothing_larger_than_the_bound_is_kept(directory, monkeypatch):
    monkeypatch.setattr(feature_cache, "MAX_ENTRY", 247)
    assert not feature_cache.store("key", {"rows": np.zeros((31, 1))})
    assert feature_cache.store("key", {"rows": np.zeros((30, 1))})


def test_a_full_disk_is_a_warning(directory, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(console, "warn", lines.append)
    monkeypatch.setattr(feature_cache, "MARGIN", 1 << 60)
    assert not feature_cache.store("key", some_arrays())
    assert "make room" in lines[0]


def test_pickles_are_neither_stored_nor_read(directory):
    key = feature_cache.key_of("images", PROTOCOL, ["pool"])
    with pytest.raises(ValueError, match="pickles"):
        feature_cache.store(key, {"mean": np.array([{}])})
    (directory / "features").mkdir(parents=True)
    np.savez(directory / "features" / f"{key}.npz", mean=np.array([{}]))
    assert feature_cache.load(key) is None


@pytest.mark.parametrize("switch", ["off", ""])
def test_it_can_be_switched_off(monkeypatch, switch):
    monkeypatch.setenv("DDO_CACHE", switch)
    assert not feature_cache.store("key", some_arrays())
    assert feature_cache.load("key") is None


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(console, "warn", lines.append)
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert not feature_cache.store("key", some_arrays())
    assert feature_cache.load("key") is None
    assert len(lines) == 1
    assert "DDO_CACHE" in lines[0]
