"""ADM's U-Net written as a folder of diffusers: the same function, or refused with the reason."""

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel
from test_diffusers import LABELS, built, change, randomised, relative

from ddo_cli.checkpoint import Checkpoint
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models import registry
from ddo_cli.models.diffusers import files as diffusers_files
from ddo_cli.models.diffusers import from_adm as diffusers_adm
from ddo_cli.models.diffusers import unet as diffusers_unet
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng


def adm(precond_name: str, num_classes: int = 10, **changes) -> Checkpoint:
    """A random tiny ADM, as a checkpoint."""
    options = {
        "width": 32,
        "channel_mult": [1, 2, 2],
        "num_blocks": 1,
        "attention": [8, 4],
        "num_head_channels": 16,
        "precond": precond_name,
        **changes,
    }
    config = registry.config_of("adm-unet", (3, 16, 16), num_classes, options, {})
    model = randomised(registry.build(config))
    return Checkpoint(model.state_dict(), {"kind": "model", "config": config}, "", "adm.safetensors")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("iddpm", {"learned_variance": True}),
        ("ddpm", {"num_classes": 0}),
        ("edm", {"augment_dim": 4}),
        ("ddpm", {"num_heads": 2, "channel_mult": [1, 2, 2], "attention": []}),
        ("cosine", {"updown": False, "scale_shift": False, "num_steps": 4000}),
        ("ddpm", {"updown": False, "num_steps": 500, "attention": [8]}),
    ],
)
def test_adm_exported_is_the_same_function(name, changes, tmp_path):
    file = adm(name, **changes)
    first = diffusers_files.write_folder(file, tmp_path / "out")
    assert diffusers_files.write_folder(file, tmp_path / "out") == first  # finds it
    ours, theirs = registry.build(file.header["config"]).eval(), built(diffusers_files.read(tmp_path / "out"))
    ours.load_state_dict(file.tensors)
    x, c_noise = torch.randn(4, 3, 16, 16), torch.tensor([0.0, 3.0, 500.0, 999.0])
    with torch.no_grad():
        a, b = ours.net(x, c_noise, LABELS), theirs.net(x, c_noise, LABELS)
    assert relative(a, b) < 1e-5  # the library's frequencies are float32; measured: 1e-6
    sigma = ours.precond.round_sigma(torch.tensor([0.03, 0.3, 2.0, 30.0]))
    with torch.no_grad():
        assert relative(ours.denoise(5 * x, sigma, LABELS), theirs.denoise(5 * x, sigma, LABELS)) < 1e-4
    index = tmp_path / "out" / "model_index.json"
    assert index.exists() == (name != "edm")
    if index.exists():
        pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
        assert isinstance(pipeline.scheduler, DDPMScheduler)


def test_the_other_order_of_the_attentions_channels_would_be_another_function(tmp_path, monkeypatch):
    file = adm("ddpm")
    monkeypatch.setattr(diffusers_adm, "head_width", lambda *_: 32)  # heads of 32 channels where there are 16
    diffusers_files.write_folder(file, tmp_path / "out")
    monkeypatch.undo()
    change(tmp_path / "out/unet/config.json", attention_head_dim=16)
    ours, theirs = registry.build(file.header["config"]).eval(), built(diffusers_files.read(tmp_path / "out"))
    ours.load_state_dict(file.tensors)
    x, c_noise = torch.randn(4, 3, 16, 16), torch.tensor([0.0, 3.0, 500.0, 999.0])
    with torch.no_grad():
        assert relative(ours.net(x, c_noise, LABELS), theirs.net(x, c_noise, LABELS)) > 1e-3


def test_an_edm_network_draws_the_same_images_with_the_librarys_scheduler(tmp_path):
    file = adm("edm")
    diffusers_files.write_folder(file, tmp_path / "out")
    scheduler = EDMEulerScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    unet = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    model = registry.build(file.header["config"]).eval()
    model.load_state_dict(file.tensors)
    with torch.no_grad():
        found = model.sample(LABELS, RowRng(range(4)), SamplingRecipe(sampler="euler", steps=6)).x
    scheduler.set_timesteps(6)
    x = RowRng(range(4)).randn((3, 16, 16)) * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        with torch.no_grad():
            f = unet(scheduler.scale_model_input(x, t), t, LABELS).sample
        x = scheduler.step(f, t, x).prev_sample
    assert relative(found.float(), x) < 1e-4  # measured: 6e-7


PUBLISHED_64 = {"width": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3}
PUBLISHED_256 = {"width": 256, "channel_mult": [1, 1, 2, 2, 4, 4], "num_blocks": 2, "learned_variance": True}


@pytest.mark.parametrize(
    ("side", "options"),
    [
        (64, {**PUBLISHED_64, "precond": "iddpm", "learned_variance": True}),
        (64, {**PUBLISHED_64, "group_channels": 4}),
        (256, {**PUBLISHED_256, "precond": "ddpm"}),
    ],
)
def test_the_published_networks_have_their_names(side, options):
    config = registry.config_of("adm-unet", (3, side, side), 1000, options, {})
    unet, _ = diffusers_adm.configs(config)
    with torch.device("meta"):
        model = registry.build(config)
        expected = diffusers_unet.DiffusersUnet(unet).unet.state_dict()
        found = diffusers_adm.tensors(model.state_dict(), config)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vp", {}, "no scheduler of diffusers matches precond = vp"),
        ("ddpm", {"num_heads": 4, "channel_mult": [1, 2, 4]}, r"heads of \[16, 32\] channels"),
        ("ddpm", {"channel_mult": [2, 2, 2]}, r"channel_mult\[0\] = 2.0 must be 1"),
        ("ddpm", {"group_channels": 4}, "fewer than 32 groups"),
        ("ddpm", {"num_steps": 500, "rescaled_steps": True}, "no scheduler of diffusers tells steps as of 1000"),
    ],
)
def test_networks_that_the_library_does_not_have(name, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        diffusers_files.write_folder(adm(name, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_replaced_nor_left_half_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out exists"):
        diffusers_files.write_folder(adm("ddpm"), tmp_path / "out")
    (tmp_path / "out").rmdir()
    config = registry.config_of("mlp", (2,), 0, {}, {})
    with pytest.raises(CheckpointError, match="holds the network mlp, which diffusers does not have"):
        diffusers_files.write_folder(Checkpoint({}, {"config": config}, "", "m.safetensors"), tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers_files.checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        diffusers_files.write_folder(adm("ddpm"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
