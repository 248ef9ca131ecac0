"""Inception-v3 of FID: the outputs of one pass, against torch-fidelity's own extractor with the same random weights."""

import pytest
import torch
from random_inception import random_state
from safetensors.torch import save_file

from ddo_cli.errors import NumericsError, UsageError
from ddo_cli.metrics.extractors.inception import InceptionExtractor
from ddo_cli.metrics.extractors.select import load_extractor, select_extractor


def some_images(num: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def ours(state) -> InceptionExtractor:
    return InceptionExtractor(state, "0" * 64)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_outputs_are_torch_fidelitys(state, ours, tmp_path):
    from torch_fidelity.utils import create_feature_extractor  # what its command calls

    torch.save(state, tmp_path / "weights.pth")
    theirs = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased", "logits"],
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
    )
    block = {}
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: block.update(out=output))
    pool, unbiased, biased = theirs(some_images())
    found = ours.extract(some_images(), ("pool", "logits", "spatial"))
    # Sums taken in another order, channels innermost, differ by 4e-7 of the largest.
    assert relative(found["pool"], pool) < 1e-5
    assert relative(found["logits"], unbiased) < 1e-5
    assert relative(found["logits"], biased) > 1e-3
    # The first seven channels of the block are its 1x1 branch's; TensorFlow's order: row, column, channel.
    assert found["spatial"].shape == (2, 17 * 17 * 7)
    for row, column, channel in ((0, 0, 0), (0, 1, 0), (3, 5, 6), (16, 16, 6)):
        place = (row * 17 + column) * 7 + channel
        expected = block["out"][:, channel, row, column]
        torch.testing.assert_close(found["spatial"][:, place], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["spatial"].sum(), block["out"][:, :7].sum(), rtol=1e-5, atol=1e-5)
    assert found["spatial"].min() == 0  # after the ReLU


def test_one_pass_and_only_what_is_asked_for(ours):
    passed = []
    layers = {"first": ours.network.Conv2d_1a_3x3, "last": ours.network.Mixed_7c, "fc": ours.network.fc}
    handles = [layer.register_forward_hook(lambda *_, name=name: passed.append(name)) for name, layer in layers.items()]
    images = some_images(1)
    both = ours.extract(images, ("spatial", "pool"))
    assert passed == ["first", "last"]
    passed.clear()
    spatial = ours.extract(images, ("spatial",))
    assert passed == ["first"]
    assert list(spatial) == ["spatial"]
    passed.clear()
    pool = ours.extract(images)
    assert list(pool) == ["pool"]
    assert passed == ["first", "last"]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(spatial["spatial"], both["spatial"], rtol=0, atol=0)
    torch.testing.assert_close(pool["pool"], both["pool"], rtol=0, atol=0)
    torch.testing.assert_close(ours(images), both["pool"], rtol=0, atol=0)
    assert not ours.network.Mixed_6d.branch1x1._forward_hooks  # none is left behind


def test_channels_lie_innermost(ours):
    assert ours.network.Mixed_6d.branch7x7_2.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_reduced_precision_has_another_name(state, ours):
    quick = InceptionExtractor(state, "0" * 64, precision="bf16")
    assert quick.name == "inception-v3-compat-bf16"
    assert quick.protocol() != ours.protocol()
    found, exact = quick(some_images(1)), ours(some_images(1))
    assert 1e-4 < relative(found, exact) < 0.1  # it does compute otherwise
    assert found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # a run's own precision changes nothing
        torch.testing.assert_close(ours(some_images(1)), exact, rtol=0, atol=0)


def test_a_runs_settings_are_kept():
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.allow_tf32
    inside = []
    extractor = load_extractor()
    features = extractor.network.features

    def watched(x):
        inside.append((convolutions.fp32_precision, products.allow_tf32))
        return features(x)

    extractor.network.features = watched
    try:
        convolutions.fp32_precision, products.allow_tf32 = "tf32", True
        extractor(some_images())
        assert inside == [("ieee", False)]
        assert (convolutions.fp32_precision, products.allow_tf32) == ("tf32", True)
    finally:
        convolutions.fp32_precision, products.allow_tf32 = before


def test_same_weights_in_another_file_have_the_same_protocol(state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    old = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "b.safetensors")
    save_file({**old, "fc.bias": old["fc.bias"] + 1e-3}, tmp_path / "c.safetensors")
    a, b, c = (select_extractor("fid", str(tmp_path / name)) for name in ("a.pth", "b.safetensors", "c.safetensors"))
    assert a.sha256 != b.sha256
    assert a.protocol() == b.protocol()
    assert c.protocol() != b.protocol()
    assert not a.is_published  # random weights give no FID that anyone could compare


def test_outputs_that_others_lack_and_features_that_are_no_numbers(state):
    with pytest.raises(UsageError, match=r"embedded-digits32 has no output 'spatial', only pool"):
        load_extractor().extract(some_images(), ("pool", "spatial"))
    broken = InceptionExtractor({**state, "fc.weight": torch.full((1008, 2048), torch.nan)}, "0" * 64)
    assert broken(some_images(1)).isfinite().all()
    with pytest.raises(NumericsError, match="'logits' features that are not finite"):
        broken.extract(some_images(1), ("pool", "logits"))
