"""The families of text-to-image pipelines, by name."""

from ddo_cli.models.diffusers.family import Family
from ddo_cli.models.diffusers.flux2 import Flux2
from ddo_cli.models.diffusers.sd3 import StableDiffusion3
from ddo_cli.models.diffusers.stable_diffusion import StableDiffusion, StableDiffusionXl
from ddo_cli.models.diffusers.z_image import ZImage

FAMILIES: dict[str, Family] = {
    family.name: family for family in (StableDiffusion(), StableDiffusionXl(), StableDiffusion3(), Flux2(), ZImage())
}
