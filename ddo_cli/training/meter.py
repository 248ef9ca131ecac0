"""The training log, a JSON-lines file: means over the steps since the line before."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddo_cli import dist
from ddo_cli.files import append_text, parse_json, recorder_of, write_text


class Meter:
    """Means between two lines of the log, over micro-batches, steps and processes."""

    def __init__(
        self,
        file: Path,
        tags: Mapping[str, Any],
        batch: int,
        device: torch.device,
        derived: Callable[[dict[str, float]], dict[str, float]] = dict,
    ):
        """tags: repeated on every line, e.g. the round. batch: images of a step, over all processes.

        derived: means -> figures of a line. Figures that are not means, such as a standard deviation, are computed
        here, so that they do not depend on micro-batches or processes.
        """
        self.file, self.tags, self.batch, self.device, self.derived = file, tags, batch, device, derived
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.started = time.monotonic()
        self.text = ""

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Adds the means over a micro-batch, which is the share `weight` of the step."""
        for key, value in values.items():
            held = self.sums.pop(key, None)
            if held is None:
                dtype = torch.promote_types(value.dtype, torch.float32)
                held = torch.zeros((), dtype=dtype, device=self.device)
            self.sums[key] = held  # as the last: the order of a step, which a saved state does not keep
        # On a GPU two kernels for all of them.
        shares = torch._foreach_mul([value.detach() for value in values.values()], weight)
        torch._foreach_add_([self.sums[key] for key in values], shares)

    def count(self, norm: Tensor) -> None:
        """Ends a step. norm: of its gradient."""
        self.add({"grad_norm": norm}, 1.0)
        self.steps += 1

    def flush(self, step: int, n_images: int, rate: float, more: dict[str, float]) -> dict[str, float]:
        """Writes a line and starts anew; returns it."""
        keys = list(self.sums)
        means = dist.all_reduce_sum(torch.stack([self.sums[key] for key in keys])) / dist.world_size() / self.steps
        record = self.derived(dict(zip(keys, means.tolist(), strict=True)))
        now = time.monotonic()
        line = {
            **self.tags,
            "step": step,
            "n_images": n_images,
            "lr": rate,
            "images_per_second": round(self.steps * self.batch / max(now - self.started, 1e-9), 2),
            "processes": dist.world_size(),
            **more,
        }
        if dist.is_main():
            append_text(self.file, json.dumps({**line, **record}) + "\n")
        self.text = _shown(record)
        self.sums, self.steps, self.started = {}, 0, now
        return {**line, **record}

    def state(self) -> dict[str, Tensor]:
        """The sums so far of each process, (processes,); every process has to call it."""
        own = torch.arange(dist.world_size(), device=self.device) == dist.rank()
        return {key: dist.all_reduce_sum(own * tensor) for key, tensor in self.sums.items()}

    def restore(self, sums: Mapping[str, Tensor], steps: int) -> None:
        """Continues from the `state` saved after so many steps: to the same bits by as many processes, else from their
        mean.
        """
        are_as_many = all(len(shares) == dist.world_size() for shares in sums.values())
        own = {key: shares[dist.rank()] if are_as_many else shares.mean() for key, shares in sums.items()}
        self.sums, self.steps = {key: tensor.to(self.device) for key, tensor in own.items()}, steps

    def note(self) -> None:
        """Has the log's present content recorded, with each saved state: what follows is written anew after a kill."""
        recorder = recorder_of(self.file)
        if dist.is_main() and recorder is not None and self.file.is_file():
            recorder.note_start(self.file)

    def trim(self, step: int) -> None:
        """Drops lines that a killed process wrote after its last save at `step`: those steps are repeated."""
        if not dist.is_main() or not self.file.is_file():
            return
        kept = []
        for line, record in _lines(self.file):
            if record["step"] <= step or any(record.get(key) != value for key, value in self.tags.items()):
                kept.append(line + "\n")
        write_text(self.file, "".join(kept))


def read(file: Path, *keys: str) -> list[dict[str, Any]]:
    """The lines of a log that have numbers under these keys. A damaged one is left out; the ledger tells of it."""
    return [
        record
        for _, record in _lines(file)
        if all(isinstance(record.get(key), (int, float)) for key in ("n_images", *keys))
    ]


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines as text and content. Left out is what a kill has cut short, or damage made unreadable."""
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def _shown(record: dict[str, float]) -> str:
    names = {"loss": "loss", "r_real": "r real", "r_fake": "fake", "accuracy": "acc"}
    names |= {"accuracy_real": "acc real", "accuracy_fake": "generated", "beta_r_std": "beta std(r)"}
    return "  ".join(f"{label} {record[key]:.3g}" for key, label in names.items() if key in record)
