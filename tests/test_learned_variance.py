"""DDPM's sampler with a learnt variance, and models of discrete steps, against published single steps."""

import zlib
from types import SimpleNamespace

import pytest
import torch
from test_adm_encoder import fill
from torch.testing import assert_close

from ddo_cli.diffusion import samplers
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
    """x_(i-1) of ADM's state after step i of the 250, in its own units. direction: added to the score."""
    levels = linear_sigmas()[STEPS]
    sigma = levels[i]
    sigmas = torch.stack([sigma, levels[i - 1] if i else torch.zeros((), dtype=torch.float64)])
    out = tensor("out", 8)
    trace = Trace(variance=out[:, 4:])
    churn = SimpleNamespace(trace=trace, eps=lambda x: tensor("noise", 4))

    def denoise(x, sigma, stage="predictor"):
        denoised = x - sigma * out[:, :4]
        return denoised if direction is None else denoised + sigma**2 * direction / (1 + sigma**2).sqrt()

    x = tensor("x", 4) * (1 + sigma**2).sqrt()
    return samplers.SAMPLERS[name].integrate(denoise, x, sigmas, churn) / (1 + sigmas[1] ** 2).sqrt()


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
        (0, [-0.5071474, 0.2325836, -0.5022417, 0.3866337]),
        (10, [-0.5095169, 0.2338119, -0.5020253, 0.3863756]),
        (125, [-0.5234171, 0.2519582, -0.5033796, 0.3773219]),
        (249, [-0.5367524, 0.2635813, -0.5033446, 0.3726638]),
    ],
)
def test_guided_steps_of_ddim_equal_the_published_ones(i, expected):
    found = one_step(i, "ddim", tensor("grad", 4))[0].flatten()[:4]
    assert_close(found, torch.tensor(expected).double(), atol=2e-6, rtol=0)


def test_the_variance_matters():
    levels = linear_sigmas()[STEPS][[125, 124]]
    low, high = (samplers._learned_deviation(torch.tensor(v).double(), *levels) for v in (-1.0, 1.0))
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
    evaluate, discrete.evaluate = discrete.evaluate, lambda x, sigma, label: (discrete.denoise(x, sigma, label), None)
    try:
        discrete.sample(drawn, RowRng([5]), spec)
    finally:
        discrete.denoise, discrete.evaluate = kept, evaluate
    x, sigma = seen[0]
    start = discrete.sigmas(spec)[0]
    assert_close(x[0], latent.double() * start + (sigma**2 - start**2).sqrt() * first)
