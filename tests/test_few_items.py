"""Sets too small to train on or to measure are refused alike by a dry run and a run, before anything is written."""

import numpy as np
import pytest
from conftest import CPU, TINY_UNET, make_checkpoint, tiny_disc_recipe, tiny_recipe

from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.discriminator import classifier as train_classifier
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.errors import DataError, UsageError
from ddo_cli.recipe.load import load


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("few") / "m.safetensors")


def _pretrained(num: int, batch: int):
    def act(place, ckpt, **more):
        np.savez(place.parent / "few.npz", images=np.zeros((num, 3, 32, 32), np.uint8))
        keys = [f"data={{source: {place.parent / 'few.npz'}}}", f"model={{name: patch-unet, options: {TINY_UNET}}}"]
        recipe = load("quickstart", [*keys, "sampling={steps: 2, sampler: euler}", f"pretrain.batch={batch}"])
        return pretrain.run(recipe, place, device=CPU, **more)

    return act


def _finetuned(*keys: str):
    return lambda place, ckpt, **more: finetune.run(tiny_recipe(ckpt, "diffusion", *keys), place, device=CPU, **more)


def _disc_trained(*keys: str):
    return lambda place, ckpt, **more: train_disc.run(tiny_disc_recipe(ckpt, *keys), place, device=CPU, **more)


def _classifier_trained(place, ckpt, **more):
    keys = ["data={source: embedded:digits32, num: 40}", "classifier={images: 8, batch: 32, held_out: 16}"]
    return train_classifier.run(load("quickstart", keys, {"model.ckpt": ckpt}), place, device=CPU, **more)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (_pretrained(1, 4), r"few\.npz: 1 to train on is fewer than a batch \(pretrain\.batch = 4\)"),
        (_pretrained(2, 4), "2 to train on are fewer than a batch"),
        (_pretrained(1, 1), "holds one image; a distance needs at least two"),
        (_finetuned("data.num=1"), "no item of class"),
        (_finetuned("finetune.batch=128"), r"64 to train on are fewer than a batch \(finetune\.batch = 128\)"),
        (_finetuned("finetune.num_fake=3"), r"finetune\.num_fake\): 3 to train on"),
        (_finetuned("finetune.rounds=2", "finetune.from_round={2: {num_fake: 3}}"), r"num_fake\): 3 to train on"),
        (_disc_trained("discriminator.batch=56"), r"48 to train on are fewer than a batch \(discriminator\.batch = 56"),
        (_classifier_trained, r"24 to train on are fewer than a batch \(classifier\.batch = 32\)"),
    ],
)
def test_too_few_items(ckpt, tmp_path, act, words):
    for more in ({"dry_run": True}, {}):
        with pytest.raises(DataError, match=words):
            act(tmp_path / "run", ckpt, **more)
    assert not (tmp_path / "run").exists()


def test_a_network_beyond_memory(tmp_path):
    """To fill its weights would bring the machine to a standstill."""
    recipe = load("quickstart", ["model.options={patch: 4, widths: [400000], depths: [1], emb_width: 400000}"])
    with pytest.raises(UsageError, match=r"weights of this patch-unet take [\d,]{4,} GB, and this machine has \d"):
        pretrain.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
    recipe = load("quickstart", ["model.options.patch=1000000000"])
    with pytest.raises(UsageError, match=r"cannot be built .*overflowed.*; choose a smaller network"):
        pretrain.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
