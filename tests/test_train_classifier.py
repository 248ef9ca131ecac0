"""The noisy-image classifier: it learns, resumes, and refuses data without labels."""

import numpy as np
import pytest
from conftest import CPU, make_checkpoint, tiny_disc_recipe

from ddo_cli import checkpoint
from ddo_cli.engines.discriminator import classifier as train_classifier
from ddo_cli.errors import DataError, RecipeError
from ddo_cli.models.discriminators import registry as discriminators

SETTINGS = (
    "classifier={options: {widths: [32, 64], depths: [1, 1]}, held_out: 64, images: 19200, batch: 64, lr: 1.0e-3, "
    "ema_half_life: 0.0, warmup: 0, lr_schedule: constant}",
    "data={source: embedded:digits32, num: 4096}",
)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "m.safetensors")


@pytest.mark.slow
def test_it_learns(ckpt, tmp_path):
    found = train_classifier.run(tiny_disc_recipe(ckpt, *SETTINGS), tmp_path / "run", device=CPU)
    accuracies = [level["accuracy"] for level in found["levels"]]
    assert accuracies[0] > 0.3  # one in ten is chance
    assert accuracies[-1] < accuracies[0]  # noise hides the digit


def test_a_finished_run_says_so(ckpt, tmp_path, capsys):
    recipe = tiny_disc_recipe(ckpt, *SETTINGS, "classifier.images=320")
    found = train_classifier.run(recipe, tmp_path / "run", device=CPU)
    (tmp_path / "run" / "train-state.safetensors").write_bytes(b"of a process killed right before it removed this")
    assert train_classifier.run(recipe, tmp_path / "run", device=CPU) == found
    assert "nothing to do" in capsys.readouterr().err
    loaded = discriminators.load("classifier", found["final"], CPU)
    assert loaded.checkpoint.header["config"]["num_classes"] == 10
    assert not (tmp_path / "run" / "train-state.safetensors").exists()


def test_a_killed_run_ends_with_the_same_bytes(ckpt, tmp_path, monkeypatch):
    settings = (*SETTINGS, "classifier.images=320", "classifier.save_every=2")
    recipe = tiny_disc_recipe(ckpt, *settings)
    train_classifier.run(recipe, tmp_path / "whole", device=CPU)
    save, count = checkpoint.save, 0

    def dying(*arguments):
        nonlocal count
        count += 1
        save(*arguments)
        if count == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            train_classifier.run(recipe, tmp_path / "cut", device=CPU)
    train_classifier.run(recipe, tmp_path / "cut", device=CPU)
    whole, cut = ((tmp_path / name / "final.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_data_that_cannot_be_classified(ckpt, tmp_path):
    images = np.zeros((200, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_0=images)
    unlabelled = tiny_disc_recipe(ckpt, *SETTINGS, f"data={{source: {tmp_path / 'plain.npz'}, num: null}}")
    with pytest.raises(DataError, match="without label"):
        train_classifier.run(unlabelled, tmp_path / "run", device=CPU)
    few = tiny_disc_recipe(ckpt, *SETTINGS, "data.num=100")
    with pytest.raises(DataError, match=r"lower classifier\.held_out to at most 50"):
        train_classifier.run(few, tmp_path / "run", device=CPU)
    wrong = tiny_disc_recipe(ckpt, *SETTINGS, "classifier.name=adm")
    with pytest.raises(RecipeError, match=r"classifier\.name = 'adm' is not known"):
        train_classifier.run(wrong, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()
