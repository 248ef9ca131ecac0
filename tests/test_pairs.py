"""Mirrored training rows. The order of rows is tested in test_training."""

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, tiny_disc_recipe, tiny_recipe

from ddo_cli.data.pairs import Pairs, Shuffled
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.discriminator import classifier as train_classifier
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.errors import DataError
from ddo_cli.training import loop

NUM = 40
# Image n holds 6n, 6n + 1, ... so that no image is another's mirror image, nor its own.
IMAGES = np.arange(NUM * 6, dtype=np.uint8).reshape(NUM, 1, 2, 3)
LABELS = np.arange(NUM)


def stream(*key, hflip=True, only=None) -> Shuffled:
    return Shuffled(IMAGES, LABELS, *(key or ("real", 0)), only=only, hflip=hflip)


def mirrored(found) -> np.ndarray:
    """Which rows are mirrored; every row must be one of the set's images, or its mirror image."""
    own = IMAGES[found.label.numpy()]
    flags = (found.items.numpy() != own).any((1, 2, 3))
    np.testing.assert_array_equal(found.items.numpy()[flags], own[flags][..., ::-1])
    return flags


def test_half_of_the_rows_are_mirrored_left_to_right():
    epochs = 50
    before = IMAGES.copy()
    flags = mirrored(stream().rows(0, epochs * NUM)).reshape(epochs, NUM)
    # 2000 fair tosses: 5 standard deviations are 112; a fair coin leaves them once in a million times.
    assert abs(flags.sum() - epochs * NUM / 2) < 112
    assert len({tuple(row) for row in flags}) == epochs  # each epoch tosses anew
    np.testing.assert_array_equal(IMAGES, before)  # the set itself stays


def test_an_image_is_mirrored_in_some_epochs_only():
    found = stream().rows(0, 30 * NUM)
    flags = mirrored(found)
    counts = np.bincount(found.label.numpy()[flags], minlength=NUM)
    assert counts.min() > 0  # 30 tosses of 40 coins: never all alike but once in 10^7
    assert counts.max() < 30


@pytest.mark.parametrize("only", [None, np.array([7, 3, 21, 30, 11])])
def test_rows_are_the_same_however_they_are_cut(only):
    whole = stream(only=only).rows(0, 100)
    for size in (1, 3, 7, 50):
        cut = stream(only=only)
        parts = [cut.rows(start, min(start + size, 100)) for start in range(0, 100, size)]
        assert torch.equal(torch.cat([part.items for part in parts]), whole.items)
    backwards = stream(only=only)
    for start in reversed(range(0, 100, 5)):  # as another process would come to them
        assert torch.equal(backwards.rows(start, start + 5).items, whole.items[start : start + 5])


def test_another_key_mirrors_others():
    flags = mirrored(stream("real", 0).rows(0, NUM))
    assert (mirrored(stream("real", 1).rows(0, NUM)) != flags).any()
    assert (mirrored(stream("disc", 0).rows(0, NUM)) != flags).any()


def test_without_hflip_nothing_changes():
    plain, flipped = stream(hflip=False).rows(3, 90), stream().rows(3, 90)
    assert torch.equal(plain.label, flipped.label)  # the same order of the same rows
    assert not mirrored(plain).any()
    assert Shuffled(IMAGES, LABELS, "real", 0).hflip is False


def test_only_the_real_side_of_pairs():
    pairs = Pairs(stream(), stream("fake", 0, hflip=False))
    real, fake = pairs.rows(0, 80)
    assert mirrored(real).any()
    assert not mirrored(fake).any()


# ---------------------------------------------------------------------------------------------------------------------
# The engines


class Stop(Exception):
    """Ends a run where training would begin."""


@pytest.fixture
def streams(monkeypatch):
    """Streams that an engine makes: name of each one's key -> whether it is mirrored."""
    made: dict[str, bool] = {}
    init = Shuffled.__init__

    def recorded(self, items, labels, *key, **options):
        init(self, items, labels, *key, **options)
        made[str(key[0])] = self.hflip

    def stop(*args, **kwargs):
        raise Stop

    monkeypatch.setattr(Shuffled, "__init__", recorded)
    monkeypatch.setattr(loop, "fit", stop)
    return made


@pytest.mark.parametrize("hflip", [False, True])
def test_training_rows_of_every_engine(tmp_path, streams, hflip):
    ckpt = make_checkpoint(tmp_path / "model.safetensors")
    key = f"data.hflip={str(hflip).lower()}"
    small = "classifier={options: {widths: [8], depths: [1], emb_width: 16}, held_out: 16, images: 96, batch: 8}"
    unet = "model={name: patch-unet, options: {patch: 4, widths: [16], depths: [1], emb_width: 16}}"
    runs = {
        "real": lambda out: finetune.run(tiny_recipe(ckpt, "diffusion", key), out, device=CPU),
        "disc": lambda out: train_disc.run(tiny_disc_recipe(ckpt, key), out, device=CPU),
        "pretrain": lambda out: pretrain.run(tiny_recipe(ckpt, "diffusion", unet, key), out, device=CPU),
        "classifier": lambda out: train_classifier.run(tiny_disc_recipe(ckpt, small, key), out, device=CPU),
    }
    for name, run in runs.items():
        streams.clear()
        with pytest.raises(Stop):
            run(tmp_path / name)
        expected = {"real": hflip, "fake": False} if name in ("real", "disc") else {name: hflip}
        assert streams == expected, name


def test_points_cannot_be_mirrored(tmp_path):
    point_model = "model={name: mlp}"
    recipe = tiny_recipe("unused", "diffusion", "data={source: embedded:toy2d, num: 64, hflip: true}", point_model)
    with pytest.raises(DataError, match=r"data\.hflip = true mirrors images, and embedded:toy2d holds points"):
        pretrain.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
