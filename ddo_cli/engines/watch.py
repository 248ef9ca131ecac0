"""What watches a run from outside: its page, its trackers, and lines for people. Training knows nothing of it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddo_cli import console, dist, rundir
from ddo_cli.engines import pages
from ddo_cli.engines.panel import Panel
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html
from ddo_cli.report.numbers import readable
from ddo_cli.tracking import Tracking
from ddo_cli.training import loop

Page = Callable[[rundir.RunDir, Recipe, dict[str, Any]], html.Page]
# Seconds between two writings of the page, each of which takes about one: after an evaluation, and without any.
AFTER_EVALUATION, BETWEEN = 30.0, 600.0


class Watch:
    """Of one run, for `with`. page: makes its page from directory, recipe and state; log_to: its trackers;
    panel: of the rounds, for a terminal.
    """

    def __init__(
        self,
        run_dir: rundir.RunDir,
        recipe: Recipe,
        page: Page,
        log_to: Sequence[str] = (),
        panel: Panel | None = None,
    ):
        self.panel = panel
        self.run_dir, self.recipe, self.page = run_dir, recipe, page
        self.tracking = Tracking(log_to if dist.is_main() else (), run_dir.path, recipe.model_dump(mode="json"))
        self.written = time.monotonic()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.tracking.close()

    def saw(self, event: loop.Event, batch: int, series: str = "", title: str = "", before: int = 0) -> None:
        """Passes on an event that its consumer has dealt with.

        batch: images of a step. series: begins the names that trackers get. title: of the lines for people, none if
        empty. before: images of earlier rounds.
        """
        images = before + event.step * batch
        if isinstance(event, loop.Evaluate):
            self.measured(f"{series}score", event.figures, images, event.picture)
            if self.panel is not None and event.figures:
                key, value = next(iter(event.figures.items()))
                self.panel.scored(title, key, value, event.step * batch)
            if event.figures and title:
                told = ", ".join(f"{key} {readable(value)}" for key, value in event.figures.items())
                console.info(f"{title}: {told} at step {event.step}")
            self.refresh(AFTER_EVALUATION)
        elif isinstance(event, loop.Stepped) and event.figures is not None:
            self.tracking.figures(f"{series}train", event.figures, images)
            if self.panel is not None:
                self.panel.stepped(images, series.startswith("control/"))
            self.refresh(BETWEEN)

    def measured(self, series: str, figures: dict[str, float], images: int, picture: Path | None = None) -> None:
        """Sends figures of an evaluation, and its picture, to the trackers."""
        if figures:
            self.tracking.figures(series, figures, images)
        if picture is not None and picture.is_file():
            self.tracking.picture(f"{series}/samples", picture, images)

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
