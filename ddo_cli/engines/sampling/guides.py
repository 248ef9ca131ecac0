"""Guides of a sampling run, from files and recipes; shared by the engines that sample with guidance."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist
from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.churn import Boost
from ddo_cli.diffusion.denoiser import DiffusionModel, as_diffusion
from ddo_cli.diffusion.guidance import AutoGuide, GradientGuide, Guide, Interval, Network, OnePass, Potential
from ddo_cli.diffusion.precond import Discrete
from ddo_cli.errors import CheckpointError, RunError, UsageError, printable
from ddo_cli.files import sha256
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.discriminators.adm_encoder import AdmClassifier
from ddo_cli.models.discriminators.on_trunk import TrunkDiscriminator
from ddo_cli.recipe.load import differing_keys
from ddo_cli.recipe.schema import GuidanceRecipe, SamplingRecipe, messages
from ddo_cli.rundir import read_state

RUNS = Path("runs")


def diffusion_model(loaded: registry.Loaded) -> DiffusionModel:
    """The model, if guides can steer it. Raises UsageError."""
    path, name = loaded.checkpoint.path, loaded.checkpoint.header["config"]["name"]
    return as_diffusion(
        loaded.model, f"{path} holds the network {name}; guidance changes a score, so it needs a diffusion model"
    )


def newest_discriminator(model_sha256: str | None = None) -> Path | None:
    """The final checkpoint of the newest finished `ddo train-disc` below RUNS; None if there is none.

    model_sha256: consider only discriminators that were trained against this model.
    """
    files = []
    for state in sorted(RUNS.glob("*/state.json")):
        file = state.with_name("final.safetensors")
        try:
            content = read_state(state)
        except RunError as error:
            console.warn(f"{error}; left out")
            continue
        if content.get("command") == "train-disc" and content.get("finished") and file.is_file():
            files.append(file)
    for file in dist.from_main(sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)):
        trained_on = checkpoint.read_header(file, kind="discriminator").get("trained_on", {}) if model_sha256 else {}
        if trained_on.get("model_sha256") == model_sha256:
            return file
    return None


class Chosen(NamedTuple):
    """A discriminator, the model that it guides, and the settings."""

    model: registry.Loaded
    discriminator: discriminators.Loaded
    settings: GuidanceRecipe


def choose(
    disc: str | None,
    ckpt: str | registry.Loaded | None,
    given: dict[str, Any],
    *,
    device: torch.device,
    force: bool = False,
) -> Chosen:
    """The discriminator (None: the newest of the runs) and the model (None: the one it names), checked to be a pair.

    ckpt: may be loaded already.

    given: values of GuidanceRecipe that override the discriminator's, where not None.
    force: a discriminator that was trained against another model is a warning instead of an error.
    """
    file = disc or str(newest_discriminator() or "")
    if not file:
        raise UsageError(
            f"no finished discriminator in {RUNS}/*; run `ddo train-disc` first, or give one with --disc FILE"
        )
    loaded = discriminators.load("discriminator", file, device)
    header = loaded.checkpoint.header
    try:
        name = ckpt or header["trained_on"]["model"]
        model = name if isinstance(name, registry.Loaded) else registry.load_model(name, device)
    except CheckpointError as error:
        if ckpt is not None:
            raise
        raise CheckpointError(f"{error}; it is the model that {file} names: say with --ckpt where it is now") from None
    _check_pair(header["config"], header["trained_on"], model, file, force)
    try:
        stored = GuidanceRecipe.model_validate(header["guidance"])
    except ValidationError as error:
        problems = "; ".join(messages(error, "guidance", {}))
        raise CheckpointError(f"{file} has a damaged header ({printable(problems)}); copy the file again") from None
    return Chosen(model, loaded, stored.merged(**given))


def _check_pair(
    config: dict[str, Any], trained_on: dict[str, Any], model: registry.Loaded, file: str, force: bool
) -> None:
    base = diffusion_model(model)
    if tuple(config["shape"]) != base.codec.state_shape:
        raise UsageError(
            f"{file} was made for states of shape {tuple(config['shape'])}, and {model.checkpoint.path} draws "
            f"{base.codec.state_shape}; train one for this model: ddo train-disc --ckpt {model.checkpoint.path}"
        )
    if config["num_classes"] not in (0, base.num_classes):
        has = f"{base.num_classes} classes" if base.num_classes else "no classes"
        raise UsageError(
            f"{file} sees labels of {config['num_classes']} classes, and {model.checkpoint.path} has {has}; train one "
            f"for this model: ddo train-disc --ckpt {model.checkpoint.path}"
        )
    if trained_on["model_sha256"] != model.checkpoint.sha256:
        message = (
            f"{file} was trained against {trained_on['model']} (sha256 {trained_on['model_sha256'][:12]}), not against "
            f"{model.checkpoint.path} ({model.checkpoint.sha256[:12]}), whose samples it has never seen"
        )
        if not force:
            raise UsageError(f"{message}; train one with ddo train-disc --ckpt {model.checkpoint.path}, or add --force")
        console.warn(f"{message}; used nevertheless (--force)")


def warn_of_other_sampler(loaded: discriminators.Loaded, spec: SamplingRecipe) -> None:
    """Warns of sampling settings that differ from those of the discriminator's training set."""
    drawn = loaded.checkpoint.header["trained_on"].get("sampling")
    if drawn is None:
        return
    ours = {key: value for key, value in spec.model_dump(mode="json").items() if key != "batch"}
    if lines := differing_keys(ours, {key: drawn.get(key) for key in ours}):
        console.warn(
            "the discriminator has seen samples drawn with other settings, whose errors it corrects "
            f"(there -> now): {'; '.join(lines)}"
        )


def discriminator_guide(network: nn.Module, settings: GuidanceRecipe, base: DiffusionModel) -> GradientGuide:
    """The guide of a discriminator for this model."""
    boost = None
    if settings.boost:
        boost = Boost(settings.boost_churn_period, settings.boost_weight_period, settings.boost_churn)
    if len(base.codec.state_shape) == 3:
        network = network.to(memory_format=torch.channels_last)
    known = base.precond
    potential = _told_steps(network, known) if isinstance(known, Discrete) and known.is_linear else network
    return GradientGuide(
        potential, settings.dg_weight, settings.dg_weight_2nd, settings.time_min, settings.time_max, settings.decay,
        boost,
    )  # fmt: skip


def _told_steps(network: nn.Module, known: Discrete) -> Potential:
    """The discriminator, told the index of the model's step, divided by the last one, in place of the VP time.

    As DG's code for DiT does; the two are up to 0.0034 apart on the linear schedule.
    """

    def potential(x_vp: Tensor, t: Tensor, label: Tensor) -> Tensor:
        step = known.step_of(vp_sde.sigma_of(t)).to(torch.float64)
        return network(x_vp, step / (len(known.sigmas) - 1), label)

    return potential


def check_acts(base: DiffusionModel, guide: GradientGuide, spec: SamplingRecipe) -> None:
    """Raises UsageError if the guide has weight but none of the sampler's noise levels lies in its window."""
    base.guided_by([guide]).check_sampling(spec)
    t = vp_sde.time_of(base.sigmas(spec)[:-1])
    if max(guide.weight, guide.weight_2nd) > 0 and not bool(guide.holds(t).any()):
        raise UsageError(
            f"the window from time_min = {guide.time_min} to time_max = {guide.time_max} holds none of the sampler's "
            f"times, {float(t.min()):.3g} to {float(t.max()):.3g}; widen it, or set --dg-weight 0"
        )


def window(base: DiffusionModel, guide: GradientGuide, spec: SamplingRecipe) -> tuple[float, float]:
    """The lowest and highest noise level with guidance; not increasing if there is none."""
    times = torch.tensor([guide.time_min, guide.time_max], dtype=torch.float64)
    first, last = vp_sde.sigma_of(times).tolist()
    low, high = base.bounds(spec)
    return max(low, first), min(high, last)


def harm(gain: dict[str, Any] | None) -> str | None:
    """A warning of a discriminator that leads the score away from held-out data, beyond two standard errors.

    A good cross-entropy does not exclude it (arXiv 2503.16117). At weight 1, since larger ones go beyond the data on
    purpose. gain: of `train-disc`, see `metrics.gain`; None: not measured.
    """
    if gain is None or gain["gain_weight_1"] >= -2 * gain["error_weight_1"]:
        return None
    return (
        f"guidance of weight 1 leads the score away from held-out data: gain {gain['gain_weight_1']:.3g} ± "
        f"{gain['error_weight_1']:.2g} nats. The discriminator is overfitted (give more images, or --select gain), or "
        "corrects errors of few sampling steps, which the gain does not count"
    )


class Others(NamedTuple):
    """Guides in addition to the discriminator; those whose path is None are off."""

    guide_ckpt: str | None = None  # a worse version of the model, for autoguidance
    guidance: float = 1.0  # its scale, 1 = off
    classifier: str | None = None  # a noisy-image classifier
    classifier_weight: float = 1.0
    interval: tuple[float, float] | None = None  # noise levels (low, high] at which guide_ckpt acts; None: all


def other_guides(others: Others, base: DiffusionModel, device: torch.device) -> tuple[list[Guide], dict[str, Any]]:
    """The guides, innermost first, and what a sample set's manifest records of them. Raises UsageError."""
    _check_others(others)
    guides: list[Guide] = []
    record: dict[str, Any] = {}
    if others.guide_ckpt is not None:
        second, sha256 = _second_network(others.guide_ckpt, base, device)
        interval = Interval(*others.interval) if others.interval else Interval()
        guides.append(AutoGuide(second, others.guidance, interval))
        record["autoguidance"] = {"sha256": sha256, "scale": others.guidance}
        if others.interval:
            record["autoguidance"]["interval"] = list(others.interval)
    if others.classifier is not None:
        if prompts_of(base) is not None:
            raise UsageError(
                f"--classifier {others.classifier} tells classes, and the model's labels are prompts; leave it out"
            )
        loaded = discriminators.load("classifier", others.classifier, device)
        config = loaded.checkpoint.header["config"]
        if tuple(config["shape"]) != base.codec.state_shape or config["num_classes"] != base.num_classes:
            raise UsageError(
                f"--classifier {others.classifier} tells {config['num_classes']} classes of states of shape "
                f"{tuple(config['shape'])}, the model has {base.num_classes} of {base.codec.state_shape}; "
                "give one for this model"
            )
        guides.append(_classifier_guide(loaded.network, others.classifier_weight, base))
        record["classifier"] = {"sha256": loaded.checkpoint.sha256, "weight": others.classifier_weight}
    return guides, record


def _second_network(ckpt: str, base: DiffusionModel, device: torch.device) -> tuple[Network, str]:
    """The denoiser that --guide-ckpt names, and its hash."""
    loaded = registry.load_model(ckpt, device)
    if (prompts := prompts_of(base)) is not None:
        if prompts_of(loaded.model) is None:
            raise UsageError(f"--guide-ckpt {ckpt} reads no prompts, and the model does; give a version of this model")
        loaded = registry.told(loaded, *prompts)
    model = diffusion_model(loaded)
    if model.codec.state_shape != base.codec.state_shape or model.num_classes not in (0, base.num_classes):
        raise UsageError(
            f"--guide-ckpt {ckpt} draws {model.codec.state_shape} with {model.num_classes} classes, the model "
            f"{base.codec.state_shape} with {base.num_classes}; autoguidance needs a version of the same model"
        )
    spaces = [(type(codec).__name__, codec.encoder_id()) for codec in (model.codec, base.codec)]
    if spaces[0] != spaces[1]:
        theirs, ours = (f"{kind} {encoder[:12]}" for kind, encoder in spaces)
        raise UsageError(
            f"--guide-ckpt {ckpt} draws in the space of a {theirs}, the model in that of a {ours}; give one of the "
            "same space"
        )
    return (model if model.num_classes or not base.num_classes else _Unconditional(model)), loaded.checkpoint.sha256


def prompts_of(model: LikelihoodModel) -> tuple[Sequence[str], str] | None:
    """What labels of a model that reads text mean, and what -1; None for a model of classes."""
    options: Any = getattr(model, "options", None)
    return (options.prompts, options.negative_prompt) if hasattr(options, "prompts") else None


class _Unconditional(NamedTuple):
    """A network without classes, which ignores the labels of the model that it guides."""

    model: DiffusionModel

    def denoise(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return self.model.denoise(x, sigma, torch.full_like(label, NO_LABEL))


def _check_others(others: Others) -> None:
    for value, name in ((others.guidance, "--autoguidance-scale"), (others.classifier_weight, "--classifier-weight")):
        if not math.isfinite(value):
            raise UsageError(f"{name} {value} is not a finite number; give a weight")
    if others.guide_ckpt is None and others.guidance != 1.0:
        raise UsageError(
            f"--autoguidance-scale {others.guidance:g} is the scale of --guide-ckpt FILE; give both or neither"
        )
    if others.guide_ckpt is not None and others.guidance == 1.0:
        raise UsageError(
            f"--guide-ckpt {others.guide_ckpt} has no effect at scale 1; give one with --autoguidance-scale, e.g. 1.7"
        )
    if others.interval is not None:
        low, high = others.interval
        if not 0 <= low < high:
            raise UsageError(f"--guidance-interval {low:g},{high:g} must be two increasing noise levels, such as 0.3,2")
        if others.guide_ckpt is None:
            raise UsageError(f"--guidance-interval {low:g},{high:g} needs --guide-ckpt FILE and --autoguidance-scale")
    if others.classifier is None and others.classifier_weight != 1.0:
        raise UsageError(f"--classifier-weight {others.classifier_weight:g} needs --classifier FILE")


def _classifier_guide(network: nn.Module, weight: float, base: DiffusionModel) -> GradientGuide:
    """Guidance by a classifier at all times; of a model of discrete steps it is told its own step, if it has steps."""
    at_steps = getattr(network, "at_steps", lambda: None)() if isinstance(base.precond, Discrete) else None
    potential = partial(_class_log_probability, at_steps or network)
    return GradientGuide(potential, weight, weight, time_min=0.0, time_max=1.0)


def _class_log_probability(
    classifier: Callable[[Tensor, Tensor], Tensor], x_vp: Tensor, t: Tensor, label: Tensor
) -> Tensor:
    """log p(label | x_vp, t)."""
    return _of_label(classifier(x_vp, t), label)


def _of_label(logits: Tensor, label: Tensor) -> Tensor:
    """log p(label), (B,). logits: (B, classes)."""
    return logits.log_softmax(1).gather(1, label[:, None]).squeeze(1)


def joined(
    inner: Sequence[Guide], others: Others, guide: GradientGuide, network: nn.Module, base: DiffusionModel
) -> list[Guide]:
    """The guides of `other_guides` and the discriminator's; of one pass where the classifier is its trunk.

    That needs that both are told the same time, see `_told_steps` and `AdmClassifier.at_steps`, and no boosting.
    """
    separate = [*inner, guide]
    if others.classifier is None or not isinstance(network, TrunkDiscriminator):
        return separate
    if guide.boost is not None or not guide.weight:
        return separate
    trunk, head, sha = network.trunk, network.head, network.trunk_sha256
    if not isinstance(trunk, AdmClassifier) or sha256(checkpoint.resolve(others.classifier)) != sha:
        return separate
    steps = base.precond if isinstance(base.precond, Discrete) else None
    if steps is not None and not (
        steps.is_linear and trunk.known is not None and torch.equal(trunk.known.sigmas, steps.sigmas)
    ):
        return separate

    def potentials(x_vp: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        if steps is None:
            features = trunk.features(x_vp, t)
        else:
            step = steps.step_of(vp_sde.sigma_of(t))
            features, t = trunk.features_at(step, x_vp), step.to(torch.float64) / (len(steps.sigmas) - 1)
        return head(features, t, label), _of_label(trunk.out(features), label)

    classifier = _classifier_guide(trunk, others.classifier_weight, base)
    console.info(f"one pass of {others.classifier} serves classifier and discriminator")
    return [*inner[:-1], OnePass(potentials, guide, classifier)]


def of_plain_sampling(
    others: Others, loaded: registry.Loaded, device: torch.device
) -> tuple[registry.Loaded, dict[str, Any]]:
    """The model of `ddo sample`, which has no discriminator, and what a sample set's manifest records of its guides."""
    _check_others(others)
    if others.guide_ckpt is None:
        return loaded, {}
    base = diffusion_model(loaded)
    guides, record = other_guides(others, base, device)
    return loaded._replace(model=base.guided_by(guides)), record
