"""`--mode clean` against the clean-fid package, whose numbers it has to give."""

import numpy as np
import pytest
import torch
from conftest import CPU
from PIL import Image
from random_inception import random_state
from torch import nn

from ddo_cli.engines.fid import fid
from ddo_cli.errors import UsageError
from ddo_cli.metrics.accumulators import Moments
from ddo_cli.metrics.extractors.inception import CleanInceptionExtractor, clean_resized
from ddo_cli.metrics.frechet import frechet_distance

STEM = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"]
MIXED = [f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")]


def pictures(num, seed, side=32):
    """uint8 (num, 3, side, side), coarse and fine structure."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num, 3, 4, 4)).repeat(side // 4, 2).repeat(side // 4, 3)
    return np.clip(coarse + rng.normal(0, 30 + 10 * seed, coarse.shape), 0, 255).astype(np.uint8)


def folder(path, images):
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(path / f"{number:04d}.png")
    return str(path)


@pytest.mark.parametrize("side", [32, 512])
def test_images_are_resized_as_in_clean_fid(side):
    """Each channel alone, bicubic with antialiasing when it shrinks, in float32, cut to [0, 255], not rounded."""
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    images = pictures(2, 0, side)
    expected = np.stack([resizer(image.transpose(1, 2, 0)) for image in images]).transpose(0, 3, 1, 2)
    found = clean_resized(torch.from_numpy(images))
    assert torch.equal(found, torch.from_numpy(expected))
    assert bool((found != found.round()).any())


def test_the_network_sees_these_pixels():
    images = torch.from_numpy(pictures(2, 1))
    extractor = CleanInceptionExtractor(random_state(), "0" * 64)
    x = (clean_resized(images) - 128) / 128
    with torch.no_grad():
        for name in (*STEM, *MIXED, "AvgPool"):
            x = getattr(extractor.network, name)(x)
    torch.testing.assert_close(extractor(images), x.flatten(1), rtol=1e-4, atol=1e-5)
    assert extractor.protocol()["extractor"] == "inception-v3-clean"


def both(tmp_path, num):
    """clean-fid's number and ours of the same images, by one small random network."""
    cleanfid = pytest.importorskip("cleanfid.fid")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 9, 4), nn.ReLU(), nn.Conv2d(16, 24, 5, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.requires_grad_(False)
    sets, theirs, ours = [pictures(num, 0), pictures(num, 1)], [], []
    for number, images in enumerate(sets):
        place = folder(tmp_path / str(number), images)
        theirs.append(
            cleanfid.get_folder_features(
                place, model=lambda x: net((x - 128) / 128), num_workers=0, device=CPU, mode="clean", verbose=False
            )
        )
        moments = Moments(24)
        for part in torch.from_numpy(images).split(50):
            moments.update(net((clean_resized(part) - 128) / 128))
        ours.append(moments)
    expected = float(cleanfid.fid_from_feats(*theirs))
    return expected, frechet_distance(ours[0].mean, ours[0].cov, ours[1].mean, ours[1].cov)


def test_the_distance_is_clean_fids(tmp_path):
    expected, found = both(tmp_path, 40)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_distance_of_500_images_is_clean_fids(tmp_path):
    expected, found = both(tmp_path, 500)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def weights(tmp_path):
    torch.save(random_state(), tmp_path / "inception.pth")
    return str(tmp_path / "inception.pth")


@pytest.mark.slow
def test_statistics_of_clean_fid_are_read(tmp_path, weights):
    """An .npz with mu and sigma; the name alone tells the mode."""
    images = pictures(4, 0)
    features = CleanInceptionExtractor(random_state(), "0" * 64)(torch.from_numpy(pictures(4, 1))).double().numpy()
    ref = str(tmp_path / "celeba_clean_train_32.npz")
    np.savez(ref, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    source = folder(tmp_path / "images", images)
    options = fid.Options(weights=weights, mode="clean", cache=False)
    found = fid.run(source, ref, options, device=CPU)
    assert found["protocol"]["fid"]["resize"] == "299 x 299, bicubic with antialiasing, not rounded"
    own = fid.run(source, folder(tmp_path / "ref", pictures(4, 1)), options, device=CPU)
    assert found["fid"] == pytest.approx(own["fid"], rel=1e-5)
    with pytest.raises(UsageError, match=r"by its name the statistics of clean-fid's mode clean; add --mode clean"):
        fid.run(source, ref, fid.Options(weights=weights), device=CPU)


def test_what_has_no_clean_mode(tmp_path, weights):
    source = folder(tmp_path / "images", pictures(4, 0))
    with pytest.raises(UsageError, match="the metric 'sfid' is not defined with --mode clean"):
        fid.run(source, source, fid.Options(metrics=("fid", "sfid"), weights=weights, mode="clean"), device=CPU)
    with pytest.raises(UsageError, match="--mode clean is how clean-fid resizes images for Inception-v3"):
        fid.run(source, source, fid.Options(extractor="embedded:extractor-digits32", mode="clean"), device=CPU)
