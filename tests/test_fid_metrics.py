"""Figures of `ddo fid` against torch-fidelity's own command and against formulas written anew.

Inception's weights are random, as nobody has them here: both programs get the same file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import CPU
from PIL import Image
from random_inception import random_state

from ddo_cli.data.images import open_images
from ddo_cli.engines import fid
from ddo_cli.metrics.features import load_inception

NUM = 40
pytestmark = pytest.mark.slow  # Inception takes a tenth of a second per image, and its covariances seconds


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folders `real` and `fake` of colour PNGs, and Inception weights."""
    root = tmp_path_factory.mktemp("inception")
    torch.save(random_state(), root / "inception.pth")
    colours = np.random.default_rng(0).uniform(0.3, 1, size=(NUM, 1, 1, 3))
    for name, source, level in (("real", "embedded:digits32", 0), ("fake", "embedded:digits32-b", 25)):
        items = open_images(source, NUM).items.transpose(0, 2, 3, 1) * colours  # (N, 32, 32, 3)
        noisy = items + level * np.random.default_rng(1).normal(size=items.shape)
        (root / name).mkdir()
        for number, pixels in enumerate(noisy.clip(0, 255).astype(np.uint8)):
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def score(root: Path, **options):
    settings = fid.Options(**{"weights": str(root / "inception.pth"), "batch": 16, **options})
    return fid.run(str(root / "fake"), str(root / "real"), settings, device=CPU)


@pytest.fixture(scope="module")
def found(root):
    return score(root, metrics=("fid", "is", "precision", "recall", "sfid"))


def test_equal_to_torch_fidelity(root, found):
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--input1", str(root / "fake"), "--input2"]
    command += [str(root / "real"), "--fid", "--isc", "--prc", "--json", "--cpu", "--no-cache", "--silent"]
    command += ["--feature-extractor-weights-path", str(root / "inception.pth")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    pairs = {
        "fid": "frechet_inception_distance",
        "is": "inception_score_mean",
        "is_std": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
    }
    ours = {key: found[key] for key in pairs}
    assert ours == pytest.approx({key: theirs[name] for key, name in pairs.items()}, rel=1e-5)
    assert 0 < ours["precision"] < 1 or 0 < ours["recall"] < 1


def test_equal_to_the_formula(root, found):
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), with scipy's root; a covariance divided by N is wrong."""
    extractor = load_inception(str(root / "inception.pth"))
    features = {
        name: extractor(torch.from_numpy(open_images(str(root / name)).items)).double().numpy()
        for name in ("real", "fake")
    }
    real, fake = features["real"], features["fake"]
    values = {}
    for ddof in (0, 1):
        first, second = (np.cov(one, rowvar=False, ddof=ddof) for one in (real, fake))
        root_ = scipy.linalg.sqrtm(first @ second)
        mean = np.square(real.mean(0) - fake.mean(0)).sum()
        values[ddof] = mean + np.trace(first + second - 2 * np.real(root_))
    assert found["fid"] == pytest.approx(values[1], rel=1e-5)  # sqrtm of a matrix of rank 39 in 2048 dimensions
    assert found["fid"] != pytest.approx(values[0], rel=1e-3)


def test_one_image_at_a_time_and_likelihoods(root, found, tmp_path):
    again = score(root, metrics=("fid",), nll=(str(root / "real"),), batch=1, pictures=tmp_path)
    assert again["fid"] == pytest.approx(found["fid"], rel=1e-5)
    assert found["sfid"] > 0
    assert np.isfinite(again["nll_spatial_mean"])
    with Image.open(again["likelihoods"]) as picture:
        assert picture.width > 100
