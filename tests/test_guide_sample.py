"""Guided sampling from files: bit-identity at weight 0, pairs that do not match, composition, separate counts."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import CPU, make_checkpoint, make_discriminator, torchrun

from ddo_cli import checkpoint
from ddo_cli.data.samples import open_samples
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.engines.sampling import guide_sample, guides, sample
from ddo_cli.engines.sampling.guides import Others
from ddo_cli.errors import CheckpointError, NumericsError, RecipeError, RunError, UsageError
from ddo_cli.files import write_json
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "m.safetensors")


@pytest.fixture(scope="module")
def disc(ckpt, tmp_path_factory):
    return make_discriminator(tmp_path_factory.mktemp("disc") / "d.safetensors", ckpt, scale=0.3)


def pngs(path):
    return {p.name: p.read_bytes() for p in sorted(path.glob("*.png"))}


def items(path):
    return torch.from_numpy(open_samples(path).items).int()


def run(disc, out, num=6, ckpt=None, **options):
    return guide_sample.run(disc, ckpt, range(num), out, form="shards", device=CPU, **options)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp-2m", "ddim", "ddpm"])
def test_weight_0_gives_the_images_of_plain_sampling(ckpt, disc, tmp_path, sampler):
    settings = {"sampler": sampler, "steps": 4}
    sample.run(ckpt, range(6), tmp_path / "plain", sampling=settings, device=CPU)
    found = guide_sample.run(
        disc, None, range(6), tmp_path / "guided", sampling=settings, guidance={"dg_weight": 0.0}, device=CPU
    )
    assert found["disc_nfe"] == 0
    assert len(pngs(tmp_path / "plain")) == 6
    assert pngs(tmp_path / "plain") == pngs(tmp_path / "guided")


def test_churn_and_guidance_free_runs_agree(ckpt, disc, tmp_path):
    settings = {"sampler": "heun", "steps": 4, "s_churn": 2.0}
    sample.run(ckpt, range(6), tmp_path / "plain", sampling=settings, device=CPU)
    off = {"dg_weight": 0.0}
    guide_sample.run(disc, None, range(6), tmp_path / "guided", sampling=settings, guidance=off, device=CPU)
    assert pngs(tmp_path / "plain") == pngs(tmp_path / "guided")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp-2m", "ddim", "ddpm"])
def test_every_sampler_is_guided(ckpt, disc, tmp_path, sampler):
    settings = {"sampler": sampler, "steps": 4}
    found = run(disc, tmp_path / "guided", sampling=settings, guidance={"dg_weight_2nd": float(sampler == "heun")})
    plain = run(disc, tmp_path / "plain", sampling=settings, guidance={"dg_weight": 0.0})
    assert found["nfe"] == plain["nfe"] == (7 if sampler == "heun" else 4)
    assert 3 <= found["disc_nfe"] <= found["nfe"]  # the last level lies below the window
    assert (items(tmp_path / "guided") - items(tmp_path / "plain")).abs().max() > 0


def test_report_of_a_set(ckpt, disc, tmp_path):
    found = run(disc, tmp_path / "set")
    assert {"out", "num_images", "nfe", "disc_nfe", "dg_weight", "images_per_second", "seeds"} <= found.keys()
    assert found["dg_weight"] == 2.0  # stored with the discriminator
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["guidance"]["discriminator_sha256"] == checkpoint.load(disc).sha256
    assert run(disc, tmp_path / "set")["disc_nfe"] == found["disc_nfe"]  # finished: nothing is drawn again


def test_images_depend_on_their_seeds_only(ckpt, disc, tmp_path):
    guide_sample.run(disc, None, range(12), tmp_path / "all", guidance={"boost": True}, device=CPU)
    guide_sample.run(disc, None, [9, 8, 11, 10], tmp_path / "some", guidance={"boost": True}, device=CPU)
    both, some = pngs(tmp_path / "all"), pngs(tmp_path / "some")
    assert sum(both[name] == some[name] for name in some) >= 3  # batches of another size may round otherwise


def test_two_processes_write_the_same_set(ckpt, disc, tmp_path):
    guide_sample.run(disc, None, range(20), tmp_path / "one", device=CPU)
    options = ["--disc", disc, "--num-images", "20", "--out", str(tmp_path / "two"), "--device", "cpu", "--json"]
    done = torchrun("-m", "ddo_cli", "guide-sample", *options)
    assert json.loads(done.stdout)["num_images"] == 20
    assert pngs(tmp_path / "one") == pngs(tmp_path / "two")


def test_guidance_raises_the_logit(ckpt, disc, tmp_path):
    network = discriminators.load("discriminator", disc, CPU).network
    model, _ = registry.load_model(ckpt, CPU)
    logits = []
    for weight in (0.0, 1.0, 3.0):
        out = tmp_path / str(weight)
        run(disc, out, num=16, sampling={"sampler": "euler", "steps": 6}, guidance={"dg_weight": weight})
        x = model.codec.encode(torch.from_numpy(open_samples(out).items))
        label = torch.from_numpy(open_samples(out).labels)
        logits.append(network(x, torch.full((16,), 0.02, dtype=torch.float64), label).mean().item())
    assert logits == sorted(logits)


def test_boost_changes_samples_and_needs_a_sampler_that_churns(disc, tmp_path):
    file = checkpoint.load(disc)
    doubting = {**file.tensors, "head.bias": file.tensors["head.bias"] - 20}  # every sample looks generated
    checkpoint.save(tmp_path / "d.safetensors", doubting, file.header)
    disc = str(tmp_path / "d.safetensors")
    settings = {"sampler": "heun", "steps": 12}
    run(disc, tmp_path / "plain", num=16, sampling=settings)
    run(disc, tmp_path / "boost", num=16, sampling=settings, guidance={"boost": True})
    assert (items(tmp_path / "plain") - items(tmp_path / "boost")).abs().max() > 0
    with pytest.raises(UsageError, match="boost churns samples, which sampler ddim cannot do"):
        run(disc, tmp_path / "ddim", sampling={"sampler": "ddim"}, guidance={"boost": True})
    with pytest.raises(RecipeError, match="boost = true needs dg_weight above 0"):
        run(disc, tmp_path / "off", guidance={"boost": True, "dg_weight": 0.0})


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def test_the_newest_discriminator_and_its_model_are_the_default(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no finished discriminator in runs/\*; run `ddo train-disc` first"):
        run(None, tmp_path / "set")
    for number, name in enumerate(("old", "new", "unfinished", "pretrained")):
        make_discriminator(Path("runs") / name / "final.safetensors", ckpt, seed=number)
        os.utime(Path("runs") / name / "final.safetensors", (number, number))
        command = "pretrain" if name == "pretrained" else "train-disc"
        write_json(Path("runs") / name / "state.json", {"command": command, "finished": name != "unfinished"})
    found = run(None, tmp_path / "set")
    assert found["discriminator"] == "runs/new/final.safetensors"
    assert found["checkpoint_sha256"] == checkpoint.load(ckpt).sha256


def test_a_discriminator_of_another_model_is_refused(ckpt, disc, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UsageError, match=r"was trained against .*whose samples it has never seen.*--force"):
        run(disc, tmp_path / "set", ckpt=other)
    assert not (tmp_path / "set").exists()
    run(disc, tmp_path / "set", ckpt=other, force=True)
    assert "used nevertheless" in capsys.readouterr().err


def rewritten(disc, path, **changes):
    file = checkpoint.load(disc)
    checkpoint.save(path, file.tensors, {**file.header, **changes})
    return str(path)


def test_another_noise_process_shape_or_label_use_is_refused(ckpt, disc, tmp_path):
    process = {"name": "vp-linear", "beta_0": 0.1, "beta_1": 12.0}
    with pytest.raises(CheckpointError, match=r"noise process .*12\.0.* train one with ddo train-disc"):
        run(rewritten(disc, tmp_path / "process.safetensors", process=process), tmp_path / "set")
    config = checkpoint.read_header(disc)["config"]
    small = rewritten(disc, tmp_path / "small.safetensors", config={**config, "shape": [3, 16, 16]})
    with pytest.raises(UsageError, match=r"made for states of shape \(3, 16, 16\).*draws \(3, 32, 32\)"):
        run(small, tmp_path / "set")
    unconditional = registry.config_of("patch-unet", (3, 32, 32), 0, {"widths": [8], "depths": [1]}, {})
    checkpoint.save(
        tmp_path / "u.safetensors", registry.build(unconditional).state_dict(),
        {"kind": "model", "config": unconditional, "sampling": {}, "provenance": []},
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"sees labels of 10 classes, and .* has no classes"):
        run(disc, tmp_path / "set", ckpt=str(tmp_path / "u.safetensors"), force=True)
    with pytest.raises(CheckpointError, match="of kind 'model' where a 'discriminator' is needed"):
        run(ckpt, tmp_path / "set")
    transformer = make_checkpoint(tmp_path / "t.safetensors", "autoregressive")
    with pytest.raises(UsageError, match="needs a diffusion model"):
        run(disc, tmp_path / "set", ckpt=transformer, force=True)
    assert not (tmp_path / "set").exists()


def test_a_moved_model_is_named(ckpt, disc, tmp_path):
    moved = rewritten(disc, tmp_path / "d.safetensors", trained_on={"model": "gone.safetensors", "model_sha256": "0"})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist.*say with --ckpt where it is now"):
        run(moved, tmp_path / "set")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"time_min": -0.1}, r"time_min = -0\.1"),
        ({"time_max": 1.5}, r"time_max = 1\.5"),
        ({"time_min": 0.5, "time_max": 0.5}, r"time_min = 0\.5 must be below time_max = 0\.5"),
        ({"dg_weight": -1.0}, r"dg_weight = -1\.0"),
        ({"decay": "fast"}, r"decay = 'fast'"),
        ({"boost_churn_period": 0}, r"boost_churn_period = 0"),
    ],
)
def test_values_that_mean_nothing(disc, tmp_path, values, message):
    with pytest.raises(RecipeError, match=message):
        run(disc, tmp_path / "set", guidance=values)
    assert not (tmp_path / "set").exists()


def test_other_sampling_settings_than_those_of_the_set_are_said(ckpt, tmp_path, capsys):
    spec = sample.spec_of(checkpoint.load(ckpt)).model_dump(mode="json")
    disc = make_discriminator(tmp_path / "d.safetensors", ckpt, sampling=spec)
    run(disc, tmp_path / "same")
    assert "other settings" not in capsys.readouterr().err
    run(disc, tmp_path / "other", sampling={"steps": 5, "batch": 4})
    err = capsys.readouterr().err
    assert "steps: 3 -> 5" in err
    assert "batch" not in err


# ---------------------------------------------------------------------------------------------------------------------
# Composition


def make_classifier(path, num_classes=10):
    options = {"widths": [8], "depths": [1], "emb_width": 16}
    config = discriminators.config_of("classifier", "time-encoder-classifier", (3, 32, 32), num_classes, options)
    torch.manual_seed(0)
    network = discriminators.build("classifier", config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    checkpoint.save(
        path, network.state_dict(), {"kind": "classifier", "config": config, "process": discriminators.PROCESS}
    )
    return str(path)


def test_all_guides_together(ckpt, disc, tmp_path):
    bad = make_checkpoint(tmp_path / "bad.safetensors", seed=3)
    classifier = make_classifier(tmp_path / "c.safetensors")
    settings = {"sampler": "euler", "steps": 3, "cfg_scale": 2.0}
    found = run(disc, tmp_path / "all", sampling=settings, others=Others(bad, 1.5, classifier, 2.0))
    assert found["nfe"] == 9  # conditional, unconditional and bad version
    assert found["disc_nfe"] == 5  # classifier at every step, discriminator inside its window
    assert found["guidance"]["autoguidance"]["scale"] == 1.5
    assert found["guidance"]["classifier"]["weight"] == 2.0
    none = run(disc, tmp_path / "none", sampling=settings, others=Others(None, 1.0, classifier, 0.0))
    assert (none["nfe"], none["disc_nfe"]) == (6, 2)
    run(disc, tmp_path / "plain", sampling=settings)
    assert torch.equal(items(tmp_path / "none"), items(tmp_path / "plain"))  # every weight can be switched off alone
    with pytest.raises(UsageError, match="tells 7 classes"):
        run(disc, tmp_path / "x", others=Others(classifier=make_classifier(tmp_path / "c7.safetensors", 7)))


def test_classifier_guidance_raises_the_probability_of_the_label(ckpt, disc, tmp_path):
    path = make_classifier(tmp_path / "c.safetensors")
    network = discriminators.load("classifier", path, CPU).network
    model, _ = registry.load_model(ckpt, CPU)
    found = []
    for weight in (0.0, 5.0):
        out = tmp_path / str(weight)
        settings = {"sampler": "euler", "steps": 6}
        run(disc, out, 20, sampling=settings, guidance={"dg_weight": 0.0}, others=Others(None, 1.0, path, weight))
        x = model.codec.encode(torch.from_numpy(open_samples(out).items))
        log_p = network(x, torch.full((20,), 0.02, dtype=torch.float64)).log_softmax(1)
        found.append(log_p.gather(1, torch.from_numpy(open_samples(out).labels)[:, None]).mean().item())
    assert found[1] > found[0]


def test_autoguidance_of_plain_sampling(ckpt, tmp_path):
    bad = make_checkpoint(tmp_path / "bad.safetensors", seed=3)
    model, record = guides.of_plain_sampling(Others(bad, 2.0), registry.load_model(ckpt, CPU), CPU)
    settings = {"sampler": "euler", "steps": 3}
    found = sample.run(model, range(4), tmp_path / "set", sampling=settings, guidance=record, device=CPU)
    assert found["nfe"] == 6
    small = registry.config_of("patch-unet", (3, 16, 16), 10, {"widths": [8], "depths": [1]}, {})
    header = {"kind": "model", "config": small, "sampling": {}, "provenance": []}
    checkpoint.save(tmp_path / "small.safetensors", registry.build(small).state_dict(), header)
    with pytest.raises(UsageError, match="autoguidance needs a version of the same model"):
        guides.of_plain_sampling(Others(str(tmp_path / "small.safetensors"), 2.0), registry.load_model(ckpt, CPU), CPU)


def test_options_without_effect_are_refused(ckpt, disc, tmp_path):
    with pytest.raises(UsageError, match="--dg-weight-2nd is of heun's correctors, and sampler euler has none"):
        run(disc, tmp_path / "x", sampling={"sampler": "euler"}, guidance={"dg_weight_2nd": 1.0})
    with pytest.raises(UsageError, match="--boost-churn-period 3 has no effect without --boost"):
        run(disc, tmp_path / "x", guidance={"boost_churn_period": 3})
    for others in (Others(guidance=2.0), Others(guide_ckpt=ckpt), Others(classifier_weight=3.0)):
        with pytest.raises(UsageError, match=r"is the scale of|no effect at scale 1|needs --classifier"):
            run(disc, tmp_path / "x", others=others)
    for others in (Others(ckpt, float("nan")), Others(classifier_weight=float("inf"))):
        with pytest.raises(UsageError, match="is not a finite number"):
            run(disc, tmp_path / "x", others=others)
    with pytest.raises(UsageError, match=r"holds none of the sampler's times"):
        run(disc, tmp_path / "x", guidance={"time_min": 0.96})
    assert not (tmp_path / "x").exists()


def test_samples_that_diverge_stop_the_run(disc, tmp_path):
    with pytest.raises(NumericsError, match="samples are not finite"):
        run(disc, tmp_path / "x", guidance={"dg_weight": 1e308})
    assert not list((tmp_path / "x").glob("shard-*"))


def test_plain_and_guided_sets_are_never_mixed(ckpt, disc, tmp_path):
    run(disc, tmp_path / "guided")
    with pytest.raises(RunError, match="holds another sample set"):
        sample.run(ckpt, range(6), tmp_path / "guided", form="shards", device=CPU)
    sample.run(ckpt, range(6), tmp_path / "plain", form="shards", device=CPU)
    with pytest.raises(RunError, match="holds another sample set"):
        run(disc, tmp_path / "plain")


def test_weight_0_switches_a_stored_boost_off(disc, tmp_path):
    stored = checkpoint.read_header(disc)["guidance"]
    boosted = rewritten(disc, tmp_path / "d.safetensors", guidance={**stored, "boost": True})
    assert run(boosted, tmp_path / "set", guidance={"dg_weight": 0.0})["disc_nfe"] == 0


def test_a_damaged_run_is_left_out(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_discriminator(Path("runs") / "good" / "final.safetensors", ckpt)
    write_json(Path("runs") / "good" / "state.json", {"command": "train-disc", "finished": True})
    (Path("runs") / "broken").mkdir()
    (Path("runs") / "broken" / "state.json").write_text("{")
    assert run(None, tmp_path / "set")["discriminator"] == "runs/good/final.safetensors"
    assert "left out" in capsys.readouterr().err


def test_one_pass_each_way_per_guided_evaluation_and_no_graph_through_the_model(ckpt, disc, tmp_path, monkeypatch):
    counts = {"forward": 0, "backward": 0}
    load, grad, denoise = discriminators.load, torch.autograd.grad, DiffusionModel.denoise

    def counted_load(*arguments):
        loaded = load(*arguments)
        assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
        loaded.network.register_forward_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
        return loaded

    def counted_grad(*arguments, **options):
        counts["backward"] += 1
        return grad(*arguments, **options)

    def watched(self, x, sigma, label):
        denoised = denoise(self, x, sigma, label)
        assert not x.requires_grad
        assert not denoised.requires_grad
        return denoised

    monkeypatch.setattr(discriminators, "load", counted_load)
    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    monkeypatch.setattr(DiffusionModel, "denoise", watched)
    found = run(
        disc, tmp_path / "set", num=4, sampling={"sampler": "heun", "steps": 5}, guidance={"dg_weight_2nd": 1.0}
    )
    made = 2  # batches: the set's, and the contact sheet's
    assert counts == {"forward": made * found["disc_nfe"], "backward": made * found["disc_nfe"]}
