"""Adapters: every network of the package starts as its base, trains nothing else, and its files find their base."""

import copy
import functools
import json
import os
import shutil
import sys
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, tiny_recipe, torchrun
from kills import KilledError
from safetensors.torch import load_file

from ddo_cli import checkpoint, files
from ddo_cli.data.images import open_images
from ddo_cli.engines.ddo import finetune, reference
from ddo_cli.engines.ddo.round import FIRST_FAKE_SEED
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.weights import ema, export
from ddo_cli.errors import CheckpointError, RecipeError, UsageError
from ddo_cli.files import sha256
from ddo_cli.generation import generate
from ddo_cli.models import adapters, half, registry
from ddo_cli.recipe.training import AdapterRecipe
from ddo_cli.training.recompute import recompute_units

LORA = "finetune.adapter={kind: lora, rank: 2, alpha: 4.0}"


def with_adapter(family, **settings):
    """A model of random weights with a new adapter of rank 2, and the tensors of its base."""
    model = families.build(family)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = settings.pop("targets", ["head"] if family == "mlp" else list(model.adapter_targets))
    adapters._inject(model, AdapterRecipe(kind="lora", rank=2, alpha=3.0, targets=targets, **settings), seed=0)
    return model, base


def moved(model):
    """The model with every tensor of its adapter away from where it starts."""
    torch.manual_seed(1)
    for tensor in model.state_dict().values():
        tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


QUICK = ("patch-unet", "edm2-unet", "var")  # layers of peft, ours, and a map with a second argument
EACH_FAMILY = [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in families.FAMILIES]


@pytest.mark.parametrize("family", EACH_FAMILY)
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


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_merged_weights_are_those_of_a_network_that_computes_the_same(family):
    model, base = with_adapter(family)
    whole = families.build(family)
    whole.load_state_dict(adapters.merged(moved(model), base))
    log = families.step(whole, model).log  # against the model with the adapter
    loss = families.step(families.build(family, seed=1), model).log["r_real"].abs()
    assert log["r_real"].abs() < 1e-4 * loss


def in_bf16(family):
    """A model on a base in bf16, and the same on a float32 base of the same values."""
    rounded, _ = with_adapter(family)
    model, base = with_adapter(family, base_precision="bf16")
    found = {name: p for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    stored = {name.replace(".weight_bf16", ".weight"): p for name, p in found.items()}
    for name, parameter in stored.items():
        exact = base[name.replace(".base_layer.", ".")]
        assert torch.equal(parameter, exact.to(torch.bfloat16))
        assert not torch.equal(parameter.float(), exact)
        rounded.get_parameter(name).data = parameter.float()
    return model, rounded


# Of linear maps and of convolutions.
@pytest.mark.parametrize(
    "family", ["mlp", "patch-unet", *(pytest.param(each, marks=pytest.mark.slow) for each in ("adm-unet", "dit"))]
)
def test_a_base_in_bf16_is_its_rounding(family):
    """Outputs and gradients are those of a float32 base of the same values."""
    model, rounded = in_bf16(family)
    sizes = [sum(p.nbytes for p in each.parameters() if not p.requires_grad) for each in (model, rounded)]
    assert sizes[0] < 0.7 * sizes[1]
    refs, twins = (
        [families.frozen(each) for each in (model, rounded)],
        [adapters.twin(each) for each in (model, rounded)],
    )
    log = families.step(twins[0], refs[0]).log
    assert log["r_real"] == log["r_fake"] == 0
    losses, gradients = [], []
    for twin, ref in zip(twins, refs, strict=True):
        losses.append(families.step(moved(twin), ref).loss)
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters() if p.requires_grad})
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32
        assert gradient.any()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Linear(24, 16), (2, 5, 24)),
        (torch.nn.Linear(24, 16, bias=False), (3, 24)),
        (torch.nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2, groups=4), (2, 8, 9, 7)),
        (torch.nn.Conv1d(8, 12, 3), (2, 8, 9)),
    ],
)
def test_a_layer_in_bf16_keeps_no_other_weight(layer, shape):
    """And has the output and gradient of torch's own; its `weight` is of float32 to whoever reads it."""
    stored = layer.weight.detach().to(torch.bfloat16)
    layer.requires_grad_(False).weight.copy_(stored.float())
    own, x, kept = copy.deepcopy(layer), torch.randn(shape, requires_grad=True), []
    assert half.keep(torch.nn.Sequential(layer)) == 1
    assert torch.equal(layer.weight, own.weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        y = copy.deepcopy(layer)(x)
    assert [each.dtype for each in kept] == [torch.bfloat16]
    weighed = torch.randn(y.shape)
    gradients = [torch.autograd.grad((out * weighed).sum(), x)[0] for out in (y, own(x))]
    assert torch.equal(y, own(x))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_a_base_in_bf16_under_autocast():
    """The stored weights are taken as they are, which autocast would round to no others."""
    model, rounded = in_bf16("patch-unet")
    with torch.autocast("cpu", torch.bfloat16):
        logs = [families.step(moved(adapters.twin(each)), families.frozen(each)).log for each in (model, rounded)]
    assert logs[0] == logs[1]


def test_a_run_on_a_base_in_bf16(finished_of, tmp_path):
    """Fakes, reference and files are all of the rounded base."""
    _, ckpt, _ = finished_of("diffusion")
    lora = LORA.replace("}", ", base_precision: bf16}")
    recipe = recipe_of(ckpt, "diffusion", lora=lora)
    found = finetune.run(recipe, tmp_path / "run", device=CPU)
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["r_real"] == first["r_fake"] == first["r_std"] == 0
    loaded = registry.load_model(tmp_path / "run" / "round-01" / "checkpoints" / "step-000006.safetensors", CPU)
    assert loaded.checkpoint.header["adapter"]["base_precision"] == "bf16"
    start = reference.start_of(recipe, ckpt, CPU).model
    stored = {name: p for name, p in loaded.model.named_parameters() if p.dtype == torch.bfloat16}
    assert stored
    assert all(torch.equal(start.get_parameter(name), parameter) for name, parameter in stored.items())
    drawn = open_images(str(tmp_path / "run" / "round-01" / "samples"))
    seeds = range(FIRST_FAKE_SEED, FIRST_FAKE_SEED + len(drawn.items))
    spec = sample.spec_of(loaded.checkpoint)
    again = generate(start, seeds, spec, batch=spec.batch)
    assert np.array_equal(drawn.items[:], torch.cat([batch.items for batch in again]).numpy())
    assert found["final"]


def test_a_network_without_layers_for_bf16():
    with pytest.raises(UsageError, match=r"a \w+ has no linear maps or convolutions of torch's own"):
        with_adapter("edm2-unet", base_precision="bf16")
    with pytest.raises(RecipeError, match="has no effect without an adapter"):
        tiny_recipe("x", "diffusion", "finetune.adapter.base_precision=bf16")


@pytest.fixture(scope="module")
def finished_of(tmp_path_factory):
    """(kind, base, directory) of a run of two rounds, with recomputed blocks."""

    @functools.cache
    def finished(kind):
        path = tmp_path_factory.mktemp(kind)
        ckpt = make_checkpoint(path / "base.safetensors", kind)
        finetune.run(recipe_of(ckpt, kind), path / "run", device=CPU)
        return kind, ckpt, path / "run"

    return finished


@pytest.fixture(scope="module", params=["diffusion", pytest.param("edm2", marks=pytest.mark.slow)])
def finished(request, finished_of):
    return finished_of(request.param)


@pytest.fixture(scope="module")
def candidate(finished_of):
    """Files of a base and of an adapter of it."""
    _, ckpt, out = finished_of("diffusion")
    return ckpt, out / "round-02" / "checkpoints" / "step-000006.safetensors"


def recipe_of(ckpt, kind="diffusion", *more, lora=LORA):
    return tiny_recipe(
        ckpt, kind, lora, "finetune.lr=1.0e-2", "finetune.log_every=1", "finetune.activation_checkpointing=true",
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


def test_a_run_that_was_killed_continues_to_the_same_bytes(finished, tmp_path, monkeypatch):
    kind, ckpt, whole = finished
    rename, states = os.replace, []

    def replace(source, target):
        rename(source, target)
        states.extend([target] if Path(target).name == "train-state.safetensors" else [])
        if len(states) == 5:  # in the second round
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(KilledError):
            finetune.run(recipe_of(ckpt, kind), tmp_path / "run", device=CPU)
    assert "round-02" in str(states[-1])
    finetune.run(recipe_of(ckpt, kind), tmp_path / "run", device=CPU)
    for name in ("final.safetensors", "round-02/checkpoints/step-000006.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_commands_take_an_adapter_for_a_model(candidate, tmp_path, ddo):
    """A sample of merged weights is that of the adapter up to rounding, and not the base's."""
    ckpt, adapter = candidate
    ddo("export", adapter, "--merge", "--out", tmp_path / "whole.safetensors")
    images = []
    for name, file in {"adapter": adapter, "whole": tmp_path / "whole.safetensors", "base": ckpt}.items():
        ddo("sample", "--ckpt", file, "--seeds", "0-3", "--format", "npz", "--out", tmp_path / name)
        images.append(np.load(next((tmp_path / name).glob("*.npz")))["arr_0"].astype(float))
    adapter_images, whole_images, base_images = images
    assert abs(adapter_images - whole_images).max() <= 1
    assert abs(adapter_images - base_images).max() > 1
    header = checkpoint.read_header(tmp_path / "whole.safetensors")
    assert not header.keys() & {"base", "adapter"}
    assert header["provenance"][-1]["adapter_sha256"] == sha256(adapter)
    told = json.loads(ddo("info", adapter, "--json").stdout)
    assert told["base"]["sha256"] == sha256(Path(ckpt))
    assert told["adapter"]["rank"] == 2
    assert (
        "finished; nothing to do" in ddo("export", adapter, "--merge", "--out", tmp_path / "whole.safetensors").stderr
    )


def test_an_adapter_is_trained_on_with_its_own_settings(candidate, tmp_path):
    _, adapter = candidate
    with pytest.raises(UsageError, match=r"is an adapter: train it on with finetune.adapter"):
        finetune.run(tiny_recipe(str(adapter)), tmp_path / "a", device=CPU)
    with pytest.raises(UsageError, match=r"holds an adapter with alpha = 4.0; set the same"):
        finetune.run(
            tiny_recipe(str(adapter), "diffusion", "finetune.adapter={kind: lora, rank: 2}"), tmp_path / "a", device=CPU
        )
    recipe = recipe_of(str(adapter), "diffusion", "finetune.rounds=1", "finetune.images_per_round=12")
    finetune.run(recipe, tmp_path / "b", device=CPU)
    first = json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[0])
    assert first["r_real"] == first["r_fake"] == 0
    on = checkpoint.load(tmp_path / "b" / "round-01" / "checkpoints" / "step-000003.safetensors")
    before = checkpoint.load(adapter)
    assert on.header["base"] == before.header["base"]
    changes = [(on.tensors[name] - tensor).abs().max() / tensor.abs().max() for name, tensor in before.tensors.items()]
    assert 0 < max(changes) < 0.9  # it went on from there


def test_the_base_is_found_where_it_was_or_beside_the_adapter(candidate, tmp_path):
    ckpt, adapter = candidate
    moved_to = tmp_path / "base.safetensors"
    file = checkpoint.load(adapter)
    header = {**file.header, "base": {**file.header["base"], "path": "/gone/base.safetensors"}}
    checkpoint.save(tmp_path / "adapter.safetensors", file.tensors, header)
    with pytest.raises(
        CheckpointError, match=r"its base /gone/base.safetensors is not there; put the file with the SHA"
    ):
        registry.load_model(tmp_path / "adapter.safetensors", CPU)
    shutil.copy(make_checkpoint(tmp_path / "other.safetensors", seed=1), moved_to)
    with pytest.raises(CheckpointError, match=r"is another file now"):
        registry.load_model(tmp_path / "adapter.safetensors", CPU)
    shutil.copy(ckpt, moved_to)
    found = registry.load_model(tmp_path / "adapter.safetensors", CPU).model.state_dict()
    assert all(torch.equal(tensor, file.tensors[name]) for name, tensor in found.items())
    checkpoint.save(tmp_path / "odd.safetensors", file.tensors, {**file.header, "adapter": {"kind": "lora", "rank": 3,
                    "targets": ["conv1", "conv2"]}})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"odd.safetensors: the adapter does not fit its base"):
        registry.load_model(tmp_path / "odd.safetensors", CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["conv1", "to_q"]}, r"no layer of this PatchUNet is called 'to_q'; its layers: affine, conv1"),
        ({"rank": 0}, r"finetune.adapter.rank = 0"),
        ({"kind": None}, r"finetune.adapter.rank = 2: has no effect without an adapter"),
    ],
)
def test_wrong_settings_are_refused(candidate, tmp_path, settings, message):
    given = ", ".join(f"{key}: {json.dumps(value)}" for key, value in {"kind": "lora", "rank": 2, **settings}.items())
    with pytest.raises((UsageError, RecipeError), match=message) as refused:
        finetune.run(
            tiny_recipe(candidate[0], "diffusion", f"finetune.adapter={{{given}}}"), tmp_path / "a", device=CPU
        )
    assert len(str(refused.value)) < 300
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("other", ["finetune.sharding=fsdp", "finetune.reference_precision=bf16"])
def test_what_an_adapter_does_not_go_with(other):
    with pytest.raises(RecipeError, match="does not go with an adapter"):
        tiny_recipe("x", "diffusion", LORA, other)


def test_without_the_library_a_message_names_the_extra(candidate, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'ddo-cli\[lora\]'"):
        registry.load_model(candidate[1], CPU)


def test_diffusers_reads_what_is_exported(tmp_path):
    """By peft, as its pipelines do: the library's network with the exported adapter is ours."""
    diffusers = pytest.importorskip("diffusers")
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from test_diffusers import TINY, built, make_folder

    from ddo_cli.models.diffusers import files as diffusers_files

    unet = make_folder(tmp_path / "folder")
    assert isinstance(unet, diffusers.UNet2DModel)
    found = diffusers_files.read(tmp_path / "folder")
    checkpoint.save(tmp_path / "base.safetensors", found.tensors, {"kind": "model", "config": found.config})
    model, settings = built(found), AdapterRecipe(kind="lora", rank=2, alpha=6.0)
    file = adapters.add(
        model, checkpoint.load(tmp_path / "base.safetensors"), settings, 0, str(tmp_path / "base.safetensors")
    )
    checkpoint.save(tmp_path / "adapter.safetensors", moved(model).state_dict(), file.header)
    export.run(str(tmp_path / "adapter.safetensors"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in tensors)
    tensors = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), unet)
    assert not set_peft_model_state_dict(unet, tensors).unexpected_keys
    x, t = torch.randn(2, 3, TINY["sample_size"], TINY["sample_size"]), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t).sample, model.net(x, t, torch.tensor([-1, -1])), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(finished_of, tmp_path):
    _, _, out = finished_of("diffusion")
    options = ["--recipe", str(out / "recipe.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu", "--json"]
    torchrun("-m", "ddo_cli", "finetune-ddo", *options, "finetune.rounds=1", "metric.repeats=1")
    losses = [
        torch.tensor([json.loads(line)["loss"] for line in (path / "log.jsonl").read_text().splitlines()][:3])
        for path in (out, tmp_path / "run")
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sweep_control_and_averages_are_those_of_adapters(candidate, tmp_path):
    ckpt, _ = candidate
    recipe = recipe_of(
        ckpt, "diffusion", "finetune.rounds=1", "finetune.alpha=[1.0, 2.0]", "finetune.control=true",
        "finetune.ema_widths=[0.05, 0.1]",
    )  # fmt: skip
    finetune.run(recipe, tmp_path / "run", device=CPU)
    files = list((tmp_path / "run").rglob("step-*.safetensors"))
    assert len(files) == 8  # of the better node and of the control, two candidates of two widths
    assert all("base" in checkpoint.read_header(file) for file in files)
    node = next((tmp_path / "run" / "round-01" / "nodes").glob("*/checkpoints/*")).parent
    ema.run([node], tmp_path / "ema.safetensors", std=0.07)
    registry.load_model(tmp_path / "ema.safetensors", CPU)


def test_layers_that_the_network_passes_by_are_told():
    model, _ = with_adapter("var")
    tensors = moved(model).state_dict()
    assert not adapters.idle(tensors)
    tensors["blocks.1.attn.qkv.lora_B.default.weight"].zero_()
    assert adapters.idle(tensors) == ["blocks.1.attn.qkv"]
