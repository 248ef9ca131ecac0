"""Users' own extractors: TorchScript modules and Python files."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddo_cli.errors import CheckpointError, DataError, UsageError
from ddo_cli.files import sha256
from ddo_cli.metrics.extractors.custom import load_custom
from ddo_cli.metrics.extractors.select import select_extractor

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).mean(dim=(2, 3))


class Detector(nn.Module):
    """Called as StyleGAN's detectors are."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        x = images.to(torch.float32)
        return x.flatten(2).amax(2) if return_features else x.flatten(1).mean(1, keepdim=True)


class Fixed(nn.Module):
    """Reads one size only."""

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float64).view(-1, 3, 32 * 32).sum(2)


def scripted(module: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return str(path)


def some_images(num: int = 5, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["mine.pt", "mine.ts"])
def test_torchscript(tmp_path, name):
    path = scripted(Means(), tmp_path / name)
    extractor = select_extractor("fd_embedded", extractor=path)
    assert (extractor.key, extractor.num_features, extractor.is_published) == ("fd_custom", 3, False)
    assert extractor.sha256 == sha256(tmp_path / name)
    assert extractor.name == f"custom-mine-{extractor.sha256[:8]}"
    assert extractor.protocol()["weights_sha256"] == extractor.sha256
    images = some_images()
    torch.testing.assert_close(extractor(images), images.float().mean(dim=(2, 3)))
    torch.testing.assert_close(extractor(images[:, :1])[:, 2], images[:, 0].float().mean(dim=(1, 2)))


def test_features_are_asked_of_detectors(tmp_path):
    extractor = load_custom(scripted(Detector(), tmp_path / "d.pt"))
    torch.testing.assert_close(extractor(some_images()), some_images().float().amax(dim=(2, 3)))


def test_a_module_of_one_size(tmp_path):
    extractor = load_custom(scripted(Fixed(), tmp_path / "f.pt"))
    assert extractor.num_features == 3
    assert extractor(some_images()).dtype == torch.float32
    with pytest.raises(DataError, match=r"f\.pt fails on images \(2, 3, 40, 40\): RuntimeError"):
        extractor(some_images(2, size=40))


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickles_are_refused_and_not_run(tmp_path, save):
    save({"a": Hostile(tmp_path / "executed")}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"mine\.pt is no TorchScript module"):
        select_extractor("fd_custom", extractor=str(tmp_path / "mine.pt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_damaged_modules(tmp_path, content):
    (tmp_path / "mine.ts").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no TorchScript module"):
        load_custom(str(tmp_path / "mine.ts"))
    with pytest.raises(CheckpointError, match="does not exist"):
        load_custom(str(tmp_path / "other.ts"))


def python(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.py").write_text(text)
    return str(tmp_path / "mine.py")


def test_python_file(tmp_path):
    text = (
        "import torch\nSCALE = 2.0\n\n"
        "def extractor(device):\n    assert isinstance(device, torch.device)\n"
        "    def features(images):\n        return helper(images.to(device).float())\n    return features\n\n"
        "def helper(x):\n    return SCALE * x.flatten(1)[:, :7]\n"
    )
    extractor = select_extractor("fd_custom", extractor=python(tmp_path, text))
    assert (extractor.key, extractor.num_features) == ("fd_custom", 7)
    torch.testing.assert_close(extractor(some_images()), 2 * some_images().float().flatten(1)[:, :7])
    other = select_extractor("fd_custom", extractor=python(tmp_path, text.replace("2.0", "3.0")))
    assert other.name != extractor.name  # numbers of another function cannot be compared
    assert other.protocol() != extractor.protocol()


RETURNS = "def extractor(device):\n    return lambda images: {}\n"


@pytest.mark.parametrize(
    ("text", "kind", "match"),
    [
        ("x = 1", UsageError, r"mine\.py defines no function 'extractor'; it must define extractor\(device\)"),
        ("def extractor(:", UsageError, r"mine\.py fails: SyntaxError"),
        ("import no_such_package", UsageError, r"ModuleNotFoundError: No module named .* \(line 1 of mine\.py\)"),
        ("import sys; sys.exit(0)", UsageError, r"mine\.py fails: SystemExit"),
        ("def extractor(device):\n    1 / 0", UsageError, r"ZeroDivisionError.*\(line 2 of mine\.py\)"),
        ("def extractor():\n    pass", UsageError, r"mine\.py fails: TypeError"),
        ("def extractor(device):\n    return 3", UsageError, "'extractor' returns a int"),
        (RETURNS.format("3"), DataError, "returns a int; it must return a tensor"),
        (RETURNS.format("images.flatten(1)"), DataError, r"a tensor of torch\.uint8"),
        (RETURNS.format("images.float()"), DataError, r"returns \(2, 3, 512, 512\) for 2 images"),
        (RETURNS.format("images[:1].flatten(1).float()"), DataError, r"for 2 images; it must be \(2, F\)"),
        (RETURNS.format("images.no"), DataError, r"AttributeError.*\(line 2 of mine\.py\)"),
    ],
)
def test_wrong_python_files(tmp_path, text, kind, match):
    with pytest.raises(kind, match=match):
        select_extractor("fd_custom", extractor=python(tmp_path, text))


def test_number_of_features_may_not_change(tmp_path):
    extractor = load_custom(python(tmp_path, RETURNS.format("images.float().flatten(1)")))
    assert extractor.num_features == 3 * 64 * 64
    with pytest.raises(DataError, match=r"returns \(5, 3072\) for 5 images; it must be \(5, 12288\)"):
        extractor(some_images())


def test_choosing(tmp_path, capsys):
    path = scripted(Means(), tmp_path / "mine.pt")
    assert select_extractor("fid", extractor=path).key == "fd_custom"  # as with other extractors: said aloud
    assert "the number is fd_custom, not an FID" in " ".join(capsys.readouterr().err.split())
    for extractor in (None, "mine.safetensors", "embedded:extractor-digits32"):
        with pytest.raises(UsageError, match="fd_custom needs an extractor of the user's"):
            select_extractor("fd_custom", extractor=extractor)
    with pytest.raises(UsageError, match="no effect with the metric 'fd_custom'"):
        select_extractor("fd_custom", weights="w.pth", extractor=path)
