"""Which noise levels a sampling run visits: the recipe's wishes, within what the network knows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ddo_cli.diffusion import generalised_sampler, samplers, schedules
from ddo_cli.diffusion.guidance import Interval
from ddo_cli.diffusion.precond import Discrete, Preconditioner
from ddo_cli.errors import UsageError
from ddo_cli.recipe.schema import GENERALISED, SamplingRecipe

STEPS = 18  # default of the samplers; EDM's for 32x32 images
DPM_V3_STEPS = 25  # of dpm-v3; DDO's for 512x512 images
RHO = 7.0


class Bounds(Protocol):
    """Default noise levels of a model."""

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...


def sigmas(spec: SamplingRecipe, defaults: Bounds, known: Preconditioner) -> Tensor:
    """Decreasing noise levels, (steps + 1,), of `dtype_of(spec)`. Fewer where the network knows too few.

    They end in 0, and those of dpm-v3 in the smallest; the network is evaluated at all but the last.
    """
    return _sigmas(spec, defaults, known).to(dtype_of(spec))


def dtype_of(spec: SamplingRecipe) -> torch.dtype:
    """The type of state and noise levels."""
    return torch.float32 if spec.dtype == "float32" else torch.float64


def _sigmas(spec: SamplingRecipe, defaults: Bounds, known: Preconditioner) -> Tensor:
    low, high = bounds(spec, defaults, known)
    n, rho = steps_of(spec), RHO if spec.rho is None else spec.rho
    if sampler_of(spec) == "dpm-v3":
        found = known.round_sigma(schedules.snapped_sigmas(n, low, high, rho)).unique_consecutive()
        if len(found) < 2:
            raise UsageError(
                f"sampling.sigma_min = {low:g} and sigma_max = {high:g} are one level to this network; set them apart"
            )
        return found
    if (choice := ablation_of(spec)) is not None:
        found = torch.cat([generalised_sampler.levels(choice, n, low, high), torch.zeros(1, dtype=torch.float64)])
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
        found = schedules.karras_sigmas(n, low, high, rho, dtype_of(spec))
    found[:-1] = known.round_sigma(found[:-1])
    # Steps between equal levels do nothing. EDM's samplers keep them: churned ones draw noise.
    return found if sampler_of(spec) in samplers.CHURNED else found.unique_consecutive()


def bounds(spec: SamplingRecipe, defaults: Bounds, known: Preconditioner) -> tuple[float, float]:
    """Smallest and largest noise level of a run. Wishes beyond what the network knows are cut, as EDM does."""
    if (choice := ablation_of(spec)) is not None:
        low, high = generalised_sampler.default_range(choice.discretization)
    elif spacing_of(spec, known) == "steps":
        low, high = known.sigma_min, known.sigma_max
    else:
        low, high = defaults.sigma_min, defaults.sigma_max
    low = low if spec.sigma_min is None else spec.sigma_min
    high = high if spec.sigma_max is None else spec.sigma_max
    return max(low, known.sigma_min), min(high, known.sigma_max)


def ablation_of(spec: SamplingRecipe) -> generalised_sampler.Choice | None:
    """The choices of EDM's generalised sampler; None where the plain one is asked for."""
    given = {key: value for key in (*GENERALISED, "rho") if (value := getattr(spec, key)) is not None}
    if not given.keys() & set(GENERALISED):
        return None
    return generalised_sampler.Choice(**given, heun=sampler_of(spec) == "heun")


def ablation_keys(spec: SamplingRecipe) -> str:
    """The keys that chose it, for messages."""
    return ", ".join(f"sampling.{key} = {value}" for key in GENERALISED if (value := getattr(spec, key)) is not None)


def sampler_of(spec: SamplingRecipe) -> str:
    """The sampler's name."""
    return spec.sampler or "heun"


def steps_of(spec: SamplingRecipe) -> int:
    """The number of steps."""
    return spec.steps or (DPM_V3_STEPS if sampler_of(spec) == "dpm-v3" else STEPS)


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
    if sampler == "dpm-v3" and spec.spacing not in (None, "karras"):
        raise UsageError(f"sampling.spacing = {spec.spacing}: dpm-v3 has a spacing of its own; leave it out")
    if choice is not None:
        if spec.dtype == "float32":
            raise UsageError(f"{ablation_keys(spec)}: EDM's generalised sampler is float64; leave sampling.dtype out")
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
        wish = f"steps = {steps_of(spec)}" if spec.respacing is None else f"respacing = {spec.respacing}"
        raise UsageError(f"sampling.{wish}: {error}; give fewer") from None


def check_interval(what: str, interval: Interval, spec: SamplingRecipe, visited: Tensor) -> None:
    """Raises UsageError if the interval of a guidance holds none of the levels at which the network is evaluated."""
    if spec.s_churn or ablation_of(spec) is not None:
        return  # churn and its steps evaluate it elsewhere too
    if not bool(interval.holds(visited).any()):
        raise UsageError(
            f"{what} from {interval.low:g} to {interval.high:g} holds none of the sampler's noise levels, "
            f"{float(visited.min()):.3g} to {float(visited.max()):.3g}; widen it"
        )
