"""What `ddo fid` takes: the same images in every container, models, repeats, references of every kind, the cache."""

import csv
import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, make_checkpoint, torchrun
from launch import launch
from PIL import Image

from ddo_cli import cli
from ddo_cli.data.images import open_images
from ddo_cli.engines.fid import fid, one_pass, stats
from ddo_cli.engines.fid import inputs as fid_inputs
from ddo_cli.engines.fid import report as fid_report
from ddo_cli.engines.sampling import sample
from ddo_cli.errors import DataError, UsageError
from ddo_cli.metrics.extractors.select import EMBEDDED_EXTRACTOR, NetworkExtractor, load_extractor
from ddo_cli.metrics.scorer import moments_of, share_of_batches

NUM = 200
# The network's sums are ordered by where an image lies in its batch (1e-7 of a feature), and the distance of close sets
# is a difference of near numbers: 20 times that and more.
BATCH_RTOL = 1e-5


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    """uint8 (N, C, 32, 32) and labels, of the reference and of a noisier set."""
    ref, other = open_images("embedded:digits32", NUM), open_images("embedded:digits32-b", NUM)
    noise = 30 * np.random.default_rng(1).normal(size=other.items.shape)
    return {
        "ref": ref.items,
        "ref_labels": ref.labels,
        "set": (other.items + noise).clip(0, 255).astype(np.uint8),
        "set_labels": other.labels,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory, images) -> Path:
    """The two sets as .npz, and the second one as folder, nested folder, zip, compressed .npz and in another order."""
    root = tmp_path_factory.mktemp("inputs")
    for name in ("ref", "set"):
        np.savez(root / f"{name}.npz", images=images[name], labels=images[f"{name}_labels"])
    np.savez_compressed(root / "packed.npz", arr_0=images["set"].transpose(0, 2, 3, 1))
    order = np.random.default_rng(2).permutation(NUM)
    np.savez(root / "shuffled.npz", samples=images["set"][order])
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for number, row in enumerate(order):
            file = io.BytesIO()
            pixels = images["set"][row].transpose(1, 2, 0)
            Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(file, "png")
            archive.writestr(f"{row:04d}.png", file.getvalue())
            for place in (root / "folder" / f"{number}.png", root / "deep" / str(row % 3) / f"{row}.png"):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.getvalue())
    return root


def score(source, ref, *, log=None, benchmark=None, dry_run=False, **options):
    settings = fid.Options(**{"extractor": EMBEDDED_EXTRACTOR, "batch": 64, "cache": False, **options})
    return fid.run(str(source), str(ref), settings, device=CPU, log=log, benchmark=benchmark, dry_run=dry_run)


ALL = ("fid", "precision", "recall", "density", "coverage")


def figures(found: dict) -> dict:
    return {key: value for key, value in found.items() if isinstance(value, float) and "per_second" not in key}


@pytest.mark.parametrize("name", ["folder", "deep", "set.zip", "packed.npz", "shuffled.npz"])
def test_container_and_order_do_not_matter(root, name):
    first, found = (score(root / one, root / "ref.npz", metrics=ALL) for one in ("set.npz", name))
    assert found["content_digest"] == first["content_digest"]
    assert figures(found) == pytest.approx(figures(first), rel=BATCH_RTOL)
    assert found["fd_embedded"] > 0.01


def test_batch_and_workers_do_not_matter(root):
    first = score(root / "folder", root / "ref.npz", metrics=ALL)
    for options in ({"batch": 1}, {"workers": 2}, {"batch": 7, "workers": 1}):
        found = score(root / "folder", root / "ref.npz", metrics=ALL, **options)
        assert figures(found) == pytest.approx(figures(first), rel=BATCH_RTOL)
    assert figures(score(root / "folder", root / "ref.npz", metrics=ALL, workers=2)) == figures(first)


def test_two_processes_equal_one(root, tmp_path):
    arguments = [root / "folder", "--ref", root / "ref.npz", "--extractor", EMBEDDED_EXTRACTOR, "--batch", "32"]
    arguments += ["--metrics", ",".join(ALL), "--uncertainty", "--no-cache", "--json"]
    done = torchrun("-m", "ddo_cli", "fid", *map(str, arguments))
    found = json.loads(done.stdout.strip().splitlines()[-1])
    one = score(root / "folder", root / "ref.npz", metrics=ALL, batch=32, uncertainty=True)
    assert figures(found) == pytest.approx(figures(one), rel=1e-9)
    assert found["content_digest"] == one["content_digest"]


def by_two(source: Path, ref: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """`ddo fid` on two processes, which may fail."""
    command = ["-m", "ddo_cli", "fid", source, "--ref", ref, "--extractor", EMBEDDED_EXTRACTOR, *options]
    return launch(*map(str, command), "--batch", "32", "--json", processes=2)


def test_an_image_broken_for_one_process_ends_both(root, tmp_path):
    """Left alone, the other process would wait in the first sum, and break down with a traceback of its own."""
    for path in (root / "folder").iterdir():
        shutil.copy(path, tmp_path)
    last = sorted(tmp_path.iterdir())[40]  # in the second batch of 32, which is the second process's
    last.write_bytes(last.read_bytes()[:100])
    done = by_two(tmp_path, root / "ref.npz")
    assert done.returncode != 0
    assert f"{last.name} cannot be read as an image" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Models


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(make_checkpoint(tmp_path_factory.mktemp("model") / "final.safetensors"))


def test_model_equals_its_samples(model, root, tmp_path):
    drawn = score(model, root / "ref.npz", num=48, metrics=ALL)
    assert drawn["num_images"] == 48
    assert figures(score(model.parent, root / "ref.npz", num=48, metrics=ALL)) == figures(drawn)  # a run's directory
    for form in ("png", "npz", "shards"):
        sample.run(model, range(48), tmp_path / form, form=form, device=CPU)
        found = score(tmp_path / form, root / "ref.npz", metrics=ALL)
        assert found["content_digest"] == drawn["content_digest"]
        assert figures(found) == pytest.approx(figures(drawn), rel=BATCH_RTOL)
    other = score(model, root / "ref.npz", num=48, metrics=ALL, sampling={"steps": 5})
    assert other["fd_embedded"] != drawn["fd_embedded"]


def test_repeats_are_ranges_of_seeds(model, root, tmp_path):
    both = score(model, root / "ref.npz", num=24, repeat=2)
    alone = []
    for first in (0, 24):
        sample.run(model, range(first, first + 24), tmp_path / str(first), form="npz", device=CPU)
        alone.append(score(tmp_path / str(first), root / "ref.npz")["fd_embedded"])
    assert [one["fd_embedded"] for one in both["repeats"]] == pytest.approx(alone, rel=BATCH_RTOL)
    assert both["fd_embedded"] == pytest.approx(sum(alone) / 2, rel=BATCH_RTOL)
    assert both["fd_embedded_min"] == pytest.approx(min(alone), rel=BATCH_RTOL)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)


def test_repeats_of_images_are_parts_in_order(root, images, tmp_path):
    both = score(root / "set.npz", root / "ref.npz", repeat=2)
    for part, found in enumerate(both["repeats"]):
        np.savez(tmp_path / "part.npz", images=images["set"][part * NUM // 2 :][: NUM // 2])
        expected = score(tmp_path / "part.npz", root / "ref.npz")["fd_embedded"]
        assert found["fd_embedded"] == pytest.approx(expected, rel=BATCH_RTOL)


# ---------------------------------------------------------------------------------------------------------------------
# References


def test_every_kind_of_reference(root, images, tmp_path):
    expected = score(root / "set.npz", root / "ref.npz", metrics=ALL)
    moments = moments_of(load_extractor(), share_of_batches(images["ref"], 64))
    mu, sigma = moments.mean.numpy(), moments.cov.numpy()
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, arr_0=images["ref"].transpose(0, 2, 3, 1))
    content = {"num_images": NUM, "fid": {"mu": mu[:9], "sigma": sigma[:9, :9]}}
    content["fd_embedded"] = {"mu": mu, "sigma": sigma}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(content))
    for kept in (False, True):
        out = tmp_path / f"stats{kept}.safetensors"
        stats.run(str(root / "ref.npz"), out, metric="fd_embedded", features=kept, batch=64, device=CPU)
    for name in ("edm.npz", "adm.npz", "edm2.pkl", "statsFalse.safetensors", "statsTrue.safetensors"):
        found = score(root / "set.npz", tmp_path / name)
        assert found["fd_embedded"] == pytest.approx(expected["fd_embedded"], rel=1e-9)
    for name in ("adm.npz", "statsTrue.safetensors"):  # they hold each image, or its features
        assert figures(score(root / "set.npz", tmp_path / name, metrics=ALL)) == pytest.approx(figures(expected))


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """Titles of the passes over images."""
    titles, run = [], one_pass.run

    def counted(*arguments, **options):
        titles.append(arguments[-1])
        return run(*arguments, **options)

    monkeypatch.setattr(one_pass, "run", counted)
    return titles


def test_weights_go_to_their_networks(root, monkeypatch):
    asked = {}

    def select(metric, weights, *_):
        asked[metric] = weights
        return load_extractor()

    monkeypatch.setattr(fid, "select_extractor", select)
    ref = root / "ref.npz"
    for metrics, weights, expected in (
        (("fid", "fd_clip"), "a.pth", {"fid": "a.pth", "fd_clip": None}),
        (("fd_clip",), "a.pth", {"fd_clip": "a.pth"}),
        (("fid", "fd_clip"), {"fd_clip": "c.pt", "fid": "a.pth"}, {"fid": "a.pth", "fd_clip": "c.pt"}),
        (("precision", "fd_clip"), {"fd_clip": "c.pt"}, {"fid": None, "fd_clip": "c.pt"}),
    ):
        asked.clear()
        score(root / "set.npz", ref, metrics=metrics, weights=weights, extractor=None, dry_run=True)
        assert asked == expected
    with pytest.raises(UsageError, match=r"fd_clip=c.pt has no effect: the metrics fid need the networks fid"):
        score(root / "set.npz", ref, weights={"fd_clip": "c.pt"}, extractor=None, dry_run=True)


def test_a_picture_that_cannot_be_written_ends_both(root, tmp_path):
    (tmp_path / "file").write_text("where the directory should be")
    done = by_two(root / "set.npz", root / "ref.npz", "--nearest", 3, "--pictures", tmp_path / "file" / "pictures")
    assert done.returncode != 0
    assert "Not a directory" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr


def test_compared_sets_are_opened_once(root, monkeypatch):
    opened, comparable = [], fid_inputs.comparable
    monkeypatch.setattr(fid_inputs, "comparable", lambda *given: opened.append(given[0]) or comparable(*given))
    monkeypatch.setattr(NetworkExtractor, "outputs", ("pool", "spatial"))
    monkeypatch.setattr(one_pass, "run", lambda *_, **__: pytest.fail("a pass"))
    with pytest.raises(DataError, match="missing"):
        score(root / "set.npz", root / "ref.npz", nll=(str(root / "folder"), "missing"))
    assert opened.count(str(root / "folder")) == 1


def test_dry_run_passes_over_nothing(root, passes, tmp_path):
    found = score(root / "set.npz", root / "ref.npz", dry_run=True, log=tmp_path / "log.csv")
    assert found["dry_run"]
    assert found["num_images"] == NUM
    assert not passes
    assert not (tmp_path / "log.csv").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def test_per_class(root, images, tmp_path):
    found = score(root / "set.npz", root / "ref.npz", per_class=True)["fd_embedded_per_class"]
    assert len(found) == 10
    for label in (0, 7):
        for name in ("set", "ref"):
            np.savez(tmp_path / f"{name}.npz", images=images[name][images[f"{name}_labels"] == label])
        expected = score(tmp_path / "set.npz", tmp_path / "ref.npz")["fd_embedded"]
        assert found[label] == pytest.approx(expected, rel=BATCH_RTOL)


def test_classes_of_other_names_are_not_compared(tmp_path, images):
    """Folders are numbered by name: one more or less moves all behind it."""
    for name, folders in {"set": ("cat", "dog"), "ref": ("bird", "cat")}.items():
        for number, folder in enumerate(folders):
            (tmp_path / name / folder).mkdir(parents=True)
            for row in range(2):
                pixels = images["set"][2 * number + row].transpose(1, 2, 0).squeeze()
                Image.fromarray(pixels).save(tmp_path / name / folder / f"{row}.png")
    with pytest.raises(UsageError, match=r"other names than those of .*: 0: bird -> cat; 1: cat -> dog; give folders"):
        score(tmp_path / "set", tmp_path / "ref", per_class=True)


def test_classes_are_shown():
    first, second = ({"fd_embedded": x, "fd_embedded_per_class": [x, None, 3 * x]} for x in (1.0, 2.0))
    found = fid_report.summary([first, second])
    assert found["fd_embedded_per_class"] == [1.5, None, 4.5]
    rows = [row[:2] for row in fid_report.table(found)[1]]
    assert rows[1:] == [("fd_embedded of class 0", "1.5"), ("fd_embedded of class 2", "4.5")]


def test_uncertainty(root):
    plain = score(root / "set.npz", root / "ref.npz")
    found = score(root / "set.npz", root / "ref.npz", uncertainty=True)
    assert found["fd_embedded"] == pytest.approx(plain["fd_embedded"], rel=1e-9)
    assert 0 < found["fd_embedded_std_error"] < found["fd_embedded"]
    assert found["fd_embedded_infinity"] is None, "chunks of 20 images for 64 features"
    many = score("embedded:digits8", root / "ref.npz", uncertainty=True)
    assert many["fd_embedded_infinity"] < many["fd_embedded"]  # few images raise a Frechet distance


def test_nearest_finds_copies(real_pictures, root, images, tmp_path):
    copies = {4: 90, 11: 3}  # rows of the scored set: rows of the reference
    mixed = images["set"].copy()
    for row, of in copies.items():
        mixed[row] = images["ref"][of]
    np.savez(tmp_path / "mixed.npz", images=mixed)
    found = score(tmp_path / "mixed.npz", root / "ref.npz", nearest=3, pictures=tmp_path / "pictures")["nearest"]
    assert dict(zip(found["rows"], found["nearest_rows"], strict=True)).items() >= copies.items()
    assert found["distances"][:2] == pytest.approx([0, 0], abs=1e-2)
    assert found["distances"][2] < found["median_distance"]
    with Image.open(found["picture"]) as picture:
        assert picture.width > 3 * 32
        assert picture.height > 4 * 32


def test_log_gets_a_row_for_each_run(root, tmp_path):
    log = tmp_path / "log.csv"
    first = score(root / "set.npz", root / "ref.npz", log=log)
    second = score(root / "set.npz", root / "ref.npz", metrics=ALL, log=log)
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["fd_embedded"]) for row in rows] == [first["fd_embedded"], second["fd_embedded"]]
    assert rows[0]["recall_embedded"] == ""
    assert float(rows[1]["recall_embedded"]) == second["recall_embedded"]
    assert rows[0]["content_digest"] == first["content_digest"]
    assert first["markdown"].splitlines()[0].startswith("| samples | images | ")
    assert f"{first['fd_embedded']:.4g}" in first["markdown"].splitlines()[2]


def test_command_shows_what_was_published(root, monkeypatch, capsys):
    arguments = [root / "set.npz", "--ref", root / "ref.npz", "--extractor", EMBEDDED_EXTRACTOR]
    monkeypatch.setattr(sys, "argv", ["ddo", "fid", *map(str, arguments), "--benchmark", "cifar10-uncond"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "fd_embedded" in out
    assert "| samples | images |" in out
    assert "1.97" not in out  # an FID of the literature does not stand beside another network's distance


def test_json_keys(root):
    found = json.loads(json.dumps(score(root / "set.npz", root / "ref.npz", metrics=ALL, benchmark="cifar10-uncond")))
    named = {"source", "num_images", "extractor", "extractor_sha256", "reference", "content_digest", "warnings"}
    assert named | {"comparable", "protocol", "markdown", "published", "images_per_second"} <= found.keys()
    assert found["protocol"]["fd_embedded"]["resize"]
    assert not found["comparable"], "200 images"
    assert found["published"]["figures"] == []
