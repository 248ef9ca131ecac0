"""Diffusion models: a preconditioned raw network, its ELBO as the likelihood, and its samplers."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from ddo_cli.codec import Codec
from ddo_cli.diffusion import (
    generalised_sampler,
    guidance,
    precond,
    probability_flow,
    samplers,
    sampling_plan,
    vp_sde,
)
from ddo_cli.diffusion.churn import Boost, Churn
from ddo_cli.diffusion.guidance import Guide, Interval, LowScale
from ddo_cli.diffusion.precond import PrecondName
from ddo_cli.diffusion.rejection import Rejection
from ddo_cli.diffusion.trace import Denoiser, Trace, filled, rows_of
from ddo_cli.diffusion.vp_sde import NoiseDistribution
from ddo_cli.errors import NumericsError, UsageError
from ddo_cli.likelihood import NO_LABEL, DrawOptions, LikelihoodModel, Options, Sampled, check_fields, drop_labels
from ddo_cli.recipe.schema import CFG, LARGEST_SIGMA, SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.transfer import to_device


class DiffusionDraw(NamedTuple):
    """One draw of the ELBO's estimate: noise level (B,), noise (B, ...), label dropped (B,) bool."""

    sigma: Tensor
    eps: Tensor
    drop: Tensor


class DiffusionDrawOptions(DrawOptions):
    """sigma = exp(p_mean + p_std n). Defaults: DDO, appendix D.

    distribution: of n. normal; or logistic, which with p_mean 0 and p_std 1 is uniform in flow matching's time, and
    with p_mean ln(s) that time shifted by s (SD3, arXiv 2403.03206, eq. 23). Its deviation is 1.81, and its tails are
    cut at 1e-4: there float32 loses the log-ratio of a velocity.
    """

    p_mean: float = -0.4
    p_std: float = Field(1.0, gt=0)
    distribution: NoiseDistribution = "normal"


class DiffusionOptions(Options):
    """Options of every diffusion model, beside its network's own."""

    sigma_data: float = Field(0.5, gt=0)
    # noise levels of sampling, clipped to those that the network knows
    sigma_min: float = Field(0.002, ge=1 / LARGEST_SIGMA)
    sigma_max: float = Field(80.0, gt=0, le=LARGEST_SIGMA)
    precond: PrecondName = "edm"  # what the raw network was trained to predict, and at which noise levels
    learned_variance: bool = False  # the network returns F and DDPM's log variance, twice the channels

    def of_network(self) -> dict[str, Any]:
        """The options that a model's own class adds: arguments of its network."""
        return self.model_dump(exclude=set(DiffusionOptions.model_fields))


LARGE, ROWS_IN_CACHE = 20_000_000, 8  # weights; of DDPM++ 8 rows take 0.8 to 0.9 times as long each as 32

SAMPLING_FIELDS = (
    "sampler", "steps", "tolerance", "spacing", "respacing", "sigma_min", "sigma_max", "rho", "dtype", "clip_denoised",
    "ddpm_variance", "s_churn", "s_min", "s_max", "s_noise", "discretization", "schedule", "scaling", "step_ratio",
    "cfg_scale", "cfg_sigma_min", "cfg_sigma_max", "cfg_scale_low", "cfg_sigma_low", "cfg_channels",
    *samplers.CHOICES,
)  # fmt: skip


class DiffusionModel(LikelihoodModel):
    """Preconditioned denoiser. `net(x, c_noise, label)` returns F of x's shape (arXiv 2206.00364).

    With options.learned_variance it returns twice as many channels: F, then the v of iDDPM, which only DDPM's sampler
    uses and which the likelihood does not train.
    """

    def __init__(
        self,
        net: nn.Module,
        codec: Codec,
        num_classes: int,
        options: DiffusionOptions,
        draw_options: DiffusionDrawOptions,
        preconditioner: precond.Preconditioner | None = None,
    ):
        """preconditioner: in place of the one that the options name."""
        super().__init__()
        with torch.device("cpu"):  # its tables of noise levels hold numbers even where the network is on meta
            self.precond = preconditioner or precond.PRECONDITIONERS[options.precond](options.sigma_data)
        self.net, self.codec, self.num_classes = net, codec, num_classes
        self.options, self.draw_options = options, draw_options
        self.adapter_targets = getattr(net, "adapter_targets", ())
        self.guides: tuple[Guide, ...] = ()  # applied in their order, the last one outermost

    # --- Likelihood

    def denoise(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """D(x; sigma) in float32, or the type of x where `Preconditioner.keeps_dtype`. sigma: (B,) or scalar."""
        return self.evaluate(x, sigma, label)[0]

    def evaluate(self, x: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """D(x; sigma), as `denoise`; with learned variance also v in [-1, 1] (iDDPM eq. 15), else None."""
        x = x.to(torch.promote_types(x.dtype, torch.float32) if self.precond.keeps_dtype else torch.float32)
        c_skip, c_out, c_in, c_noise = self.precond.coefficients(rows_of(sigma.to(x.dtype), x))
        f = self.net((c_in * x).to(torch.float32), filled(c_noise.to(torch.float32), x).view(-1), label)
        f, v = f.chunk(2, dim=1) if self.options.learned_variance else (f, None)
        return c_skip * x + c_out * f.to(x.dtype), v

    def draw(self, num_rows: int, rng: RowRng) -> DiffusionDraw:
        """sigma, eps and label drops of one estimate. Each row draws sigma, then the drop, then its noise."""
        options = self.draw_options
        n = rng.randn() if options.distribution == "normal" else vp_sde.logistic(rng.rand())
        sigma = self.precond.round_sigma(torch.exp(options.p_mean + options.p_std * n))  # (B,)
        drop = rng.rand() < options.label_dropout  # (B,)
        return DiffusionDraw(sigma, rng.randn(self.codec.state_shape), drop)

    def predict(self, x: Tensor, label: Tensor, draw: DiffusionDraw) -> Tensor:
        """D(x + sigma eps; sigma), of x's shape."""
        return self.denoise(x + rows_of(draw.sigma, x) * draw.eps, draw.sigma, drop_labels(label, draw))

    def log_lik(self, prediction: Tensor, x: Tensor, draw: DiffusionDraw) -> Tensor:
        """-w(sigma) sum (D - x)^2: one draw of the ELBO up to a constant, (B,)."""
        return -self.precond.weight(draw.sigma) * (prediction - x).flatten(1).square().sum(1)

    def log_ratio(self, prediction: Tensor, ref_prediction: Tensor, x: Tensor, draw: DiffusionDraw) -> Tensor:
        """-w(sigma) sum (D - D_ref) (D + D_ref - 2 x), (B,): the difference of squares, factored.

        Subtracting two squared errors would lose the digits they share; this form is exactly 0 for equal D.
        """
        difference = (prediction - ref_prediction) * (prediction + ref_prediction - 2 * x)
        return -self.precond.weight(draw.sigma) * difference.flatten(1).sum(1)

    # --- Sampling

    def sample(self, label: Tensor, rng: RowRng, spec: SamplingRecipe, x0: Tensor | None = None) -> Sampled:
        """Samples in model space, float64 or what spec.dtype says.

        Each row draws its latent, then (with classes) a label, used or not, then the sampler's noise step by step: the
        order of EDM's scripts, whose images come back for the same seeds.

        x0: states (B, ...) that are noised to spec.sigma_max and sampled from there (SDEdit, arXiv 2108.01073).
        spec.steps is the number of steps below that level. SDEdit cuts a fixed schedule instead: of few steps a low
        level would keep one, and a curve over levels would show the integrator's error.
        """
        latent = to_device(rng.randn(self.codec.state_shape), label.device).to(sampling_plan.dtype_of(spec))
        if self.num_classes:
            rng.randint(self.num_classes)
        sigmas = self.sigmas(spec)  # on the CPU, whatever the device of the samples: see `Denoiser`
        trace = Trace(larger_variance=spec.ddpm_variance == "large")
        churn = Churn(
            s_churn=spec.s_churn or 0.0,
            s_min=spec.s_min or 0.0,
            s_max=math.inf if spec.s_max is None else spec.s_max,
            s_noise=1.0 if spec.s_noise is None else spec.s_noise,
            rng=rng,
            boost=self.boost,
            trace=trace,
            round_sigma=self.precond.round_sigma,
        )
        denoise = self.steered(label, spec, trace)
        if (choice := sampling_plan.generalised_choice(spec)) is not None:
            if x0 is not None:
                raise UsageError(f"SDEdit needs a plain sampler; remove {sampling_plan.generalised_keys(spec)}")
            x = generalised_sampler.sample(denoise, latent, sigmas[:-1], self.bounds(spec), choice, churn)
        else:
            start = sampling_plan.start_of(spec, self.precond, sigmas[0])
            x = latent * start if x0 is None else x0.to(latent) + latent * sigmas[0]
            if self.rejection is not None:
                return self._rejected(self.rejection, x, sigmas, start, label, rng, spec, churn)
            x = sampling_plan.integrator(spec)(denoise, x, sigmas, churn)
        _check_finite(x)
        return Sampled(x, trace.nfe, trace.disc_nfe)

    def _rejected(
        self,
        rejection: Rejection,
        x: Tensor,
        sigmas: Tensor,
        start: Tensor,
        label: Tensor,
        rng: RowRng,
        spec: SamplingRecipe,
        churn: Churn,
    ) -> Sampled:
        """Samples of states x at sigmas[0], by single steps that are tested."""
        integrate, num_steps = sampling_plan.integrator(spec), len(sigmas) - 1

        def step(x: Tensor, k: int, rows: Tensor) -> Tensor:
            part = replace(churn, rng=rng.of(rows), num_steps=num_steps)
            return integrate(self.steered(label[rows], spec, Trace()), x, sigmas[k : k + 2], part)

        x, cost = rejection.sample(step, self._costs(sigmas, spec), start, x, sigmas, label, rng)
        _check_finite(x)
        return Sampled(x, int(cost.nfe.max()), int(cost.disc_nfe.max()), cost)

    def steered(self, label: Tensor, spec: SamplingRecipe, trace: Trace) -> Denoiser:
        """The denoiser of a batch with classifier-free guidance and all guides; counts evaluations in `trace`."""

        both_labels = torch.cat([label, torch.full_like(label, NO_LABEL)])  # (2 B,)

        most = self.rows_at_once(label.device)

        def network(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
            if most is not None and len(x) > most:
                levels = [sigma] * math.ceil(len(x) / most) if sigma.ndim == 0 else sigma.split(most)
                parts = zip(x.split(most), levels, label.split(most), strict=True)
                denoised, variances = zip(*(at_once(*part) for part in parts), strict=True)
                trace.variance = torch.cat(variances) if self.options.learned_variance else None
                return torch.cat(denoised).to(x.dtype)
            whole, trace.variance = at_once(x, sigma, label)
            return whole.to(x.dtype)

        def at_once(x: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.options.learned_variance:
                return self.evaluate(x, sigma, label)
            return self.denoise(x, sigma, label), None

        def conditional(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
            trace.nfe += 1
            return network(x, sigma, label)

        def both(x: Tensor, sigma: Tensor, stage: str = "predictor") -> tuple[Tensor, Tensor]:
            """D with and without label, of one batch of 2 B; the trace keeps the conditional variance."""
            trace.nfe += 2
            sigmas = sigma.repeat(2) if sigma.ndim else sigma
            denoised, unconditional = network(torch.cat([x, x]), sigmas, both_labels).chunk(2)
            trace.variance = None if trace.variance is None else trace.variance[: len(x)]
            return denoised, unconditional

        def clipped(x: Tensor, sigma: Tensor, stage: str = "predictor") -> Tensor:
            return unclipped(x, sigma, stage).clamp(-1, 1)

        denoise: Denoiser = conditional
        if spec.cfg_scale is not None and spec.cfg_scale != 1:
            denoise = guidance.extrapolated(
                conditional, both, spec.cfg_scale, _cfg_interval(spec), _cfg_low(spec), spec.cfg_channels
            )
        if spec.clip_denoised:
            unclipped, denoise = denoise, clipped
        for guide in self.guides:
            denoise = guide.steer(denoise, label, trace)
        return denoise

    def rows_at_once(self, device: torch.device) -> int | None:
        """Most rows of a network pass of sampling: on a CPU a large network takes few, which then stay in its cache.

        Training does without: there model and reference have to see the same rows, or r would not start at exactly 0.
        """
        is_large = device.type == "cpu" and sum(weight.numel() for weight in self.net.parameters()) >= LARGE
        return ROWS_IN_CACHE if is_large else None

    def guided_by(self, guides: Sequence[Guide]) -> "DiffusionModel":
        """This model steered by guides in their order, after those that it has."""
        guided = copy.copy(self)  # shares the network
        guided.guides = (*self.guides, *guides)
        return guided

    def passes(self, spec: SamplingRecipe) -> int:
        """NFE without guides, counted by sampling with a zero network. Of an adaptive solver an estimate."""
        if (sampler := samplers.find(spec.sampler)).is_adaptive:
            spec = spec.merged(sampler="flow-euler", steps=sampler.evaluations * sampler.steps)
        return self._counted().sample(torch.full((1,), NO_LABEL), RowRng([0]), spec).nfe

    def _counted(self) -> "DiffusionModel":
        """This model with a zero network and without guides."""
        counted = copy.copy(self)
        counted.guides = ()
        counted.evaluate = lambda x, sigma, label: (torch.zeros_like(x), torch.zeros_like(x))  # type: ignore
        counted.denoise = lambda x, sigma, label: torch.zeros_like(x)  # type: ignore[method-assign]
        return counted

    def _costs(self, sigmas: Tensor, spec: SamplingRecipe) -> list[int]:
        """NFE of each step without guides, counted likewise."""
        counted, costs = self._counted(), []
        for pair in sigmas.unfold(0, 2, 1):
            trace = Trace()
            denoise = counted.steered(torch.full((1,), NO_LABEL), spec, trace)
            samplers.find(spec.sampler).integrate(denoise, sigmas.new_zeros((1, *self.codec.state_shape)), pair, None)
            costs.append(trace.nfe)
        return costs

    def units(self) -> Sequence[nn.Module]:
        units = getattr(self.net, "units", None)
        return units() if callable(units) else ()

    def graphs(self) -> Sequence[nn.Module]:
        return (self.net,)

    def check_sampling(self, spec: SamplingRecipe) -> None:
        """Raises UsageError for a sampler, noise levels or guides that do not go together or with the network."""
        check_fields(self, spec, SAMPLING_FIELDS)
        sampling_plan.check(spec, self.bounds(spec), self.precond)
        if spec.ddpm_variance is not None and (self.options.learned_variance or spec.sampler != "ddpm"):
            has = (
                "the model has learned its own"
                if self.options.learned_variance
                else f"{spec.sampler} adds no such noise"
            )
            raise UsageError(f"sampling.ddpm_variance = {spec.ddpm_variance} is of ddpm's noise: {has}; leave it out")
        if given := [key for key in CFG if getattr(spec, key) is not None]:
            if spec.cfg_scale in (None, 1.0):
                raise UsageError(f"sampling.{' and '.join(given)}: of a cfg_scale other than 1; set it too")
            self._check_interval("the guidance of sampling.cfg_scale", _cfg_interval(spec), spec)
        if spec.cfg_channels is not None and spec.cfg_channels > self.codec.state_shape[0]:
            raise UsageError(
                f"sampling.cfg_channels = {spec.cfg_channels}: this model's states have {self.codec.state_shape[0]} "
                "channels; give fewer, or leave it out to guide all"
            )
        for guide in self.guides:
            if isinstance(interval := getattr(guide, "interval", None), Interval) and not self.boost:
                self._check_interval("--guidance-interval", interval, spec)
        if self.boost and not samplers.find(spec.sampler).churns:
            churned = samplers.names(lambda sampler: sampler.churns)
            raise UsageError(f"boost churns samples, which sampler {spec.sampler} cannot do; use {churned}")
        if self.rejection is not None:
            self._check_rejection(self.rejection, spec)

    def _check_rejection(self, rejection: Rejection, spec: SamplingRecipe) -> None:
        """Raises UsageError for sampling that cannot go back by single steps, or only at a cost beyond the bound."""
        sampler = samplers.find(spec.sampler)
        if not sampler.churns:  # the others have a memory of steps, or noise of their own
            possible = samplers.names(lambda sampler: sampler.churns)
            raise UsageError(f"DiffRS repeats single steps, which sampler {sampler.name} cannot do; use {possible}")
        if sampling_plan.generalised_choice(spec) is not None:
            raise UsageError(f"DiffRS needs a plain sampler; remove {sampling_plan.generalised_keys(spec)}")
        if spec.rng == "cuda":
            raise UsageError("sampling.rng = cuda counts the numbers of all images alike, and DiffRS does not; use cpu")
        if rejection.max_nfe < (least := self.passes(spec)):
            raise UsageError(
                f"DiffRS: a bound of {rejection.max_nfe} evaluations is below the {least} of an image without "
                "rejection; raise it"
            )
        if not rejection.tested(self.sigmas(spec)):
            raise UsageError(
                f"DiffRS: none of the sampler's noise levels lies between time_min = {rejection.time_min} and time_max "
                f"= {rejection.time_max}; widen the window"
            )

    def _check_interval(self, what: str, interval: Interval, spec: SamplingRecipe) -> None:
        sampling_plan.check_interval(what, interval, spec, self.sigmas(spec)[:-1])

    def log_density(self, x: Tensor, label: Tensor, spec: SamplingRecipe) -> Tensor:
        """log p(x) in nats, (B,), with cfg_scale and guides: see `probability_flow.log_density`.

        Raises UsageError if `spec` asks for churn or a guide boosts, which no ODE describes.
        """
        if spec.s_churn:
            raise UsageError(f"sampling.s_churn = {spec.s_churn}: the density exists for the ODE only; leave churn out")
        if self.boost:
            raise UsageError("boost depends on a sampler's steps: the density exists for the ODE only; leave it out")
        denoise = self.steered(label, spec, Trace())
        return probability_flow.log_density(denoise, x, *self.bounds(spec), self.options.sigma_data)

    @property
    def boost(self) -> Boost | None:
        """Discriminator guidance's boosting, if a guide asks for it."""
        return next((boost for guide in self.guides if (boost := getattr(guide, "boost", None))), None)

    @property
    def rejection(self) -> Rejection | None:
        """DiffRS, if a guide asks for it."""
        return next((guide for guide in self.guides if isinstance(guide, Rejection)), None)

    def bounds(self, spec: SamplingRecipe) -> tuple[float, float]:
        """Smallest and largest noise level of a sampling run."""
        return sampling_plan.bounds(spec, (self.options.sigma_min, self.options.sigma_max), self.precond)

    def sigmas(self, spec: SamplingRecipe) -> Tensor:
        """Decreasing noise levels of a sampling run, (steps + 1,): see `sampling_plan.sigmas`."""
        return sampling_plan.sigmas(spec, self.bounds(spec), self.precond)


def as_diffusion(model: LikelihoodModel, refusal: str) -> DiffusionModel:
    """The model, if it is a denoiser with noise levels. Raises UsageError(refusal) for one of another kind."""
    if not isinstance(model, DiffusionModel):
        raise UsageError(refusal)
    return model


def _check_finite(x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise NumericsError(
            f"{int((~x.isfinite().flatten(1).all(1)).sum())} of {len(x)} samples are not finite; the model or a "
            "guide diverges: lower the weights of guidance, narrow its window, or take more steps"
        )


def _cfg_interval(spec: SamplingRecipe) -> Interval:
    return Interval(spec.cfg_sigma_min or 0.0, math.inf if spec.cfg_sigma_max is None else spec.cfg_sigma_max)


def _cfg_low(spec: SamplingRecipe) -> LowScale | None:
    if spec.cfg_scale_low is None or spec.cfg_sigma_low is None:
        return None
    return LowScale(spec.cfg_scale_low, spec.cfg_sigma_low)
