"""`make fuzz`: tries mutated inputs on every parser for some minutes, and prints a table.

    make fuzz MINUTES=20                             until the time is over
    make fuzz FUZZ="--inputs 100000 --only npz,zip"  so many in all, of these targets
    make fuzz FUZZ="--again fuzz-failures/npz-0"     a saved input once more, with its traceback

Each batch of a target runs in a process of its own, with a limit of memory, and one that is stuck is killed.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import Problem, Tally, Target, attempt, fuzz, keep
from targets import TARGETS

from ddo_cli import console

BATCH = 400  # inputs of a process
ADDRESSES = 8 << 30  # bytes of memory beyond what the process starts with: what asks for more gets a MemoryError
STUCK = 120  # seconds after which a process without a result is killed: some C code takes no signals


def main() -> int:
    """Prints the table; returns 1 if there was a failure."""
    given = _options()
    if given.again:
        return again(given.again)
    targets = [target for target in TARGETS if not given.only or target.name in given.only.split(",")]
    out, tallies = Path(given.out), {target.name: Tally() for target in targets}
    end, number = time.monotonic() + 60 * given.minutes, given.seed
    torch.set_num_threads(1)

    def is_over() -> bool:
        done = sum(tally.inputs for tally in tallies.values())
        return done >= given.inputs if given.inputs else time.monotonic() > end

    while not is_over():
        for target in targets:
            tallies[target.name].add(batch(target, given.batch, number, out))
            if is_over():
                break
        number += 1
        if given.table:
            Path(given.table).write_text(json.dumps({name: vars(tally) for name, tally in tallies.items()}))
    show(tallies)
    return 1 if any(tally.failures for tally in tallies.values()) else 0


def batch(target: Target, number: int, first_seed: int, out: Path) -> Tally:
    """The tally of a process that tries so many inputs of a target."""
    root = Path(tempfile.mkdtemp(prefix="ddo-fuzz-"))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(target, number, first_seed, root, theirs))
    try:
        process.start()
        theirs.close()
        try:
            tally: Tally = ours.recv()
        except EOFError:  # it died, and the input that killed it is still there
            process.join()
            tally = Tally(inputs=1)
            problem = Problem(f"the process ended with {process.exitcode}", f"seed {first_seed}")
            tally.failures[problem.kind] += 1
            keep(root / "failures", target.name, root / "input", problem)
        process.join()
        if tally.failures:
            _collect(root / "failures", out)
        return tally
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _child(target: Target, number: int, first_seed: int, root: Path, answer: Any) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, size + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    errors = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes there by itself
    read = target.read

    def watched(place: Path) -> object:
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            return read(place)
        finally:
            faulthandler.cancel_dump_traceback_later()

    try:
        answer.send(fuzz(target._replace(read=watched), number, first_seed, root))
    except BaseException:
        os.dup2(errors, 2)
        raise
    answer.close()


def _collect(failures: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for kept in sorted(failures.iterdir()):
        name = kept.name.rpartition("-")[0]
        shutil.move(kept, out / f"{name}-{len([*out.glob(f'{name}-*')])}")


def again(kept: str) -> int:
    """Tries a saved input; its name begins with that of its target."""
    target = next(t for t in TARGETS if t.name == Path(kept).name.rpartition("-")[0])
    problem = attempt(target, Path(kept) / "input", tally := Tally())
    print(problem.text if problem else f"{'accepted' if tally.accepted else 'refused'}")
    return 1 if problem else 0


def show(tallies: dict[str, Tally]) -> None:
    """Prints what each target did."""
    columns = ("target", "inputs", "accepted", "refused", "slowest", "memory", "failures")

    def row(name: str, tally: Tally) -> tuple[str, ...]:
        counts = (tally.inputs, tally.accepted, tally.refused)
        failed = sum(tally.failures.values())
        return (
            name,
            *(f"{count:,}" for count in counts),
            f"{tally.slowest:.2f} s",
            f"{tally.memory:.0f} MB",
            str(failed),
        )

    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    rows = [row(name, tally) for name, tally in tallies.items()] + [row("all", total)]
    console.result({}, table=console.table("mutated inputs", columns, rows))
    for name, tally in tallies.items():
        for kind, count in tally.failures.most_common():
            print(f"{name}: {count} x {kind}".encode("unicode_escape").decode())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tries mutated inputs on every parser.")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long")
    parser.add_argument("--inputs", type=int, help="how many in all, in place of a time")
    parser.add_argument("--only", help="names of targets, with commas")
    parser.add_argument("--seed", type=int, default=0, help="first seed; each round of all targets takes the next")
    parser.add_argument("--batch", type=int, default=BATCH, help="inputs of a process")
    parser.add_argument("--out", default="fuzz-failures", help="directory for inputs that fail")
    parser.add_argument("--table", help="JSON file for the figures, written after each round")
    parser.add_argument("--again", help="a saved input to try once more")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
