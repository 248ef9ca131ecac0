"""Flow matching in EDM's frame: its likelihood, noise levels and samplers."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ddo_cli.codec import Codec
from ddo_cli.diffusion import samplers, vp_sde
from ddo_cli.diffusion.denoiser import DiffusionDraw, DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.models import registry
from ddo_cli.rng import RowRng

KINDS = ("flow", "flow-reversed")


class Velocity(nn.Module):
    """Any velocity network: nonlinear in the state, dependent on its time; remembers what it saw."""

    def forward(self, x, c_noise, label):
        assert x.dtype == c_noise.dtype == torch.float32
        self.x, self.time = x, c_noise
        return torch.tanh(1.3 * x) - torch.cos(2 * c_noise)[:, None]


def build(kind, **draw):
    options = DiffusionOptions(precond=kind)
    return DiffusionModel(Velocity(), Codec((5,)), 0, options, DiffusionDrawOptions(**draw))


def labels(x):
    return torch.full((len(x),), -1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_likelihood_is_the_velocity_s_squared_error(kind):
    n = torch.tensor([1e-3, 0.05, 0.3, 0.7, 0.95, 0.999], dtype=torch.float64)
    x0, eps = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = build(kind)
    draw = DiffusionDraw(n / (1 - n), eps, torch.zeros(6, dtype=torch.bool))
    log_lik = model.log_lik(model.predict(x0, labels(x0), draw), x0, draw)
    # The network has seen the path's state at its own time: from noise to data, or the other way.
    assert_close(model.net.x.double(), (1 - n)[:, None] * x0 + n[:, None] * eps, rtol=1e-6, atol=1e-6)
    assert_close(model.net.time.double(), n if kind == "flow-reversed" else 1 - n, rtol=1e-6, atol=1e-7)
    v = eps - x0 if kind == "flow-reversed" else x0 - eps
    error = (model.net(model.net.x, model.net.time, None).double() - v).square().sum(1)
    assert_close(log_lik, -error, rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_likelihood_of_float32_states():
    """As in training. What is lost near n = 0 is n's share of float32's digits."""
    n = torch.tensor([1e-3, 0.05, 0.3, 0.7, 0.95, 0.999])
    x0, eps = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    model, zeros = build("flow"), torch.zeros(6, dtype=torch.bool)
    draw = DiffusionDraw(n / (1 - n), eps, zeros)
    found = model.log_lik(model.predict(x0, labels(x0), draw), x0, draw)
    exact_draw = DiffusionDraw(n.double() / (1 - n.double()), eps.double(), zeros)
    exact = model.log_lik(model.predict(x0.double(), labels(x0), exact_draw), x0.double(), exact_draw)
    assert found.dtype == torch.float32
    assert_close(found[0].double(), exact[0], rtol=1e-3, atol=0)
    assert_close(found[1:].double(), exact[1:], rtol=2e-5, atol=0)
    prediction = model.predict(x0, labels(x0), draw)
    assert torch.equal(model.log_ratio(prediction, prediction, x0, draw), torch.zeros(6))


def test_every_network_can_be_one():
    options = {"patch": 4, "widths": [8], "depths": [1], "emb_width": 8, "precond": "flow"}
    model = registry.build(registry.config_of("patch-unet", (1, 8, 8), 0, options, {"distribution": "logistic"}))
    draw = model.draw(3, RowRng(range(3)))
    assert model(torch.zeros(3, 1, 8, 8), torch.full((3,), -1), draw).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Noise levels of training


def test_uniform_and_shifted_times():
    """Logistic ln sigma: n is uniform; with p_mean ln(s), n of the shift is s u / (1 + (s - 1) u)."""
    rows = range(4000)
    u = RowRng(rows).rand().double()
    n = lambda sigma: sigma.double() / (1 + sigma.double())  # noqa: E731
    plain = build("flow", distribution="logistic", p_mean=0.0).draw(len(rows), RowRng(rows)).sigma
    assert_close(n(plain), u, rtol=0, atol=1.1e-4)  # the tails that are cut
    assert 0.9999e-4 < n(plain).min() < n(plain).max() < 0.99991
    shifted = build("flow", distribution="logistic", p_mean=math.log(3)).draw(len(rows), RowRng(rows)).sigma
    assert_close(n(shifted), 3 * u / (1 + 2 * u), rtol=0, atol=3.5e-4)
    logit_normal = build("flow", p_mean=0.5, p_std=0.8).draw(len(rows), RowRng(rows)).sigma
    assert_close(torch.logit(n(logit_normal)), 0.5 + 0.8 * RowRng(rows).randn().double(), rtol=1e-5, atol=1e-5)


def test_no_noise_level_is_infinite():
    u = torch.tensor([0.0, 1 - 2**-24])  # the ends of what torch draws
    assert_close(vp_sde.logistic(u), torch.tensor([-9.21, 9.21]), rtol=0, atol=0.01)


def test_a_discriminator_trains_at_the_model_s_levels():
    u = torch.linspace(0.1, 0.9, 50)
    law = vp_sde.TimeLaw("model", p_mean=0.3, p_std=1.2, distribution="logistic")
    log_sigma = vp_sde.sigma_of(law.times(u).t).log()
    inside = log_sigma < vp_sde.sigma_of(torch.tensor(1.0)).log() - 1e-6
    assert_close(log_sigma[inside], (0.3 + 1.2 * torch.logit(u.double()))[inside], rtol=0, atol=2e-3)
    # Weighted, its mean loss is importance's.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    times = law._replace(weighted=True).times(u)
    f = lambda t: torch.cos(vp_sde.sigma_of(t).log())  # noqa: E731
    expected = f(vp_sde.importance_sampled_time(u)).mean()
    assert_close((times.weight * f(times.t)).mean(), expected, rtol=0, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_euler_step_over_sigma_is_one_in_time(kind):
    model = build(kind)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n = torch.linspace(0.999, 0, 9, dtype=torch.float64)

    def denoise(x, sigma, stage="predictor"):
        return model.denoise(x, sigma, labels(x))

    flow = x.clone()
    for now, then in pairwise(n):
        sign, time = (1, now) if kind == "flow-reversed" else (-1, 1 - now)
        v = sign * model.net(flow.float(), time.float().expand(4), None).double()  # d x / d n
        flow = flow + (then - now) * v
    found = samplers.euler(denoise, x / (1 - n[0]), n / (1 - n))
    assert_close(found, flow, rtol=1e-6, atol=1e-6)
