"""The program in processes of its own, forked from a server that has imported torch: a start costs 0.1 s, not 3.

Real interpreters are started only where a test is about them: what imports load, peaks of memory, torchrun itself.
"""

import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

import ddo_cli

TIMEOUT = 240  # seconds
NO_IMPORTS = ("ddo_cli.__main__", "ddo_cli.assets.build")  # programs
_SERVER = multiprocessing.get_context("forkserver")
_OURS = [module.name for module in pkgutil.walk_packages(ddo_cli.__path__, "ddo_cli.") if module.name not in NO_IMPORTS]
_SERVER.set_forkserver_preload(["torch", "matplotlib.figure", *_OURS])


def _work(command: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    """`python COMMAND` in the forked process: `-m module ...` or a script and its arguments."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    finally:  # a fork ends without the handlers of exit
        if (coverage := sys.modules.get("coverage")) and (measured := coverage.Coverage.current()):
            measured.stop()
            measured.save()


def launch(
    *command: object, processes: int = 1, cwd: Path | str | None = None, until: Callable[[], bool] = lambda: False
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND`; with several processes as torchrun starts them, which ends all when one fails.

    command: `-m ddo_cli ...` or a script and its arguments. until: kills them as soon as this holds.
    """
    cwd = str(cwd or Path.cwd())
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    started: list[BaseProcess] = []
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory) / "out", Path(directory) / "err"
        out.touch()
        err.touch()
        for rank in range(processes):
            given = {**os.environ, "OMP_NUM_THREADS": "1"}
            if store is not None:
                given |= group(rank, processes, store.port)
            arguments = (list(map(str, command)), cwd, given, str(out), str(err))
            started.append(_SERVER.Process(target=_work, args=arguments))
            started[-1].start()
        try:
            code = _ended(started, until)
        finally:
            for process in started:
                process.kill()
                process.join()
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def group(rank: int, processes: int, port: int) -> Mapping[str, str]:
    """What torchrun tells a process. The store is the caller's, so that no other program can take its port."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in (ranks | place).items()}


def _ended(started: list[BaseProcess], until: Callable[[], bool]) -> int:
    """The exit code: 0 once all have ended with it, else that of the first to fail."""
    end = time.monotonic() + TIMEOUT
    while (codes := [process.exitcode for process in started]) and time.monotonic() < end:
        if failed := [code for code in codes if code]:
            return failed[0]
        if None not in codes:
            return 0
        if until():
            return -signal.SIGKILL
        multiprocessing.connection.wait([p.sentinel for p in started if p.exitcode is None], timeout=0.005)
    raise TimeoutError(f"{TIMEOUT} s have passed")
