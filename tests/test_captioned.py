"""Text to image with a small network of one's own: benchmarks/captioned_unet.py on captioned digits."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, torchrun
from PIL import Image

from ddo_cli import checkpoint
from ddo_cli.data.images import open_images
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.ddo.round import fake_spec
from ddo_cli.engines.discriminator import classifier
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.edit import edit
from ddo_cli.engines.pretrain import extractor
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.engines.sampling import guide_sample, guides, sample
from ddo_cli.errors import DataError, UsageError
from ddo_cli.files import sha256
from ddo_cli.models import registry
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import FinetuneRecipe, SamplingRecipe
from ddo_cli.rng import RowRng

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def captioned_digits():
    spec = importlib.util.spec_from_file_location("captioned_digits", BENCHMARKS / "captioned_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.NUM = 40
    return module


@pytest.fixture(scope="module")
def digits():
    return captioned_digits()


@pytest.fixture(scope="module")
def root(digits, tmp_path_factory):
    """40 images of each part."""
    place = tmp_path_factory.mktemp("captioned")
    digits.make(place)
    return place


def recipe(root, *more, adapter=False):
    """The benchmark's, of two steps."""
    file = root / "recipe.yaml"
    content = yaml.safe_load((BENCHMARKS / "captioned-digits.yaml").read_text())
    content["data"]["source"], content["metric"]["ref"] = str(root / "train"), str(root / "held-out")
    content["model"]["file"] = str(BENCHMARKS / "captioned_unet.py")
    content["model"]["ckpt"] = str(root / "base" / "final.safetensors")
    content["sampling"] |= {"steps": 2, "batch": 8}
    content["metric"] |= {"num_images": 8, "repeats": 1}
    content["pretrain"] |= {"images": 16, "batch": 8, "warmup": 0}
    content["finetune"] |= {"batch": 8, "images_per_round": 16, "eval_every": 16, "num_fake": 8, "warmup": 0}
    if not adapter:  # peft takes seconds to import
        del content["finetune"]["adapter"]
    file.write_text(yaml.safe_dump(content))
    return load(str(file), list(more))


@pytest.fixture(scope="module")
def base(root):
    """The result of `ddo pretrain`."""
    return pretrain.run(recipe(root), root / "base", device=CPU)


def test_images_show_their_captions(digits, root, tmp_path):
    captions = open_images(str(root / "train")).captions
    assert len(captions) == 40
    assert {digits.read(text).ink for text in captions} <= set(digits.COLOURS)
    assert digits.accuracy(str(root / "train"))["caption"] == 1
    swapped = root / "train" / "00000.txt"
    before = swapped.read_text()
    said = digits.read(before)
    swapped.write_text(f"a {said.paper} {said.digit} on {said.ink}")
    found = digits.accuracy(str(root / "train"))
    swapped.write_text(before)
    assert (found["digit"], found["ink"], found["paper"]) == (1, 39 / 40, 39 / 40)


def test_pretraining_on_captions(root, base):
    loaded = registry.load_model(base["final"], CPU)
    options = loaded.checkpoint.header["config"]["options"]
    captions = open_images(str(root / "train")).captions
    assert tuple(options["prompts"]) == captions
    assert loaded.model.num_classes == 40
    spec = sample.spec_of(loaded.checkpoint)
    told = registry.told(loaded, [captions[3], captions[0]], captions[1])
    found = told.model.sample(torch.tensor([0, 1, -1]), RowRng([5, 5, 5]), spec).x
    again = registry.told(loaded, captions)
    expected = again.model.sample(torch.tensor([3, 0, 1]), RowRng([5, 5, 5]), spec).x
    assert torch.equal(found, expected)
    assert (found[0] - found[1]).abs().max() > 0
    with pytest.raises(UsageError, match="the word 'cup' is not known; known: a, on, zero"):
        registry.told(loaded, ["a red cup on blue"])


def test_captions_are_needed(root, tmp_path):
    bare = tmp_path / "bare.npz"
    np.savez(bare, arr_0=np.zeros((40, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"has no captions, which a text-to-image model is trained on; write a \.txt"):
        pretrain.run(recipe(root, f"data.source={bare}"), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_samples_of_prompts_are_judged(digits, root, base, tmp_path):
    found = sample.run(base["final"], range(4), tmp_path / "drawn", device=CPU)
    assert found["num_images"] == 4
    manifest = json.loads((tmp_path / "drawn" / "manifest.json").read_text())
    assert manifest["prompts"] == list(checkpoint.load(base["final"]).header["config"]["options"]["prompts"])
    assert 0 <= digits.accuracy(str(tmp_path / "drawn"))["caption"] < 1  # two steps of training


def test_guided_fakes(root, base, tmp_path):
    """finetune.fake_cfg is of fake sets alone; without an image without label there is nothing to guide away from."""
    finetune.run(recipe(root, "finetune.fake_cfg=3.0"), tmp_path / "run", device=CPU)
    drawn = json.loads((tmp_path / "run" / "round-01" / "samples" / "manifest.json").read_text())
    assert drawn["sampling"]["cfg_scale"] == 3
    (candidate,) = (tmp_path / "run" / "round-01").rglob("step-*.safetensors")
    assert "cfg_scale" not in checkpoint.load(candidate).header["sampling"]
    for ckpt, lacks in (
        ("embedded:digits16", "was trained without dropping labels"), ("embedded:toy2d", "has no classes or captions"),
    ):  # fmt: skip
        file, settings = checkpoint.load(ckpt), FinetuneRecipe(fake_cfg=1.5)
        with pytest.raises(UsageError, match=rf"fake_cfg = 1\.5 guides away .* {ckpt} {lacks}; leave it out"):
            fake_spec(settings, SamplingRecipe(), file)
        assert fake_spec(FinetuneRecipe(fake_cfg=1.0), SamplingRecipe(), file).cfg_scale == 1
    with pytest.raises(UsageError, match="has no classes or captions"):
        finetune.run(load("toy2d", ["finetune.fake_cfg=2.0"]), tmp_path / "other", device=CPU)


@pytest.mark.slow  # transformers takes seconds to import
def test_candidates_are_chosen_by_the_clip_score(root, base, tmp_path):
    pytest.importorskip("transformers")
    from test_clip_score import tiny_clip

    (tmp_path / "clip").mkdir()
    weights = tiny_clip(tmp_path / "clip")
    more = ["metric.name=clip", f"metric.weights={weights}", "metric.ref=null", "metric.repeats=2"]
    more += ["finetune.rounds=2", "finetune.images_per_round=32", "finetune.eval_every=8", "finetune.lr=1e-3"]
    found = finetune.run(recipe(root, *more), tmp_path / "run", device=CPU)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert found["metric"] == state["metric"] == "clip_distance"
    before = state["reference"]
    for record in state["rounds"]:
        scores = {int(step) * 8: figures["clip"] for step, figures in record["candidates"].items()}
        assert len(set(scores.values())) == 4
        assert record["best_images"] == max(scores, key=scores.get)
        gain = record["improvement"]["value"]
        assert record["promoted"] == (gain > 0)
        if record["promoted"]:
            means = [np.mean([figures["clip"] for figures in each["promotion"]]) for each in (before, record)]
            assert means[1] - means[0] == pytest.approx(gain)  # the promoted one has the higher score
            before = record
    assert any(record["promoted"] for record in state["rounds"])
    assert "100 minus the CLIP score" in (tmp_path / "run" / "report.html").read_text()


def discriminating(root, *more):
    settings = {"num_fake": 40, "held_out": 16, "images": 8, "batch": 4, "eval_every": 8, "warmup": 0}
    return recipe(root, *(f"discriminator.{key}={value}" for key, value in settings.items()), *more)


@pytest.mark.slow  # trains
def test_a_discriminator_beside_captions(root, base, tmp_path, capsys):
    """It reads no text; the model that it guides does."""
    with pytest.raises(UsageError, match=r"conditional = true: the labels of .* are prompts"):
        train_disc.run(discriminating(root, "discriminator.conditional=true"), tmp_path / "disc", device=CPU)
    found = train_disc.run(discriminating(root), tmp_path / "disc", device=CPU)
    assert "the discriminator sees no captions" in capsys.readouterr().err
    assert checkpoint.load(found["final"]).header["config"]["num_classes"] == 0
    drawn = json.loads((tmp_path / "disc" / "samples" / "manifest.json").read_text())
    assert drawn["prompts"] == list(open_images(str(root / "train")).captions)
    prompts = ["a red one on blue", "a blue two on white"]
    sets = {}
    for weight in (0.0, 2.0):
        out, guidance = tmp_path / f"weight-{weight:g}", {"dg_weight": weight}
        guide_sample.run(
            found["final"], None, range(2), out, prompts=(prompts, None), guidance=guidance, device=CPU, form="npz"
        )
        sets[weight] = open_images(str(out)).items
        assert json.loads((out / "manifest.json").read_text())["prompts"] == prompts
    plain = registry.told(registry.load_model(base["final"], CPU), prompts)
    sample.run(plain, range(2), tmp_path / "plain", device=CPU, form="npz")
    assert np.array_equal(sets[0.0], open_images(str(tmp_path / "plain")).items)
    assert not np.array_equal(sets[2.0], sets[0.0])


def test_what_reads_classes_refuses_captions(root, base, tmp_path):
    source, loaded = str(root / "train"), registry.load_model(base["final"], CPU)
    with pytest.raises(DataError, match="has captions, and a classifier is of classes"):
        classifier.run(recipe(root), tmp_path / "classifier", device=CPU)
    with pytest.raises(DataError, match="has captions, and an extractor's training is of classes"):
        extractor.run(source, tmp_path / "x.safetensors", held_out=None, images=16, seed=0, device=CPU)
    with pytest.raises(UsageError, match="ddo edit takes no prompts"):
        edit.run(source, tmp_path / "edited", [1.0], ckpt=base["final"], device=CPU)
    with pytest.raises(UsageError, match="reads no prompts, and the model does"):
        guides.of_plain_sampling(guides.Others("embedded:digits16", 2.0), loaded, CPU)
    with pytest.raises(UsageError, match="tells classes, and the model's labels are prompts"):
        guides.other_guides(guides.Others(classifier="c.safetensors"), loaded.model, CPU)


def test_a_network_of_classes_ignores_captions(root, tmp_path, capsys):
    found = pretrain.run(load("quickstart", [
        f"data.source={root / 'train'}", "pretrain={images: 8, batch: 8}", "metric={num_images: 8, repeats: 1}",
        "sampling.steps=2",
    ]), tmp_path / "run", device=CPU)  # fmt: skip
    assert registry.load_model(found["final"], CPU).model.num_classes == 0
    assert "captions are not read" in capsys.readouterr().err


def test_autoguidance_by_the_same_prompts(root, base):
    """A second network is told the prompts of the first, whatever its own are."""
    loaded = registry.told(registry.load_model(base["final"], CPU), ["a red one on blue"], "a blue two on white")
    guided, _ = guides.of_plain_sampling(guides.Others(base["final"], 2.0), loaded, CPU)
    spec, labels, rng = sample.spec_of(loaded.checkpoint), torch.tensor([0, -1]), RowRng([1, 2])
    # The same weights: D + (2 - 1) (D - D) = D.
    found = guided.model.sample(labels, rng, spec).x
    torch.testing.assert_close(found, loaded.model.sample(labels, RowRng([1, 2]), spec).x)


# --- Bad input, at the command line


def refused(ddo, *line):
    """The one message of a line that must end with exit code 2 and without a directory of a run."""
    lines = ddo(*line, "--out", "run", code=2).stderr.splitlines()
    (message,) = [text for text in lines if text.startswith("error: ")]
    assert lines[-1] == message
    assert not Path("run").exists()
    return message.replace(str(Path.cwd()), "").replace(str(Path.cwd().parent), "")


def spoilt(folder, remove=(), **texts):
    """Eight images with captions, then changed: files are removed, and texts are written."""
    levels, digits = np.full((8, 8, 8), 8, dtype=np.uint8), np.arange(8)
    module = captioned_digits()
    module.NUM = 8
    module.write(folder, module.render(0, levels, digits))
    for name in remove:
        (folder / name).unlink()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_bad_data_is_one_message(root, base, ddo, tmp_path):
    recipe(root)
    line = ["finetune-ddo", "--recipe", root / "recipe.yaml", "--data"]
    lonely = spoilt(tmp_path / "lonely", remove=["00003.png"])
    assert "caption 00003.txt has no image of its name; add the image" in refused(ddo, *line, lonely)
    bare = spoilt(tmp_path / "bare", remove=["00003.txt"])
    assert "image 00003.png has no caption; write it into 00003.txt" in refused(ddo, *line, bare)
    (tmp_path / "empty").mkdir()
    assert "empty holds no images" in refused(ddo, *line, tmp_path / "empty")
    mixed = spoilt(tmp_path / "mixed")
    Image.open(mixed / "00003.png").resize((8, 8)).save(mixed / "00003.png")
    assert "all images must have one size" in refused(ddo, *line, mixed)
    unknown = spoilt(tmp_path / "unknown", **{"00003": "a cup"})
    message = refused(ddo, *line, unknown)
    assert "prompt 'a cup': the word 'cup' is not known" in message
    assert len(message) <= 300


def test_bad_models_are_one_message(root, base, ddo, tmp_path):
    place = tmp_path / "base.safetensors"
    shutil.copy(base["final"], place)
    header = checkpoint.load(place).header
    adapter = {"kind": "lora", "rank": 1, "alpha": 1.0, "targets": ["conv1"]}
    origin = {"path": str(place), "sha256": "0" * 64}
    checkpoint.save(
        tmp_path / "lora.safetensors", {"x": torch.zeros(1)}, {**header, "adapter": adapter, "base": origin}
    )
    line = ["sample", "--model-file", BENCHMARKS / "captioned_unet.py", "--num-images", 2, "--ckpt"]
    message = refused(ddo, *line, tmp_path / "lora.safetensors")
    assert "is an adapter, and its base" in message
    assert "is another file now; put the file with the SHA-256 0000" in message
    index = {"_class_name": "StableCascadePipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    assert "is a StableCascadePipeline; of text-to-image" in refused(ddo, *line, tmp_path / "other")


@pytest.mark.slow  # diffusers takes seconds to import
def test_a_distilled_base_is_one_message(ddo, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from tiny_pipeline import make_pipeline

    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    folder = make_pipeline(tmp_path / "sd-turbo")
    message = refused(ddo, "sample", "--prompt", "a cup", "--ckpt", folder)
    assert "is distilled to few steps, as sd-turbo tells" in message
    assert len(message) <= 300


# --- Several processes


@pytest.mark.slow  # trains, in processes of its own
def test_two_processes_end_alike(root, base, tmp_path):
    pytest.importorskip("peft")
    before = sha256(Path(base["final"]))
    recipe(root, adapter=True)
    line = ["-m", "ddo_cli", "finetune-ddo", "--recipe", root / "recipe.yaml", "--device", "cpu"]
    line += ["finetune.save_every=1", "finetune.log_every=1", "finetune.images_per_round=32", "finetune.eval_every=32"]

    def weights(out):
        return checkpoint.load(next((out / "round-01").rglob("step-*.safetensors"))).tensors

    whole, two = tmp_path / "whole", tmp_path / "two"
    torchrun(*map(str, line), "--out", str(whole), processes=1)
    first = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert (first["r_real"], first["r_fake"], first["r_std"]) == (0, 0, 0)
    assert all(tensor.any() for tensor in weights(whole).values())  # B, too, which starts at 0
    assert sha256(Path(base["final"])) == before
    torchrun(*map(str, line), "--out", str(two))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-4, atol=1e-6)
    manifests = [json.loads((out / "round-01" / "samples" / "manifest.json").read_text()) for out in (whole, two)]
    assert manifests[0] == manifests[1]
