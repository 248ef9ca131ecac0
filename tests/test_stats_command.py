"""`ddo stats`: what it writes are the moments of the images, whoever shares the work and however they are kept."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, torchrun
from PIL import Image

from ddo_cli import checkpoint
from ddo_cli.data.images import open_images
from ddo_cli.engines.fid import fid, stats
from ddo_cli.engines.weights import info
from ddo_cli.errors import DataError, UsageError
from ddo_cli.metrics.extractors.base import Extractor
from ddo_cli.metrics.extractors.select import load_extractor
from ddo_cli.metrics.references import read_reference

NUM = 90  # more than the 64 features of the embedded extractor


@pytest.fixture(scope="module")
def items() -> np.ndarray:
    return open_images("embedded:digits32", NUM).items  # (N, 3, 32, 32)


@pytest.fixture(scope="module")
def sets(items, tmp_path_factory) -> Path:
    """The same images as a folder, a zip of it, an .npz, and an .npz in another order."""
    root = tmp_path_factory.mktemp("sets")
    (root / "folder").mkdir()
    for place, image in enumerate(items):
        Image.fromarray(image.transpose(1, 2, 0)).save(root / "folder" / f"{place:03d}.png")
    with zipfile.ZipFile(root / "zip.zip", "w") as archive:
        for file in sorted((root / "folder").iterdir()):
            archive.write(file, file.name)
    np.savez(root / "npz.npz", arr_0=items.transpose(0, 2, 3, 1))
    np.savez(root / "shuffled.npz", images=np.random.default_rng(0).permutation(items))
    return root


def run(source, out, **options):
    return stats.run(str(source), out, **{"metric": "fd_embedded", "device": CPU, **options})


def test_moments_and_features(sets, items, tmp_path):
    found = run(sets / "npz.npz", tmp_path / "ref.safetensors", features=True, batch=32)
    extractor = load_extractor()
    expected = extractor(torch.from_numpy(items)).double()
    reference = read_reference(tmp_path / "ref.safetensors")
    moments = reference.statistics(extractor)
    torch.testing.assert_close(moments.mean, expected.mean(0), rtol=1e-6, atol=1e-6)  # float32 features, other batches
    torch.testing.assert_close(moments.cov, torch.cov(expected.T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reference.features(extractor).double(), expected, rtol=1e-5, atol=1e-5)
    assert reference.protocol == extractor.protocol()
    assert reference.data["digest"] == found["data_digest"]
    assert (found["metric"], found["num_images"], moments.num_images) == ("fd_embedded", NUM, NUM)
    described = info.run(str(tmp_path / "ref.safetensors"))
    assert described["protocol"] == extractor.protocol()
    assert described["data"]["num_images"] == NUM


def test_a_score_against_it_is_one_against_the_images(sets, tmp_path):
    run(sets / "npz.npz", tmp_path / "ref.safetensors")
    np.savez(tmp_path / "other.npz", images=open_images("embedded:digits32-b", NUM).items)
    scores = [
        fid.run(str(tmp_path / "other.npz"), str(ref), device=CPU)["fd_embedded"]
        for ref in (tmp_path / "ref.safetensors", sets / "npz.npz")
    ]
    assert scores[0] > 1
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_containers_order_and_batches(sets, tmp_path):
    """One digest, and moments that differ by rounding, for every way of keeping and reading the images."""
    found = {}
    for name, batch in (("folder", 64), ("zip.zip", 64), ("npz.npz", 1), ("shuffled.npz", 7)):
        out = tmp_path / f"{name}.safetensors"
        digest = run(sets / name, out, batch=batch)["data_digest"]
        found[name] = (digest, read_reference(out).statistics(load_extractor()))
    assert len({digest for digest, _ in found.values()}) == 1
    first = found["folder"][1]
    for _, other in found.values():
        for ours, theirs in zip(other[:2], first[:2], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-6  # float32 features of other batches
    torch.testing.assert_close(found["zip.zip"][1].cov, first.cov, rtol=0, atol=0)


class TwoOutputs(Extractor):
    """Pool features are the mean colours; spatial ones the first 2023 values."""

    key, resize, outputs = "fid", "none", ("pool", "logits", "spatial")

    def __init__(self):
        super().__init__("two-outputs", 3, "f" * 64, CPU)

    def _extract(self, images, outputs):
        found = {"pool": images.float().mean((2, 3)), "spatial": images.float().flatten(1)[:, :2023] / 255}
        return {name: found[name] for name in outputs}


def test_spatial_features_are_kept_where_there_are_some(sets, items, tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "select_extractor", lambda *_, **more: TwoOutputs())
    run(sets / "npz.npz", tmp_path / "ref.safetensors", metric="fid")
    reference = read_reference(tmp_path / "ref.safetensors")
    found = reference.statistics(TwoOutputs(), "spatial")
    expected = items.reshape(NUM, -1)[:, :2023] / 255.0
    np.testing.assert_allclose(found.mean.numpy(), expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.cov.numpy(), np.cov(expected.T), atol=1e-6)
    assert reference.statistics(TwoOutputs()).mean.shape == (3,)
    monkeypatch.undo()
    run(sets / "npz.npz", tmp_path / "plain.safetensors")
    plain = read_reference(tmp_path / "plain.safetensors")
    with pytest.raises(DataError, match="no spatial features"):
        plain.statistics(load_extractor(), "spatial")


def test_a_finished_file_is_left_as_it_is(sets, tmp_path, monkeypatch):
    out = tmp_path / "ref.safetensors"
    first = run(sets / "folder", out)
    written = out.stat().st_mtime_ns
    monkeypatch.setattr(Extractor, "extract", None)  # nothing is computed
    again = run(sets / "zip.zip", out)  # the same images
    assert again == first
    assert out.stat().st_mtime_ns == written


def test_other_content_is_not_overwritten(sets, items, tmp_path, monkeypatch):
    out = tmp_path / "ref.safetensors"
    run(sets / "npz.npz", out)
    content = out.read_bytes()
    changed = items.copy()
    changed[5, 0, 3, 3] ^= 1
    np.savez(tmp_path / "changed.npz", images=changed)
    for source, options, match in (
        (tmp_path / "changed.npz", {}, "of other images.*digest: "),
        (sets / "npz.npz", {"num": 80}, "num_images: 90 -> 80"),
        (sets / "npz.npz", {"features": True}, "features: False -> True"),
    ):
        with pytest.raises(UsageError, match=match):
            run(source, out, **options)
    monkeypatch.setattr(stats, "select_extractor", lambda *_, **more: TwoOutputs())
    with pytest.raises(UsageError, match=r"something else.*nothing of fid"):
        run(sets / "npz.npz", out)
    monkeypatch.undo()
    model = tmp_path / "model.safetensors"
    checkpoint.save(model, {}, {"kind": "model"})
    with pytest.raises(UsageError, match="kind 'model'"):
        run(sets / "npz.npz", model)
    assert out.read_bytes() == content


@pytest.mark.parametrize("name", ["ref.npz", "ref", "."])
def test_wrong_out(sets, tmp_path, name):
    with pytest.raises(UsageError, match=r"must be a file that ends in \.safetensors"):
        run(sets / "npz.npz", tmp_path / name)


def test_too_few_images(sets, tmp_path, capsys):
    with pytest.raises(DataError, match="holds one image"):
        run(sets / "npz.npz", tmp_path / "a.safetensors", num=1)
    run(sets / "npz.npz", tmp_path / "b.safetensors", num=20)
    assert "rank-deficient" in capsys.readouterr().err


def test_a_dry_run_and_a_broken_image_leave_no_file(sets, tmp_path):
    found = run(sets / "npz.npz", tmp_path / "out" / "a.safetensors", dry_run=True)
    assert found["num_images"] == NUM
    (tmp_path / "images").mkdir()
    for place, file in enumerate(sorted((sets / "folder").iterdir())):
        content = file.read_bytes()
        (tmp_path / "images" / file.name).write_bytes(content[:60] if place == 80 else content)
    with pytest.raises(DataError, match=r"080\.png"):
        run(tmp_path / "images", tmp_path / "out" / "b.safetensors")
    assert not (tmp_path / "out").exists()


def test_the_command_on_two_processes(sets, tmp_path):
    """Equal to one process, as the batches are, up to the order of sums."""
    given = ["-m", "ddo_cli", "stats", str(sets / "folder"), "--metric", "fd_embedded", "--batch", "16", "--features"]
    two, one = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    done = torchrun(*given, "--out", str(two), "--json")
    found = json.loads(done.stdout)
    run(sets / "folder", one, batch=16, features=True)
    left, right = (read_reference(path) for path in (two, one))
    assert left.data == right.data
    assert found["data_digest"] == right.data["digest"]
    extractor = load_extractor()
    for ours, theirs in zip(left.statistics(extractor)[:2], right.statistics(extractor)[:2], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-9
    torch.testing.assert_close(left.features(extractor), right.features(extractor), rtol=0, atol=0)


def test_a_mistake_is_one_message(ddo, sets, tmp_path):
    given = ["stats", str(sets / "npz.npz"), "--out", str(tmp_path / "x.safetensors"), "--metric", "fdi", "--json"]
    assert "'--metric': 'fdi' is not one of 'fid'" in json.loads(ddo(*given, code=2).stdout)["error"]["message"]
