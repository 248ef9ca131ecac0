"""What watches a run from outside: its page is written again while it goes on. Training knows nothing of it."""

import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

from ddo_cli import dist, rundir
from ddo_cli.engines import pages
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html
from ddo_cli.training import loop

Page = Callable[[rundir.RunDir, Recipe, dict[str, Any]], html.Page]
# Seconds between two writings of the page, each of which takes about one: after an evaluation, and without any.
AFTER_EVALUATION, BETWEEN = 30.0, 600.0


class Watch:
    """Of one run. page: makes its page from directory, recipe and state."""

    def __init__(self, run_dir: rundir.RunDir, recipe: Recipe, page: Page):
        self.run_dir, self.recipe, self.page = run_dir, recipe, page
        self.written = time.monotonic()

    def follow(self, events: Iterable[loop.Event]) -> Generator[loop.Event, None, None]:
        """The same events. Each has been dealt with by their consumer when the next one is asked for."""
        for event in events:
            yield event
            if isinstance(event, loop.Evaluate):
                self.refresh(AFTER_EVALUATION)
            elif isinstance(event, loop.Stepped) and event.figures is not None:
                self.refresh(BETWEEN)

    def refresh(self, after: float = AFTER_EVALUATION) -> None:
        """Writes the page unless less than `after` seconds have passed since the last time."""
        if dist.is_main() and time.monotonic() - self.written >= after:
            self.write(self.run_dir.state())

    def write(self, state: dict[str, Any]) -> None:
        """Writes the page of this state (main process only)."""
        if dist.is_main():
            html.write(self.run_dir.path / pages.FILE, self.page(self.run_dir, self.recipe, state))
        self.written = time.monotonic()

    def finish(self, state: dict[str, Any]) -> None:
        """Writes the page of a run that is about to be marked as finished with this state."""
        self.write({**state, "finished": True})
