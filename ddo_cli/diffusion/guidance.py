"""Guides wrap a denoiser and return a denoiser, so they compose."""

from __future__ import annotations

from torch import Tensor

from ddo_cli.diffusion.samplers import Denoiser


def classifier_free(conditional: Denoiser, unconditional: Denoiser, cfg_scale: float) -> Denoiser:
    """D_uncond + cfg_scale (D_cond - D_uncond) (arXiv 2207.12598); 1 is the conditional model itself."""

    def denoise(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
        base = unconditional(x, sigma, stage)
        return base + cfg_scale * (conditional(x, sigma, stage) - base)

    return denoise
