"""Kills, full disks and I/O errors at the file operations of every command, and whether the same line then ends as
undisturbed: same files, same bytes, nothing lost, nothing left behind.

    python tests/faults/campaign.py --at renames          # SIGKILL before and after every rename and fsync
    python tests/faults/campaign.py --at random --count 5 # five SIGKILLs of each command at random moments
    python tests/faults/campaign.py --fault full --at all --only sample-png,finetune-ddo

A table on stdout, cases that do not hold below it. Linux with a C compiler. Commands are forked from this process,
which has imported torch; the C library `shim.c` counts what they do to files.
"""

import argparse
import ctypes
import errno
import gc
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
LIMIT, HANGS = 240, -1000  # seconds of one command, and the code of one that takes longer
FAULTS = ("kill", "full", "io", "term", "int")
KILL_BEFORE, KILL_AFTER, FAIL, FAIL_FROM_THERE_ON, SIGNAL = range(1, 6)  # of shim.c
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
ACTIONS = {
    "full": (FAIL_FROM_THERE_ON, errno.ENOSPC), "io": (FAIL, errno.EIO),
    "term": (SIGNAL, SIGNALS["term"]), "int": (SIGNAL, SIGNALS["int"]),
}  # fmt: skip
CODES = {"kill": (-signal.SIGKILL,), "full": (0, 2), "io": (0, 2), "term": (143, 75), "int": (130,)}
FOREIGN = {".tmpAbC123": "a user's", "notes.txt": "mine", ".film.7.part": "half a download"}  # are never touched
WRITES = "open write rename fsync truncate chmod allocate unlink rmdir mkdir link"  # kinds of operations
READS = "open-to-read read"
KINDS = {"renames": "rename fsync", "all": WRITES, "random": WRITES, "reads": READS}  # by --at
OWN_COURSE = (".files.jsonl", "state.previous.json")  # the ledger and the state before tell of each write of a run
TIMES = ("images_per_second",)  # figures that no two runs share
ROW = "{:20} {:4} at {:8} {:5} operations {:5} cases, {:5} as undisturbed, {:3} with strays"


class Plan(NamedTuple):
    """Which faults a command meets. count: of how many operations, drawn at random, or how many random moments; 0: all.
    every: the first operation of so many, and then each so-many-th. only: these commands; empty: all.
    """

    fault: str
    at: str
    count: int = 0
    every: int = 1
    only: tuple[str, ...] = ()


def few(number: int) -> tuple[Plan, ...]:
    """--few, of the command of this number: a kill; a full disk or an I/O error, by turns; some others."""
    return (
        Plan("kill", "renames", 1), Plan(("full", "io")[number % 2], "all", 1),
        Plan("io", "reads", 2, only=("encode", "export-pt", "export-folder", "ema")),
        Plan("term", "random", 1, only=("sample-png", "encode", "finetune-ddo")),
        Plan("int", "random", 1, only=("sample-png", "encode", "finetune-ddo")),
    )  # fmt: skip


class Fault(NamedTuple):
    """What happens at the n-th file operation below the directory. seconds: the signal `code` instead, so long after
    the command has begun.
    """

    number: int = 0
    action: int = 0
    code: int = 0
    seconds: float = 0.0


NONE = Fault()


class Done(NamedTuple):
    code: int
    err: str
    operations: list[tuple[str, str]]  # kind and path
    hit: str


def with_shim() -> None:
    """Starts this program again with shim.c loaded, unless it is."""
    if "DDO_FAULTS" in os.environ:
        return
    library = Path(tempfile.mkdtemp()) / "shim.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    os.environ |= {"DDO_FAULTS": str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    os.execv(sys.executable, [sys.executable, *sys.argv])


def carry_out(command: list[str], place: Path, fault: Fault = NONE, kinds: str = WRITES) -> Done:
    """`ddo COMMAND` in a forked process, whose current directory, home, cache and temporary files lie in `place`."""
    trace, err = place.with_suffix(".trace"), place.with_suffix(".err")
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = _command(command, place, fault, kinds, trace, err)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = _waited(pid, fault)
    lines = trace.read_text().splitlines()
    hit = next((line.partition(" ")[2] for line in lines if line.startswith("HIT")), "")
    rows = [line.split(" ", 2) for line in lines if not line.startswith("HIT")]
    return Done(code, err.read_text(), [(kind, path) for _, kind, path in rows], hit.replace(f"{place}/", ""))


def _command(command: list[str], place: Path, fault: Fault, kinds: str, trace: Path, err: Path) -> int:
    """In the child: as `python -m ddo_cli COMMAND`."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"HOME": f"{place}/home", "DDO_CACHE": f"{place}/cache", "TMPDIR": f"{place}/tmp"}
    os.chdir(place)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(err, flags), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    log = os.open(trace, flags)
    from ddo_cli import cli

    sys.argv = ["ddo", *command]
    where = ctypes.c_long(fault.number)
    ctypes.CDLL(None).faults_arm(str(place).encode(), where, fault.action, fault.code, kinds.encode(), log)
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    threading._shutdown()  # as the interpreter does at its end
    sys.stdout.flush()
    return code


def _waited(pid: int, fault: Fault) -> int:
    """The exit code; HANGS if the process does not end."""
    begun, seconds, end = 0.0, fault.seconds, time.monotonic() + LIMIT
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if seconds and not begun and _catches(pid, signal.SIGTERM):
            begun = time.monotonic()
        if seconds and begun and time.monotonic() > begun + seconds:
            os.killpg(pid, fault.code)  # all processes, as a terminal does
            seconds = 0.0
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return HANGS


def _catches(pid: int, number: int) -> bool:
    """Whether a process handles a signal: before, it has not begun its command and may die of it."""
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


# --- What a directory holds


def content(place: Path, adds: str) -> dict[str, Any]:
    """Every file by name, without figures of time, and every directory."""
    found = dict[str, Any]()
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_dir():
            found[f"{name}/"] = "directory"
        elif path.name in OWN_COURSE:
            found[name] = "there"
        elif path.suffix == ".jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        else:
            content = re.sub(rb'<section id="cost">.*?</section>', b"", path.read_bytes(), flags=re.DOTALL)
            found[name] = content if name != adds else "added to"
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """For people."""
    lines = [f"left behind {name}" for name in found.keys() - expected.keys()]
    lines += [f"lost {name}" for name in expected.keys() - found.keys()]
    return lines + [f"different {name}" for name in expected.keys() & found.keys() if expected[name] != found[name]]


# --- The campaign


class Case(NamedTuple):
    """A command, what disturbed it, and what does not hold."""

    workload: str
    fault: str
    hit: str
    code: int
    message: str
    problems: list[str]


class Campaign:
    """The commands of `workloads` in directories below `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.inputs = root / "inputs"
        self._child(lambda: self._workloads_module().write_inputs(self.inputs))
        self.workloads = self._workloads_module().workloads(self.inputs)
        self.prepared: dict[str, Path] = {}
        self.undisturbed: dict[str, tuple[dict[str, Any], Done, float]] = {}

    @staticmethod
    def _workloads_module() -> Any:
        sys.path[:0] = [str(HERE), str(HERE.parent)]
        import workloads

        return workloads

    @staticmethod
    def _child(work: Callable[[], None]) -> None:
        """In a process of its own: one that has computed is no good to fork from."""
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, "inputs could not be made"

    def fresh(self, name: str) -> Path:
        """A directory in which everything before the command is done; always of the same name, which files hold."""
        if name not in self.prepared:
            place = self.root / "place"
            shutil.rmtree(place, ignore_errors=True)
            for part in ("home", "cache", "tmp"):
                (place / part).mkdir(parents=True)
            for foreign, text in FOREIGN.items():
                (place / foreign).write_text(text)
            for command in self.workloads[name].before:
                done = carry_out(command, place)
                assert done.code == 0, f"{command}: {done.err}"
            self.prepared[name] = self.root / "prepared" / name
            shutil.copytree(place, self.prepared[name], copy_function=shutil.copy2)
        place = self.root / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.prepared[name], place, copy_function=shutil.copy2)
        return place

    def expected(self, name: str) -> tuple[dict[str, Any], Done, float]:
        """What the undisturbed command leaves, all its operations and its seconds."""
        if name not in self.undisturbed:
            place, start = self.fresh(name), time.monotonic()
            done = carry_out(self.workloads[name].command, place, kinds=f"{WRITES} {READS}")
            assert done.code == 0, f"{name}: {done.err}"
            seconds = time.monotonic() - start
            self.undisturbed[name] = content(place, self.workloads[name].adds), done, seconds
        return self.undisturbed[name]

    def cases(self, name: str, plan: Plan, rng: random.Random) -> Iterator[Case]:
        """The command with the faults of a plan, one after another."""
        for faults in faults_of(plan, self.number(name, plan), self.expected(name)[2], rng):
            yield self.case(name, plan.fault, faults, KINDS[plan.at])

    def number(self, name: str, plan: Plan) -> int:
        """How many operations of the undisturbed command a plan is about."""
        counted = KINDS[plan.at].split()
        return sum(kind in counted for kind, _ in self.expected(name)[1].operations)

    def case(self, name: str, kind: str, faults: list[Fault], kinds: str) -> Case:
        """The command, disturbed by each of the faults in turn, and then left alone."""
        workload, (expected, _, _) = self.workloads[name], self.expected(name)
        place, problems, hits = self.fresh(name), list[str](), list[str]()
        code, message, said = 0, "", ""
        for fault in faults:
            done = carry_out(workload.command, place, fault, kinds)
            hits.append(done.hit or (f"after {fault.seconds:.2f} s" if fault.seconds else "not reached"))
            reached = bool(done.hit) or (fault.seconds > 0 and done.code != 0)
            code, message, said = done.code, last_line(done.err), f"{said} {' '.join(done.err.split())}"
            if reached:
                problems += judged(kind, done)
        again = carry_out(workload.command, place)
        if again.code or "Traceback" in again.err:
            problems.append(f"the same line then ends with {again.code}: {last_line(again.err)}")
        problems += [
            text
            for text in differences(expected, content(place, workload.adds))
            if f"{text.removeprefix('left behind ')} could not be removed" not in said  # a stray that was told
        ]
        return Case(name, kind, ", ".join(hits), code, message, problems)


def last_line(err: str) -> str:
    """What a command said last."""
    lines = err.strip().splitlines()
    return lines[-1] if lines else ""


def judged(kind: str, done: Done) -> list[str]:
    """What is wrong with how a disturbed command ended."""
    problems = []
    if done.code not in CODES[kind]:
        problems.append(f"ends with {done.code}: {last_line(done.err)}")
    if "Traceback" in done.err or "Exception ignored" in done.err:
        problems.append(f"traceback: {last_line(done.err)}")
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    if kind != "kill" and done.code and (len(errors) != 1 or len(errors[0]) > 300):
        problems.append(f"{len(errors)} messages: {errors}")
    if (
        kind in ("full", "io")
        and done.code
        and (re.search(r"-\d+\.(part|whole)", done.err) or os.strerror(ACTIONS[kind][1]) not in done.err)
    ):
        problems.append(f"the message names no file, or no reason: {errors}")
    return problems


def faults_of(plan: Plan, number: int, seconds: float, rng: random.Random) -> Iterator[list[Fault]]:
    """The disturbances of a command of so many operations and seconds."""
    numbers = list(range(1, number + 1, plan.every))
    if plan.at == "random":
        for _ in range(plan.count):
            if plan.fault in SIGNALS:
                times = [rng.uniform(0.03, seconds) for _ in range(rng.choice((1, 1, 2)))]
                yield [Fault(code=SIGNALS[plan.fault], seconds=time) for time in times]
            else:
                yield [Fault(rng.choice(numbers), *ACTIONS[plan.fault])]
        return
    if plan.count:
        numbers = sorted(rng.sample(numbers, min(plan.count, len(numbers))))
    for place in numbers:
        if plan.fault == "kill":
            yield from ([Fault(place, action)] for action in (KILL_BEFORE, KILL_AFTER))
        else:
            yield [Fault(place, *ACTIONS[plan.fault])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=FAULTS, default="kill")
    parser.add_argument("--at", choices=KINDS, default="renames")
    parser.add_argument("--count", type=int, default=0, help="most operations of each command; 0: all")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="the first operation of N, and then each N-th"
    )
    parser.add_argument("--few", action="store_true", help="each kind of fault once or twice, in place of the above")
    parser.add_argument("--only", default="", help="workloads between commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    with_shim()
    prepare()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        campaign = Campaign(Path(directory).resolve())
        names = options.only.split(",") if options.only else list(campaign.workloads)
        failed, rows = list[Case](), list[tuple[Any, ...]]()
        for number, name in enumerate(names):
            whole = Plan(options.fault, options.at, options.count, options.every)
            for plan in few(number) if options.few else [whole]:
                if plan.only and name not in plan.only:
                    continue
                cases = []
                for case in campaign.cases(name, plan, rng):
                    cases.append(case)
                    if options.verbose or case.problems:
                        print(*case, sep=" | ", file=sys.stderr, flush=True)
                bad = [case for case in cases if case.problems]
                failed += bad
                strays = sum(any(p.startswith("left") for p in case.problems) for case in bad)
                counts = campaign.number(name, plan), len(cases), len(cases) - len(bad), strays
                rows.append((name, plan.fault, plan.at, *counts))
                print(ROW.format(*rows[-1]), flush=True)
    print(f"{sum(row[4] for row in rows)} cases, {len(failed)} fail")
    return int(bool(failed))


def prepare() -> None:
    """Imports what every command needs, and draws figures as one pixel: they take most of a tiny run."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import matplotlib.figure
    from PIL import Image

    import ddo_cli

    for module in pkgutil.walk_packages(ddo_cli.__path__, "ddo_cli."):
        if module.name not in ("ddo_cli.__main__", "ddo_cli.assets.build"):
            __import__(module.name)
    for name in ("torch._dynamo", "torch.utils._sympy.functions", "diffusers", "workloads"):
        __import__(name)
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel  # noqa: F401 (loaded when asked for)

    Image.init()
    from ddo_cli.engines import scoring

    scoring.GRID_SEEDS = range(1)
    pixel = Image.new("RGB", (1, 1))

    def savefig(figure: Any, place: Any, *, format: str, **_: Any) -> None:
        if format == "svg":
            place.write("<svg ></svg>")
        else:
            pixel.save(place, format)

    matplotlib.figure.Figure.savefig = savefig  # type: ignore[method-assign]
    gc.collect()
    gc.freeze()  # else each training would look through all of torch, at 0.3 s a time


if __name__ == "__main__":
    sys.exit(main())
