"""Where published weights are looked for, and which are refused. No test reaches a network."""

import dataclasses
import hashlib
import os
import pickle
import re
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.metrics.extractors import weights
from ddo_cli.metrics.extractors.select import select_extractor

URLOPEN = urllib.request.urlopen
NAME = "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, no variable, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for published in weights.PUBLISHED.values():
        monkeypatch.delenv(published.variable, raising=False)

    def refuse(*_args, **_options):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    directory = tmp_path / "torch" / "hub" / "checkpoints"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def genuine(tmp_path, monkeypatch) -> bytes:
    """Bytes that count as Inception's published file, to be had at a file's address."""
    torch.save({"a": torch.arange(3.0)}, tmp_path / "origin.pth")
    content = (tmp_path / "origin.pth").read_bytes()
    monkeypatch.setitem(
        weights.PUBLISHED,
        "fid",
        dataclasses.replace(
            weights.PUBLISHED["fid"],
            sha256=hashlib.sha256(content).hexdigest(),
            address=lambda: (tmp_path / "origin.pth").as_uri(),
        ),
    )
    return content


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_order_of_places(cache, genuine, tmp_path, monkeypatch):
    assert weights.find("fid") is None
    other = write(cache / "pt_inception-2015-12-05-6726825d.pth", genuine)  # pytorch-fid's
    assert weights.find("fid") == (other, hashlib.sha256(genuine).hexdigest(), True, str(other))
    cached = write(cache / NAME, genuine)
    assert weights.find("fid").path == cached
    named = write(tmp_path / "mine.pth", b"something else")
    monkeypatch.setenv("DDO_INCEPTION_WEIGHTS", str(named))
    assert weights.find("fid").path == named
    assert not weights.find("fid").is_published
    assert weights.find("fd_dinov2") is None  # each network has its own
    given = write(tmp_path / "given.pth", genuine)
    assert weights.find("fid", str(given)).path == given
    assert weights.find("fid", str(given)).is_published  # whatever the file is called


def test_files_that_are_named_are_never_passed_over(cache, genuine, tmp_path, monkeypatch):
    write(cache / NAME, genuine)
    monkeypatch.setenv("DDO_INCEPTION_WEIGHTS", str(tmp_path / "missing.pth"))
    with pytest.raises(CheckpointError, match=r"missing\.pth does not exist"):
        weights.find("fid")
    monkeypatch.setenv("DDO_INCEPTION_WEIGHTS", "")
    assert weights.find("fid").path == cache / NAME


@pytest.mark.parametrize("by", ["option", "variable", "cache"])
def test_wrong_hash(by, cache, genuine, tmp_path, monkeypatch):
    damaged = write((cache if by == "cache" else tmp_path) / NAME, genuine[:-1])
    if by == "variable":
        monkeypatch.setenv("DDO_INCEPTION_WEIGHTS", str(damaged))
    address = re.escape(weights.PUBLISHED["fid"].address())  # whole
    with pytest.raises(
        CheckpointError, match=rf"{NAME} has the wrong hash .*damaged.*`curl -L -o \S*{NAME} {address}`"
    ):
        weights.find("fid", str(damaged) if by == "option" else None)
    with pytest.raises(CheckpointError, match="wrong hash"):
        select_extractor("fid", str(damaged) if by == "option" else None)


def test_the_known_hashes_and_addresses_are_torch_fidelitys():
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    inception, clip = weights.PUBLISHED["fid"], weights.PUBLISHED["fd_clip"]
    assert inception.names[0] == URL_INCEPTION_V3.rsplit("/", 1)[1]
    assert inception.address() == URL_INCEPTION_V3
    for name in inception.names:
        assert inception.sha256.startswith(Path(name).stem.rsplit("-", 1)[1])
    assert clip.sha256 == MODEL_METADATA["clip-vit-b-32"]["hash"]
    assert clip.sha256 in clip.address()
    assert clip.address().endswith(clip.names[0])


@pytest.mark.parametrize("network", ["fid", "fd_dinov2", "fd_clip"])
def test_the_message_has_file_address_and_command(network, cache):
    published = weights.PUBLISHED[network]
    with pytest.raises(CheckpointError) as caught:
        weights.require(network)
    command = f"curl -L -o {published.names[0]} {published.address()}"
    for part in (published.title, command, "--weights", published.variable, str(cache)):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fallback_says_how_to_get_an_fid(capsys):
    assert select_extractor("fid").key == "fd_embedded"
    message = " ".join(capsys.readouterr().err.split())
    assert "not an FID" in message
    assert "ddo fid --download" in message
    assert len(message) < 220  # a line, without the command that fetches them


def test_download_only_if_asked(cache, genuine, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)  # the address is a file's
    origin, digest = tmp_path / "origin.pth", hashlib.sha256(genuine).hexdigest()
    assert weights.find("fid") is None
    assert list(cache.iterdir()) == []
    origin.write_bytes(genuine[:-1])
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(wrong hash"):
        weights.find("fid", download=True)
    assert list(cache.iterdir()) == []
    origin.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be downloaded .*No such file"):
        weights.find("fid", download=True)
    assert list(cache.iterdir()) == []
    origin.write_bytes(genuine)
    assert weights.find("fid", download=True) == (cache / NAME, digest, True, str(cache / NAME))
    assert (cache / NAME).read_bytes() == genuine
    origin.unlink()
    assert weights.find("fid", download=True).path == cache / NAME  # it is there now


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"mkdir {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("metric", ["fid", "fd_dinov2", "fd_clip"])
@pytest.mark.parametrize("by", ["option", "variable"])
def test_hostile_files_are_refused_and_not_run(by, metric, save, tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    save({"fc.bias": Hostile(tmp_path / "executed")}, path)
    if by == "variable":
        monkeypatch.setenv(weights.PUBLISHED[metric].variable, str(path))
    with pytest.raises(CheckpointError, match=r"refused: it names .*system"):
        select_extractor(metric, str(path) if by == "option" else None)
    assert not (tmp_path / "executed").exists()


def test_content_hash():
    state = {"b": torch.arange(4.0).view(2, 2), "a": torch.tensor(1.0)}
    known = weights.content_sha256(state)
    assert known == weights.content_sha256({"a": state["a"].half(), "b": state["b"].T.contiguous().T})
    assert known == weights.content_sha256({**state, "bn.num_batches_tracked": torch.tensor(3)})
    assert known != weights.content_sha256({**state, "b": state["b"].T})
    assert known != weights.content_sha256({**state, "b": state["b"].flatten()})
    assert known != weights.content_sha256({"b": state["b"], "c": state["a"]})


def test_safetensors_of_other_content(tmp_path):
    save_file({"a": torch.full((2,), torch.inf)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="'a' holds values that are not finite"):
        select_extractor("fid", str(tmp_path / "w.safetensors"))


def test_files_by_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run=3.pth").write_text("")
    for given, expected in (
        ([], None),
        (["a.pth"], "a.pth"),
        (["run=3.pth"], "run=3.pth"),  # a file's own name
        (["/data/run=3/a.pth"], "/data/run=3/a.pth"),
        (["fid=a.pth"], {"fid": "a.pth"}),
        (["fd_dinov2=b=1.pth", "a.pth"], {"fd_dinov2": "b=1.pth", "fid": "a.pth"}),
    ):
        assert weights.by_network(given) == expected
    for given, message in (
        (["dino=a.pth"], "dino is no network .* NAME=PATH with one of fid, fd_dinov2, fd_clip"),
        (["fid="], "its path is missing"),
        (["=a.pth"], "an empty name"),
        (["a.pth", "fid=b.pth"], "gives fid two files, a.pth and b.pth"),
        (["a.pth", "b.pth"], "two files"),
    ):
        with pytest.raises(UsageError, match=message):
            weights.by_network(given)
