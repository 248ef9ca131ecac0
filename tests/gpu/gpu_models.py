"""Networks of every family with weights that keep the magnitude of what passes through them, as trained ones do."""

from typing import Any, NamedTuple

import torch
from conftest import TINY_DIT, TINY_EDM2, TINY_TRANSFORMER, TINY_UNET, TINY_VQVAE
from torch import Tensor

from ddo_cli.likelihood import LikelihoodModel, repeat_draw
from ddo_cli.models import registry
from ddo_cli.rng import RowRng
from ddo_cli.trainable import map_tensors

TINY_EDM = {"channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16]}
NCSN = {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "resample_filter": [1, 3, 3, 1]}
TINY_ADM = {"width": 32, "channel_mult": [1, 2], "num_blocks": 1, "attention": [8], "num_head_channels": 16}
TINY_VAR = {"depth": 2, "width": 16, "heads": 2, "vqvae": TINY_VQVAE}


class Size(NamedTuple):
    """A network: its name, the shape of its items, classes and options."""

    name: str
    shape: tuple[int, ...]
    num_classes: int
    options: dict[str, Any]


TINY = {
    "patch-unet": Size("patch-unet", (3, 32, 32), 10, TINY_UNET),
    "mlp": Size("mlp", (2,), 0, {}),
    "ddpm++": Size("edm-unet", (3, 32, 32), 10, TINY_EDM),
    "ncsn++": Size("edm-unet", (3, 32, 32), 0, {**TINY_EDM, **NCSN}),
    "adm": Size("adm-unet", (3, 32, 32), 10, TINY_ADM),
    "edm2": Size("edm2-unet", (3, 32, 32), 10, TINY_EDM2),
    "dit": Size("dit", (3, 32, 32), 10, TINY_DIT),
    "pixel-transformer": Size("pixel-transformer", (1, 8, 8), 10, TINY_TRANSFORMER),
    "var": Size("var", (3, 32, 32), 10, TINY_VAR),
}
# Published sizes: one pass of two rows takes a CPU of 16 cores seconds.
PUBLISHED = {
    "cifar10 ddpm++": Size("edm-unet", (3, 32, 32), 0, {}),
    "imagenet64 edm2-s": Size("edm2-unet", (3, 64, 64), 1000, {}),
    "imagenet256 var-d16": Size("var", (3, 256, 256), 1000, {"depth": 16}),
}


def built(size: Size, seed: int = 0) -> LikelihoodModel:
    """A random network, in eval mode on the CPU."""
    torch.manual_seed(seed)  # of biases
    generator = torch.Generator().manual_seed(seed)
    model = registry.build(registry.config_of(size.name, size.shape, size.num_classes, size.options, {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("gain"):
                parameter.fill_(1.0)
    model.before_step()
    return model.eval()


def moved(model: LikelihoodModel, share: float = 0.1, seed: int = 1) -> None:
    """Changes each weight by this share of its magnitude: from a reference to a model that has been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                scale = share * parameter.square().mean().sqrt()
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    model.before_step()


def rows(model: LikelihoodModel, num: int = 4) -> tuple[Tensor, Tensor, Any]:
    """x, label and draw of `num` rows (even), the first half with the draw of the second, on the CPU."""
    generator = torch.Generator().manual_seed(2)
    if model.codec.is_discrete:
        x = torch.randint(0, 16, (num, *model.codec.state_shape), generator=generator).flatten(1)
    else:
        x = torch.randn((num, *model.codec.state_shape), generator=generator) * 0.5
    label = torch.arange(num) % model.num_classes if model.num_classes else torch.full((num,), -1)
    return x, label, repeat_draw(model.draw(num // 2, RowRng.for_rows("gpu", rows=range(num // 2))), 2)


def at(device: torch.device, x: Tensor, label: Tensor, draw: Any) -> tuple[Tensor, Tensor, Any]:
    return x.to(device), label.to(device), map_tensors(lambda tensor: tensor.to(device), draw)


def error(found: Tensor, exact: Tensor) -> float:
    """Of the norm."""
    exact = exact.detach().double()
    return float((found.detach().cpu().double() - exact).norm() / exact.norm())
