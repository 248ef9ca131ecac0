"""A reader of images of any size and mode that makes them alike as they are read."""

from typing import Any

import numpy as np
from PIL import Image

from ddo_cli.data.image_files import ImageFiles
from ddo_cli.data.items import prepared_by
from ddo_cli.data.pictures import Header, Preparation, TooSmall, Unfit, open_picture
from ddo_cli.data.readers import Reader
from ddo_cli.errors import DataError, printable


class Prepared:
    """The pictures of image files, or images of an array, prepared."""

    decodes = True
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, source: str, reader: Reader, preparation: Preparation):
        self.source, self.reader, self.preparation, self.num = source, reader, preparation, reader.num
        self.shape = (len(preparation.mode), preparation.height, preparation.width)

    def item(self, row: int) -> np.ndarray:
        """The image of a row. Raises Unfit, or errors of any kind for damaged files."""
        if isinstance(self.reader, ImageFiles):
            with self.reader.content.open(row) as file, open_picture(file) as picture:
                return self.preparation(picture)
        pixels = self.reader.read(np.array([row]))[0]  # (C, H, W)
        return self.preparation(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Raises DataError naming the first that cannot be used."""
        items = np.empty((len(rows), *self.shape), self.dtype)
        for place, row in enumerate(rows.tolist()):
            try:
                items[place] = self.item(row)
            except DataError:
                raise
            except Unfit as error:
                is_small = isinstance(error, TooSmall)
                line = prepared_by(self.source, self.shape, enlarges=is_small)
                remedy = f"choose a smaller size, or {line} enlarges it" if is_small else f"{line} makes it RGB"
                raise DataError(f"{self.source}: {name_of(self.reader, row)} has {error}; {remedy}") from None
            except Exception as error:  # Pillow's decoders raise errors of any kind
                raise DataError(
                    f"{self.source}: {name_of(self.reader, row)} cannot be read as an image "
                    f"({printable(str(error), 100)}); replace or remove it"
                ) from None
        return items


def name_of(reader: Reader, row: int) -> str:
    """What messages call an item."""
    return printable(reader.names[row]) if isinstance(reader, ImageFiles) else f"item {row}"


def header_of(reader: Reader, row: int) -> Header:
    """What is known of an image without decoding it. Raises errors of any kind for damaged files."""
    if isinstance(reader, ImageFiles):
        return reader.header(row)
    channels, height, width = reader.shape
    return Header(width, height, "L" if channels == 1 else "RGB")
