"""Signals of a scheduler: training saves its state, exits with 75, and the same line goes on to the same bytes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_checkpoint, torchrun
from launch import launch

from ddo_cli.training import loop

ROOT = Path(__file__).parent.parent
LINE = (
    "finetune-ddo", "--ckpt", "m.safetensors", "--out", "run", "--data", "embedded:digits32", "--rounds", "1",
    "--eval-num", "16", "--batch", "4", "--images-per-round", "40", "--num-fake", "16", "--eval-every", "40",
    "data.num=64", "metric.repeats=1", "finetune.log_every=2", "finetune.save_every=4", "finetune.warmup=0",
    "sampling={sampler: heun, steps: 2, batch: 16, sigma_min: null, sigma_max: null}", "finetune.draw={}",
)  # fmt: skip
# Sends a process a signal at a step, or ends it; then the program.
SCRIPT = """
import os, signal, sys
from ddo_cli import cli
from ddo_cli.training import loop
rate, calls, act = loop.learning_rate, [], sys.argv.pop(1)
is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
def learning_rate(*arguments):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1" and is_first:
        os._exit(1) if act == "exit" else os.kill(os.getpid(), signal.SIGTERM)
    return rate(*arguments)
loop.learning_rate = learning_rate
cli.main()
"""


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_a_step_saves_it(ddo, tmp_path, monkeypatch, number):
    make_checkpoint(tmp_path / "m.safetensors")
    rate, calls = loop.learning_rate, []

    def learning_rate(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return rate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", learning_rate)
        stopped = ddo(*LINE, "--json", code=75)
        assert "stopped by a signal after step 3, whose state is saved; the same command continues" in stopped.stderr
        assert '"kind": "stopped"' in stopped.stdout
        assert " parameters on cpu, in run\n" in stopped.stderr
        assert " parameters on cpu, in run/round-01/samples\n" in stopped.stderr
        assert len(calls) == 3
        again = ddo(*LINE).stderr
        assert "round 1/1 fake set: all 16 items are there, in run/round-01/samples\n" in again
        assert "round 1/1 continues at step 3\n" in again
        assert len(calls) == 10  # none of its steps was done again
    ddo(*LINE, "--out", "whole")
    assert (tmp_path / "run" / "final.safetensors").read_bytes() == (
        tmp_path / "whole" / "final.safetensors"
    ).read_bytes()
    logs = [re.sub(r'"images_per_second": [\d.]+', "", (tmp_path / name / "log.jsonl").read_text())
            for name in ("run", "whole")]  # fmt: skip
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_one_of_two_processes_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "m.safetensors")
    (tmp_path / "told.py").write_text(SCRIPT)
    stopped = launch("told.py", "term", *LINE, processes=2)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by a signal after step 6" in stopped.stderr  # the next at which they ask one another
    torchrun("-m", "ddo_cli", *LINE)
    torchrun("-m", "ddo_cli", *LINE, "--out", "whole")
    assert (tmp_path / "run" / "final.safetensors").read_bytes() == (
        tmp_path / "whole" / "final.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_elastic_restart(tmp_path, monkeypatch):
    """torchrun starts both processes again after one has failed; they continue from the saved state."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "m.safetensors")
    (tmp_path / "fails.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "fails.py", "exit", *LINE], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    torchrun("-m", "ddo_cli", *LINE, "--out", "whole")
    assert (tmp_path / "run" / "final.safetensors").read_bytes() == (
        tmp_path / "whole" / "final.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_more_processes_than_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "m.safetensors")
    torchrun("-m", "ddo_cli", "sample", "--ckpt", "m.safetensors", "--num-images", "2", "--out", "few", processes=3)
    assert len(list((tmp_path / "few").glob("*.png"))) == 2
    refused = launch("-m", "ddo_cli", *LINE, processes=3)
    assert refused.returncode == 2
    assert "batch = 4 cannot be shared by 3 processes; use a multiple of 3" in refused.stderr
