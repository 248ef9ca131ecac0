"""One pass in any order, in any batches, on one process or two."""

import numpy as np
import pytest
import torch
from conftest import torchrun

from ddo_cli.errors import DataError
from ddo_cli.metrics.accumulators import ChunkedMoments, ClassMoments, FeatureStore, random_parts
from ddo_cli.metrics.inception_score import InceptionScore
from ddo_cli.metrics.uncertainty import merged

NUM, SIZE = 1203, 5  # more rows than a buffer holds

PROGRAM = """
import sys
import numpy as np
import torch
from ddo_cli import dist
sys.path.insert(0, sys.argv[2])
import test_accumulators as case

device = dist.init("cpu")
found = case.one_pass(np.arange(case.NUM)[dist.rank()::dist.world_size()], 50)
everywhere = dist.gathered([value.sum().item() for value in found.values()])
assert everywhere[0] == everywhere[1]
if dist.is_main():
    np.savez(sys.argv[1], **{name: value.numpy() for name, value in found.items()})
dist.shutdown()
"""


def one_pass(rows: np.ndarray, batch: int) -> dict[str, torch.Tensor]:
    """Every accumulator's result after this process's rows."""
    rng = np.random.default_rng(0)
    pool = torch.from_numpy(rng.normal(size=(NUM, SIZE)) + 10).float()
    chunked, store = ChunkedMoments(NUM, SIZE, chunks=3), FeatureStore(NUM, SIZE)
    score = InceptionScore(NUM, SIZE)
    classes = ClassMoments(np.arange(NUM) % 2, 2, SIZE)
    for part in np.array_split(rows, -(-len(rows) // batch)):
        features = {"pool": pool[part], "logits": pool[part]}
        for accumulator in (chunked, store, score, classes):
            accumulator.update(part, features)
    for accumulator in (chunked, store, score, classes):
        accumulator.all_reduce()
    parts, by_class = chunked.result(), classes.result()
    return {
        "cov": merged(parts).cov,
        "chunk_cov": torch.stack([chunk.cov for chunk in parts]),
        "class_cov": torch.stack([moments.cov for moments in by_class]),
        "store": store.result(),
        "score": torch.tensor(score.result(), dtype=torch.float64),
    }


@pytest.mark.slow
def test_two_processes_shuffled_and_one_by_one(tmp_path):
    whole = one_pass(np.arange(NUM), 64)
    np.testing.assert_allclose(whole["cov"].numpy(), np.cov(whole["store"].double().numpy().T), rtol=1e-9, atol=1e-12)
    shuffled = one_pass(np.random.default_rng(1).permutation(NUM), 1)
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun(str(tmp_path / "program.py"), str(tmp_path / "found.npz"), __file__.rpartition("/")[0])
    with np.load(tmp_path / "found.npz") as found:
        for name, value in whole.items():
            # 1e-9 relative; covariances between features are near 0 against variances of 1.
            np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-9, atol=1e-12, err_msg=name)
            np.testing.assert_allclose(shuffled[name].numpy(), value.numpy(), rtol=1e-9, atol=1e-12, err_msg=name)


def test_parts_are_equal_and_random():
    part = random_parts(103, 10)
    assert np.bincount(part).tolist() == [10, 10, 10, 11, 10, 10, 11, 10, 10, 11]
    assert (part == random_parts(103, 10)).all()
    assert (part != np.sort(part)).any()
    assert (part != np.arange(103) % 10).any()


@pytest.mark.parametrize("accumulator", [ChunkedMoments(4, 3), FeatureStore(4, 3), InceptionScore(10, 3)])
def test_not_finite_and_out_of_place(accumulator):
    features = torch.ones(2, 3)
    with pytest.raises(ValueError, match="do not lie in a set"):
        accumulator.update(np.array([0, 10]), {accumulator.needs: features})
    features[1, 2] = torch.inf
    with pytest.raises(DataError, match=r"image 3 .*NaN or infinity"):
        accumulator.update(np.array([0, 3]), {accumulator.needs: features})


def test_a_row_that_came_twice():
    store = FeatureStore(3, 2)
    store.update(np.array([0, 1, 1, 2]), {"pool": torch.ones(4, 2)})
    with pytest.raises(ValueError, match="image 1 came 2 times"):
        store.result()


def test_memory_bounds():
    with pytest.raises(DataError, match="give at most 25 images"):
        FeatureStore(26, 10, max_bytes=1000)
    assert FeatureStore(25, 10, max_bytes=1000)
    with pytest.raises(DataError, match="at most 1 classes"):
        ClassMoments(np.arange(2), 2, 10, max_bytes=1000)
    with pytest.raises(DataError, match="image 1 has the label -1"):
        ClassMoments(np.array([0, -1]), 2, 10)
    with pytest.raises(DataError, match=r"3 images .* at least 4"):
        ChunkedMoments(3, 2, chunks=2)
