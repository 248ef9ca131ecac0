"""What a GPU would refuse, and what the CPU would wait for, found without a GPU (see fake_cuda.py)."""

from functools import partial

import pytest
import torch
from conftest import TINY, TINY_ENCODER, TINY_TRANSFORMER
from fake_cuda import CUDA, fake_cuda, needs_cuda_support

from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.churn import Boost
from ddo_cli.diffusion.guidance import AutoGuide, GradientGuide, Interval
from ddo_cli.diffusion.precond import Flow, Vp
from ddo_cli.diffusion.samplers import SAMPLERS
from ddo_cli.engines.sampling.guides import _class_log_probability
from ddo_cli.generation import generate
from ddo_cli.metrics.discrimination import LEVELS, HeldOut, noisy
from ddo_cli.metrics.extractors.select import select_extractor
from ddo_cli.metrics.scorer import moments_of
from ddo_cli.models import registry, vae_codec
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_batch, ddo_step
from ddo_cli.objectives.discriminator import discriminator_loss
from ddo_cli.precision import inference_precision
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import StepRng
from ddo_cli.trainable import map_tensors

pytestmark = needs_cuda_support

# What the CPU waits for, by path: nothing within a step, so that it runs ahead of the GPU.
WAITS = {
    "training step": [],
    "sampled batch": ["item", "copy to the CPU"],  # whether all samples are finite; the items
    "sampled batch of tokens": ["copy to the CPU"],
    "guided step": [],
    "held-out evaluation": ["copy to the CPU"],  # all logits at once
    "batch of features": ["item"],  # whether they are finite
}

UNET = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NCSNPP = {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "resample_filter": [1, 3, 3, 1]}
ADM = {"width": 32, "channel_mult": [1, 2], "num_blocks": 1, "attention": [4], "num_head_channels": 16}
ADM_ENCODER = {"width": 32, "depth": 1, "channel_mult": [1, 2], "attention": [16], "num_head_channels": 32}
_, SHAPE, EDM2, EDM2_SAMPLING = TINY["edm2"]
HEUN = {"sampler": "heun", "steps": 3}
# Name, shape, options, draw options and sampling.
MODELS = {
    **{kind: (name, shape, options, {}, sampling) for kind, (name, shape, options, sampling) in TINY.items()},
    "autoregressive": ("pixel-transformer", (1, 4, 4), TINY_TRANSFORMER, {}, {}),  # 16 tokens
    "ddpm++": ("edm-unet", (3, 8, 8), {**UNET, "precond": "vp"}, {}, HEUN),
    "ncsn++": ("edm-unet", (3, 8, 8), {**UNET, **NCSNPP, "precond": "ve"}, {}, HEUN),
    "adm": ("adm-unet", (3, 8, 8), ADM, {}, HEUN),
    "iddpm": ("adm-unet", (3, 8, 8), {**ADM, "precond": "iddpm", "learned_variance": True}, {}, {"sampler": "ddpm"}),
    "edm2, weighted": ("edm2-unet", SHAPE, EDM2, {"uncertainty": True}, EDM2_SAMPLING),
}
PRECISIONS = ("float32", "tf32", "bf16", "fp16")


@pytest.fixture
def gpu():
    with fake_cuda() as gpu:
        yield gpu


def build(kind):
    name, shape, options, draw, _ = MODELS[kind]
    return registry.build(registry.config_of(name, shape, 10, options, draw)).to(CUDA).eval()


def build_judge(kind, name="time-encoder"):
    options = ADM_ENCODER if name == "adm-classifier" else TINY_ENCODER
    config = discriminators.config_of(kind, name, (3, 32, 32), 10, options)
    return discriminators.build(kind, config).to(CUDA).eval().requires_grad_(False)


def waits(gpu, call):
    """What it waits for, and what it returns."""
    gpu.waits.clear()
    found = call()
    return list(gpu.waits), found


def draw(model, **sampling):
    spec = SamplingRecipe(**sampling)
    return list(generate(model, range(4), spec, batch=4, device=CUDA))


def moved(batch):
    """A batch of training on the GPU, copied as `training.feed` does it."""
    return map_tensors(lambda tensor: tensor.pin_memory().to(CUDA, non_blocking=True), batch)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("kind", MODELS)
def test_a_training_step_waits_for_nothing(gpu, kind):
    model, ref, n = build(kind), build(kind).requires_grad_(False), 2
    rows = torch.zeros(n, *MODELS[kind][1], dtype=torch.uint8), torch.arange(n)

    def step(precision):
        batch = moved(ddo_batch(model, rows, rows, StepRng((0,), 0, range(n))))
        with inference_precision(precision, CUDA):
            return ddo_step(model, model, batch, ref=ref, settings=DdoSettings(1.0, 0.1))

    # A step takes a second to fake: every precision on one family, the one with most casts on the others.
    for precision in PRECISIONS if kind == "adm" else ("fp16",):
        found, (loss, log) = waits(gpu, lambda p=precision: step(p))
        assert found == WAITS["training step"], precision
        assert (loss.dtype, loss.device) == (torch.float32, CUDA), precision
        assert {value.device for value in log.values()} == {CUDA}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["discriminator", "classifier"])
def test_a_step_of_a_discriminator_waits_for_nothing(gpu, kind, precision):
    network = build_judge(kind, {"discriminator": "time-encoder", "classifier": "time-encoder-classifier"}[kind])
    x, eps, t = (
        torch.randn(4, 3, 32, 32),
        torch.randn(4, 3, 32, 32),
        vp_sde.TimeLaw("importance").times(torch.rand(4)).t,
    )

    def step():
        x0, noise, time, label = moved((x, eps, t, torch.zeros(4, dtype=torch.int64)))
        with inference_precision(precision, CUDA):
            if kind == "classifier":
                return torch.nn.functional.cross_entropy(network(noisy(x0, time, noise), time).float(), label)
            logit = network(noisy(x0, time, noise), time, label)
            return discriminator_loss(logit[:2], logit[2:]).loss

    found, loss = waits(gpu, step)
    assert found == WAITS["training step"]
    assert (loss.dtype, loss.device) == (torch.float32, CUDA)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_is_read_once_it_is_done(gpu, kind):
    model, sampling = build(kind), {**MODELS[kind][-1], "precision": "fp16"}
    if not model.codec.is_discrete:
        sampling["steps"] = 2
    found, (batch,) = waits(gpu, lambda: draw(model, **sampling))
    assert found == WAITS["sampled batch of tokens" if model.codec.is_discrete else "sampled batch"]
    assert (batch.items.device.type, batch.items.dtype) == ("cpu", torch.uint8)


def per_step(gpu, model, **sampling):
    """What a further step waits for; a batch as a whole waits for what the table says."""
    few, many = (waits(gpu, lambda n=n: draw(model, steps=n, **sampling))[0] for n in (3, 5))
    assert few == WAITS["sampled batch"]
    return many[len(few) :]


CHURN = {"s_churn": 4.0, "s_noise": 1.01}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith("flow")])
def test_no_step_of_a_sampler_waits(gpu, sampler, dtype):
    churn, model = CHURN if SAMPLERS[sampler].churns else {}, build("diffusion")
    if sampler == "euler-maruyama":
        model.precond = Vp()
    assert per_step(gpu, model, sampler=sampler, dtype=dtype, **churn) == []


@pytest.mark.parametrize(
    "sampler", [name for name in SAMPLERS if name.startswith("flow") and not SAMPLERS[name].is_adaptive]
)
def test_no_step_in_flow_matching_s_time_waits(gpu, sampler):
    model = build("diffusion")
    model.precond = Flow()
    assert per_step(gpu, model, sampler=sampler) == []


@pytest.mark.parametrize("schedule", ["vp", "ve", "linear"])
def test_no_step_of_the_generalised_sampler_waits(gpu, schedule):
    choice = {"discretization": "edm", "schedule": schedule, "scaling": "vp", "step_ratio": 0.7}
    assert per_step(gpu, build("diffusion"), sampler="heun", **choice, **CHURN) == []


def guides(which):
    weight = {"weight": 2.0, "weight_2nd": 1.0, "decay": "cosine"}
    return {
        "discriminator": lambda: [GradientGuide(build_judge("discriminator"), **weight)],
        # Levels that differ by row, in the interval of another guide, too.
        "boosting": lambda: [
            AutoGuide(build("diffusion"), 1.7, Interval(0.1, 10.0)),
            GradientGuide(build_judge("discriminator"), 2.0, boost=Boost(churn_period=1)),
        ],
        "classifier": lambda: [
            GradientGuide(
                partial(_class_log_probability, build_judge("classifier", "time-encoder-classifier")), **weight
            )
        ],
        "adm-classifier": lambda: [
            GradientGuide(partial(_class_log_probability, build_judge("classifier", "adm-classifier")), **weight)
        ],
        "autoguidance": lambda: [AutoGuide(build("diffusion"), 1.7, Interval(0.1, 10.0))],
        "guidance": lambda: [],
    }[which]()


@pytest.mark.parametrize(
    "which", ["discriminator", "boosting", "classifier", "adm-classifier", "autoguidance", "guidance"]
)
def test_no_guided_step_waits(gpu, which):
    scale = {"cfg_scale": 1.7, "cfg_sigma_min": 0.1} if which == "guidance" else {}
    model = build("diffusion").guided_by(guides(which))
    assert per_step(gpu, model, sampler="heun", **scale, **CHURN) == WAITS["guided step"]


def test_no_boosted_step_of_the_generalised_sampler_waits(gpu):
    model = build("diffusion").guided_by(guides("boosting"))
    assert per_step(gpu, model, sampler="heun", schedule="vp", **CHURN) == WAITS["guided step"]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_a_held_out_evaluation_reads_once(gpu):
    side = torch.randn(6, 3, 32, 32), torch.zeros(6, dtype=torch.int64)
    held_out = HeldOut(side, side, vp_sde.TimeLaw("importance"), 0, CUDA)
    network = build_judge("discriminator")
    found, figures = waits(gpu, lambda: held_out.evaluate(network))
    assert found == WAITS["held-out evaluation"]
    assert len(figures["levels"]) == LEVELS


def test_features_are_summed_on_the_gpu(gpu):
    extractor = select_extractor("fd_embedded", None, None, CUDA)
    batches = [torch.zeros(4, 3, 32, 32, dtype=torch.uint8) for _ in range(5)]
    few, many = (waits(gpu, lambda n=n: moments_of(extractor, batches[:n]))[0] for n in (3, 5))
    assert many[: len(many) - len(few)] == 2 * WAITS["batch of features"]


def test_latents_are_decoded_on_the_gpu(gpu, tmp_path, monkeypatch):
    from test_vae_codec import save_vae

    save_vae(tmp_path)
    monkeypatch.setenv(vae_codec.VARIABLE, str(tmp_path))
    codec = vae_codec.StabilityCodec((3, 32, 32))
    latents = torch.zeros(9, 4, 4, 4, device=CUDA)
    codec.decode(latents[:1])  # loads the autoencoder
    found, images = waits(gpu, lambda: codec.decode(latents))
    assert found == []
    assert (images.device, images.dtype, images.shape) == (CUDA, torch.uint8, (9, 3, 32, 32))


# ---------------------------------------------------------------------------------------------------------------------
# The tests can fail


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda x: x[0].item(), ["item"]),
        (lambda x: bool((x > 0).any()), ["item"]),
        (lambda x: x.cpu(), ["copy to the CPU"]),
        (lambda x: torch.ones(3).to(x), ["copy from the CPU"]),
        (lambda x: torch.ones(3).to(CUDA, non_blocking=True), ["copy from the CPU"]),  # from memory not pinned
        (lambda x: torch.ones(3).pin_memory().to(CUDA), ["copy from the CPU"]),  # waits all the same
        (lambda x: torch.ones(3).pin_memory().to(CUDA, non_blocking=True), []),
        (lambda x: torch.tensor([1.0], device=CUDA), ["copy from the CPU"]),
        (lambda x: torch.full((3,), 1.0, device=CUDA), []),
        (lambda x: torch.tensor(2.0) * x, []),
        (lambda x: torch.where(x > 0, torch.tensor(2.0), x), ["where with a tensor of the CPU"]),
        (lambda x: x[torch.tensor([0])], ["index with a tensor of the CPU"]),
    ],
)
def test_waits_are_seen(gpu, call, found):
    assert waits(gpu, lambda: call(torch.zeros(3, device=CUDA)))[0] == found


def test_devices_that_do_not_fit_are_refused(gpu):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=CUDA) * torch.zeros(3)
