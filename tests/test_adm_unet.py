"""ADM's U-Net against numbers that both official programs gave for the same weights (CPU, float32), and its behaviour.

Origin: openai/guided-diffusion at 22e0df8 (weights by `fill`), NVlabs/edm (weights by `uniform`).
"""

import pytest
import torch
from test_adm_encoder import GOLDEN, filled, given, table_of
from test_edm_unet import check, stream, uniform
from torch.testing import assert_close

from ddo_cli.errors import RecipeError
from ddo_cli.models import registry
from ddo_cli.models.adm.keys import EdmKeys, from_openai
from ddo_cli.models.adm.unet import AdmUnet, AdmUnetOptions
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

TINY = {"width": 32, "channel_mult": (1, 2), "num_blocks": 1, "attention": (8,), "num_head_channels": 16}


def unet(options, in_channels=3, out_channels=3, size=64, num_classes=0) -> AdmUnet:
    return AdmUnet(in_channels, out_channels, size, num_classes, AdmUnetOptions(**options))


def tiny(in_channels=3, out_channels=6, num_classes=10, **more) -> AdmUnet:
    return unet({**TINY, **more}, in_channels, out_channels, 16, num_classes)


def build(side, num_classes, options):
    return registry.build(registry.config_of("adm-unet", (3, side, side), num_classes, options, {})).eval()


def perturbed(num_classes=10, side=16, **options):
    torch.manual_seed(0)
    model = build(side, num_classes, {**TINY, **options})
    for parameter in model.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Values


# mean and deviation, four values of the first row's first channel, four of the second row's last
LEGACY = (
    (-0.0092966, 0.5717131),
    (-0.268234, -0.150428, 0.055760, -0.111559),
    (-0.648406, -0.345469, -0.661628, 0.016669),
)
NEW = (
    (-0.0103877, 0.5579679),
    (-0.246506, -0.181303, -0.088422, -0.333760),
    (-0.464790, -0.036158, -0.526298, -0.080250),
)


@torch.no_grad()
def test_outputs_equal_openai_s_in_both_orders_of_channels():
    net = filled(tiny).eval()
    assert table_of(net) == (145, 829_638, "0549b86fa0b145d8")
    x, t, label = given(2, 3, 16, 16), torch.tensor([3.0, 700.0]), torch.tensor([1, 8])
    assert_golden(net(x, t, label), *LEGACY)
    options = AdmUnetOptions(**TINY)
    state = dict(from_openai(key, tensor, "new", options) for key, tensor in net.state_dict().items())
    net.load_state_dict({key.removeprefix("net."): tensor for key, tensor in state.items()})
    assert_golden(net(x, t, label), *NEW)


# updown, scale_shift, heads -> keys, parameters, digest; as above
OTHER_BLOCKS = {
    (False, True, 4): (
        (129, 758_310, "f4fc106b4246f365"),
        (-0.0095692, 0.5728679),
        (0.029543, -0.157616, -0.042459, -0.059131),
        (-0.397782, -0.350452, -0.591048, -0.157810),
    ),
    (True, False, 2): (
        (145, 763_590, "f4aca1b0736e6529"),
        (-0.0100549, 0.5772560),
        (-0.119023, 0.191423, 0.194219, -0.088569),
        (-0.854146, -0.342456, -0.576208, 0.140110),
    ),
    (False, False, 4): (
        (129, 704_646, "7babcf614df9577a"),
        (-0.0115600, 0.5745989),
        (0.139231, -0.186202, -0.145529, -0.146988),
        (-0.268935, -0.370763, -0.634722, -0.093693),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHER_BLOCKS)
def test_outputs_equal_openai_s_with_other_blocks(kind):
    updown, scale_shift, heads = kind
    net = filled(lambda: tiny(updown=updown, scale_shift=scale_shift, num_heads=heads)).eval()
    table, *values = OTHER_BLOCKS[kind]
    assert table_of(net) == table
    assert_golden(net(given(2, 3, 16, 16), torch.tensor([3.0, 700.0]), torch.tensor([1, 8])), *values)


def assert_golden(out, moments, first, last):
    assert_close(torch.stack([out.mean(), out.std(correction=0)]), torch.tensor(moments), **GOLDEN)
    assert_close(out[0, 0, 0, :4], torch.tensor(first), **GOLDEN)
    assert_close(out[1, 5, 15, 12:], torch.tensor(last), **GOLDEN)


EDM_SMALL = {"width": 64, "channel_mult": (1, 2), "num_blocks": 1, "attention": (8,), "group_channels": 4}
EDM_D = (-0.01325404, 0.575021, 0.74664, 0.26222, 0.214141, -0.831941, 0.337025, 0.013743)
EDM_F = (-0.03651521, 0.5713008, 0.0826611, 0.0788722, 0.559906, 0.136385, 1.06938, 0.191146)


EDM_ODD = {"width": 32, "channel_mult": (1, 3), "num_blocks": 1, "attention": (8,), "group_channels": 4}
ODD_D = (0.02727461, 0.5524469, 0.639278, 0.0807198, 0.118347, -0.786199, 0.120023, 0.021538)
ODD_F = (-0.01727815, 0.5918161, -0.278143, -0.471279, 0.0162508, 0.142092, -0.217984, 0.473609)


def filled_edm(options):
    """A model whose tensors are set by their place among the sorted official names."""
    model = build(16, 10, options)
    keys = EdmKeys(16, model.options)
    official = dict(keys.to_edm(key, tensor) for key, tensor in model.state_dict().items())
    state = {}
    for i, name in enumerate(sorted(official)):
        shape = official[name].shape
        u = torch.from_numpy(uniform(i, torch.arange(shape.numel()).numpy().astype("uint32"))).view(shape)
        if len(shape) >= 2:
            values = (2 * u - 1) * (3 / (shape.numel() / shape[0])) ** 0.5
        else:
            values = 0.4 * (u - 0.5) + name.endswith(".weight")
        ours, tensor = keys.from_edm(name, values.float())
        state[ours] = tensor
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_outputs_equal_edm_s():
    model = filled_edm(EDM_SMALL)
    assert len(model.state_dict()) == 145
    sigma, label = torch.tensor([0.5, 20.0]), torch.tensor([3, 7])
    x = stream(2, 2, 3, 16, 16) * (1 + sigma)[:, None, None, None]
    check(model.denoise(x, sigma, label), EDM_D)
    check(model.net(x, torch.tensor([0.1, -0.2]), label), EDM_F)
    other_groups = filled_edm({**EDM_SMALL, "group_channels": 1})
    with pytest.raises(AssertionError):
        check(other_groups.denoise(x, sigma, label), EDM_D)


@torch.no_grad()
def test_outputs_equal_edm_s_where_64_does_not_divide_the_channels():
    """96 channels attend, in one head."""
    model = filled_edm(EDM_ODD)
    sigma, label = torch.tensor([0.5, 20.0]), torch.tensor([3, 7])
    x = stream(2, 2, 3, 16, 16) * (1 + sigma)[:, None, None, None]
    check(model.denoise(x, sigma, label), ODD_D)
    check(model.net(x, torch.tensor([0.1, -0.2]), label), ODD_F)
    with pytest.raises(AssertionError):
        check(filled_edm({**EDM_ODD, "num_heads": 3}).denoise(x, sigma, label), ODD_D)


# ---------------------------------------------------------------------------------------------------------------------
# Behaviour


@torch.no_grad()
def test_attention_is_at_the_sides_that_are_named():
    attending = {
        sides: [name for name in build(16, 0, {**TINY, "attention": sides}).state_dict() if name.endswith(".qkv.bias")]
        for sides in ((), (16,), (8,), (32, 24, 9))
    }
    middle = "net.middle_block.1.qkv.bias"
    assert attending[()] == attending[32, 24, 9] == [middle]
    outputs = [f"net.output_blocks.{i}.1.qkv.bias" for i in range(4)]
    assert attending[16,] == ["net.input_blocks.1.1.qkv.bias", middle, *outputs[2:]]
    assert attending[8,] == ["net.input_blocks.3.1.qkv.bias", middle, *outputs[:2]]


@torch.no_grad()
def test_labels_change_the_output_of_a_conditional_network_only():
    x, c_noise = stream(0, 3, 3, 16, 16), torch.zeros(3)
    labels, none = torch.tensor([0, 9, -1]), torch.full((3,), -1)
    net = perturbed().net
    differs = (net(x, c_noise, labels) - net(x, c_noise, none)).abs().amax((1, 2, 3))
    assert (differs > 1e-4).tolist() == [True, True, False]
    net = perturbed(0).net
    assert torch.equal(net(x, c_noise, labels), net(x, c_noise, none))


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    net = perturbed().net
    x, c_noise, label = stream(0, 3, 3, 16, 16), torch.tensor([3.0, 999.0, 0.5]), torch.tensor([0, 1, -1])
    alone = torch.cat([net(x[i : i + 1], c_noise[i : i + 1], label[i : i + 1]) for i in range(3)])
    assert_close(net(x, c_noise, label), alone, atol=1e-5, rtol=1e-4)  # other kernels, float32


@torch.no_grad()
def test_no_augmentation_is_zero_augmentation():
    net = perturbed(augment_dim=9).net
    x, c_noise, label = stream(0, 2, 3, 16, 16), torch.zeros(2), torch.tensor([4, -1])
    plain = net(x, c_noise, label)
    assert torch.equal(plain, net(x, c_noise, label, torch.zeros(2, 9)))
    assert not torch.equal(plain, net(x, c_noise, label, torch.ones(2, 9)))


@torch.no_grad()
def test_dropout_acts_in_training_only():
    x, sigma, label = stream(0, 2, 3, 16, 16), torch.ones(2), torch.full((2,), -1)
    outputs = []
    for dropout in (0.0, 0.5):
        model = perturbed(dropout=dropout)
        outputs.append(model.denoise(x, sigma, label))
        trained = model.train().denoise(x, sigma, label)
        assert torch.equal(trained, outputs[-1]) == (dropout == 0)
    assert torch.equal(*outputs)


def test_every_parameter_has_a_gradient():
    model = perturbed(augment_dim=9, channel_mult=(0.5, 1, 2), width=64, attention=(16, 4))
    model.net(stream(0, 2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 1])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_a_new_network_says_zero_and_its_residual_branches_too():
    torch.manual_seed(0)
    model = build(16, 10, {**TINY, "augment_dim": 9})
    zeros = {name for name, tensor in model.state_dict().items() if not tensor.any()}
    weights = {name for name in zeros if name.endswith("weight")}
    last = (".out_layers.3.weight", ".proj_out.weight", "net.out.2.weight", "net.augment_emb.weight")
    assert weights == {name for name in model.state_dict() if name.endswith(last)}
    assert not model.net(stream(0, 1, 3, 16, 16), torch.zeros(1), torch.tensor([0])).any()


@torch.no_grad()
def test_a_learned_variance_doubles_the_output_and_leaves_the_denoiser_s_shape():
    model = perturbed(precond="iddpm", learned_variance=True)
    x, sigma, label = stream(0, 2, 3, 16, 16), torch.tensor([0.3, 7.0]), torch.tensor([1, -1])
    c_noise = torch.tensor([178.0, 908.0])  # of the cosine schedule's levels nearest to sigma
    c_in = (1 / (1 + sigma**2).sqrt())[:, None, None, None]
    f = model.net(c_in * x, c_noise, label)
    assert f.shape == (2, 6, 16, 16)
    assert_close(model.denoise(x, sigma, label), x - sigma[:, None, None, None] * f[:, :3])


@torch.no_grad()
def test_heads():
    x, c_noise, label = stream(0, 1, 3, 16, 16), torch.zeros(1), torch.tensor([0])
    by_width, by_number, fewer = (
        perturbed(**options).net(x, c_noise, label) for options in ({}, {"num_heads": 4}, {"num_heads": 2})
    )
    assert torch.equal(by_width, by_number)  # 64 channels attend, in heads of 16
    assert not torch.allclose(by_width, fewer, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "options", "problem"),
    [
        ((3, 10, 10), {"channel_mult": [1, 1, 1]}, "must be a multiple of"),
        ((3, 16, 8), {}, "square"),
        ((3, 16, 16), {"width": 34, "num_heads": 2}, "34 channels .* do not divide into 32 groups"),
        ((3, 16, 16), {"width": 2, "num_heads": 2, "group_channels": 4}, "2 channels .* do not divide into 0 groups"),
        ((3, 16, 16), {"width": 33}, "multiple of 2"),
        ((3, 16, 16), {"num_head_channels": 20}, r"channels \[64, 64\] .* with num_head_channels = 20"),
        ((3, 16, 16), {"num_heads": 3}, "do not divide into heads with num_heads = 3"),
        ((3, 16, 16), {"num_steps": 500}, "num_steps = 500 is of precond ddpm or cosine, not edm"),
        ((3, 16, 16), {"num_steps": 12, "precond": "ddpm"}, "must be two or more, finite, positive and increasing"),
        ((3, 16, 16), {"chanel_mult": [1]}, "did you mean 'channel_mult'"),
    ],
)
def test_impossible_networks_are_named(shape, options, problem):
    with pytest.raises(RecipeError, match=problem):
        registry.build(registry.config_of("adm-unet", shape, 0, {**TINY, **options}, {}))


@pytest.mark.parametrize(("sampler", "sigma_max"), [("ddim", None), ("ddpm", None), ("ddim", 0.5)])
def test_sampling_starts_from_noise_in_ddpms_frame(sampler, sigma_max):
    """x_T = z: in the frame x / sqrt(alpha_bar) that is z sqrt(1 + sigma^2), not sigma z."""
    model = build(16, 0, {**TINY, "precond": "ddpm"})
    seen = []
    model.denoise = lambda x, sigma, label: seen.append((x, sigma)) or torch.zeros_like(x)
    model.evaluate = lambda x, sigma, label: (model.denoise(x, sigma, label), torch.zeros_like(x))
    model.sample(torch.full((2,), -1), RowRng([0, 1]), SamplingRecipe(sampler=sampler, steps=5, sigma_max=sigma_max))
    x, sigma = seen[0]
    z = RowRng([0, 1]).randn(model.codec.state_shape).to(x.dtype)
    torch.testing.assert_close(x, z * (1 + sigma.to(x.dtype) ** 2).sqrt())
