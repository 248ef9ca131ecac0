"""EDM2's network against numbers that the official code gave for the same weights (CPU, float32); its properties."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed
from conftest import tiny_recipe
from test_edm_unet import stream, uniform
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ddo_cli import checkpoint
from ddo_cli.diffusion.denoiser import DiffusionDraw
from ddo_cli.engines.ddo import finetune
from ddo_cli.models import registry
from ddo_cli.models.edm2 import unet as edm2
from ddo_cli.models.edm2.layers import MPConv, force_norms, mp_cat, mp_silu, mp_sum, normalize
from ddo_cli.models.edm2.published import PUBLISHED
from ddo_cli.models.edm2.unet import Block
from ddo_cli.rng import RowRng

SMALL = {"width": 64, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
TINY = {"width": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "head_width": 8}


def build(shape=(3, 8, 8), num_classes=2, options=TINY, **draw):
    return registry.build(registry.config_of("edm2-unet", shape, num_classes, options, draw)).eval()


def official_name(key):
    return f"unet.{key.removeprefix('net.')}" if key.startswith("net.") else key


def filled(model):
    """The model with every tensor set by a fixed rule, by the order of the official names."""
    own = {official_name(key): tensor for key, tensor in model.state_dict().items()}
    for i, name in enumerate(sorted(own)):
        tensor = own[name]
        u = uniform(i, np.arange(tensor.numel(), dtype=np.uint32))
        if name.endswith("gain"):
            values = 0.5 + u
        elif tensor.ndim >= 2:
            values = (2 * u - 1) * math.sqrt(3 / (tensor.numel() / tensor.shape[0]))
        else:
            values = 8 * (u - 0.5)
        tensor.copy_(torch.from_numpy(values).view(tensor.shape))
    return model


# Mean, standard deviation, first four and last two values
D = (-0.01868041, 1.005494, 0.681932, 0.119518, 0.239553, 1.22808, -0.0584723, 0.155739)
D_WITHOUT_LABELS = (-0.07655597, 0.8420158, 0.404982, 0.528677, 0.591645, 1.30198, 0.142698, -0.00425298)
F = (-0.5055908, 12.57364, 1.36698, -1.68488, -0.375644, 0.579722, -4.50532, -0.667966)
D_XS = (0.1570887, 1.13653, 0.252409, 0.54952, 1.38035, -1.95344, 0.904495, 0.499313)


def check(out, expected):
    """Known to six or seven significant digits."""
    flat = out.flatten()
    found = torch.stack([flat.mean(), flat.std(unbiased=False), *flat[:4], *flat[-2:]])
    print("largest error", (found - torch.tensor(expected)).abs().max().item())
    torch.testing.assert_close(found, torch.tensor(expected), atol=3e-6, rtol=1e-5)


def small_case():
    sigma = torch.tensor([0.5, 20.0])
    return stream(0, 2, 4, 16, 16) * (1 + sigma)[:, None, None, None], sigma, torch.tensor([3, 7])


@torch.no_grad()
def test_outputs_equal_the_official_ones():
    model = filled(build((4, 16, 16), 10, SMALL))
    names = sorted(map(official_name, model.state_dict()))
    assert (len(names), names[0], names[-1]) == (63, "logvar_fourier.freqs", "unet.out_gain")
    x, sigma, label = small_case()
    check(model.denoise(x, sigma, label), D)
    check(model.denoise(x, sigma, torch.full_like(label, -1)), D_WITHOUT_LABELS)
    check(model.net(x, torch.tensor([0.1, -0.2]), label), F)
    torch.testing.assert_close(model.log_variance(sigma), torch.tensor([1.2148308, -0.0398074]), atol=1e-6, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_output_of_a_published_size_equals_the_official_one():
    model = filled(registry.build(registry.config_of(*PUBLISHED["edm2-img512-xs"].config)).eval())
    x = 1.5 * stream(4, 1, 4, 64, 64)
    check(model.denoise(x, torch.tensor([0.5]), torch.tensor([207])), D_XS)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and names, without weights

PARAMETERS = {
    "edm2-img512-xxs": 31_309_029,
    "edm2-img512-xs": 124_713_253,
    "edm2-img512-s": 280_212_837,
    "edm2-img512-m": 497_807_781,
    "edm2-img512-l": 777_498_085,
    "edm2-img512-xl": 1_119_283_749,
    "edm2-img512-xxl": 1_523_164_773,
    "edm2-img512-xs-uncond": 124_201_253,
    "edm2-img512-s-uncond": 279_444_837,
    "edm2-img64-xs": 124_710_949,
    "edm2-img64-s": 280_209_381,
    "edm2-img64-m": 497_803_173,
    "edm2-img64-l": 777_492_325,
    "edm2-img64-xl": 1_119_276_837,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_the_published_networks(name):
    entry = PUBLISHED[name]
    with torch.device("meta"):
        model = registry.build(registry.config_of(*entry.config))
    is_conditional = not name.endswith("uncond")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert len(model.state_dict()) == 202 + is_conditional
    assert len(list(model.parameters())) == 198 + is_conditional
    assert sum(b.numel() for b in model.buffers()) == 2 * entry.width + 256
    assert model.codec.state_shape == ((4, 64, 64) if "img512" in name else (3, 64, 64))
    assert [type(unit) for unit in model.units()] == [Block] * 36  # 15 down, 21 up


def test_every_published_network_has_its_counts():
    assert PUBLISHED.keys() == PARAMETERS.keys()


def test_names_are_the_published_ones():
    with torch.device("meta"):
        model = registry.build(registry.config_of(*PUBLISHED["edm2-img512-xs"].config))
    shapes = {official_name(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = {
        "unet.out_gain": (1,),
        "unet.emb_fourier.freqs": (128,),
        "unet.emb_noise.weight": (512, 128),
        "unet.emb_label.weight": (512, 1000),
        "unet.enc.64x64_conv.weight": (128, 5, 3, 3),
        "unet.enc.32x32_down.conv_res0.weight": (128, 128, 3, 3),
        "unet.enc.32x32_block0.conv_skip.weight": (256, 128, 1, 1),
        "unet.enc.16x16_block0.conv_res0.weight": (384, 384, 3, 3),
        "unet.enc.16x16_block2.attn_qkv.weight": (1152, 384, 1, 1),
        "unet.dec.8x8_in0.attn_proj.weight": (512, 512, 1, 1),
        "unet.dec.8x8_block3.conv_res0.weight": (512, 896, 3, 3),
        "unet.dec.16x16_up.emb_linear.weight": (512, 512),
        "unet.dec.64x64_block0.conv_skip.weight": (128, 384, 1, 1),
        "unet.dec.64x64_block3.conv_res0.weight": (128, 256, 3, 3),
        "unet.out_conv.weight": (4, 128, 3, 3),
        "logvar_linear.weight": (1, 128),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    for absent in ("enc.32x32_down.conv_skip.weight", "dec.8x8_in1.attn_qkv.weight", "enc.8x8_down.attn_qkv.weight"):
        assert f"unet.{absent}" not in shapes


# ---------------------------------------------------------------------------------------------------------------------
# Magnitude-preserving pieces, by hand


def test_normalize_adds_its_eps_to_the_root_mean_square():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # rms of the first row: sqrt(12.5)
    torch.testing.assert_close(normalize(x)[0], x[0] / (math.sqrt(12.5) + 1e-4))
    assert not normalize(x)[1].any()
    tiny = torch.full((1, 4), 1e-4)
    torch.testing.assert_close(normalize(tiny), torch.full((1, 4), 0.5))  # inside the root it would be 0.01
    assert normalize(torch.ones(2, 3, 4), 1).shape == (2, 3, 4)


def test_sums_keep_magnitudes():
    torch.testing.assert_close(mp_sum(torch.ones(1), torch.zeros(1), 0.3).item(), 0.91914503)
    torch.testing.assert_close(mp_sum(torch.zeros(1), torch.ones(1), 0.3).item(), 0.39391930)
    joined = mp_cat(torch.ones(1, 512, 1, 1), torch.ones(1, 384, 1, 1)).flatten()
    torch.testing.assert_close(joined[[0, 511, 512, 895]], torch.tensor([0.93541435] * 2 + [1.08012345] * 2))
    torch.testing.assert_close(mp_silu(torch.ones(1)).item(), 1 / (1 + math.exp(-1)) / 0.596)


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_filters_have_the_norm_that_is_asked_for(kernel):
    torch.manual_seed(0)
    layer = MPConv(5, 4, kernel)
    x = torch.randn(2, 5) if kernel is None else torch.randn(2, 5, 6, 6)
    out = layer(x, 2.0)
    norms = layer.weight.detach().flatten(1).norm(dim=1)
    filters = 2 * layer.weight.detach() / norms.view(-1, *[1] * (layer.weight.ndim - 1))
    plain = x @ filters.T if kernel is None else torch.nn.functional.conv2d(x, filters, padding=kernel // 2)
    torch.testing.assert_close(out, plain, atol=1e-3, rtol=1e-3)  # up to eps = 1e-4 of each filter's rms
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 2, 30, 400]).view(-1, *[1] * (layer.weight.ndim - 1)))
    torch.testing.assert_close(layer(x, 2.0), out, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Behaviour


def perturbed(num_classes=2, options=TINY, **draw):
    """No gain stays at its zero initialisation."""
    torch.manual_seed(0)
    model = build((3, 8, 8), num_classes, options, **draw)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def test_a_new_network_estimates_zero():
    torch.manual_seed(0)
    model = build()
    assert not model.net(stream(0, 2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 1])).any()


@torch.no_grad()
def test_labels_change_the_output_of_a_conditional_network_only():
    x, c_noise = stream(0, 3, 3, 8, 8), torch.zeros(3)
    labels, none = torch.tensor([0, 1, -1]), torch.full((3,), -1)
    net = perturbed().net
    differs = (net(x, c_noise, labels) - net(x, c_noise, none)).abs().amax((1, 2, 3))
    assert (differs > 1e-3).tolist() == [True, True, False]
    net = perturbed(0).net
    assert torch.equal(net(x, c_noise, labels), net(x, c_noise, none))


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    net = perturbed().net
    x, c_noise, label = stream(0, 3, 3, 8, 8), torch.tensor([0.1, -0.2, 0.5]), torch.tensor([0, 1, -1])
    alone = torch.cat([net(x[i : i + 1], c_noise[i : i + 1], label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, c_noise, label), alone, atol=1e-5, rtol=1e-4)  # other kernels, float32


@torch.no_grad()
def test_dropout_acts_in_training_only():
    model = perturbed(0, {**TINY, "dropout": 0.5})
    x, sigma, label = stream(0, 2, 3, 8, 8), torch.ones(2), torch.full((2,), -1)
    assert torch.equal(model.denoise(x, sigma, label), model.denoise(x, sigma, label))
    model.train()
    assert not torch.equal(model.denoise(x, sigma, label), model.denoise(x, sigma, label))


@torch.no_grad()
def test_activations_are_clipped():
    model = perturbed()
    for unit in model.units():
        assert unit(1e6 * torch.ones(1, _in_width(unit), 8, 8), torch.ones(1, 16)).abs().max() <= 256
    last = model.units()[-1]
    assert last(1e6 * torch.ones(1, _in_width(last), 8, 8), torch.ones(1, 16)).abs().max() == 256


def _in_width(unit):
    layer = unit.conv_res0 if unit.conv_skip is None else unit.conv_skip
    return layer.weight.shape[1]


@torch.no_grad()
def test_half_precision_stays_near():
    model = perturbed()
    x, sigma, label = stream(0, 2, 3, 8, 8), torch.tensor([0.1, 3.0]), torch.tensor([0, 1])
    exact = model.denoise(x, sigma, label)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.denoise(x, sigma, label)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()  # bf16 has 8 bits


@pytest.mark.parametrize(
    ("shape", "options", "problem"),
    [
        ((3, 10, 10), {"channel_mult": [1, 1, 1]}, "multiple of"),
        ((3, 8, 16), {}, "square"),
        ((3, 8, 8), {**TINY, "head_width": 5}, "multiple of head_width = 5"),
        ((3, 60, 60), {"codec": "sd-vae"}, "sides that 8 divides"),
        ((3, 8, 8), {"head_widht": 8}, "did you mean 'head_width'"),
    ],
)
def test_impossible_networks_are_named(shape, options, problem):
    with pytest.raises(registry.RecipeError, match=problem):
        registry.build(registry.config_of("edm2-unet", shape, 0, options, {}))


def test_latents_are_a_quarter_of_a_hundredth():
    model = registry.build(registry.config_of("edm2-unet", (3, 64, 64), 2, {**TINY, "codec": "sd-vae"}, {}))
    assert model.codec.state_shape == (4, 8, 8)
    assert model.codec.latent_shapes == ((8, 8, 8), (4, 8, 8))
    assert model.codec.fake_as == "latents"
    draw = model.draw(2, RowRng([0, 1]))
    assert model.predict(torch.zeros(2, 4, 8, 8), torch.tensor([0, 1]), draw).shape == (2, 4, 8, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Uncertainty


def estimate():
    x, label = 0.5 * stream(0, 2, 3, 8, 8), torch.tensor([0, 1])
    draw = DiffusionDraw(torch.tensor([0.2, 3.0]), stream(1, 2, 3, 8, 8), torch.zeros(2, dtype=torch.bool))
    return x, label, draw


def test_uncertainty_weighs_the_plain_likelihood():
    x, label, draw = estimate()
    model = perturbed(uncertainty=True)
    denoised = model.predict(x, label, draw)
    expected = []
    for row, sigma in enumerate(draw.sigma.tolist()):
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        features = math.sqrt(2) * (math.log(sigma) / 4 * model.logvar_fourier.freqs + model.logvar_fourier.phases).cos()
        u = (features @ model.logvar_linear.weight[0] / model.logvar_linear.weight.norm()).item()
        errors = (denoised[row] - x[row]).flatten().tolist()
        expected.append(-sum(weight / math.exp(u) * error**2 + u for error in errors))
    torch.testing.assert_close(model(x, label, draw), torch.tensor(expected), rtol=1e-3, atol=0.1)  # eps of the filter
    plain = perturbed()
    torch.testing.assert_close(plain(x, label, draw), plain.log_lik(denoised, x, draw))
    assert not torch.allclose(model(x, label, draw), plain(x, label, draw), rtol=0.01)


@pytest.mark.parametrize("uncertainty", [False, True])
@pytest.mark.parametrize("has_ref", [False, True])
def test_every_trained_parameter_has_a_gradient(uncertainty, has_ref):
    x, label, draw = estimate()
    model = perturbed(uncertainty=uncertainty)
    ref = model.predict(x, label, draw).detach() if has_ref else None
    model(x, label, draw, ref).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert ("logvar_linear.weight" in trained) == uncertainty
    if uncertainty:
        assert bool(model.logvar_linear.weight.grad.any()) == (not has_ref)


def test_the_ratio_knows_no_uncertainty():
    x, label, draw = estimate()
    ref = perturbed().predict(x + 0.1, label, draw)
    assert torch.equal(perturbed(uncertainty=True)(x, label, draw, ref), perturbed()(x, label, draw, ref))


# ---------------------------------------------------------------------------------------------------------------------
# Forced weight normalisation


@torch.no_grad()
def test_before_a_step_every_trained_filter_has_unit_magnitude():
    model = perturbed()
    x, label, draw = estimate()
    before = model.predict(x, label, draw)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(7)
    head = model.logvar_linear.weight.clone()  # frozen, since the draw options do not ask for it
    model.before_step()
    assert torch.equal(model.logvar_linear.weight, head)
    once = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name, tensor in once.items():
        if name.startswith("net.") and name.endswith("weight"):
            rms = tensor.flatten(1).square().mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), atol=2e-4, rtol=0)
    torch.testing.assert_close(model.predict(x, label, draw), before, atol=2e-3, rtol=2e-3)  # eps of each layer
    model.before_step()
    torch.testing.assert_close(model.state_dict(), once, atol=2e-4, rtol=2e-4)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_shards_are_normalized_where_they_lie(mesh):
    layer = MPConv(3, 4, 3)
    expected = normalize(7 * layer.weight.detach())
    layer.weight = torch.nn.Parameter(distribute_tensor(7 * layer.weight.detach(), mesh, [Shard(0)]))
    force_norms([layer])
    assert torch.equal(layer.weight.to_local(), expected)
    layer.weight = torch.nn.Parameter(torch.zeros(0, 3, 3, 3))  # a process with no row of a small layer
    force_norms([layer])


def test_ddo_starts_at_a_ratio_of_zero(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = registry.config_of("edm2-unet", (3, 32, 32), 10, {**TINY, "attn_resolutions": [16]}, {})
    model = registry.build(config)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 0.3)
        elif parameter.ndim > 1:
            parameter.data.mul_(0.5)  # an average of weights is shorter than they are
    ckpt = tmp_path / "tiny.safetensors"
    sampling = {"sampler": "euler", "steps": 2}
    checkpoint.save(
        ckpt, model.state_dict(), {"kind": "model", "config": config, "sampling": sampling, "provenance": []}
    )
    forced = []
    monkeypatch.setattr(edm2, "force_norms", lambda layers: (forced.append(len(layers)), force_norms(layers)))
    recipe = tiny_recipe(
        str(ckpt), "diffusion", "finetune.rounds=1", "finetune.log_every=1", "finetune.images_per_round=8",
        "finetune.eval_every=8", "finetune.max_denoising_ratio=1000", "metric.repeats=1",
    )  # fmt: skip
    out = tmp_path / "run"
    finetune.run(recipe, out, device=torch.device("cpu"))
    first, second = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][:2]
    assert first["r_real"] == first["r_fake"] == 0
    assert second["r_real"] != 0
    layers = sum(isinstance(module, MPConv) and module.weight.requires_grad for module in model.modules())
    assert forced == [layers] * (1 + 2)  # the reference once, the model before each of two steps
