"""Noise levels of a sampling run: recipe settings clipped to the network's range."""

import math
from functools import partial

import torch
from torch import Tensor

from ddo_cli.diffusion import generalised_sampler, samplers, schedules
from ddo_cli.diffusion.guidance import Interval
from ddo_cli.diffusion.precond import Discrete, Flow, Preconditioner, Vp
from ddo_cli.errors import UsageError
from ddo_cli.recipe.schema import GENERALISED, SamplingRecipe

RHO = 7.0


def sigmas(spec: SamplingRecipe, span: tuple[float, float], known: Preconditioner) -> Tensor:
    """Decreasing noise levels, (steps + 1,), of `dtype_of(spec)`. Fewer where the network knows too few.

    They end in 0, and those of spacing snapped in the smallest; the network is evaluated at all but the last.
    span: `bounds`.
    """
    low, high = span
    sampler, spacing = samplers.find(spec.sampler), spacing_of(spec, known)
    n, rho = steps_of(spec), spec.rho or RHO
    if (choice := generalised_choice(spec)) is not None:
        levels = generalised_sampler.levels(choice, n, low, high)
    elif spacing == "snapped":
        levels = schedules.snapped_sigmas(n, low, high, rho)
    elif spacing == "steps":
        levels = _trained_levels(spec, known, low, high)
    elif spacing == "sde":
        levels = schedules.sde_sigmas(n, spec.sigma_max or math.inf, spec.sigma_min or 0.0)[:-1]
    elif spacing == "flow":
        levels = schedules.flow_sigmas(n, high, spec.sigma_min or sampler.sigma_min)[:-1]
    elif spacing == "vp":
        levels = schedules.vp_sigmas(n, low, high)[:-1]
    else:
        levels = schedules.karras_sigmas(n, low, high, rho, dtype_of(spec))[:-1]
    levels = known.round_sigma(levels)
    if not sampler.churns:  # steps between equal levels do nothing; but churned ones draw noise, and EDM's keep them
        levels = levels.unique_consecutive()
    if spacing != "snapped":
        levels = torch.cat([levels, levels.new_zeros(1)])
    elif len(levels) < 2:
        raise UsageError(
            f"sampling.sigma_min = {low:g} and sigma_max = {high:g} are one level to this network; set them apart"
        )
    return levels.to(dtype_of(spec))


def _trained_levels(spec: SamplingRecipe, known: Preconditioner, low: float, high: float) -> Tensor:
    """Levels that a discrete model was trained at, decreasing, float64."""
    assert isinstance(known, Discrete), "see check"
    # Cut before it is spaced, so that SDEdit has all its steps below the level that it starts from.
    inside = known.sigmas[(known.sigmas >= low) & (known.sigmas <= high)].to(torch.float64)
    visited = schedules.respaced_steps(len(inside), spec.respacing or str(steps_of(spec)))
    if spec.respacing is None and steps_of(spec) == 1:
        visited = [len(inside) - 1]  # the published rule takes the first, with nothing left to denoise
    return inside[visited].flip(0)


def start_of(spec: SamplingRecipe, known: Preconditioner, sigma: Tensor) -> Tensor:
    """Deviation of the state that sampling starts from. sigma: the largest level.

    A discrete model, and the reverse SDE, start from x_T = z in their frame, which is z sqrt(1 + sigma^2) here; others,
    as EDM, from sigma z. For sigma 157, that of all steps, they differ by 2e-5; where a respacing starts low, visibly.
    """
    return (1 + sigma.square()).sqrt() if spacing_of(spec, known) in ("steps", "sde") else sigma


def dtype_of(spec: SamplingRecipe) -> torch.dtype:
    """The type of state and noise levels."""
    return torch.float32 if spec.dtype == "float32" else torch.float64


def integrator(spec: SamplingRecipe) -> samplers.Integrator:
    """The sampler's function, with the recipe's values of the keys that it alone reads."""
    sampler = samplers.find(spec.sampler)
    keys = (*sampler.choices, *(("tolerance",) if sampler.is_adaptive else ()))
    return partial(sampler.integrate, **{key: getattr(spec, key) for key in keys if getattr(spec, key)})


def steps_of(spec: SamplingRecipe) -> int:
    """The number of steps."""
    return spec.steps or samplers.find(spec.sampler).steps


def spacing_of(spec: SamplingRecipe, known: Preconditioner) -> str:
    """The spacing of levels, unless EDM's generalised sampler is asked for."""
    default = samplers.find(spec.sampler).spacing
    if default in ("snapped", "flow", "sde"):
        return default
    if spec.spacing is None and default == "steps" and not isinstance(known, Discrete):
        return "vp"
    return spec.spacing or default


def bounds(spec: SamplingRecipe, defaults: tuple[float, float], known: Preconditioner) -> tuple[float, float]:
    """Smallest and largest noise level of a run. Levels beyond those that the network knows are cut, as EDM does.

    defaults: the model's range, where the recipe gives none.
    """
    if (choice := generalised_choice(spec)) is not None:
        low, high = generalised_sampler.default_range(choice.discretization)
    else:
        low, high = (
            (known.sigma_min, known.sigma_max) if spacing_of(spec, known) in ("steps", "flow", "sde") else defaults
        )
        low = samplers.find(spec.sampler).sigma_min or low
    low = low if spec.sigma_min is None else spec.sigma_min
    high = high if spec.sigma_max is None else spec.sigma_max
    return max(low, known.sigma_min), min(high, known.sigma_max)


def generalised_choice(spec: SamplingRecipe) -> generalised_sampler.Choice | None:
    """The choices of EDM's generalised sampler; None where the recipe has none of its keys."""
    given = {key: value for key in (*GENERALISED, "rho") if (value := getattr(spec, key)) is not None}
    if not given.keys() & set(GENERALISED):
        return None
    return generalised_sampler.Choice(**given, heun=samplers.find(spec.sampler).has_corrector)


def generalised_keys(spec: SamplingRecipe) -> str:
    """The keys that ask for EDM's generalised sampler, for messages."""
    return ", ".join(f"sampling.{key} = {value}" for key in GENERALISED if (value := getattr(spec, key)) is not None)


def check(spec: SamplingRecipe, span: tuple[float, float], known: Preconditioner) -> None:
    """Raises UsageError for settings that do not go together, or that the network cannot follow. span: `bounds`."""
    low, high = span
    sampler, spacing, choice = samplers.find(spec.sampler), spacing_of(spec, known), generalised_choice(spec)
    if low >= high:
        raise UsageError(f"sampling.sigma_min = {low} must be below sampling.sigma_max = {high}")
    if spec.s_churn and not sampler.churns:
        churned = samplers.names(lambda sampler: sampler.churns)
        raise UsageError(f"sampling.s_churn = {spec.s_churn} needs sampler {churned}; {sampler.name} has no churn")
    if sampler.is_adaptive and spec.steps is not None:
        raise UsageError(
            f"sampling.steps = {spec.steps}: {sampler.name} chooses its steps by sampling.tolerance; leave it out"
        )
    if spec.tolerance is not None and not sampler.is_adaptive:
        usable = samplers.names(lambda sampler: sampler.is_adaptive)
        raise UsageError(
            f"sampling.tolerance = {spec.tolerance:g} is of {usable}, and {sampler.name} takes steps; leave it out"
        )
    if sampler.spacing == "flow" and not isinstance(known, Flow):
        raise UsageError(
            f"sampling.sampler = {sampler.name} moves in flow matching's time and needs a model of precond flow or "
            "flow-reversed; use heun or another one"
        )
    if sampler.spacing == "flow" and spec.dtype == "float32":
        raise UsageError(
            f"sampling.dtype = float32: {sampler.name} is float64, as velocities near 0 noise; leave it out, and "
            "use --device cpu in place of mps"
        )
    if sampler.spacing == "sde" and not isinstance(known, Vp):
        raise UsageError(
            f"sampling.sampler = {sampler.name} moves in the time of the VP-SDE and needs a model of precond vp; use "
            "heun or another one"
        )
    if spacing in ("snapped", "flow", "sde") and spec.spacing not in (None, "karras"):
        raise UsageError(f"sampling.spacing = {spec.spacing}: {sampler.name} has a spacing of its own; leave it out")
    if choice is not None:
        asked = generalised_keys(spec)
        if spec.dtype == "float32":
            raise UsageError(
                f"{asked}: EDM's generalised sampler is float64; leave sampling.dtype out (not on mps: use cpu)"
            )
        if not sampler.generalised or spec.spacing is not None:
            usable = samplers.names(lambda sampler: sampler.generalised)
            raise UsageError(f"{asked}: EDM's generalised sampler needs sampler {usable} and no sampling.spacing")
        spacing = choice.discretization
    if spec.rho is not None and spacing not in ("karras", "snapped", "edm"):
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
    for key in samplers.CHOICES:
        value, known_values = getattr(spec, key), sampler.choices.get(key)
        if value is not None and value not in (known_values or ()):
            readers = samplers.names(lambda other, key=key: key in other.choices)  # type: ignore[misc]
            remedy = f"it takes {' or '.join(known_values)}" if known_values else f"it is of {readers}; leave it out"
            raise UsageError(f"sampling.{key} = {value} has no meaning for sampler {sampler.name}: {remedy}")
    try:
        sigmas(spec, span, known)
    except ValueError as error:
        count = f"steps = {steps_of(spec)}" if spec.respacing is None else f"respacing = {spec.respacing}"
        raise UsageError(f"sampling.{count}: {error}; give fewer") from None


def check_interval(what: str, interval: Interval, spec: SamplingRecipe, visited: Tensor) -> None:
    """Raises UsageError if the interval of a guidance holds none of the levels at which the network is evaluated."""
    if spec.s_churn or generalised_choice(spec) is not None:
        return  # churn and second evaluations within a step visit other levels too
    if not bool(interval.holds(visited).any()):
        raise UsageError(
            f"{what} from {interval.low:g} to {interval.high:g} holds none of the sampler's noise levels, "
            f"{float(visited.min()):.3g} to {float(visited.max()):.3g}; widen it"
        )
