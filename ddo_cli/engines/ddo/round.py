"""One round of self-play: where it lies, the reference it starts from, its fake set, and what its trials share."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddo_cli import checkpoint, rundir
from ddo_cli.data.items import ItemSet
from ddo_cli.data.pairs import Pairs, Shuffled
from ddo_cli.data.samples import open_samples
from ddo_cli.engines.ddo import reference
from ddo_cli.engines.ddo.sweep import Plan
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.files import replacing
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.recipe.schema import Recipe

FIRST_FAKE_SEED = 1_000_000  # beyond the seeds of scores


class Round(NamedTuple):
    """Round k. Its reference is the best model of round k - 1, at first recipe.model.ckpt."""

    number: int
    whole: Recipe
    plan: Plan
    run_dir: rundir.RunDir
    scoring: Scoring
    device: torch.device

    @property
    def recipe(self) -> Recipe:
        """With the values that hold in this round."""
        return self.whole.of_round(self.number)

    @property
    def path(self) -> Path:
        """The round's directory."""
        return path_of(self.run_dir, self.number)

    @property
    def ref_file(self) -> str | Path:
        """Weights of the reference."""
        return weights_after(self.whole, self.run_dir, self.number - 1)

    @property
    def title(self) -> str:
        """For people."""
        return f"round {self.number}/{self.whole.finetune.rounds}"

    def draw_fakes(self) -> None:
        """Draws the fake set from the reference to disk, or what an interrupted run left to draw."""
        settings, spec = self.recipe.finetune, self.scoring.spec
        before = sum(self.whole.finetune.of_round(number).num_fake for number in range(1, self.number))
        first = FIRST_FAKE_SEED + before  # rounds do not overlap
        loaded = registry.load_model(self.ref_file, self.device)
        sample.run(
            loaded, range(first, first + settings.num_fake), self.path / "samples", form="shards",
            sampling=spec.model_dump(), keep=sample.kept_of_fakes(loaded.model, settings.fake_as, spec),
            device=self.device, title=f"{self.title} fake set",
        )  # fmt: skip

    def networks(self, real: ItemSet, precision_error: float | None) -> "Networks":
        """What every trial of the round trains against."""
        recipe, file = self.recipe, self.ref_file
        fake = open_samples(self.path / "samples")
        pairs = Pairs(
            Shuffled(real.items, real.labels, "real", recipe.seed, self.number, hflip=recipe.data.hflip),
            Shuffled(fake.items, fake.labels, "fake", recipe.seed, self.number),
        )
        ref = reference.load(file, recipe.finetune, self.device)
        link = {
            "command": "finetune-ddo",
            "round": self.number,
            "reference_sha256": ref.checkpoint.sha256,
            "recipe": self.whole.model_dump(mode="json"),
        }
        header = {
            "kind": "model",
            "config": ref.checkpoint.header["config"],
            "sampling": self.scoring.spec.model_dump(mode="json", exclude_none=True, exclude={"compile"}),
            "provenance": [*ref.checkpoint.header.get("provenance", []), link],
        }
        scratch = registry.load_model(file, self.device, recipe.finetune.draw).model
        return Networks(ref.model, ref.checkpoint.sha256, scratch, pairs, header, precision_error)


class Networks(NamedTuple):
    """Shared by the trials of a round. Data order and draws, too: they are compared in pairs."""

    ref: LikelihoodModel  # frozen
    ref_sha256: str
    scratch: LikelihoodModel  # holds averaged weights while they are scored
    pairs: Pairs
    header: dict[str, Any]  # of every checkpoint: the reference's configuration and a longer chain of provenance
    precision_error: float | None  # of r, in nats, on the first batch; None in float32


def path_of(run_dir: rundir.RunDir, number: int) -> Path:
    """The directory of round `number`."""
    return run_dir.path / f"round-{number:02d}"


def weights_after(recipe: Recipe, run_dir: rundir.RunDir, rounds: int) -> str | Path:
    """The reference that so many rounds have led to."""
    return path_of(run_dir, rounds) / "best.safetensors" if rounds else recipe.model.ckpt


def copy_weights(source: str | Path, target: Path) -> None:
    """Copies a weight file, or an embedded one, to its final name at once."""
    with replacing(target) as temporary:
        shutil.copyfile(checkpoint.resolve(source), temporary)
