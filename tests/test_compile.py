"""Every network is one graph for torch.compile, forwards and backwards: no statement of it falls back to Python."""

import pytest
import torch
from conftest import TINY_DIT, TINY_EDM2, TINY_TRANSFORMER, TINY_UNET, TINY_VQVAE
from torch import Tensor, nn

from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.discriminators.adm_head import AdmHead

ROWS, SIDE = 2, 8
EDM = {"channels": 4, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}
NCSN = EDM | {"channel_mult_noise": 2, "embedding": "fourier", "encoder": "residual", "resample_filter": [1, 3, 3, 1]}
ADM = {"width": 32, "channel_mult": [1, 1], "num_blocks": 1, "attention": [4], "num_head_channels": 16}
ENCODER = {"width": 32, "channel_mult": [1, 1], "depth": 1, "attention": [4], "num_head_channels": 16, "time": "cosine"}
TIME_ENCODER = {"patch": 1, "widths": [8, 8], "depths": [1, 1], "emb_width": 8}

DENOISERS = {
    "patch-unet": ("patch-unet", TINY_UNET | {"patch": 1, "widths": [4, 4], "depths": [1, 1]}),
    "ddpm++": ("edm-unet", EDM),
    "ncsn++": ("edm-unet", NCSN),
    "adm": ("adm-unet", ADM),
    "edm2": ("edm2-unet", TINY_EDM2 | {"attn_resolutions": [4]}),
    "dit": ("dit", TINY_DIT | {"patch": 2, "unused_variance": True, "learned_variance": False}),
}
DISCRIMINATORS = {
    "time-encoder": ("discriminator", TIME_ENCODER),
    "time-encoder-classifier": ("classifier", TIME_ENCODER),
    "adm-classifier": ("classifier", ENCODER),
}


def random(module: nn.Module) -> nn.Module:
    """No layer stays at its zero initialisation."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def of_shape(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def net(name: str) -> tuple[nn.Module, tuple]:
    """A tiny network of this name, or a part of one, and its arguments."""
    torch.manual_seed(0)
    x, level, label = of_shape(ROWS, 3, SIDE, SIDE), torch.rand(ROWS), torch.tensor([3, -1])
    time = level.to(torch.float64)
    if name in DENOISERS:
        model, options = DENOISERS[name]
        built = registry.build(registry.config_of(model, (3, SIDE, SIDE), 10, options, {}))
        return random(built).net, (x, level, label)
    if name in DISCRIMINATORS:
        kind, options = DISCRIMINATORS[name]
        built = discriminators.build(kind, discriminators.config_of(kind, name, (3, SIDE, SIDE), 10, options))
        return random(built), (x, time, label)[: 3 if kind == "discriminator" else 2]
    if name == "adm-head":
        head = AdmHead(in_channels=3, size=SIDE, num_outputs=1, num_labels=10, **ENCODER | {"channel_mult": [1]})
        return random(head), (x, time, label)
    if name == "time-mlp":
        config = discriminators.config_of("discriminator", name, (2,), 10, {"width": 8, "depth": 2})
        return random(discriminators.build("discriminator", config)), (of_shape(ROWS, 2), time, label)
    if name == "mlp":
        return random(registry.build(registry.config_of(name, (2,), 10, {}, {}))).net, (of_shape(ROWS, 2), level, label)
    if name == "pixel-transformer":
        model = random(registry.build(registry.config_of(name, (1, 4, 4), 10, TINY_TRANSFORMER, {})))
        model.forward = model.logits
        return model, (torch.randint(17, (ROWS, 16)), label)
    options = {"depth": 1, "width": 16, "heads": 2, "vqvae": TINY_VQVAE}
    var = random(registry.build(registry.config_of("var", (3, 32, 32), 10, options, {})))
    if name == "var-block":
        mask = var.level[:, None] >= var.level
        return var.blocks[0], (of_shape(ROWS, var.length, var.width), of_shape(ROWS, var.width), mask)
    if name == "var-head":
        return var.head, (of_shape(ROWS, 4, var.width), of_shape(ROWS, var.width))
    if name == "vqvae-encoder":
        return var.vqvae.encoder, (of_shape(ROWS, 3, 32, 32),)
    assert name == "vqvae-decoder"
    return var.vqvae.decoder, (of_shape(ROWS, 4, 8, 8),)


NAMES = [
    *DENOISERS, *DISCRIMINATORS, "adm-head", "time-mlp", "mlp", "pixel-transformer", "var-block", "var-head",
    "vqvae-encoder", "vqvae-decoder",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_one_graph(name):
    network, arguments = net(name)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(network, fullgraph=True, backend="eager")(*arguments)
        plain = network(*arguments)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=0)  # the same kernels
    inputs = [one for one in arguments if one.requires_grad] or [next(network.parameters())]
    for ours, theirs in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (compiled, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


ATTENDING = ("ddpm++", "ncsn++", "adm", "edm2", "dit", "adm-classifier", "adm-head", "pixel-transformer", "var-block",
             "vqvae-encoder", "vqvae-decoder")  # fmt: skip


@pytest.mark.parametrize("name", ATTENDING)
def test_attention_is_laid_out_for_the_fused_kernels(name, monkeypatch):
    """They take queries, keys and values whose channels lie side by side."""
    strides = []

    def attention(*qkv: Tensor, **options) -> Tensor:
        strides.extend(part.stride(-1) for part in qkv)
        return plain(*qkv, **options)

    plain = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    network, arguments = net(name)
    network(*arguments)
    assert len(strides) >= 3
    assert set(strides) == {1}


# Outputs that enter a log-ratio or a logit; not blocks.
HEADS = [name for name in NAMES if name not in ("var-block", "vqvae-encoder", "vqvae-decoder")]


@pytest.mark.parametrize("name", HEADS)
def test_the_head_computes_in_float32_under_autocast(name):
    """A product in bf16 would be a multiple of 2^-8 of its leading digit."""
    network, arguments = net(name)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = network(*arguments)
    assert out.dtype == torch.float32
    assert not torch.equal(out, out.to(torch.bfloat16).to(torch.float32))
