"""Batches of training, made ahead: while the device works on one, a thread gathers and draws the next."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ddo_cli.rng import StepRng
from ddo_cli.trainable import map_tensors

T = TypeVar("T")
_AHEAD = 2  # batches made ahead. Our choice: one is copied while the next is made


class Stream(Protocol):
    """Training rows by position, e.g. (items, labels) or (real, fake): any process can look up any position."""

    def rows(self, start: int, stop: int) -> tuple[object, ...]: ...


def batches_of(
    make: Callable[..., Any],
    stream: Stream,
    key: tuple[int | str, ...],
    steps: range,
    pauses: Collection[int],
    pieces: Sequence[tuple[int, int]],
    batch: int,
    device: torch.device,
) -> Generator[Any, None, None]:
    """The batch of every forward pass of these steps, in order and on the device. To be closed.

    make: (*rows, generators) -> batch, see `Objective`. pieces: (start, stop) of the rows of each pass within `batch`.
    On a GPU batches are made ahead and pinned by a thread, and copied without waiting. On a CPU they are made when
    asked for: its cores are busy already.
    pauses: steps before which nothing is made ahead, so that no thread runs while models are evaluated: that may fork.
    """

    def made(steps: range) -> Iterator[Any]:
        for step in steps:
            for start, stop in pieces:
                rows = stream.rows(step * batch + start, step * batch + stop)
                yield make(*rows, StepRng(key, step, range(start, stop)))

    def pinned(steps: range) -> Iterator[Any]:
        torch.cuda.set_device(device)  # a thread begins with the first one, and would pin memory for that
        for one in made(steps):
            yield map_tensors(Tensor.pin_memory, one)

    if device.type != "cuda":
        yield from made(steps)
        return
    bounds = [steps.start, *sorted(step for step in pauses if steps.start < step < steps.stop), steps.stop]
    for start, stop in itertools.pairwise(bounds):
        with contextlib.closing(made_ahead(pinned(range(start, stop)))) as ahead:
            for one in ahead:
                # On the stream of the computation: nothing to synchronise. Torch keeps pinned memory until it is read.
                yield map_tensors(lambda tensor: tensor.to(device, non_blocking=True), one)


def made_ahead(source: Iterator[T], most: int = _AHEAD) -> Generator[T, None, None]:
    """The same items, made by a thread, at most so many before they are asked for. To be closed: that ends the thread.

    What `source` raises is raised here, with its traceback.
    """
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room, is_stopped = threading.Semaphore(most), threading.Event()

    def work() -> None:
        try:
            while room.acquire() and not is_stopped.is_set():
                ready.put((next(source), None))
        except BaseException as error:  # the end, too: whatever it is, the caller waits for it
            ready.put((None, error))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]
    finally:
        is_stopped.set()
        room.release()
        thread.join()
