"""DDPM's sampler with a learnt variance, and models of discrete steps, against published single steps."""

import zlib
from types import SimpleNamespace

import pytest
import torch
from test_adm_encoder import fill
from torch import nn
from torch.testing import assert_close

from ddo_cli.codec import Codec
from ddo_cli.diffusion import samplers
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.guidance import GradientGuide
from ddo_cli.diffusion.precond import linear_sigmas
from ddo_cli.diffusion.schedules import respaced_steps
from ddo_cli.diffusion.trace import Trace
from ddo_cli.errors import UsageError
from ddo_cli.generation import generate, labels_of, random_labels
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

STEPS = respaced_steps(1000, "250")
SMALL = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "precond": "ddpm"}


def tensor(tag, channels):
    return fill((2, channels, 2, 2), zlib.crc32(tag.encode()))


def one_step(i, name, direction):
    """x_(i-1) of ADM's state after step i of the 250, in its own units. direction: the gradient of a guide in x_i.

    Step 0 comes after step 1, whose variance it takes part of; whatever that leads to, it starts from ADM's state.
    """
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), linear_sigmas()[STEPS]])
    sigmas = levels[[2, 1, 0] if i == 0 else [i + 1, i]]
    out = tensor("out", 8)
    trace = Trace(variance=out[:, 4:])
    churn = SimpleNamespace(trace=trace, eps=lambda x: tensor("noise", 4))

    def state(sigma):
        return tensor("x", 4) * (1 + sigma**2).sqrt()

    def denoise(x, sigma, stage="predictor"):
        return state(sigma) - sigma * out[:, :4]

    if direction is not None:
        guide = GradientGuide(lambda x_vp, t, label: (x_vp * direction).flatten(1).sum(1), time_min=0.0)
        denoise = guide.steer(denoise, torch.full((2,), -1), trace)
    found = samplers.SAMPLERS[name].integrate(denoise, state(sigmas[0]), sigmas, churn)
    return found / (1 + sigmas[-1] ** 2).sqrt()


@pytest.mark.parametrize(
    ("i", "expected"),
    [
        (0, [-0.5071849, 0.2325284, -0.5022767, 0.3867237]),
        (10, [-0.5286820, 0.2846847, -0.4882991, 0.4335552]),
        (125, [-0.5912346, 0.4518408, -0.4574988, 0.5782937]),
        (249, [-0.6307572, 0.5095040, -0.4476775, 0.6347440]),
    ],
)
def test_steps_of_ddpm_equal_the_published_ones(i, expected):
    found = one_step(i, "ddpm", None)[0].flatten()[:4]
    assert_close(found, torch.tensor(expected).double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("i", "expected"),
    [
        (0, [-0.5071516, 0.2325761, -0.5022460, 0.3866426]),
        (10, [-0.5275561, 0.2862911, -0.4872612, 0.4308046]),
        (125, [-0.5728310, 0.4789602, -0.4403110, 0.5340444]),
        (249, [-0.6017228, 0.5523218, -0.4205528, 0.5649605]),
    ],
)
def test_guided_steps_of_ddpm_equal_the_published_ones(i, expected):
    """The mean moves by Sigma grad L, by the learned variance; in the last step, too, which adds no noise."""
    found = one_step(i, "ddpm", tensor("grad", 4))[0].flatten()[:4]
    assert_close(found, torch.tensor(expected).double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("i", "expected"),
    [
        (0, [-0.5071474, 0.2325836, -0.5022417, 0.3866337]),
        (10, [-0.5095169, 0.2338119, -0.5020253, 0.3863756]),
        (125, [-0.5234171, 0.2519582, -0.5033796, 0.3773219]),
        (249, [-0.5367524, 0.2635813, -0.5033446, 0.3726638]),
    ],
)
def test_guided_steps_of_ddim_equal_the_published_ones(i, expected):
    found = one_step(i, "ddim", tensor("grad", 4))[0].flatten()[:4]
    assert_close(found, torch.tensor(expected).double(), atol=2e-6, rtol=0)


class Curved(nn.Module):
    """eps and, with a learned variance, v of a state of four numbers in DDPM's frame; any smooth function does."""

    def forward(self, x, c_noise, label):
        eps = (1.3 * x + c_noise[:, None] / 500).tanh()
        return torch.cat([eps, (2 * x + label[:, None]).sin()], dim=1)


def potential(x_vp, t, label):
    return (x_vp - 0.5).cos().sum(1) * (2 + label)


def gradient(x, label):
    return -(x - 0.5).sin() * (2 + label[:, None])


def in_ddpms_frame(name, learned, steps, z, noise, label, weight):
    """The samples of guided-diffusion: `p_mean_variance` and `condition_mean`, or `condition_score` and DDIM's step.

    Written from arXiv 2006.11239, 2102.09672 and 2105.05233 in their own frame. learned: or "small" or "large", the
    fixed variances of that code.
    """
    visited = respaced_steps(1000, str(steps))
    abar = 1 / (1 + linear_sigmas()[visited] ** 2)
    prev = torch.cat([torch.ones(1).double(), abar[:-1]])
    beta = 1 - abar / prev
    tilde = beta * (1 - prev) / (1 - abar)
    log_tilde = torch.cat([tilde[1:2], tilde[1:]]).log()
    x = z.double()
    for i in reversed(range(steps)):
        out = Curved()(x.float(), torch.full((len(x),), visited[i]), label).double()
        eps, v = out.chunk(2, dim=1)
        x0 = ((x - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()).clamp(-1, 1)
        shift = weight * gradient(x, label)
        if name == "ddpm":
            mean = prev[i].sqrt() * beta[i] / (1 - abar[i]) * x0
            mean = mean + (1 - prev[i]) * (1 - beta[i]).sqrt() / (1 - abar[i]) * x
            share = (v + 1) / 2
            larger = beta[i] if i else tilde[1]
            variance = {"small": tilde[i], "large": larger}.get(learned)
            if variance is None:
                variance = (share * beta[i].log() + (1 - share) * log_tilde[i]).exp()
            x = mean + variance * shift
            if i:
                x = x + variance.sqrt() * noise[i]
        else:
            eps = (x - abar[i].sqrt() * x0) / (1 - abar[i]).sqrt() - (1 - abar[i]).sqrt() * shift
            x0 = (x - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()
            x = prev[i].sqrt() * x0 + (1 - prev[i]).sqrt() * eps
    return x


@pytest.mark.parametrize("steps", [10, 250])
@pytest.mark.parametrize(("name", "learned"), [("ddpm", True), ("ddpm", "small"), ("ddpm", "large"), ("ddim", True)])
def test_guided_sampling_equals_ddpms_own_frame(name, learned, steps):
    class Net(Curved):
        def forward(self, x, c_noise, label):
            out = super().forward(x, c_noise, label)
            return out if learned is True else out[:, :4]

    options = DiffusionOptions(precond="ddpm", learned_variance=learned is True)
    model = DiffusionModel(Net(), Codec((4,)), 3, options, DiffusionDrawOptions())
    label, spec = torch.tensor([0, 1, 2]), SamplingRecipe(sampler=name, steps=steps, clip_denoised=True)
    spec = spec.merged(ddpm_variance=None if learned is True else learned)
    model.check_sampling(spec)
    rng = RowRng(range(3))
    z = rng.randn((4,))
    rng.randint(3)
    noise = {i: rng.randn((4,), dtype=torch.float64) for i in range(steps - 1, 0, -1)} if name == "ddpm" else {}
    guide = GradientGuide(potential, 0.7, time_min=0.0)
    found = model.guided_by([guide]).sample(label, RowRng(range(3)), spec).x
    expected = in_ddpms_frame(name, learned, steps, z, noise, label, 0.7)
    assert_close(found, expected, rtol=0, atol=2e-6)  # network and potential are float32
    plain = model.sample(label, RowRng(range(3)), spec).x
    assert (plain - expected).abs().max() > 0.01  # the guide acts


@pytest.mark.parametrize(
    ("learned", "sampler", "message"),
    [(True, "ddpm", "has learned its own"), (False, "ddim", "ddim adds no")],
)
def test_a_variance_that_has_no_effect_is_refused(learned, sampler, message):
    options = DiffusionOptions(precond="ddpm", learned_variance=learned)
    model = DiffusionModel(Curved(), Codec((4,)), 3, options, DiffusionDrawOptions())
    with pytest.raises(UsageError, match=message):
        model.check_sampling(SamplingRecipe(sampler=sampler, ddpm_variance="large"))
    stored = SamplingRecipe(sampler="ddpm", ddpm_variance="large")  # of a file
    assert stored.merged(sampler="heun").ddpm_variance is None
    assert stored.merged(steps=5).ddpm_variance == "large"


def test_the_variance_matters():
    levels = linear_sigmas()[STEPS][[125, 124]]
    low, high = (samplers._learned_deviation(torch.tensor(v).double(), *levels, None) for v in (-1.0, 1.0))
    up = levels[1] * (1 - (levels[1] / levels[0]) ** 2).sqrt()
    assert_close(low, up)  # the smaller variance is DDIM's with eta 1
    assert high > low * 1.001


@pytest.fixture(scope="module")
def discrete():
    torch.manual_seed(0)
    config = registry.config_of("edm-unet", (3, 8, 8), 10, {**SMALL, "learned_variance": True}, {})
    return registry.build(config).eval()


def test_a_model_of_discrete_steps_visits_its_own(discrete):
    spec = SamplingRecipe(sampler="ddpm", steps=250)
    discrete.check_sampling(spec)
    expected = discrete.precond.sigmas.double()[STEPS].flip(0)
    assert torch.equal(discrete.sigmas(spec)[:-1], expected)
    ddim = SamplingRecipe(sampler="ddim", respacing="ddim25")
    assert torch.equal(discrete.sigmas(ddim)[:-1], discrete.precond.sigmas.double()[0:961:40].flip(0))
    rounded = discrete.sigmas(SamplingRecipe(steps=18))[:-1]  # Heun on Karras levels, rounded to known ones
    assert torch.isin(rounded, discrete.precond.sigmas.double()).all()
    merged = spec.merged(respacing="ddim25")
    assert (merged.steps, merged.respacing) == (None, "ddim25")


@pytest.mark.parametrize("given", [{"steps": 40}, {"respacing": "10,30"}])
def test_discrete_steps_stay_inside_the_noise_levels_asked_for(discrete, given):
    spec = SamplingRecipe(sampler="ddpm", sigma_min=0.1, sigma_max=2.0, **given)
    found = discrete.sigmas(spec)[:-1]
    inside = discrete.precond.sigmas.double()
    inside = inside[(inside >= 0.1) & (inside <= 2.0)]
    assert len(found) == 40
    assert (found[0], found[-1]) == (inside[-1], inside[0])  # as SDEdit needs it
    with pytest.raises(UsageError, match=r"steps = 40: a section of \d+ steps cannot give 40; give fewer"):
        discrete.check_sampling(SamplingRecipe(sampler="ddpm", sigma_max=0.02, steps=40))
    one = discrete.sigmas(SamplingRecipe(sampler="ddim", steps=1))
    assert one.tolist() == [discrete.precond.sigma_max, 0]  # from noise, not from the first training step
    # Without a wish all steps, whatever the model's default levels.
    assert discrete.bounds(SamplingRecipe(sampler="ddpm")) == (discrete.precond.sigma_min, discrete.precond.sigma_max)


@torch.no_grad()
def test_edits_of_discrete_models_start_at_their_level(discrete):
    """From a low level SDEdit keeps the source, whatever the network."""
    x0 = torch.full((1, *discrete.codec.shape), 0.5)
    spec = SamplingRecipe(sampler="ddpm", steps=3, sigma_max=0.05)
    seen = []
    hook = discrete.net.register_forward_pre_hook(lambda module, args: seen.append(args[1][0].item()))
    discrete.sample(torch.tensor([3]), RowRng([0]), spec, x0)
    hook.remove()
    assert max(seen) == (discrete.precond.sigmas <= 0.05).sum() - 1
    assert seen[0] > 0


@torch.no_grad()
def test_the_network_is_told_the_original_step(discrete):
    seen = []
    hook = discrete.net.register_forward_pre_hook(lambda module, args: seen.append(args[1][0].item()))
    discrete.sample(torch.tensor([3]), RowRng([0]), SamplingRecipe(sampler="ddpm", steps=4))
    hook.remove()
    assert seen == [999, 666, 333, 0]


@torch.no_grad()
def test_clipping_keeps_each_denoised_image_in_range(discrete):
    label, state = torch.tensor([3, 4]), torch.full((2, 3, 8, 8), 30.0, dtype=torch.float64)
    sigma = torch.tensor(1.0, dtype=torch.float64)
    plain, clipped = (
        discrete.steered(label, SamplingRecipe(clip_denoised=clip), Trace())(state, sigma) for clip in (None, True)
    )
    assert plain.abs().max() > 2
    assert torch.equal(clipped, plain.clamp(-1, 1))


@torch.no_grad()
def test_the_variance_is_that_of_the_conditional_pass(discrete):
    label, x = torch.tensor([3, 4]), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    sigma, trace = torch.tensor(1.0, dtype=torch.float64), Trace()
    discrete.steered(label, SamplingRecipe(cfg_scale=2.0), trace)(x, sigma)
    assert trace.nfe == 2
    conditional = discrete.evaluate(x, sigma, label)[1]  # as a batch of its own, kernels may round it otherwise
    assert_close(trace.variance, conditional, rtol=1e-4, atol=1e-10)


@torch.no_grad()
def test_random_labels_are_those_of_edms_scripts(discrete):
    model = registry.build(registry.config_of("edm-unet", (3, 32, 32), 10, SMALL, {}))
    assert random_labels(model, [0, 1, 2, 3]).tolist() == [7, 9, 4, 3]
    spec = SamplingRecipe(labels="random", steps=1)
    made = list(generate(discrete, range(6), spec, batch=4))
    labels = torch.cat([batch.label for batch in made])
    assert torch.equal(labels, random_labels(discrete, range(6)))
    assert not torch.equal(labels, labels_of(range(6), 10))


@torch.no_grad()
def test_noise_comes_after_the_label_whether_it_is_used_or_not(discrete):
    """Churned images of a label are the same, drawn or given: EDM's scripts draw it before they overwrite it."""
    spec = SamplingRecipe(steps=3, s_churn=2.0)
    drawn = random_labels(discrete, [5])
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(3, 8, 8, generator=generator)
    torch.randint(10, (), generator=generator)
    first = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    seen = []
    discrete.denoise, kept = lambda x, sigma, label: seen.append((x, sigma)) or x.float() * 0, discrete.denoise
    evaluate, discrete.evaluate = discrete.evaluate, lambda x, sigma, label: (discrete.denoise(x, sigma, label), x)
    try:
        discrete.sample(drawn, RowRng([5]), spec)
    finally:
        discrete.denoise, discrete.evaluate = kept, evaluate
    x, sigma = seen[0]
    start = discrete.sigmas(spec)[0]
    assert_close(x[0], latent.double() * start + (sigma**2 - start**2).sqrt() * first)
