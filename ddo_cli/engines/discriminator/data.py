"""The generated set that a discriminator is trained on: drawn by the model, or given and checked."""

from pathlib import Path

import numpy as np
import torch

from ddo_cli import console, rundir
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_balance, check_enough, check_fits
from ddo_cli.data.samples import manifest_of
from ddo_cli.engines import captions
from ddo_cli.engines.sampling import sample
from ddo_cli.errors import DataError, UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.schema import DiscriminatorRecipe, Recipe, SamplingRecipe

FIRST_FAKE_SEED = 2_000_000  # beyond the seeds of scores and of finetune-ddo
MAX_IMBALANCE = 30  # a set this many times the other's size; ImageNet against 50,000 samples is 26


def given_set(
    loaded: registry.Loaded, real: ItemSet, label_use: int, settings: DiscriminatorRecipe, force: bool
) -> ItemSet:
    """The generated set settings.fake, checked to be this model's. Raises DataError."""
    source = str(settings.fake)
    fake = open_images(source)
    check_fits(fake, loaded.model, num_classes=label_use)
    made_by = manifest_of(Path(source)).get("checkpoint_sha256")
    if made_by != loaded.checkpoint.sha256:
        what = "does not say which model drew it" if made_by is None else f"was drawn by another model ({made_by[:12]})"
        message = f"{source} {what}, and a discriminator is of use only for the model whose samples it has seen"
        if not force:
            raise DataError(f"{message}; give the set that `ddo sample` drew, leave --fake out, or add --force")
        console.warn(f"{message}; used nevertheless (--force)")
    if manifest_of(Path(source)).get("guidance"):
        console.warn(
            f"{source} was drawn with guidance; the discriminator will know the guided model, not the plain one"
        )
    check_sizes(len(real.items), len(fake.items), source, settings)
    check_balance(real, fake, label_use)
    return fake


def labels_seen(loaded: registry.Loaded, settings: DiscriminatorRecipe) -> int:
    """How many classes the discriminator tells apart; 0: it sees no label.

    That of a text-to-image model sees no captions: nearly every image has one of its own, by which it would be known by
    heart. Raises UsageError where the recipe asks for them.
    """
    if not registry.reads_text(loaded.checkpoint.header["config"]["name"]):
        return loaded.model.num_classes if settings.conditional else 0
    if settings.conditional and "conditional" in settings.model_fields_set:
        raise UsageError(
            f"discriminator.conditional = true: the labels of {loaded.checkpoint.path} are prompts, which no "
            "discriminator reads; set it to false"
        )
    console.info("the discriminator sees no captions; the model is still drawn by them")
    return 0


def check_classes(real: ItemSet, num_fake: int, label_use: int) -> None:
    """Raises DataError if `num_fake` samples of all classes and the real set cannot have the same classes."""
    labels = np.arange(num_fake) % max(label_use, 1)
    check_balance(real, ItemSet(labels, labels, f"a generated set of {num_fake} (num_fake)", label_use), label_use)


def draw(
    recipe: Recipe, spec: SamplingRecipe, run_dir: rundir.RunDir, label_use: int, real: ItemSet, device: torch.device
) -> ItemSet:
    """Draws the model's samples into the run, or what an interrupted run left to draw."""
    path = run_dir.path / "samples"
    seeds = range(FIRST_FAKE_SEED, FIRST_FAKE_SEED + recipe.discriminator.num_fake)
    loaded = captions.told(registry.load_model(recipe.model.ckpt, device), real)
    sample.run(
        loaded, seeds, path, form="shards", sampling=spec.model_dump(), device=device, title="generated set",
        keep=sample.kept_of_fakes(loaded.model, None, spec),
    )  # fmt: skip
    fake = open_images(str(path))
    check_balance(real, fake, label_use)
    return fake


def check_sizes(num_real: int, num_fake: int, name: str, settings: DiscriminatorRecipe) -> None:
    """Raises DataError if either side, or the smaller beside the larger, is too small to learn from."""
    smaller, held_out = min(num_real, num_fake), settings.held_out
    if smaller < 2 * held_out:
        raise DataError(
            f"{name}: {num_real} real and {num_fake} generated items leave too few to train on beside the {held_out} "
            f"of each that are held out; give more, or lower discriminator.held_out to at most {smaller // 2}"
        )
    check_enough(name, smaller - held_out, settings.batch, "discriminator.batch")
    if max(num_real, num_fake) > MAX_IMBALANCE * smaller:
        raise DataError(
            f"{name}: {num_real} real against {num_fake} generated items; the discriminator would know the smaller set "
            "by heart; draw more (--num-fake), or use fewer real ones (data.num)"
        )
