import numpy as np
import pytest
import torch

from ddo_cli.errors import DataError
from ddo_cli.metrics.nearest import Digests, nearest


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


def digests_of(images: np.ndarray, batch: int = 3) -> Digests:
    digests = Digests(len(images))
    for rows in np.array_split(np.arange(len(images))[::-1], -(-len(images) // batch)):
        digests.update(rows, {"images": torch.from_numpy(images[rows])})
    digests.all_reduce()
    return digests


def test_duplicates_are_counted():
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 4), dtype=np.uint8)
    images[5], images[9], images[13] = images[2], images[2], images[12]
    images[15] = images[14]
    images[15, 0, 0, 0] ^= 1  # one bit makes another image
    found = digests_of(images).result(digests_of(np.concatenate([images[[0, 2]], 255 - images])))
    assert found == (3, 4, [(5, 2), (9, 2), (13, 12)])  # of the reference: 0, and the three copies of 2
    assert digests_of(images[:3]).result() == (0, None, [])


def test_shape_is_content():
    zeros = np.zeros((1, 1, 2, 8), dtype=np.uint8)
    assert digests_of(zeros).result(digests_of(zeros.reshape(1, 1, 4, 4))).of_reference == 0


def test_missing_rows_are_noticed():
    digests = Digests(3)
    digests.update(np.array([0, 1]), {"images": torch.zeros(2, 1, 2, 2, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="image 2 came 0 times"):
        digests.result()
