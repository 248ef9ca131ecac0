"""Which noise levels a sampling run visits: the recipe's wishes, within what the network knows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ddo_cli.diffusion import ablation, samplers, schedules
from ddo_cli.diffusion.precond import Discrete, Preconditioner
from ddo_cli.errors import UsageError
from ddo_cli.schema import GENERALISED, SamplingRecipe

STEPS = 18  # default of every sampler; EDM's for 32x32 images
RHO = 7.0


class Bounds(Protocol):
    """Default noise levels of a model."""

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...


def sigmas(spec: SamplingRecipe, defaults: Bounds, known: Preconditioner) -> Tensor:
    """Decreasing noise levels ending in 0, (steps + 1,), float64. Fewer where the network knows too few."""
    low, high = bounds(spec, defaults, known)
    n = STEPS if spec.steps is None else spec.steps
    if (choice := ablation_of(spec)) is not None:
        found = torch.cat([ablation.levels(choice, n, low, high), torch.zeros(1, dtype=torch.float64)])
    elif (spacing := spacing_of(spec, known)) == "steps":
        assert isinstance(known, Discrete), "see check"
        # Cut before it is spaced, so that SDEdit has all its steps below the level that it starts from.
        inside = known.sigmas[(known.sigmas >= low) & (known.sigmas <= high)].to(torch.float64)
        visited = schedules.respaced_steps(len(inside), spec.respacing or str(n))
        if spec.respacing is None and n == 1:
            visited = [len(inside) - 1]  # where the published rule has the first step, with nothing left to denoise
        return torch.cat([inside[visited].flip(0), torch.zeros(1, dtype=torch.float64)])
    elif spacing == "vp":
        found = schedules.vp_sigmas(n, low, high)
    else:
        found = schedules.karras_sigmas(n, low, high, RHO if spec.rho is None else spec.rho)
    found[:-1] = known.round_sigma(found[:-1])
    # Steps between equal levels do nothing. EDM's samplers keep them: churned ones draw noise.
    return found if sampler_of(spec) in samplers.CHURNED else found.unique_consecutive()


def bounds(spec: SamplingRecipe, defaults: Bounds, known: Preconditioner) -> tuple[float, float]:
    """Smallest and largest noise level of a run. Wishes beyond what the network knows are cut, as EDM does."""
    if (choice := ablation_of(spec)) is not None:
        low, high = ablation.default_range(choice.discretization)
    elif spacing_of(spec, known) == "steps":
        low, high = known.sigma_min, known.sigma_max
    else:
        low, high = defaults.sigma_min, defaults.sigma_max
    low = low if spec.sigma_min is None else spec.sigma_min
    high = high if spec.sigma_max is None else spec.sigma_max
    return max(low, known.sigma_min), min(high, known.sigma_max)


def ablation_of(spec: SamplingRecipe) -> ablation.Choice | None:
    """The choices of EDM's generalised sampler; None where the plain one is asked for."""
    given = {key: value for key in (*GENERALISED, "rho") if (value := getattr(spec, key)) is not None}
    if not given.keys() & set(GENERALISED):
        return None
    return ablation.Choice(**given, heun=sampler_of(spec) == "heun")


def ablation_keys(spec: SamplingRecipe) -> str:
    """The keys that chose it, for messages."""
    return ", ".join(f"sampling.{key} = {value}" for key in GENERALISED if (value := getattr(spec, key)) is not None)


def sampler_of(spec: SamplingRecipe) -> str:
    """The sampler's name."""
    return spec.sampler or "heun"


def spacing_of(spec: SamplingRecipe, known: Preconditioner) -> str:
    """The plain samplers' spacing of levels."""
    if spec.spacing is not None or sampler_of(spec) not in ("ddim", "ddpm"):
        return spec.spacing or "karras"
    return "steps" if isinstance(known, Discrete) else "vp"


def check(spec: SamplingRecipe, defaults: Bounds, known: Preconditioner) -> None:
    """Raises UsageError for settings that do not go together, or that the network cannot follow."""
    low, high = bounds(spec, defaults, known)
    sampler, spacing, choice = sampler_of(spec), spacing_of(spec, known), ablation_of(spec)
    if low >= high:
        raise UsageError(f"sampling.sigma_min = {low} must be below sampling.sigma_max = {high}")
    if spec.s_churn and sampler not in samplers.CHURNED:
        raise UsageError(f"sampling.s_churn = {spec.s_churn} needs sampler heun or euler; {sampler} has no churn")
    if choice is not None:
        if sampler not in samplers.CHURNED or spec.spacing is not None:
            raise UsageError(
                f"{ablation_keys(spec)}: EDM's generalised sampler needs sampler heun or euler and no sampling.spacing"
            )
        spacing = choice.discretization
    if spec.rho is not None and spacing not in ("karras", "edm"):
        remedy = "sampling.spacing = karras" if choice is None else "sampling.discretization = edm"
        raise UsageError(f"sampling.rho = {spec.rho} curves Karras noise levels; set {remedy}")
    if spacing == "steps" and not isinstance(known, Discrete):
        raise UsageError("sampling.spacing = steps needs a model of discrete steps; use karras or vp")
    if spec.respacing is not None and spacing != "steps":
        raise UsageError(
            f"sampling.respacing = {spec.respacing} chooses among the steps that a model was trained at: it needs a "
            "model of discrete steps, and sampler ddim or ddpm, or spacing = steps"
        )
    if spec.respacing is not None and spec.steps is not None:
        raise UsageError(f"sampling.respacing = {spec.respacing} and steps = {spec.steps} both count; leave one out")
    try:
        sigmas(spec, defaults, known)
    except ValueError as error:
        key = "steps" if spec.respacing is None else "respacing"
        raise UsageError(f"sampling.{key} = {getattr(spec, key)}: {error}; give fewer") from None
