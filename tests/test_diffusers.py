"""Folders of diffusers: read, written back, and compared with the library's own networks and schedulers."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)

from ddo_cli import checkpoint
from ddo_cli.diffusion import precond
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.weights import convert, export
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models import registry
from ddo_cli.models.diffusers import files as diffusers_files
from ddo_cli.models.diffusers import unet as diffusers_unet
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
LABELS = torch.tensor([0, 3, 9, 5])


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, at scales that keep activations near 1; no layer at its zero initialisation."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, std=std)
    return module.eval()


def digest(folder: Path) -> str:
    return diffusers_files.digest_of(diffusers_files.find(folder))


def make_folder(path: Path, scheduler=None, **changes) -> UNet2DModel:
    """A pipeline's folder as the library writes it, and the network in it."""
    unet = randomised(UNet2DModel(**{**TINY, **changes}))
    DDPMPipeline(unet, scheduler or DDIMScheduler()).save_pretrained(path)
    return unet


def built(found: diffusers_files.Folder):
    model = registry.build(found.config).eval()
    model.load_state_dict(found.tensors)
    return model


def public(path: Path) -> dict:
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in ("_diffusers_version",)}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing back


def test_the_round_trip_gives_equal_tensors_and_configurations(tmp_path):
    unet = make_folder(tmp_path / "a", num_class_embeds=10)
    found = diffusers_files.read(tmp_path / "a")
    assert (found.config["shape"], found.config["num_classes"]) == ([3, 8, 8], 10)
    assert found.sampling == {"sampler": "ddim", "steps": 50, "clip_denoised": True}
    assert found.notes["predicts"] == "eps"
    checkpoint.save(tmp_path / "m.safetensors", found.tensors, {"kind": "model", "config": found.config})
    model = registry.load_model(tmp_path / "m.safetensors", torch.device("cpu")).model
    x, c_noise = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 10.0, 500.0, 999.0])
    with torch.no_grad():
        assert torch.equal(model.net(x, c_noise, LABELS), unet(x, c_noise.long(), LABELS).sample)
    diffusers_files.write_folder(checkpoint.load(tmp_path / "m.safetensors"), tmp_path / "b")
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        assert public(tmp_path / "b" / name) == public(tmp_path / "a" / name)
    before, after = (load_file(tmp_path / each / "unet/diffusion_pytorch_model.safetensors") for each in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = DiffusionPipeline.from_pretrained(tmp_path / "b")
    assert (type(again), type(again.scheduler)) == (DDIMPipeline, DDIMScheduler)


def test_convert_sample_and_export(tmp_path):
    make_folder(tmp_path / "a", DDPMScheduler(beta_schedule="squaredcos_cap_v2"), num_class_embeds=10)
    made = str(tmp_path / "m.safetensors")
    found = convert.run(tmp_path / "a", Path(made), verify=True)
    assert (found["family"], found["network"], found["shape"]) == ("diffusers", "diffusers-unet", [3, 8, 8])
    assert (found["source"], found["scheduler"], found["predicts"]) == ("a", "DDPMScheduler", "eps")
    assert (found["verified"], found["noise_levels"], found["num_classes"]) == (True, 1000, 10)
    assert checkpoint.read_header(made)["provenance"][0]["source_sha256"] == digest(tmp_path / "a")
    drawn = sample.run(made, range(2), tmp_path / "set", sampling={"steps": 3}, device=torch.device("cpu"))
    assert drawn["nfe"] == 3
    assert export.run(made, tmp_path / "b", dry_run=True)["pipeline"] == "DDPMPipeline"
    assert not (tmp_path / "b").exists()
    assert export.run(made, tmp_path / "b")["verified"]
    assert diffusers_files.read(tmp_path / "b").config == diffusers_files.read(tmp_path / "a").config
    with pytest.raises(UsageError, match=r"b\.pkl asks for a published file: name with --like"):
        export.run(made, tmp_path / "b.pkl")
    with pytest.raises(UsageError, match="tells its configuration itself"):
        convert.run(tmp_path / "a", tmp_path / "x.safetensors", settings=["qkv=new"])


def flat(folder: Path) -> None:
    """As google/ddpm-cifar10-32: all files side by side."""
    for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        (folder / name).rename(folder / Path(name).name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()


def pickled(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def old_names(folder: Path) -> None:
    """Attention layers as before version 0.15."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        for new, former in names.items():
            name = name.replace(f".{new}.", f".{former}.")
        return name

    save_file({old(name): tensor for name, tensor in load_file(path).items()}, path)


def sharded(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "unet" / shard)
        index |= dict.fromkeys(part, shard)
    path.unlink()
    Path(f"{path}.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("layout", [flat, pickled, old_names, sharded])
def test_every_layout_gives_the_same_model(layout, tmp_path):
    make_folder(tmp_path / "a")
    expected = diffusers_files.read(tmp_path / "a")
    layout(tmp_path / "a")
    found = diffusers_files.read(tmp_path / "a")
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_the_unet_folder_alone_finds_the_scheduler_beside_it(tmp_path):
    make_folder(tmp_path / "a")
    assert diffusers_files.read(tmp_path / "a" / "unet").config == diffusers_files.read(tmp_path / "a").config
    assert digest(tmp_path / "a" / "unet") == digest(tmp_path / "a")


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel; only a UNet2DModel"),
        ("unet/config.json", {"block_outchannels": [8]}, "'block_outchannels': the installed diffusers has no such"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier' must be"),
        ("unet/config.json", {"in_channels": 4}, "in_channels = 4 must be 1 or 3"),
        ("unet/config.json", {"sample_size": None}, "sample_size = None must be"),
        ("unet/config.json", {"block_out_channels": [8]}, "UNet2DModel refuses its configuration"),
        ("unet/config.json", {"layers_per_block": 2}, "tensors do not fit config.json: .* is missing"),
        ("unet/config.json", {"out_channels": 6}, "out_channels = 6 must be 3"),
        (
            "unet/config.json",
            {"sample_size": 9},
            "sample_size = 9 must be a multiple of 2, since its images are halved 1",
        ),
        ("unet/config.json", {"norm_num_groups": [4]}, r"norm_num_groups = \[4\]: input should be a valid integer"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block = 1000000000: .* less than or equal to 64"),
        ("unet/config.json", {"layers_per_block": 64}, "it has 128 layers .* its weights are .* tensors"),
        # 100,000 would take n^2 operations
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 100_000}, "less than or equal to 10000"),
        ("scheduler/scheduler_config.json", {"_class_name": ["DDPM"]}, r"_class_name = \['DDPM'\]: .* a valid string"),
        ("scheduler/scheduler_config.json", {"beta_end": 3.0}, "its betas are not all between 0 and 1"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps = 1000000000: "),
        ("scheduler/scheduler_config.json", {"_class_name": "CMStochasticIterativeScheduler"}, "is a CMStochastic"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "zigzag"}, "DDIMScheduler refuses .*zigzag"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type = 'flow' must be one of"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True must be"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "names vqvae beside unet and scheduler"),
    ],
)
def test_folders_that_cannot_be_converted(file, values, message, tmp_path):
    make_folder(tmp_path / "a")
    change(tmp_path / "a" / file, **values)
    with pytest.raises(CheckpointError, match=message):
        diffusers_files.read(tmp_path / "a")


def test_missing_and_hostile_files(tmp_path):
    make_folder(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        diffusers_files.read(tmp_path)
    weights = tmp_path / "a/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is not a whole file of tensors"):
        diffusers_files.read(tmp_path / "a")
    weights.unlink()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"conv_in.weight": Evil()}, weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"model\.bin: refused: it names .*system"):
        diffusers_files.read(tmp_path / "a")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "a/scheduler/scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="says at which noise levels"):
        diffusers_files.read(tmp_path / "a")


def copied(folder: Path, name: str) -> Path:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    return weights.rename(weights.with_name(name))


def test_weights_of_another_precision_and_averaged_ones(tmp_path):
    """A folder may hold rounded weights only; the library's training script writes `unet_ema` beside `unet`."""
    make_folder(tmp_path / "a")
    expected = diffusers_files.read(tmp_path / "a")
    half = copied(tmp_path / "a", "diffusion_pytorch_model.fp16.safetensors")
    found = diffusers_files.read(tmp_path / "a")
    assert found.notes["weights"] == f"{half.name}, rounded to fp16: others are not in the folder"
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    half.with_name("diffusion_pytorch_model.bf16.safetensors").write_bytes(half.read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.bf16\.safetensors, .*fp16\.safetensors; rename the one to"):
        diffusers_files.read(tmp_path / "a")
    half.rename(half.with_name("diffusion_pytorch_model.safetensors"))
    training = tmp_path / "training" / "checkpoint-500"
    training.mkdir(parents=True)
    (tmp_path / "a/scheduler").rename(tmp_path / "training/scheduler")
    for name in ("unet", "unet_ema"):
        shutil.copytree(tmp_path / "a/unet", training / name)
    assert diffusers_files.read(training).notes["averaged"].startswith(f"{training / 'unet_ema'} lies beside it")
    for folder in (training / "unet_ema", training):
        assert diffusers_files.read(folder).config == expected.config
        shutil.rmtree(training / "unet", ignore_errors=True)
    assert diffusers_files.read(training).notes["weights"] == "unet_ema, which are averaged"


ODD = [None, "x", -1, 0, 10**9, 10**30, 1.5, float("nan"), [], [1], ["x"], {}, {"a": []}, True, "x" * 4000, "\x1b[31m"]


def refusal(unet, scheduler) -> str:
    try:
        diffusers_unet.config_of(unet, scheduler)
    except ValueError as error:
        return str(error)
    return ""


def test_values_of_wrong_kinds_are_named(tmp_path):
    """Every value of both configurations replaced by others: one message, no memory, no time."""
    make_folder(tmp_path / "a")
    unet, scheduler = (json.loads((tmp_path / "a" / name).read_text()) for name in CONFIGS)
    messages = [
        refusal(*((config | {key: value}, scheduler) if config is unet else (unet, config | {key: value})))
        for config in (unet, scheduler)
        for key in config.keys() - {"_diffusers_version"}
        for value in ODD
    ]
    assert sum(map(bool, messages)) > 200
    assert all(message.isprintable() for message in messages)
    assert max(map(len, messages)) < 250


CONFIGS = ("unet/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize(
    "content",
    ['{"weight_map": null}', '{"weight_map": {"a": "../x"}}', '{"weight_map": [1]}', "[" * 10**5, "{}", "9" * 5000],
)
def test_indexes_of_shards(content, tmp_path):
    make_folder(tmp_path / "a")
    copied(tmp_path / "a", "x").with_name("diffusion_pytorch_model.safetensors.index.json").write_text(content)
    (tmp_path / "a/x").write_bytes(b"outside")
    with pytest.raises(CheckpointError, match=r"no weight_map|names \.\./x, not found beside it|is damaged") as caught:
        diffusers_files.read(tmp_path / "a")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_without_the_library_the_message_names_the_extra(tmp_path, monkeypatch):
    make_folder(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"pip install 'ddo-cli\[diffusers\]'"):
        diffusers_files.read(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------------------------
# The same process as the library's schedulers


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_denoised_image_is_the_schedulers(prediction, schedule, tmp_path):
    scheduler = DDIMScheduler(prediction_type=prediction, beta_schedule=schedule, clip_sample=False)
    scheduler.set_timesteps(1000)
    unet = make_folder(tmp_path / "a", scheduler)
    model = built(diffusers_files.read(tmp_path / "a"))
    x = torch.randn(1, 3, 8, 8)
    for t in (0, 40, 500, 990):
        alpha_bar = scheduler.alphas_cumprod[t].double()
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        with torch.no_grad():
            expected = scheduler.step(unet(x, t).sample, t, x).pred_original_sample
            found = model.denoise(x * (1 + sigma**2).sqrt(), sigma, torch.tensor([-1]))
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(1 + sigma))


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_draws_the_librarys_images(clip, tmp_path):
    scheduler = DDIMScheduler(clip_sample=clip)  # timestep_spacing "leading": 0, 100, ..., 900
    unet = make_folder(tmp_path / "a", scheduler, num_class_embeds=10)
    model = built(diffusers_files.read(tmp_path / "a"))
    spec = SamplingRecipe(sampler="ddim", respacing="ddim10", clip_denoised=clip)
    model.check_sampling(spec)
    with torch.no_grad():
        found = model.sample(LABELS, RowRng(range(4)), spec)
    assert found.nfe == 10
    scheduler.set_timesteps(10)
    x = RowRng(range(4)).randn((3, 8, 8))
    for t in scheduler.timesteps:
        with torch.no_grad():
            # Of the clipped image, as ADM's DDIM; the library's default is to step along the noise of the unclipped.
            x = scheduler.step(unet(x, t, LABELS).sample, t, x, use_clipped_model_output=clip).prev_sample
    assert relative(found.x.float(), x) < 1e-4  # the library's state is float32; measured: 1e-5


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_draws_the_librarys_images(variance, tmp_path, monkeypatch):
    scheduler = DDPMScheduler(variance_type=variance, beta_schedule="squaredcos_cap_v2")
    unet = make_folder(tmp_path / "a", scheduler, out_channels=6 if variance == "learned_range" else 3)
    folder = diffusers_files.read(tmp_path / "a")
    model, spec = built(folder), SamplingRecipe(**folder.sampling).merged(steps=10)
    model.check_sampling(spec)
    with torch.no_grad():
        found = model.sample(torch.full((4,), -1), RowRng(range(4)), spec)
    rng = RowRng(range(4))  # the latent, then each step's noise
    scheduler.set_timesteps(timesteps=[999, 888, 777, 666, 555, 444, 333, 222, 111, 0])
    x = rng.randn((3, 8, 8))
    noise = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(noise, lambda shape, **_: rng.randn((3, 8, 8), dtype=torch.float64).float())
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    assert relative(found.x.float(), x) < 1e-4  # measured: 2e-5


def test_guidance_without_training_for_it_is_refused(tmp_path):
    make_folder(tmp_path / "a", num_class_embeds=10)
    config = diffusers_files.read(tmp_path / "a").config
    with pytest.raises(UsageError, match="learned images without labels"):
        registry.build(config).check_sampling(SamplingRecipe(cfg_scale=2.0))
    registry.build(config, {"label_dropout": 0.1}).check_sampling(SamplingRecipe(cfg_scale=2.0))


def test_a_swapped_scheduler_keeps_what_the_network_was_trained_for(tmp_path, capfd):
    make_folder(tmp_path / "a", DDPMScheduler(variance_type="learned_range", beta_schedule="linear"), out_channels=6)
    expected = built(diffusers_files.read(tmp_path / "a"))
    change(tmp_path / "a/scheduler/scheduler_config.json", _class_name="PNDMScheduler")
    capfd.readouterr()
    found = diffusers_files.read(tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    assert found.config["options"]["learned_variance"]
    assert found.sampling == {"sampler": "ddim", "steps": 50, "clip_denoised": False}
    assert torch.equal(built(found).precond.sigmas, expected.precond.sigmas)


def test_the_levels_are_those_of_the_schedulers(tmp_path):
    scheduler = DDPMScheduler(trained_betas=[0.1, 0.2, 0.5])
    make_folder(tmp_path / "a", scheduler)
    model = built(diffusers_files.read(tmp_path / "a"))
    assert isinstance(model.precond, precond.Discrete)
    expected = [(1 / product - 1) ** 0.5 for product in (0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.5)]
    torch.testing.assert_close(model.precond.sigmas, torch.tensor(expected))
    assert diffusers_files.read(tmp_path / "a").sampling["steps"] == 3


@pytest.mark.parametrize(
    ("scheduler", "left_out"),
    [
        ({}, None),
        ({"clip_sample": False, "clip_sample_range": 2.0}, None),
        ({"clip_sample_range": 2.0}, "clip_sample_range = 2.0: not clipped"),
        ({"thresholding": True}, "thresholding: denoised images are neither thresholded nor clipped"),
    ],
)
def test_clipping_that_no_sampler_here_has_is_said(tmp_path, scheduler, left_out):
    make_folder(tmp_path / "a", DDIMScheduler(**scheduler))
    found = diffusers_files.read(tmp_path / "a")
    assert found.notes.get("left_out") == left_out
    assert found.sampling["clip_denoised"] == (left_out is None and scheduler.get("clip_sample", True))
