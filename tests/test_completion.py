"""What shells complete: the answers in this process, and a real bash."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddo_cli import cli
from ddo_cli.commands import completion

TREE = ["runs/mine/state.json", "runs/unfinished/recipe.yaml", "mine.yaml", "weights/a.safetensors", "weights/b.pkl"]
CASES = {  # words as bash cuts them -> what it inserts for the last one
    ("ddo", "finet"): ["finetune-ddo"],
    ("ddo", "finetune-ddo", "--recipe", "quicks"): ["quickstart-few-steps", "quickstart"],
    ("ddo", "finetune", "--recipe", "min"): ["mine.yaml"],
    ("ddo", "finetune-ddo", "--recipe", "=", "quickstart-"): ["quickstart-few-steps"],
    ("ddo", "finetune-ddo", "metric.num_i"): ["metric.num_images=", "metric.num_images=4096"],
    ("ddo", "finetune-ddo", "finetune.objective", "="): ["ddo", "cca", "spin", "dpo"],
    ("ddo", "finetune-ddo", "finetune.objective", "=", "c"): ["cca"],
    ("ddo", "finetune-ddo", "data.hflip", "=", "t"): ["true"],
    ("ddo", "sample", "sigma_m"): ["sigma_min=", "sigma_max="],
    ("ddo", "sample", "--sampler", "dpm"): ["dpmpp-2m", "dpm-v3"],
    ("ddo", "sample", "--format", ""): ["png", "npz", "shards"],
    ("ddo", "sample", "--device", "cu"): ["cuda"],
    ("ddo", "sample", "--ckpt", "runs/m"): ["runs/mine"],
    ("ddo", "sample", "--ckpt", "weights/"): ["weights/a.safetensors"],
    ("ddo", "sample", "--ckpt", "wei"): ["weights/"],
    ("ddo", "sample", "--ckpt", "embedded", ":", "toy"): ["toy2d", "toy2d-wrong"],
    ("ddo", "guide-sample", "--disc", "runs/"): ["runs/mine"],
    ("ddo", "finetune-ddo", "--objective", "s"): ["spin"],
    ("ddo", "finetune-ddo", "--data", "ima"): [],  # the shell's own: files
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_answers_to_bash(words, place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddo"])
    monkeypatch.setenv(completion.VARIABLE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == CASES[words]


def test_completing_does_not_import_torch(place):
    code = "from ddo_cli.commands import completion as c, options; import sys; "
    code += "assert c.weights('') and c.recipes('') and c.recipe_keys('data.') and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(cli.__file__).parents[1])})


@pytest.fixture
def bash(place) -> tuple[str, dict[str, str]]:
    """A bash, and an environment in which `ddo` is a command and nothing of the user's is read or written."""
    program = shutil.which("bash")
    if program is None:
        pytest.skip("no bash")
    tool = place / "bin" / "ddo"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ddo_cli "$@"\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{Path(program).parent}:/usr/bin:/bin"
    return program, {"PATH": path, "HOME": str(place), "PYTHONPATH": str(Path(cli.__file__).parents[1])}


@pytest.mark.slow
def test_a_real_bash(bash, place):
    """Installed as a user does, into this home's .bashrc, then asked by the function that it defines."""
    program, environment = bash
    asked = [*CASES][4:8]
    lines = ["ddo --install-completion bash || ddo --install-completion", "source ~/.bashrc", "complete -p ddo"]
    for words in asked:
        quoted = " ".join(f"'{word}'" for word in words)
        lines += [
            f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}",
            "_ddo_completion ddo",
            'echo "${COMPREPLY[*]}"',
        ]
    done = subprocess.run(
        [program, "--norc", "-c", "\n".join(lines)], env=environment, cwd=place, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    answers = done.stdout.partition("complete -o default")[2].splitlines()[1:]
    assert answers == [" ".join(CASES[words]) for words in asked], done


@pytest.mark.slow
def test_keys_typed_into_a_terminal(bash, place):
    """The tabulator, pressed in tmux."""
    if (tmux := shutil.which("tmux")) is None:
        pytest.skip("no tmux")
    program, environment = bash
    (place / ".bashrc").write_text('PS1="> "; eval "$(ddo --show-completion)"; echo ready\n')
    environment |= {"TERM": "screen", "TMUX_TMPDIR": str(place)}

    def call(*words: str) -> str:
        done = subprocess.run([tmux, *words], env=environment, cwd=place, capture_output=True, text=True, check=True)
        return done.stdout

    def wait_for(text: str) -> None:
        for _ in range(600):
            if text in (screen := call("capture-pane", "-p")):
                return
            time.sleep(0.1)
        pytest.fail(screen)

    call("new-session", "-d", "-x", "80", "-y", "24", f"{program} --rcfile {place}/.bashrc -i")
    try:
        wait_for("ready")
        for typed, shown in (
            ("ddo finetune-ddo finetune.obj", "finetune.objective="),
            ("cc", "finetune.objective=cca"),
        ):
            call("send-keys", "-l", typed)
            call("send-keys", "Tab")
            wait_for(shown)
    finally:
        call("kill-server")
