"""Features of the frozen trunk under a discriminator, computed once and kept on disk for training.

The trunk is most of a step's cost: at 256x256 DG's authors advise to train the head on stored features. A feature map
depends on the image, its noise level and its noise, so that a finite store fixes those. It holds the maps of the
training's own first rows: up to there nothing changes, and what follows sees them again in other orders.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli import console
from ddo_cli.data import cache
from ddo_cli.data.pairs import Examples, Pairs
from ddo_cli.diffusion import vp_sde
from ddo_cli.errors import RunError, UsageError, reason
from ddo_cli.files import cache_directory
from ddo_cli.models.discriminators.on_trunk import TrunkDiscriminator
from ddo_cli.precision import allow_tf32, resolved, training_precision
from ddo_cli.recipe.schema import DiscriminatorRecipe
from ddo_cli.rng import StepRng, permutation
from ddo_cli.trainable import Trainable, map_tensors
from ddo_cli.transfer import to_device

# Settings that determine which rows come and what noise they have.
_DRAWN_BY = ("cached_images", "batch", "held_out", "time", "t_min", "weighting", "precision")


class FeatureBatch(NamedTuple):
    """n real and n generated rows; tensors have the real rows first."""

    features: Tensor  # (2n, C, h, w) float32
    label: Tensor  # (2n,)
    t: Tensor  # (2n,), float64
    weight: Tensor | None  # (2n,), float32, of each row's loss; None: 1


def size_of(network: Trainable, settings: DiscriminatorRecipe) -> int:
    """Bytes of the features that the settings ask for; 0: none. Raises UsageError where there can be none."""
    num = settings.cached_images
    if not num:
        return 0
    if not isinstance(network, TrunkDiscriminator):
        raise UsageError(
            f"discriminator.cached_images = {num} keeps features of a frozen trunk, which {settings.name} has not; "
            "choose adm-discriminator or trunk, or set 0"
        )
    if num % settings.batch or num > settings.images:
        raise UsageError(
            f"discriminator.cached_images = {num} must be a multiple of discriminator.batch = {settings.batch}, and at "
            f"most discriminator.images = {settings.images}"
        )
    if cache_directory() is None:
        raise UsageError(
            f"discriminator.cached_images = {num} needs the cache, which DDO_CACHE turns off; set DDO_CACHE to a "
            "directory, or cached_images to 0"
        )
    return 2 * num * 4 * int(np.prod(network.feature_shape))


class CachedRows:
    """A stream of training rows that are features, beside labels, times and weights; see the module's docstring."""

    def __init__(self, features: np.ndarray, labels: Tensor, t: Tensor, weight: Tensor | None, seed: int):
        """features: (N, 2 C, h, w), of real and generated rows. labels, t, weight: (N, 2)."""
        self.features, self.labels, self.t, self.weight, self.seed = features, labels, t, weight, seed
        self._epoch, self._order = 0, np.arange(len(features))

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Positions start..stop - 1: the first N as the training would draw them, then the same in random orders."""
        num = len(self.features)
        index = np.array([self._row(*divmod(position, num)) for position in range(start, stop)])
        weight = None if self.weight is None else self.weight[index]
        return torch.from_numpy(self.features[index]), self.labels[index], self.t[index], weight

    def _row(self, epoch: int, position: int) -> int:
        if epoch != self._epoch:
            num = len(self.features)
            order = permutation(num, "cached", self.seed, epoch).numpy() if epoch else np.arange(num)
            self._epoch, self._order = epoch, order
        return int(self._order[position])

    @staticmethod
    def batch(features: Tensor, label: Tensor, t: Tensor, weight: Tensor | None, rng: StepRng) -> FeatureBatch:
        """For `Objective`. Nothing is left to draw."""
        sides = features.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
        flat = None if weight is None else weight.T.flatten()
        return FeatureBatch(sides, label.T.flatten(), t.T.flatten(), flat)


def cached(
    network: TrunkDiscriminator,
    make: Callable[[Examples, Examples, StepRng], Any],
    states: Callable[[Any], Tensor],
    pairs: Pairs,
    law: vp_sde.TimeLaw,
    settings: DiscriminatorRecipe,
    seed: int,
    content: dict[str, Any],
    name: str,
    device: torch.device,
) -> CachedRows:
    """The training's first settings.cached_images rows, from the cache or computed into it.

    make: a batch of the training; states: its noisy states. content: all beside settings and trunk that determines the
    numbers, as JSON. name: of the data, for people. Raises RunError if they cannot be kept.
    """
    num, batch = settings.cached_images, settings.batch
    channels, *size = network.feature_shape
    steps = [StepRng((seed,), step, range(batch)) for step in range(num // batch)]  # as the loop's

    @torch.no_grad()
    def fill(items: np.ndarray) -> None:
        allow_tf32(resolved(settings.precision, device) == "tf32")  # as in a training step
        try:
            with console.progress(f"features of {name}", num, "images") as bar:
                for start, rng in zip(range(0, num, batch), steps, strict=True):
                    made = make(*pairs.rows(start, start + batch), rng)
                    made = map_tensors(lambda tensor: to_device(tensor, device), made)
                    with training_precision(settings.precision, device):
                        features = network.trunk.features(states(made), made.t).to(torch.float32)
                    pair = features.unflatten(0, (2, batch)).transpose(0, 1).flatten(1, 2)  # (batch, 2 C, h, w)
                    items[start : start + batch] = pair.cpu().numpy()
                    bar.advance(batch, "")
        finally:
            allow_tf32(False)

    told = [content, settings.model_dump(mode="json", include=set(_DRAWN_BY)), network.trunk_sha256, seed]
    entry = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    key = "discriminator.cached_images"
    try:
        shape = (2 * channels, *size)
        features = cache.array(name, entry, num, lambda: shape, fill, "features of the trunk", key, np.float32)
    except OSError as error:
        raise RunError(
            f"{key}: {size_of(network, settings) / 1e9:.1f} GB of features cannot be kept in {cache_directory()} "
            f"({reason(error)}); make room, set DDO_CACHE to another directory, or lower it"
        ) from None
    assert features is not None, "size_of has checked that there is a cache"
    labels = [side.labels[side.row_numbers(0, num)] for side in pairs]
    times = [law.times(rng("disc").rand((2,), dtype=torch.float64)) for rng in steps]
    weighted = [drawn.weight for drawn in times if drawn.weight is not None]
    weights = torch.cat(weighted).to(torch.float32) if weighted else None
    t = torch.cat([drawn.t for drawn in times])
    return CachedRows(features, torch.from_numpy(np.stack(labels, axis=1)), t, weights, seed)
