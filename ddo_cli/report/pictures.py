"""Contact sheets, densities, curves, histograms: arrays in, one PNG file out."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddo_cli.errors import RunError
from ddo_cli.files import replacing

MADE_BY = ("Software", "ddo")  # PNG text that marks our pictures: only those may be overwritten


class Curve(NamedTuple):
    """One line of a plot. band: lower and upper ends of a shaded strip around it; error: of each point (a chart's)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str = ""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    error: Sequence[float | None] | None = None
    is_dashed: bool = False


def check_replaceable(path: Path) -> None:
    """Raises RunError if a picture would overwrite a file that this program did not draw."""
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            is_ours = image.info.get(MADE_BY[0]) == MADE_BY[1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # no picture at all
        is_ours = False
    if not is_ours:
        raise RunError(
            f"{path} would be replaced by a picture, and ddo did not draw it; move it, or choose another --out"
        )


def contact_sheet(items: np.ndarray, path: Path, columns: int | None = None) -> None:
    """Images side by side, or a scatter plot of points. items: uint8 (N, C, H, W) or float (N, 2)."""
    if items.ndim == 2:
        figure, (axis,) = _figure(1, size=(4, 4))
        axis.scatter(items[:, 0], items[:, 1], s=2, alpha=0.5)
        axis.set_aspect("equal")
        _save(figure, path)
        return
    n, _, height, width = items.shape
    _save_sheet(_tiled(items, columns or math.ceil(math.sqrt(n))), max(height, width), path)


def side_by_side(left: np.ndarray, right: np.ndarray, path: Path) -> None:
    """Two sheets of as many images, uint8 (N, C, H, W), with a gap between them."""
    sheets = [_tiled(items, math.ceil(math.sqrt(len(items)))) for items in (left, right)]
    gap = np.full((len(sheets[0]), 8, *sheets[0].shape[2:]), 255, dtype=np.uint8)
    _save_sheet(np.concatenate([sheets[0], gap, sheets[1]], axis=1), max(left.shape[2:]), path)


def _save_sheet(sheet: np.ndarray, size: int, path: Path) -> None:
    """size: of one of its images; small ones are enlarged."""
    image, scale = Image.fromarray(sheet), max(1, 64 // size)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    notes = PngInfo()
    notes.add_text(*MADE_BY)
    with replacing(path) as temporary:
        image.save(temporary, format="png", pnginfo=notes)


def _tiled(items: np.ndarray, columns: int) -> np.ndarray:
    """Images uint8 (N, C, H, W) side by side, uint8 (rows, columns) of grey or (rows, columns, 3)."""
    n, channels, height, width = items.shape
    rows, gap = -(-n // columns), 2
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for number, item in enumerate(items):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = item.transpose(1, 2, 0)
    return sheet[..., 0] if channels == 1 else sheet


def image_rows(rows: dict[str, np.ndarray], path: Path) -> None:
    """Rows with the same number of images each, uint8 (N, C, H, W), one below the other under their titles."""
    strips = {title: _tiled(items, len(items)) for title, items in rows.items()}
    height, width = next(iter(strips.values())).shape[:2]
    figure, axes = _figure(1, size=(8, 8 * height / width + 0.35), rows=len(rows))
    for axis, (title, strip) in zip(axes, strips.items(), strict=True):
        axis.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    _save(figure, path)


def densities(panels: dict[str, np.ndarray], extent: tuple[float, float, float, float], path: Path) -> None:
    """Densities on a grid, one panel each, on one colour scale. extent: x_min, x_max, y_min, y_max."""
    top = max(float(panel.max()) for panel in panels.values())
    figure, axes = _figure(len(panels), size=(3.2, 3.4))
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        axis.set_title(title)
        _density(axis, panel, extent, top)
    _save(figure, path)


def _density(axis: Any, panel: np.ndarray, extent: tuple[float, float, float, float], top: float) -> None:
    axis.imshow(panel, extent=extent, origin="lower", vmin=0, vmax=top, cmap="magma")
    axis.set(xticks=[], yticks=[])


def points_and_densities(
    points: dict[str, np.ndarray], panels: dict[str, np.ndarray], extent: tuple[float, float, float, float], path: Path
) -> None:
    """Scatter plots (N, 2) above densities on a grid, in columns of the same name."""
    figure, axes = _figure(len(points), size=(3.2, 3.4), rows=2)
    top = max(float(panel.max()) for panel in panels.values())
    for axis, under, (title, cloud) in zip(axes, axes[len(points) :], points.items(), strict=False):
        axis.scatter(cloud[:, 0], cloud[:, 1], s=1, alpha=0.4, linewidths=0)
        axis.set(title=title, xlim=extent[:2], ylim=extent[2:], aspect="equal", xticks=[], yticks=[])
        _density(under, panels[title], extent, top)
    _save(figure, path)


def curves(panels: dict[str, list[Curve]], path: Path, x_label: str) -> None:
    """Line plots side by side; a panel's title names its quantity."""
    figure, axes = _figure(len(panels), size=(4.2, 3.2))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            (drawn,) = axis.plot(line.x, line.y, marker=line.marker or None, label=line.label)
            if line.band is not None:
                axis.fill_between(line.x, *line.band, color=drawn.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel=x_label)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False)
    _save(figure, path)


def gain_curve(name: str, levels: Sequence[dict[str, Any]], key: str, error: str) -> Curve:
    """The gain per unit of ln sigma over log10 sigma, from the levels of `metrics.gain`, with its standard error."""
    x = [math.log10(level["sigma_min"] * level["sigma_max"]) / 2 for level in levels]
    width = math.log(levels[0]["sigma_max"] / levels[0]["sigma_min"])
    y = [level[key] / width for level in levels]
    band = [[y_ + sign * level[error] / width for y_, level in zip(y, levels, strict=True)] for sign in (-1, 1)]
    return Curve(name, x, y, "o", (band[0], band[1]))


def histograms(values: dict[str, np.ndarray], path: Path, xlabel: str, bins: int = 80) -> None:
    """Densities of several sets of numbers (N,) on one axis and on the same bins; a dashed line marks each median."""
    finite = np.concatenate([numbers[np.isfinite(numbers)] for numbers in values.values()])
    if not len(finite):
        raise ValueError("a histogram of no finite numbers cannot be drawn")
    # A few far outliers would leave one bin for everything else: the outer 0.1% at each end goes into the end bins.
    low, high = np.quantile(finite, [0.001, 0.999])
    edges = np.linspace(low, high, bins + 1) if high > low else np.linspace(low - 0.5, low + 0.5, bins + 1)
    figure, (axis,) = _figure(1, size=(5.2, 3.4))
    for label, numbers in values.items():
        clipped = np.clip(numbers, edges[0], edges[-1])
        *_, (patch,) = axis.hist(clipped, edges, density=True, histtype="stepfilled", alpha=0.35, label=label)
        axis.axvline(float(np.median(clipped)), color=patch.get_facecolor(), alpha=1, linestyle="--", linewidth=1)
    axis.set(xlabel=xlabel, ylabel="density")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, path)


def _figure(panels: int, size: tuple[float, float], rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure of rows of panels, each of this size in inches, and its axes row by row."""
    # Without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * panels, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, panels, squeeze=False).flat)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata=dict([MADE_BY]))
