"""The package as it is published: built, installed in a place of its own, and used from there."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*words: object, cwd: Path, **environment: str) -> str:
    """What a command prints; it must succeed."""
    known = {"PATH": os.environ["PATH"], "HOME": str(cwd), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, target: str, place: Path) -> Path:
    """The wheel or sdist of a source tree. Without isolation: nothing is downloaded."""
    paths = os.pathsep.join(filter(None, sys.path[1:]))  # where the build backend is
    call(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", place, cwd=source, PYTHONPATH=paths)
    return next(place.glob("*.whl" if target == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The sdist, and the wheel that is built of it, as `pip install` of an sdist does."""
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    place = tmp_path_factory.mktemp("dist")
    sdist = build(ROOT, "sdist", place)
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    return sdist, build(place / sdist.name.removesuffix(".tar.gz"), "wheel", place)


@pytest.mark.slow
def test_what_is_in_the_package(packages):
    sdist, wheel = packages
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        described = next(name for name in names if name.endswith("dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(described))
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "ddo_cli").rglob("*") if path.is_file()}
    expected = {name for name in ours if "__pycache__" not in name}
    expected |= {f"ddo_cli/recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"ddo_cli/py.typed", "ddo_cli/assets/digits.npz", "ddo_cli/recipes/quickstart.yaml"} <= names
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-4.0"
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "Makefile", "tests/conftest.py", "docs/index.md", "recipes/quickstart.yaml"} <= packed


@pytest.mark.slow
def test_links_on_pypi_lead_somewhere(packages):
    """Relative ones do not: PyPI shows the description alone."""
    with zipfile.ZipFile(packages[1]) as archive:
        described = next(name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(described))
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert re.search(r"\]\((?!https:)", (ROOT / "README.md").read_text(encoding="utf-8")), "there is nothing to mend"
    assert "before-after.png" not in text
    assert "nothing selected" not in text
    assert "no selection saw" in re.sub(r"\s+", " ", text)  # the words of a link stay
    assert "come with the source distribution" in text


@pytest.mark.slow
def test_installed_in_a_place_of_its_own(packages, tmp_path):
    """Dependencies are those of this interpreter; the package is the installed one, not the checkout."""
    place = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index"]
    call(*pip, "--target", place, packages[1], cwd=tmp_path)
    program = place / "bin" / "ddo"
    assert "finetune-ddo" in call(program, "--help", cwd=tmp_path, PYTHONPATH=str(place))
    found = json.loads(call(program, "doctor", "--json", cwd=tmp_path, PYTHONPATH=str(place)))
    assert found["ddo"]["path"] == str(place / "ddo_cli")
    assert found["weights"]["fd_embedded"]["path"].startswith(str(place))
    sampled = json.loads(call(program, "sample", "--num-images", "2", "--json", cwd=tmp_path, PYTHONPATH=str(place)))
    assert sampled["num_images"] == 2
