"""Discriminators, classifiers and edits of models that work on latents."""

import json
from pathlib import Path

import numpy as np
import pytest
import test_dit
import torch
from conftest import CPU, TINY_ENCODER, tiny_disc_recipe
from test_flow import GoldenNoise
from test_latents import DATA, encoded, ref, same
from toy_latent import ToyCodec, make_toy

from ddo_cli import checkpoint
from ddo_cli.data.images import open_images
from ddo_cli.data.samples import open_samples
from ddo_cli.engines.analysis import analyze
from ddo_cli.engines.discriminator import classifier as train_classifier
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.edit import edit
from ddo_cli.engines.sampling import guide_sample, guides, sample
from ddo_cli.errors import UsageError
from ddo_cli.models import registry
from ddo_cli.models.discriminators import files as dg_files
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.discriminators.adm_encoder import AdmClassifier
from ddo_cli.models.discriminators.adm_head import AdmHead
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import GuidanceRecipe, SamplingRecipe


def test_a_discriminator_of_latents_guides(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors", std=0.25)
    source = encoded(ckpt, tmp_path / "set", num=96)
    overrides = [f"metric.ref={ref(tmp_path)}", "discriminator.conditional=false"]
    images = train_disc.run(tiny_disc_recipe(ckpt, *overrides), tmp_path / "images", device=CPU)
    options = [*overrides, f"data.source={source}", "data.num=null"]
    latents = train_disc.run(tiny_disc_recipe(ckpt, *options), tmp_path / "latents", device=CPU)
    same(images["final"], latents["final"])
    assert images["heldout_bce"] == latents["heldout_bce"]
    fake = open_samples(tmp_path / "latents" / "samples").items
    assert fake.shape == (64, 12, 16, 16)

    plain = sample.run(ckpt, range(8), tmp_path / "plain", form="shards", device=CPU)
    guided = guide_sample.run(latents["final"], ckpt, range(8), tmp_path / "guided", form="shards", device=CPU)
    assert guided["disc_nfe"] > 0
    first, second = (open_samples(Path(found["out"])).items for found in (plain, guided))
    assert first.dtype == second.dtype == np.uint8
    assert (first != second).any()

    found = analyze.run(latents["final"], ckpt, tmp_path / "analysis", what="gain,trajectory", device=CPU)
    assert np.isfinite(found["gain"]["gain"])
    with pytest.raises(UsageError, match="regeneration does not apply here: it compares images"):
        analyze.run(latents["final"], ckpt, tmp_path / "analysis", what="regeneration", device=CPU)


def test_a_given_set_of_images_is_encoded(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors")
    sample.run(ckpt, range(64), tmp_path / "fake", device=CPU)
    ToyCodec.largest = 0
    recipe = tiny_disc_recipe(
        ckpt, "data.num=600", "discriminator.conditional=false", "discriminator.held_out=16",
        f"discriminator.fake={tmp_path / 'fake'}",
    )  # fmt: skip
    found = train_disc.run(recipe, tmp_path / "run", device=CPU)
    assert np.isfinite(found["heldout_bce"])
    assert 0 < ToyCodec.largest <= 16  # rows of a step or held out


def test_held_out_items_are_encoded_in_batches(tmp_path):
    from ddo_cli.generation import ENCODED_AT_ONCE, encoded

    model = registry.load_model(make_toy(tmp_path / "m.safetensors", std=0.5), CPU).model
    items = open_images(DATA, 300).items
    ToyCodec.largest = 0
    rows = np.arange(299, -1, -1)
    found = encoded(model, items, rows, "real", 0, device=CPU)
    assert ToyCodec.largest == ENCODED_AT_ONCE
    mean = model.codec.encode(torch.from_numpy(items[rows]))
    eps = (found - mean) / 0.5  # standard normal: 921,600 numbers, so 4 standard errors are 0.0042 and 0.0029
    assert abs(float(eps.mean())) < 0.0042
    assert abs(float(eps.std()) - 1) < 0.003
    assert torch.equal(found, encoded(model, items, rows, "real", 0, device=CPU))
    assert not torch.equal(found, encoded(model, items, rows, "fake", 0, device=CPU))


def test_a_classifier_of_latents(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors", std=0.25)
    source = encoded(ckpt, tmp_path / "set", num=96)
    results = []
    for name, options in (("images", [f"data.source={DATA}", "data.num=96"]), ("latents", [f"data.source={source}"])):
        settings = f"classifier={{options: {json.dumps(TINY_ENCODER)}, held_out: 16, images: 32, batch: 8}}"
        recipe = load("quickstart", [settings, *options], {"model.ckpt": ckpt})
        results.append(train_classifier.run(recipe, tmp_path / name, device=CPU))
    same(results[0]["final"], results[1]["final"])
    assert results[0]["heldout_accuracy"] == results[1]["heldout_accuracy"]


def test_edit_starts_from_the_mean_latent(tmp_path):
    """One step from a level of almost nothing returns the source: with a drawn latent it would be off by std."""
    ckpt = make_toy(tmp_path / "m.safetensors", std=0.5)
    sample.run(ckpt, range(4), tmp_path / "source", device=CPU)
    found = edit.run(
        str(tmp_path / "source"), tmp_path / "edit", [0.0021], ckpt=ckpt, num=4, label=0, ref=ref(tmp_path), device=CPU
    )
    assert found["levels"][0]["psnr"] > 45


def published_discriminator(folder, num_classes=10):
    """A tiny discriminator of DG's latent kind from files in its names, filled by the rule of `test_dit`."""
    layers = {"width": 64, "depth": 1, "channel_mult": [1]}
    with torch.device("meta"):
        trunk = AdmClassifier(in_channels=4, size=8, num_outputs=num_classes, **layers)
        head = AdmHead(in_channels=64, size=8, num_outputs=1, num_labels=1000, **layers)
    for name, network in (("trunk", trunk), ("head", head)):
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        torch.save(test_dit.official_tensors(shapes), folder / f"{name}.pt")
    found = dg_files.read(folder / "trunk.pt")
    header = {"kind": "classifier", "config": found.config, "process": discriminators.PROCESS}
    checkpoint.save(folder / "trunk.safetensors", found.tensors, header)
    found = dg_files.read(folder / "head.pt", trunk=str(folder / "trunk.safetensors"), num_classes=num_classes)
    network = discriminators.build("discriminator", found.config)
    network.load_state_dict(found.tensors)
    return network.eval().requires_grad_(False)


def test_dgs_sampler_of_dit_equals_the_official_one(tmp_path):
    """10 steps with both scales, the learned variance and the discriminator, which is told step / 999."""
    base = test_dit.loaded(test_dit.build(precond="ddpm", learned_variance=True))
    settings = GuidanceRecipe(dg_weight=100.0, time_min=0.1011)
    guide = guides.discriminator_guide(published_discriminator(tmp_path), settings, base)
    spec = SamplingRecipe(
        sampler="ddpm", steps=10, cfg_channels=3, cfg_scale=1.25, cfg_scale_low=3.0, cfg_sigma_low=0.726
    )
    golden = {  # of the official code, CPU, float32; latents reach 1000, as nothing clips them
        0.0: (64.0091019, 225.2626953, (-64.875885, -556.270386, -268.481476, 8.654218)),
        100.0: (58.5619164, 230.9344940, (-51.857101, -534.488647, -315.086945, -4.769123)),
    }
    for weight, (mean, std, first) in golden.items():
        with torch.no_grad():
            found = base.guided_by([guide._replace(weight=weight)]).sample(torch.tensor([1, 3]), GoldenNoise(), spec)
        assert found.disc_nfe == (9 if weight else 0)
        assert (found.x.mean().item(), found.x.std(unbiased=False).item()) == pytest.approx((mean, std), rel=2e-6)
        assert found.x[0, 0, 0, :4].tolist() == pytest.approx(first, abs=3e-3)
