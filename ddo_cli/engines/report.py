"""`ddo report`: the page of a directory that a command has filled, made anew from what lies there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddo_cli import rundir
from ddo_cli.engines import pages
from ddo_cli.engines.analysis import report as analysis_report
from ddo_cli.engines.ddo import page as ddo_page
from ddo_cli.engines.discriminator import classifier
from ddo_cli.engines.discriminator import report as disc_report
from ddo_cli.engines.edit import report as edit_report
from ddo_cli.engines.edit.edit import STATE
from ddo_cli.engines.pretrain import page as pretrain_page
from ddo_cli.errors import RunError, UsageError, reason
from ddo_cli.files import read_json
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html

# By the command that a run's state names.
PAGES: dict[str, Callable[[rundir.RunDir, Recipe, dict[str, Any]], html.Page]] = {
    "finetune-ddo": ddo_page.page,
    "train-disc": disc_report.page,
    "pretrain": pretrain_page.page,
    "train-classifier": classifier.page,
}


def run(place: Path, out: Path | None = None) -> dict[str, Any]:
    """Writes the page of a directory into it, or as the file `out`; returns its path and headline."""
    page = page_of(place)
    if out is not None:
        if out.suffix != ".html":
            raise UsageError(f"--out {out} is not the name of a page; write for example --out {place.name}.html")
        html.write(out, page)
    else:
        out = place / pages.FILE
        with rundir.locked(place):
            html.write(out, page)
    return {"report": str(out), "headline": page.headline}


def page_of(place: Path) -> html.Page:
    """Raises UsageError where no command has left figures, RunError where they are damaged."""
    try:
        return _page_of(place)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise RunError(
            f"{place}: its figures are damaged or of another version of ddo ({type(error).__name__}: {reason(error)}); "
            "make the page with that version, or run the command again elsewhere"
        ) from error


def _page_of(place: Path) -> html.Page:
    if rundir.is_run(place):
        run_dir = rundir.RunDir(place)
        state = run_dir.state()
        if state.get("command") in PAGES:
            return PAGES[state["command"]](run_dir, pages.recipe_of(run_dir), state)
    if (place / STATE).is_file():
        return edit_report.page(place, read_json(place / STATE))
    if any((place / f"{name}.json").is_file() for name in analysis_report.TITLES):
        return analysis_report.page(place)
    what = "is a directory without figures of a run" if place.is_dir() else "is no directory"
    raise UsageError(
        f"{place} {what}; give one that finetune-ddo, pretrain, train-disc, train-classifier, analyze or edit filled"
    )
