"""Spacings of noise levels, decreasing."""

import math
from itertools import accumulate

import torch
from torch import Tensor

from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.samplers import DPM_V3_GRID as GRID


def karras_sigmas(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Decreasing noise levels ending in 0, (n + 1,). EDM, eq. 5 (arXiv 2206.00364).

    sigma_min, sigma_max: in model-space units (pixels lie in [-1, 1]), 0 < sigma_min < sigma_max.
    dtype: of the calculation too: EDM2's levels are float32 and start at 79.99998.
    """
    ramp = torch.arange(n, dtype=dtype) / max(n - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=dtype)])


def snapped_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Decreasing noise levels ending in sigma_min, (n + 1,), float64: Karras's, moved to the nearest nodes of a grid.

    The grid has GRID intervals of equal length in log sigma. Raises ValueError if two levels meet on a node.
    """
    low, high = math.log(sigma_min), math.log(sigma_max)
    sigmas = karras_sigmas(n + 1, sigma_min, sigma_max, rho)[:-1]
    nodes = (GRID * (high - sigmas.log()) / (high - low)).round()
    if bool((nodes.diff() < 1).any()):
        raise ValueError(f"two of the {n} steps meet on one node of dpm-v3's grid of {GRID} intervals")
    return (high + nodes / GRID * (low - high)).exp()


def vp_sigmas(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Decreasing noise levels ending in 0, (n + 1,), float64, evenly spaced in the time of the linear VP-SDE.

    The continuous form of DDPM's and DDIM's evenly respaced steps.
    """
    first, last = vp_sde.time_of(torch.tensor([sigma_max, sigma_min], dtype=torch.float64))
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    return torch.cat([vp_sde.sigma_of(first + ramp * (last - first)), torch.zeros(1, dtype=torch.float64)])


def sde_sigmas(n: int, sigma_max: float, sigma_min: float) -> Tensor:
    """Decreasing noise levels ending in 0, (n + 1,), float64: of evenly spaced times of the VP-SDE from 1 to 1e-5.

    sigma_max, sigma_min: cut times beyond theirs. Apart from `vp_sigmas`, whose ends are levels that were rounded.
    """
    ends = vp_sde.time_of(torch.tensor([sigma_max, sigma_min], dtype=torch.float64)).tolist()
    times = torch.linspace(min(1.0, ends[0]), max(vp_sde.T_MIN, ends[1]), n, dtype=torch.float64)
    return torch.cat([vp_sde.sigma_of(times), torch.zeros(1, dtype=torch.float64)])


def flow_sigmas(n: int, sigma_max: float, sigma_min: float | None = None) -> Tensor:
    """Decreasing noise levels ending in 0, (n + 1,), float64, evenly spaced in the share of noise sigma / (1 + sigma).

    sigma_min: the smallest but 0, which by default is as far from 0 as from the one before.
    """
    first = sigma_max / (1 + sigma_max)
    last = first / n if sigma_min is None else sigma_min / (1 + sigma_min)
    share = torch.linspace(first, last, n, dtype=torch.float64)
    return torch.cat([share / (1 - share), torch.zeros(1, dtype=torch.float64)])


def respaced_steps(num_steps: int, respacing: str) -> list[int]:
    """Increasing numbers of the training steps 0..num_steps - 1 that a sampler visits (arXiv 2102.09672, section 4).

    respacing: "250": evenly spaced, with both ends; "10,15,20": the same in each of three equal sections; "ddim25":
    every (num_steps / 25)th from 0 on, which never includes the last.
    Raises ValueError if there are too few steps, or no whole stride.
    """
    if respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == count:
                return list(range(0, num_steps, stride))
        raise ValueError(f"no whole stride takes {count} of {num_steps} steps")
    counts = [int(part) for part in respacing.split(",")]
    size, extra = divmod(num_steps, len(counts))
    steps = list[int]()
    first = 0
    for section, count in enumerate(counts):
        length = size + int(section < extra)
        if not 1 <= count <= length:
            raise ValueError(f"a section of {length} steps cannot give {count}")
        step = (length - 1) / max(count - 1, 1)
        # A running sum, rounded half to even: the step numbers of the published samplers.
        steps += [first + round(position) for position in accumulate([step] * (count - 1), initial=0.0)]
        first += length
    return steps
