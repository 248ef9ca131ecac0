"""Every file of small runs removed, emptied or cut in half, or with one bit flipped; then the same command again.

Of files that differ in a number only, such as images, the first and the last. It must end with the same bytes as
without damage, or name the file. `pytest -s -m slow tests/test_damage.py` prints the table of docs/how-to/resume.md.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CPU, TINY_UNET, make_checkpoint, tiny_disc_recipe, tiny_recipe
from kills import KilledError, without_times
from toy_latent import make_toy

from ddo_cli.data.samples import Writer
from ddo_cli.engines import encode
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.discriminator import classifier as train_classifier
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.pretrain import extractor as train_extractor
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.weights import info
from ddo_cli.errors import DdoError
from ddo_cli.recipe.load import load
from ddo_cli.training.meter import Meter

FEW = ["data={source: embedded:digits32, num: 64}"]
PRETRAIN = [
    *FEW, f"model={{name: patch-unet, options: {json.dumps(TINY_UNET)}}}",
    "sampling={sampler: euler, steps: 2, batch: 8}", "metric={name: fd_embedded, num_images: 16, repeats: 1}",
    "pretrain={batch: 4, images: 24, snapshot_every: 12, save_every: 2, log_every: 2}",
]  # fmt: skip
CLASSIFIER = [*FEW, "classifier={images: 24, batch: 4, held_out: 16, save_every: 2, log_every: 2}"]
DISC = ["sampling={sampler: euler, steps: 2, batch: 16}", "discriminator.num_fake=48"]


def _sampled(form: str) -> Callable[[Path, Path], object]:
    return lambda place, out: sample.run(
        str(place / "m.safetensors"), range(20), out / "set", form=form, device=CPU, sampling={"batch": 8}
    )  # fmt: skip


# Command: what it does with weights in a place and a directory; the step (or batch) at which it is killed.
COMMANDS: dict[str, tuple[Callable[[Path, Path], object], int]] = {
    "finetune-ddo": (  # killed in the control, when DDO's round is finished
        lambda place, out: finetune.run(
            tiny_recipe(str(place / "m.safetensors"), "diffusion", "finetune.control=true", "finetune.rounds=1"),
            out,
            device=CPU,
        ),
        11,
    ),
    "sweep": (
        lambda place, out: finetune.run(
            tiny_recipe(str(place / "m.safetensors"), "diffusion", "finetune.beta=[0.05, 0.1]", "finetune.rounds=1"),
            out,
            device=CPU,
        ),
        8,
    ),
    "pretrain": (lambda place, out: pretrain.run(load("quickstart", PRETRAIN), out, device=CPU), 5),
    "train-disc": (
        lambda place, out: train_disc.run(tiny_disc_recipe(str(place / "m.safetensors"), *DISC), out, device=CPU), 7
    ),
    "train-classifier": (
        lambda place, out: train_classifier.run(
            load("quickstart", CLASSIFIER, {"model.ckpt": str(place / "m.safetensors")}), out, device=CPU
        ),
        5,
    ),
    "train-extractor": (
        lambda place, out: train_extractor.run(
            "embedded:digits32-b", out / "e.safetensors", held_out=None, images=640, seed=0, device=CPU
        ),
        -1,
    ),
    "sample shards": (_sampled("shards"), 2),
    "sample png": (_sampled("png"), 2),
    "sample npz": (_sampled("npz"), 2),
    "encode": (
        lambda place, out: encode.run(
            "embedded:digits32", str(place / "toy.safetensors"), out, num=24, shard=8, batch=8, device=CPU
        ),
        2,
    ),
}  # fmt: skip


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    place = len(content) * 2 // 3
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes] | None] = {
    "removed": None,
    "emptied": lambda content: b"",
    "cut": _cut,
    "bit flipped": _flipped,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(place of the weights, finished directory, directory of a run that was killed), by command."""
    place = tmp_path_factory.mktemp("weights")
    make_checkpoint(place / "m.safetensors")
    make_toy(place / "toy.safetensors", std=0.25)

    @functools.cache
    def made(command: str) -> tuple[Path, Path, Path]:
        act, last = COMMANDS[command]
        out = tmp_path_factory.mktemp(command.replace(" ", "-"))
        whole, killed = out / "whole" / "run", out / "killed" / "run"  # of one name, which reports tell
        for directory in (whole, killed):
            directory.mkdir(parents=True)
        act(place, whole)
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((Meter, "count"), (Writer, "write"), (encode.latents, "write_shard")):
                if owner is not Writer or command.startswith("sample"):
                    patch.setattr(owner, name, _killing(getattr(owner, name), last))
            if last > 0:
                with pytest.raises(KilledError):
                    act(place, killed)
        return place, whole, killed

    return made


def _killing(function: Callable, last: int) -> Callable:
    calls = 0

    def counted(*args):
        nonlocal calls
        calls += 1
        if calls == last:
            raise KilledError
        return function(*args)

    return counted


def content(root: Path) -> dict[str, object]:
    """What of a directory's files must not change: of a log not the speed; locks and the ledger are none of it."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name in (".lock", ".files.jsonl", "state.previous.json"):
            continue
        name = str(path.relative_to(root))
        found[name] = without_times(path)
        if path.name == "log.jsonl":
            try:
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                found[name] = [{**line, "images_per_second": 0} for line in lines]
            except (ValueError, UnicodeDecodeError):
                pass
    return found


def outcome(command: str, run: Path, name: str, damage: str, place: Path, whole: Path, out: Path, capsys) -> str:
    """ "same": the same bytes; "told": a warning names the file; "refused": an error does; else what is wrong."""
    shutil.copytree(run, out)
    file, change = out / name, DAMAGE[damage]
    before = file.read_bytes()
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(before))
    capsys.readouterr()
    told, error = "", ""
    try:
        COMMANDS[command][0](place, out)
    except DdoError as problem:
        error = str(problem)
    told = " ".join(capsys.readouterr().err.split())
    try:
        info.run(str(out / "set" if command.startswith("sample") else out))
    except DdoError as problem:
        told += str(problem)
    told += " ".join(capsys.readouterr().err.split())
    assert len(error) < 400, error
    if error:
        return "refused" if file.name in error else f"refused without its name: {error}"
    if content(out) == content(whole):
        return "same"
    is_told = re.search(rf"{re.escape(file.name)}\S* is (damaged|missing)", told)
    return "told" if is_told else f"SILENTLY different: {_difference(content(out), content(whole))}"


def _difference(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def files_of(run: Path) -> list[str]:
    return sorted(
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock" and not path.name.endswith(".part")
    )


def ends_of_numbered(names: list[str]) -> list[str]:
    """Without those between the first and the last of names that differ in a number only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return [name for group in groups.values() for name in dict.fromkeys((group[0], group[-1]))]


def check(runs, tmp_path, capsys, command: str, is_killed: bool):
    place, whole, killed = runs(command)
    run, table, wrong = killed if is_killed else whole, [], []
    names = ends_of_numbered(files_of(run))
    if command == "sweep":  # the other files are those of finetune-ddo
        names = [name for name in names if "nodes/" in name or name.startswith("round-01/metrics")]
    for number, name in enumerate(names):
        found = {}
        # Both of the middle ones change the size: by turns.
        for damage in ("removed", ("emptied", "cut")[number % 2], "bit flipped"):
            out = tmp_path / f"{number}-{damage}" / "run"
            found[damage] = outcome(command, run, name, damage, place, whole, out, capsys)
            shutil.rmtree(out)
        wrong += [(name, damage, one) for damage, one in found.items() if one not in ("same", "told", "refused")]
        table.append((name, found))
    with capsys.disabled():
        for name, found in table:
            line = f"\n{command:16} {'unfinished' if is_killed else 'finished':10} {name:50}"
            print(line, *(f"{damage}: {one}" for damage, one in found.items()), sep=" | ", end="")
    assert table
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True], ids=["finished", "unfinished"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_damage_goes_unnoticed(runs, tmp_path, capsys, command, is_killed):
    if COMMANDS[command][1] < 0 and is_killed:
        pytest.skip("its directory is hidden, and holds the saved state alone")
    check(runs, tmp_path, capsys, command, is_killed)


def test_damage_of_a_finished_run_is_told(runs, tmp_path, capsys):
    check(runs, tmp_path, capsys, "sample shards", True)
