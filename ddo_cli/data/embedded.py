"""The image sets that come with the package, generated on demand."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ddo_cli.checkpoint import ASSETS, EMBEDDED
from ddo_cli.data.digits import render_digits
from ddo_cli.data.items import choice
from ddo_cli.diffusion.mixture import toy2d
from ddo_cli.errors import DataError
from ddo_cli.likelihood import NO_LABEL

NUM_GENERATED = 16384  # default size of a set that is generated


def _digits32(num: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    levels, labels = _digits()
    images, rows = render_digits(levels, num or NUM_GENERATED, seed)
    return images, labels[rows]


def _digits16(num: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same renderings at half the side: means of 2 x 2 pixels, rounded in integers (halves up)."""
    images, labels = _digits32(num, seed)
    n, channels, side, _ = images.shape
    blocks = images.reshape(n, channels, side // 2, 2, side // 2, 2).sum((3, 5), dtype=np.uint16)  # (n, 3, 16, 16)
    return ((blocks + 2) // 4).astype(np.uint8), labels


def _digits8(num: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Level k of 0..16 becomes round(255 k / 16); no k lies on a half."""
    levels, labels = _digits()
    chosen = choice("embedded:digits8", len(levels), num)
    images = np.rint(levels[chosen, None].astype(np.float64) * 255 / 16).astype(np.uint8)
    return images, labels[chosen]


def _toy2d(num: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    points = toy2d().sample(num or NUM_GENERATED, torch.Generator().manual_seed(seed))
    return points.to(torch.float32).numpy(), np.full(len(points), NO_LABEL)


# The "-b" sets are further draws of the same distribution: their distance is that of a perfect model.
EMBEDDED_SETS: dict[str, Callable[[int | None], tuple[np.ndarray, np.ndarray]]] = {
    "digits16": partial(_digits16, seed=0),
    "digits16-b": partial(_digits16, seed=1),
    "digits32": partial(_digits32, seed=0),
    "digits32-b": partial(_digits32, seed=1),
    "digits8": _digits8,
    "toy2d": partial(_toy2d, seed=0),
    "toy2d-b": partial(_toy2d, seed=1),
}


def open_embedded(source: str, num: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Items and labels of the set "embedded:<name>", `num` of them. Raises DataError if there is no such set."""
    make = EMBEDDED_SETS.get(source.removeprefix(EMBEDDED))
    if make is None:
        raise DataError(f"{source} does not come with this program; known: {embedded_names()}")
    return make(num)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Levels uint8 (1797, 8, 8) and classes int64 (1797,)."""
    with np.load(ASSETS / "digits.npz") as content:
        return content["levels"], content["labels"].astype(np.int64)


def embedded_names() -> str:
    """The names of the sets, for messages."""
    return ", ".join(EMBEDDED + name for name in EMBEDDED_SETS)
