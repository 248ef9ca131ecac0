"""What `train-disc` is told, opened and checked: nothing is drawn, trained or written before all of it holds."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_fits, compare_names, digest
from ddo_cli.data.items import identity as identity_of
from ddo_cli.data.samples import manifest_of
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.engines import captions, training_run
from ddo_cli.engines.discriminator import data as disc_data
from ddo_cli.engines.discriminator import features as disc_features
from ddo_cli.engines.sampling import guides, sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.files import cache_directory
from ddo_cli.generation import check_labels
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.recipe.schema import DiscriminatorRecipe, Recipe, SamplingRecipe
from ddo_cli.rng import seed_from
from ddo_cli.trainable import Trainable
from ddo_cli.training import loop


class Setup(NamedTuple):
    """A run's inputs."""

    recipe: Recipe
    loaded: registry.Loaded
    base: DiffusionModel  # the model of `loaded`, which is not trained
    real: ItemSet
    given: ItemSet | None  # the generated set that the recipe names; None: one is to be drawn
    label_use: int  # classes that the discriminator tells apart; 0: it sees no label
    config: dict[str, Any]  # of the discriminator
    network: Trainable  # the discriminator before its first step
    spec: SamplingRecipe
    scoring: Scoring | None  # of guided samples, where the best checkpoint is chosen by them
    identity: dict[str, Any]  # what an unfinished run must share with the one that continues it
    device: torch.device

    def forecast(self, out: Path) -> dict[str, Any]:
        """What `--dry-run` tells."""
        settings = self.recipe.discriminator
        cached = disc_features.size_of(self.network, settings)
        return {
            "out": str(out), "dry_run": True, "model": self.recipe.model.ckpt, "data": self.real.name,
            "discriminator": settings.name, "parameters": sum(p.numel() for p in self.network.parameters()),
            "fake": settings.fake or f"{settings.num_fake} to draw", "images": settings.images, "batch": settings.batch,
            **({"cached_features": f"{cached / 1e9:.3g} GB in {cache_directory()}"} if cached else {}),
            **({"control": "the untrained network: held-out figures and no training"} if settings.control else {}),
        }  # fmt: skip

    def header(self, fake: ItemSet) -> dict[str, Any]:
        """Of the discriminator's files: what `guide-sample` checks and starts from."""
        settings = self.recipe.discriminator
        drawn = manifest_of(Path(settings.fake)).get("sampling") if settings.fake else self.spec.model_dump(mode="json")
        trained_on = {
            "model": self.recipe.model.ckpt, "model_sha256": self.loaded.checkpoint.sha256,
            "data_sha256": digest(self.real), "fake_sha256": digest(fake), "num_fake": len(fake.items),
            "sampling": drawn,
        }  # fmt: skip
        made_by = self.recipe.told("data", "model", "sampling", "metric", "discriminator", "guidance")
        del made_by["discriminator"]["control"]  # may be added to a finished run, whose weights stay as they are
        link = {"command": "train-disc", "recipe": made_by, **trained_on}
        return {
            "kind": "discriminator", "config": self.config, "process": discriminators.PROCESS,
            "trained_on": trained_on, "guidance": self.recipe.guidance.model_dump(mode="json"),
            "provenance": [*self.loaded.checkpoint.header.get("provenance", []), link],
        }  # fmt: skip


def eval_steps(settings: DiscriminatorRecipe) -> int:
    """Steps between checkpoints. Raises UsageError for far too many of them."""
    steps = training_run.num_steps(settings.images, settings.batch)
    return training_run.steps_between("discriminator.eval_every", settings.eval_every, settings.batch, steps)


def prepare(recipe: Recipe, device: torch.device, force: bool) -> Setup:
    """force: as in `train.run`. Raises RecipeError, DataError or UsageError."""
    settings = recipe.discriminator
    registry.load_file(recipe.model.file)
    loaded = registry.load_model(recipe.model.ckpt, device)
    base = guides.diffusion_model(loaded)
    loaded.model.requires_grad_(False)
    real = open_images(recipe.data.source, recipe.data.num, recipe.data.cache, base.codec)
    loaded = captions.told(loaded, real)
    label_use = disc_data.labels_seen(loaded, settings)
    check_fits(real, base, recipe.data.hflip, num_classes=label_use)
    if label_use:
        compare_names(real, loaded.checkpoint.header.get("provenance", []))
    # What the recipe does not set is the checkpoint's.
    spec = sample.spec_of(loaded.checkpoint, **recipe.sampling.model_dump(exclude_unset=True))
    base.check_sampling(spec)
    given = disc_data.given_set(loaded, real, label_use, settings, force) if settings.fake is not None else None
    config = discriminators.config_of(
        "discriminator", settings.name, base.codec.state_shape, label_use, settings.options
    )
    reads_text = registry.reads_text(loaded.checkpoint.header["config"]["name"])
    scoring = Scoring(recipe, real, spec, device, reads_text) if settings.select == "fid" else None
    if given is None:
        disc_data.check_sizes(len(real.items), settings.num_fake, real.name, settings)
        disc_data.check_classes(real, settings.num_fake, label_use)
        check_labels(spec, base.num_classes, settings.num_fake)
    identity = {"model_sha256": loaded.checkpoint.sha256, **identity_of(real), "config": config}
    identity |= {"fake_sha256": digest(given)} if given is not None else {}
    identity |= scoring.identity if scoring is not None else {}
    identity |= training_run.precision_of(settings, spec, device)
    network = untrained(config, recipe, device)
    loop.check(network, settings)
    eval_steps(settings)
    disc_features.size_of(network, settings)
    guide = guides.discriminator_guide(network, recipe.guidance, base)
    if scoring is not None:
        scoring.check(boosts=guide.boost is not None)
        guides.check_acts(base, guide, spec)
    return Setup(recipe, loaded, base, real, given, label_use, config, network, spec, scoring, identity, device)


def untrained(config: dict[str, Any], recipe: Recipe, device: torch.device) -> Trainable:
    """The discriminator before its first step, equal in every process and call."""
    torch.manual_seed(seed_from("init", recipe.seed))  # weights are the only thing drawn from the global generator
    return discriminators.build("discriminator", config).to(device)
