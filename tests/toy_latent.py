"""A small diffusion model of latents: a fixed rearrangement of pixels with a known deviation."""

import torch
import torch.nn.functional as F

from ddo_cli import checkpoint
from ddo_cli.codec import LatentCodec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel
from ddo_cli.models import registry
from ddo_cli.models.toy.patch_unet import PatchUNet, PatchUNetOptions

OPTIONS = {"patch": 2, "widths": [16], "depths": [1], "emb_width": 16}


class Options(PatchUNetOptions):
    std: float = 0.0  # of a latent
    name: str = "toy"  # of the encoder


class ToyCodec(LatentCodec):
    """2 x 2 pixels become 4 times the channels."""

    largest = 0  # batch that an encoder has seen

    def __init__(self, shape, std: float, name: str):
        super().__init__(shape, (4 * shape[0], shape[1] // 2, shape[2] // 2))
        self.std, self.name = std, name

    def latents(self, items):
        ToyCodec.largest = max(ToyCodec.largest, len(items))
        mean = F.pixel_unshuffle(items.to(torch.float32) / 127.5 - 1, 2)
        return torch.cat([mean, torch.full_like(mean, self.std)], dim=1)

    def scaled(self, latent):
        return latent

    def decode(self, x):
        return (F.pixel_shuffle(x, 2) * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    def encoder_id(self):
        return f"{self.name} {self.std}"


@registry.register("toy-latent", Options, DiffusionDrawOptions)
def build(shape, num_classes, options, draw_options):
    codec = ToyCodec(shape, options.std, options.name)
    channels, size, _ = codec.state_shape
    net = PatchUNet(
        in_channels=channels, size=size, num_classes=num_classes, patch=options.patch, widths=options.widths,
        depths=options.depths, emb_width=options.emb_width,
    )  # fmt: skip
    return DiffusionModel(net, codec, num_classes, options, draw_options)


def make_toy(path, **options) -> str:
    """A random toy model as `ddo pretrain` would leave it."""
    config = registry.config_of("toy-latent", (3, 32, 32), 10, {**OPTIONS, **options}, {})
    torch.manual_seed(0)
    model = registry.build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sampling = {"sampler": "heun", "steps": 2, "batch": 8}
    header = {"kind": "model", "config": config, "sampling": sampling, "provenance": []}
    checkpoint.save(path, model.state_dict(), header)
    return str(path)
