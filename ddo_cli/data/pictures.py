"""Pictures of any size and mode -> images of one size: what `ddo data` does to files, and --resize of `ddo fid`."""

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import IO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What Pillow decodes by itself. EPS and PostScript are left out, since Pillow starts Ghostscript for them.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Pillow modes without loss in 8 bits of grey or RGB.
_MODES = {"1": "L", "L": "L", "RGB": "RGB", "P": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}
_ALPHA = {"LA": "L", "RGBA": "RGB", "PA": "RGB"}
_WIDE = re.compile(";16[BLNS]")  # a decoder's channels of 16 bits; BMP's ;16 are all of a pixel
_ORIENTATION = 0x0112  # EXIF's tag
Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # who reads pictures has limits
Crop = Literal["center", "center-adm", "center-celeba", "pad", "none"]
CELEBA_SIDE = 140  # pixels of CelebA's 178x218 that are kept


class Unfit(Exception):
    """A picture that is no grey or RGB image of 8 bits without loss; says what it has."""


class OtherMode(Unfit):
    """A picture that `Preparation` refuses, too."""


class TooSmall(Unfit):
    """A picture that would have to be enlarged."""


def open_picture(file: IO[bytes]) -> Image.Image:
    """A picture whose pixels are not decoded yet. Raises errors of any kind."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:  # whose message shows the file object
        raise UnidentifiedImageError(f"it is none of {', '.join(FORMATS)}, or damaged") from None


class Header(NamedTuple):
    """What the head of a picture's file tells. width, height: after turning, if `is_turned`; is_deep: see there."""

    width: int
    height: int
    mode: str
    is_turned: bool = False
    is_animated: bool = False
    has_alpha: bool = False
    is_deep: bool = False

    @classmethod
    def of(cls, picture: Image.Image) -> "Header":
        """Of a picture that has been opened, not loaded."""
        # Pillow turns TIFFs by itself. EXIF behind the pixels of a PNG would have them decoded.
        is_read = picture.format not in ("TIFF", "PNG") or (picture.format == "PNG" and "exif" in picture.info)
        orientation = picture.getexif().get(_ORIENTATION, 1) if is_read else 1
        width, height = picture.size
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        has_alpha = picture.mode in _ALPHA or "transparency" in picture.info
        is_animated = bool(getattr(picture, "is_animated", False))
        is_turned = orientation in range(2, 9)
        return cls(width, height, picture.mode, is_turned, is_animated, has_alpha, is_deep(picture))

    @property
    def is_grey(self) -> bool:
        return self.mode in ("1", "L", "LA") or self.mode.startswith("I")


def is_deep(picture: Image.Image) -> bool:
    """Whether a picture that is not loaded yet has more than 8 bits a channel.

    Pillow reduces such colours to 8 bits without a word; only what its decoders are told shows that there are more.
    """
    for tile in getattr(picture, "tile", ()):  # of images from files
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        is_wide = any(isinstance(text, str) and _WIDE.search(text) for text in arguments)
        if is_wide or (tile.codec_name.startswith("ppm") and arguments[-1] > 255):
            return True
    return _is_deep_grey(picture)


def _is_deep_grey(picture: Image.Image) -> bool:
    """Whether it has 16 bits of grey; in other formats, I is of 32."""
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))


def flattened(picture: Image.Image, background: Colour | None = None, deep: bool = False) -> Image.Image:
    """A loaded picture in the mode L or RGB.

    background: laid below transparent pixels; None: they are Unfit. deep: whether 16 bits are rounded to 8.
    """
    mode = picture.mode
    if mode in _ALPHA or (mode in _MODES and "transparency" in picture.info):  # a transparent colour or palette entry
        plain = _ALPHA.get(mode, _MODES.get(mode, "RGB"))
        with_alpha = picture.convert("RGBA")
        if with_alpha.getchannel("A").getextrema() == (255, 255):
            return with_alpha.convert(plain)
        if background is None:
            raise Unfit("transparent pixels")
        below = Image.new("RGBA", picture.size, background)
        return Image.alpha_composite(below, with_alpha).convert(plain if len(set(background)) == 1 else "RGB")
    if deep and _is_deep_grey(picture):
        if "transparency" in picture.info:
            raise Unfit("16 bits and a transparent colour")
        levels = np.asarray(picture).astype(np.uint32)  # 0..65535
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if mode not in _MODES:
        raise OtherMode(f"the mode {mode}")
    return picture if mode == _MODES[mode] else picture.convert(_MODES[mode])


class Preparation(NamedTuple):
    """How a picture becomes an image of width x height in the mode L or RGB.

    crop: "center": the largest centred part of the wanted proportions, then Lanczos, as EDM's tool does;
    "center-adm": halved by boxes while twice too large, bicubic, centred part, as ADM and EDM2 do for ImageNet; "pad":
    shrunk by Lanczos if it is too large, and centred on the background; "none": stretched by Lanczos. "center-celeba":
    the central 140 x 140 pixels, bilinear over the area of each pixel, as score_sde's program and Soft Truncation do.
    background: as for `flattened`; padding: around padded images, black as EDM's tool pads; upscale: whether smaller
    pictures are enlarged, else they are TooSmall.
    """

    width: int
    height: int
    crop: Crop = "center"
    mode: Literal["L", "RGB"] = "RGB"
    background: Colour | None = None
    padding: Colour = BLACK
    upscale: bool = False

    @property
    def protocol(self) -> dict[str, str]:
        """The size, what becomes of other proportions, and the filter: what a score depends on."""
        resampling = {"center-adm": "box, bicubic", "center-celeba": "bilinear"}.get(self.crop, "lanczos")
        return {"size": f"{self.width}x{self.height}", "crop": self.crop, "filter": resampling}

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """A picture -> uint8 (C, height, width). Raises Unfit, or errors of any kind for damaged files."""
        picture.load()
        turned = ImageOps.exif_transpose(picture)
        turned.format = picture.format  # which the copy forgets
        if not self.upscale and self.enlarges(*turned.size):
            raise TooSmall(f"{turned.width}x{turned.height} pixels, fewer than {self.width}x{self.height}")
        pixels = np.asarray(self._fitted(flattened(turned, self.background, deep=True).convert(self.mode)))
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def part(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the part of a picture that is kept, before it is resized."""
        if self.crop == "center-celeba":
            return min(width, CELEBA_SIDE), min(height, CELEBA_SIDE)
        if self.crop not in ("center", "center-adm"):
            return width, height
        if width * self.height > height * self.width:
            return max(1, round(height * self.width / self.height)), height
        return width, max(1, round(width * self.height / self.width))

    def effects(self, header: Header) -> Iterator[str]:
        """What is done to a picture, as keys of EFFECTS."""
        size, wanted = (header.width, header.height), (self.width, self.height)
        part = self.part(*size)
        done = {
            "turned": header.is_turned,
            "first_frame": header.is_animated,
            "alpha": header.has_alpha,
            "from_16_bits": header.is_deep,
            "from_cmyk": header.mode == "CMYK",
            "grey_to_rgb": header.is_grey and self.mode == "RGB",
            "rgb_to_grey": not header.is_grey and self.mode == "L",
            "cropped": part != size,
            "stretched": self.crop == "none" and size[0] * wanted[1] != size[1] * wanted[0],
            "padded": self.crop == "pad" and self._shrunk(*size) != wanted,
            "enlarged": self.enlarges(*size),
            "reduced": part[0] > wanted[0] or part[1] > wanted[1],
        }
        return (key for key, is_done in done.items() if is_done)

    def enlarges(self, width: int, height: int) -> bool:
        """Whether a picture of this size is too small."""
        part = self.part(width, height)
        return self.crop != "pad" and (part[0] < self.width or part[1] < self.height)

    def _shrunk(self, width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, self.width / width, self.height / height)
        return (width, height) if scale == 1 else (max(1, round(width * scale)), max(1, round(height * scale)))

    def _fitted(self, image: Image.Image) -> Image.Image:
        wanted = (self.width, self.height)
        if self.crop == "center-adm":
            return _center_adm(image, self.width)
        if self.crop == "pad":
            inner = _resized(image, self._shrunk(*image.size))
            padded = Image.new("RGB", wanted, self.padding).convert(self.mode)
            padded.paste(inner, ((self.width - inner.width) // 2, (self.height - inner.height) // 2))
            return padded
        width, height = self.part(*image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        if self.crop == "center-celeba":
            return image.resize(wanted, Image.Resampling.BILINEAR)
        return _resized(image, wanted)


def spelled(protocol: Mapping[str, str]) -> str:
    """A protocol of `Preparation`, for people."""
    return ", ".join(str(protocol.get(key)) for key in ("size", "crop", "filter"))


# What is done to pictures, for people.
EFFECTS = {
    "turned": "turned as their EXIF data says",
    "first_frame": "of several frames, of which the first is taken",
    "alpha": "with an alpha channel or a transparent colour: transparent pixels lie on {background}",
    "from_16_bits": "of 16 bits a channel, reduced to 8",
    "from_cmyk": "in CMYK, converted without a colour profile",
    "grey_to_rgb": "grey, repeated for R, G and B",
    "rgb_to_grey": "in colour, made grey",
    "cropped": "cropped to their centre",
    "stretched": "stretched to other proportions",
    "padded": "padded with {padding}",
    "enlarged": "enlarged",
    "reduced": "reduced",
}


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _center_adm(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop of ImageNet (arXiv 2105.05233): 2 x 2 means while twice too large, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
