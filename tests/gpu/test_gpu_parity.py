"""A GPU gives what a CPU gives: predictions, log-ratios, gradients and images, in every precision."""

import copy

import pytest
import torch
from conftest import KINDS, make_checkpoint
from gpu_models import PUBLISHED, TINY, at, built, error, moved, rows

from ddo_cli.generation import generate
from ddo_cli.models import registry
from ddo_cli.precision import allow_tf32, inference_precision, training_precision
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

pytestmark = pytest.mark.gpu

# Largest error of a prediction, relative to its norm. Formats keep 24, 11, 11 and 8 bits; bf16 and fp16 round what each
# layer gives, TF32 the factors of products alone.
BARS = {"float32": 3e-5, "tf32": 4e-3, "fp16": 8e-3, "bf16": 4e-2}


@pytest.fixture
def training(device):
    """precision -> the context of a training step, with the process's switches."""

    def of(precision):
        allow_tf32(precision == "tf32")
        return training_precision(precision, device)

    yield of
    allow_tf32(False)


class Exact:
    """A reference and a model a little away from it, with what they give on a CPU in float32."""

    def __init__(self, size):
        self.ref, self.model = built(size), built(size)
        moved(self.model)
        self.ref.requires_grad_(False)
        self.rows = rows(self.ref, 2)
        self.prediction = self.ref.predict(*self.rows)
        self.r = self.model(*self.rows, self.prediction)
        self.r.mean().backward()
        self.gradient = gradient(self.model)


def gradient(model):
    """Of all parameters, in one vector."""
    return torch.cat([p.grad.detach().flatten().cpu() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def exact():
    """family -> what a CPU gives, computed once."""
    known = {}
    return lambda family: known.setdefault(family, None) or known.update({family: Exact(TINY[family])}) or known[family]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("precision", BARS)
def test_predictions_log_ratios_and_gradients(exact, training, device, family, precision, record_property):
    known = exact(family)
    ref, model = copy.deepcopy(known.ref).to(device), copy.deepcopy(known.model).to(device)
    model.zero_grad()
    given = at(device, *known.rows)
    with training(precision):
        with torch.no_grad():
            prediction = ref.predict(*given)
        r = model(*given, prediction)
    r.mean().backward()
    assert r.dtype == torch.float32
    found = {
        "predict": error(prediction, known.prediction),
        "log_ratio": error(r, known.r),
        "gradient": error(gradient(model), known.gradient),
    }
    for name, value in found.items():
        record_property(name, value)
    # A log-ratio is a difference of predictions, here 10 % apart, and a gradient passes through every layer twice.
    assert found["predict"] < BARS[precision]
    assert found["log_ratio"] < 10 * BARS[precision]
    assert found["gradient"] < 5 * BARS[precision]


@pytest.mark.slow
@pytest.mark.parametrize("title", PUBLISHED)
def test_predictions_of_published_sizes(device, title, record_property):
    model = built(PUBLISHED[title])
    given = rows(model, 2)
    with torch.no_grad():
        exact = model.predict(*given)
        model = model.to(device)
        found = {}
        for precision in BARS:
            with inference_precision(precision, device):
                found[precision] = error(model.predict(*at(device, *given)), exact)
            record_property(precision, found[precision])
    assert all(found[precision] < bar for precision, bar in BARS.items()), found


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("precision", BARS)
def test_equal_weights_have_a_log_ratio_of_exactly_0(training, device, family, precision):
    ref = built(TINY[family]).to(device)
    model = copy.deepcopy(ref).requires_grad_(True)
    ref.requires_grad_(False)
    given = at(device, *rows(ref, 6))
    with training(precision):
        with torch.no_grad():
            prediction = ref.predict(*given)
        r = model(*given, prediction)
    assert torch.equal(r, torch.zeros_like(r))
    r.sum().backward()  # the same pass that trains


# ---------------------------------------------------------------------------------------------------------------------
# Images of seeds


def images(model, device, seeds=range(8), batch=8, precision="float32", **spec):
    """uint8, in the order of the seeds."""
    spec = SamplingRecipe(precision=precision, **spec)
    batches = list(generate(model.to(device), seeds, spec, batch=batch, device=device))
    return torch.cat([one.items for one in batches])


def assert_same_images(found, expected, most=1, share=0.02):
    """Equal up to rounding: no value differs by more than `most`, and few at all."""
    apart = (found.int() - expected.int()).abs()
    assert int(apart.max()) <= most
    assert float((apart > 0).float().mean()) <= share


SAMPLERS = {
    "heun": {"sampler": "heun", "steps": 4},
    "heun, churned": {"sampler": "heun", "steps": 4, "s_churn": 4.0},
    "heun in float32": {"sampler": "heun", "steps": 4, "dtype": "float32"},
    "dpmpp-2m": {"sampler": "dpmpp-2m", "steps": 4},
    "dpm-v3": {"sampler": "dpm-v3", "steps": 5},
    "ddim": {"sampler": "ddim", "steps": 4},
    "ddpm": {"sampler": "ddpm", "steps": 4},
    "generalised": {"sampler": "heun", "steps": 4, "discretization": "vp", "schedule": "vp", "scaling": "vp"},
    "guided, cuda's numbers": {"sampler": "euler", "steps": 4, "cfg_scale": 1.5, "rng": "cuda", "s_churn": 4.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> a fresh model."""
    path = tmp_path_factory.mktemp("models")
    files = {kind: make_checkpoint(path / f"{kind}.safetensors", kind) for kind in KINDS}
    return lambda kind: registry.load_model(files[kind], torch.device("cpu")).model


@pytest.mark.parametrize("title", SAMPLERS)
def test_a_seed_has_the_same_image(models, device, title):
    model, cpu = models("diffusion"), torch.device("cpu")
    assert_same_images(images(model, device, **SAMPLERS[title]), images(model, cpu, **SAMPLERS[title]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "diffusion"])
def test_a_seed_has_the_same_image_in_other_families(models, device, kind):
    model, cpu = models(kind), torch.device("cpu")
    spec = {"sampler": "euler", "steps": 4} if kind == "edm2" else {"cfg_scale": 1.5}
    found, expected = images(model, device, **spec), images(model, cpu, **spec)
    if kind in ("edm2", "dit"):
        return assert_same_images(found, expected)
    # A drawn token changes where a uniform number falls between two roundings of a sum of probabilities: some 1e-5 of
    # the tokens, and then the rest of that image.
    same = (found == expected).flatten(1).all(1)
    assert int(same.sum()) >= len(same) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_order_change_no_image(models, device, kind):
    model = models(kind)
    spec = {} if kind in ("autoregressive", "var") else {"sampler": "heun", "steps": 3, "s_churn": 2.0}
    whole = images(model, device, **spec)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    assert torch.equal(images(model, device, order, **spec), whole)  # cut alike, in increasing order
    parts = images(model, device, batch=3, **spec)
    if kind in ("autoregressive", "var"):
        assert int((parts == whole).flatten(1).all(1).sum()) >= len(whole) - 1
    else:
        assert_same_images(parts, whole)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_images_in_reduced_precision(models, device, precision, record_property):
    model, cpu = models("diffusion"), torch.device("cpu")
    spec = {"sampler": "heun", "steps": 6}
    apart = (images(model, device, precision=precision, **spec).int() - images(model, cpu, **spec).int()).abs().float()
    record_property("largest of 255", float(apart.max()))
    record_property("mean of 255", float(apart.mean()))
    assert float(apart.mean()) < {"tf32": 0.5, "fp16": 0.5, "bf16": 4.0}[precision]


def test_densities(models, device):
    model = built(TINY["mlp"])
    x, label = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), torch.full((16,), -1)
    exact = model.log_density(x, label, SamplingRecipe())
    found = model.to(device).log_density(x.to(device), label.to(device), SamplingRecipe())
    assert error(found, exact) < 1e-4


def test_draws_do_not_depend_on_the_device(device):
    model = built(TINY["patch-unet"])
    here = model.draw(4, RowRng.for_rows("x", rows=range(4)))
    there = model.to(device).draw(4, RowRng.for_rows("x", rows=range(4)))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
