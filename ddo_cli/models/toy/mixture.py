"""An analytic denoiser, that of a Gaussian mixture: a model whose score is known, for toys and tests."""

import torch
from pydantic import Field
from torch import Tensor, nn

from ddo_cli.codec import Codec
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.diffusion.mixture import GaussianMixture
from ddo_cli.diffusion.trace import filled
from ddo_cli.models.registry import register


class MixtureOptions(DiffusionOptions):
    """Options of `mixture`; means, covariances and weights are the tensors of its weight file."""

    components: int = Field(1, ge=1)


class MixtureParameters(nn.Module):
    """The mixture's tensors. Buffers, since nothing here is trained."""

    means: Tensor
    covs: Tensor
    weights: Tensor

    def __init__(self, components: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(components, dim, dtype=torch.float64))
        self.register_buffer("covs", torch.eye(dim, dtype=torch.float64).repeat(components, 1, 1))
        self.register_buffer("weights", torch.ones(components, dtype=torch.float64))


class MixtureModel(DiffusionModel):
    """D(x; sigma) = E[x0 | x] of a Gaussian mixture, in float64. Labels are ignored."""

    net: MixtureParameters

    def denoise(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """D, the shape of x (B, d)."""
        mixture = GaussianMixture(self.net.means, self.net.covs, self.net.weights)
        return mixture.denoise(x, filled(sigma, x))


@register("mixture", MixtureOptions, DiffusionDrawOptions)
def build(
    shape: tuple[int, ...], num_classes: int, options: MixtureOptions, draw_options: DiffusionDrawOptions
) -> MixtureModel:
    """A mixture in d dimensions, all components standard normal. Raises ValueError for other shapes, or classes."""
    if len(shape) != 1 or num_classes:
        raise ValueError("mixture models points of shape (d,) without classes")
    net = MixtureParameters(options.components, shape[0])
    return MixtureModel(net, Codec(shape), num_classes, options, draw_options)
