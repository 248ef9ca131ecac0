"""EDM2's float32 sampler, guidance within an interval, and the precision of sampling's passes."""

import json

import pytest
import torch
from conftest import CPU, make_checkpoint
from test_samplers import FixedNoise, analytic, stream
from torch import nn
from torch.testing import assert_close

from ddo_cli import checkpoint
from ddo_cli.codec import Codec
from ddo_cli.commands.options import interval_of
from ddo_cli.diffusion import samplers, sampling_plan
from ddo_cli.diffusion.churn import Churn
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.guidance import AutoGuide, GradientGuide, Interval, extrapolated, in_turn
from ddo_cli.diffusion.schedules import karras_sigmas
from ddo_cli.diffusion.trace import Trace
from ddo_cli.engines.sampling import guides, sample
from ddo_cli.engines.sampling.guides import Others
from ddo_cli.errors import RecipeError, UsageError
from ddo_cli.generation import generate
from ddo_cli.models import registry
from ddo_cli.precision import inference_precision
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

# ---------------------------------------------------------------------------------------------------------------------
# Float32, as EDM2 samples


class Analytic(DiffusionModel):
    """The denoiser of the parity vectors, with the factor `a` of its second term."""

    def __init__(self, a, num_classes=0):
        super().__init__(nn.Identity(), Codec((3, 4, 4)), num_classes, DiffusionOptions(), DiffusionDrawOptions())
        self.a, self.seen = a, []

    def denoise(self, x, sigma, label):
        self.seen.append((x.dtype, sigma.dtype, sigma.item(), label))
        linear, whole = (0.25 * x.float() / (sigma.float() ** 2 + 0.25), analytic(x, sigma).float())
        return linear + self.a / 0.3 * (whole - linear)


class FixedLatent(FixedNoise):
    """Stands in for RowRng: the latent is stream(3), what follows is FixedNoise."""

    def randn(self, shape, dtype=torch.float32):
        if self.k == 0:
            self.k = 1
            return stream(3, (2, *shape)).to(dtype)
        return super().randn(shape, dtype)

    def randint(self, high):
        return torch.zeros(2, dtype=torch.int64)


def summary(x):
    flat = x.flatten().double()
    return torch.cat([flat[:4], flat[-2:], flat.mean()[None], flat.std(correction=0)[None]])


# Of EDM2's own sampler, 32 steps: first four, last two, mean, standard deviation.
PLAIN = [-0.575625, 1.05713, 0.251707, 1.07674, 0.16357, 0.572819, 0.04971837, 0.7011766]
GUIDED = [-0.625319, 1.11399, 0.287775, 1.13375, 0.192705, 0.62244, 0.05307011, 0.7485485]
EDM2 = SamplingRecipe(sampler="heun", steps=32, dtype="float32")


def test_the_float32_levels_of_edm2():
    found = karras_sigmas(32, 0.002, 80, dtype=torch.float32)
    assert found.dtype == torch.float32
    expected = [79.99998, 66.93087, 55.73619, 46.18639, 38.07486, 31.21641, 25.44535, 20.61405, 16.59137, 13.26122]
    assert_close(found[:10], torch.tensor(expected), rtol=2e-7, atol=0)  # seven digits are printed
    expected = [0.01575746, 0.00845305, 0.004266835, 0.00199999963, 0]
    assert_close(found[-5:], torch.tensor(expected), rtol=2e-7, atol=0)
    rounded = karras_sigmas(32, 0.002, 80).float()
    assert rounded[0] == 80  # calculated in float64 they are others
    assert (rounded != found).sum() > 10


@pytest.mark.parametrize(("guided", "expected"), [(False, PLAIN), (True, GUIDED)])
def test_parity_with_edm2(guided, expected):
    model, second = Analytic(0.3), Analytic(0.2)
    given = [AutoGuide(second, 1.7)] if guided else []
    found = model.guided_by(given).sample(torch.tensor([-1, -1]), FixedLatent(), EDM2)
    assert found.x.dtype == torch.float32
    assert {seen[:2] for seen in model.seen} == {(torch.float32, torch.float32)}
    assert_close(summary(found.x), torch.tensor(expected, dtype=torch.float64), rtol=4e-6, atol=1e-6)  # six digits
    assert found.nfe == (126 if guided else 63)


def test_other_guidance_has_other_numbers():
    for scale, a in ((1.6, 0.2), (1.7, 0.25)):
        guided = Analytic(0.3).guided_by([AutoGuide(Analytic(a), scale)])
        found = guided.sample(torch.tensor([-1, -1]), FixedLatent(), EDM2)
        assert (summary(found.x) - torch.tensor(GUIDED)).abs().max() > 1e-3


def test_the_float32_sampler_draws_noise_inside_its_window_only():
    sigmas = karras_sigmas(8, 0.002, 80)
    inside = int(((sigmas[:-1] >= 0.05) & (sigmas[:-1] <= 50)).sum())
    for dtype, draws in ((torch.float32, inside), (torch.float64, 8)):
        rng = FixedNoise()
        x = stream(3, (2, 3, 4, 4)).to(dtype)
        found = samplers.heun(analytic_as(dtype), x, sigmas.to(dtype), Churn(40, 0.05, 50, 1.003, rng))
        assert (rng.k, found.dtype) == (draws, dtype)
    assert 0 < inside < 8


def analytic_as(dtype):
    return lambda x, sigma, stage="predictor": analytic(x, sigma).to(dtype)


@pytest.mark.parametrize("sampler", sorted(name for name in samplers.SAMPLERS if not name.startswith("flow")))
def test_every_sampler_and_guide_keeps_the_type(sampler):
    guide = GradientGuide(lambda x_vp, t, label: x_vp.flatten(1).sum(1), 0.1, 0.1, time_min=0.0)
    spec = SamplingRecipe(sampler=sampler, steps=6)
    rows = torch.tensor([-1, -1])
    whole = Analytic(0.3).guided_by([guide]).sample(rows, RowRng([1, 2]), spec)
    for given in ([], [guide]):
        found = Analytic(0.3).guided_by(given).sample(rows, RowRng([1, 2]), spec.merged(dtype="float32"))
        assert found.x.dtype == torch.float32
    if sampler not in ("ddpm", "euler-maruyama"):  # which draw other numbers in another type
        assert_close(found.x.double(), whole.x, rtol=1e-4, atol=1e-4)


def test_the_generalised_sampler_is_float64():
    with pytest.raises(UsageError, match=r"schedule = vp: EDM's generalised sampler is float64; leave sampling.dtype"):
        Analytic(0.3).check_sampling(SamplingRecipe(schedule="vp", dtype="float32"))


# ---------------------------------------------------------------------------------------------------------------------
# Guidance within an interval


def constant(value, calls):
    def denoise(x, sigma, stage="predictor"):
        calls.append(sigma)
        return torch.full_like(x, value)

    return denoise


def test_the_interval_is_open_below_and_closed_above():
    calls = []
    good = constant(1.0, [])
    guided = extrapolated(good, in_turn(good, constant(0.0, calls)), 3.0, Interval(0.5, 2.0))
    x = torch.zeros(2, 1)
    found = [guided(x, torch.tensor(sigma))[0].item() for sigma in (0.1, 0.5, 0.51, 2.0, 2.1)]
    assert found == [1, 1, 3, 3, 1]
    assert [sigma.item() for sigma in calls] == pytest.approx([0.51, 2.0])  # not evaluated where it is not needed
    assert guided(x, torch.tensor([0.1, 1.0])).flatten().tolist() == [1, 3]  # each row by its own level


def test_an_unlimited_interval_is_no_limit():
    model, label = Analytic(0.3, 10), torch.tensor([1, 2])
    plain, same = (
        model.guided_by([AutoGuide(Analytic(0.2), 1.7, interval)]).sample(label, RowRng([1, 2]), EDM2)
        for interval in (Interval(), Interval(0.0, 100.0))
    )
    assert torch.equal(plain.x, same.x)


def test_evaluations_outside_the_interval_are_saved():
    second = Analytic(0.2)
    spec = SamplingRecipe(sampler="euler", steps=18)
    visited = Analytic(0.3).sigmas(spec)[:-1]
    inside = visited[(visited > 0.3) & (visited <= 6.0)]
    guided = Analytic(0.3).guided_by([AutoGuide(second, 2.0, Interval(0.3, 6.0))])
    found = guided.sample(torch.tensor([-1, -1]), RowRng([1, 2]), spec)
    assert found.nfe == 18 + len(inside) < 36
    assert [seen[2] for seen in second.seen] == inside.tolist()


class Labelled(Analytic):
    """Has another `a` without labels."""

    def denoise(self, x, sigma, label):
        found = torch.zeros(x.shape)
        for rows, a in ((label >= 0, 0.3), (label < 0, 0.2)):
            found[rows] = Analytic(a).denoise(x[rows], sigma, label[rows])
        return found


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.3, 6.0), (None, 6.0), (0.3, None)])
def test_classifier_free_guidance_has_the_same_interval(low, high):
    spec = SamplingRecipe(sampler="euler", steps=18, cfg_scale=1.7, cfg_sigma_min=low, cfg_sigma_max=high)
    label = torch.tensor([1, 2])
    found = Labelled(0.3, 10).sample(label, RowRng([1, 2]), spec)
    guide = AutoGuide(Analytic(0.2), 1.7, Interval(low or 0.0, high or 1e9))
    guided = Analytic(0.3, 10).guided_by([guide])
    other = guided.sample(label, RowRng([1, 2]), SamplingRecipe(sampler="euler", steps=18))
    assert_close(found.x, other.x)
    assert found.nfe == other.nfe


def test_an_interval_that_never_acts_or_limits_nothing_is_refused():
    model = Analytic(0.3, 10)
    with pytest.raises(UsageError, match="cfg_sigma_max: of a cfg_scale other than 1; set it too"):
        model.check_sampling(SamplingRecipe(cfg_sigma_max=2.0))
    with pytest.raises(UsageError, match=r"of sampling.cfg_scale from 90 to inf holds none .*, 0.002 to 80; widen it"):
        model.check_sampling(SamplingRecipe(cfg_scale=2.0, cfg_sigma_min=90.0))
    with pytest.raises(UsageError, match=r"--guidance-interval from 0.0021 to 0.0022 holds none of the sampler's"):
        model.guided_by([AutoGuide(model, 2.0, Interval(0.0021, 0.0022))]).check_sampling(SamplingRecipe())
    with pytest.raises(ValueError, match=r"cfg_sigma_min = 3.0 must be below cfg_sigma_max = 2.0"):
        SamplingRecipe(cfg_scale=2.0, cfg_sigma_min=3.0, cfg_sigma_max=2.0)
    with pytest.raises(RecipeError, match=r"cfg_sigma_min = 3.0 must be below"):
        SamplingRecipe(cfg_scale=2.0, cfg_sigma_max=2.0).merged(cfg_sigma_min=3.0)
    model.check_sampling(SamplingRecipe(cfg_scale=2.0, cfg_sigma_max=2.0).merged(cfg_scale=1.0))  # a file's own


@pytest.mark.parametrize(
    ("text", "complaint"), [("0.3", "has 1 numbers; write two noise levels"), ("a,b", "cannot be read")]
)
def test_an_interval_is_two_numbers(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        interval_of(text)


def test_intervals_of_options():
    assert (interval_of(None), interval_of("0.3,2")) == (None, (0.3, 2.0))
    for bad in ((2.0, 0.3), (-1.0, 2.0), (float("nan"), 1.0)):
        with pytest.raises(UsageError, match="must be two increasing noise levels"):
            guides._check_others(Others("x", 2.0, interval=bad))
    with pytest.raises(UsageError, match=r"--guidance-interval 0.3,2 needs --guide-ckpt"):
        guides._check_others(Others(interval=(0.3, 2.0)))


# ---------------------------------------------------------------------------------------------------------------------
# A second network in files


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    return without_classes(tmp_path_factory.mktemp("model") / "unconditional.safetensors")


def without_classes(path):
    options = {"patch": 4, "widths": [8], "depths": [1], "emb_width": 16}
    config = registry.config_of("patch-unet", (3, 32, 32), 0, options, {})
    torch.manual_seed(5)
    model = registry.build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(path, model.state_dict(), {"kind": "model", "config": config, "sampling": {}, "provenance": []})
    return str(path)


def test_an_unconditional_network_is_classifier_free_guidance(ckpt, unconditional):
    base, second = (registry.load_model(path, CPU).model for path in (ckpt, unconditional))
    found, record = guides.other_guides(Others(unconditional, 1.7), base, CPU)
    x, sigma, label = torch.randn(4, 3, 32, 32), torch.tensor(0.7), torch.tensor([0, 3, 7, 9])
    steered = base.guided_by(found).steered(label, SamplingRecipe(), Trace())(x, sigma)
    d, d_g = base.denoise(x, sigma, label), second.denoise(x, sigma, torch.full((4,), -1))
    assert_close(steered, d_g + 1.7 * (d - d_g))
    assert (steered - d).abs().max() > 1e-2
    assert "interval" not in record["autoguidance"]


def test_the_interval_of_a_second_network_is_in_the_manifest(ckpt, unconditional, tmp_path):
    model, record = guides.of_plain_sampling(
        Others(unconditional, 2.0, interval=(0.3, 6.0)), registry.load_model(ckpt, CPU), CPU
    )
    settings = {"sampler": "euler", "steps": 8}
    found = sample.run(model, range(4), tmp_path / "set", sampling=settings, guidance=record, device=CPU)
    assert 8 < found["nfe"] < 16
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["guidance"]["autoguidance"]["interval"] == [0.3, 6.0]


def test_a_network_of_another_space_is_refused(ckpt, unconditional, monkeypatch):
    base = registry.load_model(ckpt, CPU).model
    base.codec = Codec(base.codec.shape)
    with pytest.raises(UsageError, match=r"draws in the space of a PixelCodec .*, the model in that of a Codec"):
        guides.other_guides(Others(unconditional, 2.0), base, CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def images(model, precision, steps=4):
    spec = SamplingRecipe(precision=precision, **({} if steps is None else {"steps": steps}))
    model.check_sampling(spec)
    (made,) = generate(model, range(8), spec, batch=8)
    return made


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_changes_images_a_little(ckpt, precision):
    model, _ = registry.load_model(ckpt, CPU)
    plain, half = images(model, None), images(model, precision)
    assert half.nfe == plain.nfe
    apart = (plain.items.int() - half.items.int()).abs().float()
    assert 0 < apart.mean() < 1.5  # grey levels
    assert torch.equal(plain.items, images(model, "float32").items)
    assert torch.equal(plain.items, images(model, "tf32").items)  # a CPU has none


def test_an_autoregressive_model_draws_in_half_precision(tmp_path):
    model, _ = registry.load_model(make_checkpoint(tmp_path / "t.safetensors", "autoregressive"), CPU)
    plain, half = images(model, None, None), images(model, "bf16", None)
    assert half.nfe == plain.nfe
    same = (plain.items == half.items).float().mean()
    assert same > 0.3  # one token that differs leads to others
    x, draw = model.codec.encode(plain.items), model.draw(8, RowRng(range(8)))
    predicted = model.predict(x, plain.label, draw)
    with inference_precision("bf16", CPU):
        rounded = model.predict(x, plain.label, draw)
    assert 0 < (predicted - rounded).abs().max() < 0.5  # the passes do compute in half precision


def test_precision_is_of_sampling_alone(ckpt, tmp_path):
    model, _ = registry.load_model(ckpt, CPU)
    x, label = torch.randn(4, 3, 32, 32), torch.arange(4)
    draw = model.draw(4, RowRng(range(4)))
    before = model(x, label, draw)
    list(generate(model, range(2), SamplingRecipe(precision="bf16", steps=2), batch=2))
    assert torch.equal(model(x, label, draw), before)
    sample.run(ckpt, range(2), tmp_path / "set", sampling={"precision": "bf16", "steps": 2}, device=CPU)
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["sampling"]["precision"] == "bf16"


def test_switches_are_put_back():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = switches[0].allow_tf32, switches[1].fp32_precision
    for precision, inside in (("tf32", (True, "tf32")), ("float32", (False, "ieee")), ("bf16", (False, "ieee"))):
        with inference_precision(precision, CPU):
            assert (switches[0].allow_tf32, switches[1].fp32_precision) == inside
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
        assert (switches[0].allow_tf32, switches[1].fp32_precision) == before


def test_a_guides_gradient_stays_float32():
    weight = torch.randn(16, 1)
    seen = []

    def potential(x_vp, t, label):
        value = x_vp.flatten(1)[:, :16] @ weight
        seen.append(value.dtype)
        return value[:, 0]

    guide = GradientGuide(potential, 1.0, time_min=0.0)
    with inference_precision("bf16", CPU):
        guided = Analytic(0.3).guided_by([guide])
        guided.sample(torch.tensor([-1, -1]), RowRng([1, 2]), SamplingRecipe(steps=3))
    assert set(seen) == {torch.float32}


def test_levels_have_the_type_of_the_state():
    assert (
        sampling_plan.dtype_of(SamplingRecipe())
        == sampling_plan.dtype_of(SamplingRecipe(dtype="float64"))
        == torch.float64
    )
    assert Analytic(0.3).sigmas(EDM2).dtype == torch.float32
