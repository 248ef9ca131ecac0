"""The contract, for every kind of model: what the engines rely on."""

import math

import pytest
import torch
from conftest import CPU, KINDS, make_checkpoint
from torch.testing import assert_close

from ddo_cli.codec import Codec, LevelCodec, PixelCodec
from ddo_cli.diffusion import precond
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.guidance import AutoGuide
from ddo_cli.errors import UsageError
from ddo_cli.generation import labels_of
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel, drop_labels, repeat_draw
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.trainable import Trainable, map_tensors


def test_the_contract_is_small():
    """What an implementer meets: methods and attributes of the class, without those that any trained module has."""
    names = {*vars(LikelihoodModel), *LikelihoodModel.__annotations__}
    members = {name for name in names if not name.startswith("_")} - set(dir(Trainable)) | {"forward"}
    assert len(members) <= 12, sorted(members)
    assert {"codec", "num_classes", "guided_by", "passes", "predict"} <= members  # they are seen at all


@pytest.mark.parametrize("kind", ["autoregressive", "var"])
def test_guides_need_a_denoiser(tmp_path, kind):
    model = registry.load_model(make_checkpoint(tmp_path / "m.safetensors", kind), CPU).model
    assert model.guided_by([]) is model
    with pytest.raises(UsageError, match=f"guides change a denoiser, and a {type(model).__name__} has none"):
        model.guided_by([AutoGuide(model, 2.0)])


def test_a_guided_model_shares_its_weights_and_leaves_the_other_alone(tmp_path):
    model = registry.load_model(make_checkpoint(tmp_path / "m.safetensors"), CPU).model
    once = model.guided_by([AutoGuide(model, 2.0)])
    twice = once.guided_by([AutoGuide(model, 3.0)])
    assert [guide.scale for guide in twice.guides] == [2.0, 3.0]
    assert (len(model.guides), len(once.guides)) == (0, 1)
    assert all(a is b for a, b in zip(model.parameters(), twice.parameters(), strict=True))
    assert twice.state_dict().keys() == model.state_dict().keys()


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """A model and another of the same configuration."""
    one = make_checkpoint(tmp_path / "one.safetensors", request.param, seed=0)
    two = make_checkpoint(tmp_path / "two.safetensors", request.param, seed=1)
    return registry.load_model(one, CPU).model, registry.load_model(two, CPU).model


def batch(model, n=6):
    items = torch.randint(0, 256, (n, *model.codec.shape), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    draw = model.draw(n, RowRng.for_rows("test", rows=range(n)))
    return model.codec.encode(items), labels_of(range(n), model.num_classes), draw


def test_log_ratio_is_exactly_zero_for_equal_weights(pair):
    model, _ = pair
    x, label, draw = batch(model)
    with torch.no_grad():
        prediction = model.predict(x, label, draw)
        assert torch.equal(model(x, label, draw, prediction), torch.zeros(len(x)))


def test_log_ratio_is_the_difference_of_log_likelihoods(pair):
    model, ref = pair
    x, label, draw = batch(model)
    with torch.no_grad():
        own, other = model.predict(x, label, draw), ref.predict(x, label, draw)
        ratio = model.log_ratio(own, other, x, draw)
        assert ratio.shape == (len(x),)
        assert ratio.dtype == torch.float32
        exact = model.log_lik(own.double(), x, draw) - model.log_lik(other.double(), x, draw)
        assert_close(ratio.double(), exact.double(), rtol=1e-5, atol=1e-4)
        assert torch.equal(model.log_ratio(other, own, x, draw), -ratio)
        assert_close(model(x, label, draw), model.log_lik(own, x, draw))


def test_rows_do_not_see_one_another(pair):
    model, _ = pair
    x, label, draw = batch(model)
    with torch.no_grad():
        whole = model(x, label, draw)
        part = model(x[2:4], label[2:4], map_tensors(lambda tensor: tensor[2:4], draw))
    assert_close(part, whole[2:4], rtol=1e-5, atol=1e-3)


def test_real_and_fake_rows_share_one_draw(pair):
    model, _ = pair
    _, _, draw = batch(model, 3)
    both = repeat_draw(draw, 2)
    for tensor, twice in zip(draw, both, strict=True):
        assert torch.equal(twice[:3], tensor)
        assert torch.equal(twice[3:], tensor)


def test_draws_do_not_depend_on_sharing(pair):
    model, _ = pair
    whole = model.draw(40, RowRng.for_rows("a", 1, rows=range(40)))
    part = model.draw(5, RowRng.for_rows("a", 1, rows=range(33, 38)))
    for tensor, own in zip(whole, part, strict=True):
        assert torch.equal(tensor[33:38], own)


def test_gradient_of_the_ratio_against_finite_differences(pair):
    x, label, draw = batch(pair[0], 2)
    model, ref = (m.double() for m in pair)
    x = x.double() if x.is_floating_point() else x
    draw = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, draw)
    if isinstance(model, DiffusionModel):
        model.denoise = denoise_in_float64.__get__(model)  # the model itself rounds to float32
        ref.denoise = denoise_in_float64.__get__(ref)
    with torch.no_grad():
        other = ref.predict(x, label, draw)
    parameter = next(p for p in reversed(list(model.parameters())) if p.ndim > 1 and p.requires_grad)
    model.zero_grad()
    model(x, label, draw, other).double().sum().backward()
    expected = parameter.grad.flatten()[0].item()
    # The transformer rounds to float32 inside, so that a small step would measure rounding.
    h, found = 1e-5 if isinstance(model, DiffusionModel) else 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[0] += sign * h
            found.append(model.log_ratio(model.predict(x, label, draw).double(), other, x, draw).double().sum().item())
            parameter.view(-1)[0] -= sign * h
    assert (found[0] - found[1]) / (2 * h) == pytest.approx(expected, rel=3e-2, abs=1e-2)


def denoise_in_float64(self, x, sigma, label):
    rows = sigma.view(-1, *[1] * (x.ndim - 1))
    c_skip, c_out, c_in, c_noise = self.precond.coefficients(rows)
    return c_skip * x + c_out * self.net(c_in * x, c_noise.view(-1), label)[:, : x.shape[1]]


def test_dropped_labels_become_unconditional(pair):
    model, _ = pair
    x, label, draw = batch(model)
    dropped = draw._replace(drop=torch.ones_like(draw.drop))
    with torch.no_grad():
        assert torch.equal(model(x, label, dropped), model(x, torch.full_like(label, NO_LABEL), draw))
    assert drop_labels(label, draw._replace(drop=torch.tensor([True] + [False] * 5))).tolist() == [-1, 1, 2, 3, 4, 5]


def test_label_drop_rate(tmp_path):
    path = make_checkpoint(tmp_path / "m.safetensors")
    model = registry.load_model(path, CPU, {"label_dropout": 0.25}).model
    dropped = model.draw(4000, RowRng.for_rows("drop", rows=range(4000))).drop.float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.03)  # 4 standard deviations


def test_noise_levels_are_log_normal(tmp_path):
    path = make_checkpoint(tmp_path / "m.safetensors")
    model = registry.load_model(path, CPU, {"p_mean": 0.3, "p_std": 1.6}).model
    log_sigma = model.draw(4000, RowRng.for_rows("sigma", rows=range(4000))).sigma.log()
    assert log_sigma.mean().item() == pytest.approx(0.3, abs=0.1)
    assert log_sigma.std().item() == pytest.approx(1.6, abs=0.07)


def test_the_ratio_keeps_what_a_plain_difference_loses():
    """Two denoisers 1e-6 apart: subtracting their float32 squared errors keeps no digit, the factored form most."""
    torch.manual_seed(0)
    net = torch.nn.Identity()
    model = DiffusionModel(net, PixelCodec((3, 32, 32)), 0, DiffusionOptions(), DiffusionDrawOptions())
    x = torch.randn(4, 3, 32, 32)
    other = x + 0.3 * torch.randn_like(x)
    own = other + 1e-6 * torch.randn_like(x)
    draw = model.draw(4, RowRng.for_rows("x", rows=range(4)))._replace(sigma=torch.ones(4))
    weight = precond.Edm(0.5).weight(torch.ones(4, dtype=torch.float64))
    exact = -weight * ((own.double() - x) ** 2 - (other.double() - x) ** 2).flatten(1).sum(1)
    factored = model.log_ratio(own, other, x, draw).double()
    plain = (model.log_lik(own, x, draw) - model.log_lik(other, x, draw)).double()
    assert (factored - exact).abs().max() < 0.02 * exact.abs().max()
    assert (plain - exact).abs().max() > 0.1 * exact.abs().max()  # what the test would catch


def test_edm_weight_makes_the_loss_that_of_f():
    sigma, sd = torch.tensor([0.1, 1.0, 30.0]), 0.5
    c = precond.Edm(sd).coefficients(sigma)
    assert_close(precond.Edm(sd).weight(sigma) * c.c_out**2, torch.ones(3))
    x0_variance = c.c_in**2 * (sd**2 + sigma**2)
    assert_close(x0_variance, torch.ones(3))  # unit input variance
    assert_close(c.c_noise, torch.log(sigma) / 4)


def test_elbo_of_a_perfect_gaussian_denoiser_is_that_of_its_posterior_variance():
    """For data N(0, sd^2) the best denoiser is c_skip x, and E (D - x0)^2 = sd^2 sigma^2 / (sd^2 + sigma^2)."""

    class Zero(torch.nn.Module):
        def forward(self, x, c_noise, label):
            return torch.zeros_like(x)

    model = DiffusionModel(Zero(), Codec((2,)), 0, DiffusionOptions(), DiffusionDrawOptions())
    x = 0.5 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    draw = model.draw(len(x), RowRng.for_rows("elbo", rows=range(len(x))))
    found = model(x, torch.full((len(x),), NO_LABEL), draw)
    # w(sigma) times that variance is exactly 1 per dimension, whatever sigma.
    assert found.mean().item() == pytest.approx(-2.0, abs=0.06)


def test_codecs_round_trip():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    pixels = PixelCodec((1, 16, 16))
    assert torch.equal(pixels.decode(pixels.encode(images).double()), images)
    assert pixels.decode(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]
    levels = LevelCodec((1, 1, 17), 17)
    stored = torch.tensor([round(255 * k / 16) for k in range(17)], dtype=torch.uint8).view(1, 1, 1, 17)
    assert levels.encode(stored).flatten().tolist() == list(range(17))
    assert torch.equal(levels.decode(levels.encode(stored)), stored)


def test_balanced_labels():
    labels = labels_of(range(50), 10)
    assert torch.bincount(labels).tolist() == [5] * 10
    assert labels_of([3, 13], 10).tolist() == [3, 3]
    assert labels_of(range(4), 10, classes=[7, 2]).tolist() == [7, 2, 7, 2]
    assert labels_of(range(3), 0).tolist() == [NO_LABEL] * 3


def test_log_density_and_samples_agree_for_a_gaussian():
    """Denoiser of N(0, 0.5^2): the density is closed form."""

    class Zero(torch.nn.Module):
        def forward(self, x, c_noise, label):
            return torch.zeros_like(x)

    model = DiffusionModel(Zero(), Codec((2,)), 0, DiffusionOptions(), DiffusionDrawOptions())
    x = torch.tensor([[0.0, 0.0], [0.5, -0.3], [1.0, 1.0]])
    found = model.log_density(x, torch.full((3,), NO_LABEL), SamplingRecipe())
    expected = -(x.double() ** 2).sum(1) / (2 * 0.25) - math.log(2 * math.pi * 0.25)
    assert_close(found.double(), expected, atol=1e-3, rtol=0)
