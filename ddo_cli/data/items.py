"""A set of items in memory, and the checks that every source of items shares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddo_cli.codec import Codec
from ddo_cli.errors import DataError
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel

INDEX = "dataset.json"  # labels of EDM's and StyleGAN's archives


class Encoded(NamedTuple):
    """What is known of a set of latents or tokens.

    encoder: `Codec.encoder_id` of the model that made them, "" where unknown; image_shape: of the images they
    were made of; digest: of items and labels, as written down when they were made.
    """

    encoder: str
    image_shape: tuple[int, ...]
    digest: str


class ItemSet(NamedTuple):
    """Items in a fixed order, with their labels.

    items: uint8 images (N, C, H, W) or float32 points (N, d), not to be written to, since they may be a file's pages;
    or what a model's encoder made of images, see `encoded`. labels: int64 (N,), -1 = none; name: as given by the user;
    num_classes: one more than the largest label, or the number of class folders or of one-hot columns; 0 = no labels.
    encoded: of latents or tokens; then `items` only stands in for an array (`data.latents.Lazy`).
    """

    items: np.ndarray
    labels: np.ndarray
    name: str
    num_classes: int
    encoded: Encoded | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an item before any encoding: what a model's `shape` is."""
        return tuple(self.items.shape[1:]) if self.encoded is None else self.encoded.image_shape


def digest(items: ItemSet) -> str:
    """Hex SHA-256 of items and labels: whether a continued run still sees the same data."""
    if items.encoded is not None:
        return items.encoded.digest
    found = hashlib.sha256(np.ascontiguousarray(items.items).data)
    found.update(np.ascontiguousarray(items.labels).data)
    return found.hexdigest()


def check_fits(items: ItemSet, model: LikelihoodModel, hflip: bool = False, *, num_classes: int | None = None) -> None:
    """Raises DataError unless the model can learn the set.

    hflip: whether its items are to be mirrored, which only images can be.
    num_classes: whose labels are needed (0: none); None: the model's.
    """
    num_classes = model.num_classes if num_classes is None else num_classes
    if hflip and not holds_images(items):
        raise DataError(
            f"data.hflip = true mirrors images, and {items.name} holds {describe_items(items)}; leave it out"
        )
    found, codec = items.items.shape[1:], model.codec
    if found != codec.shape and found not in codec.latent_shapes:
        shapes = " or ".join("x".join(map(str, shape)) for shape in codec.latent_shapes)
        remedy = "encode the images with this model (ddo encode)" if items.encoded and shapes else "convert the images"
        raise DataError(
            f"{items.name} holds {describe_items(items)} where the model needs {describe(codec.shape)}"
            f"{f', encoded as {shapes}' if shapes else ''}; {remedy}, or choose a model of their size"
        )
    if items.encoded is not None:
        _check_encoder(items.name, items.encoded, codec)
    if not num_classes:
        return
    if len(items.labels) and items.labels.min() < 0:
        raise DataError(
            f"{items.name} has items without label where the model has {num_classes} classes; add labels "
            f"({INDEX}, or a subfolder per class), or choose an unconditional model"
        )
    if items.num_classes > num_classes:
        raise DataError(
            f"{items.name} has {items.num_classes} classes where the model has {num_classes}; choose a model with as "
            "many classes, or correct the labels"
        )


def _check_encoder(name: str, encoded: Encoded, codec: Codec) -> None:
    if encoded.image_shape != codec.shape:
        raise DataError(
            f"{name} was encoded from {describe(encoded.image_shape)} where the model needs {describe(codec.shape)}; "
            "encode images of that size (ddo encode)"
        )
    own = codec.encoder_id() if encoded.encoder else ""
    if own and own != encoded.encoder:
        raise DataError(
            f"{name} was encoded by {encoded.encoder}, and the model's encoder is {own}: it would take the items for "
            "other images; encode the images with this model (ddo encode)"
        )


def holds_images(items: ItemSet) -> bool:
    """Whether the items are images, and not points, latents or tokens."""
    return items.items.ndim == 4 and items.items.dtype == np.uint8


def check_images(items: ItemSet, use: str) -> None:
    """Raises DataError unless the set holds images. use: what they are needed for and what to do instead, a clause."""
    if not holds_images(items):
        raise DataError(f"{items.name} holds {describe_items(items)}, not images; {use}")


def check_balance(real: ItemSet, fake: ItemSet, num_classes: int) -> None:
    """Raises DataError if a class occurs in one set only: a discriminator that sees labels would know it by them alone.

    num_classes: of the labels that the discriminator sees; 0: none, and nothing to check.
    """
    for name, have, other in ((real.name, real, fake), (fake.name, fake, real)):
        counts = np.bincount(have.labels, minlength=num_classes) if num_classes else np.ones(1)
        if (counts == 0).any():
            missing = ", ".join(map(str, np.flatnonzero(counts == 0)[:5]))
            raise DataError(
                f"{name} has no item of class {missing}, which {other.name} has or the model draws; give a set with "
                "every class, or set discriminator.conditional=false"
            )


def choice(source: str, total: int, num: int | None) -> np.ndarray:
    """Rows to use, in increasing order."""
    if num is None or num == total:
        return np.arange(total)
    if num > total:
        raise DataError(f"{source} holds {total} items, fewer than the {num} asked for; lower num or leave it out")
    rows = np.arange(total)
    np.random.RandomState(0).shuffle(rows)
    return np.sort(rows[:num])


def count_classes(labels: np.ndarray) -> int:
    """One more than the largest label; 0 without labels."""
    return int(labels.max(initial=NO_LABEL)) + 1


def describe(shape: Sequence[int]) -> str:
    """An item's shape for people, e.g. "32x32 RGB"."""
    if len(shape) != 3:
        return f"points of {' x '.join(map(str, shape))} numbers"
    kind = {1: "grey", 3: "RGB"}.get(shape[0], f"{shape[0]}-channel")
    return f"{shape[2]}x{shape[1]} {kind}"


def describe_items(items: ItemSet) -> str:
    """The items of a set for people."""
    return describe_content(items.items.dtype, items.items.shape[1:])


def describe_content(dtype: np.dtype, shape: Sequence[int]) -> str:
    """Items of this type and shape for people."""
    if (dtype == np.uint8 and len(shape) == 3) or (dtype.kind == "f" and len(shape) == 1):
        return describe(shape)
    kind = "latents" if dtype.kind == "f" else "tokens"
    return f"{kind} of shape {'x'.join(map(str, shape))}"
