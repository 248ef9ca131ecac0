"""Paths of users: the home directory, and addresses, which get the line that fetches them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ddo_cli.cli import app
from ddo_cli.errors import DdoError, UsageError
from ddo_cli.files import cache_directory
from ddo_cli.metrics.extractors import weights
from ddo_cli.models import vae_codec
from ddo_cli.models.diffusers import texts
from ddo_cli.places import local


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("https://x.org/a/b.pkl", "`curl -L -o b.pkl https://x.org/a/b.pkl`, and give b.pkl"),
        (Path("https://x.org/a.pt"), "`curl -L -o a.pt https://x.org/a.pt`"),
        ("fid=http://x.org/a%20b;c.pth?d=1", "-o 'a b;c.pth' 'http://x.org/a%20b;c.pth?d=1'`"),
        (["finetune.lr=1", "data.source=ftp://x.org/s.zip"], "data.source=ftp://x.org/s.zip is not fetched; run `curl"),
        ({"metric": {"ref": "https://huggingface.co/a/b/blob/main/c.npz"}}, "https://huggingface.co/a/b/resolve/main/c.npz"),
        ("https://github.com/a/b/blob/main/c.npz", "https://github.com/a/b/raw/main/c.npz"),
        ("https://huggingface.co/google/ddpm-cifar10-32", "`hf download google/ddpm-cifar10-32 --local-dir NAME`"),
        ("hf://a/b", "`hf download a/b --local-dir NAME`"),
        ("s3://bucket/key", "with the tool of its store"),
        ("file:///data/x.zip", "give the path by itself"),
        ("https://" + "x" * 4000, "`curl -L -o NAME ADDRESS`"),
        ("https://x/\x1b[31m\u202e", r"\x1b[31m\u202e"),
    ],
)  # fmt: skip
def test_addresses_are_named_with_what_fetches_them(given, remedy):
    with pytest.raises(UsageError) as caught:
        local(given)
    assert remedy in str(caught.value).replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("given", ["a.pkl", "https", "a:b", "x=y", Path("s3/a"), 3, None, True, "httpsx://a"])
def test_other_values_stay_as_they_are(given):
    assert local([{"a": given}]) == [{"a": given}]


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    assert local({"a": "~/x", "b": [Path("~/y")], "c": "a~"}) == {"a": "/home/u/x", "b": [Path("/home/u/y")], "c": "a~"}


def test_home_in_the_environment(monkeypatch):
    """No shell expands what a container or a batch script sets."""
    monkeypatch.setenv("HOME", "/home/u")
    for variable, found in [
        ("DDO_CACHE", cache_directory), ("DDO_VAE", lambda: vae_codec.place_of("x/y")),
        ("DDO_PIPELINE", lambda: texts.place_of("x")),
    ]:  # fmt: skip
        monkeypatch.setenv(variable, "~/z")
        assert str(found()) == "/home/u/z"
    monkeypatch.setenv("DDO_INCEPTION_WEIGHTS", "~/z")
    with pytest.raises(DdoError, match="/home/u/z"):
        weights.find("fid")


URL = "https://x.org/a.npz"


@pytest.mark.parametrize(
    "line",
    [
        f"sample --ckpt {URL}", f"convert {URL} --out x", f"info {URL}", f"fid {URL}", f"fid a --ref {URL}",
        f"fid a --weights fid={URL}", f"stats {URL} --out x", f"finetune-ddo --data {URL} --dry-run",
        f"train-disc data.source={URL}", f"pretrain metric.weights={URL}", f"guide-sample --disc {URL}",
        f"edit {URL}", f"encode {URL} --ckpt a --out b", f"ema {URL} --std 0.1 --out x", f"export {URL} --out x",
        f"train-extractor --data {URL} --out x", f"analyze likelihood {URL}",
    ],
)  # fmt: skip
def test_every_command(line):
    result = CliRunner().invoke(app, line.split())
    assert isinstance(result.exception, DdoError)
    assert "`curl -L -o a.npz https://x.org/a.npz`" in str(result.exception)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "CUDA_VISIBLE_DEVICES=1 before the command"),
        ("3", "CUDA_VISIBLE_DEVICES=3"),
        ("xpu", "--device xpu is not known; use cuda, mps or cpu"),
    ],
)
def test_devices(device, message):
    result = CliRunner().invoke(app, ["sample", "--device", device])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
