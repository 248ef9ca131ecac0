"""The discriminator's engine: it learns, resumes bit for bit, stops when settled, refuses what cannot work."""

import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, tiny_disc_recipe, torchrun
from kills import KilledError

from ddo_cli import checkpoint, cli, console, files
from ddo_cli.data import cache
from ddo_cli.data.images import open_images
from ddo_cli.data.pairs import split
from ddo_cli.diffusion import vp_sde
from ddo_cli.engines.analysis import analyze
from ddo_cli.engines.discriminator import data as disc_data
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.discriminator import training
from ddo_cli.engines.discriminator.features import CachedRows
from ddo_cli.engines.sampling import guide_sample, guides, sample
from ddo_cli.errors import CheckpointError, DataError, RecipeError, RunError, UsageError
from ddo_cli.metrics.discrimination import LEVELS, HeldOut, noisy
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.recipe.load import load
from ddo_cli.rng import StepRng
from ddo_cli.trainable import Trainable


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "m.safetensors")


@pytest.fixture(scope="module")
def finished(ckpt, tmp_path_factory):
    """An uninterrupted run: (directory, result)."""
    out = tmp_path_factory.mktemp("disc") / "run"
    return out, train_disc.run(tiny_disc_recipe(ckpt), out, device=CPU)


def test_layout_of_a_run(finished, ckpt):
    out, result = finished
    for name in ("recipe.yaml", "final.safetensors", "best.safetensors", "report.html"):
        assert (out / name).is_file(), name
    assert sorted(p.stem for p in (out / "checkpoints").iterdir()) == ["step-000004", "step-000008", "step-000012"]
    assert not (out / "train-state.safetensors").exists()
    assert {"out", "final", "heldout_bce", "heldout_accuracy", "settled"} <= result.keys()
    header = checkpoint.read_header(out / "final.safetensors", kind="discriminator")
    assert header["trained_on"]["model_sha256"] == checkpoint.load(ckpt).sha256
    assert header["trained_on"]["num_fake"] == 64
    assert header["process"]["name"] == "vp-linear"
    assert header["guidance"]["dg_weight"] == 2.0
    assert header["config"]["num_classes"] == 10
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy_real", "accuracy_fake", "logit_real", "lr"} <= lines[0].keys()


def test_best_has_the_best_held_out_loss(finished):
    out, result = finished
    evaluations = json.loads((out / "metrics.json").read_text())["evaluations"]
    assert result["heldout_bce"] == min(found["bce"] for found in evaluations.values())
    step = checkpoint.read_header(out / "best.safetensors")["step"]
    assert evaluations[str(step)]["bce"] == result["heldout_bce"]
    levels = evaluations[str(step)]["levels"]
    assert len(levels) == LEVELS
    assert [level["sigma_min"] for level in levels] == sorted(level["sigma_min"] for level in levels)
    assert {"bce_real", "bce_fake", "accuracy_real", "accuracy_fake", "reliability"} <= levels[0].keys()
    assert result["heldout_bce"] == pytest.approx(sum(level["bce"] for level in levels) / LEVELS)


def test_the_gain_is_measured_on_held_out_items_and_stored(finished, ckpt):
    out, result = finished
    gain = result["gain"]
    assert gain["weight"] == 2.0
    assert gain["error"] > 0
    header = checkpoint.read_header(out / "final.safetensors")
    assert header["heldout"]["gain"] == gain
    analysed = analyze.run(str(out / "final.safetensors"), ckpt, out.parent / "gain", what="gain", device=CPU)["gain"]
    assert analysed == {key: pytest.approx(value, rel=1e-4) for key, value in gain.items()}  # another batch rounds


def test_the_control_is_the_untrained_network_and_a_finished_run_gets_it_later(finished, ckpt, tmp_path, monkeypatch):
    out, result = finished
    shutil.copytree(out, tmp_path / "run")
    monkeypatch.setattr(training.loop, "fit", None)  # nothing is trained
    found = train_disc.run(tiny_disc_recipe(ckpt, "discriminator.control=true"), tmp_path / "run", device=CPU)
    control = found.pop("control")
    assert {**found, "out": result["out"], "final": result["final"], "best": result["best"]} == result
    assert control["bce"] == pytest.approx(math.log(2), abs=1e-6)
    assert control["gain"]["gain"] == control["gain"]["error"] == 0.0
    assert (tmp_path / "run" / "final.safetensors").read_bytes() == (out / "final.safetensors").read_bytes()
    assert "untrained (control)" in (tmp_path / "run" / "report.html").read_text()
    again = train_disc.run(tiny_disc_recipe(ckpt, "discriminator.control=true"), tmp_path / "run", device=CPU)
    assert again["control"] == control
    # Guidance by it is plain sampling.
    plain = sample.run(ckpt, range(4), tmp_path / "plain", device=CPU)
    guide_sample.run(control["file"], ckpt, range(4), tmp_path / "guided", device=CPU)
    assert plain["num_images"] == 4
    for image in (tmp_path / "plain").glob("*.png"):
        assert image.read_bytes() == (tmp_path / "guided" / image.name).read_bytes()


def test_the_checkpoint_with_the_best_gain_is_chosen(ckpt, tmp_path):
    found = train_disc.run(tiny_disc_recipe(ckpt, "discriminator.select=gain"), tmp_path / "run", device=CPU)
    evaluations = json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluations"]
    gains = {int(step): figures["gain"]["gain"] for step, figures in evaluations.items()}
    assert len(gains) == 3
    assert found["gain"]["gain"] == max(gains.values())
    assert checkpoint.read_header(tmp_path / "run" / "final.safetensors")["step"] == max(gains, key=gains.get)


@pytest.mark.parametrize(("gain", "warned"), [(-0.3, True), (-0.1, False), (0.5, False)])
def test_a_discriminator_that_leads_away_from_held_out_data_is_warned_of(gain, warned):
    found = guides.harm({"gain_weight_1": gain, "error_weight_1": 0.1})
    assert (found is not None) == warned
    assert guides.harm(None) is None
    if found:
        assert "gain -0.3 ± 0.1 nats" in found
        assert len(found) <= 300


def test_guided_sampling_warns_of_a_discriminator_with_negative_gain(finished, ckpt, tmp_path, capsys):
    file = checkpoint.load(finished[0] / "final.safetensors")
    held_out = {"gain": {"gain_weight_1": -1.0, "error_weight_1": 0.1}}
    checkpoint.save(tmp_path / "d.safetensors", file.tensors, {**file.header, "heldout": held_out})
    guide_sample.run(str(tmp_path / "d.safetensors"), ckpt, [0], tmp_path / "set", device=CPU, dry_run=True)
    assert "leads the score away from held-out data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=() if number in (12, 20) else pytest.mark.slow)
        for number in (3, 9, 12, 14, 17, 20, 24)
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(finished, ckpt, tmp_path, monkeypatch, number):
    out, _ = finished
    count, rename = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += 1
        if count == number:
            raise KilledError
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(KilledError):
            train_disc.run(tiny_disc_recipe(ckpt), tmp_path / "run", device=CPU)
    train_disc.run(tiny_disc_recipe(ckpt), tmp_path / "run", device=CPU)
    assert (tmp_path / "run" / "report.html").is_file()
    for name in ("final.safetensors", "best.safetensors", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes(), name


def test_a_finished_run_says_so_and_another_recipe_is_refused(finished, ckpt, capsys):
    out, result = finished
    assert train_disc.run(tiny_disc_recipe(ckpt), out, device=CPU) == result
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"discriminator\.lr: 0\.001 -> 0\.01"):
        train_disc.run(tiny_disc_recipe(ckpt, "discriminator.lr=0.01"), out, device=CPU)


@pytest.mark.parametrize("lost", [["final.safetensors"], ["final.safetensors", "checkpoints"]])
def test_a_lost_file_of_a_finished_run_is_made_again(finished, ckpt, tmp_path, monkeypatch, lost):
    out, result = finished
    shutil.copytree(out, tmp_path / "run")
    for name in lost:
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if len(lost) == 1:  # everything needed is there: nothing is trained
        monkeypatch.setattr(training.loop, "fit", None)
    assert train_disc.run(tiny_disc_recipe(ckpt), tmp_path / "run", device=CPU)["heldout_bce"] == result["heldout_bce"]
    assert (tmp_path / "run" / "final.safetensors").read_bytes() == (out / "final.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_agree_with_one(finished, ckpt, tmp_path):
    out, result = finished
    recipe = tmp_path / "r.yaml"
    shutil.copy(out / "recipe.yaml", recipe)
    options = ["--recipe", str(recipe), "--out", str(tmp_path / "two"), "--device", "cpu", "--json"]
    done = torchrun("-m", "ddo_cli", "train-disc", *options)
    found = json.loads(done.stdout)
    assert found["heldout_bce"] == pytest.approx(result["heldout_bce"], abs=1e-6)
    # Biases in front of a normalisation have no gradient but rounding, which Adam blows up: weights are not compared.
    ours, theirs = ([json.loads(line) for line in (path / "log.jsonl").open()] for path in (out, tmp_path / "two"))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], abs=1e-5)


@pytest.mark.slow
def test_it_learns_to_tell_noise_from_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "STILL_FALLING", -1.0)  # nothing counts as settled
    ckpt = make_checkpoint(tmp_path / "m.safetensors")  # random weights: samples look nothing like data
    recipe = tiny_disc_recipe(
        ckpt, "discriminator.images=3200", "discriminator.eval_every=800", "discriminator.lr=1e-2"
    )
    found = train_disc.run(recipe, tmp_path / "run", device=CPU)
    assert not found["settled"]
    assert "still falling" in capsys.readouterr().err
    assert found["heldout_bce"] < 0.6 < math.log(2)
    assert found["heldout_accuracy"] > 0.6


def test_training_stops_when_the_held_out_loss_has_settled(ckpt, tmp_path, capsys):
    # With a learning rate this small nothing changes but rounding: no evaluation is better by more than that.
    recipe = tiny_disc_recipe(ckpt, "discriminator.lr=1e-30", "discriminator.images=960", "discriminator.patience=2")
    found = train_disc.run(recipe, tmp_path / "run", device=CPU)
    assert found["settled"]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3  # the first, and two without a better loss
    assert "held-out accuracy is at chance" in capsys.readouterr().err


def test_held_out_rows_are_never_trained_on():
    found = split(100, 16, "real", 3)
    assert len(found.held_out) == 16
    assert sorted([*found.train, *found.held_out]) == list(range(100))
    assert not np.array_equal(found.held_out, split(100, 16, "fake", 3).held_out)


@pytest.mark.parametrize("law", ["importance", "uniform", "model"])
@pytest.mark.parametrize("weighting", ["none", "likelihood"])
def test_every_time_law_trains(ckpt, tmp_path, law, weighting):
    settings = (f"discriminator.time={law}", f"discriminator.weighting={weighting}", "discriminator.images=16")
    recipe = tiny_disc_recipe(ckpt, *settings)
    assert math.isfinite(train_disc.run(recipe, tmp_path / "run", device=CPU)["heldout_bce"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guidance.boost=true", "sampling.sampler=ddim"], "which sampler ddim cannot do"),
        (["guidance.time_min=0.97"], "holds none of the sampler's times"),
        (["sampling.labels=position"], "64 seeds are no multiple"),
        (["discriminator.activation_checkpointing=true"], "names no blocks to recompute"),
        (["discriminator.sharding=fsdp"], "sharding = fsdp is for models that pretrain and finetune-ddo train"),
    ],
)
def test_settings_are_checked_before_training(ckpt, tmp_path, overrides, message):
    recipe = tiny_disc_recipe(ckpt, "discriminator.select=fid", *overrides)
    with pytest.raises(UsageError, match=message):
        train_disc.run(recipe, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_classes_are_checked_before_drawing(ckpt, tmp_path):
    missing = npz(tmp_path / "nine.npz", list(range(9)) * 8)
    with pytest.raises(DataError, match="no item of class 9"):
        train_disc.run(tiny_disc_recipe(ckpt, f"data={{source: {missing}, num: null}}"), tmp_path / "run", device=CPU)
    with pytest.raises(DataError, match=r"generated set of 8 .* has no item of class 8, 9"):
        disc_data.check_classes(open_images("embedded:digits32", 96), 8, 10)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("bce", "settled"),
    [
        ([0.60, 0.545, 0.54, 0.535, 0.53], True),  # the second half brought 9 % of what has been learnt
        ([0.68, 0.65, 0.60, 0.55, 0.54], False),  # a decayed learning rate flattens every end
        ([0.69, 0.68, 0.67, 0.66, 0.65], False),
    ],
)
def test_settled_is_judged_by_the_second_half(bce, settled):
    class Run(training.Training):
        def __init__(self):
            self.settings = load("quickstart").discriminator
            self.evaluations = {str(100 * (i + 1)): {"bce": value} for i, value in enumerate(bce)}

    assert Run().has_settled() == settled


def test_selection_by_the_metric_of_guided_samples(ckpt, tmp_path):
    found = train_disc.run(tiny_disc_recipe(ckpt, "discriminator.select=fid"), tmp_path / "run", device=CPU)
    scores = json.loads((tmp_path / "run" / "guided-scores.json").read_text())
    assert scores.keys() == {"4", "8", "12"}
    assert found["best_images"] == 8 * int(min(scores, key=scores.get))
    assert found["selected_by"] == "fid"


def test_a_given_set_of_the_model_is_used(ckpt, finished, tmp_path):
    sample.run(ckpt, range(64), tmp_path / "set", sampling={"sampler": "euler", "steps": 2}, device=CPU)
    recipe = tiny_disc_recipe(ckpt, f"discriminator.fake={tmp_path / 'set'}")
    train_disc.run(recipe, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run" / "samples").exists()
    header = checkpoint.read_header(tmp_path / "run" / "final.safetensors")
    assert header["trained_on"]["sampling"]["steps"] == 2


def test_a_set_of_another_model_is_refused(ckpt, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "other.safetensors", seed=1)
    sample.run(other, range(64), tmp_path / "set", device=CPU)
    recipe = tiny_disc_recipe(ckpt, f"discriminator.fake={tmp_path / 'set'}")
    with pytest.raises(DataError, match=r"drawn by another model .*--force"):
        train_disc.run(recipe, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()
    train_disc.run(recipe, tmp_path / "run", device=CPU, force=True)
    assert "used nevertheless" in capsys.readouterr().err


def npz(path, labels, size=32):
    images = np.random.default_rng(0).integers(0, 255, (len(labels), size, size, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, labels=np.array(labels))
    return str(path)


def test_sets_that_cannot_be_told_apart_in_a_useful_way(ckpt, tmp_path):
    def run(*overrides):
        train_disc.run(tiny_disc_recipe(ckpt, *overrides), tmp_path / "run", device=CPU, force=True)

    one_class = npz(tmp_path / "one.npz", [3] * 64)
    with pytest.raises(DataError, match=r"no item of class 0, 1, 2"):
        run(f"discriminator.fake={one_class}")
    run(f"discriminator.fake={one_class}", "discriminator.conditional=false", "discriminator.images=8")
    few = npz(tmp_path / "few.npz", list(range(10)))
    with pytest.raises(DataError, match=r"96 real and 10 generated.*lower discriminator\.held_out to at most 5"):
        run(f"discriminator.fake={few}")
    small = npz(tmp_path / "small.npz", list(range(10)) * 7, size=16)
    with pytest.raises(DataError, match="holds 16x16 RGB where the model needs 32x32 RGB"):
        run(f"discriminator.fake={small}")
    with pytest.raises(DataError, match="by heart"):
        run("data.num=16384", "discriminator.num_fake=40")
    with pytest.raises(DataError, match="does not exist"):
        run("discriminator.fake=nowhere")


def test_an_autoregressive_model_is_refused(tmp_path):
    transformer = make_checkpoint(tmp_path / "t.safetensors", "autoregressive")
    recipe = tiny_disc_recipe(transformer, "data={source: embedded:digits8}", "sampling={batch: 8}")
    with pytest.raises(UsageError, match="needs a diffusion model"):
        train_disc.run(recipe, tmp_path / "run", device=CPU)


def test_misspelt_networks_and_options(ckpt, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'time-encoder'"):
        train_disc.run(tiny_disc_recipe(ckpt, "discriminator.name=time-encodr"), tmp_path / "run", device=CPU)
    with pytest.raises(RecipeError, match="did you mean 'widths'"):
        train_disc.run(tiny_disc_recipe(ckpt, "discriminator.options={width: 3}"), tmp_path / "run", device=CPU)
    overrides = ("discriminator.name=time-mlp", "discriminator.options={}")
    with pytest.raises(RecipeError, match=r"it needs points of shape \(d,\)"):
        train_disc.run(tiny_disc_recipe(ckpt, *overrides), tmp_path / "run", device=CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def test_the_default_network_sees_the_whole_of_a_large_image():
    config = discriminators.config_of("discriminator", "time-encoder", (3, 256, 256), 0, {})
    network = discriminators.build("discriminator", config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.zeros(1, 3, 256, 256, requires_grad=True)
    features = network.features(x, torch.full((1,), 0.3, dtype=torch.float64))
    assert features.shape[2] == 8
    (gradient,) = torch.autograd.grad(features[:, :, 4, 4].square().sum(), x)
    assert gradient[..., 48, 48].abs().sum() > 0  # 88 pixels away


@pytest.mark.parametrize(("shape", "patch"), [((3, 32, 32), 4), ((1, 28, 28), 2), ((4, 8, 8), 1), ((3, 64, 64), 4)])
def test_the_default_network_takes_any_square_state(shape, patch):
    config = discriminators.config_of("discriminator", "time-encoder", shape, 0, {"widths": [8, 16]})
    network = discriminators.build("discriminator", config)
    assert network.patch == patch
    logit = network(torch.randn(2, *shape), torch.tensor([0.1, 0.9], dtype=torch.float64), torch.tensor([-1, -1]))
    assert logit.tolist() == [0.0, 0.0]  # untrained: no guidance


def test_labels_reach_a_conditional_network_and_no_other():
    x, t = torch.randn(2, 3, 32, 32), torch.full((2,), 0.3, dtype=torch.float64)
    for num_classes, differ in ((10, True), (0, False)):
        torch.manual_seed(0)
        config = discriminators.config_of("discriminator", "time-encoder", (3, 32, 32), num_classes, {"widths": [8]})
        config["options"]["depths"] = [1]
        network = discriminators.build("discriminator", config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        one, other = (network(x, t, torch.full((2,), label)) for label in (1, 2))
        assert (not torch.equal(one, other)) == differ


def random_trunk(path):
    """A classifier with random weights, written to `path`, and its header."""
    options = {"widths": [16], "depths": [1], "emb_width": 16}
    config = discriminators.config_of("classifier", "time-encoder-classifier", (3, 32, 32), 10, options)
    torch.manual_seed(0)
    trunk = discriminators.build("classifier", config)
    header = {"kind": "classifier", "config": config, "process": discriminators.PROCESS}
    checkpoint.save(path, trunk.state_dict(), header)
    return trunk, header


def on_trunk(ckpt, path, *settings):
    options = f"discriminator.options={{trunk: {path}, widths: [8], depths: [1], emb_width: 16}}"
    return tiny_disc_recipe(ckpt, "discriminator.name=trunk", options, *settings)


def test_features_kept_on_disk_change_nothing_until_they_are_used_again(ckpt, tmp_path, monkeypatch):
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    said = []
    monkeypatch.setattr(console, "warn", said.append)
    random_trunk(tmp_path / "trunk.safetensors")

    def trained(out, cached):
        path = tmp_path / "trunk.safetensors"
        recipe = on_trunk(ckpt, path, "discriminator.images=24", f"discriminator.cached_images={cached}")
        train_disc.run(recipe, tmp_path / out, device=CPU)
        return checkpoint.load(tmp_path / out / "final.safetensors").tensors

    plain, kept = trained("plain", 0), trained("kept", 24)
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    (entry,) = (tmp_path / "cache").glob("*-trunk-*.npy")
    features = np.load(entry)
    assert features.shape == (24, 2 * 16, 8, 8)
    entry.write_bytes(entry.read_bytes()[:-1])
    again = trained("damaged", 24)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert f"{entry} is damaged and is made again" in said
    np.testing.assert_array_equal(np.load(entry), features)


def test_features_on_disk_come_again_in_other_orders():
    features = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1).repeat(4, axis=1)  # (N, 2 C, h, w)
    labels = torch.arange(6)[:, None] + torch.tensor([[0, 10]])
    stream = CachedRows(features, labels, labels.to(torch.float64), None, 0)
    drawn = [stream.rows(6 * epoch, 6 * epoch + 6)[0][:, 0, 0, 0].tolist() for epoch in (0, 1, 2, 0)]
    assert drawn[0] == drawn[3] == list(range(6))
    assert sorted(drawn[1]) == sorted(drawn[2]) == drawn[0]
    assert drawn[0] != drawn[1] != drawn[2]
    batch = stream.batch(*stream.rows(4, 8), StepRng((0,), 0, range(4)))
    assert batch.features.shape == (8, 2, 1, 1)
    assert (batch.features[:, 0, 0, 0] == batch.label % 10).all()
    assert (batch.label >= 10).tolist() == [False] * 4 + [True] * 4  # real rows first
    assert (batch.t == batch.label).all()


def test_features_on_disk_are_foretold_and_refused_where_they_cannot_be(ckpt, tmp_path, monkeypatch):
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    random_trunk(tmp_path / "trunk.safetensors")

    def tried(recipe):
        return train_disc.run(recipe, tmp_path / "run", device=CPU, dry_run=True)

    def of_trunk(cached):
        return on_trunk(ckpt, tmp_path / "trunk.safetensors", f"discriminator.cached_images={cached}")

    assert tried(of_trunk(16))["cached_features"] == f"0.000131 GB in {tmp_path / 'cache'}"
    assert "cached_features" not in tried(of_trunk(0))
    with pytest.raises(UsageError, match="frozen trunk, which time-encoder has not"):
        tried(tiny_disc_recipe(ckpt, "discriminator.cached_images=16"))
    for cached in (17, 1 << 20):
        with pytest.raises(UsageError, match=r"a multiple of discriminator\.batch = 8, and at most"):
            tried(of_trunk(cached))
    monkeypatch.setattr(cache, "MARGIN", 1 << 60)
    with pytest.raises(RunError, match=r"0\.0 GB of features cannot be kept in .* make room"):
        train_disc.run(of_trunk(16), tmp_path / "full", device=CPU)
    monkeypatch.setenv("DDO_CACHE", "off")
    with pytest.raises(UsageError, match="which DDO_CACHE turns off"):
        tried(of_trunk(16))


def test_a_discriminator_on_a_frozen_trunk(tmp_path):
    trunk, header = random_trunk(tmp_path / "trunk.safetensors")
    ckpt = make_checkpoint(tmp_path / "m.safetensors")
    recipe = on_trunk(ckpt, tmp_path / "trunk.safetensors")
    train_disc.run(recipe, tmp_path / "run", device=CPU)
    found = discriminators.load("discriminator", tmp_path / "run" / "final.safetensors", CPU)
    assert all(name.startswith("head.") for name in found.checkpoint.tensors)  # the trunk is not copied
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    t, label = torch.full((2,), 0.3, dtype=torch.float64), torch.tensor([1, 2])
    (gradient,) = torch.autograd.grad(found.network(x, t, label).sum(), x)
    assert gradient.abs().sum() > 0  # through the trunk
    same = discriminators.load("classifier", tmp_path / "trunk.safetensors", CPU).network
    with torch.no_grad():
        torch.testing.assert_close(same(x, t), trunk(x, t))
    checkpoint.save(tmp_path / "trunk.safetensors", {k: v + 1 for k, v in trunk.state_dict().items()}, header)
    with pytest.raises(RunError, match=r"config\.options\.trunk_sha256"):  # nor does a run go on with another trunk
        train_disc.run(recipe, tmp_path / "run", device=CPU)
    with pytest.raises(CheckpointError, match="has changed since"):
        discriminators.load("discriminator", tmp_path / "run" / "final.safetensors", CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out figures


def held_out(network, size=600):
    """Figures of a known network on two Gaussians, real N(1, 1) and generated N(-1, 1), in one dimension."""
    g = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(size, 1, generator=g) + mean for mean in (1.0, -1.0))
    label = torch.full((size,), -1)

    law = vp_sde.TimeLaw("importance", t_min=1e-3)
    return HeldOut((real, label), (fake, label), law, 0, CPU).evaluate(network)


class Optimal(Trainable):
    """The exact log-ratio: x_t ~ N(+-m, 1) in VP coordinates, so it is 2 m x."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain

    def forward(self, x, t, label):
        return self.gain * (2 * vp_sde.mean_scale(t).to(x.dtype) * x.squeeze(1))


def test_figures_of_the_optimal_discriminator():
    found = held_out(Optimal())
    # The lowest level is nearly clean: accuracy Phi(1) = 0.841; 1,200 rows give a standard error of 0.011.
    assert found["levels"][0]["accuracy_real"] == pytest.approx(0.841, abs=0.04)
    assert found["levels"][-1]["accuracy_real"] == pytest.approx(0.5, abs=0.1)
    assert found["calibration_error"] < 0.03
    assert found["bce"] < held_out(Optimal(2.0))["bce"]
    assert found["bce"] < held_out(Optimal(0.5))["bce"]
    assert held_out(Optimal(4.0))["calibration_error"] > 0.08  # overconfident
    assert held_out(Optimal(0.0))["bce"] == pytest.approx(math.log(2))


def test_noisy_states_have_the_forward_process_moments():
    t = torch.full((4000,), 0.3, dtype=torch.float64)
    x = noisy(torch.full((4000, 1), 2.0), t, torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)))
    assert x.mean().item() == pytest.approx(2 * vp_sde.mean_scale(t[0]).item(), abs=0.05)
    assert x.std().item() == pytest.approx(vp_sde.std(t[0]).item(), abs=0.05)


def test_eval_num_is_of_the_scores(ckpt, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(train_disc, "run", lambda recipe, *_, **__: given.append(recipe) or {"out": "there"})
    command = ["ddo", "train-disc", "--ckpt", ckpt, "--eval-num", "64", "--dry-run"]
    for options, code in (([], 2), (["--select", "fid"], 0)):
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
    assert [recipe.metric.num_images for recipe in given] == [64]
    assert "--eval-num 64 has no effect" in " ".join(capsys.readouterr().err.split())
