"""Line charts as SVG for a page: numbers in, one `<svg>` out, all of one size, in colours that the page defines.

Titles, legends and notes are the page's; a chart holds nothing but lines, ticks and the labels of its axes.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ddo_cli.report.pictures import Curve

SIZE = (4.9, 2.9)  # inches; on a phone one is as wide as the screen, and 10 points are 10 pixels
COLORS = 4  # --c0 to --c3 of the page
MOST_POINTS = 300  # of a line; a longer one is drawn as means of neighbours
# Colours that stand for the page's own in what matplotlib draws.
_INK, _LINE = "#010203", "#020304"
_SERIES = [f"#0304{number:02x}" for number in range(COLORS)]
_VARIABLES = {_INK: "var(--dim)", _LINE: "var(--line)"} | {
    color: f"var(--c{number})" for number, color in enumerate(_SERIES)
}


class Chart(NamedTuple):
    """title: the quantity. levels: horizontal lines, such as published figures, by name. breaks: where something begins
    anew, such as a round: lines are cut there.
    """

    title: str
    lines: Sequence[Curve]
    x_label: str
    note: str = ""
    levels: Sequence[tuple[str, float]] = ()
    breaks: Sequence[float] = ()


def svg(chart: Chart) -> str:
    """The element, without names of users: those are for the page to escape."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "ddo", "font.size": 10, "text.color": _INK, "axes.labelcolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _LINE, "lines.linewidth": 1.8,
        "lines.markersize": 4.5, "axes.spines.top": False, "axes.spines.right": False,
        "axes.formatter.useoffset": False, "axes.formatter.use_mathtext": False,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=SIZE)
        FigureCanvasSVG(figure)
        axis = figure.add_axes((0.13, 0.17, 0.84, 0.76))  # a layout engine would take longer than the drawing
        for color, line in zip(itertools.cycle(_SERIES), chart.lines, strict=False):
            for piece in _pieces(line, chart.breaks):
                _draw(axis, piece, color)
        for place in chart.breaks:
            axis.axvline(place, color=_LINE, linewidth=1.4)
        for _, value in chart.levels:
            axis.axhline(value, color=_INK, linestyle=(0, (4, 3)), linewidth=1)
        axis.grid(color=_LINE, linewidth=0.7)
        axis.set_xlabel(chart.x_label)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        largest = max((abs(x) for line in chart.lines for x in line.x), default=0)
        if largest >= 10_000:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1.5M
        if all(float(x).is_integer() for line in chart.lines for x in line.x):
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _of_the_page(text.getvalue())


def _draw(axis: Any, line: Curve, color: str) -> None:
    x, y = thinned(line.x, line.y)
    if line.error is not None:
        error = [0.0 if value is None else value for value in line.error]
        axis.errorbar(x, y, error, color=color, marker=line.marker or "o", capsize=3, elinewidth=1.2)
        return
    axis.plot(x, y, color=color, marker=line.marker or None, linestyle="--" if line.is_dashed else "-")
    if line.band is not None:
        axis.fill_between(line.x, *line.band, color=color, alpha=0.2, linewidth=0)


def _pieces(line: Curve, breaks: Sequence[float]) -> list[Curve]:
    """The parts of a line between breaks."""
    if not breaks or line.error is not None or line.band is not None:
        return [line]
    parts = np.searchsorted(sorted(breaks), line.x)  # a point at a break ends what is before it
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True)]
    found = []
    for part in np.unique(parts):
        own = [point for point, number in zip(points, parts, strict=True) if number == part]
        found.append(line._replace(x=[x for x, _ in own], y=[y for _, y in own]))
    return found


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """At most MOST_POINTS points: means of as many neighbours each."""
    size = math.ceil(len(x) / MOST_POINTS)
    if size <= 1:
        return x, y
    pieces = range(0, len(x), size)
    return tuple([float(np.mean(values[at : at + size])) for at in pieces] for values in (x, y))  # type: ignore[return-value]


def described(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    parts = [f"{chart.title}, by {chart.x_label}."]
    for line in chart.lines:
        y = [value for value in line.y if math.isfinite(value)]
        if y:
            ends = f"first {y[0]:.3g}, last {y[-1]:.3g}, least {min(y):.3g}, largest {max(y):.3g}"
            parts.append(f"{line.label}: {len(y)} points, {ends}.")
    parts += [f"{label}: {value:.3g}." for label, value in chart.levels]
    return " ".join(parts)


def _of_the_page(svg: str) -> str:
    """Without prolog and size, in the colours and the type of the page."""
    svg = svg[svg.index("<svg ") :]
    width, height = (72 * inches for inches in SIZE)
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="(?:figure|axes|patch|matplotlib\.axis|[xy]tick|line2d|text|LineCollection|FillBetween\w*)_\d+"', "", svg
    )
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return re.sub(r"\n\s*", "\n", svg)
