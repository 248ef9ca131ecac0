"""The tokenizer: values of the official program, the residual quantiser, and what a wrong one would give."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from test_edm_unet import check, stream
from torch.testing import assert_close
from var_models import SMALL_VAE, TINY_VAE, build, filled, tiny_tokenizer, truth

from ddo_cli.errors import CheckpointError
from ddo_cli.models.var import tokenizers
from ddo_cli.models.var.vqvae import Vqvae, VqvaeOptions, load_into, phi_of_scale

# Mean, standard deviation, first four and last two values of the official program in float32, on the same numbers.
INPUTS = (0.003933559, 0.1809182, 0.221363, -0.217663, 0.0361563, -0.237862, 0.0478809, -0.167713)
F_HAT = (0.005743492, 0.2412824, 0.216589, -0.041618, 0.380223, 0.393974, -0.255111, -0.153142)
CLAMPED = (-0.03221028, 0.4980828, -0.0563016, -0.182498, -0.0332487, -0.240658, 0.249791, -0.030966)
DECODED = (-0.02033099, 0.5487746, *CLAMPED[2:])
LATENT = (0.03659838, 0.4576788, -0.301814, 0.0192708, -0.893123, -0.461147, 0.754952, 0.233394)
TOKENS = [
    59, 23, 6, 15, 17, 33, 36, 27, 33, 27, 18, 27, 27, 54,
    12, 24, 24, 60, 40, 53, 20, 43, 16, 33, 10, 53, 18, 22, 31, 15,
]  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return filled().vqvae


def tiny(seed=0):
    return build(seed=seed).vqvae


@torch.no_grad()
def test_values_equal_the_official_ones(small):
    check(small.quantize.inputs(truth()), INPUTS)
    f_hat = small.quantize.f_hat(truth())
    check(f_hat, F_HAT)
    decoded = small.decoder(small.post_quant_conv(f_hat))
    check(decoded, DECODED)
    check(decoded.clamp(-1, 1), CLAMPED)
    f = small.latent(stream(5, 2, 3, 64, 64).clamp(-1, 1))
    check(f, LATENT)
    assert small.quantize.tokens(f)[0].tolist() == TOKENS


@torch.no_grad()
@pytest.mark.parametrize(
    "wrong",
    ["phi before the enlargement", "no phi at the last scale", "bilinear", "phi of another scale", "whole phi"],
)
def test_other_readings_of_the_quantiser_give_other_values(small, wrong, monkeypatch):
    quantize = small.quantize

    def contribution(codes, scale):
        last = scale == 3
        phi = quantize.phi[quantize.phi_of[scale] if wrong != "phi of another scale" else 0]
        share = 1.0 if wrong == "whole phi" else 0.5

        def mix(h):
            return (1 - share) * h + share * phi(h)

        if wrong == "phi before the enlargement":
            codes = mix(codes)
        h = codes if last else F.interpolate(codes, size=(4, 4), mode="bilinear" if wrong == "bilinear" else "bicubic")
        if wrong == "phi before the enlargement" or (wrong == "no phi at the last scale" and last):
            return h
        return mix(h)

    monkeypatch.setattr(quantize, "contribution", contribution)
    found = quantize.f_hat(truth()).flatten()[:4]
    assert (found - torch.tensor(F_HAT[2:6])).abs().max() > 1e-3


def test_the_scales_of_published_weights_have_these_phi():
    assert phi_of_scale(10) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_of_scale(4) == (0, 1, 2, 3)


def test_ties_between_phi_would_be_decided_otherwise_in_float32():
    ticks = np.linspace(1 / 12, 11 / 12, 4, dtype=np.float32)
    single = tuple(int(np.abs(ticks - np.float32(s / 9)).argmin()) for s in range(10))
    assert single != phi_of_scale(10)
    assert [s for s in range(10) if single[s] != phi_of_scale(10)[s]] in ([2], [7], [2, 7])


@torch.no_grad()
def test_tokens_are_the_nearest_codes_of_what_is_left():
    vae = tiny()
    f = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    tokens, rest = vae.quantize.tokens(f), f
    for scale, (start, stop) in enumerate([(0, 1), (1, 5)]):
        z = rest.mean((2, 3)).view(3, 4, 1, 1) if scale == 0 else rest
        for row in range(3):
            for place, token in enumerate(tokens[row, start:stop].tolist()):
                distance = (vae.quantize.embedding.weight - z[row].flatten(1)[:, place]).square().sum(1)
                assert distance.argmin() == token
        rest = rest - vae.quantize.contribution(vae.quantize.codes(tokens[:, start:stop], scale), scale)


def test_f_hat_is_what_the_inputs_lead_to():
    vae = tiny()
    x = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 1, 0]])
    quantize = vae.quantize
    f_hat = torch.zeros(2, 4, 2, 2)
    f_hat = f_hat + quantize.contribution(quantize.codes(x[:, :1], 0), 0)
    assert_close(quantize.inputs(x), f_hat.flatten(2).transpose(1, 2))  # the next map has full size
    assert_close(quantize.f_hat(x), f_hat + quantize.contribution(quantize.codes(x[:, 1:], 1), 1))


def test_gradients_pass_the_rounding_and_every_parameter_has_one():
    options = {**TINY_VAE, "channel_mult": [1, 1], "patch_nums": [1, 2, 3, 4], "vocabulary": 16}
    vae = Vqvae((1, 8, 8), VqvaeOptions.model_validate(options))
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    found = vae(images)
    (F.mse_loss(found.images, images) + found.loss).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []
    f = torch.randn(2, 4, 4, 4, requires_grad=True)
    f_hat, _, tokens = vae.quantize(f)
    assert_close(f_hat, vae.quantize.f_hat(tokens))
    (direct,) = torch.autograd.grad(f_hat.sum(), f, retain_graph=True)
    assert torch.equal(direct, torch.ones_like(f))


def test_the_quantisation_loss_by_hand():
    vae = tiny()
    f = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1), requires_grad=True)
    _, loss, tokens = vae.quantize(f)
    partial = list(vae.quantize._partial_sums(tokens))
    assert_close(loss, sum(1.25 * (f - f_hat).square().mean() for f_hat in partial) / 2)
    (pull,) = torch.autograd.grad(loss, f)  # of the commitment alone
    assert_close(pull, sum(0.25 * 2 * (f - f_hat) / f.numel() for f_hat in partial) / 2)


def test_images_are_truncated_to_bytes(monkeypatch):
    vae = tiny()
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0, 2 * 77.9 / 255 - 1, 0.5]).view(1, 1, 2, 4)
    monkeypatch.setattr(vae.decoder, "forward", lambda z: values)
    assert vae.decode(torch.zeros(1, 4, 2, 2)).flatten().tolist() == [0, 0, 127, 254, 255, 255, 77, 191]


def test_encoding_and_decoding_stay_in_float32_under_autocast(small):
    items = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = small.encode(items)
    f_hat = small.quantize.f_hat(plain)
    images = small.decode(f_hat)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(small.encode(items), plain)
        assert torch.equal(small.decode(f_hat), images)


def test_full_size_has_the_published_numbers():
    with torch.device("meta"):
        model = Vqvae((3, 256, 256), VqvaeOptions())

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model) == 108_948_355
    assert len(model.state_dict()) == 323
    parts = [count(part) for part in (model.encoder, model.decoder, model.quantize, model.quant_conv)]
    assert parts == [44_107_872, 64_653_923, 168_064, 9_248]
    assert len(model.encoder.state_dict()) == 132
    assert len(model.decoder.state_dict()) == 178


def test_a_file_of_another_tokenizer_is_refused(tmp_path):
    path = tiny_tokenizer(tmp_path / "a.safetensors", TINY_VAE, (3, 4, 4))
    vae = Vqvae((3, 4, 4), VqvaeOptions.model_validate(TINY_VAE))
    load_into(vae, path)
    other = Vqvae((3, 4, 4), VqvaeOptions.model_validate({**TINY_VAE, "vocabulary": 7}))
    with pytest.raises(CheckpointError, match="vocabulary 3 instead of 7"):
        load_into(other, path)


def test_mistakes_are_named():
    for sides in ([2, 3], [1, 3, 3], [1]):
        with pytest.raises(ValidationError, match="grow"):
            VqvaeOptions.model_validate({**SMALL_VAE, "patch_nums": sides})
    with pytest.raises(ValueError, match="64x64"):
        Vqvae((3, 32, 32), VqvaeOptions.model_validate(SMALL_VAE))
    with pytest.raises(ValueError, match="groups = 3"):
        Vqvae((3, 4, 4), VqvaeOptions.model_validate({**TINY_VAE, "groups": 3}))
    assert tokenizers.KIND == "tokenizer"
