"""torch.compile: the same step and the same images, up to rounding; and where it is asked for."""

import json

import families
import pytest
import torch
from conftest import make_checkpoint, tiny_recipe
from torch._dynamo.utils import counters

from ddo_cli import checkpoint, compilation
from ddo_cli.engines.ddo import finetune
from ddo_cli.errors import RecipeError
from ddo_cli.models.edm2.layers import mp_sum
from ddo_cli.precision import inference_precision
from ddo_cli.recipe.load import load
from ddo_cli.trainable import Trainable

CPU = torch.device("cpu")
# One resolution: each block takes seconds to compile, and the first U-Net has those that change the resolution.
SMALLER = {
    "edm2-unet": {"channel_mult": [1], "attn_resolutions": [32]},
    "adm-unet": {"channel_mult": [1], "attention": [16]},
}


def moved(ref):
    """A model a step away from its reference."""
    model = families.frozen(ref)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter, own in zip(model.parameters(), ref.parameters(), strict=True):
            parameter += 0.01 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter)
            parameter.requires_grad_(own.requires_grad)
    return model


def gradients(model, ref):
    model.zero_grad()
    loss = families.step(model, ref)
    loss.loss.backward()
    flat = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return loss.log["r_real"], loss.loss.detach(), torch.cat(flat)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_compiled_step_is_the_step(family):
    """Within float32's rounding, with TF32 switched off as `dist.init` does."""
    with inference_precision("float32", CPU):
        ref = families.build(family, **SMALLER.get(family, {}))
        model = moved(ref)
        before = counters["stats"]["unique_graphs"]
        names, plain = list(model.state_dict()), gradients(model, ref)
        for network in (model, ref):
            compilation.compile_network(network)
            assert all(part._compiled_call_impl is not None for part in network.graphs())
        compiled = gradients(model, ref)
        assert list(model.state_dict()) == names
        # r, loss, gradient; r is a difference of two networks, whose rounding is that of D itself: ADM's r of 0.05 nats
        # changes by 4e-5 of itself where oneDNN is switched off.
        for ours, theirs, bound in zip(compiled, plain, (5e-4, 1e-5, 1e-5), strict=True):
            assert float((ours - theirs).norm()) <= bound * float(theirs.norm())
        assert counters["stats"]["unique_graphs"] > before
        assert float(plain[0]) != 0.0
        model.load_state_dict(ref.state_dict())
        # Not exactly 0: the graph of training keeps what a backward pass needs, and rounds otherwise than inference's.
        assert abs(float(gradients(model, ref)[0])) < 3e-5  # of log-likelihoods of thousands of nats


@pytest.mark.slow
def test_a_weighted_sum_with_a_product_keeps_its_weights():
    """Inductor fuses add(a, product, alpha=t) into one call that leaves alpha out."""
    generator = torch.Generator().manual_seed(0)
    a, h, weight = (torch.randn(shape, generator=generator) for shape in ((4, 16), (4, 10), (16, 10)))
    network = torch.compile(lambda a, h: mp_sum(a, torch.nn.functional.linear(h, weight), 0.3))
    with torch.no_grad():
        torch.testing.assert_close(network(a, h), mp_sum(a, torch.nn.functional.linear(h, weight), 0.3))


@pytest.fixture
def compiled(monkeypatch):
    """Modules that are compiled, in their order; they run as they are."""
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: seen.append(type(module).__name__))
    return seen


def test_where_networks_are_compiled(tmp_path, compiled):
    """Training: model and reference. Sampling: what draws. The weights' file does not say how they were drawn."""
    ckpt = make_checkpoint(tmp_path / "x.safetensors")
    short = ["finetune.rounds=1", "finetune.images_per_round=4"]
    finetune.run(tiny_recipe(ckpt, "diffusion", *short), tmp_path / "plain", device=CPU)
    assert compiled == []
    recipe = tiny_recipe(ckpt, "diffusion", *short, "finetune.compile=true")
    finetune.run(recipe, tmp_path / "trained", device=CPU)
    assert compiled == ["PatchUNet"] * 2
    compiled.clear()
    finetune.run(tiny_recipe(ckpt, "diffusion", *short, "sampling.compile=true"), tmp_path / "drawn", device=CPU)
    assert len(compiled) > 2
    manifest = json.loads((tmp_path / "drawn" / "round-01" / "samples" / "manifest.json").read_text())
    assert manifest["sampling"]["compile"] is True
    (candidate,) = (tmp_path / "drawn").glob("round-01/checkpoints/step-*.safetensors")
    assert "compile" not in checkpoint.load(candidate, kind="model").header["sampling"]


def test_graphs_are_whole_networks_or_blocks():
    graphs = {name: [type(part).__name__ for part in families.build(name).graphs()] for name in ("patch-unet", "var")}
    assert graphs == {"patch-unet": ["PatchUNet"], "var": ["Block", "Block"]}
    assert Trainable().graphs()[0].__class__ is Trainable


@pytest.mark.parametrize("other", ["sharding=fsdp", "reference_precision=bf16"])
def test_what_does_not_go_with_compilation_is_refused(other):
    key = other.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"finetune\.compile = True: does not go with {key}"):
        load("quickstart", ["finetune.compile=true", f"finetune.{other}"])
