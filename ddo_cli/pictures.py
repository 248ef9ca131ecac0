"""Pictures that people look at: contact sheets, densities, curves. Arrays in, one PNG file out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ddo_cli.files import replacing


class Curve(NamedTuple):
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str = ""


def contact_sheet(items: np.ndarray, path: Path, columns: int | None = None) -> None:
    """Images side by side, or a scatter plot of points. items: uint8 (N, C, H, W) or float (N, 2)."""
    if items.ndim == 2:
        _scatter(items, path)
        return
    n, channels, height, width = items.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, scale = -(-n // columns), max(1, 64 // max(height, width))
    gap = 2
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for number, item in enumerate(items):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = item.transpose(1, 2, 0)
    image = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    with replacing(path) as temporary:
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(
            temporary, format="png"
        )


def _scatter(points: np.ndarray, path: Path) -> None:
    figure, (axis,) = _figure(1, size=(4, 4))
    axis.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5)
    axis.set_aspect("equal")
    _save(figure, path)


def densities(panels: dict[str, np.ndarray], extent: tuple[float, float, float, float], path: Path) -> None:
    """Densities on a grid, one panel each, on one colour scale. extent: x_min, x_max, y_min, y_max."""
    top = max(float(panel.max()) for panel in panels.values())
    figure, axes = _figure(len(panels), size=(3.2, 3.4))
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        axis.imshow(panel, extent=extent, origin="lower", vmin=0, vmax=top, cmap="magma")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    _save(figure, path)


def curves(panels: dict[str, list[Curve]], path: Path, x_label: str) -> None:
    """Line plots side by side; a panel's title names its quantity."""
    figure, axes = _figure(len(panels), size=(4.2, 3.2))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            axis.plot(line.x, line.y, marker=line.marker or None, label=line.label)
        axis.set_title(title)
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False)
    _save(figure, path)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    # Figure without pyplot: no global state and no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * panels, size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
