"""What `--dry-run` measures."""

import pytest
import torch
from conftest import CPU, KINDS, make_checkpoint, tiny_recipe

from ddo_cli.codec import PixelCodec
from ddo_cli.data.images import open_images
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.engines import dry_run
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.errors import UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.load import load
from ddo_cli.training import loop, state


@pytest.mark.parametrize("kind", KINDS)
def test_two_real_steps_and_a_batch_of_samples(kind, tmp_path, monkeypatch):
    ckpt = make_checkpoint(tmp_path / "x.safetensors", kind)
    recipe = tiny_recipe(ckpt, kind, "finetune.ema_widths=[0.05, 0.1]")
    steps, saved, fit = [], [], loop.fit

    def watched(*args):
        for event in fit(*args):
            steps.append(event.step)
            yield event

    monkeypatch.setattr(loop, "fit", watched)
    monkeypatch.setattr(state.State, "save", lambda self, step: saved.append(step))
    result = finetune.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
    assert (steps, saved) == ([1, 2], [])
    assert list(tmp_path.iterdir()) == [tmp_path / "x.safetensors"]
    figures, disk = result["measured"], result["disk_gib"]
    assert figures["seconds_per_step"] > 0
    assert figures["peak_memory_gib"] > 0.1  # the program itself
    # Hours by hand: rounds of 2 candidates, scored once, and the further ranges of seeds of references and best ones,
    # for promotion and for the table.
    settings = recipe.finetune
    num_steps = settings.rounds * -(-settings.images_per_round // settings.batch)
    assert figures["hours"]["training"] == pytest.approx(num_steps * figures["seconds_per_step"] / 3600)
    scores = 2 * recipe.metric.repeats + settings.rounds * (2 + 2 * recipe.metric.repeats)
    drawn = settings.rounds * settings.num_fake + scores * recipe.metric.num_images
    assert figures["hours"]["sampling"] == pytest.approx(drawn / figures["images_per_second"] / 3600)
    model = registry.load_model(ckpt, CPU).model
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    stored = (
        settings.rounds * 2 * 2 + settings.rounds + 1
    )  # two averages of each candidate; the best ones, the final one
    assert disk["weights"] == pytest.approx(stored * weights / 2**30)
    item = round(disk["fake_sets"] * 2**30 / (settings.rounds * settings.num_fake))  # bytes of each
    assert disk["fake_sets"] * 2**30 == pytest.approx(item * settings.rounds * settings.num_fake)
    assert item in (64, 4 * 64, 3 * 32 * 32, 4 * 3 * 32 * 32) or kind not in ("diffusion", "autoregressive")


def test_memory_of_a_gpu(monkeypatch):
    sizes = {"max_memory_allocated": 3 * 2**30, "max_memory_reserved": 4 * 2**30, "reset_peak_memory_stats": None}
    for name, size in {**sizes, "get_device_name": "a card"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    with dry_run._measured(torch.device("cuda", 0)) as figures:
        figures["seconds_per_step"] = 1.0
    assert figures == {"seconds_per_step": 1.0, "peak_memory_gib": 3, "peak_reserved_gib": 4, "device": "a card"}


def test_the_plan_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "fit", None)
    ckpt = make_checkpoint(tmp_path / "x.safetensors")
    result = finetune.run(tiny_recipe(ckpt), tmp_path / "run", device=CPU, dry_run=True, measure=False)
    assert "measured" not in result


@pytest.mark.parametrize("name", ["toy2d", "digits32-vqvae"])
def test_pretraining(name, tmp_path):
    recipe = load(name, ["pretrain.images=6400", "pretrain.batch=16", "sampling.batch=4"])
    result = pretrain.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
    figures = result["measured"]
    assert figures["hours"]["training"] == pytest.approx(400 * figures["seconds_per_step"] / 3600)
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_said():
    message = r"does not fit into the memory of .* \(CUDA out of memory\); lower micro_batch"
    with pytest.raises(UsageError, match=message), dry_run._measured(CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class Odd(torch.nn.Module):
    """Of ten classes, without a row for no label; or of another shape."""

    def __init__(self, is_larger: bool):
        super().__init__()
        self.label, self.is_larger = torch.nn.Embedding(10, 3), is_larger

    def forward(self, x, c_noise, label):
        return x.repeat(1, 1, 1, 1 + self.is_larger) + self.label(label)[:, :, None, None]


def test_a_network_of_one_s_own_is_called_with_and_without_labels(capsys):
    images = open_images("embedded:digits16", 4)

    def built(is_larger: bool, num_classes: int) -> DiffusionModel:
        options = DiffusionOptions(), DiffusionDrawOptions()
        return DiffusionModel(Odd(is_larger), PixelCodec((3, 16, 16)), num_classes, *options)

    dry_run.try_network(built(False, 10), images, CPU)
    assert "fails (IndexError: index out of range in self) on label -1, none; label_dropout" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"fails \(IndexError: .*\) on label -1; mend it"):
        dry_run.try_network(built(False, 0), images, CPU)
    with pytest.raises(UsageError, match=r"RuntimeError: .* on label 0; mend it"):
        dry_run.try_network(built(True, 10), images, CPU)
    dry_run.try_network(registry.load_model("embedded:digits16", CPU)[0], images, CPU)
    assert not capsys.readouterr().err
