"""Stability's autoencoder (KL-f8), on whose latents EDM2's, DiT's and SiT's ImageNet models work, and their scalings.

An image (3, H, W) becomes mean and deviation of 4 channels at an eighth of its side, which a data set of latents
stores; x is a draw of them, scaled as the family of the network has it.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddo_cli import console
from ddo_cli.codec import LatentCodec, hash_of
from ddo_cli.errors import CheckpointError
from ddo_cli.extras import imported
from ddo_cli.places import of_environment
from ddo_cli.precision import decoding, inference_precision
from ddo_cli.transfer import to_device

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
EMA_VAE = "stabilityai/sd-vae-ft-ema"  # the same encoder, another decoder
KNOWN = {DEFAULT_VAE.rpartition("/")[2], EMA_VAE.rpartition("/")[2]}
VARIABLE = "DDO_VAE"  # environment variable: a folder of the autoencoder, in place of the hub's
CHANNELS, FACTOR = 4, 8  # of a latent; pixels per side of its grid
_REMEDY = (
    f"set {VARIABLE} to a folder with config.json and diffusion_pytorch_model.safetensors of {DEFAULT_VAE} (or -ema, "
    "as the model has it), or go online once"
)
MINI_BATCH = 8  # images per pass of the autoencoder, as EDM2 has it: at 512 px its activations take about a GB each


class Scaling(NamedTuple):
    """How a family of networks uses the autoencoder: x = latent * scale + bias.

    scale, bias: (C, 1, 1). low: of the pixels that the autoencoder sees, which lie in [low, 1]. It was trained with -1.
    """

    scale: Tensor
    bias: Tensor
    low: int

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 -> float32 in [low, 1]."""
        return images.to(torch.float32) / 255 if self.low == 0 else images.to(torch.float32) / 127.5 - 1

    def images(self, pixels: Tensor) -> Tensor:
        """Pixels -> uint8, cut to [low, 1] and truncated: EDM2's scripts multiply by 255, DiT's take 127.5 x + 128."""
        levels = pixels.clamp(0, 1).mul(255) if self.low == 0 else (127.5 * pixels + 128).clamp(0, 255)
        return levels.to(torch.uint8)


def per_channel(values: Sequence[float]) -> Tensor:
    """(C, 1, 1) float32 on the CPU."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1)


def normalised(mean: Sequence[float], std: Sequence[float], target: float) -> Scaling:
    """Per channel, from statistics over the data to mean 0 and deviation `target`; pixels in [0, 1]."""
    scale = target / per_channel(std)
    return Scaling(scale, -per_channel(mean) * scale, low=0)


# Statistics over ImageNet, from EDM2's published configuration (they are not stored in its files).
EDM2 = normalised((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5)
# Stable Diffusion's, which DiT, SiT and REPA took over (arXiv 2112.10752, appendix G: one over the deviation).
STABLE = Scaling(per_channel((0.18215,) * CHANNELS), per_channel((0.0,) * CHANNELS), low=-1)


class StabilityCodec(LatentCodec):
    """uint8 images (3, H, W) <-> latents (4, H / 8, W / 8); of other autoencoders of this kind, their channels.

    The autoencoder is frozen and loaded when first needed. It encodes in float32 whatever the precision of training,
    since a latent rounded to bf16 would be another data set, and decodes in float32 or TF32 (see `decoding`). It is
    neither a module nor a part of a model's weights: equal ones are shared by all models of the process.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        vae: str = DEFAULT_VAE,
        scaling: Scaling = EDM2,
        channels: int = CHANNELS,
        patch: int = 1,
        kind: str = "AutoencoderKL",
    ):
        """vae: folder or hub name of an autoencoder of diffusers of the class `kind`; $DDO_VAE goes before it.

        channels: of its latents. patch: patch x patch of their positions are one of x, with as many times the channels.
        Raises ValueError unless `shape` is that of RGB images whose sides 8 (times `patch`) divides.
        """
        factor = FACTOR * patch
        if len(shape) != 3 or shape[0] != 3 or shape[1] % factor or shape[2] % factor:
            raise ValueError(f"the autoencoder needs RGB images of sides that {factor} divides, not {tuple(shape)}")
        super().__init__(shape, (channels * patch**2, shape[1] // factor, shape[2] // factor))
        self.vae, self.scaling, self.channels, self.patch, self.kind = vae, scaling, channels, patch, kind
        self.mini_batch = min(MINI_BATCH, max(1, MINI_BATCH * 512**2 // (shape[1] * shape[2])))

    def place(self) -> tuple[str, str]:
        """Folder or hub name of the autoencoder that is loaded, and what to do where it cannot be, for messages."""
        return place_of(self.vae), _REMEDY

    def _loaded(self, device: torch.device | str) -> Any:
        place, remedy = self.place()
        return _load(place, str(device), self.kind, self.channels, remedy)

    def latents(self, items: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> mean and deviation, (B, 2 C, h, w) float32, C, h, w those of x."""
        vae = self._loaded(items.device)
        with torch.no_grad(), inference_precision("float32", items.device):
            normals = [vae.encode(self.scaling.pixels(piece)).latent_dist for piece in items.split(self.mini_batch)]
            return torch.cat(
                [torch.cat([self._packed(normal.mean), self._packed(normal.std)], 1) for normal in normals]
            )

    def _packed(self, latent: Tensor) -> Tensor:
        return latent if self.patch == 1 else F.pixel_unshuffle(latent, self.patch)

    def scaled(self, latent: Tensor) -> Tensor:
        scale, bias = (to_device(factor, latent.device) for factor in self.scaling[:2])
        return latent * scale + bias

    def decode(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> uint8 (B, 3, H, W), as `Scaling.images` rounds."""
        vae = self._loaded(x.device)
        scale, bias = (to_device(factor, x.device) for factor in self.scaling[:2])
        latents = (x.to(torch.float32) - bias) / scale
        if self.patch != 1:
            latents = F.pixel_shuffle(latents, self.patch)
        with torch.no_grad(), decoding(x.device):
            pieces = (vae.decode(piece).sample for piece in latents.split(self.mini_batch))
            return torch.cat([self.scaling.images(piece) for piece in pieces])

    def encoder_id(self) -> str:
        """What latents depend on: the hash of the encoder's weights, and the range of the pixels that it sees.

        Autoencoders that share one (sd-vae-ft-mse and sd-vae-ft-ema do) fit each other.
        """
        own = _part_id(self._loaded("cpu"), "encoder.", "quant_conv.")
        return f"sd-vae:{own}" if self.scaling.low == 0 else f"sd-vae[-1,1]:{own}"

    def decoder_id(self) -> str:
        """What images depend on: the hash of the decoder's weights, which tells sd-vae-ft-mse from sd-vae-ft-ema."""
        return "sd-vae:" + _part_id(self._loaded("cpu"), "decoder.", "post_quant_conv.")


# --- The autoencoder


def place_of(vae: str) -> str:
    """Folder or hub name of the autoencoder that a model calls `vae`.

    $DDO_VAE goes before it: the folder of an autoencoder, or one that holds several in subfolders of their names
    (sd-vae-ft-mse, sd-vae-ft-ema). Says so if the folder's own name is another one's.
    """
    if not (given := of_environment(VARIABLE)):
        return vae
    wanted = vae.rpartition("/")[2]
    if Path(given, wanted, "config.json").is_file():
        return str(Path(given, wanted))
    if (name := Path(given).resolve().name) in KNOWN - {wanted}:
        _warn_of(name, wanted)
    return given


@functools.cache
def _warn_of(name: str, wanted: str) -> None:
    console.warn(
        f"{VARIABLE} is a folder called {name}, and this model's figures are of {wanted}: its images will differ a "
        "little, latents do not; a folder that holds both under these names serves every model"
    )


@functools.cache
def _load(place: str, device: str, kind: str, channels: int, remedy: str) -> Any:
    """The frozen autoencoder, a class `kind` of diffusers with latents of `channels`.

    Raises UsageError without diffusers, CheckpointError with `remedy` where it cannot be had.
    """
    needed_by = "this model draws latents, and the autoencoder that makes images of them needs"
    diffusers = imported(needed_by, "diffusers", "latent")
    is_name = place.count("/") == 1 and not place.startswith(("/", ".", "~"))
    if not Path(place, "config.json").is_file() and (Path(place).exists() or not is_name):
        raise CheckpointError(f"{place} holds no autoencoder of diffusers; {remedy}")
    try:
        vae = getattr(diffusers, kind).from_pretrained(
            place, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )  # fmt: skip
    except Exception as error:  # of the hub's client, requests, diffusers or safetensors, as the failure may be
        why = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the autoencoder {place} cannot be loaded ({why}); {remedy}") from None
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    image_channels, found = vae.config.in_channels, vae.config.latent_channels
    if (image_channels, found, factor) != (3, channels, FACTOR):
        raise CheckpointError(
            f"the autoencoder {place} makes {found} channels at 1/{factor} of the side of images of "
            f"{image_channels}, and these models take {channels} at 1/{FACTOR} of RGB images; {remedy}"
        )
    return vae.to(device).eval().requires_grad_(False)


@functools.cache
def _part_id(vae: Any, *prefixes: str) -> str:
    tensors = vae.state_dict()
    return hash_of({name: tensors[name] for name in tensors if name.startswith(prefixes)})
