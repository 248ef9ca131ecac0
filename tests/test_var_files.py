"""VAR's .pth files -> ours, in the names and with the buffers that the official program writes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CPU
from torch.testing import assert_close
from typer.testing import CliRunner
from var_models import TINY_VAE, build, filled, official_files, official_names, truth

from ddo_cli import checkpoint
from ddo_cli.cli import app
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.weights import convert, export
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models import registry
from ddo_cli.models.var import files as var_files

SIDES = "patch_nums=1,2,3,4"
LABEL = torch.tensor([3, 7])
NARROW_VAE = {**TINY_VAE, "channels": 32, "channel_mult": [1, 1], "groups": 32}


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def model(request):
    return filled(request.param)


@pytest.fixture
def files(model, tmp_path):
    """The two published files of a small model."""
    return write(tmp_path, *official_files(model))


def write(folder, var, vae):
    torch.save(var, folder / "var_d2.pth")
    torch.save(vae, folder / "vae.pth")
    return folder / "var_d2.pth", folder / "vae.pth"


@torch.no_grad()
def test_the_converted_model_is_the_same(model, files, tmp_path):
    var, vae = files
    out = tmp_path / "out.safetensors"
    found = convert.run(var, out, vae=vae, settings=[SIDES], verify=True)
    assert (found["family"], found["kind"], found["network"]) == ("var", "model", "var")
    assert (found["shape"], found["num_classes"], found["verified"]) == ([3, 64, 64], 10, True)
    assert found["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert found["patch_nums"] == "1,2,3,4"
    loaded, file = registry.load_model(out, CPU)
    assert torch.equal(loaded.logits(truth(), LABEL), model.logits(truth(), LABEL))
    assert loaded.options == model.options
    assert loaded.draw_options.label_dropout == 0.1
    assert file.header["sampling"] == {"batch": 25}
    assert file.header["provenance"][0]["vae"] == "vae.pth"
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.codec.encode(images), model.codec.encode(images))
    drawn = sample.run(str(out), range(3), tmp_path / "set", device=CPU)
    assert drawn["nfe"] == 4


def test_the_names_are_the_official_ones(model):
    names = set(official_names(model))
    block = {name for name in names if name.startswith("blocks.1.")}
    shared = "shared_ada_lin.1.weight" in names
    assert block == {
        f"blocks.1.{name}"
        for name in (
            "attn.scale_mul_1H11", "attn.q_bias", "attn.v_bias", "attn.mat_qkv.weight", "attn.proj.weight",
            "attn.proj.bias", "ffn.fc1.weight", "ffn.fc1.bias", "ffn.fc2.weight", "ffn.fc2.bias",
            *(["ada_gss"] if shared else ["ada_lin.1.weight", "ada_lin.1.bias"]),
        )
    }  # fmt: skip
    assert names - {name for name in names if name.startswith("blocks.")} == {
        "pos_start", "pos_1LC", "word_embed.weight", "word_embed.bias", "class_emb.weight", "lvl_embed.weight",
        *(["shared_ada_lin.1.weight", "shared_ada_lin.1.bias"] if shared else []),
        "head_nm.ada_lin.1.weight", "head_nm.ada_lin.1.bias", "head.weight", "head.bias",
    }  # fmt: skip
    vae = set(official_names(model.vqvae, of_vae=True))
    assert {
        "encoder.down.4.attn.1.proj_out.bias", "encoder.mid.attn_1.qkv.weight", "encoder.down.3.downsample.conv.bias",
        "decoder.up.4.attn.2.norm.weight", "decoder.up.1.upsample.conv.weight",
        "decoder.up.3.block.0.nin_shortcut.bias",
        "decoder.up.1.block.0.nin_shortcut.weight", "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.down.4.block.0.nin_shortcut.weight", "quantize.quant_resi.qresi_ls.3.bias", "post_quant_conv.bias",
    } <= vae  # fmt: skip
    assert len([name for name in vae if "nin_shortcut" in name]) == 8


@torch.no_grad()
def test_a_training_checkpoint_brings_its_own_tokenizer(model, tmp_path):
    var, vae = official_files(model)
    nested = {"trainer": {"var_wo_ddp": var, "vae_local": vae, "var_opt": {"state": {}}, "config": {"depth": 2}}}
    torch.save({"epoch": 3, **nested}, tmp_path / "ar-ckpt-last.pth")
    convert.run(tmp_path / "ar-ckpt-last.pth", tmp_path / "a.safetensors", settings=[SIDES])
    loaded = registry.load_model(tmp_path / "a.safetensors", CPU).model
    assert torch.equal(loaded.logits(truth(), LABEL), model.logits(truth(), LABEL))


def test_a_tokenizer_by_itself_can_be_trained_on(model, files, tmp_path):
    found = convert.run(files[1], tmp_path / "vae.safetensors", settings=[SIDES], verify=True)
    assert (found["kind"], found["network"], found["num_parameters"]) == (
        "tokenizer",
        "vqvae",
        sum(p.numel() for p in model.vqvae.parameters()),
    )
    options = {**model.options.model_dump(), "tokenizer": str(tmp_path / "vae.safetensors")}
    fresh = registry.build(registry.config_of("var", (3, 64, 64), 10, options, {}))
    fresh.start_training()
    for name, tensor in fresh.vqvae.state_dict().items():
        assert_close(tensor, model.vqvae.state_dict()[name])


def test_a_tokenizer_is_asked_for(files, tmp_path):
    with pytest.raises(UsageError, match="--vae"):
        convert.run(files[0], tmp_path / "a.safetensors", settings=[SIDES])
    with pytest.raises(CheckpointError, match="holds no VQVAE"):
        convert.run(files[0], tmp_path / "a.safetensors", settings=[SIDES], vae=files[0])
    with pytest.raises(UsageError, match="--vae is for"):
        convert.run(files[1], tmp_path / "a.safetensors", settings=[SIDES], vae=files[1])


def test_unknown_sides_are_asked_for_and_checked(files, tmp_path):
    out = tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match=r"30 tokens in 4 scales.*patch_nums=1,2,3,4"):
        convert.run(files[0], out, vae=files[1])
    with pytest.raises(UsageError, match="makes 21 tokens in 3 scales"):
        convert.run(files[0], out, vae=files[1], settings=["patch_nums=1,2,4"])
    with pytest.raises(UsageError, match="leave the other KEY=VALUE out"):
        convert.run(files[0], out, vae=files[1], settings=["qkv=new"])
    for text in ("4,3", "1,4,2", "1", "0,1"):
        with pytest.raises(UsageError, match="growing sides"):
            convert.run(files[1], out, settings=[f"patch_nums={text}"])
    with pytest.raises(UsageError, match="trained on 4 scales; tell their sides"):
        convert.run(files[1], out)
    assert not out.exists()


def test_the_published_lists_are_found_by_the_number_of_tokens():
    def stored(length, scales):
        return {"pos_1LC": torch.empty(1, length, 1), "lvl_embed.weight": torch.empty(scales, 1)}

    assert var_files._sides(stored(680, 10), "a", None) == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert var_files._sides(stored(2240, 10), "a", None) == (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    assert var_files._sides(stored(9451, 14), "a", None)[-1] == 64
    with pytest.raises(UsageError):
        var_files._sides(stored(680, 9), "a", None)


def spoil(change, vae_options=NARROW_VAE):
    """A test of one damage to the files of a tiny model."""

    def convert_spoilt(tmp_path):
        model = build(vae_options)
        var, vae = official_files(model)
        change(var, vae)
        paths = write(tmp_path, var, vae)
        convert.run(paths[0], tmp_path / "a.safetensors", vae=paths[1], settings=["patch_nums=1,2"])

    return convert_spoilt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda var, vae: var.pop("blocks.1.attn.q_bias"), "missing blocks.1.attn.q_bias"),
        (lambda var, vae: var.update({"blocks.1.attn.extra": torch.ones(1)}), "unexpected blocks.1.attn.extra"),
        (lambda var, vae: var.update({"head.bias": torch.ones(4)}), r"head.linear.bias of shape \(4,\)"),
        (lambda var, vae: var["lvl_1L"].fill_(0), "lvl_1L"),
        (lambda var, vae: var["attn_bias_for_masking"].fill_(0), "attn_bias_for_masking"),
        (lambda var, vae: var["blocks.0.attn.zero_k_bias"].fill_(1), "zero_k_bias"),
        (lambda var, vae: [var.pop(key) for key in list(var) if key.startswith("blocks.0.")], "not numbered from 0"),
        (lambda var, vae: vae.pop("post_quant_conv.bias"), "missing vqvae.post_quant_conv.bias"),
        (lambda var, vae: vae.update({"encoder.down.9.x": torch.ones(1)}), "unexpected encoder.down.9.x"),
        (lambda var, vae: vae.update({"quantize.embedding.weight": torch.ones(3)}), "make no VAR"),
        (lambda var, vae: var.update({"head.bias": torch.ones(3, dtype=torch.int32)}), "head.linear.bias"),
    ],
)
def test_damaged_files_are_refused(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        spoil(change)(tmp_path)
    assert not (tmp_path / "a.safetensors").exists()


def test_the_tokenizer_is_blamed_for_what_is_its_own(tmp_path):
    with pytest.raises(CheckpointError, match=r"vae.pth: the tensors make no VAR"):
        spoil(lambda var, vae: vae.update({"quantize.embedding.weight": torch.ones(3)}))(tmp_path)
    with pytest.raises(UsageError, match=r"vae.pth has 5 codes of 4 numbers, and .*var_d2.pth was trained on 3 of 4"):
        spoil(lambda var, vae: vae.update({"quantize.embedding.weight": torch.ones(5, 4)}))(tmp_path)
    with pytest.raises(UsageError, match=r"--vae nope\.pth is no file"):
        convert.run(tmp_path / "var_d2.pth", tmp_path / "a.safetensors", vae=Path("nope.pth"))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"1 tensors .* not finite, head.linear.bias"):
        spoil(lambda var, vae: var["head.bias"][1].fill_(torch.nan))(tmp_path)
    assert not (tmp_path / "a.safetensors").exists()


def test_only_the_damage_is_refused(tmp_path):
    spoil(lambda var, vae: None)(tmp_path)
    assert (tmp_path / "a.safetensors").is_file()


def test_norms_of_other_groups_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="groups = 32"):
        spoil(lambda var, vae: None, TINY_VAE)(tmp_path)


def test_the_statistic_of_another_number_of_scales_is_dropped(tmp_path):
    model = filled()
    paths = write(tmp_path, *official_files(model, scales=10))
    convert.run(paths[0], tmp_path / "a.safetensors", vae=paths[1], settings=[SIDES])
    assert "vqvae.quantize.ema_vocab_hit_SV" not in checkpoint.load(tmp_path / "a.safetensors").tensors


def test_files_of_var_are_not_written(files, tmp_path):
    convert.run(files[0], tmp_path / "a.safetensors", vae=files[1], settings=[SIDES])
    with pytest.raises(UsageError, match="not written"):
        export.run(str(tmp_path / "a.safetensors"), tmp_path / "b.pth", like=files[0])


def test_the_command(files, tmp_path):
    out = tmp_path / "a.safetensors"
    run = CliRunner().invoke(
        app, ["convert", str(files[0]), SIDES, "--out", str(out), "--vae", str(files[1]), "--dry-run", "--json"]
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["num_classes"] == 10
    assert not out.exists()
