import contextlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_inception import random_state
from safetensors.torch import save_file

from ddo_cli import checkpoint
from ddo_cli.engines.pretrain import extractor as train_extractor
from ddo_cli.errors import CheckpointError, DataError, UsageError
from ddo_cli.files import sha256
from ddo_cli.metrics.extractors.digit_net import DigitNet
from ddo_cli.metrics.extractors.select import (
    EMBEDDED_EXTRACTOR,
    NETWORKS,
    load_extractor,
    select_extractor,
)

HEADER = {"kind": "extractor", "config": {"name": "digit-net", "options": {"num_classes": 10}}}


@pytest.fixture(autouse=True)
def _no_weights(tmp_path, monkeypatch):
    """Whoever runs the tests may have Inception's weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("DDO_INCEPTION_WEIGHTS", raising=False)


def some_images(num: int = 4, channels: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (num, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def write_extractor(path: Path, header: dict = HEADER, seed: int = 0) -> DigitNet:
    torch.manual_seed(seed)
    network = DigitNet()
    checkpoint.save(path, network.state_dict(), header)
    return network.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Extractor checkpoints


def test_extractor_checkpoint(tmp_path):
    network = write_extractor(tmp_path / "mine.safetensors")
    extractor = load_extractor(str(tmp_path / "mine.safetensors"))
    assert extractor.key == "fd_embedded"
    assert extractor.num_features == 64
    assert extractor.sha256 == sha256(tmp_path / "mine.safetensors")
    assert extractor.name == f"digit-net-{extractor.sha256[:8]}"  # other weights have another name
    images = some_images()
    found = extractor(images)
    torch.testing.assert_close(found, network.features(images.float() / 127.5 - 1))
    assert not found.requires_grad
    assert not found.is_inference()  # may enter someone's loss


def test_a_trained_extractor_is_that_of_its_images_and_labels(tmp_path, capsys):
    """The same line finds it, wherever its images lie; not with other labels or held-out images."""
    images, label, out = some_images(40, size=8).numpy(), np.arange(40) % 4, tmp_path / "e.safetensors"

    def train(name, labels, held_out):
        for file, numbers in ((name, labels), (f"held-{name}", held_out)):
            np.savez(tmp_path / file, images=images, labels=numbers)
        places = {"data": str(tmp_path / name), "held_out": str(tmp_path / f"held-{name}")}
        return train_extractor.run(**places, out=out, images=128, seed=0, device=torch.device("cpu"))

    first = train("a.npz", label, label)
    assert train("b.npz", label, label) == first
    assert "is finished; nothing to do" in capsys.readouterr().err
    for other in ((label[::-1], label), (label, label[::-1])):
        with pytest.raises(UsageError, match="holds something else"):
            train("c.npz", *other)


def test_grey_and_other_sizes(tmp_path):
    network = write_extractor(tmp_path / "mine.safetensors")
    extractor = load_extractor(str(tmp_path / "mine.safetensors"))
    grey = some_images(channels=1, size=8)
    up = F.interpolate(grey.float(), (32, 32), mode="bilinear", antialias=True).repeat(1, 3, 1, 1)
    torch.testing.assert_close(extractor(grey), network.features(up / 127.5 - 1))
    fine = some_images(size=64)
    down = F.interpolate(fine.float(), (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(extractor(fine), network.features(down / 127.5 - 1))
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(64).expand(1, 3, 128, 128)  # average out, to grey
    grey = torch.full((1, 3, 32, 32), 127.5)
    torch.testing.assert_close(extractor(stripes), network.features(grey / 127.5 - 1), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "items", [torch.zeros(2, 2), torch.zeros(2, 3, 8, 8), some_images(channels=2), some_images()[0]]
)
def test_what_is_no_image_is_refused(tmp_path, items):
    write_extractor(tmp_path / "mine.safetensors")
    with pytest.raises(DataError, match="uint8 images"):
        load_extractor(str(tmp_path / "mine.safetensors"))(items)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"kind": "model", "config": {}}, "'model' where a 'extractor'"),
        ({"kind": "extractor"}, "names the network None"),
        ({"kind": "extractor", "config": {"name": ["digit-net"]}}, "damaged header"),
        ({"kind": "extractor", "config": {"name": "resnet", "options": {}}}, "'resnet'; known: digit-net"),
        ({"kind": "extractor", "config": {"name": "digit-net", "options": {"num_clases": 10}}}, "num_clases"),
        ({"kind": "extractor", "config": {"name": "digit-net", "options": {"num_classes": 7}}}, "size mismatch"),
        ({"kind": "extractor", "config": {"name": "digit-net", "options": [1]}}, "damaged header"),
    ],
)
def test_wrong_extractor_checkpoints(tmp_path, header, match):
    write_extractor(tmp_path / "mine.safetensors", header)
    with pytest.raises(CheckpointError, match=match):
        load_extractor(str(tmp_path / "mine.safetensors"))


def test_not_finite_weights_are_refused(tmp_path):
    state = DigitNet().state_dict()
    state["classifier.bias"][0] = torch.nan
    checkpoint.save(tmp_path / "mine.safetensors", state, HEADER)
    with pytest.raises(CheckpointError, match=r"classifier\.bias.*not finite"):
        load_extractor(str(tmp_path / "mine.safetensors"))


def test_embedded_extractor():
    extractor = load_extractor()
    assert (extractor.name, extractor.key, extractor.num_features) == ("embedded-digits32", "fd_embedded", 64)
    assert extractor(some_images()).shape == (4, 64)


def test_registered_networks_read_the_common_protocol():
    for build in NETWORKS.values():
        assert build().features(torch.zeros(2, 3, 32, 32)).ndim == 2


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3


@pytest.fixture(scope="module")
def inception_state() -> dict[str, torch.Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def inception_file(inception_state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_state, path)
    return path


def test_inception_is_torch_fidelitys(inception_state, inception_file, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images, grey = some_images(1), some_images(1, channels=1, seed=1)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(inception_file))
    ((expected,), (of_grey,)) = theirs(images), theirs(grey.repeat(1, 3, 1, 1))
    assert expected.std() > 1e-3
    rng = torch.random.get_rng_state()
    ours = select_extractor("fid", str(inception_file))
    assert torch.equal(torch.random.get_rng_state(), rng)  # a metric leaves a run's randomness alone
    assert (ours.name, ours.key, ours.num_features) == ("inception-v3-compat", "fid", 2048)
    assert ours.sha256 == sha256(inception_file)
    # Channels lie innermost in ours, so sums are taken in another order; features are of order 1.
    torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
    # Files of before torch 0.4.1 lack num_batches_tracked, and users may prefer safetensors.
    old = {key: tensor for key, tensor in inception_state.items() if not key.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "weights.safetensors")
    again = select_extractor("fid", str(tmp_path / "weights.safetensors"))
    assert again.key == "fid"
    torch.testing.assert_close(again(grey), of_grey, rtol=1e-5, atol=1e-5)


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_hostile_pickles_are_refused_and_not_run(tmp_path, save):
    save({"fc.bias": Hostile(tmp_path / "executed")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"is not a whole \.pt file of tensors|refused: it names"):
        select_extractor("fid", str(tmp_path / "weights.pth"))
    assert not (tmp_path / "executed").exists()
    with contextlib.suppress(AttributeError, RuntimeError, pickle.UnpicklingError):
        torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "executed").exists()  # without the restriction it runs


def test_wrong_inception_files(tmp_path, inception_state):
    with pytest.raises(CheckpointError, match="does not exist"):
        select_extractor("fid", str(tmp_path / "missing.pth"))
    path = tmp_path / "weights.pth"
    for content in (b"", b"junk", b"PK\x03\x04junk"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is not a whole \.pt file of tensors"):
            select_extractor("fid", str(path))
    for other in ([torch.zeros(2)], {"a": 1}, torch.zeros(2)):
        torch.save(other, path)
        with pytest.raises(CheckpointError, match="something else than tensors"):
            select_extractor("fid", str(path))
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"does not fit Inception-v3.*Missing key"):
        select_extractor("fid", str(path))
    torch.save({"a": torch.full((2,), torch.inf)}, path)
    with pytest.raises(CheckpointError, match="not finite"):
        select_extractor("fid", str(path))
    save_file({**inception_state, "fc.bias": torch.zeros(1000)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"size mismatch for fc\.bias"):
        select_extractor("fid", str(tmp_path / "w.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def test_fid_without_weights_falls_back_and_says_so(tmp_path, capsys):
    write_extractor(tmp_path / "mine.safetensors")
    extractor = select_extractor("fid", extractor=str(tmp_path / "mine.safetensors"))
    assert extractor.key == "fd_embedded"
    message = " ".join(capsys.readouterr().err.split())
    assert extractor.name in message
    assert "fd_embedded, not an FID" in message
    assert select_extractor("fd_embedded", extractor=str(tmp_path / "mine.safetensors")).name == extractor.name
    assert capsys.readouterr().err == ""


def test_fallback_names_the_embedded_extractor(capsys):
    assert select_extractor("fid").name == "embedded-digits32"
    assert "embedded-digits32" in " ".join(capsys.readouterr().err.split())


def test_combinations_without_meaning(tmp_path):
    with pytest.raises(UsageError, match="'fd_embedded'"):
        select_extractor("fd_embedded", weights="inception.pth")
    with pytest.raises(UsageError, match=EMBEDDED_EXTRACTOR):
        select_extractor("fid", weights="inception.pth", extractor=EMBEDDED_EXTRACTOR)
    with pytest.raises(CheckpointError, match="does not exist"):  # a file the user named is never skipped
        select_extractor("fid", weights=str(tmp_path / "inception.pth"))
