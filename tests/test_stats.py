import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddo_cli import dist
from ddo_cli.errors import DataError
from ddo_cli.metrics import stats
from ddo_cli.metrics.stats import Moments, Statistics


def moments_of(*chunks: np.ndarray) -> Moments:
    moments = Moments(chunks[0].shape[1])
    for chunk in chunks:
        moments.update(torch.from_numpy(chunk))
    return moments


def assert_equals_numpy(moments: Moments, rows: np.ndarray) -> None:
    assert moments.n == len(rows)
    scale = np.cov(rows.T).trace()
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.cov.numpy(), np.atleast_2d(np.cov(rows.T)), rtol=1e-9, atol=1e-9 * scale)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    offset=st.sampled_from([0.0, -3.0, 1e6]),
)
def test_chunks_do_not_matter(seed, cuts, offset):
    """Far from zero too, where sums of squares would lose ten digits of variance 1."""
    rows = np.random.default_rng(seed).normal(size=(60, 4)) + offset
    assert_equals_numpy(moments_of(*np.split(rows, sorted(cuts))), rows)


def test_sums_of_squares_would_fail_the_test_above():
    rows = np.random.default_rng(0).normal(size=(60, 4)) + 1e6
    naive = (rows.T @ rows - 60 * np.outer(rows.mean(0), rows.mean(0))) / 59
    assert abs(naive - np.cov(rows.T)).max() > 1e-6


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 60), offset=st.sampled_from([0.0, 1e6]))
def test_processes_do_not_matter(seed, cut, offset):
    """Two threads stand for two processes, one of which may have no rows; their sums meet as all_reduce's would."""
    rows = np.random.default_rng(seed).normal(size=(60, 4)) + offset
    barrier, slots = threading.Barrier(2, timeout=10), {}

    def all_reduce_sum(tensor):
        slots[threading.current_thread().name] = tensor
        barrier.wait()
        total = slots["0"] + slots["1"]
        barrier.wait()
        return total

    def work(part):
        shares[threading.current_thread().name] = (part := moments_of(part), part.all_reduce())

    shares: dict[str, tuple[Moments, Moments]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce_sum", all_reduce_sum)
        threads = [
            threading.Thread(target=work, args=(part,), name=str(rank))
            for rank, part in enumerate(np.split(rows, [cut]))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for own, merged in shares.values():
        assert_equals_numpy(merged, rows)
        assert own.n in (cut, 60 - cut)  # its own rows are kept apart, so that it can go on


def test_one_process_reduces_to_itself():
    moments = moments_of(np.random.default_rng(0).normal(size=(9, 3)))
    torch.testing.assert_close(moments.all_reduce().cov, moments.cov)


def test_too_few_rows():
    moments = Moments(2)
    with pytest.raises(ValueError, match="no rows"):
        _ = moments.mean
    moments.update(torch.ones(1, 2))
    assert moments.mean.tolist() == [1, 1]
    with pytest.raises(ValueError, match="1 rows"):
        _ = moments.cov
    with pytest.raises(ValueError, match="must be"):
        moments.update(torch.ones(3, 4))


def load(path: Path, num_features: int, extractor: str) -> Statistics:
    """The statistics of a file, once they are those of this extractor."""
    found = stats.read_npz(path)
    stats.fits(str(path), found, num_features, extractor)
    return found


def test_file_with_the_name_of_its_extractor(tmp_path):
    moments = moments_of(np.random.default_rng(0).normal(size=(50, 3)))
    path = tmp_path / "ref.npz"
    np.savez(path, mu=moments.mean.numpy(), sigma=moments.cov.numpy(), num_images=50, extractor="x")
    assert stats.holds_statistics(path)
    found = load(path, 3, "x")
    assert (found.num_images, found.extractor) == (50, "x")
    torch.testing.assert_close(found.mean, moments.mean, rtol=0, atol=0)
    torch.testing.assert_close(found.cov, moments.cov, rtol=0, atol=0)
    with pytest.raises(DataError, match=r"extractor 'x'.*'y'"):
        load(path, 3, "y")


def test_edm_file(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2, np.float32), sigma=np.eye(2, dtype=np.float32))
    found = load(tmp_path / "edm.npz", 2, "anything")
    assert found == Statistics(found.mean, found.cov, None, None)
    assert found.cov.dtype == torch.float64


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"mu": np.zeros(2)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"must be \(2,\)"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"must be \(2,\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "finite"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "semidefinite"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "damaged"),
        ({"mu": np.array([{}, {}], dtype=object), "sigma": np.eye(2)}, "not an .npz"),
    ],
)
def test_wrong_files(tmp_path, arrays, match):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(DataError, match=match):
        load(tmp_path / "ref.npz", 2, "x")


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "ref.npz").write_bytes(content)
    assert not stats.holds_statistics(tmp_path / "ref.npz")
    with pytest.raises(DataError, match=r"not an \.npz"):
        load(tmp_path / "ref.npz", 2, "x")
