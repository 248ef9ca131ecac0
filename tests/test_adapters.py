"""Adapters: every network of the package starts as its base, trains nothing else, and its files find their base."""

import json
from pathlib import Path

import families
import pytest
import torch
from conftest import CPU, kinds, make_checkpoint, tiny_recipe

from ddo_cli import checkpoint
from ddo_cli.engines.ddo import finetune
from ddo_cli.files import sha256
from ddo_cli.models import adapters, registry
from ddo_cli.recipe.training import AdapterRecipe
from ddo_cli.training.recompute import recompute_units

LORA = "finetune.adapter={kind: lora, rank: 2, alpha: 4.0}"


def with_adapter(family, **settings):
    """A model of random weights with a new adapter of rank 2, and the tensors of its base."""
    model = families.build(family)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = settings.pop("targets", ["head"] if family == "mlp" else list(model.adapter_targets()))
    adapters._inject(model, AdapterRecipe(kind="lora", rank=2, alpha=3.0, targets=targets, **settings), seed=0)
    return model, base


def moved(model):
    """The model with every tensor of its adapter away from where it starts."""
    torch.manual_seed(1)
    for tensor in model.state_dict().values():
        tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_whole_adapter_is_trained_and_nothing_else(family):
    """Also when blocks are recomputed: an adapter that is switched between the passes would lose its gradients."""
    model, base = with_adapter(family)
    ref = families.frozen(model)
    twin = adapters.twin(model)
    if twin.units():
        recompute_units(twin)
    log = families.step(twin, ref).log
    assert log["r_real"] == log["r_fake"] == 0
    families.step(moved(twin), ref).loss.backward()
    trained = {name: parameter for name, parameter in twin.named_parameters() if parameter.requires_grad}
    assert trained.keys() == twin.state_dict().keys()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    assert all(parameter.grad is None for name, parameter in twin.named_parameters() if name not in trained)
    for name, parameter in model.named_parameters():  # shared, but for the adapter, which has not moved
        assert (name in trained) == (twin.get_parameter(name) is not parameter)
        assert torch.equal(parameter, base.get(name.replace(".base_layer.", "."), parameter))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_merged_weights_are_those_of_a_network_that_computes_the_same(family):
    model, base = with_adapter(family)
    whole = families.build(family)
    whole.load_state_dict(adapters.merged(moved(model), base))
    log = families.step(whole, model).log  # against the model with the adapter
    loss = families.step(families.build(family, seed=1), model).log["r_real"].abs()
    assert log["r_real"].abs() < 1e-4 * loss


@pytest.fixture(scope="module", params=kinds("diffusion"))
def finished(request, tmp_path_factory):
    """(kind, base, directory) of a run of two rounds, with recomputed blocks."""
    path = tmp_path_factory.mktemp(request.param)
    ckpt = make_checkpoint(path / "base.safetensors", request.param)
    finetune.run(recipe_of(ckpt, request.param), path / "run", device=CPU)
    return request.param, ckpt, path / "run"


def recipe_of(ckpt, kind="diffusion", *more):
    return tiny_recipe(
        ckpt, kind, LORA, "finetune.lr=1.0e-2", "finetune.log_every=1", "finetune.activation_checkpointing=true",
        "finetune.margin=0.0", *more,
    )  # fmt: skip


def test_a_run_trains_the_adapter_alone(finished):
    _, ckpt, out = finished
    base = checkpoint.load(ckpt)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    firsts = [line for line in lines if line["step"] == 1]
    assert [(line["r_real"], line["r_fake"], line["r_std"]) for line in firsts] == [(0, 0, 0)] * 2
    assert any(line["r_real"] for line in lines)
    candidate = out / "round-02" / "checkpoints" / "step-000006.safetensors"
    file = checkpoint.load(candidate, kind="model")
    assert file.header["base"] == {"path": ckpt, "sha256": base.sha256}
    assert file.header["config"] == base.header["config"]
    assert not file.tensors.keys() & base.tensors.keys()
    assert all(tensor.any() for tensor in file.tensors.values())
    loaded = registry.load_model(candidate, CPU)
    assert loaded.checkpoint.sha256 == sha256(candidate)
    assert loaded.model.state_dict().keys() == file.tensors.keys()
    assert sha256(Path(ckpt)) == base.sha256
    tensors = dict(loaded.model.named_parameters())
    for name, tensor in base.tensors.items():
        owner, _, last = name.rpartition(".")
        assert torch.equal(tensors.get(name, tensors.get(f"{owner}.base_layer.{last}", tensor)), tensor)
