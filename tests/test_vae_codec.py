"""Stability's autoencoder as a codec: EDM2's scaling of latents, and what a missing autoencoder says."""

import sys

import numpy as np
import pytest
import torch
from conftest import CPU, TINY_EDM2, tiny_recipe

from ddo_cli import checkpoint
from ddo_cli.data.images import open_images
from ddo_cli.data.items import check_fits
from ddo_cli.engines import encode
from ddo_cli.engines.ddo import finetune
from ddo_cli.errors import CheckpointError, DataError, UsageError
from ddo_cli.models import registry, vae_codec
from ddo_cli.models.vae_codec import EMA_VAE, STABLE, VARIABLE, StabilityCodec
from ddo_cli.rng import RowRng

# As published with EDM2: 0.5 / std, and -mean times that.
CODEC = StabilityCodec((3, 32, 32))
SCALE = [0.11990407, 0.10822511, 0.13477089, 0.15243903]
BIAS = [-0.69664264, -0.3517316, -0.01617251, 0.32774392]


# One round of two steps, scored on as many images as a distance needs.
SHORT = (
    "finetune.rounds=1", "finetune.images_per_round=8", "finetune.eval_every=8", "finetune.num_fake=8",
    "metric={name: fd_embedded, num_images: 8, repeats: 1}",
)  # fmt: skip


def save_vae(path, seed=0, widths=(4, 4, 4, 4)):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    )  # fmt: skip
    vae.save_pretrained(path)
    return vae.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    return path, save_vae(path)


@pytest.fixture
def vae(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(folder[0]))
    return folder[1]


def images(num, side=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_latents_are_mean_and_deviation_of_images_in_0_to_1(vae):
    items = images(11)
    found = CODEC.latents(items)
    expected = vae.encode(items / 255).latent_dist
    assert (found.shape, found.dtype) == ((11, 8, 4, 4), torch.float32)
    # mini-batches of another size sum in another order
    torch.testing.assert_close(found, torch.cat([expected.mean, expected.std], 1), rtol=1e-5, atol=1e-6)
    wrong = vae.encode(items / 127.5 - 1).latent_dist.mean
    assert float((found[:, :4] - wrong).abs().max()) > 0.01


def drawn(codec, latents, *seeds):
    return codec.encode(*codec.prepare(latents, RowRng(seeds)))


def test_x_is_scaled_as_published():
    codec = StabilityCodec((3, 8, 8))
    latents = torch.zeros(2, 8, 1, 1)
    torch.testing.assert_close(codec.encode(latents)[0].flatten(), torch.tensor(BIAS))
    latents[:, :4] = 1
    torch.testing.assert_close(codec.encode(latents)[1].flatten(), torch.tensor(SCALE) + torch.tensor(BIAS))
    latents[:, 4:] = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1)
    eps = RowRng([7, 8]).randn((4, 1, 1))
    expected = (1 + eps * latents[:, 4:]) * torch.tensor(SCALE).view(4, 1, 1) + torch.tensor(BIAS).view(4, 1, 1)
    torch.testing.assert_close(drawn(codec, latents, 7, 8), expected)
    assert torch.equal(drawn(codec, latents.to(torch.float64), 7, 8), drawn(codec, latents, 7, 8))


def test_x_of_imagenet_is_of_mean_0_and_deviation_a_half():
    latents = torch.tensor([5.81, 3.25, 0.12, -2.15, 4.17, 4.62, 3.71, 3.28]).view(1, 8, 1, 1)
    codec = StabilityCodec((3, 8, 8))
    torch.testing.assert_close(codec.encode(latents).flatten(), torch.zeros(4), rtol=0, atol=1e-6)
    eps = RowRng([0]).randn((4, 1, 1))
    torch.testing.assert_close(drawn(codec, latents, 0), 0.5 * eps, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_decoding_cuts_to_0_and_1_and_truncates(vae):
    x = torch.randn(11, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4
    found = CODEC.decode(x)
    raw = (x.float() - torch.tensor(BIAS).view(4, 1, 1)) / torch.tensor(SCALE).view(4, 1, 1)
    pixels = torch.cat([vae.decode(part).sample for part in raw.split(8)])
    assert float(pixels.min()) < 0
    assert (found.shape, found.dtype) == ((11, 3, 32, 32), torch.uint8)
    expected = (pixels.clamp(0, 1) * 255).to(torch.uint8)
    assert (found != expected).float().mean() < 1e-3  # a rounded constant may cross an integer
    assert (found != (pixels.clamp(0, 1) * 255).round().to(torch.uint8)).float().mean() > 0.1


def test_training_in_bf16_does_not_reach_it(vae):
    codec, items = CODEC, images(2)
    expected = codec.latents(items)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.latents(items), expected)
    assert not expected.requires_grad


def test_state_shape():
    assert StabilityCodec((3, 512, 512)).state_shape == (4, 64, 64)
    for shape in ((1, 64, 64), (3, 60, 64), (2,)):
        with pytest.raises(ValueError, match="RGB images"):
            StabilityCodec(shape)


def test_the_identity_is_of_the_encoder(folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    def identity(path):
        monkeypatch.setenv(VARIABLE, str(path))
        return CODEC.encoder_id()

    own = identity(folder[0])
    assert own.startswith("sd-vae:")
    save_vae(tmp_path / "other", seed=1)
    assert identity(tmp_path / "other") != own
    save_vae(tmp_path / "decoder")  # the same encoder
    file = tmp_path / "decoder" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    assert identity(tmp_path / "decoder") == own


def test_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere" / "vae"))
    with pytest.raises(CheckpointError, match=r"holds no autoencoder.*set DDO_VAE"):
        CODEC.latents(images(1))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        CODEC.latents(images(1))
    save_vae(tmp_path / "shallow", widths=(4, 4))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "shallow"))
    with pytest.raises(CheckpointError, match=r"4 channels at 1/2 of the side"):
        CODEC.decode(torch.zeros(1, 4, 4, 4))
    broken = tmp_path / "broken"
    save_vae(broken)
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    monkeypatch.setenv(VARIABLE, str(broken))
    with pytest.raises(CheckpointError, match=r"broken cannot be loaded \(.*DDO_VAE"):
        CODEC.latents(images(1))
    vae_codec._load.cache_clear()
    monkeypatch.setenv(VARIABLE, str(folder[0]))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match="pip install"):
        CODEC.latents(images(1))


def test_pickled_weights_are_not_read(tmp_path, monkeypatch):
    save_vae(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        CODEC.latents(images(1))


def test_edm2_of_latents_learns_from_an_encoded_set(vae, tmp_path):
    """Images and their latents give the same weights, and the autoencoder is in none of the files."""
    options = {**TINY_EDM2, "attn_resolutions": [4], "codec": "sd-vae"}
    config = registry.config_of("edm2-unet", (3, 32, 32), 10, options, {})
    torch.manual_seed(0)
    model = registry.build(config)
    assert model.codec.state_shape == (4, 4, 4)
    assert not [name for name in model.state_dict() if "encoder.conv" in name or "vae" in name]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ckpt = str(tmp_path / "m.safetensors")
    sampling = {"sampler": "heun", "steps": 2, "batch": 8}
    checkpoint.save(
        tmp_path / "m.safetensors",
        model.state_dict(),
        {"kind": "model", "config": config, "sampling": sampling, "provenance": []},
    )
    found = encode.run("embedded:digits32", ckpt, tmp_path / "set", num=64, batch=4, device=CPU)
    assert found["shape"] == [8, 4, 4]
    ref, paths = tmp_path / "ref.npz", []
    np.savez(ref, arr_0=images(16).permute(0, 2, 3, 1).numpy())
    for name, source in (("images", []), ("latents", [f"data.source={tmp_path / 'set'}", "data.num=null"])):
        recipe = tiny_recipe(ckpt, "edm2", *SHORT, f"metric.ref={ref}", *source)
        finetune.run(recipe, tmp_path / name, device=CPU)
        paths.append(tmp_path / name / "round-01" / "checkpoints" / "step-000002.safetensors")
    first, second = (checkpoint.load(path).tensors for path in paths)
    for name in first:
        # Batches of 4 and of 4 rows, whose convolutions sum alike up to rounding.
        np.testing.assert_allclose(first[name].float(), second[name].float(), rtol=1e-3, atol=1e-5, err_msg=name)


# --- DiT's scaling


@torch.no_grad()
def test_stable_diffusions_scaling(vae):
    codec, items = StabilityCodec((3, 32, 32), EMA_VAE, STABLE), images(5)
    expected = vae.encode(items / 127.5 - 1).latent_dist
    found = codec.latents(items)
    torch.testing.assert_close(found, torch.cat([expected.mean, expected.std], 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.encode(found), 0.18215 * found[:, :4])
    eps = RowRng([7, 8]).randn((4, 4, 4))
    torch.testing.assert_close(drawn(codec, found[:2], 7, 8), 0.18215 * (found[:2, :4] + eps * found[:2, 4:]))
    x = codec.encode(found)
    pixels = vae.decode(x / 0.18215).sample
    levels = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
    assert (codec.decode(x) != levels).float().mean() < 1e-3  # a rounded constant may cross an integer
    assert codec.encoder_id() != CODEC.encoder_id(), "the encoder sees another range of pixels"
    assert codec.decoder_id() == CODEC.decoder_id()


def test_each_model_takes_its_decoder_of_a_folder_of_both(tmp_path, monkeypatch, capsys):
    for name in ("sd-vae-ft-mse", "sd-vae-ft-ema"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert vae_codec.place_of(EMA_VAE) == str(tmp_path / "sd-vae-ft-ema")
    assert vae_codec.place_of(vae_codec.DEFAULT_VAE) == str(tmp_path / "sd-vae-ft-mse")
    assert not capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, str(tmp_path / "sd-vae-ft-mse"))
    vae_codec._warn_of.cache_clear()
    assert vae_codec.place_of(EMA_VAE) == str(tmp_path / "sd-vae-ft-mse")
    assert "a folder called sd-vae-ft-mse, and this model's figures are of sd-vae-ft-ema" in capsys.readouterr().err
    assert vae_codec.place_of(vae_codec.DEFAULT_VAE) == str(tmp_path / "sd-vae-ft-mse")
    assert not capsys.readouterr().err


def test_a_set_for_dit_is_no_set_for_edm2(vae, tmp_path):
    """Both have the same autoencoder, and it sees other numbers."""
    options = {"width": 16, "depth": 1, "heads": 2, "precond": "ddpm"}
    config = registry.config_of("dit", (3, 32, 32), 10, options, {})
    model = registry.build(config)
    checkpoint.save(tmp_path / "dit.safetensors", model.state_dict(), {"kind": "model", "config": config})
    found = encode.run("embedded:digits32", tmp_path / "dit.safetensors", tmp_path / "set", num=16, device=CPU)
    assert (found["shape"], found["encoder"]) == ([8, 4, 4], model.codec.encoder_id())
    assert found["encoder"].startswith("sd-vae[-1,1]:")
    assert found["encoder"] != CODEC.encoder_id()
    items = open_images(str(tmp_path / "set"))
    check_fits(items, model)
    edm2 = registry.build(registry.config_of("edm2-unet", (3, 32, 32), 10, {**TINY_EDM2, "codec": "sd-vae"}, {}))
    with pytest.raises(DataError, match="encode"):
        check_fits(items, edm2)
