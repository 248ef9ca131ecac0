"""`ddo pretrain` of a tokenizer, and of a VAR on top of it."""

import json

import pytest
import torch
from conftest import CPU
from torch.testing import assert_close
from typer.testing import CliRunner

from ddo_cli import checkpoint
from ddo_cli.cli import app
from ddo_cli.data.images import open_images
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.engines.pretrain import tokenizer as pretrain_tokenizer
from ddo_cli.errors import CheckpointError, DataError, RecipeError, UsageError
from ddo_cli.models import registry
from ddo_cli.models.var import vqvae
from ddo_cli.models.var.vqvae import Vqvae, VqvaeOptions
from ddo_cli.recipe.load import load

OPTIONS = {
    "channels": 4, "channel_mult": [1, 2, 2], "num_blocks": 1, "groups": 2, "z_channels": 4, "vocabulary": 16,
    "patch_nums": [1, 2, 4, 8],
}  # fmt: skip


def recipe(*overrides, name="vqvae", options=None):
    settings = [
        "data={source: embedded:digits32, num: 64}",
        f"model={{name: {name}, options: {json.dumps(options or OPTIONS)}}}",
        "sampling={batch: 16, sampler: null, steps: null, sigma_min: null, sigma_max: null}",
        "metric={name: fd_embedded, num_images: 32, repeats: 1}",
        "pretrain={images: 96, batch: 8, lr: 3.0e-3, ema_half_life: 16.0, log_every: 2, save_every: 4}",
    ]
    return load("quickstart", [*settings, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "vq"
    return pretrain_tokenizer.run(recipe(), out, device=CPU)


def tokenizer(path):
    model = Vqvae((3, 32, 32), VqvaeOptions.model_validate(OPTIONS))
    vqvae.load_into(model, path)
    return model


def test_a_tokenizer_is_trained_and_scored(trained):
    assert trained["metric"] == "fd_embedded"
    header = checkpoint.read_header(trained["final"], kind="tokenizer")
    assert header["config"]["shape"] == [3, 32, 32]
    assert header["provenance"][0]["steps"] == 12
    assert header["provenance"][0]["recipe"].keys() == {"name", "seed", "data", "model", "pretrain"}
    items = torch.from_numpy(open_images("embedded:digits32", 64).items[:32].copy())
    model = tokenizer(trained["final"])
    back = model.decode(model.quantize.f_hat(model.encode(items)))
    error = (vqvae.scaled(back) - vqvae.scaled(items)).square().mean().item()
    assert_close(trained["image_error"], error, rtol=1e-4, atol=0)
    log = [json.loads(line) for line in (trained_dir(trained) / "log.jsonl").read_text().splitlines()]
    assert log[-1]["image_error"] < 0.9 * log[0]["image_error"]
    assert (trained_dir(trained) / "grid.png").is_file()


def trained_dir(found):
    from pathlib import Path

    return Path(found["out"])


def test_an_interrupted_run_ends_in_the_same_weights(trained, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    calls = []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise KilledError
        return revive(*arguments)

    revive = pretrain_tokenizer._revive
    monkeypatch.setattr(pretrain_tokenizer, "REVIVE_EVERY", 5)  # of a process that dies in step 5
    monkeypatch.setattr(pretrain_tokenizer, "_revive", killed)
    with pytest.raises(KilledError):
        pretrain_tokenizer.run(recipe(), tmp_path / "a", device=CPU)
    monkeypatch.setattr(pretrain_tokenizer, "_revive", revive)
    pretrain_tokenizer.run(recipe(), tmp_path / "a", device=CPU)
    whole = pretrain_tokenizer.run(recipe(), tmp_path / "b", device=CPU)
    found, expected = checkpoint.load(tmp_path / "a" / "final.safetensors"), checkpoint.load(whole["final"])
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())


def test_unused_codes_are_moved_to_what_the_tokens_stand_for():
    torch.manual_seed(0)
    model = Vqvae((3, 32, 32), VqvaeOptions.model_validate(OPTIONS))
    with torch.no_grad():
        model.quantize.embedding.weight[3:] = 100.0
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    kept = model.quantize.embedding.weight[:3].clone()
    tokens, vectors = model.quantize.searched(model.latent(images))
    used = sorted(tokens.unique().tolist())
    assert set(used) <= {0, 1, 2}
    pretrain_tokenizer._revive(model, images, ("a", 1))
    weight = model.quantize.embedding.weight
    assert torch.equal(weight[used], kept[used])
    assert (weight[3:, None] == vectors.flatten(0, 1)).all(2).any(1).all()
    assert len(weight.unique(dim=0)) == 16


def test_codes_are_revived_by_the_same_images_however_the_batch_is_cut(tmp_path, monkeypatch):
    seen = {}

    def watched(model, images, key):
        seen.setdefault(key, []).append(images)

    monkeypatch.setattr(pretrain_tokenizer, "_revive", watched)
    for micro in (8, 2):
        short = recipe("pretrain.images=16", f"pretrain.micro_batch={micro}")
        pretrain_tokenizer.run(short, tmp_path / str(micro), device=CPU)
    ((whole, pieces),) = seen.values()  # once in either run, at step 0
    assert torch.equal(whole, pieces)
    assert len(whole) == 8


def test_images_pass_what_lies_outside_of_residual_branches_from_the_start():
    model = Vqvae((3, 32, 32), VqvaeOptions.model_validate(OPTIONS))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        h = model.encoder.conv_in(x)  # (2, 4, 8, 8)
        assert_close(h, torch.cat([x, torch.zeros(2, 1, 8, 8)], dim=1))
        for passed in (model.quant_conv(h), model.post_quant_conv(h), model.quantize.contribution(h, 3)):
            assert_close(passed, h)
        assert_close(model.encoder.down[0].resample(h), h[:, :, 1::2, 1::2])
        wide = model.encoder.down[1].block[0].shortcut(h)
        assert_close(wide[:, :4], h)
        assert_close(model.decoder.up[1].resample(wide)[:, :, ::2, 1::2], wide)
        assert_close(model.decoder.conv_out(h), x)


def test_grey_images_have_tokens_too(tmp_path):
    options = {**OPTIONS, "channel_mult": [1, 2], "patch_nums": [1, 2, 3, 4]}
    grey = recipe("data={source: embedded:digits8}", "metric.num_images=16", "pretrain.images=16", options=options)
    found = pretrain_tokenizer.run(grey, tmp_path / "a", device=CPU)
    assert checkpoint.read_header(found["final"])["config"]["shape"] == [1, 8, 8]


def test_a_var_is_trained_on_it_and_then_needs_it_no_more(trained, tmp_path):
    options = {"depth": 1, "width": 16, "heads": 2, "vqvae": OPTIONS, "tokenizer": trained["final"]}
    found = pretrain.run(recipe(name="var", options=options), tmp_path / "var", device=CPU)
    config = checkpoint.read_header(found["final"], kind="model")["config"]
    config["options"]["tokenizer"] = "gone"
    model = registry.build(config)
    model.load_state_dict(checkpoint.load(found["final"]).tensors)
    for name, tensor in tokenizer(trained["final"]).state_dict().items():
        assert torch.equal(model.vqvae.state_dict()[name], tensor), name
    items = torch.from_numpy(open_images("embedded:digits32", 64).items[:4].copy())
    assert torch.equal(model.codec.encode(items), tokenizer(trained["final"]).encode(items))


def test_a_var_without_the_right_tokenizer_is_not_trained(trained, tmp_path):
    options = {"depth": 1, "width": 16, "heads": 2, "vqvae": OPTIONS}
    with pytest.raises(RecipeError, match=r"model\.options\.tokenizer"):
        pretrain.run(recipe(name="var", options=options), tmp_path / "a", device=CPU)
    options |= {"tokenizer": trained["final"], "vqvae": {**OPTIONS, "vocabulary": 8}}
    with pytest.raises(CheckpointError, match="vocabulary 16 instead of 8"):
        pretrain.run(recipe(name="var", options=options), tmp_path / "a", device=CPU)
    with pytest.raises(CheckpointError, match="tokenizer"):
        registry.load_model(trained["final"], CPU)


def test_mistakes_are_named_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match="metric js"):
        pretrain_tokenizer.run(recipe("metric={name: js}"), tmp_path / "a", device=CPU)
    wrong = recipe(options={**OPTIONS, "patch_nums": [1, 2]})
    with pytest.raises(RecipeError, match="8x8"):
        pretrain_tokenizer.run(wrong, tmp_path / "a", device=CPU)
    with pytest.raises(DataError, match="not images"):
        pretrain_tokenizer.run(recipe("data={source: embedded:toy2d, num: 64}"), tmp_path / "a", device=CPU)
    assert not (tmp_path / "a").exists()


def test_the_command_trains_either(tmp_path):
    run = CliRunner().invoke(
        app, ["pretrain", "--recipe", "digits32-vqvae", "--dry-run", "--json", "--out", str(tmp_path / "a")]
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["model"] == "vqvae"
    run = CliRunner().invoke(app, ["pretrain", "--recipe", "digits32-vqvae", "--dry-run"])
    assert run.exit_code == 0, run.output


def test_trackers_of_a_tokenizer_s_run_are_told(tmp_path, monkeypatch):
    """`pretrain` hands everything on that it is given."""
    given = {}
    monkeypatch.setattr(pretrain_tokenizer, "run", lambda recipe, out, **more: given.update(more) or {})
    more = {"device": CPU, "dry_run": True, "measure": False, "log_to": ("tensorboard",)}
    pretrain.run(recipe(), tmp_path / "vq", **more)
    assert given == more
