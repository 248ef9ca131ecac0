"""Sets of latents and tokens as training data and as fake sets."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, tiny_recipe
from safetensors.torch import load_file, save_file
from toy_latent import OPTIONS, make_toy

from ddo_cli.data.images import open_images
from ddo_cli.data.items import check_fits, digest
from ddo_cli.data.latents import MANIFEST
from ddo_cli.data.pairs import Shuffled
from ddo_cli.data.readers import Lazy
from ddo_cli.data.samples import open_samples
from ddo_cli.engines import encode
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.edit import edit
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.engines.sampling import sample
from ddo_cli.errors import DataError, RecipeError, UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.load import load
from ddo_cli.training import state

DATA = "embedded:digits32"
SHORT = ("finetune.rounds=1", "finetune.eval_every=24", "metric.num_images=8", "metric.repeats=1")


def ref(path) -> str:
    """Few images to score against, below `path`."""
    file = path / "ref.npz"
    if not file.is_file():
        np.savez(file, arr_0=open_images(DATA, 16).items.transpose(0, 2, 3, 1))
    return str(file)


def encoded(ckpt, out, num=64, **options) -> str:
    encode.run(DATA, ckpt, out, num=num, **{"shard": 24, "device": CPU, **options})
    return str(out)


def weights(path):
    return load_file(path)


def same(first, second):
    found, expected = weights(first), weights(second)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_lazy_items_index_as_arrays_do(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors")
    opened = open_images(encoded(ckpt, tmp_path / "set"))
    whole = opened.items[:]
    assert isinstance(opened.items, Lazy)
    assert (len(opened.items), opened.items.ndim, opened.items.dtype) == (64, 4, np.float32)
    for index in (np.array([63, 0, 24, 23, 0]), slice(20, 30), np.array([], dtype=np.int64), 47):
        np.testing.assert_array_equal(opened.items[index], whole[index])
    with pytest.raises(IndexError):
        opened.items[np.array([64])]
    part = open_images(str(tmp_path / "set"), 10)
    images = open_images(DATA, 64)
    rows = np.arange(64)
    np.random.RandomState(0).shuffle(rows)
    np.testing.assert_array_equal(part.items[:], whole[np.sort(rows[:10])])
    np.testing.assert_array_equal(part.labels, images.labels[np.sort(rows[:10])])
    assert digest(part) != digest(opened)
    rows = Shuffled(opened.items, opened.labels, "x", 0).rows(3, 90)
    again = Shuffled(whole, opened.labels, "x", 0).rows(3, 90)
    assert torch.equal(rows.items, again.items)
    assert torch.equal(rows.label, again.label)


def test_damage_is_noticed(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors")
    path = Path(encoded(ckpt, tmp_path / "set"))
    before = digest(open_images(str(path)))
    assert before == digest(open_images(str(path)))
    (path / ".files.jsonl").unlink()  # as in a copy of the set without hidden files

    file = path / "latents-000000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of a number; the header still says what was written
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"latents-000000.*content has changed"):
        open_images(str(path))
    content[-1] ^= 1
    file.write_bytes(content[:-8])
    with pytest.raises(DataError, match=r"latents-000000.*damaged"):
        open_images(str(path))
    file.write_bytes((path / "latents-000001.safetensors").read_bytes())
    with pytest.raises(DataError, match="not the shard"):
        open_images(str(path))
    file.unlink()
    with pytest.raises(DataError, match="missing"):
        open_images(str(path))
    file.write_bytes(content)
    opened = open_images(str(path))
    assert digest(opened) == before
    file.write_bytes(content[:4000])
    with pytest.raises(DataError, match="has changed since"):
        opened.items[np.array([1])]
    whole = json.loads((path / MANIFEST).read_text())
    for changed in ({"format": "latents", "complete": True}, {**whole, "shards": []}, {**whole, "shards": [5]}):
        (path / MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            open_images(str(path))
    file.write_bytes(content)
    encoded(ckpt, path)  # continues: a manifest without its shards is not finished
    assert json.loads((path / MANIFEST).read_text())["shards"] == whole["shards"]


def test_a_set_of_another_encoder_is_refused(tmp_path):
    own = make_toy(tmp_path / "own.safetensors")
    source = open_images(encoded(own, tmp_path / "set"))
    check_fits(source, registry.load_model(own, CPU).model)
    other = registry.load_model(make_toy(tmp_path / "other.safetensors", name="other"), CPU).model
    with pytest.raises(DataError, match=r"encoded by toy 0.0, and the model's encoder is other 0.0"):
        check_fits(source, other)
    pixels = registry.load_model(make_checkpoint(tmp_path / "pixels.safetensors"), CPU).model
    with pytest.raises(DataError, match="latents of shape 24x16x16 where the model needs 32x32 RGB"):
        check_fits(source, pixels)
    with pytest.raises(DataError, match="mirrors images"):
        check_fits(source, registry.load_model(own, CPU).model, hflip=True)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    first = make_checkpoint(tmp_path / "a.safetensors", "var")
    second = make_checkpoint(tmp_path / "b.safetensors", "var", seed=1)
    source = open_images(encoded(first, tmp_path / "set"))
    check_fits(source, registry.load_model(first, CPU).model)
    with pytest.raises(DataError, match="for other images"):
        check_fits(source, registry.load_model(second, CPU).model)


def edm2_archive(path, arrays, labels, name="{:05d}/img-mean-std-{:08d}.npy"):
    """As EDM2's dataset tool writes it."""
    names = [name.format(i // 1000, i) for i in range(len(arrays))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for one, array in zip(names, arrays, strict=True):
            content = io.BytesIO()
            np.save(content, array, allow_pickle=True)
            archive.writestr(one, content.getvalue())
        entries = [[one, int(label)] for one, label in zip(names, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": entries}))
    return str(path)


@pytest.mark.parametrize("unpacked", [False, True])
def test_edm2_archives(tmp_path, unpacked):
    arrays = np.random.RandomState(0).randn(12, 8, 4, 4).astype(np.float32)
    labels = np.arange(12) % 5
    source = edm2_archive(tmp_path / "set.zip", arrays, labels)
    if unpacked:
        with zipfile.ZipFile(source) as archive:
            archive.extractall(tmp_path / "set")
        source = str(tmp_path / "set")
    opened = open_images(source)
    np.testing.assert_array_equal(opened.items[:], arrays)
    np.testing.assert_array_equal(opened.items[np.array([7, 2])], arrays[[7, 2]])
    np.testing.assert_array_equal(opened.labels, labels)
    assert (opened.num_classes, opened.shape) == (5, (3, 32, 32))
    assert len(open_images(source, 5).items) == 5
    assert digest(opened) == digest(open_images(source))


def test_edm2_archives_that_cannot_be_used(tmp_path):
    arrays = np.random.RandomState(0).randn(3, 8, 4, 4).astype(np.float32)
    first = digest(open_images(edm2_archive(tmp_path / "a.zip", arrays, [0, 1, 2])))
    assert digest(open_images(edm2_archive(tmp_path / "b.zip", arrays, [0, 1, 1]))) != first
    assert digest(open_images(edm2_archive(tmp_path / "c.zip", arrays + 1, [0, 1, 2]))) != first
    pickled = np.array([{"a": 1}], dtype=object)
    with pytest.raises(DataError, match="objects, which could run code"):
        open_images(edm2_archive(tmp_path / "d.zip", [pickled], [0]))
    with pytest.raises(DataError, match="float64"):
        open_images(edm2_archive(tmp_path / "e.zip", arrays.astype(np.float64), [0, 1, 2]))
    mixed = open_images(edm2_archive(tmp_path / "f.zip", [arrays[0], arrays[1, :4]], [0, 1]))
    with pytest.raises(DataError, match=r"00000001\.npy"):
        mixed.items[:]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def toy_recipe(ckpt, *overrides):
    return tiny_recipe(ckpt, "diffusion", *SHORT, *overrides)


def finetuned(tmp_path, name, ckpt, *overrides):
    finetune.run(toy_recipe(ckpt, f"metric.ref={ref(tmp_path)}", *overrides), tmp_path / name, device=CPU)
    return tmp_path / name


def test_finetuning_on_latents_equals_finetuning_on_their_images(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors")
    source = encoded(ckpt, tmp_path / "set")
    images = finetuned(tmp_path, "images", ckpt)
    latents = finetuned(tmp_path, "latents", ckpt, f"data.source={source}", "data.num=null")
    last = "round-01/checkpoints/step-000006.safetensors"
    same(images / last, latents / last)
    fake = open_samples(images / "round-01" / "samples")
    assert fake.items.dtype == np.float32
    assert fake.items.shape == (16, 12, 16, 16)
    assert fake.manifest["latents"] is True
    other = finetuned(tmp_path, "decoded", ckpt, "finetune.fake_as=images")
    again = open_samples(other / "round-01" / "samples")  # decoded, and encoded as `ddo encode` does
    assert again.manifest["encoded"] is True
    model = registry.load_model(ckpt, CPU).model
    expected = model.codec.latents(model.codec.decode(torch.from_numpy(fake.items)))
    np.testing.assert_array_equal(again.items, expected.numpy())
    found, expected = weights(other / last), weights(images / last)
    assert any(not torch.equal(found[name], expected[name]) for name in found)  # images were rounded to 8 bits


@pytest.mark.slow
def test_an_encoder_that_draws_gives_the_same_from_images_and_latents(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors", std=0.5)
    source = encoded(ckpt, tmp_path / "set")
    images = finetuned(tmp_path, "images", ckpt)
    latents = finetuned(tmp_path, "latents", ckpt, f"data.source={source}", "data.num=null")
    mean = finetuned(tmp_path, "mean", make_toy(tmp_path / "n.safetensors"))
    last = "round-01/checkpoints/step-000006.safetensors"
    same(images / last, latents / last)
    found, expected = weights(mean / last), weights(images / last)
    assert any(not torch.equal(found[name], expected[name]) for name in found)


def test_resume_on_latents(tmp_path, monkeypatch):
    ckpt = make_toy(tmp_path / "m.safetensors", std=0.5)
    source = encoded(ckpt, tmp_path / "set")
    options = [f"data.source={source}", "data.num=null"]
    whole = finetuned(tmp_path, "whole", ckpt, *options)
    save, count = state.checkpoint.save, 0

    def killed(*arguments, **keywords):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        save(*arguments, **keywords)

    monkeypatch.setattr(state.checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        finetuned(tmp_path, "killed", ckpt, *options)
    count = 100
    finetuned(tmp_path, "killed", ckpt, *options)
    same(whole / "final.safetensors", tmp_path / "killed" / "final.safetensors")


@pytest.mark.parametrize("fake_as", ["images", pytest.param("latents", marks=pytest.mark.slow)])
def test_var_on_tokens(tmp_path, fake_as):
    ckpt = make_checkpoint(tmp_path / "m.safetensors", "var")
    source = encoded(ckpt, tmp_path / "set")
    last = "round-01/checkpoints/step-000006.safetensors"
    runs = []
    for name, options in (("images", []), ("tokens", [f"data.source={source}", "data.num=null"])):
        recipe = tiny_recipe(
            ckpt, "var", *SHORT, f"metric.ref={ref(tmp_path)}", f"finetune.fake_as={fake_as}", *options
        )
        finetune.run(recipe, tmp_path / name, device=CPU)
        runs.append(tmp_path / name / last)
    same(*runs)
    fake = open_samples(tmp_path / "tokens" / "round-01" / "samples").items
    assert (fake.dtype, fake.shape[1:]) == (np.int16 if fake_as == "images" else np.int32, (85,))
    sample.run(
        ckpt,
        range(1_000_000, 1_000_016),
        tmp_path / "x",
        form="shards",
        sampling={"batch": 8},
        keep="latents",
        device=CPU,
    )
    x, model = torch.from_numpy(open_samples(tmp_path / "x").items), registry.load_model(ckpt, CPU).model
    again = model.codec.latents(model.codec.decode(x.to(torch.int64)))
    assert not torch.equal(again.to(torch.int32), x)
    np.testing.assert_array_equal(fake, (again if fake_as == "images" else x).numpy())


def test_pretraining_on_latents_equals_pretraining_on_their_images(tmp_path):
    source = encoded(make_toy(tmp_path / "m.safetensors"), tmp_path / "set")

    def run(name, *overrides):
        settings = [
            f"model={{name: toy-latent, options: {json.dumps(OPTIONS)}}}",
            "sampling={steps: 2, batch: 8}",
            f"metric={{name: fd_embedded, num_images: 16, repeats: 1, ref: '{ref(tmp_path)}'}}",
            "pretrain={images: 24, batch: 8}",
        ]
        recipe = load("quickstart", [*settings, *overrides], {})
        return pretrain.run(recipe, tmp_path / name, device=CPU)

    run("images", f"data.source={DATA}", "data.num=64")
    run("latents", f"data.source={source}")
    same(tmp_path / "images" / "final.safetensors", tmp_path / "latents" / "final.safetensors")


def test_scores_need_images(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors")
    source = encoded(ckpt, tmp_path / "set")
    recipe = toy_recipe(ckpt, f"data.source={source}", "data.num=null")
    with pytest.raises(DataError, match=r"latents of shape 24x16x16, not images; set metric\.ref"):
        finetune.run(recipe, tmp_path / "run", device=CPU)
    with pytest.raises(DataError, match="not images"):
        finetune.run(toy_recipe(ckpt, f"metric.ref={source}"), tmp_path / "run", device=CPU)
    with pytest.raises(DataError, match="not images; give the images that are to be edited"):
        edit.run(source, tmp_path / "edit", [1.0], ckpt=ckpt, device=CPU)
    assert not (tmp_path / "run").exists()


def test_fake_as_latents_needs_a_model_of_latents(tmp_path):
    ckpt = make_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="fake_as = latents"):
        finetune.run(toy_recipe(ckpt, "finetune.fake_as=latents"), tmp_path / "run", device=CPU)
    with pytest.raises(RecipeError, match="fake_as"):
        toy_recipe(ckpt, "finetune.fake_as=tokens")
    assert not (tmp_path / "run").exists()


def test_a_set_of_samples_is_of_images_unless_asked(tmp_path):
    ckpt = make_toy(tmp_path / "m.safetensors")
    sample.run(ckpt, range(4), tmp_path / "images", form="shards", device=CPU)
    sample.run(ckpt, range(4), tmp_path / "latents", form="shards", keep="latents", device=CPU)
    images, latents = (open_samples(tmp_path / name) for name in ("images", "latents"))
    assert images.items.dtype == np.uint8
    assert "latents" not in images.manifest
    model = registry.load_model(ckpt, CPU).model
    np.testing.assert_array_equal(model.codec.decode(torch.from_numpy(latents.items)).numpy(), images.items)
    assert (tmp_path / "images-grid.png").read_bytes() == (tmp_path / "latents-grid.png").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Files of another program


def test_a_folder_of_other_safetensors_is_no_set(tmp_path):
    save_file({"latents": torch.zeros(3)}, tmp_path / "latents-000000.safetensors")
    with pytest.raises(DataError, match="holds no images"):
        open_images(str(tmp_path))
