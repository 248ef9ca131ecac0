"""Activation checkpointing, and a reference kept in bf16."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import CPU, KINDS, make_checkpoint, tiny_recipe
from torch import nn

from ddo_cli.engines.ddo import finetune
from ddo_cli.errors import UsageError
from ddo_cli.models import registry
from ddo_cli.rng import RowRng
from ddo_cli.trainable import Trainable
from ddo_cli.training.recompute import recompute_units


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
    with pytest.raises(UsageError, match="activation_checkpointing = true: this Trainable names no blocks"):
        recompute_units(Trainable())


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
