"""A tiny model of each family, and one DDO step with it."""

import copy

import torch
from conftest import TINY as KINDS

from ddo_cli.data.pairs import Examples
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_batch, ddo_step
from ddo_cli.rng import StepRng
from ddo_cli.trainable import Loss

# Name, shape of the items, options.
FAMILIES = {
    "mlp": ("mlp", (2,), {"width": 16, "depth": 1}),
    "patch-unet": KINDS["diffusion"][:3],
    "pixel-transformer": KINDS["autoregressive"][:3],
    "edm-unet": (
        "edm-unet", (3, 16, 16), {"channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
    ),
    "edm2-unet": KINDS["edm2"][:3],
    "adm-unet": (
        "adm-unet", (3, 16, 16),
        {"width": 32, "channel_mult": (1, 2), "num_blocks": 1, "attention": (8,), "num_head_channels": 16},
    ),
    "dit": KINDS["dit"][:3],
    "var": KINDS["var"][:3],
}  # fmt: skip


def build(family: str, seed: int = 0, **changed: object) -> LikelihoodModel:
    """A model with random weights, none of them zero, as training has it before its first step. changed: options."""
    name, shape, options = FAMILIES[family]
    torch.manual_seed(seed)
    model = registry.build(registry.config_of(name, shape, 10, {**options, **changed}, {}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.before_step()
    return model.train(False)


def frozen(model: LikelihoodModel) -> LikelihoodModel:
    """A copy as a reference."""
    return copy.deepcopy(model).requires_grad_(False)


def step(model: LikelihoodModel, ref: LikelihoodModel, num_rows: int = 2, beta: float = 0.05) -> Loss:
    """The DDO loss of random items, the same ones in each call."""
    rng = torch.Generator().manual_seed(1)
    shape = (2 * num_rows, *model.codec.shape)
    is_image = len(shape) == 4
    items = torch.randint(256, shape, generator=rng).to(torch.uint8) if is_image else torch.randn(shape, generator=rng)
    label = torch.randint(10, (2 * num_rows,), generator=rng)
    real, fake = Examples(items[:num_rows], label[:num_rows]), Examples(items[num_rows:], label[num_rows:])
    draws = StepRng((0, 1), 0, range(num_rows))
    batch = ddo_batch(model, real, fake, draws)
    return ddo_step(model, model, batch, ref=ref, settings=DdoSettings(1.0, beta))
