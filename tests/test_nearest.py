import numpy as np
import pytest
import torch

from ddo_cli.errors import DataError
from ddo_cli.metrics.nearest import nearest


def test_nearest_rows_by_brute_force():
    rng = np.random.default_rng(0)
    queries, rows = (torch.from_numpy(rng.normal(size=(n, 6)) + 50).float() for n in (33, 101))
    distances = torch.cdist(queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected, order = distances.sort(1)
    for tile in (1, 10, 2048):
        found = nearest(queries, rows, 4, tile)
        torch.testing.assert_close(found.distances, expected[:, :4], rtol=1e-9, atol=0)
        assert torch.equal(found.rows, order[:, :4])


def test_a_copied_image_has_distance_zero():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 512))).float() + 3
    found = nearest(rows[[7, 31]], rows, 2)
    assert found.rows[:, 0].tolist() == [7, 31]
    assert found.distances[:, 0].tolist() == [0, 0]
    assert (found.distances[:, 1] > 1).all()


def test_nearest_refusals():
    with pytest.raises(DataError, match="between 1 and 3"):
        nearest(torch.zeros(2, 2), torch.zeros(3, 2), 4)
    with pytest.raises(DataError, match="one extractor"):
        nearest(torch.zeros(2, 3), torch.zeros(3, 2))
