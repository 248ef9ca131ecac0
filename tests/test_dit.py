"""DiT and SiT against numbers that the official code gave for the same weights (CPU, float32); their properties."""

import hashlib
import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from ddo_cli.errors import RecipeError
from ddo_cli.models import registry
from ddo_cli.models.dit import files
from ddo_cli.models.dit.transformer import SIZES, positions
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
