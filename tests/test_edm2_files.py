"""EDM2's pickles, written here in the layout of the published ones; none of them is trusted."""

import contextlib
import os

import numpy as np
import pytest
import torch
from test_edm2_unet import SMALL, check, filled, official_name, small_case
from test_edm2_unet import build as build_model
from test_foreign import Reduced, official, persistent, write  # noqa: F401
from test_hostile import refused

from ddo_cli import checkpoint
from ddo_cli.engines.weights import convert, export
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models import registry, snapshots
from ddo_cli.models.edm2 import files as edm2_files
from ddo_cli.models.edm2.published import PUBLISHED

OWN = {"width": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "head_width": 8}
THEIRS = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8}
D_OF_HALF = (-0.01888748, 1.005379, 0.68184, 0.119628, 0.238865, 1.22801, -0.0585082, 0.155281)
# As the published files have them, written down here apart from the program's own
SCALE = np.float32([0.11990407, 0.10822511, 0.13477089, 0.15243903])
BIAS = np.float32([-0.69664264, -0.3517316, -0.01617251, 0.32774392])
VAE = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": SCALE, "bias": BIAS, "batch_size": 8, "_vae": None}


def random_model(shape=(3, 8, 8), num_classes=2, **options):
    torch.manual_seed(0)
    model = build_model(shape, num_classes, {**OWN, **options})
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def stored_tensors(model, dtype=torch.float32):
    """Official names and tensors: gains are single numbers there."""
    tensors = {official_name(key): tensor for key, tensor in model.state_dict().items()}
    return {
        key: (tensor.reshape(()) if key.endswith("gain") else tensor).to(dtype).clone()
        for key, tensor in tensors.items()
    }


def module(official, class_name, tensors, **attributes):  # noqa: F811
    """A module as EDM2 stores it; its tensors are named by their dotted paths below it."""
    here = {name: tensor for name, tensor in tensors.items() if "." not in name}
    below = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = tensor
    buffers = {name: tensor for name, tensor in here.items() if name in ("freqs", "phases")}
    children = {}
    for name, inside in below.items():
        if name in ("enc", "dec"):
            blocks = {}
            for key, tensor in inside.items():
                head, _, rest = key.partition(".")
                blocks.setdefault(head, {})[rest] = tensor
            children[name] = torch.nn.ModuleDict()
            children[name]._modules.update({key: module(official, "Block", block) for key, block in blocks.items()})
        else:
            kind = "MPFourier" if "fourier" in name else "UNet" if name == "unet" else "MPConv"
            children[name] = module(official, kind, inside)
    return persistent(
        official,
        class_name,
        training=False,
        _parameters={
            name: torch.nn.Parameter(tensor, requires_grad=False)
            for name, tensor in here.items()
            if name not in buffers
        },
        _buffers=buffers,
        _non_persistent_buffers_set=set(),
        _modules=children,
        conv_skip=None,
        _init_args=(),
        **attributes,
    )


def snapshot(
    official,  # noqa: F811
    tensors,
    side=8,
    channels=3,
    classes=2,
    encoder="StandardRGBEncoder",
    given=THEIRS,
    class_name="Precond",
    encoder_state=None,
    **changes,
):
    arguments = {"img_resolution": side, "img_channels": channels, "label_dim": classes, "dropout": 0.1, **given}
    ema = module(
        official,
        class_name,
        tensors,
        img_resolution=side,
        img_channels=channels,
        label_dim=classes,
        **{"use_fp16": True, "sigma_data": 0.5, **changes},
        _init_kwargs=official.easy_dict({**arguments, "use_fp16": True}),
    )
    state = {"_init_args": (), "_init_kwargs": official.easy_dict(), **(encoder_state or {})}
    return official.easy_dict(
        encoder=encoder and persistent(official, encoder, **state),
        dataset_kwargs=official.easy_dict(path="x.zip", use_labels=True),
        loss_fn=persistent(official, "EDM2Loss", P_mean=-0.8, P_std=1.6, sigma_data=0.5),
        ema=ema,
    )


def read(path):
    return edm2_files.read(path, snapshots.open_snapshot(path))


def converted(path):
    """The model and the header of the file that `ddo convert` makes of it."""
    out = path.with_suffix(".safetensors")
    convert.run(path, out, verify=True)
    return registry.load_model(out, torch.device("cpu")).model, checkpoint.read_header(out)


# ---------------------------------------------------------------------------------------------------------------------
# Honest files


@pytest.mark.parametrize("num_classes", [0, 2])
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_network_comes_back_bit_for_bit(official, tmp_path, num_classes, protocol):  # noqa: F811
    model = random_model(num_classes=num_classes)
    content = snapshot(official, stored_tensors(model), classes=num_classes)
    rebuilt, header = converted(write(tmp_path / "edm2.pkl", content, protocol))
    own = model.state_dict()
    assert list(rebuilt.state_dict()) == list(own)
    assert all(torch.equal(tensor, own[key]) for key, tensor in rebuilt.state_dict().items())
    assert header["config"]["shape"] == [3, 8, 8]
    assert header["config"]["num_classes"] == num_classes
    assert header["config"]["options"]["dropout"] == 0
    assert header["sampling"] == {"sampler": "heun", "steps": 32, "dtype": "float32"}
    assert "ema" not in header


@torch.no_grad()
def test_half_precision_files_are_evaluated_as_published(official, tmp_path):  # noqa: F811
    given = {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
    stored = stored_tensors(filled(build_model((4, 16, 16), 10, SMALL)), torch.float16)
    content = snapshot(official, stored, 16, 4, 10, encoder=None, given=given)
    rebuilt, header = converted(write(tmp_path / "edm2.pkl", content))
    x, sigma, label = small_case()
    check(rebuilt.denoise(x, sigma, label), D_OF_HALF)
    torch.testing.assert_close(rebuilt.log_variance(sigma), torch.tensor([1.2147226, -0.0398835]), atol=1e-6, rtol=0)

    upcast = registry.build(header["config"]).eval()  # the stored gains as they are
    upcast.load_state_dict(
        {key: stored[official_name(key)].float().view(t.shape) for key, t in rebuilt.state_dict().items()}
    )
    with pytest.raises(AssertionError):
        check(upcast.denoise(x, sigma, label), D_OF_HALF)


def test_latents_are_converted_with_their_image_side(official, tmp_path):  # noqa: F811
    model = random_model((3, 64, 64), codec="sd-vae")
    content = snapshot(official, stored_tensors(model), 8, 4, encoder="StabilityVAEEncoder", encoder_state=VAE)
    path = write(tmp_path / "edm2-img512-xs-2147483-0.135.pkl", content)
    rebuilt, header = converted(path)
    assert header["config"]["shape"] == [3, 64, 64]
    assert header["config"]["options"]["codec"] == "sd-vae"
    assert rebuilt.codec.state_shape == (4, 8, 8)
    assert header["ema"] == {"std": 0.135, "images": 2**31}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("edm2-img512-xs-2147483-0.135.pkl", {"std": 0.135, "images": 2048 * 2**20}),
        ("edm2-img64-l-uncond-1879048-0.015.pkl", {"std": 0.015, "images": 1792 * 2**20}),
        ("edm2-img512-xs-0134217-0.125.pkl", {"std": 0.125, "images": 128 * 2**20}),
        ("network-snapshot-0268435-0.050.pkl", {"std": 0.05, "images": 256 * 2**20}),
        ("edm2-img64-s-ddo.pkl", None),
        ("edm2-img512-xs-2147483.pkl", None),
    ],
)
def test_a_name_tells_the_average(name, expected):
    assert edm2_files.ema_of(name) == expected


def test_published_sizes_are_recognised():
    for name, entry in PUBLISHED.items():
        config = registry.config_of(*entry.config)
        assert edm2_files.published_as({**config, "draw": {}}) == name
    assert edm2_files.published_as(registry.config_of("edm2-unet", (3, 64, 64), 1000, {"width": 200}, {})) is None


# ---------------------------------------------------------------------------------------------------------------------
# Files that do not fit, or mean harm


def drop(tensors):
    del tensors["unet.enc.8x8_block0.conv_res0.weight"]


def reshape(tensors):
    tensors["unet.out_conv.weight"] = torch.zeros(3, 8, 1, 1)


def twice(tensors):
    tensors["net.out_conv.weight"] = torch.zeros(3, 8, 3, 3)


def whole_numbers(tensors):
    tensors["logvar_linear.weight"] = torch.zeros(1, 128, dtype=torch.int32)


def stretch(tensors):
    tensors["unet.emb_noise.weight"] = torch.zeros(1, 1).expand(2**20, 2**20)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop, r"missing unet\.enc\.8x8_block0\.conv_res0\.weight"),
        (reshape, r"unet\.out_conv\.weight of shape \(3, 8, 1, 1\) instead of \(3, 8, 3, 3\)"),
        (twice, r"unexpected net\.out_conv\.weight"),
        (whole_numbers, "floating-point"),
        (stretch, "beyond its storage"),
    ],
)
def test_tensors_that_do_not_fit_are_named(official, tmp_path, change, problem):  # noqa: F811
    tensors = stored_tensors(random_model())
    change(tensors)
    refused(write(tmp_path / "a.pkl", snapshot(official, tensors)), problem, read)


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"given": {**THEIRS, "res_balance": 0.5}}, r"res_balance = 0\.5 of its UNet; every published file has 0\.3"),
        ({"given": {**THEIRS, "channel_mult_emb": 8}}, "channel_mult_emb = 8"),
        ({"given": {**THEIRS, "clip_act": None}}, "clip_act = None"),
        ({"given": {**THEIRS, "colour": 1}}, "not known: colour"),
        ({"given": {**THEIRS, "num_blocks": 10**9}}, "blocks"),
        ({"given": {**THEIRS, "num_blocks": 20}}, "too few"),
        ({"given": {**THEIRS, "model_channels": 2**62}}, "does not fit"),
        ({"given": {**THEIRS, "channels_per_head": 7}}, "multiple of head_width"),
        ({"given": {**THEIRS, "channel_mult": [1, [2]]}}, "channel_mult"),
        ({"sigma_data": "0.5"}, "sigma_data is not a number"),
        ({"sigma_data": -1}, "sigma_data"),
        ({"side": 2**40}, "out of range"),
        ({"classes": -1}, "out of range"),
        ({"encoder": "WaveletEncoder"}, "draws with a WaveletEncoder"),
        ({"encoder": "StabilityVAEEncoder", "encoder_state": VAE}, "3 channels and its autoencoder 4"),
        (
            {"encoder": "StabilityVAEEncoder", "encoder_state": {**VAE, "vae_name": "evil/vae"}},
            "autoencoder is 'evil/vae'",
        ),
        ({"encoder": "StabilityVAEEncoder", "encoder_state": {**VAE, "vae_name": ["x"]}}, "autoencoder has no name"),
        (
            {"encoder": "StabilityVAEEncoder", "encoder_state": {**VAE, "scale": SCALE * 1.001}},
            "the scale of its latents",
        ),
        ({"encoder": "StabilityVAEEncoder", "encoder_state": {**VAE, "bias": BIAS[:3]}}, "the bias of its latents"),
        ({"encoder": "StabilityVAEEncoder", "encoder_state": {**VAE, "bias": 0}}, "the bias of its latents"),
        ({"encoder": "StabilityVAEEncoder"}, "does not fit its description"),
    ],
)
def test_networks_that_are_not_known_are_named(official, tmp_path, kwargs, problem):  # noqa: F811
    path = write(tmp_path / "a.pkl", snapshot(official, stored_tensors(random_model()), **kwargs))
    refused(path, problem, read)


def test_code_in_a_file_is_refused_and_not_run(official, tmp_path):  # noqa: F811
    content = snapshot(official, stored_tensors(random_model()))
    content["encoder"] = Reduced(os.system, f"touch {official.marker}")
    path = write(tmp_path / "a.pkl", content)
    refused(path, "system", lambda path: convert.run(path, tmp_path / "a.safetensors"))
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_damaged_files_are_refused(official, tmp_path):  # noqa: F811
    content = snapshot(official, stored_tensors(random_model()))
    raw = write(tmp_path / "whole.pkl", content).read_bytes()
    for length in range(0, len(raw), len(raw) // 10):
        refused(write(tmp_path / "cut.pkl", raw[:length]), "not a whole pickle", read)
    rng = np.random.default_rng(0)
    for _ in range(20):
        damaged = bytearray(raw)
        for place in rng.integers(len(raw), size=3):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(CheckpointError):  # most of a file is numbers, of which any is as good as another
            read(write(tmp_path / "damaged.pkl", bytes(damaged)))


def test_export_names_what_it_cannot_write(official, tmp_path):  # noqa: F811
    path = write(tmp_path / "a.pkl", snapshot(official, stored_tensors(random_model())))
    converted(path)
    with pytest.raises(UsageError, match="file of EDM2, which can be converted but not written"):
        export.run(str(path.with_suffix(".safetensors")), tmp_path / "b.pkl", like=path)


def test_a_precond_around_another_network_is_named(official, tmp_path):  # noqa: F811
    tensors = {key.replace("unet.", "unet2."): tensor for key, tensor in stored_tensors(random_model()).items()}
    refused(write(tmp_path / "a.pkl", snapshot(official, tensors)), "does not fit its description.*unet", read)
    path = write(tmp_path / "b.pkl", snapshot(official, stored_tensors(random_model()), class_name="EDMPrecond"))
    with pytest.raises(CheckpointError, match=r"does not fit|can be converted"):
        convert.run(path, tmp_path / "b.safetensors")
