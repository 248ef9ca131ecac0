"""The arithmetic in which images are made of codes."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CPU
from var_models import TINY_VAE, build

from ddo_cli import precision as module
from ddo_cli.generation import generate
from ddo_cli.likelihood import Sampled
from ddo_cli.models import vae_codec
from ddo_cli.models.var import vqvae
from ddo_cli.precision import decoding, inference_precision
from ddo_cli.recipe.schema import SamplingRecipe

EXACT, TF32 = ("ieee", "ieee", False), ("tf32", "tf32", False)
GPU = torch.device("cuda")


def in_force() -> tuple[str, str, bool]:
    """Convolutions, products, autocast."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    return convolutions.fp32_precision, products.fp32_precision, torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("precision", "drawing", "decoded"),
    [
        (None, EXACT, EXACT),
        ("float32", EXACT, EXACT),
        ("tf32", TF32, TF32),
        ("bf16", ("ieee", "ieee", True), TF32),
        ("fp16", ("ieee", "ieee", True), TF32),
    ],
)
def test_sets_are_decoded_in_tf32_unless_they_are_drawn_in_float32(precision, drawing, decoded):
    found = {}

    def sample(label, rng, spec):
        found["drawing"] = in_force()
        return Sampled(torch.zeros(len(label), 1), 1)

    def decode(x):
        found["decoded"] = in_force()
        return x

    codec = SimpleNamespace(decode=decode)
    model = SimpleNamespace(num_classes=0, check_sampling=lambda spec: None, sample=sample, codec=codec)
    before = in_force()
    list(generate(model, range(2), SamplingRecipe(precision=precision), batch=2))
    assert found == {"drawing": drawing, "decoded": decoded}
    assert in_force() == before


def asked(device: torch.device) -> tuple[str, str, bool]:
    with decoding(device):
        return in_force()


def test_decoders_take_the_callers_tf32_and_nothing_else():
    with inference_precision("float32", CPU):  # which puts the switch back
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # torch's default, nobody's wish
        assert asked(GPU) == EXACT
    for precision, expected in (("float32", EXACT), ("tf32", TF32)):
        with inference_precision(precision, CPU):
            assert asked(GPU) == expected
            assert asked(CPU) == EXACT
    with inference_precision("bf16", CPU):
        assert asked(CPU) == EXACT


def test_images_are_decoded_so_and_codes_are_not(monkeypatch):
    """Of the VQVAE; a CPU passes for a GPU."""
    monkeypatch.setattr(vqvae, "decoding", lambda device: module.inference_precision(*_as_gpu(device)))
    model, found = build(TINY_VAE), {}
    parts = {"decoder": model.vqvae.decoder, "encoder": model.vqvae.encoder, "codes": model.vqvae.quantize.phi[0]}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: found.setdefault(name, set()).add(in_force()))
    with inference_precision("tf32", CPU):
        model.codec.decode(model.codec.encode(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)))
    assert found == {"decoder": {TF32}, "encoder": {EXACT}, "codes": {EXACT}}


def test_latents_of_the_autoencoder_are_exact(monkeypatch):
    monkeypatch.setattr(vae_codec, "decoding", lambda device: module.inference_precision(*_as_gpu(device)))
    codec, found = vae_codec.StabilityCodec((3, 8, 8)), {}

    def encode(images):
        found["encoded"] = in_force()
        part = torch.zeros(len(images), 4, 1, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=part, std=part))

    def decode(latents):
        found["decoded"] = in_force()
        return SimpleNamespace(sample=torch.zeros(len(latents), 3, 8, 8))

    monkeypatch.setattr(vae_codec, "_load", lambda *_: SimpleNamespace(encode=encode, decode=decode))
    with inference_precision("tf32", CPU):
        codec.decode(codec.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)))
    assert found == {"encoded": EXACT, "decoded": TF32}


def _as_gpu(device: torch.device) -> tuple[str, torch.device]:
    with decoding(GPU):
        convolutions, *_ = in_force()
    return ("tf32" if convolutions == "tf32" else "float32"), device
