"""EDM's U-Net against numbers that the official code gave for the same weights (CPU, float32), and its key names."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from ddo_cli.models import registry
from ddo_cli.models.edm import keys as edm_keys

NCSNPP = {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "resample_filter": [1, 3, 3, 1]}
FFHQ = {"channel_mult": [1, 2, 2, 2]}
BASELINE = {**FFHQ, "augment_dim": 0}
# (side, classes, options) -> tensors of the state dict, parameter tensors, parameters, elements of buffers
PUBLISHED = {
    "cifar10-uncond-ddpmpp": ((32, 0, {}), (425, 417, 55_733_891, 32)),
    "cifar10-cond-ddpmpp": ((32, 10, {}), (427, 419, 55_735_299, 32)),
    "cifar10-uncond-ncsnpp": ((32, 0, NCSNPP), (432, 421, 56_397_827, 288)),
    "cifar10-cond-ncsnpp": ((32, 10, NCSNPP), (434, 423, 56_400_643, 288)),
    "ffhq-ddpmpp": ((64, 0, FFHQ), (553, 541, 61_805_571, 48)),
    "ffhq-ncsnpp": ((64, 0, {**FFHQ, **NCSNPP}), (563, 547, 62_761_091, 368)),
    "baseline-cifar10-uncond-ddpmpp": ((32, 0, BASELINE), (552, 540, 61_804_419, 48)),
    "baseline-cifar10-uncond-ncsnpp": ((32, 0, {**BASELINE, **NCSNPP}), (562, 546, 62_758_787, 368)),
}
SMALL = {"channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


def build(side, num_classes, options):
    return registry.build(registry.config_of("edm-unet", (3, side, side), num_classes, options, {})).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Deterministic numbers, as the values above were made with


def uniform(i, j):
    """u(i, j) in (0, 1): a hash in 32-bit arithmetic. j: uint32 array."""
    h = (j + np.uint32(1)) * np.uint32(2654435761) + np.uint32((i + 1) * 2246822519 % 2**32)
    h ^= h >> np.uint32(16)
    h *= np.uint32(2246822507)
    h ^= h >> np.uint32(13)
    h *= np.uint32(3266489909)
    h ^= h >> np.uint32(16)
    return (h.astype(np.float64) + 0.5) / 2**32


def stream(s, *shape):
    u = uniform(1_000_000 + s, np.arange(math.prod(shape), dtype=np.uint32))
    return torch.from_numpy((2 * u - 1) * math.sqrt(3)).to(torch.float32).view(shape)


def filled(model, size):
    """The model with every tensor but the filters set by a fixed rule, by the order of the official names."""
    own = {edm_keys.official_name(key, size): tensor for key, tensor in model.state_dict().items()}
    for i, name in enumerate(sorted(key for key in own if not key.endswith("resample_filter"))):
        tensor = own[name]
        u = uniform(i, np.arange(tensor.numel(), dtype=np.uint32))
        if tensor.ndim >= 2:
            values = (2 * u - 1) * math.sqrt(3 / (tensor.numel() / tensor.shape[0]))
        elif name.endswith("freqs"):
            values = 8 * (u - 0.5)
        else:
            values = 0.4 * (u - 0.5) + (1 if name.endswith(".weight") else 0)
        tensor.copy_(torch.from_numpy(values).view(tensor.shape))
    return model


def test_the_numbers_are_those_of_the_official_run():
    j = np.arange(4, dtype=np.uint32)
    np.testing.assert_allclose(uniform(0, j), [0.55008191, 0.13272776, 0.0074671, 0.82844863], atol=1e-7)
    np.testing.assert_allclose(uniform(5, j[:2]), [0.3532135, 0.56864262], atol=1e-7)
    expected = torch.tensor([0.14637449, 1.1083392, 0.94207114, 1.0630964])
    torch.testing.assert_close(stream(0, 4), expected, atol=1e-6, rtol=0)


UNCOND_D = (-0.02846521, 0.6288101, -0.064029, 0.766724, 0.652217, 0.879924, 0.0788084, 0.161875)
AUGMENTED_D = (-0.05598958, 0.6376702, -0.033043, 0.74738, 0.644954, 0.88346, 0.0738776, 0.210983)
UNCOND_F = (-0.1113711, 0.738195, -0.56133, -0.204813, -0.121476, 0.33582, 0.0696457, 0.420772)
COND_D = (-0.06241955, 0.611645, 0.0282133, 0.81553, 0.674063, 0.943668, -0.0254163, 0.0612759)
NCSNPP_D = (-0.09010855, 0.6171578, 0.126495, 0.785951, 1.07707, 0.85128, 0.498637, 0.0482646)
NCSNPP_F = (-0.2591007, 0.6886299, 0.0501989, -0.203604, 0.967414, 0.0157091, 0.739265, -0.0846927)


def check(out, expected):
    """Mean, standard deviation, first four and last two values; known to six significant digits."""
    flat = out.flatten()
    found = torch.stack([flat.mean(), flat.std(unbiased=False), *flat[:4], *flat[-2:]])
    print("largest error", (found - torch.tensor(expected)).abs().max().item())
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "denoised", "raw", "augmented"),
    [
        ("cifar10-uncond-ddpmpp", UNCOND_D, UNCOND_F, AUGMENTED_D),
        pytest.param("cifar10-cond-ddpmpp", COND_D, None, None, marks=pytest.mark.slow),
        pytest.param("cifar10-cond-ncsnpp", NCSNPP_D, NCSNPP_F, None, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_outputs_equal_the_official_ones(name, denoised, raw, augmented):
    with torch.inference_mode(False), torch.no_grad():
        model = filled(build(*PUBLISHED[name][0]), 32)
    sigma, label = torch.tensor([0.5, 20.0]), torch.tensor([3, 7])
    x = stream(0, 2, 3, 32, 32) * (1 + sigma)[:, None, None, None]
    check(model.denoise(x, sigma, label), denoised)
    if raw:
        check(model.net(x, torch.tensor([0.1, -0.2]), label), raw)
    if augmented:
        model.net.forward = partial(model.net.forward, augment=stream(1, 2, 9))
        check(model.denoise(x, sigma, label), augmented)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and names, without weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_names_of_the_published_networks(name):
    (side, num_classes, options), (keys, tensors, parameters, buffers) = PUBLISHED[name]
    with torch.device("meta"):
        model = build(side, num_classes, options)
    assert len(list(model.parameters())) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(b.numel() for b in model.buffers()) == buffers
    own = list(model.state_dict())
    official = [edm_keys.official_name(key, side) for key in own]
    assert len(own) == len(set(official)) == keys
    assert [edm_keys.own_name(key) for key in official] == own


def test_names_are_the_published_ones():
    with torch.device("meta"):
        model = build(32, 10, NCSNPP)
    shapes = {edm_keys.official_name(key, 32): tuple(t.shape) for key, t in model.state_dict().items()}
    expected = {
        "model.map_noise.freqs": (128,),
        "model.map_label.weight": (256, 10),
        "model.map_label.bias": (256,),
        "model.map_augment.weight": (256, 9),
        "model.map_layer0.weight": (512, 256),
        "model.map_layer1.bias": (512,),
        "model.enc.32x32_conv.weight": (128, 3, 3, 3),
        "model.enc.32x32_block0.skip.weight": (256, 128, 1, 1),
        "model.enc.16x16_down.conv0.resample_filter": (1, 1, 4, 4),
        "model.enc.16x16_down.skip.resample_filter": (1, 1, 4, 4),
        "model.enc.16x16_aux_residual.weight": (256, 3, 3, 3),
        "model.enc.16x16_aux_residual.resample_filter": (1, 1, 4, 4),
        "model.enc.8x8_aux_residual.bias": (256,),
        "model.enc.16x16_block3.norm2.weight": (256,),
        "model.enc.16x16_block3.qkv.weight": (768, 256, 1, 1),
        "model.dec.8x8_in0.proj.bias": (256,),
        "model.dec.16x16_up.conv0.weight": (256, 256, 3, 3),
        "model.dec.16x16_block4.qkv.bias": (768,),
        "model.dec.32x32_block4.conv0.weight": (256, 384, 3, 3),
        "model.dec.32x32_block4.affine.weight": (256, 512),
        "model.dec.32x32_aux_norm.weight": (256,),
        "model.dec.32x32_aux_conv.weight": (3, 256, 3, 3),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    for absent in ("dec.16x16_block3.qkv.weight", "enc.16x16_down.qkv.weight", "enc.32x32_block1.skip.weight"):
        assert f"model.{absent}" not in shapes


def test_groups_of_every_norm():
    """The frozen outputs cannot tell 1e-6 from 1e-5: activations of random weights are too large."""
    for channels, groups in ((8, {2, 4, 6, 8}), (64, {16, 32})):  # 32 from 128 channels on
        with torch.device("meta"):
            model = build(8, 0, {**SMALL, "channels": channels})
        norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
        assert {norm.eps for norm in norms} == {1e-6}
        assert all(norm.num_groups == min(32, norm.num_channels // 4) for norm in norms)
        assert {norm.num_groups for norm in norms} == groups


@pytest.mark.parametrize("key", ["u", "model.out_norm.weight", "model.map_label", "optimizer.step"])
def test_unknown_names_are_refused(key):
    with pytest.raises(KeyError):
        edm_keys.own_name(key)


# ---------------------------------------------------------------------------------------------------------------------
# Behaviour


def perturbed(num_classes, **options):
    torch.manual_seed(0)
    model = build(8, num_classes, {**SMALL, **options})
    for parameter in model.parameters():  # no branch stays at its tiny initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def test_labels_change_the_output_of_a_conditional_network_only():
    x, c_noise = stream(0, 3, 3, 8, 8), torch.zeros(3)
    labels, none = torch.tensor([0, 1, -1]), torch.full((3,), -1)
    net = perturbed(2).net
    differs = (net(x, c_noise, labels) - net(x, c_noise, none)).abs().amax((1, 2, 3))
    assert (differs > 1e-4).tolist() == [True, True, False]
    net = perturbed(0).net
    assert torch.equal(net(x, c_noise, labels), net(x, c_noise, none))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, NCSNPP])
def test_a_row_does_not_depend_on_the_others(options):
    net = perturbed(2, **options).net
    x, c_noise, label = stream(0, 3, 3, 8, 8), torch.tensor([0.1, -0.2, 0.5]), torch.tensor([0, 1, -1])
    alone = torch.cat([net(x[i : i + 1], c_noise[i : i + 1], label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, c_noise, label), alone, atol=1e-5, rtol=1e-4)  # other kernels, float32


@torch.no_grad()
def test_no_augmentation_is_zero_augmentation():
    net = perturbed(0).net
    x, c_noise, label = stream(0, 2, 3, 8, 8), torch.zeros(2), torch.full((2,), -1)
    plain = net(x, c_noise, label)
    assert torch.equal(plain, net(x, c_noise, label, torch.zeros(2, 9)))
    assert not torch.equal(plain, net(x, c_noise, label, torch.ones(2, 9)))


@torch.no_grad()
def test_dropout_acts_in_training_only():
    model = perturbed(0, dropout=0.5)
    x, sigma, label = stream(0, 2, 3, 8, 8), torch.ones(2), torch.full((2,), -1)
    assert torch.equal(model.denoise(x, sigma, label), model.denoise(x, sigma, label))
    model.train()
    assert not torch.equal(model.denoise(x, sigma, label), model.denoise(x, sigma, label))


def test_every_parameter_has_a_gradient():
    model = perturbed(2, **NCSNPP)
    model.net(stream(0, 2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 1])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_new_network_starts_small_and_unbiased():
    torch.manual_seed(0)
    tensors = build(8, 2, SMALL).state_dict()
    bound = math.sqrt(6 / (16 * 9 + 16 * 9))
    weight = tensors["net.encoder.8.block0.conv0.weight"]  # 2304 draws: their largest is within 1% of the bound
    assert 0.99 * bound < weight.abs().max() <= bound
    assert tensors["net.encoder.8.block0.conv1.weight"].abs().max() <= 1e-5 * bound
    assert tensors["net.head.weight"].abs().max() < 1e-5
    assert all(not tensor.any() for name, tensor in tensors.items() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("shape", "options", "problem"),
    [
        ((3, 10, 10), {"channel_mult": [1, 1, 1]}, "multiple of"),
        ((3, 8, 16), {}, "square"),
        ((3, 8, 8), {"resample_filter": [1, 2, 1]}, "even number"),
        ((3, 8, 8), {"channels": 6}, "multiple of 4"),
        ((3, 8, 8), {"embeding": "fourier"}, "did you mean 'embedding'"),
    ],
)
def test_impossible_networks_are_named(shape, options, problem):
    with pytest.raises(registry.RecipeError, match=problem):
        registry.build(registry.config_of("edm-unet", shape, 0, options, {}))
