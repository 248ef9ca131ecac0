"""Commands that draw images: `sample`, `guide-sample`, `edit`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from typer import Option

from ddo_cli import console
from ddo_cli.commands import command, options, recipe_options
from ddo_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ddo_cli.engines.sampling import guides

SAMPLING = ("labels", "sampler", "steps", "s_churn", "cfg_scale", "batch", "precision", "compile", "rng")


@command.add(
    prompts=options.prompts_of,
    seeds=options.seeds_of,
    classes=options.classes_of,
    sampling=recipe_options.of_sampling(*SAMPLING),
    second_network=options.second_network,
    device=options.device_and_models,
)
def sample(
    prompts: options.Prompts,
    seeds: Sequence[int],
    classes: list[int] | None,
    sampling: dict[str, Any],
    second_network: "guides.Others",
    device: "torch.device",
    ckpt: Annotated[
        str,
        options.of_weights(help="Model: a weight file, run directory, pipeline's folder or embedded:<name>."),
    ] = "embedded:digits16",
    out: Annotated[Path, Option(help="Directory of the sample set.")] = Path("samples"),
    form: options.Form = None,
    dry_run: options.DryRun = False,
) -> dict[str, Any]:
    """Draw samples: each image depends on its own seed only. Run again to continue."""
    from ddo_cli.engines.sampling import guides, sample
    from ddo_cli.models import registry

    loaded = sample.with_prompts(registry.load_model(ckpt, device), *prompts)
    model, record = guides.of_plain_sampling(second_network, loaded, device)
    return sample.run(
        model, seeds, out, form=form, classes=classes, sampling=sampling, guidance=record, device=device,
        dry_run=dry_run,
    )  # fmt: skip


class Classifier(NamedTuple):
    """Classifier guidance."""

    classifier: Annotated[str | None, options.of_weights(help="Noisy-image classifier of `ddo train-classifier`.")] = (
        None
    )
    classifier_weight: Annotated[float, Option(help="Classifier-guidance weight.")] = 1.0


class Rejection(NamedTuple):
    """Diffusion rejection sampling."""

    diffrs: Annotated[
        bool,
        Option(
            "--diffrs", help="Reject states on the way by the discriminator, instead of guiding (arXiv 2405.17880)."
        ),
    ] = False
    diffrs_percentile: Annotated[
        float | None,
        Option(min=0, max=1, help="Percentile of log-ratios that counts as the largest.", show_default="0.75"),
    ] = None
    diffrs_max_nfe: Annotated[
        int | None,
        Option(min=1, help="Most evaluations for one image.", show_default="3 times those without rejection"),
    ] = None


@command.add(
    discriminator=options.Pair,
    guidance=recipe_options.of_guidance(
        "dg_weight", "dg_weight_2nd", "time_min", "time_max", "decay", "boost", "boost_churn_period",
        "boost_weight_period",
    ),
    second_network=options.second_network,
    classifier=Classifier,
    rejection=Rejection,
    prompts=options.prompts_of,
    seeds=options.seeds_of,
    classes=options.classes_of,
    sampling=recipe_options.of_sampling(*SAMPLING),
    device=options.device_and_models,
)  # fmt: skip
def guide_sample(
    discriminator: options.Pair,
    guidance: dict[str, Any],
    second_network: "guides.Others",
    classifier: Classifier,
    rejection: Rejection,
    prompts: options.Prompts,
    seeds: Sequence[int],
    classes: list[int] | None,
    sampling: dict[str, Any],
    device: "torch.device",
    out: Annotated[Path, Option(help="Directory of the sample set.")] = Path("guided"),
    form: options.Form = None,
    dry_run: options.DryRun = False,
) -> dict[str, Any]:
    """Draw samples with discriminator guidance. Same seeds as `ddo sample`. Run again to continue."""
    from ddo_cli.engines.sampling import diffrs, guide_sample

    given = {key: value for key, value in rejection._asdict().items() if value is not None and key != "diffrs"}
    for key, value in given.items():
        if not rejection.diffrs:
            raise UsageError(f"--{key.replace('_', '-')} {value:g} has no effect without --diffrs; add it")
    by_rejection = diffrs.Options(**{key.removeprefix("diffrs_"): value for key, value in given.items()})
    return guide_sample.run(
        discriminator.disc, discriminator.ckpt, seeds, out, form=form, classes=classes, prompts=prompts,
        sampling=sampling,
        guidance=guidance, others=second_network._replace(**classifier._asdict()),
        rejection=by_rejection if rejection.diffrs else None, force=discriminator.force, device=device, dry_run=dry_run,
    )  # fmt: skip


class Editor(NamedTuple):
    """The model that edits images, and its discriminator."""

    disc: Annotated[
        str | None,
        options.of_weights(
            help="Discriminator of `ddo train-disc`. Default: the newest of this model below runs/, if any."
        ),
    ] = None
    ckpt: Annotated[
        str | None,
        options.of_weights(
            help="Model that edits. Default: the one that --disc was trained for, or embedded:digits16."
        ),
    ] = None
    no_guidance: Annotated[bool, Option("--no-guidance", help="Edit without guidance only.")] = False
    force: options.Force = False


class Score(NamedTuple):
    """How edited images are scored."""

    ref: Annotated[
        str | None,
        Option(help="Target images, or an .npz with mu and sigma. Default: the discriminator's data, or digits16."),
    ] = None
    weights: Annotated[str | None, Option(help="Inception-v3 weights, for an FID.")] = None
    extractor: Annotated[str | None, Option(help="An extractor of `ddo train-extractor`.")] = None


@command.add(
    model=Editor,
    guidance=recipe_options.of_guidance("dg_weight", "dg_weight_2nd", "time_min", "time_max"),
    sampling=recipe_options.of_sampling("sampler", "steps", "s_churn", "cfg_scale", "batch", "precision", "compile"),
    score=Score,
    device=options.device_and_models,
)
def edit(
    model: Editor,
    guidance: dict[str, Any],
    sampling: dict[str, Any],
    score: Score,
    device: "torch.device",
    source: options.Images,
    level: Annotated[str, Option(help="Noise levels to start from; pixels lie in [-1, 1].")] = "0.5,1,2,5",
    num_images: Annotated[int, Option(min=1, help="Number of images, the first ones.")] = 64,
    label: Annotated[int | None, Option(help="Class to translate to. Default: the images' own.")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, Option(help="Directory of the edited images.")] = Path("edited"),
    form: options.Form = None,
    dry_run: options.DryRun = False,
) -> command.Result:
    """Edit images (SDEdit): add noise, then sample from there with and without guidance. Run again to continue."""
    levels = options.parsed("--level", level, options.floats, "write noise levels such as 0.5,1,2")
    from ddo_cli.engines.edit import edit, report

    figures = edit.run(
        source, out, levels, num=num_images, disc=model.disc, ckpt=model.ckpt, guidance=guidance,
        use_guidance=not model.no_guidance, label=label, seed=seed, form=form or "png", sampling=sampling,
        **score._asdict(), force=model.force, device=device, dry_run=dry_run,
    )  # fmt: skip
    if dry_run:
        return command.Result(figures)
    shown = {key: value for key, value in figures.items() if key != "levels"}
    return command.Result(figures, shown, console.table("Edited images", *report.table(figures)))
