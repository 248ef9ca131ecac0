import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from ddo_cli.errors import DataError
from ddo_cli.metrics.likelihood_histogram import FeatureGaussian, NegativeLogLikelihoods
from ddo_cli.report import pictures


def gaussian(rank: int, features: int = 6, seed: int = 0):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(features, rank))
    return rng.normal(size=features), factor @ factor.T, rng


@pytest.mark.parametrize("rank", [6, 3])
def test_scipy_agrees(rank):
    """scipy's singular normal is the density on the same subspace."""
    mean, cov, rng = gaussian(rank)
    rows = rng.multivariate_normal(mean, cov, size=20)
    expected = -scipy.stats.multivariate_normal(mean, cov, allow_singular=True).logpdf(rows)
    found = FeatureGaussian(torch.from_numpy(mean), torch.from_numpy(cov))
    assert found.rank == rank
    np.testing.assert_allclose(found.nll(torch.from_numpy(rows)).numpy(), expected, rtol=1e-9)


def test_closed_form_and_direction():
    """The data's own mean value is its entropy, F/2 (1 + log 2 pi) for unit variances; worse images lie above."""
    normal = FeatureGaussian(torch.zeros(4), torch.eye(4))
    assert float(normal.nll(torch.zeros(1, 4))) == pytest.approx(2 * np.log(2 * np.pi))
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, 4)))
    entropy = 2 * (1 + np.log(2 * np.pi))
    assert float(normal.nll(rows).mean()) == pytest.approx(entropy, abs=4 * np.sqrt(2 / 4000))  # 1 in 16,000
    assert normal.nll(2 * rows).mean() > normal.nll(rows).mean() + 1


def test_float32_noise_of_a_singular_covariance_is_no_variance():
    mean, cov, _ = gaussian(3)
    stored = torch.from_numpy(cov).float().double()
    assert FeatureGaussian(torch.from_numpy(mean), stored).rank == 3
    assert FeatureGaussian(torch.from_numpy(mean), stored, threshold=0.0).rank > 3  # what the threshold is for


def test_values_come_by_position():
    mean, cov, rng = gaussian(6)
    normal, rows = (
        FeatureGaussian(torch.from_numpy(mean), torch.from_numpy(cov)),
        torch.from_numpy(rng.normal(size=(9, 6))),
    )
    accumulator = NegativeLogLikelihoods(9, normal)
    for part in ([8, 0, 3], [1, 2, 4, 5, 6, 7]):
        accumulator.update(np.array(part), {"spatial": rows[part].float()})
    accumulator.all_reduce()
    np.testing.assert_allclose(accumulator.result(), normal.nll(rows).numpy(), rtol=1e-4)


def test_refusals():
    with pytest.raises(DataError, match="do not vary"):
        FeatureGaussian(torch.zeros(3), torch.zeros(3, 3))
    with pytest.raises(DataError, match="compute the statistics again"):
        FeatureGaussian(torch.zeros(3), torch.full((3, 3), torch.nan))


def test_picture(real_pictures, tmp_path):
    rng = np.random.default_rng(0)
    sets = {"data": rng.normal(size=500), "model": np.append(rng.normal(1, 2, 400), [np.inf, 1e9])}
    pictures.histograms(sets, tmp_path / "a.png", "nats per image")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] > 300
    pictures.histograms({"constant": np.zeros(5)}, tmp_path / "b.png", "nats")
    with pytest.raises(ValueError, match="no finite"):
        pictures.histograms({"none": np.full(3, np.nan)}, tmp_path / "c.png", "nats")
