"""The captions of a set of images, as prompts of a model that reads text."""

from pathlib import Path

from ddo_cli.data import latents
from ddo_cli.data.captions import METADATA
from ddo_cli.data.items import INDEX, ItemSet
from ddo_cli.data.stream import ImageStream
from ddo_cli.errors import DataError
from ddo_cli.models import registry
from ddo_cli.models.diffusers import texts


def of(real: ItemSet | ImageStream) -> tuple[str, ...]:
    """The captions. Raises DataError where there are none."""
    if not real.captions:
        raise DataError(
            f"{real.name} has no captions, which a text-to-image model is trained on; write a .txt beside each image, "
            f"or {METADATA}"
        )
    return real.captions


def remember(real: ItemSet) -> None:
    """Takes the embeddings of the captions that `ddo encode` has stored, if it has."""
    if real.encoded is not None and (stored := latents.stored_texts(Path(real.name))) is not None:
        texts.remember(*stored)


def refuse(real: ItemSet, use: str) -> None:
    """Raises DataError for images with captions, whose labels are no classes. use: what needs classes."""
    if real.captions:
        raise DataError(
            f"{real.name} has captions, and {use} is of classes; give images with labels ({INDEX}, or a subfolder per "
            "class)"
        )


def told(loaded: registry.Loaded, real: ItemSet) -> registry.Loaded:
    """The model with the captions of the real images for its labels, if it reads text. Raises DataError without any."""
    if not registry.reads_text(loaded.checkpoint.header["config"]["name"]):
        return loaded
    captions = of(real)
    remember(real)
    return registry.told(loaded, captions)
