"""The families of text-to-image pipelines, by name."""

from ddo_cli.models.diffusers.family import Family
from ddo_cli.models.diffusers.sd3 import StableDiffusion3
from ddo_cli.models.diffusers.stable_diffusion import StableDiffusion, StableDiffusionXl

FAMILIES: dict[str, Family] = {
    family.name: family for family in (StableDiffusion(), StableDiffusionXl(), StableDiffusion3())
}
