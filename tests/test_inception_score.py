"""torch-fidelity's own function is the reference; a plain loop stands for ADM's."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from ddo_cli.errors import DataError, UsageError
from ddo_cli.metrics.inception_score import InceptionScore


def logits_of(num: int, classes: int = 12, seed: int = 0) -> torch.Tensor:
    """Sharp enough for a score of about 3."""
    return 2 * torch.from_numpy(np.random.default_rng(seed).normal(size=(num, classes))).float()


def score(logits: torch.Tensor, protocol="torch-fidelity", order=None, batch: int = 7):
    accumulator = InceptionScore(len(logits), logits.shape[1], protocol)
    for rows in np.array_split(np.arange(len(logits)) if order is None else order, -(-len(logits) // batch)):
        accumulator.update(rows, {"logits": logits[torch.from_numpy(rows)]})
    accumulator.all_reduce()
    return accumulator.result()


@pytest.mark.parametrize("num", [10, 103, 1000])
def test_torch_fidelity_agrees(num):
    logits = logits_of(num)
    theirs = isc_features_to_metric(logits)
    ours = score(logits)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-8, abs=1e-12)
    # Wrong splits are noticed: unshuffled, and of another seed.
    for wrong in (isc_features_to_metric(logits, shuffle=False), isc_features_to_metric(logits, rng_seed=0)):
        assert num == 10 or abs(ours.mean / wrong["inception_score_mean"] - 1) > 1e-5


def test_adm_takes_consecutive_chunks_of_5000():
    """12,000 rows: chunks of 5000, 5000 and 2000 that count alike. A drift along the rows makes chunks differ."""
    logits = logits_of(12_000, 4) * torch.linspace(0.2, 2, 12_000)[:, None]
    p = logits.double().softmax(1).numpy()
    scores = []
    for start in range(0, 12_000, 5000):
        part = p[start : start + 5000]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    found = score(logits, "adm", batch=1000)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert found.std == pytest.approx(np.std(scores), rel=1e-8)
    assert abs(score(logits, batch=1000).mean / found.mean - 1) > 0.01  # the two protocols are not one


def test_known_values():
    """One class for each image in equal numbers gives their number; images that all look alike give 1."""
    sure = torch.eye(5).repeat(400, 1) * 1000  # probabilities underflow to 0, which torch-fidelity turns into NaN
    assert score(sure, "adm", batch=500).mean == pytest.approx(5, rel=1e-12)
    assert score(torch.ones(100, 5)).mean == pytest.approx(1, rel=1e-12)


def test_order_and_batches_do_not_matter():
    logits = logits_of(211)
    shuffled = np.random.default_rng(0).permutation(211)
    assert score(logits, order=shuffled, batch=1) == pytest.approx(score(logits, batch=64), rel=1e-12)


def test_refusals():
    with pytest.raises(DataError, match=r"9 images.*at least 10"):
        InceptionScore(9, 3)
    with pytest.raises(DataError, match="no images"):
        InceptionScore(0, 3, "adm")
    with pytest.raises(UsageError, match="choose torch-fidelity or adm"):
        InceptionScore(20, 3, "tf")
    accumulator, logits = InceptionScore(20, 3), torch.zeros(4, 3)
    logits[2, 1] = torch.nan
    with pytest.raises(DataError, match="logits features of image 7"):
        accumulator.update(np.array([1, 3, 7, 9]), {"logits": logits})
    accumulator.update(np.arange(19), {"logits": torch.zeros(19, 3)})
    with pytest.raises(ValueError, match="image 19 came 0 times"):
        accumulator.result()
