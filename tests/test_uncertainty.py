"""Gaussians with a known distance: N(m, s^2 I) against N(0, I) in F dimensions is F (m^2 + (s - 1)^2)."""

import numpy as np
import pytest
import torch

from ddo_cli.errors import DataError
from ddo_cli.metrics import frechet
from ddo_cli.metrics.accumulators import ChunkedMoments
from ddo_cli.metrics.stats import Moments
from ddo_cli.metrics.uncertainty import merged, uncertainty

F = 16
REFERENCE = frechet.reference(torch.zeros(F), torch.eye(F))
MEAN, STD, NUM = 0.1, 1.2, 1000
TRUE = F * (MEAN**2 + (STD - 1) ** 2)


def rows_of(seed: int, num: int = NUM) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(num, F)) * STD + MEAN)


def chunks_of(rows: torch.Tensor, chunks: int = 10) -> list[Moments]:
    accumulator = ChunkedMoments(len(rows), F, chunks=chunks)
    accumulator.update(np.arange(len(rows)), {"pool": rows})
    accumulator.all_reduce()
    return accumulator.result()


def test_bias_and_standard_error():
    """60 draws. The spread of a deviation over 60 draws is 9%, so 40% off is a false alarm of 1 in 100,000."""
    found = [uncertainty(REFERENCE, chunks_of(rows_of(seed))) for seed in range(60)]
    value, infinity, std_error = (
        np.array([getattr(one, name) for one in found]) for name in ("value", "infinity", "std_error")
    )
    bias = value.mean() - TRUE
    assert bias > 0.08  # F (F + 1) / (4 N) and more: what extrapolation is for
    assert abs(infinity.mean() - TRUE) < 0.2 * bias + 4 * infinity.std() / np.sqrt(60)
    assert abs(infinity.mean() - TRUE) < bias / 2
    assert std_error.mean() == pytest.approx(value.std(), rel=0.4)
    assert infinity.std() < 1.5 * value.std()  # extrapolating adds little noise
    # The deviation of a chunk's own distance, not divided by the root of the number of chunks, would be found out.
    assert std_error.mean() * np.sqrt(10) != pytest.approx(value.std(), rel=0.4)


def test_value_and_points():
    rows = rows_of(0)
    found = uncertainty(REFERENCE, chunks_of(rows))
    expected = frechet.distance_to(REFERENCE, rows.mean(0), rows.T.cov())
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert [point.num for point in found.points] == [100, 200, 500, 1000]
    assert found.points[-1].value == found.value
    values = [point.value for point in found.points]
    assert values == sorted(values, reverse=True)  # fewer images, larger distance
    biased = frechet.distance_to(REFERENCE, rows.mean(0), rows.T.cov(correction=0))
    assert abs(biased / expected - 1) > 1e-4  # dividing by N instead of N - 1 shows


def test_chunks_below_two_f_are_not_extrapolated_from():
    found = uncertainty(REFERENCE, chunks_of(rows_of(0, 200)))
    assert [point.num for point in found.points] == [40, 100, 200]  # chunks of 20 are too few for 16 features
    assert uncertainty(REFERENCE, chunks_of(rows_of(0, 40))).infinity is None
    assert uncertainty(REFERENCE, chunks_of(rows_of(0)), extrapolate=False)[2:] == (None, ())


def test_left_out_chunks():
    """`without` undoes `merged`, far from zero too."""
    rows = rows_of(1, 300) + 1e4
    parts = chunks_of(rows, 3)
    rest, direct = merged(parts).without(parts[1]), merged([parts[0], parts[2]])
    assert rest.n == direct.n == 200
    torch.testing.assert_close(rest.mean, direct.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(rest.cov, direct.cov, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="leave none"):
        parts[0].without(merged(parts))


def test_sorted_by_class_is_no_trap():
    """Ten classes far apart in turn, row i of class i mod 10: chunks of i mod 10 would be classes."""
    rows = rows_of(0) + 5 * (torch.arange(NUM) % 10)[:, None]
    found = uncertainty(REFERENCE, chunks_of(rows))
    by_class = [Moments(F) for _ in range(10)]
    for label, moments in enumerate(by_class):
        moments.update(rows[label::10])
    wrong = uncertainty(REFERENCE, by_class)
    assert wrong.value == pytest.approx(found.value)
    assert wrong.std_error > 3 * found.std_error


def test_one_chunk_has_no_error():
    with pytest.raises(DataError, match="at least 2 chunks"):
        uncertainty(REFERENCE, chunks_of(rows_of(0), 1))
