"""Weights of the Hub, from and to a stand-in of its HTTP interface on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import yaml
from conftest import CPU, make_checkpoint, make_discriminator, tiny_recipe

from ddo_cli import checkpoint, hub
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.weights import card, push
from ddo_cli.errors import CheckpointError
from ddo_cli.models import registry
from ddo_cli.models.diffusers import files

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(monkeypatch):
    """Without repositories; the library in this process knows it, and has a token."""
    with hub_server.serving() as served:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield served


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run of one round, with a control."""
    place = tmp_path_factory.mktemp("pushed")
    short = ("finetune.rounds=1", "finetune.control=true", "finetune.images_per_round=8", "finetune.eval_every=8")
    recipe = tiny_recipe(make_checkpoint(place / "m.safetensors"), "diffusion", *short)
    finetune.run(recipe, place / "run", device=CPU)
    return place / "run"


def parts_of(text: str) -> tuple[dict, str]:
    """The head of a card and what follows."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_run_is_pushed_with_its_card(server, run_dir):
    result = push.run(str(run_dir), "hf://user/digits", revision="v1", licence="cc0-1.0")
    files = server.repos["user/digits"]["v1"]
    assert {name: len(content) for name, content in files.items()} == result["files"]
    assert files["model.safetensors"] == (run_dir / "final.safetensors").read_bytes()
    assert files["recipe.yaml"] == (run_dir / "recipe.yaml").read_bytes()
    assert {"reference.png", "README.md"} <= files.keys()
    head, body = parts_of(files["README.md"].decode())
    assert head == {
        "library_name": "ddo", "license": "cc0-1.0", "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddo", "model"],
    }  # fmt: skip
    report = (run_dir / "report.html").read_text(encoding="utf-8")
    headline = report.partition('<p class="lead">')[2].partition("</p>")[0]
    assert headline in body
    assert "Its control" in headline
    for told in ("ddo sample --ckpt hf://user/digits@v1", "than control by", "| 1 | finetune-ddo, round 1 |",
                 "16 images in each of 2 ranges of seeds", "± is one standard error", "CC BY 4.0",
                 "cc0-1.0, as stated by who published"):  # fmt: skip
        assert told in body
    assert server.repos["user/digits"]["main"] == {}
    assert push.run(str(run_dir / "final.safetensors"), "user/digits", dry_run=True)["card"].count("than control") > 0


def test_dry_run_and_refusals(server, run_dir, monkeypatch, ddo):
    done = ddo("push", run_dir, "user/new", "--dry-run")
    assert "license: " not in done.stdout
    assert "the licence is not known: none was stated; state one by --license" in done.stderr
    assert "paths of this machine" in done.stderr
    assert "dry_run            True\n\n---\nlibrary_name: ddo" in done.stdout
    assert server.repos == {}
    lines = {
        "user": "write user/name",
        "user/name@v1": "a branch is given as --revision", "user/x --license MIT": "identifier",
        "user/x --revision -": "no name of a branch",
    }  # fmt: skip
    for line, told in lines.items():
        assert told in ddo("push", run_dir, *line.split(), code=2).stderr
    server.repos["user/open"] = {"main": {}}
    assert "exists and is public" in ddo("push", run_dir, "user/open", "--private", code=2).stderr
    assert server.repos["user/open"] == {"main": {}}
    ddo("push", run_dir, "user/closed", "--private", "--json")
    assert server.private == {"user/closed"}
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert "cannot be pushed to" in ddo("push", run_dir, "user/x", code=2).stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    done = ddo("push", run_dir, "user/x", "--json", code=2)
    assert "no token of the Hub was found; run `hf auth login`" in json.loads(done.stdout)["error"]["message"]


def test_single_files(server, tmp_path):
    """A discriminator says what it guides; an extractor and an unfinished run are refused."""
    ckpt = make_checkpoint(
        tmp_path / "m.safetensors", provenance=[{"command": "convert", "source": "edm2-img64-s-x.pkl"}]
    )
    disc = make_discriminator(tmp_path / "d.safetensors", ckpt)
    head, body = parts_of(push.run(disc, "user/disc", dry_run=True)["card"])
    assert head == {"library_name": "ddo", "tags": ["ddo", "discriminator"]}
    assert f"It guides {ckpt}" in body.replace("\\", "")
    assert "ddo guide-sample --disc hf://user/disc" in body
    head, body = parts_of(push.run(ckpt, "user/m", dry_run=True)["card"])
    assert head["license"] == "cc-by-nc-sa-4.0"
    assert "A weight file without the figures" in body
    assert "recipe.yaml" not in push.run(ckpt, "user/m", dry_run=True)["files"]
    with pytest.raises(CheckpointError, match="kind 'extractor'"):
        push.run("embedded:extractor-digits32", "user/x")


def test_licences(server):
    """The base's goes on: of the embedded weights, of published files by name, of cards; else it is not known."""
    server.repos["user/base"] = {"main": {"README.md": b"---\nlicense: openrail\n---\n"}}
    ours = checkpoint.load("embedded:digits16").sha256
    of_hub = {"command": "finetune-ddo", "recipe": {"model": {"ckpt": "hf://user/base@v1"}}, "reference_sha256": "0"}
    chains = {
        "apache-2.0": [{"command": "pretrain"}, {"command": "finetune-ddo", "reference_sha256": ours}],
        "mit": [{"command": "convert", "source": "64x64_diffusion.pt"}, of_hub],
        "cc-by-nc-sa-4.0": [{"command": "convert", "source": "var_d16-ddo.pth"}],
        "creativeml-openrail-m": [{"command": "convert", "source": "sd15", "licence": "creativeml-openrail-m"}],
        "openrail": [{"command": "pretrain"}, of_hub],
        None: [{"command": "convert", "source": "mine.pkl"}],
    }
    for name, links in chains.items():
        assert card.licence_of({"provenance": links}).name == name
    assert card.licence_of({}) == (None, "not known: none was stated")
    assert card.licence_of({"provenance": chains[None]}).told.startswith(
        "not known: the weights were made from mine.pkl"
    )
    assert card.base_model(chains["openrail"]) == "user/base"


def test_the_licence_of_a_folder_is_the_one_of_its_card(tmp_path):
    cards = {
        "---\nlicense: openrail++\n---\n# x\n": {"licence": "openrail++"},
        "---\nlicense: other\nlicense_name: flux-dev\n---\n": {"licence": "flux-dev"},
        "---\ntags: [x]\n---\n": {}, "license: mit\n": {}, "---\n[\n---\n": {}, "x\n---\nlicense: mit\n---\n": {},
    }  # fmt: skip
    assert files.licence_of(tmp_path) == {}
    for text, stated in cards.items():
        (tmp_path / "README.md").write_text(text)
        assert files.licence_of(tmp_path) == stated


def test_names_in_a_card_are_no_marks(run_dir):
    links = [{"command": "pretrain", "recipe": {"name": "a|b"}}]
    header = {"kind": "model", "config": {"name": "<b>*x*|"}, "provenance": links}
    subject = card.Subject(header, 1, None, {})
    text = card.write("user/x", None, card.Licence(None, "not known"), subject)
    assert r"network \<b\>\*x\*\|, 1 parameters" in text
    assert r"| 1 | pretrain | a\|b |" in text


@pytest.mark.slow
def test_pushed_and_fetched_again(run_dir, tmp_path):
    """Each in a process of its own, since the library reads its address once; to the same bytes."""
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}

    def run(*words: str, token: str = "") -> subprocess.CompletedProcess[str]:
        command, known = [sys.executable, "-m", "ddo_cli", *words, "--json"], {"HF_TOKEN": token} if token else {}
        return subprocess.run(
            command, env=environment | known, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    with hub_server.serving() as served:
        environment["HF_ENDPOINT"] = served.address
        pushed = run("push", str(run_dir), "user/name", "--private", token=hub_server.TOKEN)
        assert pushed.returncode == 0, pushed.stderr
        assert json.loads(pushed.stdout)["commit"].startswith(f"{served.address}/user/name/commit/")
        done = run("sample", "--ckpt", "hf://user/name@main", "--num-images", "1", token=hub_server.TOKEN)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["checkpoint_sha256"] == checkpoint.load(run_dir / "final.safetensors").sha256


def test_what_is_not_there(server):
    server.repos["user/name"] = {"main": {}}
    for name in ("hf://user/other", "hf://user/name@v2", "hf://user/name"):
        with pytest.raises(CheckpointError, match=f"{name}: model.safetensors cannot be fetched"):
            hub.download(name)


@pytest.mark.parametrize("name", ["hf://user", "hf://user/name/file", "hf://user/name@", "hf:///name"])
def test_names_that_are_no_repository(name):
    with pytest.raises(CheckpointError, match="write hf://user/name"):
        checkpoint.resolve(name)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ddo-cli\[hub\]'"):
        checkpoint.resolve("hf://user/name")


def test_only_weights_are_fetched(ddo):
    assert "is not fetched" in ddo("finetune-ddo", "--data", "hf://user/name", code=2).stderr
    assert "write hf://user/name" in ddo("sample", "--ckpt", "hf://user", code=2).stderr


@pytest.mark.slow  # imports transformers
def test_pipelines_are_fetched(server, tmp_path, monkeypatch):
    """What is read of a text-to-image pipeline, and of a distilled one its index alone."""
    pytest.importorskip("transformers")
    from tiny_pipeline import make_pipeline

    made = make_pipeline(tmp_path / "sd")
    content = {str(file.relative_to(made)): file.read_bytes() for file in made.rglob("*") if file.is_file()}
    unread = {"unet/diffusion_pytorch_model.fp16.safetensors": b"", "safety_checker/config.json": b"{}", "a.ckpt": b""}
    server.repos |= {repo: {"main": content | unread} for repo in ("user/sd", "user/sd-turbo")}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("DDO_CACHE", str(tmp_path / "cache"))
    loaded = registry.load_model("hf://user/sd", CPU)
    expected = registry.load_model(made, CPU)
    assert {name: tensor.tolist() for name, tensor in loaded.model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in expected.model.state_dict().items()
    }
    place = Path(loaded.checkpoint.header["config"]["options"]["pipeline"])
    assert {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()} == content.keys()
    with pytest.raises(CheckpointError, match="distilled to few steps, as models--user--sd-turbo tells"):
        registry.load_model("hf://user/sd-turbo", CPU)
    assert len(list((tmp_path / "hf" / "models--user--sd-turbo" / "snapshots").rglob("*.*"))) == 1
    with pytest.raises(CheckpointError, match=r"user/sd does not exist.*, or hf://user/sd for a repository of the Hub"):
        registry.load_model("user/sd", CPU)
    with pytest.raises(CheckpointError, match=r"user/gone: model\.safetensors cannot be fetched"):
        registry.load_model("hf://user/gone", CPU)
