"""Files of DiT, SiT and REPA: converted, told apart, and written back."""

import argparse
import json
import shutil
from collections import OrderedDict

import pytest
import torch
from test_dit import LABEL, X, build, check, official_tensors
from test_pt_files import optimizer

from ddo_cli import checkpoint
from ddo_cli.engines.weights import convert, export
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models import registry
from ddo_cli.models.dit import files
from ddo_cli.recipe.schema import SamplingRecipe

CPU = torch.device("cpu")
KINDS = {
    "dit": {"learned_variance": True, "precond": "ddpm"},
    "sit": {"unused_variance": True},
    "repa": {"projectors": [(96, 48)]},
    "plain": {},
}
HEADS = "heads=4"


def official(kind):
    """A file's tensors, as its authors' code would write them."""
    model = build(**KINDS[kind])
    own = files.to_official(model.state_dict(), model.options)
    made = official_tensors({name: tensor.shape for name, tensor in own.items()})
    return OrderedDict({**made, "pos_embed": own["pos_embed"]})


@pytest.fixture(scope="module")
def pt(tmp_path_factory):
    """Bare files by kind."""
    place = tmp_path_factory.mktemp("official")
    paths = {kind: place / f"{kind}.pt" for kind in KINDS}
    for kind, path in paths.items():
        torch.save(official(kind), path)
    return paths


def converted(source, out, *settings):
    """What `convert` says, and the model."""
    found = convert.run(source, out, settings=[HEADS, *settings], verify=True)
    return found, registry.load_model(out, CPU).model


@torch.no_grad()
def test_a_file_of_each_kind(pt, tmp_path):
    found, model = converted(pt["dit"], tmp_path / "dit.safetensors", "arch=dit")
    assert found["sampling"] == {"sampler": "ddpm", "steps": 250, "cfg_scale": 1.5, "cfg_channels": 3}
    assert (found["num_classes"], found["shape"], found["stored_tensors"]) == (10, [3, 64, 64], 32)
    assert "the last of 11 label rows means no label" in found["assumed"]
    check(model.net(X, torch.tensor([3.0, 700.0]), LABEL), -0.2190678, 1.1630444)
    assert model.precond.sigma_max == pytest.approx(157.4, rel=1e-3)

    found, model = converted(pt["sit"], tmp_path / "sit.safetensors", "arch=sit")
    assert found["arch"] == "sit (as you told): velocity at times from 0 = noise to 1 = data"
    check(model.net(X, torch.tensor([0.25, 0.7]), LABEL), -0.2652489, 1.3377786)
    assert model.precond.coefficients(torch.tensor(0.25)).c_noise == pytest.approx(0.8)

    found, model = converted(pt["repa"], tmp_path / "repa.safetensors")
    assert found["arch"] == "repa (its projectors): velocity at times from 0 = data to 1 = noise"
    assert found["sampling"]["cfg_sigma_max"] == pytest.approx(7 / 3)
    assert "cfg_channels" not in found["sampling"], "REPA guides all channels"
    check(model.net(X, torch.tensor([0.25, 0.7]), LABEL), -0.1403337, 1.2002592)
    assert model.precond.coefficients(torch.tensor(0.25)).c_noise == pytest.approx(0.2)
    for name in ("dit", "sit", "repa"):
        registry.load_model(tmp_path / f"{name}.safetensors", CPU).model.check_sampling(
            SamplingRecipe(**checkpoint.read_header(tmp_path / f"{name}.safetensors")["sampling"])
        )


@pytest.mark.parametrize("kind", ["dit", "sit", "repa"])
def test_a_file_goes_back(kind, pt, tmp_path):
    told = [HEADS] if kind == "repa" else [HEADS, f"arch={kind}"]
    convert.run(pt[kind], tmp_path / "a.safetensors", settings=told)
    found = export.run(str(tmp_path / "a.safetensors"), tmp_path / "back.pt", like=pt[kind], settings=told)
    assert (found["family"], found["verified"], found["kept"]) == ("dit", True, 0)
    back, stored = torch.load(tmp_path / "back.pt"), torch.load(pt[kind])
    assert list(back) == list(stored)
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def test_one_is_never_taken_for_another(pt, tmp_path):
    out = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError) as error:
        convert.run(pt["dit"], out, settings=[HEADS])
    assert str(error.value) == (
        "dit.pt does not tell what its network estimates: add arch=dit (noise at steps 0 to 999), or arch=sit "
        "(velocity at times from 0 = noise to 1 = data); the wrong one gives noise; its name suggests arch=dit"
    )
    for kind, told, message in [
        ("plain", [], r"add arch=sit \(velocity at times .*\), or arch=repa \("),
        ("repa", ["arch=sit"], r"arch=sit contradicts its projectors, which are that of arch=repa; leave it out"),
        ("dit", ["arch=repa"], r"arch=repa contradicts its last layer, which is that of arch=dit\|sit"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert.run(pt[kind], out, settings=[HEADS, *told])
    convert.run(pt["dit"], out, settings=[HEADS, "arch=dit"])
    with pytest.raises(CheckpointError, match=r"is another model than .*: learned_variance True instead of False"):
        export.run(str(out), tmp_path / "b.pt", like=pt["dit"], settings=[HEADS, "arch=sit"])


def trained(kind, **settings):
    """A file of a trainer."""
    tensors = official(kind)
    model = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return {"model": model, "ema": tensors, "opt": optimizer(), "args": argparse.Namespace(**settings)}


@pytest.mark.parametrize(
    ("kind", "settings", "arch"),
    [
        ("dit", {"model": "DiT-XL/2", "vae": "ema"}, "dit"),
        ("sit", {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}, "sit"),
        ("plain", {"model": "SiT-B/2", "path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b"}, "repa"),
    ],
)
def test_files_of_trainers_name_their_network(kind, settings, arch, tmp_path):
    torch.save(trained(kind, **settings), tmp_path / "0400000.pt")
    found, model = converted(tmp_path / "0400000.pt", tmp_path / "a.safetensors")
    assert found["arch"].startswith(f"{arch} (its trainer's settings)")
    assert found["weights"] == "ema"
    assert "opt" in found["not_read"]
    assert bool(model.net.x_embedder["proj"].weight.any()), "the average, not the zeros beside it"
    for other in {"dit", "sit", "repa"} - {arch}:
        with pytest.raises(CheckpointError, match=f"arch={other} contradicts"):
            convert.run(tmp_path / "0400000.pt", tmp_path / "b.safetensors", settings=[HEADS, f"arch={other}"])


def test_other_paths_are_refused(tmp_path):
    torch.save(trained("sit", model="SiT-XL/2", path_type="GVP"), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="trained with path_type=GVP; this program has the linear path"):
        convert.run(tmp_path / "a.pt", tmp_path / "a.safetensors", settings=[HEADS])


def test_repas_first_files_count_two_kinds_of_blocks(pt, tmp_path):
    old = OrderedDict(
        (name.replace("blocks.1.", "decoder_blocks.0."), tensor) for name, tensor in official("repa").items()
    )
    torch.save(old, tmp_path / "old.pt")
    _, model = converted(tmp_path / "old.pt", tmp_path / "old.safetensors")
    _, today = converted(pt["repa"], tmp_path / "today.safetensors")
    assert all(torch.equal(own, other) for own, other in zip(model.parameters(), today.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "told", "message"),
    [
        ({}, ["arch=dit"], r"width 64 and 2 blocks are no published size; add heads=<number>"),
        ({}, ["arch=dit", "heads=5"], r"heads=5 does not divide its width 64"),
        ({}, ["arch=dit", "heads=4", "size=32"], r"of which arch and heads can be told; leave size out"),
        ({"pos_embed": None}, ["arch=dit", HEADS], "is no DiT or SiT: it lacks pos_embed"),
        ({"blocks.1.attn.qkv.bias": None}, ["arch=dit", HEADS], "1 tensors differ .*: missing blocks.1.attn.qkv.bias"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(16)}, ["arch=dit", HEADS], "unexpected blocks.0.attn.q_norm"),
        ({"blocks.9999.attn.qkv.weight": torch.ones(1)}, ["arch=dit", HEADS], "block 9999 in 33 tensors"),
        ({"pos_embed": torch.ones(1, 15, 64)}, ["arch=dit", HEADS], "15 positions, which are no square"),
        ({"pos_embed": torch.ones(1)}, ["arch=dit", HEADS], "fit no DiT or SiT"),
        ({"x_embedder.proj.weight": torch.ones(64, 16, 2, 2)}, ["arch=dit", HEADS], "16 channels, where"),
        ({"final_layer.linear.weight": torch.ones(20, 64)}, ["arch=dit", HEADS], "20 rows of its last layer"),
        ({"blocks.0.mlp.fc1.weight": torch.ones(3)}, ["arch=dit", HEADS], r"mlp.fc1.weight of shape \(3,\) instead"),
    ],
)
def test_other_files_are_refused(changes, told, message, tmp_path):
    tensors = {name: tensor for name, tensor in {**official("dit"), **changes}.items() if tensor is not None}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises((CheckpointError, UsageError), match=message) as error:
        convert.run(tmp_path / "x.pt", tmp_path / "x.safetensors", settings=told)
    assert len(str(error.value).replace(str(tmp_path), "")) < 300


def test_arch_is_of_these_files_alone(tmp_path):
    torch.save({"input_blocks.0.0.weight": torch.zeros(2)}, tmp_path / "adm.pt")
    with pytest.raises(UsageError, match="is no file of DiT or SiT, and arch is for those"):
        convert.run(tmp_path / "adm.pt", tmp_path / "x.safetensors", settings=["arch=dit"])


# --- Folders of diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder without its autoencoder, and the library's network with DiT's tensors."""
    diffusers = pytest.importorskip("diffusers")
    place = tmp_path_factory.mktemp("pipeline")
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    made = {}
    for name, tensor in official("dit").items():
        if name != "pos_embed":
            made.update(theirs(name, tensor))
    network.load_state_dict(made)
    network.save_pretrained(place / "transformer")
    diffusers.DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type="epsilon"
    ).save_pretrained(place / "scheduler")
    (place / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    return place, network.eval()


def theirs(name, tensor):
    """Diffusers' tensors of one of DiT's."""
    outer = {
        "x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
    }  # fmt: skip
    emb = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }  # fmt: skip
    inner = {
        "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm1.linear",
    }  # fmt: skip
    layer, _, kind = name.rpartition(".")
    if layer in outer:
        return {f"{outer[layer]}.{kind}": tensor}
    if layer in emb:
        return {f"transformer_blocks.{block}.norm1.emb.{emb[layer]}.{kind}": tensor for block in (0, 1)}
    _, block, rest = layer.split(".", 2)
    if rest == "attn.qkv":
        return {
            f"transformer_blocks.{block}.attn1.to_{part}.{kind}": piece
            for part, piece in zip("qkv", tensor.chunk(3), strict=True)
        }
    return {f"transformer_blocks.{block}.{inner[rest]}.{kind}": tensor}


@torch.no_grad()
def test_a_folder_of_diffusers_is_read_as_dits(folder, tmp_path):
    place, network = folder
    found = convert.run(place, tmp_path / "a.safetensors", verify=True)
    assert found["arch"] == "dit (DiTTransformer2DModel): noise at steps 0 to 999"
    assert found["sampling"]["cfg_channels"] == 3
    model = registry.load_model(tmp_path / "a.safetensors", CPU).model
    step, label = torch.tensor([3.0, 700.0]), torch.tensor([1, 10])
    ours = model.net(X, step, LABEL)
    check(ours, -0.2190678, 1.1630444)
    plain = network(X, timestep=step, class_labels=label).sample
    assert ((ours - plain).square().mean().sqrt() / ours.std()).item() == pytest.approx(0.23, abs=0.02)
    for block in network.transformer_blocks:  # the library's network, with the two differences set right
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    torch.testing.assert_close(network(X, timestep=step, class_labels=label).sample, ours, atol=1e-5, rtol=1e-5)
    again = convert.run(place / "transformer", tmp_path / "b.safetensors")
    assert again["source_sha256"] == found["source_sha256"]


def test_damaged_folders_are_refused(folder, tmp_path):
    def spoilt(file, **changes):
        place = tmp_path / "spoilt"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder[0], place)
        config = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps({**config, **changes}))
        return place

    for file, changes, message in [
        ("transformer/config.json", {"norm_type": "layer_norm"}, "norm_type = 'layer_norm'; DiT has 'ada_norm_zero'"),
        ("transformer/config.json", {"sample_size": 10**9}, "sample_size = 1000000000 is no number from 1 to 256"),
        ("transformer/config.json", {"num_attention_heads": None}, "num_attention_heads = None is no number"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "DiT has 'epsilon'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "DiT has False"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert.run(spoilt(file, **changes), tmp_path / "x.safetensors")
    place = spoilt("scheduler/scheduler_config.json", clip_sample=True)
    found = convert.run(place, tmp_path / "x.safetensors")
    assert found["left_out"] == "clip_sample: DiT's samplers clip nothing"
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow))
    with pytest.raises(CheckpointError, match=r"FlowMatchEulerDiscreteScheduler has no beta_schedule.* such as"):
        convert.run(place, tmp_path / "y.safetensors")
