"""What the program does with options that contradict one another, with streams that take nothing, and with numbers
that JSON does not know. Run in this process; `test_cli` runs the program itself."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import CPU, make_checkpoint, make_discriminator
from launch import launch
from torch.distributed.run import get_args_parser
from typer.main import get_command

from ddo_cli import cli, console
from ddo_cli.commands import options
from ddo_cli.engines import training_run
from ddo_cli.engines.discriminator import classifier as train_classifier
from ddo_cli.engines.fid import fid
from ddo_cli.engines.fid import report as fid_report
from ddo_cli.engines.pretrain import extractor as train_extractor
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.errors import NumericsError, RecipeError, UsageError
from ddo_cli.recipe.load import load
from ddo_cli.report import pictures
from ddo_cli.training import loop

ROOT = Path(__file__).parent.parent
LAST = 2**32 - 1


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "m.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Options

CONTRADICTIONS = {
    "sample --seeds 0-3 --num-images 64": "--num-images 64 has no effect beside --seeds 0-3",
    "sample --seeds 0-3 --seed 0": "--seed 0 has no effect beside --seeds 0-3",
    "sample --seeds 5-1": "--seeds 5-1 cannot be read (5-1 ends before it begins)",
    "sample --seeds 3,3": "given twice",
    f"sample --seed {LAST} --num-images 2": f"--num-images 2 go up to seed {LAST + 1}, and seeds end at {LAST}; lower",
    f"sample --seed {LAST}": "--num-images 64 go up to seed",
    "sample --steps 9 steps=4": "steps is given twice, by its option (9) and as steps=4",
    "sample sigma_max=4 sigma_max=5": "sigma_max is given twice, as sigma_max=4 and as sigma_max=5",
    "finetune-ddo --alpha 4 finetune.alpha=2": "finetune.alpha is given twice, by its option (4.0) and as",
    "pretrain pretrain.lr=1 pretrain.lr=1": "pretrain.lr is given twice",
    "pretrain --recipe quickstart pretrain={lr:\x001,lr:\x002}": "the key 'lr' is given twice",
    "pretrain name=..": "name = '..'",
    "pretrain name=.": "name = '.'",
    "analyze --what gain --num-images 16": "--num-images 16 is of the analysis 'nfe', and has no effect on --what gain",
    "analyze --what gain,nfe --noise-level 2": "--noise-level 2.0 is of the analysis 'regeneration'",
    "analyze --what nfe --regenerations 2": "--regenerations 2 is of the analysis 'regeneration'",
    "analyze --steps-list 4,6": "--steps-list 4,6 is of the analysis 'nfe', and has no effect on the analyses that are",
    f"fid CKPT --num-images {2**31} --repeat 3": f"seeds up to {3 * 2**31 - 1}",
}


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_options_that_would_be_ignored(line, ddo, ckpt, tmp_path):
    arguments = [ckpt if part == "CKPT" else part.replace("\x00", " ") for part in line.split(" ")]
    if line.startswith("sample"):
        arguments += ["--ckpt", ckpt]
    done = ddo(*arguments, "--json", code=2)
    assert CONTRADICTIONS[line] in json.loads(done.stdout)["error"]["message"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", get_command(cli.app).commands)
def test_torchrun_takes_no_option_for_its_own(name):
    """Its parser refuses what follows the program's name, too, where that abbreviates several of its options."""
    launch = ["--standalone", "-m", "ddo_cli", name]
    parser, command = get_args_parser(), get_command(cli.app).commands[name]
    parameters = command.get_params(typer.Context(command))
    assert len(parameters) > 1
    for parameter in parameters:
        for option in [text for text in (*parameter.opts, *parameter.secondary_opts) if text.startswith("-")]:
            for arguments in ([option], [option, "1"], [f"{option}=1"]):
                assert parser.parse_args([*launch, *arguments]).training_script_args == [name, *arguments]
    with pytest.raises(SystemExit):
        parser.parse_args([*launch, "--num", "1"])  # what such an option would do


def test_seeds_of_what_was_given():
    assert options.seeds_of(None, None, None) == range(64)
    assert options.seeds_of(None, 5, None) == range(5, 69)
    assert options.seeds_of(None, LAST - 1, 2) == range(LAST - 1, LAST + 1)
    assert options.seeds_of("1,4-5", None, None) == [1, 4, 5]
    with pytest.raises(UsageError, match=r"--seeds 4-4- cannot be read"):
        options.seeds_of("4-4-", None, None)


def test_settings_of_analyses_that_are_asked_for(ddo, ckpt, tmp_path_factory):
    disc = make_discriminator(tmp_path_factory.mktemp("disc") / "d.safetensors", ckpt)
    for given in (
        ["--what", "nfe", "--num-images", "16"],
        ["--regenerations", "3"],
        ["--what", "all", "--steps-list", "3"],
    ):
        assert json.loads(ddo("analyze", "--disc", disc, *given, "--dry-run", "--json").stdout)["dry_run"]


def test_a_key_that_a_recipe_holds_twice_is_named_with_its_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nfinetune:\n  lr: 1\n  batch: 4\n  lr: 2\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml, line 5: the key 'lr' is given twice"):
        load(str(path))
    path.write_text("name: mine\npretrain: &base {lr: 1.0}\nfinetune: {<<: *base, lr: 2.0}\n")
    assert load(str(path)).finetune.lr == 2.0  # what is merged is meant to be replaced
    path.write_text("name: ünïcode\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="name = 'ünïcode'"):
        load(str(path))


def test_usage_errors_point_to_the_command_s_own_help(ddo):
    assert "(ddo sample --help lists the options)" in ddo("sample", "--nosuch", code=2).stderr
    assert "(ddo --help lists the options)" in ddo("--nosuch", code=2).stderr


def test_without_arguments_the_help_is_all(ddo):
    done = ddo(code=2)
    assert "finetune-ddo" in done.stdout
    assert "error" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def program(*arguments, cwd, out=None, **environment):
    """The program itself, with an output of its own."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "ddo_cli", *arguments]
    return subprocess.run(
        command, stdout=out or subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=given, check=False, timeout=120
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("line", ["recipes --json", "recipes", "--help", "sample --nosuch --json"])
def test_a_full_stdout_is_one_message(line, tmp_path):
    with open("/dev/full", "w") as full:
        done = program(*line.split(), cwd=tmp_path, out=full)
    message = done.stderr.decode()
    assert done.returncode == 2, message
    assert len(message.splitlines()) == 1
    assert ("nosuch" if "nosuch" in line else "error: stdout: No space left on device") in message
    assert "continues" not in message


@pytest.mark.parametrize(
    ("line", "environment"),
    [
        ("recipes", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("--help", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_a_terminal_without_our_letters(line, environment, tmp_path):
    done = program(line, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert b"quickstart" in done.stdout or b"finetune-ddo" in done.stdout
    assert done.stdout.isascii()


def test_numbers_that_json_does_not_know(capsys):
    console.use_json(True)
    console.result({"a": math.nan, "b": [1.5, -math.inf], "c": {"d": (math.inf, "x")}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None, "b": [1.5, None], "c": {"d": [None, "x"]},
    }  # fmt: skip


def test_an_error_after_the_result_leaves_one_object(capsys):
    console.use_json(True)
    console.result({"fid": 1.0})
    console.error("disk", "full")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"fid": 1.0}
    assert "error: full" in err


# ---------------------------------------------------------------------------------------------------------------------
# `ddo fid`

FID = ("fid", "embedded:digits8", "--num-images", "12", "--extractor", "embedded:extractor-digits32", "--no-cache")


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_costs_no_figure(ddo, monkeypatch, tmp_path):
    monkeypatch.setattr(fid_report, "write_text", full)
    done = ddo(*FID, "--ref", "embedded:digits8", "--csv", "x.csv", "--json", code=2)
    found = json.loads(done.stdout)
    assert found["fd_embedded"] > 0
    assert found["not_written"] == ["--csv x.csv could not be written (No space left on device)"]
    message = "error: the figures above are whole, but --csv x.csv could not be written (No space left on device)"
    assert message in done.stderr
    assert "fd_embedded" in ddo(*FID, "--ref", "embedded:digits8", "--csv", "x.csv", code=2).stdout


def test_a_picture_that_cannot_be_drawn_costs_no_figure(ddo, monkeypatch):
    monkeypatch.setattr(pictures, "image_rows", full)
    done = ddo(*FID, "--ref", "embedded:digits8", "--nearest", 2, "--csv", "x.csv", "--json", code=2)
    found = json.loads(done.stdout)
    assert found["fd_embedded"] > 0
    assert "nearest" not in found
    assert "--pictures fid-pictures could not be written (No space left on device)" in done.stderr
    assert Path("x.csv").read_text().count("\n") == 2  # the row is there


def test_places_are_probed_before_the_pass(ddo, monkeypatch, tmp_path):
    monkeypatch.setattr(fid_report.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(fid.one_pass, "run", lambda *_, **__: pytest.fail("a pass"))
    for given in (["--csv", "x.csv"], ["--nearest", 2, "--pictures", "new/there"]):
        done = ddo(*FID, "--ref", "embedded:digits8", *given, code=2)
        assert f"{given[-2]} {given[-1]} cannot be written (No space left on device)" in done.stderr


def test_the_log_leaves_no_lock(ddo, tmp_path):
    for rows in (1, 2):
        ddo(*FID, "--ref", "embedded:digits8", "--csv", "x.csv")
        assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
        assert len((tmp_path / "x.csv").read_text().splitlines()) == rows + 1


def test_rows_of_processes_at_once_all_arrive(tmp_path):
    """The lock's file is removed at each end, and those who wait for it then go on with a new one."""
    (tmp_path / "append.py").write_text(
        "import os\nfrom pathlib import Path\nfrom ddo_cli.engines.fid import report\n"
        "row = {'source': os.environ['RANK'], 'fid': 1.0}\n"
        "for number in range(25): report.append(Path('x.csv'), {**row, 'reference': number})"
    )
    done = launch("append.py", processes=3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "append.py").unlink()
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 1 + 75
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite

TINY = ("model.options={patch: 8, widths: [8], depths: [1], emb_width: 8}", "data.num=64")


@pytest.fixture
def last_goods(monkeypatch):
    """What the plan of a run names as its last good checkpoint when it is about to begin; the run ends there."""
    found = []

    def fit(model, objective, stream, plan, meter):
        found.append(plan.last_good())
        plan.state_file.write_bytes(b"")
        found.append(plan.last_good())
        raise NumericsError("as if diverged")

    monkeypatch.setattr(loop, "fit", fit)
    return found


def test_no_checkpoint_is_named_that_does_not_exist(last_goods, tmp_path, ckpt):
    for number, start in enumerate(
        [
            lambda out: pretrain.run(load("quickstart", [*TINY, "metric.num_images=16"]), out, device=CPU),
            lambda out: train_classifier.run(
                load(
                    "quickstart",
                    ["data={source: embedded:digits32, num: 64}", "classifier={held_out: 16, batch: 16}"],
                    {"model.ckpt": ckpt},
                ),
                out,
                device=CPU,
            ),
            lambda out: train_extractor.run("embedded:digits8", out, held_out=None, images=256, seed=0, device=CPU),
        ]
    ):
        with pytest.raises(NumericsError):
            start(tmp_path / str(number))
        before, after = last_goods[-2:]
        assert before == "none yet"
        assert after.name == "train-state.safetensors"


def test_the_newest_is_the_last_good_one(tmp_path):
    old, new, gone = tmp_path / "old", tmp_path / "new", tmp_path / "gone"
    for path, time in ((old, 10), (new, 20)):
        path.touch()
        os.utime(path, (time, time))
    assert training_run.newest(new, old, gone) == training_run.newest(gone, old, new) == new
    assert training_run.newest(gone) == "none yet"


def test_a_diverged_pretraining_names_the_key_to_lower(tmp_path):
    settings = [*TINY, "pretrain.lr=1e30", "pretrain.warmup=1000000", "pretrain.batch=8", "pretrain.images=80"]
    with pytest.raises(NumericsError, match=r"checkpoint is none yet; lower pretrain\.lr = 1e\+30 and choose"):
        pretrain.run(load("quickstart", [*settings, "metric.num_images=16"]), tmp_path / "run", device=CPU)


def test_home_in_paths(ddo, tmp_path, monkeypatch):
    """--out=~/x reaches the program as it is, and so do recipe values."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    make_checkpoint(tmp_path / "home" / "m.safetensors")
    ddo("sample", "--ckpt=~/m.safetensors", "--num-images=2", "--out=~/set", "steps=2")
    assert (tmp_path / "home" / "set" / "000000.png").is_file()
    given = ["--data=embedded:digits32", "--out=~/run", "model.ckpt=~/m.safetensors"]
    found = ddo("finetune-ddo", "--dry-run", "--no-measure", "--json", *given)
    assert json.loads(found.stdout)["out"] == str(tmp_path / "home" / "run")
    assert not (tmp_path / "~").exists()
