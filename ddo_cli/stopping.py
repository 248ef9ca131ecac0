"""Ends training between two steps when the system asks for it: SIGTERM, and SIGUSR1, which SLURM sends ahead of it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ddo_cli import dist
from ddo_cli.errors import SIGNALS


class Stopping:
    """Whether training is to end. While it is armed, signals are noted in place of ending the process."""

    def __init__(self) -> None:
        self.is_asked = False
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Notes signals. Outside of the main thread, and for signals that are ignored, nothing changes."""
        self._arm()
        try:
            yield
        finally:
            self._disarm()

    @contextlib.contextmanager
    def disarmed(self) -> Iterator[None]:
        """Within `armed`: signals end the process again. Scores take minutes, and what was trained is saved."""
        self._disarm()
        try:
            yield
        finally:
            self._arm()

    def agreed(self, is_exchange: bool) -> bool:
        """Whether to end after this step, on every process alike. is_exchange: whether several ask one another now."""
        if dist.world_size() == 1:
            return self.is_asked
        return is_exchange and any(dist.gathered(self.is_asked))

    def _arm(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)

    def _disarm(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _: object) -> None:
        self.is_asked = True
