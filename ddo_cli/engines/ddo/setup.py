"""What `finetune-ddo` is told, opened and checked: nothing is trained, scored or written before all of it holds."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddo_cli import checkpoint, console, rundir
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_enough, check_fits, compare_names, digest
from ddo_cli.data.items import identity as identity_of
from ddo_cli.engines import dry_run as dry_runs
from ddo_cli.engines import training_run
from ddo_cli.engines.ddo import auto, reference, report, sweep
from ddo_cli.engines.ddo.rejected import open_rejected
from ddo_cli.engines.ddo.round import FIRST_FAKE_SEED, Chain, fake_spec
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.engines.watch import Watch
from ddo_cli.errors import RecipeError, UsageError
from ddo_cli.files import sha256
from ddo_cli.generation import check_labels
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.recipe.schema import Recipe, SamplingRecipe
from ddo_cli.training import loop


class Setup(NamedTuple):
    """A run's inputs. The model that it starts from is not among them: each round loads its own."""

    recipe: Recipe
    real: ItemSet
    rejected: ItemSet | None  # of dpo
    scoring: Scoring
    plans: list[sweep.Plan]  # of each round
    identity: dict[str, Any]  # what an unfinished run must share with the one that continues it

    def chains(self, run_dir: rundir.RunDir, watch: Watch) -> list[Chain]:
        """The rounds of DDO, and, where it is asked for, those of its control."""
        parts = (run_dir, self.scoring, self.scoring.device, watch)
        chains = [Chain("rounds", self.recipe, self.plans, *parts)]
        if self.recipe.finetune.control:
            chains.append(Chain("control", self.recipe, [plan.of_control() for plan in self.plans], *parts))
        return chains

    def forecast(self, loaded: registry.Loaded, out: Path, measure: bool) -> dict[str, Any]:
        """What `--dry-run` tells. measure: carry out two steps and a batch of samples, too."""
        plan = _forecast(self.recipe, out, loaded.model, self.plans[0])
        if self.recipe.model.file is not None:
            dry_runs.try_network(loaded.model, self.real, self.scoring.device)
        if not measure:
            return plan
        parts = (self.plans, self.real, self.rejected, self.scoring)
        return plan | dry_runs.of_finetuning(self.recipe, loaded, *parts)


def prepare(recipe: Recipe, device: torch.device) -> tuple[registry.Loaded, Setup]:
    """The model that round 1 starts from, and the rest. Raises RecipeError, DataError or UsageError."""
    registry.load_file(recipe.model.file)
    if (ckpt := registry.file_of(recipe.model.ckpt)) != recipe.model.ckpt:  # of a pipeline's folder
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"ckpt": ckpt})})
    loaded = reference.start_of(recipe, ckpt, device)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache, loaded.model.codec)
    loaded = reference.told(loaded, real)
    check_fits(real, loaded.model, recipe.data.hflip, every_class=True)
    compare_names(real, loaded.checkpoint.header.get("provenance", []))
    spec = _sampling(recipe, loaded)
    _check_objective(recipe, loaded.model)
    rejected = None if recipe.data.rejected is None else open_rejected(recipe, real, loaded.model)
    scoring = Scoring(recipe, real, spec, device, registry.reads_text(loaded.checkpoint.header["config"]["name"]))
    plans = _plans(recipe, loaded, scoring, real)
    identity = {
        "reference_sha256": loaded.checkpoint.sha256, **identity_of(real), **scoring.identity,
        **({} if rejected is None else {"rejected_sha256": digest(rejected)}),
        **training_run.precision_of(recipe.finetune, spec, device),
    }  # fmt: skip
    return loaded, Setup(recipe, real, rejected, scoring, plans, identity)


def _sampling(recipe: Recipe, start: registry.Loaded) -> SamplingRecipe:
    """The recipe's sampling; what it does not set is the reference's."""
    spec = sample.spec_of(start.checkpoint, **recipe.sampling.model_dump(exclude_unset=True))
    start.model.check_sampling(spec)
    return spec


def _check_objective(recipe: Recipe, model: LikelihoodModel) -> None:
    """Says which keys that are set the objective does not read. Raises UsageError for a model that it does not fit."""
    settings = recipe.finetune
    if settings.objective == "cca" and model.num_classes < 2:
        kind = "has one class" if model.num_classes else "is unconditional"
        raise UsageError(
            f"finetune.objective = cca compares images under right and wrong labels, and {recipe.model.ckpt} {kind}; "
            "use ddo or spin, or a model of several classes"
        )
    if settings.objective == "spin" and settings.num_fake < model.num_classes:
        raise UsageError(
            f"finetune.objective = spin compares images of one class, and finetune.num_fake = {settings.num_fake} is "
            f"less than the model's {model.num_classes} classes; raise it"
        )
    if unread := [name for name in settings.unread if name in settings.model_fields_set]:
        names = ", ".join(f"finetune.{name} = {getattr(settings, name)}" for name in unread)
        console.info(f"not read by finetune.objective = {settings.objective}: {names}")


def _plans(recipe: Recipe, start: registry.Loaded, scoring: Scoring, real: ItemSet) -> list[sweep.Plan]:
    """The plan of each round. Raises RecipeError, DataError or UsageError if one of them cannot be run."""
    config, plans = start.checkpoint.header["config"], []
    for number in range(1, recipe.finetune.rounds + 1):
        settings = recipe.finetune.of_round(number)
        draw = {**config["draw"], **settings.draw}
        place = f"round {number}: finetune.draw"
        if problems := registry.problems(config["name"], config["options"], draw, place):
            raise RecipeError("\n".join(problems))
        loop.check(start.model, settings)
        check_enough(real.name, len(real.items), settings.batch, "finetune.batch")
        if settings.num_drawn:
            spec = fake_spec(settings, scoring.spec, start.checkpoint)
            start.model.check_sampling(spec)
            sample.kept_of_fakes(start.model, settings.fake_as, spec)
            check_labels(scoring.spec, start.model.num_classes, settings.num_fake)
            check_enough("a fake set (finetune.num_fake)", settings.num_fake, settings.batch, "finetune.batch")
        if settings.margin and scoring.density is None and scoring.repeats == 1:
            raise UsageError(
                f"finetune.margin = {settings.margin:g} counts standard errors, which one range of seeds does not "
                "tell; set metric.repeats to 2 or more, or leave the margin out"
            )
        plans.append(sweep.plan_of(recipe.of_round(number), partial(scoring.passes, start.model)))
        if number == 1 and (early := sweep.too_early(plans[-1], settings)):
            console.warn(early)
    last = (scoring.table_ranges.stop * recipe.metric.num_images) - 1
    if scoring.density is None and last >= FIRST_FAKE_SEED:
        raise UsageError(
            f"metric.num_images = {recipe.metric.num_images} and metric.repeats = {scoring.repeats} take seeds up to "
            f"{last}, and those of fake sets begin at {FIRST_FAKE_SEED}; lower one of them"
        )
    return plans


def _forecast(recipe: Recipe, out: Path, model: LikelihoodModel, plan: sweep.Plan) -> dict[str, Any]:
    settings = recipe.finetune
    return {
        "out": str(out),
        "dry_run": True,
        "reference": recipe.model.ckpt,
        "reference_sha256": sha256(checkpoint.resolve(recipe.model.ckpt)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rounds": settings.rounds,
        "steps_per_round": plan.steps,
        "pairs_per_step": settings.batch,
        "fake_images_per_round": settings.num_drawn,
        "network_rows_per_step": {
            "model_forward_backward": 2 * settings.batch,
            "reference_forward": 2 * settings.batch,
            **({"control_forward_backward": settings.batch} if settings.control else {}),
        },
        **(plan.forecast() if plan.is_sweep else {}),
        **(auto.forecast(plan) if plan.is_auto else {}),
        **report.early_stop(settings),
        **report.settings_by_round(recipe),
    }
