"""torch-fidelity's own functions are the reference, given float64: in float32 its sums keep five digits or fewer."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric, mmd2

from ddo_cli.errors import DataError
from ddo_cli.metrics import kid
from ddo_cli.metrics.kid import kernel_distance


def features_of(num: int, shift: float = 0.0, seed: int = 0, size: int = 24) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, size)) + shift).float().abs()


def theirs(x, y, subsets: int, size: int):
    found = kid_features_to_metric(x, y, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


@pytest.mark.parametrize(("num", "num_reference"), [(150, 90), (60, 60)])
def test_torch_fidelity_agrees(num, num_reference):
    x, y = features_of(num, 0.7, 1), features_of(num_reference, seed=2)
    ours = kernel_distance(x, y, 20, 60)
    assert tuple(ours) == pytest.approx(theirs(x.double(), y.double(), 20, 60), rel=1e-9)
    assert tuple(ours) == pytest.approx(theirs(x, y, 20, 60), rel=1e-5, abs=1e-6)  # its float32, as its command runs
    if num > 60:  # else every subset is the whole set
        assert abs(ours.mean / theirs(y, x, 20, 60)[0] - 1) > 1e-5  # the order of the two decides the subsets


def test_the_biased_estimate_is_told_apart():
    x, y = features_of(60, 0.3, 1).double(), features_of(60, seed=2).double()
    kernels = [(a @ b.T / 24 + 1).numpy() ** 3 for a, b in ((x, x), (x, y), (y, y))]
    assert kid.mmd2(x, y) == pytest.approx(mmd2(*kernels), rel=1e-12)
    assert abs(kid.mmd2(x, y) / mmd2(*kernels, mmd_est="biased") - 1) > 0.01


def test_no_bias():
    """Equal distributions: zero within four standard errors of independent draws (false alarm 1 in 16,000)."""
    found = np.array(
        [kid.mmd2(features_of(40, seed=i).double(), features_of(40, seed=500 + i).double()) for i in range(200)]
    )
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(200)


def test_kernel_by_hand():
    """k(x, x') = (x.x' / 1 + 1)^3: within x = (0, 1): 1; within y = (2, 3): 7^3; across: 1, 1, 3^3, 4^3."""
    x, y = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[2.0], [3.0]]).double()
    assert kid.mmd2(x, y) == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4)


def test_refusals():
    with pytest.raises(DataError, match=r"subsets of 1000 from 999 images and 1200.*at least 1000"):
        kernel_distance(torch.zeros(999, 2), torch.zeros(1200, 2))
    with pytest.raises(DataError, match="one extractor"):
        kernel_distance(torch.zeros(9, 2), torch.zeros(9, 3), 1, 5)
    with pytest.raises(DataError, match="subset size of 2 to 9"):
        kernel_distance(torch.zeros(9, 2), torch.zeros(9, 2), 1, 1)
