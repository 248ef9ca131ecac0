"""README and docs/: command lines are typed as they stand there, links lead somewhere, nothing public is left out.

The rule. The `sh` and `python` blocks of a page are carried out from top to bottom, in a directory that holds what the
reader brings (see `brought`). A block with a title is written to that file. Numbers that make a command long are
replaced by those of SHORT. Of a block below the comment NEEDS_FILES, each line must stop at a file that is not there.
Lines of torchrun are carried out by one process here, and as they stand in the slow test.
"""

import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import make_checkpoint
from PIL import Image

from ddo_cli import cli
from ddo_cli.commands.examples import EXAMPLES
from ddo_cli.metrics.extractors import weights
from ddo_cli.models.adm.published import Told
from ddo_cli.models.dit import files as dit_files
from ddo_cli.recipe.load import recipe_names
from ddo_cli.recipe.schema import SamplingRecipe, all_keys

ROOT = Path(__file__).parent.parent
PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
NEEDS_FILES = "<!-- test: needs the published files -->"
QUICK = {  # the others train many small models one after another
    "README.md", "docs/api/index.md", "docs/how-to/export.md", "docs/how-to/protocols.md", "docs/reference/json.md",
    "docs/tutorials/own-network.md", "docs/tutorials/published-checkpoints.md",
}  # fmt: skip

# What every line of a command gets, in place of what it says itself.
_TRAINING = {"data.num": "64", "metric.num_images": "32", "metric.repeats": "1"}
SHORT = {
    "finetune-ddo": {
        **_TRAINING, "--rounds": "1", "finetune.images_per_round": "16", "finetune.eval_every": "8",
        "finetune.batch": "4", "finetune.num_fake": "16",
    },
    "pretrain": {**_TRAINING, "pretrain.images": "16", "pretrain.batch": "4"},
    "train-disc": {
        **_TRAINING, "discriminator.num_fake": "32", "discriminator.held_out": "16", "discriminator.images": "16",
        "discriminator.eval_every": "8", "discriminator.batch": "4",
    },
    "train-classifier": {
        "data.num": "64", "classifier.images": "16", "classifier.held_out": "16", "classifier.batch": "4",
    },
    "train-extractor": {"--images": "64"},
    "analyze": {"--dry-run": ""},
}  # fmt: skip
SHORT_IF_GIVEN = {"--seeds": "0-47", "--num-images": "64", "--steps-list": "2,3"}
FOREIGN_OPTIONS = {  # of other programs
    "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--feature-extractor",
    "--feature-layer-prc", "--transform", "--again", "--logdir", "--max-restarts",
}  # fmt: skip


OF_THE_PROGRAM = {"--help", "--version", "--install-completion", "--show-completion"}


class Block(NamedTuple):
    """A fenced block: language, title, content, and whether its lines stop at a missing file."""

    language: str
    title: str
    text: str
    needs_files: bool


def blocks(page: Path) -> list[Block]:
    fence = re.compile(r"^```(\w*)(?: title=\"([^\"\n]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2] or "", match[3], text[: match.start()].rstrip().endswith(NEEDS_FILES))
        for match in fence.finditer(text)
    ]


def command_lines(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shortened(words: list[str]) -> list[str]:
    """The arguments of `ddo` that carry out a line quickly."""
    short = SHORT.get(words[0], {}) | {name: value for name, value in SHORT_IF_GIVEN.items() if name in words}
    if {"cca", "dpo"} & set(words):  # objectives without samples
        short = {name: value for name, value in short.items() if name != "finetune.num_fake"}
    kept = []
    for before, word in itertools.pairwise(["", *words]):
        if word.partition("=")[0] not in short and before not in short:
            kept.append(word)
    for name, value in short.items():
        kept += [part for part in (name, value) if part] if name.startswith("--") else [f"{name}={value}"]
    return kept


@pytest.fixture(scope="session")
def brought(tmp_path_factory) -> Path:
    """What the reader brings: a labelled set of images, pictures in class folders, and a model."""
    place = tmp_path_factory.mktemp("brought")
    labels, rng = [], np.random.default_rng(0)
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for number in range(64):
            file = io.BytesIO()
            Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "png")
            archive.writestr(f"{number:03d}.png", file.getvalue())
            labels.append([f"{number:03d}.png", number % 10])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    for number in range(70):
        folder = place / "pictures" / f"class {number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(40 + number, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.bmp")
    make_checkpoint(place / "model.safetensors")
    return place


@pytest.fixture
def place(brought, tmp_path, monkeypatch) -> Path:
    for file in brought.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ddo(words: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and stderr of a command carried out in this process."""
    monkeypatch.setattr(sys, "argv", ["ddo", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    code = exit_.value.code
    return code if isinstance(code, int) else 0, capsys.readouterr().err


def check_other_program(words: list[str]) -> None:
    """Lines that would change the machine: what they name must exist."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", " ".join(words))
        settings = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", settings, re.MULTILINE) for extra in extras), words
    elif words[:2] == ["hf", "download"]:  # of the library huggingface_hub
        assert words[3:] == ["--local-dir", words[2].rpartition("/")[2]], words
    else:
        assert words in (["python3", "-m", "venv", ".venv"], ["source", ".venv/bin/activate"]), words


def carry_out(page: Path, monkeypatch, capsys) -> None:
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), {"__name__": "docs"})
        for words in command_lines(block) if block.language == "sh" else []:
            if words[0] == "torchrun":
                words = ["ddo", *words[words.index("ddo_cli") + 1 :]]
            if words[0] == "python":
                runpy.run_path(words[1])
            elif words[0] != "ddo":
                check_other_program(words)
            elif block.needs_files:
                code, message = ddo(words[1:], monkeypatch, capsys)
                assert code == 2, (words, message)
                errors = [line for line in message.splitlines() if not line.startswith("warning: ")]
                assert len(errors) == 1, (words, message)
                assert re.match(
                    r"error: .* does not exist|error: there are no weights of|.*give Inception's weights", errors[0]
                ), (
                    words,
                    message,
                )
            else:
                code, message = ddo(shortened(words[1:]), monkeypatch, capsys)
                assert code == 0, (words, message)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_the_lines_of_a_page(name, place, monkeypatch, capsys):
    carry_out(PAGES[name], monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PAGES.keys() - QUICK))
def test_the_lines_of_a_long_page(name, place, monkeypatch, capsys):
    carry_out(PAGES[name], monkeypatch, capsys)


@pytest.mark.slow
def test_lines_of_torchrun_as_they_stand(place):
    typed = [block for page in PAGES.values() for block in blocks(page) if block.language == "sh"]
    lines = [words for block in typed if not block.needs_files for words in command_lines(block)]
    lines = [words for words in lines if words[0] == "torchrun"]
    by_command: dict[str, list[str]] = {}
    for words in lines:
        by_command.setdefault(words[words.index("ddo_cli") + 1], words)
    lines = list(by_command.values())  # one of each, in their order
    assert len(lines) >= 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in lines:
        start = words.index("ddo_cli") + 1
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:start], *shortened(words[start:])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
        assert done.returncode == 0, (words, done.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# What the pages say


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.on_page_markdown = cache(module.on_page_markdown)
    return module


def text_of(name: str, hooks) -> str:
    return hooks.on_page_markdown(PAGES[name].read_text(encoding="utf-8"))


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}


def test_links_lead_somewhere(hooks):
    for name in [*PAGES, "CONTRIBUTING.md"]:
        page = ROOT / name
        text = text_of(name, hooks) if name in PAGES else page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            aim = (page.parent / file).resolve() if file else page
            assert aim.exists(), f"{name}: {target}"
            if anchor:
                assert anchor in anchors(text_of(str(aim.relative_to(ROOT)), hooks)), f"{name}: {target}"


def anchors(text: str) -> set[str]:
    """Identifiers of a page's headings, given or made as mkdocs makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        given = re.search(r"\{#([\w.-]+)\}", heading)
        found.add(given[1] if given else re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()))
    return found


def test_every_command_and_recipe_is_shown(hooks):
    written = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.values())
    for command in hooks.COMMANDS:
        assert f"ddo {command}" in written, command
        assert f"## `ddo {command}`" in text_of("docs/reference/commands.md", hooks)
    for recipe in recipe_names():
        assert recipe in written, recipe
        assert f"### `{recipe}`" in text_of("docs/reference/recipes.md", hooks)


def test_every_recipe_key_is_shown(hooks):
    text = text_of("docs/reference/recipe-keys.md", hooks)
    for key in all_keys():
        assert f"| `{key.rpartition('.')[2]}` |" in text, key


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_options_and_keys_that_a_page_names_exist(name, hooks):
    code = "\n".join(re.findall(r"`([^`\n]+)`", (ROOT / name).read_text(encoding="utf-8")))
    options = set(
        itertools.chain.from_iterable(p.opts + p.secondary_opts for c in hooks.COMMANDS.values() for p in c.params)
    )
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) <= options | FOREIGN_OPTIONS | OF_THE_PROGRAM
    sections = {key.partition(".")[0] for key in all_keys() if "." in key}
    keys = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(sections)})(?:\.[a-z_]+)+\b(?!\()", code))
    sections_within = {key.rpartition(".")[0] for key in all_keys()}
    assert keys <= {*all_keys(), *sections_within, "model.safetensors"}


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_options_and_keys_of_the_lines_exist(name, hooks):
    """Quick, of the long pages too."""
    for words in (words for block in blocks(ROOT / name) if block.language == "sh" for words in command_lines(block)):
        words = words[words.index("ddo_cli") :] if "ddo_cli" in words else words
        if words[0] in ("ddo", "ddo_cli"):
            check_words(words, hooks)


def check_words(words: list[str], hooks) -> None:
    known = {*all_keys(), *SamplingRecipe.model_fields}
    parameters = hooks.COMMANDS[words[1]].params
    options = {option for parameter in parameters for option in parameter.opts + parameter.secondary_opts}
    assert {word for word in words[2:] if word.startswith("--")} <= options, words
    keys = {*Told._fields, *dit_files.Told._fields} if words[1] == "convert" else known
    named = {f"{name}=" for name in weights.NAMES} if words[1] == "fid" else set()  # networks of --weights
    given = {word.partition("=")[0] for word in words[2:] if "=" in word and not word.startswith(tuple(named))}
    assert given <= keys, words


def test_examples_of_help(hooks):
    assert EXAMPLES.keys() == hooks.COMMANDS.keys()
    for name, lines in EXAMPLES.items():
        assert len(set(lines)) >= 2
        for line in lines:
            words = shlex.split(line)
            assert words[:2] == ["ddo", name]
            check_words(words, hooks)
            if "--recipe" in words:
                assert words[words.index("--recipe") + 1] in recipe_names()
