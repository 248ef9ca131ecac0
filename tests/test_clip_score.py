"""The CLIP score of `ddo fid`, against the features of the library transformers."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from conftest import CPU
from test_images import encoded as png
from test_images import write_folder
from tiny_pipeline import make_tokenizer, randomised

from ddo_cli.data.images import open_images
from ddo_cli.engines.fid import fid
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import CheckpointError, DataError, UsageError
from ddo_cli.metrics.extractors import clip_text
from ddo_cli.metrics.scorer import ClipScorer
from ddo_cli.recipe.load import load

CAPTIONS = ("a red cup", "a blue dog", "cup")


def tiny_clip(place):
    """CLIP as transformers writes it."""
    tokenizer = make_tokenizer(place)
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    text = {**shared, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**shared, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(6)
    randomised(transformers.CLIPModel(config), 1.0).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def photos(tmp_path):
    """Three images of 24x20 pixels with captions."""
    rng = np.random.default_rng(0)
    items = rng.integers(0, 100, (3, 3, 24, 20), dtype=np.uint8) + rng.choice([0, 150], (3, 3, 1, 1)).astype(np.uint8)
    content = {f"{row}.png": png(item) for row, item in enumerate(items)}
    write_folder(tmp_path / "photos", content | {f"{row}.txt": text.encode() for row, text in enumerate(CAPTIONS)})
    return items, tmp_path / "photos"


def of_the_library(folder, items):
    """Cosines times 100 by transformers' own processor and `get_..._features`."""
    clip = transformers.CLIPModel.from_pretrained(folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    pixels = processor(list(torch.from_numpy(items)), return_tensors="pt").pixel_values
    ids = make_tokenizer(folder)(list(CAPTIONS), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = clip.get_image_features(pixels), clip.get_text_features(**ids)
    images, texts = (part if isinstance(part, torch.Tensor) else part.pooler_output for part in found)
    return images, texts, 100 * torch.cosine_similarity(images, texts)


def score(source, folder, *metrics, ref=None, **more):
    options = fid.Options(metrics=metrics or ("clip",), weights={"clip": str(folder)}, cache=False, **more)
    return fid.run(str(source), ref, options, device=CPU)


def test_equals_the_library(folder, photos):
    items, source = photos
    images, texts, cosines = of_the_library(folder, items)
    ours = clip_text.load(str(folder))
    torch.testing.assert_close(ours(torch.from_numpy(items)), images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.of_texts(CAPTIONS), texts, rtol=1e-5, atol=1e-5)
    assert cosines.min() < 0 < cosines.max()  # one is cut
    found = score(source, folder)
    assert found["clip"] == pytest.approx(cosines.clamp(min=0).mean().item(), abs=1e-3)
    assert found["clip_std_error"] == pytest.approx(cosines.clamp(min=0).std().item() / 3**0.5, abs=1e-3)
    assert found["reference"] is None  # and none was opened


def test_beside_a_distance_and_of_samples(folder, photos, tmp_path):
    _, source = photos
    alone = score(source, folder)["clip"]
    assert score(source, folder, "clip", "fid", ref=str(source))["clip"] == alone
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for row in range(3):  # as `ddo sample` writes them: a label is the number of its prompt
        shutil.copy(source / f"{row}.png", drawn / f"{row:06d}.png")
    manifest = {
        "format": "png", "num": 3, "seeds": "0-2", "labels": [1, 0, 2], "prompts": ["a blue dog", "a red cup", "cup"],
        "complete": True,
    }  # fmt: skip
    (drawn / "manifest.json").write_text(json.dumps(manifest))
    assert score(drawn, folder)["clip"] == pytest.approx(alone)
    manifest["prompts"] = ["a red cup", "a blue dog", "cup"]
    (drawn / "manifest.json").write_text(json.dumps(manifest))
    assert score(drawn, folder)["clip"] != pytest.approx(alone)
    assert not [warning for warning in score(drawn, folder)["warnings"] if "classes" in warning]  # labels are texts
    for change in ({"prompts": 5}, {"format": "another program's"}):
        (drawn / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(DataError, match="has no captions"):
            score(drawn, folder)
    for label in (-1, 3):
        manifest["labels"] = [1, 0, label]
        (drawn / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=r"labels go from .* to .* where it has 3 captions"):
            score(drawn, folder)


def test_as_the_metric_of_a_run(folder, photos):
    """What is left to 100, so that lower is better; labels are the numbers of captions, in any order and cut."""
    items, source = photos
    scorer, images = ClipScorer(clip_text.load(str(folder)), CAPTIONS), torch.from_numpy(items)
    batches = [(images[[2, 0]], torch.tensor([2, 0])), (images[1:2], torch.tensor([1]))]
    found = scorer.score(batches)
    assert found["clip"] == pytest.approx(score(source, folder)["clip"])
    assert found["clip_distance"] == 100 - found["clip"]
    assert scorer.score(batches[::-1]) == found
    swapped = scorer.score([(images, torch.tensor([0, 0, 2]))])
    assert swapped["clip"] != pytest.approx(found["clip"])
    assert (swapped["clip"] < found["clip"]) == (swapped["clip_distance"] > found["clip_distance"])
    with pytest.raises(DataError, match="needs images"):
        scorer.score([])


def test_runs_that_have_no_captions(folder, photos):
    _, source = photos
    real, plain = open_images(str(source)), open_images("embedded:digits32", 4)

    def scoring(real, reads_text, *more):
        settings = load("quickstart", ["metric.name=clip", f"metric.weights={folder}", *more])
        return Scoring(settings, real, settings.sampling, CPU, reads_text)

    assert scoring(real, True).key == "clip_distance"
    with pytest.raises(UsageError, match=r"compares images with the captions .* and this model reads no text; choose"):
        scoring(real, False)
    with pytest.raises(UsageError, match="and embedded:digits32 has none; choose another metric"):
        scoring(plain, True)
    with pytest.raises(UsageError, match=r"metric\.ref = photos has no effect .*; set metric\.ref = null"):
        scoring(real, True, "metric.ref=photos")


def test_what_is_refused(folder, photos, tmp_path):
    _, source = photos
    with pytest.raises(UsageError, match="'clip' needs the weights of CLIP; give a folder"):
        fid.run(str(source), None, fid.Options(metrics=("clip",)), device=CPU)
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        score(source, tmp_path)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        score(source, "nowhere")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="CLIP cannot be loaded") as raised:
        score(source, broken)
    assert len(str(raised.value).replace(str(tmp_path), "")) <= 300
    for file in source.glob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match="has no captions, which the CLIP score compares"):
        score(source, folder)


def test_long_captions_are_cut(folder, capsys):
    ours = clip_text.load(str(folder))
    long = "a " * 30
    torch.testing.assert_close(ours.of_texts([long]), ours.of_texts(["a " * 14]))
    assert "1 captions are longer than CLIP's 16 tokens" in capsys.readouterr().err
