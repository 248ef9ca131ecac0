"""Items as they lie on disk <-> states x in model space."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ddo_cli.errors import UsageError
from ddo_cli.rng import RowRng


class Encodable(NamedTuple):
    """Arguments of `Codec.encode`: items (n, ...), and the random numbers of a random encoder; None: it takes none."""

    items: Tensor
    eps: Tensor | None = None


class Codec:
    """The identity, for points. Other codecs derive from it and change what differs.

    An image model may work on latents or tokens that a frozen encoder makes of images. An item is then an image, or
    what `latents` made of it beforehand; `encode` takes either.
    """

    is_discrete: ClassVar[bool] = False  # whether x are tokens, which are drawn from no Gaussian noise
    # What a fake set keeps of a sample: the image, or x itself, where `encode` takes x as an item.
    fake_as: ClassVar[Literal["images", "latents"]] = "images"

    def __init__(self, shape: tuple[int, ...]):
        """shape: of one item on disk, e.g. (3, 32, 32) for uint8 images, (2,) for points."""
        self.shape = tuple(shape)
        self.state_shape = self.shape  # of one x, whose dimensions the log-likelihood is summed over
        self.latent_shapes: tuple[tuple[int, ...], ...] = ()  # of the further items that `encode` takes

    def prepare(self, items: Tensor, rng: RowRng) -> Encodable:
        """What of `encode` is done on the CPU, before items are copied to a device: checks, and random numbers.

        Raises DataError for items whose values `encode` cannot take.
        """
        return Encodable(items)

    def encode(self, items: Tensor, eps: Tensor | None = None) -> Tensor:
        """Items (uint8 images, float points, or precomputed latents) -> x.

        eps: of `prepare`, with which a random encoder draws x; None: the mean.
        """
        return items.to(torch.float32)

    def decode(self, x: Tensor) -> Tensor:
        """x -> items; the inverse of `encode` on its image.

        An autoencoder computes in TF32 where the caller allows it, see `precision.decoding`.
        """
        return x.to(torch.float32)

    def latents(self, items: Tensor) -> Tensor:
        """Images -> what `ddo encode` stores of them, (B, ...): the costly and deterministic part of `encode`.

        Raises UsageError where there is none.
        """
        raise UsageError(
            f"this model works on {'x'.join(map(str, self.shape))} items as they are, so there is nothing to encode; "
            "give the items themselves for training"
        )

    def encoder_id(self) -> str:
        """Identifies the encoder behind `latents`, e.g. by a hash of its weights; empty if there is none.

        Loads an encoder that is no part of the model's weights. A set of another encoder's latents is refused.
        """
        return ""

    def decoder_id(self) -> str:
        """Identifies a decoder that is no part of the model's weights, for a sample set's manifest; empty if none."""
        return ""


class PixelCodec(Codec):
    """uint8 images <-> [-1, 1]. Decoding truncates 127.5 x + 128, as EDM's scripts do."""

    def encode(self, items: Tensor, eps: Tensor | None = None) -> Tensor:
        """uint8 (B, C, H, W) -> float32 in [-1, 1]."""
        return items.to(torch.float32) / 127.5 - 1

    def decode(self, x: Tensor) -> Tensor:
        """Float (B, C, H, W) -> uint8; values outside [-1, 1] are clipped."""
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


class LevelCodec(Codec):
    """uint8 grey images of `levels` evenly spaced values <-> tokens in raster order.

    Level k is stored as round(255 k / (levels - 1)).
    """

    is_discrete = True

    def __init__(self, shape: tuple[int, ...], levels: int):
        super().__init__(shape)
        self.levels = levels

    def encode(self, items: Tensor, eps: Tensor | None = None) -> Tensor:
        """uint8 (B, 1, H, W) -> int64 tokens (B, H W) in 0..levels - 1."""
        return (items.to(torch.float32) * (self.levels - 1) / 255).round().to(torch.int64).flatten(1)

    def decode(self, x: Tensor) -> Tensor:
        """Tokens (B, H W) -> uint8 (B, 1, H, W)."""
        return (x.to(torch.float32) * 255 / (self.levels - 1)).round().to(torch.uint8).view(-1, *self.shape)


class LatentCodec(Codec, ABC):
    """Images <-> latents (C, h, w) of a frozen autoencoder, whose encoder gives mean and deviation.

    Further items: mean and deviation (2 C, h, w), as `latents` returns them, or x itself, which keeps more of a sample
    than its image does.
    """

    fake_as = "latents"

    def __init__(self, shape: tuple[int, ...], state_shape: tuple[int, ...]):
        super().__init__(shape)
        channels, *sides = state_shape
        self.state_shape = state_shape
        self.latent_shapes = ((2 * channels, *sides), (channels, *sides))

    def prepare(self, items: Tensor, rng: RowRng) -> Encodable:
        """eps: (B, C, h, w) standard normal, for all items but x itself."""
        return Encodable(items, None if self._is_state(items) else rng.randn(self.state_shape))

    def encode(self, items: Tensor, eps: Tensor | None = None) -> Tensor:
        """Images, mean and deviation, or x -> x."""
        if self._is_state(items):
            return items.to(torch.float32)
        if items.dtype == torch.uint8:
            items = self.latents(items)
        mean, std = items.to(torch.float32).chunk(2, dim=1)
        return self.scaled(mean if eps is None else mean + std * eps)

    @abstractmethod
    def scaled(self, latent: Tensor) -> Tensor:
        """A latent as the autoencoder has it -> x, both (B, C, h, w)."""

    def _is_state(self, items: Tensor) -> bool:
        return tuple(items.shape[1:]) == self.state_shape


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of the tensors' names and float32 values, whatever their type and order in the file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(repr((name, tuple(tensors[name].shape))).encode())
        digest.update(tensors[name].detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()[:32]
