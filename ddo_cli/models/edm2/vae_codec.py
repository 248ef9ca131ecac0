"""The latent space of EDM2's ImageNet-512 models: Stability's autoencoder, and EDM2's scaling of its latents.

An image (3, H, W) becomes mean and deviation of 4 channels at an eighth of its side, which a data set of latents
stores; x is a draw of them, shifted and scaled per channel to mean 0 and deviation 0.5 over ImageNet.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddo_cli.codec import LatentCodec, hash_of
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.precision import decoding, inference_precision
from ddo_cli.transfer import to_device

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
VARIABLE = "DDO_VAE"  # environment variable: a folder of the autoencoder, in place of the hub's
CHANNELS, FACTOR = 4, 8  # of a latent; pixels per side of its grid
_REMEDY = (
    f"set {VARIABLE} to a folder with config.json and diffusion_pytorch_model.safetensors of {DEFAULT_VAE}, or go "
    "online once"
)
MINI_BATCH = 8  # images per pass of the autoencoder, as EDM2 has it: at 512 px its activations take about a GB each
# Over ImageNet, per channel; from EDM2's published configuration (the latents' statistics are not stored in its files).
RAW_MEAN, RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
FINAL_STD = 0.5
SCALE = (FINAL_STD / torch.tensor(RAW_STD, dtype=torch.float32, device="cpu")).view(-1, 1, 1)  # (4, 1, 1)
BIAS = -torch.tensor(RAW_MEAN, dtype=torch.float32, device="cpu").view(-1, 1, 1) * SCALE


class StabilityCodec(LatentCodec):
    """uint8 images (3, H, W) <-> latents (4, H / 8, W / 8).

    The autoencoder is frozen and loaded when first needed. It encodes in float32 whatever the precision of training,
    since a latent rounded to bf16 would be another data set, and decodes in float32 or TF32 (see `decoding`). It is
    neither a module nor a part of a model's weights: equal ones are shared by all models of the process.
    """

    def __init__(self, shape: tuple[int, ...], vae: str = DEFAULT_VAE):
        """vae: folder or hub name of an AutoencoderKL of diffusers; $DDO_VAE goes before it.

        Raises ValueError unless `shape` is that of RGB images whose sides 8 divides.
        """
        if len(shape) != 3 or shape[0] != 3 or shape[1] % FACTOR or shape[2] % FACTOR:
            raise ValueError(f"the autoencoder needs RGB images of sides that {FACTOR} divides, not {tuple(shape)}")
        super().__init__(shape, (CHANNELS, shape[1] // FACTOR, shape[2] // FACTOR))
        self.vae = vae

    def latents(self, items: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> mean and deviation, (B, 8, H / 8, W / 8) float32. Images enter in [0, 1]."""
        vae = _load(_place(self.vae), str(items.device))
        with torch.no_grad(), inference_precision("float32", items.device):
            normals = [vae.encode(piece.to(torch.float32) / 255).latent_dist for piece in items.split(MINI_BATCH)]
            return torch.cat([torch.cat([normal.mean, normal.std], dim=1) for normal in normals])

    def scaled(self, latent: Tensor) -> Tensor:
        """Shifted and scaled per channel."""
        return latent * to_device(SCALE, latent.device) + to_device(BIAS, latent.device)

    def decode(self, x: Tensor) -> Tensor:
        """(B, 4, h, w) -> uint8 (B, 3, 8 h, 8 w), cut to [0, 1] and truncated, as EDM2 does."""
        vae = _load(_place(self.vae), str(x.device))
        latents = (x.to(torch.float32) - to_device(BIAS, x.device)) / to_device(SCALE, x.device)
        with torch.no_grad(), decoding(x.device):
            pieces = (vae.decode(piece).sample for piece in latents.split(MINI_BATCH))
            return torch.cat([piece.clamp(0, 1).mul(255).to(torch.uint8) for piece in pieces])

    def encoder_id(self) -> str:
        """What latents depend on: the hash of the encoder's weights. Autoencoders that share one fit each other."""
        return _encoder_id(_place(self.vae))


# --- The autoencoder


def _place(vae: str) -> str:
    return os.environ.get(VARIABLE) or vae


@functools.cache
def _load(place: str, device: str) -> Any:
    """The frozen autoencoder. Raises UsageError without diffusers, CheckpointError where it cannot be had."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UsageError(
            "this model draws latents, and the autoencoder that makes images of them needs the package diffusers; "
            "install it: pip install 'ddo-cli[latent]'"
        ) from None
    is_name = place.count("/") == 1 and not place.startswith(("/", ".", "~"))
    if not Path(place, "config.json").is_file() and (Path(place).exists() or not is_name):
        raise CheckpointError(f"{place} ({VARIABLE}) holds no autoencoder of diffusers; {_REMEDY}")
    try:
        vae = AutoencoderKL.from_pretrained(
            place, use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )  # fmt: skip
    except Exception as error:  # of the hub's client, requests, diffusers or safetensors, as the failure may be
        why = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the autoencoder {place} cannot be loaded ({why}); {_REMEDY}") from None
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    image_channels, channels = vae.config.in_channels, vae.config.latent_channels
    if (image_channels, channels, factor) != (3, CHANNELS, FACTOR):
        raise CheckpointError(
            f"the autoencoder {place} makes {channels} channels at 1/{factor} of the side of images of "
            f"{image_channels}, and these models take {CHANNELS} at 1/{FACTOR} of RGB images; {_REMEDY}"
        )
    return vae.to(device).eval().requires_grad_(False)


@functools.cache
def _encoder_id(place: str) -> str:
    used, tensors = ("encoder.", "quant_conv."), _load(place, "cpu").state_dict()
    return "sd-vae:" + hash_of({name: tensors[name] for name in tensors if name.startswith(used)})
