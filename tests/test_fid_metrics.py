"""Figures of `ddo fid` against torch-fidelity's own command and against formulas written anew.

Inception's weights are random, as nobody has them here: both programs get the same file.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import CPU, torchrun
from PIL import Image
from random_inception import random_state

from ddo_cli.data.images import open_images
from ddo_cli.engines.fid import fid
from ddo_cli.engines.fid import scores as fid_scores
from ddo_cli.metrics.extractors.select import select_extractor
from ddo_cli.metrics.kid import kernel_distance

NUM = 20
SUBSET = 14  # of KID, which takes 1000 images otherwise


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
    settings = fid.Options(**{"weights": str(root / "inception.pth"), "batch": 16, "cache": False, **options})
    return fid.run(str(root / "fake"), str(root / "real"), settings, device=CPU)


@pytest.fixture(scope="module")
def found(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "KID_SUBSET", SUBSET)
        patch.setattr(fid_scores, "kernel_distance", partial(kernel_distance, subset_size=SUBSET))
        return score(root, metrics=("fid", "is", "precision", "recall", "sfid", "kid"))


@pytest.mark.slow  # Inception takes a tenth of a second per image, and its covariances seconds
def test_equal_to_torch_fidelity(root, found):
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--input1", str(root / "fake"), "--input2"]
    command += [str(root / "real"), "--fid", "--isc", "--prc", "--json", "--cpu", "--no-cache", "--silent"]
    # Its precision and recall are of VGG-16 unless told otherwise; then the weights file would not fit either.
    command += ["--feature-extractor", "inception-v3-compat", "--feature-layer-prc", "2048"]
    command += ["--feature-extractor-weights-path", str(root / "inception.pth")]
    command += ["--kid", "--kid-subset-size", str(SUBSET)]
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
    # It computes the kernel in float32, of which the distance keeps five digits.
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert 0 < ours["precision"] < 1 or 0 < ours["recall"] < 1


def frechet(fake: np.ndarray, real: np.ndarray, ddof: int = 1) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) of two sets of rows (N, F).

    S = A A^T with one column per image, so that tr (S S')^(1/2) is the sum of the singular values of A^T A'.
    """
    first, second = ((one - one.mean(0)).T / np.sqrt(len(one) - ddof) for one in (real, fake))
    overlap = scipy.linalg.svdvals(first.T @ second).sum()
    mean = np.square(real.mean(0) - fake.mean(0)).sum()
    return float(mean + np.square(first).sum() + np.square(second).sum() - 2 * overlap)


@pytest.mark.slow
def test_equal_to_the_formula(root, found):
    """Of covariances divided by N - 1, not N."""
    extractor = select_extractor("fid", str(root / "inception.pth"))
    real, fake = (
        extractor(torch.from_numpy(open_images(str(root / name)).items)).double().numpy() for name in ("real", "fake")
    )
    assert found["fid"] == pytest.approx(frechet(fake, real), rel=1e-6)
    assert found["fid"] != pytest.approx(frechet(fake, real, ddof=0), rel=1e-3)


@pytest.mark.slow
def test_sfid_against_a_reference_file(root, found, tmp_path):
    """`mu_s` and `sigma_s` as ADM's files hold them, out of torch-fidelity's network and numpy's covariance."""
    from torch_fidelity.utils import create_feature_extractor

    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(root / "inception.pth"),
    )  # fmt: skip
    blocks: list[torch.Tensor] = []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: blocks.append(output[:, :7]))
    spatial = {}
    for name in ("real", "fake"):
        network(torch.from_numpy(open_images(str(root / name)).items))
        spatial[name] = blocks.pop().double().numpy()  # (N, 7, 17, 17)
    # TensorFlow lays an image's numbers out by row, column, channel.
    real, fake = (spatial[name].transpose(0, 2, 3, 1).reshape(NUM, -1) for name in ("real", "fake"))
    pool = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "adm.npz", **pool, mu_s=real.mean(0), sigma_s=np.cov(real, rowvar=False))
    options = fid.Options(metrics=("sfid",), weights=str(root / "inception.pth"), batch=16, cache=False)
    value = fid.run(str(root / "fake"), str(tmp_path / "adm.npz"), options, device=CPU)["sfid"]
    assert value == pytest.approx(frechet(fake, real), rel=1e-5)
    assert value == pytest.approx(found["sfid"], rel=1e-5)
    channels_first = spatial["real"].reshape(NUM, -1)
    assert value != pytest.approx(frechet(fake, channels_first), rel=1e-2)


@pytest.mark.slow
def test_two_processes_equal_one(root, found):
    """Of 20 images: a batch of 16 on one process, 4 on the other."""
    arguments = ["--ref", root / "real", "--weights", root / "inception.pth", "--batch", 16, "--no-cache", "--json"]
    done = torchrun(
        "-m", "ddo_cli", "fid", str(root / "fake"), *map(str, arguments), "--metrics", "fid,is,precision,recall"
    )
    two = json.loads(done.stdout.strip().splitlines()[-1])
    keys = ("fid", "is", "is_std", "precision", "recall")
    # The covariances' sums differ in their last digit, of which roots of eigenvalues near zero keep half.
    assert {key: two[key] for key in keys} == pytest.approx({key: found[key] for key in keys}, rel=1e-9)
    assert two["content_digest"] == found["content_digest"]


@pytest.mark.slow
def test_one_image_at_a_time_and_likelihoods(real_pictures, root, found, tmp_path):
    again = score(root, metrics=("fid",), nll=(str(root / "real"),), batch=1, pictures=tmp_path)
    assert again["fid"] == pytest.approx(found["fid"], rel=1e-5)
    assert found["sfid"] > 0
    assert np.isfinite(again["nll_spatial_mean"])
    with Image.open(again["likelihoods"]) as picture:
        assert picture.width > 100
