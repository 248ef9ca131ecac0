"""What resuming needs, on disk: weights, moments of the optimizer, averages, sums of the log, and the step."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist, ledger, sharding
from ddo_cli.errors import CheckpointError, RunError
from ddo_cli.files import remove
from ddo_cli.training import optim
from ddo_cli.training.ema import Averages
from ddo_cli.training.meter import Meter
from ddo_cli.training.optim import Stepper
from ddo_cli.transfer import snapshot


class State:
    """The state of one `fit`: one file, or with sharded weights a directory beside it (`sharding`). To be closed.

    On a GPU `save` copies the tensors once, and a thread writes the file while training goes on; the file before it
    stays until then. Elsewhere, and with sharded weights, `save` writes. (A CPU would hold the state twice.)
    """

    def __init__(
        self,
        file: Path,
        owner: str,
        sharded: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stepper: Stepper,
        averages: Averages,
        meter: Meter,
    ):
        """owner: identifies the run; a state of another is refused. sharded: "ddp" or "fsdp"."""
        self.file, self.owner, self.is_sharded = file, owner, sharded == "fsdp"
        self.model, self.optimizer, self.stepper = model, optimizer, stepper
        self.averages, self.meter = averages, meter
        self._is_good = True  # what `file` holds; what is damaged does not become the state before
        self._writer = ThreadPoolExecutor(1, "state") if _is_written_behind(meter.device, self.is_sharded) else None
        self._written: Future[None] | None = None  # by the thread

    def save(self, step: int) -> None:
        """Writes the state after a step, or begins to, once the one before is written; every process has to call it.

        Raises OSError, for example if the disk is full.
        """
        self._wait()
        self.meter.note()
        sums = {f"meter.{name}": tensor for name, tensor in self.meter.state().items()}
        header = {"kind": "train-state", "step": step, "metered_steps": self.meter.steps, "owner": self.owner}
        header |= {"loss_scale": self.stepper.state()}
        if self._writer is not None:
            if dist.is_main():
                self._written = self._writer.submit(self._write, *snapshot({**self._tensors(), **sums}), header)
            return
        if self.is_sharded:
            sharding.save(state_directory(self.file), step, self._tensors(), sums, header)
        elif dist.is_main():
            self._write({**self._tensors(), **sums}, lambda: None, header)
        dist.barrier()

    def check(self) -> None:
        """Raises what a write has failed with, without waiting for one under way."""
        if self._written is not None and self._written.done():
            self._wait()

    def settle(self) -> None:
        """Waits until the state is on disk; every process has to call it. Raises OSError as `save`."""
        self._wait()
        dist.barrier()

    def close(self) -> None:
        """Waits for a write under way. Its failure is not told: training has ended, by another error or in `settle`."""
        if self._writer is not None:
            self._writer.shutdown()

    def _write(self, tensors: dict[str, Tensor], wait: Callable[[], None], header: dict[str, Any]) -> None:
        wait()
        checkpoint.save(self.file, tensors, header, before(self.file) if self._is_good else None)
        self._is_good = True

    def _wait(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def restore(self) -> int:
        """Takes over the saved state, or the one before if that is damaged; returns its step, 0 where there is none.

        Raises RunError for another run's, or if both are damaged.
        """
        dist.barrier()
        place, file = self._newest_good()
        if file is None:
            return 0
        saved = read_state(file, self.owner)
        tensors = self._tensors()
        if place is not None:
            sharding.load(place, tensors)
        else:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(saved.tensors[name])
        adam = {name.removeprefix("adam."): t for name, t in tensors.items() if name.startswith("adam.")}
        optim.counted(self.optimizer, adam)
        self.stepper.restore(saved.header.get("loss_scale", {}))
        sums = {name.removeprefix("meter."): t for name, t in saved.tensors.items() if name.startswith("meter.")}
        self.meter.restore(sums, saved.header["metered_steps"])
        return int(saved.header["step"])

    def _newest_good(self) -> tuple[Path | None, Path | None]:
        """Directory (None for a single file) and file of the newest state that is not damaged; None: there is none."""
        places = sharding.saved(state_directory(self.file)) if self.is_sharded else [self.file, before(self.file)]
        here = self.file.parent
        judged = {place.relative_to(here): _problem(place) for place in places} if dist.is_main() else {}
        problems = {here / name: problem for name, problem in dist.from_main(judged).items()}
        found = next((place for place, problem in problems.items() if problem is None), None)
        told = [f"{place} {problem}" for place, problem in problems.items() if problem not in (None, _NONE)]
        self._is_good = not problems or found == next(iter(problems))
        if found is None and len(told) > 1 and any("damaged" in line for line in told):
            raise RunError(f"{told[0]}, and {told[1]}; remove both, and this training starts again")
        if found is None and told:
            console.warn(f"{told[0]}; training starts again")
        elif told and not self._is_good:
            console.warn(f"{told[0]}; training goes on from the state before, {found}")
        if found is None or not self.is_sharded:
            return None, found
        return found, found / sharding.REST

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors that a step changes, themselves and not copies: "model.<name>", "ema.<name>",
        "adam.<number>.<key>". Also before the first step, since `optim.build` makes Adam's moments.
        """
        return {
            **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            **self.averages.tensors(),
            **{f"adam.{name}": tensor for name, tensor in optim.tensors(self.optimizer).items()},
        }


def _is_written_behind(device: torch.device, is_sharded: bool) -> bool:
    return device.type == "cuda" and not is_sharded


_NONE = "is not there"  # and need not be


def _problem(place: Path) -> str | None:
    """What is wrong with a saved state."""
    if not place.exists():
        return "is missing" if ledger.near(place.parent).is_listed(place) else _NONE
    if problems := ledger.near(place.parent).problems(place):
        return next(iter(problems.values()))
    try:
        checkpoint.read_header(place / sharding.REST if place.is_dir() else place, kind="train-state")
    except CheckpointError:
        return "is damaged"
    return None


def before(state_file: Path) -> Path:
    """Where the state saved before the newest lies."""
    return state_file.with_name(f"{state_file.stem}-before{state_file.suffix}")


def state_directory(state_file: Path) -> Path:
    """Where the state lies that takes the place of `state_file` when weights are sharded."""
    return state_file.with_suffix("")


def drop_state(state_file: Path) -> None:
    """Removes what resuming needs, in either form."""
    for place in (state_file, before(state_file), state_directory(state_file)):
        if place.exists():
            remove(place)


def read_state(file: Path, owner: str) -> checkpoint.Checkpoint:
    """What the main process found, as every process reads it. Raises RunError, on all of them alike.

    Without a shared directory the others would find nothing there, or the state of another step; they would begin at
    that step, and wait in sums that the main process does not take part in.
    """
    is_there = dist.is_main() or file.is_file()
    saved = checkpoint.load(file, kind="train-state") if is_there else None
    states = dist.gathered(saved and (saved.header.get("step"), saved.header.get("owner")))
    step, its_owner = states[0] or (None, None)
    if its_owner != owner:
        raise RunError(f"{file} belongs to another run; remove it or choose another --out")
    for rank, state in enumerate(states):
        if state != states[0]:
            other = f"of step {state[0]}" if state else "missing"
            raise RunError(
                f"{file} is of step {step} for the main process and {other} for process {rank}; --out must be a "
                "directory that all processes share"
            )
    assert saved is not None, "as for the main process"
    return saved
