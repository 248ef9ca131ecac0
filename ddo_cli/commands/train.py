"""Commands that train: `finetune-ddo`, `train-disc`, `pretrain`, `train-classifier`, `train-extractor`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ddo_cli import console
from ddo_cli.commands import command, options, recipe_options
from ddo_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ddo_cli.recipe.schema import Recipe


@command.add(
    recipe=recipe_options.of_recipe(
        "model.ckpt", "data.source", "data.rejected", "finetune.objective",
        "finetune.rounds", "finetune.alpha", "finetune.beta", "finetune.lr",
        "finetune.batch", "finetune.images_per_round", "finetune.eval_every", "finetune.num_fake", "finetune.control",
        "metric.num_images", "finetune.precision", "finetune.compile", "seed", "model.file",
    ),
    device=options.device_of,
)  # fmt: skip
def finetune_ddo(
    recipe: "Recipe",
    typed: dict[str, Any],
    device: "torch.device",
    out: Annotated[Path | None, Option(help="Directory of the run. Default: runs/<recipe>.")] = None,
    log_to: options.LogTo = "none",
    dry_run: options.MeasuredDryRun = False,
    measure: options.Measure = True,
) -> command.Result:
    """Finetune a model in rounds with the DDO loss or a relative; also `ddo finetune`. Run again to continue."""
    from ddo_cli import rundir
    from ddo_cli.engines.ddo import finetune, report

    for name in recipe.finetune.unread:
        texts = [f"--{name.replace('_', '-')} {typed[name]}"] if name in typed else []
        texts += [text for text in typed.get("overrides", []) if text.startswith(f"finetune.{name}=")]
        if texts:
            raise UsageError(
                f"{texts[0]} has no effect with finetune.objective = {recipe.finetune.objective}; leave it out"
            )
    figures = finetune.run(
        recipe,
        out or Path("runs") / recipe.name,
        device=device,
        dry_run=dry_run,
        measure=measure,
        log_to=options.trackers(log_to),
    )
    if dry_run:
        by_round = figures.get("settings_by_round")
        table = console.table(*report.settings_table(by_round)[:3]) if by_round else None
        return _plan(recipe, recipe.finetune, figures, table)
    columns, rows = report.table_of(rundir.RunDir(Path(figures["out"])), figures["metric"])
    counted = ""
    if figures["metric_images"]:
        counted = f" of {figures['metric_images']:,} images on seeds that no selection saw"
    title = f"{recipe.finetune.objective.upper()} by round: {figures['metric']}{counted} (lower is better)"
    shown = {"final": figures["final"], **report.told(figures)}
    if published := [f"{p['method']} {p['value']:g} (arXiv {p['arxiv']})" for p in figures.get("published", [])]:
        shown["published"] = ", ".join(published)
    shown["report"] = str(Path(figures["out"]) / "report.html")
    if "sweep_cost" in figures:
        shown["sweep cost"] = f"{figures['sweep_cost']:.2f} of the full grid"
    return command.Result(figures, shown, console.table(title, columns, rows))


def _plan(recipe: "Recipe", section: Any, figures: dict[str, Any], table: Any = None) -> command.Result:
    """What --dry-run prints: the plan, then the loss's and optimizer's settings; with --json the whole recipe."""
    settings = {key: getattr(section, key) for key in ("alpha", "beta", "lr") if hasattr(section, key)}
    shown = {key: value for key, value in figures.items() if key != "settings_by_round"}
    return command.Result(
        {**figures, **settings, "recipe": recipe.model_dump(mode="json")}, {**shown, **settings}, table
    )


@command.add(
    recipe=recipe_options.of_recipe(
        "model.ckpt", "data.source", "discriminator.fake", "discriminator.num_fake", "discriminator.images",
        "discriminator.eval_every", "metric.num_images", "discriminator.lr", "discriminator.batch",
        "discriminator.select", "discriminator.precision", "discriminator.compile", "discriminator.conditional",
        "discriminator.control", "seed", "model.file",
    ),
    device=options.device_of,
)  # fmt: skip
def train_disc(
    recipe: "Recipe",
    typed: dict[str, Any],
    device: "torch.device",
    out: Annotated[
        Path | None, Option(help="Directory. Default: runs/<recipe>-disc, with --ckpt and its hash.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Use a --fake set of another model.")] = False,
    log_to: options.LogTo = "none",
    dry_run: options.DryRun = False,
) -> command.Result:
    """Train a discriminator of real against generated images, for `ddo guide-sample`. Run again to continue."""
    from ddo_cli.engines.discriminator import train

    if "eval_num" in typed and recipe.discriminator.select != "fid":
        raise UsageError(
            f"--eval-num {typed['eval_num']} has no effect without scores of checkpoints; add --select fid"
        )
    out = out or train.default_out(recipe, typed.get("ckpt"))
    figures = train.run(recipe, out, device=device, force=force, dry_run=dry_run, log_to=options.trackers(log_to))
    if dry_run:
        return _plan(recipe, recipe.discriminator, figures)
    table = console.table("Held-out images by noise level", *train.table_of(Path(figures["out"])))
    return command.Result(figures, {**figures, "report": str(Path(figures["out"]) / "report.html")}, table)


@command.add(
    recipe=recipe_options.of_recipe(
        "data.source", "pretrain.images", "pretrain.lr", "pretrain.batch", "pretrain.precision",
        "pretrain.compile", "seed", "model.file",
        check_model=True,
    ),
    device=options.device_of,
)  # fmt: skip
def pretrain(
    recipe: "Recipe",
    device: "torch.device",
    out: Annotated[Path | None, Option(help="Directory of the run. Default: runs/<recipe>-pretrain.")] = None,
    log_to: options.LogTo = "none",
    dry_run: options.MeasuredDryRun = False,
    measure: options.Measure = True,
) -> command.Result:
    """Train a model by maximum likelihood, to have a reference. Run again to continue."""
    from ddo_cli.engines.pretrain import model

    out = out or Path("runs") / f"{recipe.name}-pretrain"
    figures = model.run(recipe, out, device=device, dry_run=dry_run, measure=measure, log_to=options.trackers(log_to))
    return _plan(recipe, recipe.pretrain, figures) if dry_run else command.Result(figures)


@command.add(
    recipe=recipe_options.of_recipe(
        "model.ckpt", "data.source", "classifier.images", "classifier.lr", "classifier.batch", "classifier.precision",
        "classifier.compile", "seed", "model.file",
    ),
    device=options.device_of,
)  # fmt: skip
def train_classifier(
    recipe: "Recipe",
    device: "torch.device",
    out: Annotated[Path | None, Option(help="Directory of the run. Default: runs/<recipe>-classifier.")] = None,
    log_to: options.LogTo = "none",
    dry_run: options.DryRun = False,
) -> command.Result:
    """Train a classifier of noisy images, for classifier guidance or under a discriminator. Run again to continue."""
    from ddo_cli.engines.discriminator import classifier

    out = out or Path("runs") / f"{recipe.name}-classifier"
    figures = classifier.run(recipe, out, device=device, dry_run=dry_run, log_to=options.trackers(log_to))
    return _plan(recipe, recipe.classifier, figures) if dry_run else command.Result(figures)


@command.add(device=options.device_of)
def train_extractor(
    device: "torch.device",
    data: Annotated[str, Option(help="Labelled images: a folder, zip, npz, or embedded:<name>.")],
    out: Annotated[Path, Option(help="The weight file to write.")],
    held_out: Annotated[str | None, Option(help="Images for the accuracy. Default: a tenth of the data.")] = None,
    images: Annotated[int, Option(min=1, help="Images to train on, counting repeats.")] = 100_000,
    seed: Annotated[int, Option(min=0, help="Seed of all random numbers.")] = 0,
    dry_run: options.DryRun = False,
) -> dict[str, Any]:
    """Train a small classifier whose features give a Fréchet distance where Inception's do not fit."""
    from ddo_cli.engines.pretrain import extractor

    return extractor.run(data, out, held_out=held_out, images=images, seed=seed, device=device, dry_run=dry_run)
