"""Recomputed blocks, imagined computations, and the estimates made of them."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import CPU, KINDS, make_checkpoint, tiny_recipe
from torch import nn

from ddo_cli import dist
from ddo_cli.engines import estimate
from ddo_cli.engines.ddo import finetune
from ddo_cli.errors import UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.recipe.training import FinetuneRecipe, PretrainRecipe
from ddo_cli.rng import RowRng
from ddo_cli.training import memory
from ddo_cli.training.recompute import recompute_units

IMAGE = ((3, 32, 32), torch.uint8)
WORK = estimate.Work(steps=10, scored=100, fake=1000, stored=3)


def gradients(model) -> list[torch.Tensor]:
    items = torch.randint(
        0, 256, (3, *model.codec.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    draw = model.draw(3, RowRng.for_rows("x", rows=range(3)))
    model.zero_grad()
    model(model.codec.encode(items), torch.tensor([0, 1, -1]), draw).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_gradients_are_the_same_bits(kind, tmp_path, monkeypatch):
    model = registry.load_model(make_checkpoint(tmp_path / "x.safetensors", kind), CPU).model
    before, names = gradients(model), list(model.state_dict())
    calls, first = 0, model.units()[0]
    forward = type(first).forward

    def counted(self, *args, **kwargs):
        nonlocal calls
        calls += self is first
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(first), "forward", counted)
    for _ in range(2):  # the second time changes nothing
        recompute_units(model)
    after = gradients(model)
    assert calls == 2  # once more in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert list(model.state_dict()) == names
    with torch.no_grad():
        list(model.units())  # sampling computes once
        draw = model.draw(1, RowRng([0]))
        model.predict(
            model.codec.encode(torch.zeros(1, *model.codec.shape, dtype=torch.uint8)), torch.tensor([0]), draw
        )
    assert calls == 3


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_recomputed_model_goes_when_nobody_has_it(tmp_path, no_collector):
    """By its references alone, and not when the collector comes by."""
    model = registry.load_model(make_checkpoint(tmp_path / "x.safetensors", "edm2"), CPU).model
    recompute_units(model)
    gradients(model)
    unit = weakref.ref(model.units()[0])
    del model
    assert unit() is None


def test_a_copy_of_a_recomputed_model_computes_with_its_own_weights(tmp_path):
    model = registry.load_model(make_checkpoint(tmp_path / "x.safetensors"), CPU).model
    recompute_units(model)
    before, copied = gradients(model), copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(copied), strict=True))


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("edm-unet", (3, 16, 16), {"channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "dropout": 0.5}),
        ("adm-unet", (3, 16, 16), {"width": 32, "channel_mult": [1, 2], "num_blocks": 1, "attention": [8],
                                   "num_head_channels": 32}),
    ],
)  # fmt: skip
def test_recomputed_unets_with_dropout(name, shape, options):
    """The second pass drops the same activations."""
    config = registry.config_of(name, shape, 4, options, {})
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = registry.build(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        if recomputed:
            recompute_units(model)
        torch.manual_seed(1)
        found.append(gradients(model.train()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_models_without_blocks_are_refused():
    with pytest.raises(UsageError, match="activation_checkpointing = true: this Linear names no blocks"):
        recompute_units(nn.Linear(1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Imagined computations


def test_peak_counts_what_lives_at_once():
    def compute():
        x = torch.zeros(1000)  # 4000 bytes
        y = x * 2  # 8000
        del x
        z = y + 1  # 8000
        z.add_(1)
        z[:500].mul_(2)  # a view and what works in place take nothing
        return torch.cat([y, z])  # 16000

    with memory.imagined():
        assert memory.cost(compute) == memory.Cost(peak=16000, saved=0, flops=0)


def test_saved_tensors_and_operations_of_a_layer():
    layer = nn.Linear(20, 30, bias=False)
    with memory.imagined():
        memory.without_content(layer, CPU)

        def compute():
            x = torch.zeros(10, 20)  # 800 bytes, saved for the weight's gradient
            layer(x).exp().sum().backward()  # the exponential (10, 30) is saved: 1200 bytes

        found = memory.cost(compute, layer)
    assert found.saved == 800 + 1200
    assert found.flops == 2 * (2 * 10 * 20 * 30)  # forward; backward to the weight
    # Before the sum: x, the layer's output, its exponential. In the backward pass: x, the exponential, gradients.
    assert found.peak >= 800 + 2 * 1200
    assert found.peak <= 800 + 3 * 1200 + 20 * 30 * 4


def deep(recompute: bool, batch: int = 4, **values) -> dict:
    config = registry.config_of("pixel-transformer", (1, 8, 8), 10, {"width": 16, "depth": 12, "heads": 2}, {})
    settings = FinetuneRecipe(batch=batch, activation_checkpointing=recompute, **values)
    spec = SamplingRecipe(batch=2)
    item = ((1, 8, 8), torch.uint8)
    return estimate.estimate(config, settings, spec, [item, item], WORK, device=CPU)


def test_an_estimate_knows_batches_and_recomputing():
    plain, large, small, again = deep(False), deep(False, 8), deep(False, 8, micro_batch=4), deep(True)
    weights = plain["bytes"]["weights"]
    assert plain["bytes"]["moments"] == 2 * plain["bytes"]["gradients"]
    assert abs(plain["bytes"]["moments"] - 2 * weights) < 100
    assert large["bytes"]["activations"] == pytest.approx(2 * plain["bytes"]["activations"], rel=0.02)
    assert small["bytes"]["activations"] == plain["bytes"]["activations"]
    assert small["flops"]["step"] == large["flops"]["step"] == 2 * plain["flops"]["step"]
    assert again["bytes"]["activations"] < 0.3 * plain["bytes"]["activations"]
    assert again["bytes"]["peak"] < plain["bytes"]["peak"]
    # A pass of the reference, one of the model and its backward pass at twice that; recomputing adds a forward pass
    # of the blocks, and the loss of what no block holds makes it a little less.
    assert 1.2 < again["flops"]["step"] / plain["flops"]["step"] <= 1.25
    assert deep(False, reference_precision="bf16")["bytes"]["reference"] == pytest.approx(weights / 2, rel=0.01)
    assert deep(False, ema_widths=[0.05, 0.1])["bytes"]["averages"] == 2 * plain["bytes"]["averages"]


def test_sharding_spreads_what_lasts(monkeypatch):
    alone = deep(False, 8)["bytes"]
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    spread = deep(False, 8, sharding="fsdp")["bytes"]
    for key in ("weights", "moments", "averages", "reference", "gradients"):
        assert spread[key] == alone[key] // 2, key
    assert spread["evaluation_copy"] == alone["weights"]
    assert spread["activations"] == pytest.approx(alone["activations"] / 2, rel=0.05)
    assert spread["peak"] < deep(False, 8)["bytes"]["peak"]


@pytest.mark.parametrize("kind", KINDS)
def test_dry_runs_estimate(kind, tmp_path):
    recipe = tiny_recipe(make_checkpoint(tmp_path / "x.safetensors", kind), kind)
    found = finetune.run(recipe, tmp_path / "run", device=CPU, dry_run=True)["estimate"]
    held = found["bytes"]
    lasting = ("weights", "moments", "averages", "reference", "evaluation_copy")
    assert held["peak"] >= sum(held[key] for key in lasting) + held["activations"]
    assert found["seconds"]["total"] > 0
    if kind == "diffusion":  # two candidates and the best of each of two rounds, and the final file
        assert found["disk_bytes"]["checkpoints"] == pytest.approx((2 * 2 + 2 + 1) * held["weights"], rel=0.01)
    lines = estimate.described(found)
    assert lines.keys() == {"memory", "disk", "time"}
    assert "GiB per process" in lines["memory"]


def test_a_model_that_needs_data_is_not_estimated():
    config = registry.config_of("mixture", (2,), 0, {}, {})
    item = ((2,), torch.float32)
    found = estimate.estimate(config, PretrainRecipe(), SamplingRecipe(), [item], WORK, device=CPU)
    assert found["not_estimated"].startswith("mixture does not run without data: ")


# ---------------------------------------------------------------------------------------------------------------------
# A reference in bf16


def test_a_bf16_reference_is_measured_and_refused(tmp_path, capsys):
    ckpt = make_checkpoint(tmp_path / "x.safetensors")
    settings = ["finetune.reference_precision=bf16", "finetune.rounds=1", "finetune.images_per_round=4"]
    with pytest.raises(UsageError, match=r"bf16 reference: log-ratio off by .* more than 0\.1; use finetune\.ref"):
        finetune.run(tiny_recipe(ckpt, "diffusion", *settings, "finetune.beta=50.0"), tmp_path / "a", device=CPU)
    assert not (tmp_path / "a" / "round-01" / "samples").exists()
    recipe = tiny_recipe(ckpt, "diffusion", *settings, "finetune.beta=1.0e-6")
    finetune.run(recipe, tmp_path / "b", device=CPU)
    assert "bf16 reference: log-ratio off by" in capsys.readouterr().err
