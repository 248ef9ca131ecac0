"""Known answers for Gaussians, and scipy's general matrix root as the independent reference."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddo_cli.metrics.frechet import distance_to, frechet_distance, reference


def gaussian(features: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(features, rank)) * np.geomspace(1, 0.1, features)[:, None]
    return torch.from_numpy(rng.normal(size=features)), torch.from_numpy(factor @ factor.T / rank)


def by_scipy(mean, cov, ref_mean, ref_cov) -> float:
    root = scipy.linalg.sqrtm(cov.numpy() @ ref_cov.numpy())
    return float((mean - ref_mean).square().sum() + torch.trace(cov + ref_cov)) - 2 * np.trace(root).real


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(
        st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 9)] * 2),
        min_size=1,
        max_size=6,
    )
)
def test_diagonal_gaussians_have_a_closed_form(rows):
    mean, ref_mean, std, ref_std = torch.tensor(rows, dtype=torch.float64).T
    expected = float((mean - ref_mean).square().sum() + (std - ref_std).square().sum())
    found = frechet_distance(mean, std.square().diag(), ref_mean, ref_std.square().diag())
    # A root of a rounding error of 1e-16 in the largest eigenvalue, 81^2, is 1e-6.
    assert found == pytest.approx(expected, rel=1e-6, abs=3e-6)


def test_one_dimension_by_hand():
    one = torch.ones(1, 1, dtype=torch.float64)
    assert frechet_distance(one[0], 4 * one, 3 * one[0], 25 * one) == pytest.approx(4 + 9)  # (1 - 3)^2 + (2 - 5)^2


@pytest.mark.parametrize(("rank", "ref_rank"), [(200, 200), (40, 200), (200, 40), (10, 12)])
def test_scipy_agrees(rank, ref_rank):
    """The last three have singular covariances, of too few images."""
    ours, theirs = gaussian(50, rank, seed=1), gaussian(50, ref_rank, seed=2)
    assert frechet_distance(*ours, *theirs) == pytest.approx(by_scipy(*ours, *theirs), rel=1e-6)


@pytest.mark.parametrize("rank", [200, 7])
def test_symmetric_and_zero_for_equals(rank):
    ours, theirs = gaussian(50, rank, seed=1), gaussian(50, rank, seed=2)
    assert frechet_distance(*ours, *theirs) == pytest.approx(frechet_distance(*theirs, *ours), rel=1e-6)
    assert 0 <= frechet_distance(*ours, *ours) < 1e-6


def test_zero_covariances_and_other_precisions():
    zero = torch.zeros(3)
    assert frechet_distance(zero, torch.zeros(3, 3), zero + 2, torch.zeros(3, 3)) == 12
    mean, cov = (tensor.float() for tensor in gaussian(20, 5, seed=0))  # rounding leaves negative eigenvalues
    assert torch.linalg.eigvalsh(cov.double()).min() < 0
    assert frechet_distance(mean, cov, mean, cov) < 1e-6


@pytest.mark.parametrize("rank", [1, 7, 50])
@pytest.mark.parametrize("ref_rank", [1, 7, 50])
def test_singular_covariances_have_a_reference_too(rank, ref_rank):
    """tr (C C_r)^{1/2} = tr (A^T B B^T A)^{1/2}, the singular values of A^T B, where C = A A^T and C_r = B B^T."""
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(size=(50, rank)), rng.normal(size=(50, ref_rank))
    zero = torch.zeros(50, dtype=torch.float64)
    expected = (ours**2).sum() + (theirs**2).sum() - 2 * np.linalg.svd(ours.T @ theirs, compute_uv=False).sum()
    covs = [torch.from_numpy(factor @ factor.T) for factor in (ours, theirs)]
    ref = reference(zero, covs[1])
    assert ref.root.shape == (ref_rank, 50)  # thin where the reference is singular
    assert distance_to(ref, zero, covs[0]) == pytest.approx(expected, rel=1e-8)


def test_the_divisor_shows():
    """Covariances divided by N instead of N - 1 give another distance: C (1 - 1/N) in the closed form of equals."""
    mean, cov = gaussian(50, 200, seed=1)
    assert frechet_distance(mean, cov * (1 - 1 / 200), mean, cov) == pytest.approx(
        float(cov.trace()) * (1 - np.sqrt(1 - 1 / 200)) ** 2, rel=1e-6
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees():
    for rank, ref_rank in ((200, 200), (40, 10)):
        ours, theirs = gaussian(50, rank, seed=1), gaussian(50, ref_rank, seed=2)
        expected = frechet_distance(*ours, *theirs)
        assert frechet_distance(*ours, *theirs, device="cuda") == pytest.approx(expected, rel=1e-9)


def test_one_reference_serves_many():
    ref = reference(*gaussian(20, 30, seed=0))
    for seed in (1, 2):
        ours = gaussian(20, 30, seed)
        assert distance_to(ref, *ours) == frechet_distance(*ours, *gaussian(20, 30, seed=0))


def test_impossible_inputs_are_refused():
    mean, cov = gaussian(4, 6, seed=0)
    negative = cov - 2 * torch.linalg.eigvalsh(cov).max() * torch.eye(4)
    slightly = cov - (torch.linalg.eigvalsh(cov).min() + 1e-3) * torch.eye(4)
    skew = cov + torch.triu(torch.ones(4, 4), 1)
    for wrong, match in ((negative, "semidefinite"), (slightly, "semidefinite"), (skew, "symmetric")):
        for args in ((mean, wrong, mean, cov), (mean, cov, mean, wrong)):
            with pytest.raises(ValueError, match=match):
                frechet_distance(*args)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mean, cov, mean * torch.nan, cov)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mean, cov * torch.inf, mean, cov)
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(mean, cov[:2], mean, cov)
    with pytest.raises(ValueError, match="4 features"):
        frechet_distance(mean, cov, mean[:2], cov[:2, :2])
