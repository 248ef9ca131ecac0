"""torch-fidelity for precision and recall; loops over all pairs for density and coverage."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full, prc_features_to_metric

from ddo_cli.errors import DataError
from ddo_cli.metrics.manifold import Manifold, manifold


def sets(num: int, num_real: int, size: int, seed: int = 0, offset: float = 0.0):
    rng = np.random.default_rng(seed)
    fake = rng.normal(size=(num, size)) * (1 - 1 / size) + 0.2 + offset
    return torch.from_numpy(fake).float(), torch.from_numpy(rng.normal(size=(num_real, size)) + offset).float()


def by_loops(fake: np.ndarray, real: np.ndarray, k: int, k_density: int) -> Manifold:
    def radius(rows, k):
        return [sorted(np.linalg.norm(rows - row, axis=1))[k] for row in rows]

    pairs = np.array([[np.linalg.norm(x - y) for y in real] for x in fake])  # (N, M)
    inside = pairs < np.array(radius(real, k_density))
    return Manifold(
        float((pairs <= np.array(radius(real, k))).any(1).mean()),
        float((pairs <= np.array(radius(fake, k))[:, None]).any(0).mean()),
        float(inside.sum() / (k_density * len(fake))),
        float(inside.any(0).mean()),
    )


@pytest.mark.parametrize(("num", "num_real", "size"), [(300, 400, 8), (400, 300, 64), (257, 65, 3)])
def test_torch_fidelity_and_loops_agree(num, num_real, size):
    fake, real = sets(num, num_real, size)
    ours = manifold(fake, real, tile=64)
    theirs = prc_features_to_metric(fake, real, verbose=False)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0.05 < ours.precision < 1  # the case says something
    assert 0.05 < ours.recall < 1
    assert ours == pytest.approx(by_loops(fake.double().numpy(), real.double().numpy(), 3, 5), rel=1e-12)
    # k off by one, and the two sets exchanged, give other numbers.
    assert ours.precision != pytest.approx(calculate_precision_recall_full(fake, real, 2)[0], rel=1e-3)
    assert ours.precision != pytest.approx(manifold(real, fake).precision, rel=1e-3)
    assert ours.density != pytest.approx(manifold(fake, real, k_density=4).density, rel=1e-3)


def test_tiles_do_not_matter():
    fake, real = sets(130, 170, 5)
    assert manifold(fake, real, tile=7) == manifold(fake, real) == manifold(fake.flip(0), real.flip(0), tile=50)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equal_sets(offset):
    """Every row lies in k of the open balls: density is 1, far from zero too, where float32 distances fail."""
    real = sets(200, 200, 16, offset=offset)[1]
    assert manifold(real.flip(0), real) == (1, 1, 1, 1)


def test_far_sets():
    fake, real = sets(50, 60, 4)
    assert manifold(fake + 100, real) == (0, 0, 0, 0)


def test_far_from_zero_float32_fails():
    """Why tiles are float64: 5000 off the origin, torch-fidelity's float32 products give other shares."""
    fake, real = sets(300, 300, 64, offset=5000.0)
    ours, exact = manifold(fake, real), by_loops(fake.double().numpy(), real.double().numpy(), 3, 5)
    theirs = prc_features_to_metric(fake, real, verbose=False)
    assert ours == pytest.approx(exact, rel=1e-12)
    assert abs(theirs["precision"] - exact.precision) > 0.01


def test_identical_images_do_not_fall_out():
    """Five copies of each row have a radius of exactly 0; other copies lie in that closed ball, and nothing else."""
    real = sets(2, 40, 64)[1].repeat(5, 1)
    assert manifold(real[:20].repeat(5, 1), real)[:2] == (1, 0.5)


def test_too_few():
    with pytest.raises(DataError, match=r"has 5 images; give more than 5"):
        manifold(torch.zeros(5, 2), torch.zeros(9, 2))
