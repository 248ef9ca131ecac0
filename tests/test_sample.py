"""A sample set: each image a function of its seed; order, interruption and process count change nothing."""

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, TINY_UNET, kinds, make_checkpoint, torchrun
from PIL import Image

from ddo_cli import checkpoint, files
from ddo_cli.data.samples import Writer, open_samples, parse_seeds, spell_seeds
from ddo_cli.engines.sampling import sample
from ddo_cli.errors import DataError, RunError, UsageError
from ddo_cli.generation import Batch, generate, labels_of
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe


@pytest.fixture(scope="module", params=kinds("diffusion", "var"))
def ckpt(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "m.safetensors", request.param)


def content(path):
    """Bytes of every visible file."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")}


def test_any_order_of_seeds_gives_the_same_files(ckpt, tmp_path):
    seeds = list(range(20))
    sample.run(ckpt, seeds, tmp_path / "a", device=CPU)
    sample.run(ckpt, list(np.random.default_rng(0).permutation(seeds)), tmp_path / "b", device=CPU)
    assert len(content(tmp_path / "a")) == 21  # images and manifest
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.fixture(scope="module")
def whole_of(ckpt, tmp_path_factory):
    """The directory of an uninterrupted set of a form."""

    @functools.cache
    def whole(form):
        path = tmp_path_factory.mktemp("whole") / form
        sample.run(ckpt, range(20), path, form=form, device=CPU)
        return path

    return whole


@pytest.mark.parametrize("form", ["png", "npz", "shards"])
@pytest.mark.parametrize("number", [1, 2, 5, 11])
def test_an_interrupted_set_continues(whole_of, ckpt, tmp_path, monkeypatch, form, number):
    seeds = range(20)
    count, rename = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        try:
            sample.run(ckpt, seeds, tmp_path / "cut", form=form, device=CPU)
        except KeyboardInterrupt:
            assert number <= 25
    sample.run(ckpt, seeds, tmp_path / "cut", form=form, device=CPU)
    whole, cut = content(whole_of(form)), content(tmp_path / "cut")
    if form == "npz":  # a zip records the time of day
        ours, theirs = (np.load(path / "samples.npz") for path in (tmp_path / "cut", whole_of(form)))
        assert all(np.array_equal(ours[key], theirs[key]) for key in ("arr_0", "labels", "seeds"))
        whole.pop("samples.npz")
        cut.pop("samples.npz")
    assert whole == cut


def test_another_batch_size_changes_rounding_only(ckpt):
    model, file = registry.load_model(ckpt, CPU)
    seeds = range(32)
    sets = {}
    for batch in (1, 7, 32):
        made = list(generate(model, seeds, SamplingRecipe(**{**file.header["sampling"], "batch": batch}), batch=batch))
        sets[batch] = torch.cat([b.items for b in made])
        assert torch.equal(torch.cat([b.label for b in made]), labels_of(seeds, 10))
    for batch in (1, 7):
        apart = (sets[batch].int() - sets[32].int()).abs()
        assert (apart > 0).float().mean() < 1e-4
        # A different token is 16 grey levels away, a pixel one.
        assert apart.max() <= (1 if len(model.codec.shape) and model.codec.shape[0] == 3 else 255)


def test_place_in_the_batch_does_not_matter(ckpt):
    model, _ = registry.load_model(ckpt, CPU)
    spec = SamplingRecipe(batch=8)
    left = next(iter(generate(model, range(8), spec, batch=8))).items
    right = next(iter(generate(model, range(3, 11), spec, batch=8))).items
    assert torch.equal(left[3:], right[:5])


def test_two_processes_write_the_same_set(ckpt, tmp_path):
    sample.run(ckpt, range(20), tmp_path / "one", device=CPU)
    options = ["--ckpt", ckpt, "--num-images", "20", "--out", str(tmp_path / "two"), "--device", "cpu", "--json"]
    done = torchrun("-m", "ddo_cli", "sample", *options)
    assert json.loads(done.stdout)["num_images"] == 20
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_report_of_a_set(ckpt, tmp_path):
    found = sample.run(ckpt, range(4, 12), tmp_path / "set", form="npz", device=CPU)
    assert found["num_images"] == 8
    assert found["seeds"] == "4-11"
    assert found["nfe"] in (2, 4, 5, 64)  # two steps of euler, three of heun; one pass a scale or a pixel
    stored = np.load(tmp_path / "set" / "samples.npz")
    assert stored["arr_0"].dtype == np.uint8
    assert stored["labels"].tolist() == [4, 5, 6, 7, 8, 9, 0, 1]  # balanced, and a function of the seed
    assert sample.run(ckpt, range(4, 12), tmp_path / "set", form="npz", device=CPU)["nfe"] == found["nfe"]


def test_shards_read_back(ckpt, tmp_path):
    sample.run(ckpt, range(20), tmp_path / "set", form="shards", device=CPU)
    found = open_samples(tmp_path / "set")
    assert found.seeds.tolist() == list(range(20))
    (tmp_path / "set" / "shard-000001.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"shard-000001\.safetensors is damaged \(7 bytes in place of"):
        open_samples(tmp_path / "set")
    (tmp_path / "set" / ".files.jsonl").unlink()
    with pytest.raises(DataError, match="damaged shard"):
        open_samples(tmp_path / "set")


def test_classes(ckpt, tmp_path):
    sample.run(ckpt, range(6), tmp_path / "set", classes=[3, 5], device=CPU)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["labels"] == [3, 5, 3, 5, 3, 5]
    with pytest.raises(UsageError, match="--classes 10 is out of range; this model has classes 0 to 9"):
        sample.run(ckpt, range(6), tmp_path / "other", classes=[3, 10], device=CPU)


def test_a_directory_with_another_set_is_refused(ckpt, tmp_path):
    sample.run(ckpt, range(6), tmp_path / "set", device=CPU)
    with pytest.raises(RunError, match="seeds: 0-5 -> 0-6"):
        sample.run(ckpt, range(7), tmp_path / "set", device=CPU)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("important")
    with pytest.raises(RunError, match="not empty"):
        sample.run(ckpt, range(7), tmp_path / "full", device=CPU)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "important"


def test_settings_without_effect_are_refused(tmp_path):
    diffusion = make_checkpoint(tmp_path / "d.safetensors", "diffusion")
    transformer = make_checkpoint(tmp_path / "t.safetensors", "autoregressive")
    with pytest.raises(UsageError, match=r"sampling\.top_k = 5 has no effect"):
        sample.run(diffusion, range(2), tmp_path / "x", sampling={"top_k": 5}, device=CPU)
    with pytest.raises(UsageError, match=r"sampling\.steps = 5 has no effect"):
        sample.run(transformer, range(2), tmp_path / "x", sampling={"steps": 5}, device=CPU)
    with pytest.raises(UsageError, match="s_churn"):
        sample.run(diffusion, range(2), tmp_path / "x", sampling={"sampler": "dpmpp-2m", "s_churn": 4.0}, device=CPU)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp-2m"])
def test_every_sampler_draws_from_a_checkpoint(tmp_path, sampler):
    ckpt = make_checkpoint(tmp_path / "d.safetensors")
    found = sample.run(ckpt, range(2), tmp_path / sampler, sampling={"sampler": sampler, "steps": 4}, device=CPU)
    assert found["nfe"] == {"euler": 4, "heun": 7, "dpmpp-2m": 4}[sampler]
    assert Image.open(tmp_path / sampler / "000001.png").size == (32, 32)


def test_guidance_counts_both_passes(tmp_path):
    ckpt = make_checkpoint(tmp_path / "d.safetensors")
    settings = {"cfg_scale": 2.0, "sampler": "euler", "steps": 3}
    assert sample.run(ckpt, range(2), tmp_path / "x", sampling=settings, device=CPU)["nfe"] == 6


def test_seed_lists():
    assert parse_seeds("0-3,7") == [0, 1, 2, 3, 7]
    assert spell_seeds([0, 1, 2, 3, 7]) == "0-3,7"
    for bad in ("", "a", "3-1", "1,1", "1-2-3"):
        with pytest.raises(ValueError, match=r".*"):
            parse_seeds(bad)


@pytest.mark.parametrize("form", ["png", "npz", "shards"])
def test_a_lost_file_of_a_finished_set_is_drawn_again(tmp_path, form):
    ckpt = make_checkpoint(tmp_path / "d.safetensors")
    sample.run(ckpt, range(10), tmp_path / "set", form=form, device=CPU)
    lost = {"png": "000003.png", "npz": "samples.npz", "shards": "shard-000000.safetensors"}[form]
    before = content(tmp_path / "set")
    (tmp_path / "set" / lost).unlink()
    sample.run(ckpt, range(10), tmp_path / "set", form=form, device=CPU)
    after = content(tmp_path / "set")
    assert after.keys() == before.keys()
    assert form == "npz" or after == before


def test_the_grid_is_that_of_the_set(tmp_path):
    ckpt = make_checkpoint(tmp_path / "d.safetensors")
    one = sample.run(ckpt, range(4), tmp_path / "set", device=CPU)["grid"]
    before = Path(one).read_bytes()
    shutil.rmtree(tmp_path / "set")
    sample.run(ckpt, range(50, 54), tmp_path / "set", device=CPU)
    assert Path(one).read_bytes() != before


def test_a_damaged_part_is_named_and_then_drawn_again(tmp_path):
    ckpt = make_checkpoint(tmp_path / "d.safetensors")
    sample.run(ckpt, range(10), tmp_path / "set", device=CPU)
    (tmp_path / "set" / "manifest.json").unlink()
    (tmp_path / "set" / ".part-shard-000000.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="run the same command again"):
        sample.run(ckpt, range(10), tmp_path / "set", device=CPU)
    sample.run(ckpt, range(10), tmp_path / "set", device=CPU)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["complete"]
    assert len(manifest["labels"]) == 10


def test_guidance_of_a_model_that_never_dropped_labels_warns(tmp_path, capsys):
    ckpt = make_checkpoint(tmp_path / "d.safetensors")
    sample.run(ckpt, range(2), tmp_path / "x", sampling={"cfg_scale": 2.0}, device=CPU)
    assert "never trained" in capsys.readouterr().err


def test_a_batch_counts_as_stored_once_all_its_images_are(tmp_path, monkeypatch):
    """They are written by threads; one fails here."""
    writer = Writer(tmp_path / "set", "png", range(5), 5, {})
    items = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    batch = Batch(0, items, torch.zeros(5, dtype=torch.int64), torch.arange(5), 1)
    save = Image.Image.save

    def full(image, path, **options):
        save(image, path, **options)
        if "000003" in str(path):
            raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match=r"000003\.png'$"):
            writer.write(batch)
    assert writer.missing() == [0]
    assert not (tmp_path / "set" / "000003.png").exists()
    writer.write(batch)
    assert writer.missing() == []
    for seed, item in enumerate(items):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / f"{seed:06d}.png")), item.permute(1, 2, 0))


@pytest.mark.parametrize("channels", [2, 4])
def test_items_that_are_no_images_are_not_drawn_as_such(channels, tmp_path, ddo):
    """Stored as uint8, latents would be clipped, and no other command would read the set."""
    config = registry.config_of("patch-unet", (channels, 32, 32), 0, TINY_UNET, {})
    header = {"kind": "model", "config": config, "sampling": {"steps": 2}, "provenance": []}
    checkpoint.save(tmp_path / "model.safetensors", registry.build(config).state_dict(), header)
    for words in (["sample", "--ckpt", "model.safetensors", "--format", "npz"], ["fid", "model.safetensors"]):
        message = " ".join(ddo(*words, "--num-images", 4, code=2).stderr.split())
        assert f"this model draws items of {channels} channels, neither grey nor RGB" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
