"""The rejected images of DPO's pairs."""

from pathlib import PurePath

import numpy as np

from ddo_cli import console
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_fits
from ddo_cli.data.readers import ItemFiles
from ddo_cli.data.sources import Source, open_source
from ddo_cli.errors import DataError, printable
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel
from ddo_cli.recipe.schema import Recipe


def open_rejected(recipe: Recipe, preferred: ItemSet, model: LikelihoodModel) -> ItemSet:
    """Row i is the worse image of a pair whose better one is row i of `preferred`; both have the label of the better.

    Raises DataError unless every image has its counterpart.
    """
    data = recipe.data
    assert data.rejected is not None, "the recipe's validator asks for it"
    rejected = open_images(data.rejected, data.num, data.cache, model.codec)
    check_fits(rejected, model, data.hflip, num_classes=0)
    _check_counterparts(*(open_source(name, data.num, in_memory=False) for name in (data.source, data.rejected)))
    differing = np.count_nonzero((rejected.labels != NO_LABEL) & (rejected.labels != preferred.labels))
    if model.num_classes and differing:
        raise DataError(
            f"{differing} of {len(preferred.items)} pairs have two labels, and the images of a pair are compared under "
            f"one; correct the labels of {rejected.name}, or leave them out there"
        )
    return rejected._replace(labels=preferred.labels)


def _check_counterparts(preferred: Source, rejected: Source) -> None:
    sizes = preferred.reader.num, rejected.reader.num
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{preferred.name} holds {sizes[0]} images and data.rejected = {rejected.name} {sizes[1]}; give exactly "
            "one rejected image for each"
        )
    readers = [side.reader for side in (preferred, rejected) if isinstance(side.reader, ItemFiles)]
    if len(readers) < 2:
        console.info(f"pairs of {preferred.name} and {rejected.name} are by position")
        return
    names = [[PurePath(name).with_suffix("").as_posix() for name in reader.names] for reader in readers]
    if unlike := [mine for mine, theirs in zip(*names, strict=True) if mine != theirs]:
        raise DataError(
            f"{len(unlike)} of {sizes[0]} images have no counterpart of their name in data.rejected = {rejected.name}, "
            f"the first is {printable(unlike[0], 60)}; name the images of a pair alike"
        )
