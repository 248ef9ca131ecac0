"""The Python interface: its examples, and that it does what the commands do."""

import copy
import doctest
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, make_discriminator, tiny_recipe
from PIL import Image

import ddo_cli as ddo
from ddo_cli import api
from ddo_cli.engines.sampling import guide_sample, sample
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_batch, ddo_step
from ddo_cli.rng import StepRng


class Net(torch.nn.Module):
    """A network of one's own: net(x, c_noise, label)."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, c_noise, label):
        return self.dropout(self.conv(x)) * c_noise[:, None, None, None]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("api") / "model.safetensors")


@pytest.fixture
def model(ckpt):
    return ddo.load(ckpt, device="cpu")


def images(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_examples(tmp_path, monkeypatch):
    make_discriminator(tmp_path / "disc.safetensors", "embedded:digits16")
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(api)
    assert found.failed == 0
    assert found.attempted > 15


def test_names_come_on_demand():
    """The command line must not load torch for its help; `import ddo_cli` is a part of that."""
    code = (
        "import sys, ddo_cli; assert 'torch' not in sys.modules; "
        "assert set(ddo_cli.__all__) <= set(dir(ddo_cli)); from ddo_cli import console, ddo_loss; "
        "assert 'torch' in sys.modules; from ddo_cli import *; load, log_ratio, DdoError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ddo.__all__ == api.__all__ == sorted(ddo.__all__, key=lambda name: (not name[0].isupper(), name))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        ddo.lod  # noqa: B018


def test_images_are_those_of_the_command(model, ckpt, tmp_path):
    seeds = [9, 2, 5, 11, 3]
    drawn = model.sample(seeds, steps=2)
    sample.run(ckpt, seeds, tmp_path / "set", sampling={"steps": 2}, device=CPU)
    for image, label, seed in zip(drawn.images, drawn.labels, drawn.seeds, strict=True):
        file = next((tmp_path / "set").rglob(f"*{seed:06d}.png"))
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image.permute(1, 2, 0).numpy())
        assert label == seed % 10
    assert drawn.seeds.tolist() == seeds
    assert drawn.nfe == 3


def test_guided_images_are_those_of_the_command(model, ckpt, tmp_path):
    disc = make_discriminator(tmp_path / "disc.safetensors", ckpt, scale=1.0)
    drawn = ddo.guide(model, disc, dg_weight=3.0).sample(range(2))
    guide_sample.run(disc, ckpt, range(2), tmp_path / "set", form="npz", guidance={"dg_weight": 3.0}, device=CPU)
    with np.load(tmp_path / "set" / "samples.npz") as written:
        np.testing.assert_array_equal(written["arr_0"].transpose(0, 3, 1, 2), drawn.images.numpy())
    assert not torch.equal(drawn.images, model.sample(range(2)).images)  # which it leaves as it is


def test_the_log_ratio_is_that_of_a_training_step(ckpt, tmp_path):
    both = ddo.load(ckpt, device="cpu"), ddo.load(make_checkpoint(tmp_path / "ref.safetensors", seed=1), device="cpu")
    real, fake, labels = images(4), images(4, seed=1), torch.arange(4)
    r_real, r_fake = (ddo.log_ratio(*both, rows, labels, seed=7) for rows in (real, fake))
    loss = ddo.ddo_loss(r_real, r_fake, alpha=2.0, beta=0.05)
    loss.loss.backward()
    model, ref = (each.network for each in both)
    gradient = next(model.parameters()).grad.clone()
    model.zero_grad()
    batch = ddo_batch(model, (real, labels), (fake, labels), StepRng((7,), 0, range(4)))
    step = ddo_step(model, model, batch, ref=ref, settings=DdoSettings(2.0, 0.05))
    step.loss.backward()
    # One pass of 8 rows against two of 4: the order of sums differs.
    torch.testing.assert_close(loss.loss, step.loss)
    torch.testing.assert_close(gradient, next(model.parameters()).grad, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in ref.parameters())


def test_a_network_of_ones_own_is_trained():
    """With dropout, which is off: model and reference share all randomness."""
    torch.manual_seed(0)
    model = ddo.diffusion_model(Net(), (3, 32, 32), 10, draw={"p_mean": -1.2})
    ref = copy.deepcopy(model)
    real, fake, labels = images(8) // 2, images(8, seed=1), torch.arange(8)
    assert ddo.log_ratio(model, ref, real, labels, seed=3).abs().max() == 0
    optimizer, losses = torch.optim.Adam(model.network.parameters(), 1e-3), []
    for step in range(6):
        r_real = ddo.log_ratio(model, ref, real, labels, seed=step)
        r_fake = ddo.log_ratio(model, ref, fake, labels, seed=step)
        loss = ddo.ddo_loss(r_real, r_fake, alpha=1.0, beta=0.1).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2 * np.log(2))
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(ddo.DdoError, match="cannot rebuild this network"):
        model.save("x.safetensors")


def test_a_trained_model_is_saved_for_the_commands(model, tmp_path):
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    model.save(tmp_path / "mine.safetensors")
    again, file = registry.load_model(tmp_path / "mine.safetensors", CPU)
    assert torch.equal(next(again.parameters()), next(model.network.parameters()))
    assert file.header["provenance"][-1]["reference_sha256"] == model.file.sha256
    assert file.header["sampling"] == model.file.header["sampling"]


def test_finetuning_by_a_recipe(ckpt, tmp_path):
    recipe = tiny_recipe(ckpt).model_dump(mode="json", exclude_unset=True)
    settings = {f"{section}.{key}": value for section in ("data", "metric", "finetune", "sampling", "model")
                for key, value in recipe[section].items()}  # fmt: skip
    settings |= {"finetune.rounds": 1}
    found = ddo.finetune(out=tmp_path / "run", settings=settings, device="cpu")
    assert ddo.load(found["final"], device="cpu").file.header["provenance"][-1]["round"] == 1
    assert ddo.finetune(out=tmp_path / "run", settings=settings, device="cpu") == found


def test_scores_of_images_in_memory(model, tmp_path):
    drawn = model.sample(range(20), steps=2)
    np.savez(tmp_path / "x.npz", images=drawn.images.numpy(), labels=drawn.labels.numpy())
    asked = {"ref": "embedded:digits32", "extractor": "embedded:extractor-digits32", "device": "cpu"}
    asked["ref"] = images(30)
    figures = ddo.fid(drawn, **asked)
    assert figures["fd_embedded"] == ddo.fid(tmp_path / "x.npz", **asked)["fd_embedded"]
    assert figures["source"] == "images"
    assert figures["reference"] == "reference"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ddo.load("nowhere.safetensors"), "nowhere.safetensors does not exist"),
        (lambda m: ddo.load("embedded:digits16", device="tpu"), "tpu is not known"),
        (lambda m: m.sample([1, 1]), "give each image a seed of its own"),
        (lambda m: m.sample([]), "give each image a seed of its own"),
        (lambda m: m.sample(range(2), setps=3), r"no key of sampling \(did you mean 'steps'"),
        (lambda m: m.sample(range(2), classes=[10]), "classes 0 to 9"),
        (lambda m: ddo.log_ratio(m, m, images(2).float()), "images are torch.float32; give them as uint8"),
        (lambda m: ddo.log_ratio(m, m, images(2)[:, :, :8]), "32x8 RGB where the model needs 32x32 RGB"),
        (lambda m: ddo.log_ratio(m, m, images(2), torch.tensor([0, 10])), "from 0 to 9"),
        (lambda m: ddo.log_ratio(m, m, images(2), torch.tensor([0])), "for 2 images"),
        (lambda m: ddo.log_ratio(m, ddo.load("embedded:digits16"), images(2)), "two models of the same kind"),
        (lambda m: ddo.diffusion_model(Net(), (3, 8, 8), preconds="edm"), "did you mean 'precond'"),
        (lambda m: ddo.diffusion_model(Net(), (3, 8, 8), draw={"p_men": 1}), "did you mean 'p_mean'"),
        (lambda m: ddo.diffusion_model(Net(), (8, 8)), r"give \(C, H, W\)"),
        (lambda m: ddo.guide(m, dg_wieght=1), r"no key of guidance \(did you mean 'dg_weight'"),
        (lambda m: ddo.guide(m, "nowhere.safetensors"), "does not exist"),
        (lambda m: ddo.finetune(settings={"finetune.alhpa": 1}), "did you mean 'finetune.alpha'"),
        (lambda m: ddo.fid(images(2), num_images=1), "cut the tensor instead"),
        (lambda m: ddo.fid(images(2).float()), "not images"),
        (lambda m: ddo.fid(images(1)), "needs at least two"),
    ],
)  # fmt: skip
def test_mistakes(model, call, message):
    with pytest.raises(ddo.DdoError, match=message):
        call(model)
