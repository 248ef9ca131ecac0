import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, torchrun
from PIL import Image

from ddo_cli import checkpoint, files
from ddo_cli.data import embedded
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet
from ddo_cli.engines.fid import fid
from ddo_cli.engines.fid import page as fid_page
from ddo_cli.errors import DataError, UsageError
from ddo_cli.metrics.extractors.digit_net import DigitNet
from ddo_cli.metrics.extractors.select import EMBEDDED_EXTRACTOR, load_extractor
from ddo_cli.metrics.scorer import FrechetScorer, moments_of, share_of_batches
from ddo_cli.report import html

NUM = 600


@pytest.fixture(scope="module")
def extractor(tmp_path_factory) -> str:
    """Random features do for directions: they are no worse at telling pixels apart."""
    path = tmp_path_factory.mktemp("extractor") / "random.safetensors"
    torch.manual_seed(0)
    network = DigitNet()
    for conv in network.convs:
        torch.nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # torch's default lets signals die out
    header = {"kind": "extractor", "config": {"name": "digit-net", "options": {}}}
    checkpoint.save(path, network.state_dict(), header)
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """ref.npz and further sets of the same kind, better and worse."""
    root = tmp_path_factory.mktemp("sets")
    ref = open_images("embedded:digits32", NUM).items
    other = open_images("embedded:digits32-b", NUM).items
    noise = np.random.default_rng(0).normal(size=other.shape)
    content = {"ref": ref, "other": other, "shuffled": np.random.default_rng(0).permutation(other)}
    for level in (40, 120):
        content[f"noisy{level}"] = (other + level * noise).clip(0, 255).astype(np.uint8)
    for name, array in content.items():
        np.savez(root / f"{name}.npz", images=array)
    return root


def distance(extractor: str, source: Path, ref: Path, **options) -> float:
    settings = fid.Options(extractor=extractor, cache=False, **options)
    return fid.run(str(source), str(ref), settings, device=torch.device("cpu"))["fd_embedded"]


def test_worse_images_are_farther(sets, extractor):
    found = [distance(extractor, sets / f"{name}.npz", sets / "ref.npz") for name in ("other", "noisy40", "noisy120")]
    assert 0 < found[0] < found[1] / 2
    assert found[1] < found[2] / 2
    assert distance(extractor, sets / "ref.npz", sets / "ref.npz") < 1e-6 * found[2]


def test_order_and_batch_do_not_matter(sets, extractor):
    first = distance(extractor, sets / "other.npz", sets / "ref.npz")
    assert distance(extractor, sets / "shuffled.npz", sets / "ref.npz", batch=97) == pytest.approx(first, rel=1e-4)


def test_result(sets, extractor):
    options = fid.Options(extractor=extractor)
    found = fid.run(str(sets / "other.npz"), str(sets / "ref.npz"), options, device=torch.device("cpu"))
    assert isinstance(found["fd_embedded"], float)
    digest = files.sha256(Path(extractor))
    expected = {
        "source": str(sets / "other.npz"),
        "num_images": NUM,
        "extractor": f"digit-net-{digest[:8]}",
        "extractor_sha256": digest,
        "reference": str(sets / "ref.npz"),
    }
    assert expected.items() <= found.items()


def test_page(sets, extractor, tmp_path):
    """Scores as they are printed, the protocol, and what speaks against comparing; names are no elements."""
    odd = tmp_path / "<b>other.npz"
    odd.write_bytes((sets / "other.npz").read_bytes())
    options = fid.Options(extractor=extractor, metrics=("fid", "kid"), kid_subset=100, nearest=2, pictures=tmp_path)
    found = fid.run(str(odd), str(sets / "ref.npz"), options, device=CPU, report=tmp_path / "scores.html")
    page = (tmp_path / "scores.html").read_text(encoding="utf-8")
    assert f"fd_embedded {found['fd_embedded']:.4g} (lower is better)." in page
    assert "&lt;b&gt;other.npz, 600 images against" in page
    assert found["warnings"]
    assert all(html.text(f"Warning: {warning}") in page for warning in found["warnings"])
    assert "Not to be compared with published figures" in page
    assert found["content_digest"] in page
    assert files.sha256(Path(extractor)) in page
    assert page.count("data:image/png;base64,") == 2
    tiles = fid_page.page({**found, "kid_embedded": 50432.1}, odd).blocks[0].tiles
    assert [value.split(" ±")[0] for _, value, _ in tiles] == [f"{found['fd_embedded']:.4g}", "50,432"]
    with pytest.raises(UsageError, match=r"--report scores\.pdf is not the name of a page"):
        fid.run(str(odd), str(sets / "ref.npz"), options, device=CPU, report=Path("scores.pdf"))


def test_statistics_as_reference(sets, extractor, tmp_path):
    loaded = load_extractor(extractor)
    moments = moments_of(loaded, share_of_batches(open_images(str(sets / "ref.npz")).items, 256))
    named = {"num_images": moments.n, "extractor": loaded.name}
    np.savez(tmp_path / "ours.npz", mu=moments.mean.numpy(), sigma=moments.cov.numpy(), **named)
    np.savez(tmp_path / "edm.npz", mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    expected = distance(extractor, sets / "other.npz", sets / "ref.npz")
    for name in ("ours.npz", "edm.npz"):
        assert distance(extractor, sets / "other.npz", tmp_path / name) == pytest.approx(expected, rel=1e-9)
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match=r"must be \(64,\)"):
        distance(extractor, sets / "other.npz", tmp_path / "inception.npz")
    with pytest.raises(DataError, match="feature statistics, not images"):
        distance(extractor, tmp_path / "edm.npz", sets / "ref.npz")


def test_few_images_warn(sets, extractor, tmp_path, capsys):
    np.savez(tmp_path / "few.npz", images=open_images("embedded:digits32", 40).items)
    distance(extractor, tmp_path / "few.npz", sets / "ref.npz")
    message = " ".join(capsys.readouterr().err.split())
    assert "few.npz: 40 images for 64 features" in message
    assert "ref.npz: " not in message


def test_what_cannot_be_scored(sets, extractor, tmp_path):
    with pytest.raises(DataError, match="points of 2 numbers, not images"):
        distance(extractor, Path("embedded:toy2d"), sets / "ref.npz")
    np.savez(tmp_path / "one.npz", images=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="one image"):
        distance(extractor, tmp_path / "one.npz", sets / "ref.npz")
    with pytest.raises(DataError, match="does not exist"):
        distance(extractor, tmp_path / "missing", sets / "ref.npz")


def test_scorer_takes_images_arrays_and_moments(sets, extractor):
    loaded = load_extractor(extractor)
    ref, other = (open_images(str(sets / f"{name}.npz")) for name in ("ref", "other"))
    assert isinstance(ref, ItemSet)
    moments = moments_of(loaded, share_of_batches(ref.items, 100))
    references = (ref, ref.items, moments, moments.statistics())
    found = [FrechetScorer(loaded, reference).score(share_of_batches(other.items, 64)) for reference in references]
    assert {key for scores in found for key in scores} == {"fd_embedded"}
    values = [scores["fd_embedded"] for scores in found]
    assert values == pytest.approx([values[0]] * 4, rel=1e-4)
    with pytest.raises(ValueError, match="no rows"):
        FrechetScorer(loaded, moments).score([])


def test_embedded_default(monkeypatch):
    """The default reference and extractor; a further draw of the data is as near as a model can get."""
    monkeypatch.setattr(embedded, "NUM_GENERATED", 2000)
    held_out = fid.run("embedded:digits16-b", options=fid.Options(extractor=EMBEDDED_EXTRACTOR, batch=512), device=CPU)
    assert held_out["extractor"] == "embedded-digits32"
    assert held_out["reference"] == "embedded:digits16"
    assert held_out["num_images"] == 2000
    assert held_out["fd_embedded"] > 0


def test_two_processes_equal_one(sets, extractor):
    code = (
        "import sys, json; from ddo_cli import dist; from ddo_cli.engines.fid import fid\n"
        "options = fid.Options(extractor=sys.argv[3], batch=64, cache=False)\n"
        "found = fid.run(sys.argv[1], sys.argv[2], options, device=dist.init('cpu'))\n"
        "print(f\"value {found['fd_embedded']!r} {found['num_images']};\", flush=True); dist.shutdown()\n"
    )
    script = sets / "run.py"
    script.write_text(code)
    args = [str(script), str(sets / "other.npz"), str(sets / "ref.npz"), extractor]
    done = torchrun(*args)
    lines = re.findall(r"value (\S+ \d+);", done.stdout)  # the processes may share a line
    assert len(lines) == 2, done.stderr
    assert lines[0] == lines[1]
    value, num = lines[0].split()
    expected = distance(extractor, sets / "other.npz", sets / "ref.npz", batch=64)
    assert int(num) == NUM
    assert float(value) == pytest.approx(expected, rel=1e-7)


def test_the_reference_is_inspected(sets, extractor, tmp_path, capsys):
    """As the images are: copies, constant images, values 0..1 and lossy files."""
    images = np.load(sets / "ref.npz")["images"]
    black = np.zeros_like(images)
    black[:, 0, 0, 0] = np.arange(NUM) % 2
    content = {"copies": np.concatenate([images[:-1], images[:1]]), "same": images[:1].repeat(NUM, 0), "dark": black}
    texts = {
        "copies": "1 of 600 images are exact",
        "same": "all 600 images are the same",
        "dark": "no value is above 1",
    }
    settings = fid.Options(extractor=extractor, cache=False)
    for name, pixels in content.items():
        np.savez(tmp_path / f"{name}.npz", images=pixels)
        found = fid.run(str(sets / "other.npz"), str(tmp_path / f"{name}.npz"), settings, device=CPU)
        assert any(texts[name] in line and name in line for line in found["warnings"]), name
        assert not found["comparable"]
    (tmp_path / "lossy").mkdir()
    for row, pixels in enumerate(images):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "lossy" / f"{row}.jpg")
    (tmp_path / "lossy" / "more.tga").write_bytes(b"x")
    found = fid.run(str(sets / "other.npz"), str(tmp_path / "lossy"), settings, device=CPU)
    assert any("lossy: 600 images are JPEGs" in line for line in found["warnings"])
    assert any("left out: 1 .tga" in line for line in found["warnings"])
