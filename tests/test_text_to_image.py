"""Text-to-image pipelines of diffusers: read, sampled as the library does, and encoded."""

import copy
import fnmatch
import functools
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from conftest import CPU
from launch import group
from safetensors.torch import load_file, save_file
from test_images import encoded as png
from test_images import write_folder
from test_shards import tar
from tiny_pipeline import KINDS, make_pipeline
from torch.distributed import TCPStore

from ddo_cli import checkpoint, dist
from ddo_cli.data.images import open_images
from ddo_cli.data.latents import stored_texts
from ddo_cli.diffusion.precond import Discrete
from ddo_cli.engines import encode
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.weights import convert, export
from ddo_cli.errors import CheckpointError, DataError, UsageError
from ddo_cli.models import adapters, registry
from ddo_cli.models.diffusers import flux2, pipelines, texts
from ddo_cli.models.diffusers.families import FAMILIES
from ddo_cli.recipe.load import load
from ddo_cli.recipe.training import AdapterRecipe
from ddo_cli.rng import RowRng
from ddo_cli.training.recompute import recompute_units

PROMPTS = ("a red cup", "a blue dog", "a red cup")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return functools.cache(lambda kind: make_pipeline(tmp_path_factory.mktemp("pipelines") / kind, kind))


@pytest.fixture
def folder(folder_of):
    return folder_of("sd")


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def drawn(loaded, spec, label=(0, 1)):
    return loaded.model.sample(torch.tensor(label), RowRng(range(len(label))), spec).x


# The pipelines' own schedulers and others: (family, scheduler, negative prompt, the pipeline's name of cfg_scale 3).
PIPELINES = [
    ("sd", {}, "", 3.0),
    ("sd", {"prediction_type": "v_prediction"}, "bad", 3.0),
    ("sd", {"set_alpha_to_one": True, "timestep_spacing": "trailing", "beta_schedule": "linear"}, "", 3.0),
    ("sdxl", {}, None, 3.0),
    ("sdxl", {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "bad", 3.0),
    ("sd3", {}, "bad", 3.0),
    ("flux2", {}, None, 3.0),
    ("z-image", {}, "bad", 2.0),
]  # fmt: skip


def their_pipeline(path):
    import diffusers

    theirs = getattr(diffusers, json.loads((path / "model_index.json").read_text())["_class_name"])
    found = theirs.from_pretrained(path)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.slow  # the library's pipelines are slow to import
@pytest.mark.parametrize(("kind", "scheduler", "negative", "scale"), PIPELINES)
def test_samples_are_those_of_the_pipeline(tmp_path, monkeypatch, kind, scheduler, negative, scale):
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    path = make_pipeline(tmp_path / "base", kind, scheduler)
    theirs = their_pipeline(path)
    loaded = registry.told(registry.load_model(path, CPU), PROMPTS, negative or "")
    model = loaded.model
    x = RowRng([0, 1]).randn(model.codec.state_shape)
    given = {"prompt": list(PROMPTS[:2]), "latents": x, "height": model.codec.shape[1], "width": model.codec.shape[2]}
    if negative is not None:
        given["negative_prompt"] = [negative] * 2

    def compared(loaded, steps, ours):
        call = {**given, "num_inference_steps": steps, "guidance_scale": scale + ours - 3, "return_dict": False}
        expected = theirs(**copy.deepcopy(call), output_type="latent")[0]  # one of them changes its prompts in place
        if kind == "flux2":  # unpacked, and no longer normalised
            expected = model.codec.scaled(torch.nn.functional.pixel_unshuffle(expected, 2))
        found = drawn(loaded, sample.spec_of(loaded.checkpoint, steps=steps, cfg_scale=ours)).float()
        # Random networks blow states up to some 50; 1e-4 of their deviation, in float32.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
        return found, call

    compared(loaded, 5, 3.0)
    found, call = compared(loaded, 4, 1.0)
    images = theirs(**copy.deepcopy(call), output_type="np")[0]
    pixels = model.codec.decode(found).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels - 255 * images).max() < 1.01  # 127.5 x + 128 is cut, where the pipeline rounds
    items = torch.randint(0, 256, (1, *model.codec.shape), dtype=torch.uint8)
    seen = items / 127.5 - 1
    with torch.no_grad():
        if kind == "flux2":
            latent = theirs._encode_vae_image(seen, None)
        else:
            config = theirs.vae.config
            latent = (theirs.vae.encode(seen).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor
    torch.testing.assert_close(model.codec.encode(items), latent)
    # An exported adapter is the same there, wherever an adapter fits.
    pytest.importorskip("peft")
    settings = AdapterRecipe(kind="lora", rank=2, alpha=3.0)
    file = adapters.add(model, loaded.checkpoint, settings, 0, loaded.checkpoint.path)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) * 0.3)
    checkpoint.save(tmp_path / "adapter.safetensors", model.state_dict(), file.header)
    export.run(str(tmp_path / "adapter.safetensors"), tmp_path / "lora")
    theirs.load_lora_weights(tmp_path / "lora")
    assert (compared(loaded, 4, 1.0)[0] - found).abs().max() > 0.1


def test_levels_are_those_of_the_scheduler():
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    for spacing in ("leading", "trailing", "linspace"):
        scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=False)
        sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
        known, config = Discrete(sigmas), {**scheduler.config, "_class_name": "DDIMScheduler"}
        scheduler.set_timesteps(7)
        expected = torch.cat([sigmas[scheduler.timesteps], sigmas[:1]])
        assert torch.equal(FAMILIES["sd"].levels(config, known, 7, ()), expected)
    config["set_alpha_to_one"] = True  # the library's default
    assert FAMILIES["sd"].levels(config, known, 4, ())[-1] == 0
    euler = EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    euler.set_timesteps(7)
    config = {**euler.config, "_class_name": "EulerDiscreteScheduler", "set_alpha_to_one": False}
    torch.testing.assert_close(FAMILIES["sdxl"].levels(config, known, 7, ()), euler.sigmas)
    with pytest.raises(UsageError, match="trained at 1000 noise levels"):
        FAMILIES["sd"].levels(config, known, 1001, ())


@pytest.mark.parametrize("kind", KINDS)
def test_the_label_is_a_prompt(folder_of, here, monkeypatch, kind):
    monkeypatch.setattr(flux2, "LENGTH", 40)  # tokens of the tiny encoder's 28 layers
    monkeypatch.setattr(texts, "_known", {})  # of this length, as long as the test goes on
    monkeypatch.setattr(texts, "_table", functools.cache(texts._table.__wrapped__))
    loaded = registry.load_model(folder_of(kind), CPU)
    with pytest.raises(UsageError, match="none is given; add --prompt TEXT"):
        loaded.model.check_sampling(sample.spec_of(loaded.checkpoint))
    spec = sample.spec_of(loaded.checkpoint, steps=2, cfg_scale=1.0)
    told = registry.told(loaded, PROMPTS)
    x = drawn(told, spec, (0, 1, 2, -1))
    texts._table.cache_clear()
    other = registry.told(loaded, ("a blue dog", ""))
    y = drawn(other, spec, (0, 0, 0, 1))
    close = {"rtol": 1e-5, "atol": 1e-5 * float(x.std())}
    torch.testing.assert_close(y[1], x[1], **close)  # batches of other labels
    torch.testing.assert_close(y[3], x[3], **close)  # -1 is the empty prompt
    assert (y[0] - x[0]).abs().max() > 0.01
    away = registry.told(loaded, PROMPTS, "bad")
    guided = sample.spec_of(loaded.checkpoint, steps=2)
    assert (drawn(away, guided, (-1,)) - x[3]).abs().max() > 0.01
    assert (drawn(away, guided, (0,)) - x[0]).abs().max() > 0.01
    if importlib.util.find_spec("peft"):
        assert_the_whole_adapter_learns(told)


def assert_the_whole_adapter_learns(loaded):
    """Also when blocks are recomputed, and of a base in bf16: no default target lies where it changes nothing."""
    model = loaded.model
    settings = AdapterRecipe(kind="lora", rank=2, alpha=2.0, base_precision="bf16")
    adapters.add(model, loaded.checkpoint, settings, 0, loaded.checkpoint.path)
    recompute_units(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == model.state_dict().keys()
    for tensor in trained.values():
        torch.nn.init.normal_(tensor, std=0.1)
    rng = RowRng([0, 1])
    draw, x = model.draw(2, rng), rng.randn(model.codec.state_shape)
    model.log_lik(model.predict(x, torch.tensor([0, 1]), draw), x, draw).sum().backward()
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []


@pytest.mark.slow  # whole commands
def test_sets_of_prompts(here, ddo, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cup\n\n a blue dog \n")
    line = ["sample", "--ckpt", here, "--num-images", 2, "--steps", 2, "--cfg-scale", 1, "--json"]
    found = json.loads(ddo(*line, "--prompts", "prompts.txt", "--out", "a").stdout)
    ddo(*line, "--prompt", "a red cup", "--prompt", "a blue dog", "--out", "b")
    manifests = [json.loads((tmp_path / out / "manifest.json").read_text()) for out in "ab"]
    assert manifests[0]["prompts"] == ["a red cup", "a blue dog"]
    assert manifests[0] == manifests[1]
    convert.run(here, tmp_path / "sd.safetensors", verify=True)
    assert checkpoint.load(tmp_path / "sd.safetensors").sha256 == found["checkpoint_sha256"]
    assert len(list((tmp_path / "cache" / "pipelines").iterdir())) == 1  # the file made of the folder
    for wrong, said in (
        (["--prompt", "a", "--prompts", "prompts.txt"], "leave one of them out"),
        (["--prompts", "none.txt"], "cannot be read"),
        (["--prompt", "a", "--ckpt", "embedded:digits16"], "reads no text"),
    ):
        assert said in ddo(*line, *wrong, "--out", "c", code=2).stderr


def photos(root, num=3, side=64):
    rng = np.random.default_rng(0)
    items = rng.integers(0, 256, (num, 3, side, side), dtype=np.uint8)
    content = {f"{row}.png": png(item) for row, item in enumerate(items)}
    return write_folder(root, content | {f"{row}.txt": PROMPTS[row % 3].encode() for row in range(num)})


def test_encoding_captions(here, tmp_path, monkeypatch):
    source = photos(tmp_path / "photos")
    figures = encode.run(str(source), here, tmp_path / "set", shard=2, device=CPU)
    assert (figures["num_images"], figures["shape"], figures["shards"]) == (3, [8, 8, 8], 2)
    model, header = registry.load_model(here, CPU).model, json.loads((tmp_path / "set" / "manifest.json").read_text())
    images, opened = open_images(str(source)), open_images(str(tmp_path / "set"))
    assert opened.captions == images.captions == PROMPTS
    assert (opened.labels.tolist(), opened.num_classes) == ([0, 1, 2], 3)
    torch.testing.assert_close(torch.from_numpy(opened.items[:]), model.codec.latents(torch.from_numpy(images.items)))
    digest, stored, table = stored_texts(tmp_path / "set")
    assert header["text_encoder"] == digest == texts.digest_of(here, FAMILIES["sd"])
    assert stored == [*PROMPTS, ""]
    texts._known.clear()
    assert torch.equal(texts.conditions_of(model.net.encoder, stored, CPU)["tokens"], table["tokens"])
    packed = {path.name: path.read_bytes() for path in source.iterdir()}
    write_folder(tmp_path / "shards", {"a.tar": tar(packed)})  # as webdataset has them
    encode.run(str(tmp_path / "shards"), here, tmp_path / "packed", shard=2, device=CPU)
    again = open_images(str(tmp_path / "packed"))
    assert again.captions == PROMPTS
    assert np.array_equal(again.items[:], opened.items[:])
    labels = [load_file(tmp_path / "set" / f"texts-{number:06d}.safetensors")["labels"].tolist() for number in (0, 1)]
    assert labels == [[0, 1, -1], [2]]
    (tmp_path / "set" / "texts-000001.safetensors").unlink()
    with pytest.raises(DataError, match=r"texts-000001\.safetensors is damaged"):
        stored_texts(tmp_path / "set")
    encode.run(str(source), here, tmp_path / "set", shard=2, device=CPU)
    assert torch.equal(stored_texts(tmp_path / "set")[2]["tokens"], table["tokens"])
    # What is stored needs no text encoder, and is found for a part of the set.
    monkeypatch.setattr(texts, "encode", None)
    texts._known.clear()
    texts.remember(digest, stored, table)
    assert torch.equal(texts.conditions_of(model.net.encoder, [""], CPU)["tokens"], table["tokens"][3:])
    (source / "1.txt").unlink()
    (source / "0.txt").unlink()
    (source / "2.txt").unlink()
    with pytest.raises(DataError, match="has no captions"):
        encode.run(str(source), here, tmp_path / "other", device=CPU)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "match"),
    [
        ("model_index.json", {"_class_name": "StableCascadePipeline"}, "is a StableCascadePipeline; of text-to-image"),
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "is a Flux2Pipeline, whose network is distilled from"),
        ("model_index.json", {"is_distilled": True}, "distilled to few steps, as is_distilled of model_index.json"),
        ("model_index.json", {"_name_or_path": "a/FLUX.2-klein-4B"}, "distilled to few steps, as a/FLUX.2-klein-4B"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "has a AutoencoderTiny in vae/, and Stable Diff"),
        ("vae/config.json", {"latent_channels": 16}, "in_channels = 4, and its autoencoder makes 16"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "distilled to few steps, as LCMScheduler"),
        ("unet/config.json", {"_name_or_path": "stabilityai/sd-turbo"}, "distilled to few steps, as stab"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "distilled from guided samples"),
        ("unet/config.json", {"in_channels": 9}, "in_channels = 9 must be 4"),
        ("unet/config.json", {"cross_attention_dim": 16}, "tensors do not fit config.json"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type = 'flow' must be one of"),
    ],
)  # fmt: skip
def test_pipelines_that_are_refused(folder, tmp_path, file, values, match):
    other = shutil.copytree(folder, tmp_path / "base")
    change(other / file, **values)
    with pytest.raises(CheckpointError, match=match) as raised:
        pipelines.read(other)
    assert len(str(raised.value).replace(str(tmp_path), "")) <= 300


@pytest.mark.parametrize(
    ("kind", "network", "scheduler", "match"),
    [
        ("sdxl", {"sample_size": 128}, {}, "addition_embed_type = None must be text_time, as in Stable Diff"),
        ("sd3", {"sample_size": 400}, {}, "sample_size = 400 must be an even side of latents, at most twice pos_em"),
        ("sd3", {"patch_size": 4}, {}, "patch_size = 4 must be 2, as in Stable Diffusion 3"),
        ("sd3", {}, {"shift": -1.0}, "shift = -1.0: input should be greater than 0"),
        ("sd3", {}, {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler; Stable Diffusion 3 has a FlowMatchEuler"),
        ("sd3", {}, {"time_shift_type": "odd"}, "FlowMatchEulerDiscreteScheduler refuses its configuration"),
        ("flux2", {"guidance_embeds": True}, {}, "guidance_embeds = true: it is distilled from guided samples"),
        ("z-image", {"all_patch_size": [1]}, {}, r"all_patch_size and all_f_patch_size must be \[2\] and \[1\]"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(kind, network, scheduler, match):
    family = FAMILIES[kind]

    def read():
        family.arguments({"_class_name": family.network, **network})
        family.process({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler})

    with pytest.raises(ValueError, match=match):
        read()


def test_the_shift_grows_with_the_image():
    """By the published figures: 1.15 for 4096 tokens; of FLUX.2 2.26 at 10 steps and 1.15 at 200 (four digits)."""
    xl = {"use_dynamic_shifting": True}
    assert FAMILIES["z-image"].dynamic_shift(xl, 50, 4096) == pytest.approx(1.15)
    assert FAMILIES["z-image"].dynamic_shift(xl, 50, 256) == pytest.approx(0.5)
    mus = [FAMILIES["flux2"].dynamic_shift(xl, steps, 4096) for steps in (10, 200)]
    assert mus == pytest.approx([2.2562, 1.15], abs=1e-4)
    assert FAMILIES["flux2"].dynamic_shift(xl, 10, 4400) == pytest.approx(1.2014, abs=1e-4)
    assert FAMILIES["sd3"].draw({"shift": 3.0}, (16, 64, 64)) == {"p_mean": 1.099, "p_std": 1.0}
    assert FAMILIES["flux2"].draw(xl, (128, 64, 64))["p_mean"] == pytest.approx(2.023, abs=1e-3)
    linear = {**xl, "time_shift_type": "linear"}
    assert FAMILIES["z-image"].draw(linear, (16, 128, 128))["p_mean"] == pytest.approx(0.14, abs=1e-3)


def test_an_autoencoder_without_statistics(folder):
    with pytest.raises(ValueError, match=r"has no bn\.running_mean, by which its latents are normalised"):
        FAMILIES["flux2"].affine({}, folder / "vae")
    with pytest.raises(ValueError, match="must be a side in pixels"):
        FAMILIES["z-image"].side({}, {"sample_size": [1, 2]})


def test_another_size(folder_of, here, tmp_path):
    """The first numbers of a state are those of the seed; the network takes any size that it has positions for."""
    convert.run(folder_of("sd3"), tmp_path / "m.safetensors", settings=["size=96"])
    loaded = registry.told(registry.load_model(tmp_path / "m.safetensors", CPU), PROMPTS)
    assert drawn(loaded, sample.spec_of(loaded.checkpoint, steps=1, cfg_scale=1.0)).shape == (2, 4, 12, 12)
    for size, match in ((100, "a side of 100 pixels, and 16 must divide it"), (144, "at most 128")):
        with pytest.raises(CheckpointError, match=match):
            convert.run(folder_of("sd3"), tmp_path / "n.safetensors", settings=[f"size={size}"])
    with pytest.raises(UsageError, match="is a pipeline, of which only size can be told; leave heads out"):
        convert.run(folder_of("sd3"), tmp_path / "n.safetensors", settings=["heads=2"])


def test_another_text_encoder(here, tmp_path, monkeypatch):
    moved = shutil.copytree(here, tmp_path / "moved")
    model = registry.load_model(here, CPU).model
    encoder = model.net.encoder
    monkeypatch.setenv("DDO_PIPELINE", str(moved))
    assert encoder.folder() == moved
    assert model.codec.place()[0] == str(moved / "vae")
    change(moved / "text_encoder" / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="holds another text encoder where the model needs"):
        encoder.folder()
    monkeypatch.setenv("DDO_PIPELINE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no text encoder.*set DDO_PIPELINE"):
        encoder.folder()


def test_without_a_cache_or_a_part(here, tmp_path, monkeypatch):
    monkeypatch.setenv("DDO_CACHE", "off")
    with pytest.raises(UsageError, match="give the file of `ddo convert`"):
        registry.load_model(here, CPU)
    shutil.copytree(here, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "vae")
    with pytest.raises(CheckpointError, match="has no vae/"):
        pipelines.read(tmp_path / "part")


def test_an_adapter_s_base_is_made_anew_of_its_pipeline(folder, tmp_path, monkeypatch):
    """It lies in the cache, which may be emptied; the folder may move."""
    pytest.importorskip("peft")
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    here, there, file = tmp_path / "sd", tmp_path / "moved", tmp_path / "adapter.safetensors"
    shutil.copytree(folder, here)
    loaded = registry.load_model(here, CPU)
    settings = AdapterRecipe(kind="lora", rank=2)
    made = adapters.add(loaded.model, loaded.checkpoint, settings, 0, registry.file_of(here))
    checkpoint.save(file, loaded.model.state_dict(), made.header)
    (base,) = (tmp_path / "cache" / "pipelines").iterdir()
    assert registry.base_of(checkpoint.load(file)) == str(base)
    base.unlink()
    assert registry.base_of(checkpoint.load(file)) == str(base)
    shutil.rmtree(base.parent)
    here.rename(there)
    with pytest.raises(CheckpointError, match=r"is not there; put the file .*, or set DDO_PIPELINE to the folder of"):
        registry.load_model(file, CPU)
    monkeypatch.setenv("DDO_PIPELINE", str(there))
    found = registry.load_model(file, CPU).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in loaded.model.state_dict().items())
    shutil.rmtree(base.parent)
    (weights,) = (there / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1}, weights)
    with pytest.raises(CheckpointError, match="is an adapter, and its base"):
        registry.load_model(file, CPU)


def settings(folder, source, *more, kind="sd", batch=3):
    """Of a round of two steps, beside the recipe quickstart."""
    finetuning = [
        "batch: 2",
        "images_per_round: 4",
        "eval_every: 4",
        "num_fake: 3",
        "lr: 1.0e-3",
        "warmup: 0",
        "log_every: 1",
    ]
    return [
        f"model.ckpt={folder}", f"data.source={source}",
        f"sampling={{sampler: {FAMILIES[kind].sampling['sampler']}, steps: 1, cfg_scale: 1, batch: {batch}}}",
        "metric={name: fd_embedded, num_images: 3, repeats: 1}", f"finetune={{{', '.join(finetuning)}}}", *more,
    ]  # fmt: skip


def recipe(folder, source, *more, **changed):
    return load("quickstart", settings(folder, source, *more, **changed))


@pytest.mark.slow  # trains
@pytest.mark.parametrize(("kind", "adapter"), [("sd", False), *((kind, True) for kind in KINDS)])
def test_rounds_on_captions(folder_of, here, tmp_path, promoted, kind, adapter):
    if adapter:
        pytest.importorskip("peft")
    from ddo_cli.engines.ddo import finetune

    here = folder_of(kind)
    source = photos(tmp_path / "photos")
    more = ["finetune.rounds=2", "finetune.draw.label_dropout=0.5", "finetune.fake_as=images"]
    if adapter:
        encode.run(str(source), here, tmp_path / "set", device=CPU)
        texts._known.clear()
        more += ["finetune.adapter={kind: lora, rank: 2, alpha: 2}", f"metric.ref={source}"]
    found = finetune.run(
        recipe(here, tmp_path / "set" if adapter else source, *more, kind=kind), tmp_path / "run", device=CPU
    )
    assert len(found["rounds"]) == 2
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first = [next(line for line in log if line.get("round") == number) for number in (1, 2)]
    assert [(line["r_real"], line["r_fake"]) for line in first] == [(0, 0), (0, 0)]
    trained = registry.load_model(found["final"], CPU)
    base = registry.told(registry.load_model(here, CPU), PROMPTS)
    assert trained.checkpoint.header["config"]["options"]["prompts"] == list(PROMPTS)
    spec = sample.spec_of(trained.checkpoint)
    assert (drawn(trained, spec) - drawn(base, spec)).abs().max() > 0
    fakes = open_images(str(tmp_path / "run" / "round-01" / "samples"))
    assert fakes.labels.tolist() == [1, 2, 0]  # one of each caption: seed modulo their number
    if adapter:
        assert all("lora" in name for name in checkpoint.load(found["final"]).tensors)


def test_training_needs_captions(here, tmp_path):
    from ddo_cli.engines.ddo import finetune

    source = photos(tmp_path / "photos")
    for file in source.glob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match=r"has no captions, which a text-to-image model is trained on; write a \.txt"):
        finetune.run(recipe(here, source), tmp_path / "run", device=CPU)


def with_adapter(source, *more):
    """Of a tiny adapter on encoded images."""
    adapter = "finetune.adapter={kind: lora, rank: 2, alpha: 2}"
    return [adapter, f"metric.ref={source}", "finetune.save_every=1", *more]


@pytest.fixture
def promoted(monkeypatch):
    """Every candidate is promoted, so that round 2 starts from round 1's."""
    from ddo_cli.engines.ddo import promotion

    monkeypatch.setattr(promotion, "is_better", lambda gain, margin: True)


def forked(*acts):
    """Exit codes of processes that carry these out; they have imported the libraries, which takes seconds."""
    processes = [multiprocessing.get_context("fork").Process(target=act) for act in acts]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def killed_at(pattern, act):
    """Carries out `act` until SIGKILL ends it as soon as it has written a file of this name."""
    rename = os.replace

    def replace(source, target):
        rename(source, target)
        if fnmatch.fnmatch(str(target), pattern):
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        os.replace = replace
        act()

    assert forked(work) == [-signal.SIGKILL]


@pytest.mark.slow  # trains
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_same_bytes(folder_of, here, tmp_path, promoted, kind):
    """Killed while it draws, and in the first step of each round; texts are read again by each start."""
    pytest.importorskip("peft")
    from ddo_cli.engines.ddo import finetune

    base, source = folder_of(kind), photos(tmp_path / "photos")
    encode.run(str(source), base, tmp_path / "set", device=CPU)
    more = with_adapter(source, "finetune.rounds=2", "finetune.draw.label_dropout=0.5")

    def run(out):
        texts._known.clear()
        texts._table.cache_clear()
        finetune.run(recipe(base, tmp_path / "set", *more, kind=kind, batch=2), tmp_path / out, device=CPU)

    run("whole")
    for place in ("round-01/samples/shard-*", "round-01/train-state.*", "round-02/train-state.*"):
        killed_at(f"*/{place}", lambda: run("killed"))
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    run("killed")
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(files) >= 8  # fake set, candidate and best one of each round, and the final one
    for file in (*files, "state.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow  # trains, in processes of its own
def test_two_processes_end_alike(here, tmp_path):
    """The same fakes to the last bit; weights differ by the order of summation."""
    pytest.importorskip("peft")
    from ddo_cli.engines.ddo import finetune

    source = photos(tmp_path / "photos")
    encode.run(str(source), here, tmp_path / "set", device=CPU)
    given = settings(here, tmp_path / "set", *with_adapter(source, "finetune.rounds=1"), batch=2)
    finetune.run(load("quickstart", given), tmp_path / "one", device=CPU)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def work(rank):
        os.environ.update(group(rank, 2, store.port))
        dist.init("cpu")
        finetune.run(load("quickstart", given), tmp_path / "two", device=CPU)
        dist.shutdown()

    assert forked(*(functools.partial(work, rank) for rank in (0, 1))) == [0, 0]

    def tensors(out, pattern):
        (file,) = (tmp_path / out / "round-01").rglob(pattern)
        return checkpoint.load(file).tensors

    fakes = [open_images(str(tmp_path / out / "round-01" / "samples")) for out in ("one", "two")]
    assert np.array_equal(*(each.items for each in fakes))
    assert np.array_equal(*(each.labels for each in fakes))
    alone, together = (tensors(out, "step-*.safetensors") for out in ("one", "two"))
    assert all(tensor.any() for tensor in alone.values())
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-6)
    logs = [json.loads((tmp_path / out / "log.jsonl").read_text().splitlines()[-1]) for out in ("one", "two")]
    assert logs[1]["processes"] == 2
    for key in ("loss", "r_real", "r_fake", "grad_norm"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-3, abs=1e-6)
