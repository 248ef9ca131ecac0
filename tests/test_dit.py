"""DiT and SiT against numbers that the official code gave for the same weights (CPU, float32); their properties."""

import hashlib
import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from ddo_cli.diffusion.precond import linear_sigmas
from ddo_cli.diffusion.trace import Trace
from ddo_cli.errors import RecipeError, UsageError
from ddo_cli.models import registry
from ddo_cli.models.dit import files
from ddo_cli.models.dit.transformer import SIZES, positions
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

TINY = {"width": 64, "depth": 2, "heads": 4}


def build(shape=(3, 64, 64), num_classes=10, draw=None, **options):
    return registry.build(registry.config_of("dit", shape, num_classes, {**TINY, **options}, draw or {})).eval()


def hashed(name, size):
    """Numbers in [-1, 1) by a fixed rule, of the hash of a name."""
    h = (np.arange(size, dtype=np.uint64) + zlib.crc32(name.encode())).astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return torch.from_numpy(h.astype(np.float64) / 2**31 - 1)


def official_tensors(shapes):
    """The tensors of a published file's names and shapes, by the fixed rule; but pos_embed."""
    made = {}
    for name, shape in shapes.items():
        u = hashed(name, math.prod(shape))
        if len(shape) > 1:
            u = u * math.sqrt(3 / math.prod(shape[1:]))
        elif name.endswith(".weight"):
            u = 1 + 0.1 * u
        else:
            u = 0.1 * u
        made[name] = u.to(torch.float32).view(shape)
    return made


def loaded(model):
    """The model with the tensors that the rule gives a published file of its shapes."""
    own = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in files.to_official(own, model.options).items()}
    official = {**official_tensors(shapes), "pos_embed": own["net.pos_embed"]}
    model.load_state_dict(files.from_official(official, model.options))
    return model


X = hashed("input", 512).to(torch.float32).view(2, 4, 8, 8)
LABEL = torch.tensor([1, -1])  # the null row is 10


def check(found, mean, std, first=None, last=None):
    torch.testing.assert_close(found.mean().item(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.std(unbiased=False).item(), std, atol=1e-5, rtol=1e-5)
    if first:
        torch.testing.assert_close(found[0, 0, 0, :4].tolist(), list(first), atol=1e-5, rtol=1e-5)
    if last:
        torch.testing.assert_close(found[last[0]][4:].tolist(), list(last[1]), atol=1e-5, rtol=1e-5)


def digest(shapes):
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@torch.no_grad()
def test_outputs_equal_the_official_ones():
    dit = loaded(build(precond="ddpm", learned_variance=True))
    t = torch.tensor([3.0, 700.0])
    check(dit.net(X, t, LABEL), -0.2190678, 1.1630444, (-0.896224, 1.519655, -0.264875, 0.631768),
          ((1, 7, 7), (0.370618, -0.887486, 1.128218, 0.494910)))  # fmt: skip
    t = torch.tensor([0.25, 0.7])
    sit = loaded(build(unused_variance=True))
    check(sit.net(X, t, LABEL), -0.2652489, 1.3377786, (-0.468607, 1.150293, -0.088347, 0.350709),
          ((1, 3, 7), (0.115761, -0.076640, 1.783477, -0.391464)))  # fmt: skip
    plain = loaded(build())
    check(plain.net(X, t, LABEL), -0.1403337, 1.2002592, (-0.468607, 1.522460, -0.088347, 2.067556),
          ((1, 3, 7), (-2.467660, 0.171925, -1.936462, 0.946712)))  # fmt: skip
    repa = loaded(build(projectors=[(96, 48)]))
    assert torch.equal(repa.net(X, t, LABEL), plain.net(X, t, LABEL)), "projectors are of REPA's training alone"


# Of published files: keys, elements, and the digest of names and shapes.
LAYOUTS = [
    ("XL", 2, 256, {"learned_variance": True}, 292, 675_129_632, "47dfde881475dc13"),
    ("XL", 2, 256, {"unused_variance": True}, 292, 675_129_632, "47dfde881475dc13"),
    ("XL", 2, 512, {"learned_variance": True}, 292, 676_014_368, "d5dedf46d458df15"),
    ("XL", 2, 256, {}, 292, 675_111_184, "7e6eeeb2ef90a769"),
    ("XL", 2, 256, {"projectors": [(2048, 768)]}, 298, 683_242_512, "ac65ed2911f2329b"),
    ("XL", 8, 256, {"learned_variance": True}, 292, 675_683_072, "dbe12068ec96590e"),
    ("L", 4, 256, {"learned_variance": True}, 252, 458_053_760, "65cbda649a8767f1"),
    ("B", 2, 256, {}, 132, 130_500_112, "312e53a532926fcb"),
    ("S", 8, 256, {"learned_variance": True}, 132, 33_148_160, "2f8f533c5587dfc3"),
]


@pytest.mark.parametrize(("size", "patch", "side", "options", "keys", "elements", "known"), LAYOUTS)
def test_names_and_shapes_are_the_published_ones(size, patch, side, options, keys, elements, known):
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        model = build((3, side, side), 1000, width=width, depth=depth, heads=heads, patch=patch, **options)
    official = files.to_official(model.state_dict(), model.options)
    shapes = {name: tuple(tensor.shape) for name, tensor in official.items()}
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (keys, elements)
    assert digest(shapes) == known


def test_positions_tell_the_column_first():
    embedded = positions(1152, 16)[0]
    token = embedded[1]  # row 0, column 1
    known = torch.tensor([math.sin(1), 0.824051, math.cos(1)])
    torch.testing.assert_close(token[[0, 1, 288]], known, atol=1e-6, rtol=0)
    assert bool((token[576:864] == 0).all() and (token[864:] == 1).all())
    assert embedded[16, 576] == pytest.approx(math.sin(1))  # row 1, column 0


def test_names_go_back():
    model = loaded(build(learned_variance=True))
    own = model.state_dict()
    back = files.from_official(files.to_official(own, model.options), model.options)
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)


def test_what_the_likelihood_does_not_train_is_frozen():
    """Neither weight decay nor averages touch positions, projectors and the variance's rows."""
    model = build(learned_variance=True, projectors=[(8, 8)])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert "net.final_layer.variance.weight" in frozen
    assert "net.projectors.0.4.bias" in frozen
    assert "net.pos_embed" not in dict(model.named_parameters())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    draw = model.draw(2, RowRng([0, 1]))
    nn.init.ones_(model.net.final_layer.linear.weight)
    for block in model.net.blocks:
        nn.init.ones_(block.adaLN_modulation[1].weight)
    model(X, LABEL, draw).sum().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in trained.values())


def test_a_new_network_predicts_nothing():
    """The published initialisation: blocks are the identity and F is 0."""
    model = build()
    assert not bool(model.net(X, torch.tensor([0.25, 0.7]), LABEL).any())
    weight = model.net.blocks[0].attn.qkv.weight
    assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 192)), rel=1e-2)  # Xavier's bound


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 64, 64), {"heads": 5}, "heads = 5 must divide width = 64"),
        ((3, 64, 64), {"learned_variance": True, "unused_variance": True}, "exclude each other"),
        ((3, 40, 40), {}, "multiple of 16, which follows from its options codec and patch"),
        ((1, 32, 32), {}, "RGB images"),
        ((3, 32, 16), {}, "square"),
    ],
)
def test_networks_that_do_not_exist(shape, options, message):
    with pytest.raises(RecipeError, match=message):
        build(shape, **options)


# --- Classifier-free guidance

X_BOTH = X[:1]  # the published code copies the first half of a batch to the second


def guided_eps(step, **spec):
    """What the guided network says about the noise, (1, 4, 8, 8)."""
    model = loaded(build(precond="ddpm", learned_variance=True))
    sigma = model.precond.sigmas[step].to(torch.float64)
    spec = SamplingRecipe(sampler="ddpm", cfg_channels=3, **spec)
    model.check_sampling(spec)
    trace = Trace()
    x = X_BOTH.to(torch.float64) * (1 + sigma**2).sqrt()
    denoised = model.steered(LABEL[:1], spec, trace)(x, sigma)
    return (x - denoised) / sigma, trace.variance


@torch.no_grad()
def test_guidance_of_three_channels_equals_the_official_one():
    eps, variance = guided_eps(700, cfg_scale=4.0)
    found = [*eps[0, :, 0, 0].tolist(), variance[0, 0, 0, 0].item()]
    assert found == pytest.approx([-1.541556, -1.921960, 0.012828, -2.138010, 0.994516], abs=1e-5)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (200, [-0.676425, -1.848576, -1.054656, -2.039394, 0.539990]),
        (201, [-0.893863, -1.791191, -1.451248, -2.067317, 0.615207]),
    ],
)
@torch.no_grad()
def test_two_scales_equal_those_of_dgs_run(step, expected):
    """1.25 above step 200, 3.0 at and below it."""
    branch = linear_sigmas()[200:202].mean().item()
    eps, variance = guided_eps(step, cfg_scale=1.25, cfg_scale_low=3.0, cfg_sigma_low=branch)
    assert [*eps[0, :, 0, 0].tolist(), variance[0, 0, 0, 0].item()] == pytest.approx(expected, abs=1e-5)


def test_guidance_that_does_not_exist():
    model = build()
    with pytest.raises(UsageError, match=r"cfg_channels = 5: this model's states have 4 channels"):
        model.check_sampling(SamplingRecipe(cfg_scale=1.5, cfg_channels=5))
    with pytest.raises(UsageError, match=r"cfg_channels: of a cfg_scale other than 1; set it too"):
        model.check_sampling(SamplingRecipe(cfg_channels=3))
    with pytest.raises(ValueError, match="belong together"):
        SamplingRecipe(cfg_scale=1.5, cfg_scale_low=3.0)
    stored = SamplingRecipe(cfg_scale=1.25, cfg_scale_low=3.0, cfg_sigma_low=0.4, cfg_channels=3)
    model.check_sampling(stored.merged(cfg_scale=1.0))


@torch.no_grad()
def test_all_scales_equal_one_scale_of_all_channels():
    """Guidance of 4 of 4 channels, and a low scale that equals the other one, change no bit."""
    model = loaded(build(unused_variance=True))
    label, sigma = torch.tensor([3]), torch.tensor(1.5, dtype=torch.float64)
    plain = SamplingRecipe(cfg_scale=1.5)
    others = [{"cfg_channels": 4}, {"cfg_scale_low": 1.5, "cfg_sigma_low": 1.5}]
    found = model.steered(label, plain, Trace())(X_BOTH, sigma)
    for more in others:
        same = model.steered(label, SamplingRecipe(cfg_scale=1.5, **more), Trace())(X_BOTH, sigma)
        assert torch.equal(same, found)
    three = model.steered(label, SamplingRecipe(cfg_scale=1.5, cfg_channels=3), Trace())(X_BOTH, sigma)
    assert torch.equal(three[:, :3], found[:, :3])
    # a batch of two rounds otherwise than one
    torch.testing.assert_close(three[:, 3:], model.denoise(X_BOTH, sigma, label)[:, 3:], atol=1e-5, rtol=1e-5)
