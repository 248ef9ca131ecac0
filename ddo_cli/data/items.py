"""A set of items in memory, and the checks that every source of items shares."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ddo_cli import console
from ddo_cli.codec import Codec
from ddo_cli.errors import DataError, printable
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel

MAX_RATIO = 2  # items of the most frequent class to those of the rarest, beyond which a warning is due; our choice
MAX_CLASSES = 1 << 20  # beyond which a label is a mistake, such as a number of an image; our choice
INDEX = "dataset.json"  # labels of EDM's and StyleGAN's archives


class Encoded(NamedTuple):
    """Where latents or tokens come from.

    encoder: `Codec.encoder_id` of the model that encoded them, "" if unknown; image_shape: of the images; digest: of
    items and labels, as recorded when they were written.
    """

    encoder: str
    image_shape: tuple[int, ...]
    digest: str


class ItemSet(NamedTuple):
    """Items in a fixed order, with their labels.

    items: uint8 images (N, C, H, W) or float32 points (N, d), read-only because they may be a mapped file; or latents
    or tokens, then read when indexed (`readers.Lazy`). labels: int64 (N,), -1 = none; name: as given by the user;
    num_classes: one more than the largest label, or the number of class folders or of one-hot columns; 0 = no labels.
    encoded: where latents or tokens come from; None for images and points. classes: names of the folders that gave the
    labels, by class number. captions: of each item, or (); with them labels are 0, 1, ..., the numbers of the captions.
    """

    items: np.ndarray
    labels: np.ndarray
    name: str
    num_classes: int
    encoded: Encoded | None = None
    classes: Mapping[str, str] = MappingProxyType({})
    captions: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an item before encoding, to compare with a model's `shape`."""
        return tuple(self.items.shape[1:]) if self.encoded is None else self.encoded.image_shape


def identity(items: ItemSet) -> dict[str, Any]:
    """What a run stores of its data, and compares when it is continued: hashes, and names of classes where known."""
    return {
        "data_sha256": digest(items),
        **named_classes(items),
        **({"captions_sha256": hashed(*items.captions)} if items.captions else {}),
    }


def digest(items: ItemSet) -> str:
    """Hex SHA-256 of items and labels, by which a resumed run checks that its data is the same."""
    if items.encoded is not None:
        return items.encoded.digest
    content = hashlib.sha256(np.ascontiguousarray(items.items).data)
    content.update(np.ascontiguousarray(items.labels).data)
    return content.hexdigest()


def check_fits(
    items: ItemSet,
    model: LikelihoodModel,
    hflip: bool = False,
    *,
    num_classes: int | None = None,
    every_class: bool = False,
) -> None:
    """Raises DataError unless the model can be trained on the set; warns of classes that are missing or rare.

    hflip: whether items will be mirrored; only images can be.
    num_classes: number of classes whose labels are needed (0: none); None: the model's.
    every_class: a class without items is an error, since the set is compared with samples of all classes.
    """
    num_classes = model.num_classes if num_classes is None else num_classes
    if hflip and not holds_images(items):
        raise DataError(
            f"data.hflip = true mirrors images, and {items.name} holds {describe_items(items)}; leave it out"
        )
    codec = model.codec
    check_shape(items.name, items.items.dtype, items.items.shape[1:], codec)
    if items.encoded is not None:
        _check_encoder(items.name, items.encoded, codec)
    if not num_classes:
        if items.captions:
            console.info(f"{items.name}: captions are not read, since nothing here depends on labels")
        return
    if len(items.labels) and items.labels.min() < 0:
        raise DataError(
            f"{items.name} has items without label where the model has {num_classes} classes; add labels "
            f"({INDEX}, or a subfolder per class), or choose an unconditional model"
        )
    if items.captions and items.num_classes != num_classes:
        raise DataError(
            f"{items.name} has {len(items.captions)} images with captions where the model has {num_classes} classes; "
            "give a text-to-image model, or move the captions elsewhere to train on classes"
        )
    if items.num_classes > num_classes:
        raise DataError(
            f"{items.name} has {items.num_classes} classes where the model has {num_classes}; choose a model with as "
            "many classes, or correct the labels"
        )
    counts = np.bincount(items.labels, minlength=num_classes)
    if (missing := np.flatnonzero(counts == 0)).size:
        named = ", ".join(map(str, missing[:5].tolist())) + (", ..." if missing.size > 5 else "")
        from_one = missing[0] == 0 and counts[1:].all()
        reason = "; do the labels start at 1? They count from 0" if from_one else ""
        message = f"{items.name} has no item of class {named}, of {num_classes} classes of the model{reason}"
        if every_class:
            raise DataError(f"{message}; correct the labels, or give data with every class")
        console.warn(message)
    elif counts.max() > MAX_RATIO * counts.min():
        least, most = int(counts.argmin()), int(counts.argmax())
        console.warn(
            f"{items.name}: classes are not balanced: {counts[least]} items of class {least}, {counts[most]} of class "
            f"{most}; the model's samples have every class equally often"
        )


def named_classes(items: ItemSet) -> dict[str, Any]:
    """What a weight file's provenance tells of the classes that it was trained on, where folders named them."""
    return {"classes": dict(items.classes)} if items.classes else {}


def compare_names(items: ItemSet, provenance: Sequence[Mapping[str, Any]]) -> None:
    """Warns of classes that have other names than in the data that a model was trained on: they would be swapped.

    Folders are numbered in the order of their names, so that one more or less moves all behind it.
    """
    theirs: Mapping[str, str] = next((link["classes"] for link in reversed(provenance) if "classes" in link), {})
    other = [number for number in items.classes if number in theirs and theirs[number] != items.classes[number]]
    if other:
        first = other[0]
        ours, known = (printable(str(names[first]), 40) for names in (items.classes, theirs))
        console.warn(
            f"{items.name}: {len(other)} classes are named otherwise than in the data that the model was trained on: "
            f"class {first} is {ours}, there {known}; unless they mean the same, correct the folders, or number the "
            f"classes in {INDEX}"
        )


def check_enough(name: str, num: int, batch: int, key: str) -> None:
    """Raises DataError if `num` items to train on are fewer than a batch, which would hold some twice.

    key: the recipe key of the batch.
    """
    if num < batch:
        raise DataError(
            f"{name}: {num} to train on {'is' if num == 1 else 'are'} fewer than a batch ({key} = {batch}); give more, "
            f"or lower {key}"
        )


def check_distance(items: ItemSet) -> None:
    """Raises DataError for images that no distance can be taken to."""
    if len(items.items) < 2:
        raise DataError(f"{items.name} holds one image; a distance needs at least two, and thousands to mean something")


def check_shape(name: str, dtype: np.dtype, shape: tuple[int, ...], codec: Codec) -> None:
    """Raises DataError unless items of this type and shape can be encoded."""
    if shape == codec.shape or shape in codec.latent_shapes:
        return
    shapes = " or ".join("x".join(map(str, shape)) for shape in codec.latent_shapes)
    if dtype == np.uint8 and len(shape) == 3:
        remedy = wrong_shape(name, shape, codec.shape)
    elif shapes:
        remedy = "encode the images with this model (ddo encode), or choose a model of their size"
    else:
        remedy = "choose a model of their kind"
    raise DataError(
        f"{name} holds {describe_content(dtype, shape)} where the model needs {describe(codec.shape)}"
        f"{f', encoded as {shapes}' if shapes else ''}; {remedy}"
    )


def _check_encoder(name: str, encoded: Encoded, codec: Codec) -> None:
    if encoded.image_shape != codec.shape:
        raise DataError(
            f"{name} was encoded from {describe(encoded.image_shape)} where the model needs {describe(codec.shape)}; "
            "encode images of that size (ddo encode)"
        )
    encoder = codec.encoder_id() if encoded.encoder else ""
    if encoder and encoder != encoded.encoder:
        raise DataError(
            f"{name} was encoded by {encoded.encoder}, and the model's encoder is {encoder}: it would take the items "
            "for other images; encode the images with this model (ddo encode)"
        )


def holds_images(items: ItemSet) -> bool:
    """Whether the items are images, and not points, latents or tokens."""
    return items.items.ndim == 4 and items.items.dtype == np.uint8


def check_images(items: ItemSet, use: str) -> None:
    """Raises DataError unless the set holds images. use: the rest of the message: why images, and what to do."""
    if not holds_images(items):
        raise DataError(f"{items.name} holds {describe_items(items)}, not images; {use}")


def check_balance(real: ItemSet, fake: ItemSet, num_classes: int) -> None:
    """Raises DataError if a class occurs in one set only: the label alone would tell a discriminator real from fake.

    num_classes: of the labels that the discriminator sees; 0 if it sees none, then nothing is checked.
    """
    for items, other in ((real, fake), (fake, real)):
        counts = np.bincount(items.labels, minlength=num_classes) if num_classes else np.ones(1)
        if (counts == 0).any():
            missing = ", ".join(map(str, np.flatnonzero(counts == 0)[:5]))
            raise DataError(
                f"{items.name} has no item of class {missing}, which {other.name} has or the model draws; give a set "
                "with every class, or set discriminator.conditional=false"
            )


def choice(source: str, total: int, num: int | None) -> np.ndarray:
    """Rows to use, in increasing order."""
    if num is None or num == total:
        return np.arange(total)
    if num > total:
        raise DataError(f"{source} holds {total} items, fewer than the {num} asked for; lower num or leave it out")
    return np.sort(np.random.RandomState(0).permutation(total)[:num])


def hashed(*content: Any) -> str:
    """Hex SHA-256 of values by how Python writes them."""
    return hashlib.sha256(repr(content).encode()).hexdigest()


def count_classes(labels: np.ndarray) -> int:
    """One more than the largest label; 0 without labels."""
    return int(labels.max(initial=NO_LABEL)) + 1


def prepared_by(source: str, shape: Sequence[int] | None = None, enlarges: bool = False) -> str:
    """The command line that makes images of a shape (C, H, W) of a source, for messages.

    shape: None: RGB, as large as they are. enlarges: whether they are smaller.
    """
    place = shlex.quote(source) if len(source) <= 60 else "SRC"
    size = "" if shape is None else f" --size {shape[2]}" + (f"x{shape[1]}" if shape[1] != shape[2] else "")
    mode = "--grey" if shape is not None and shape[0] == 1 else "--rgb"
    out = "set.zip" if shape is None else f"set-{shape[2]}.zip"  # another name than that of a set made before
    return f"`ddo data {place} --out {out}{size} {mode}{' --upscale' if enlarges else ''}`"


def wrong_shape(source: str, shape: Sequence[int], wanted: Sequence[int]) -> str:
    """What to do about images of a shape (C, H, W) where a model wants another, for messages."""
    if len(wanted) != 3 or wanted[0] not in (1, 3):
        return "choose a model of their size"
    enlarges = shape[1] < wanted[1] or shape[2] < wanted[2]
    return f"{prepared_by(source, wanted, enlarges)} makes such images, or choose a model of their size"


def describe(shape: Sequence[int]) -> str:
    """An item's shape for messages, e.g. "32x32 RGB"."""
    if len(shape) != 3:
        return f"points of {' x '.join(map(str, shape))} numbers"
    kind = {1: "grey", 3: "RGB"}.get(shape[0], f"{shape[0]}-channel")
    return f"{shape[2]}x{shape[1]} {kind}"


def describe_items(items: ItemSet) -> str:
    """The items of a set for messages."""
    return describe_content(items.items.dtype, items.items.shape[1:])


def describe_content(dtype: np.dtype, shape: Sequence[int]) -> str:
    """Items of this type and shape for messages."""
    if (dtype == np.uint8 and len(shape) == 3) or (dtype.kind == "f" and len(shape) == 1):
        return describe(shape)
    kind = "latents" if dtype.kind == "f" else "tokens"
    return f"{kind} of shape {'x'.join(map(str, shape))}"
