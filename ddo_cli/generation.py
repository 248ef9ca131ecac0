"""Between items and states, whole sets at a time: seeds -> generated items, and items -> states."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddo_cli import compilation
from ddo_cli.errors import UsageError
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel
from ddo_cli.precision import Device, Precision, inference_precision, resolved
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng, seeded
from ddo_cli.trainable import map_tensors
from ddo_cli.transfer import to_device

ENCODED_AT_ONCE = 256  # items; an autoencoder's pass over a whole set would not fit into memory


class Batch(NamedTuple):
    """One canonical batch of generated items: number in the set, items as on disk, labels, seeds, network passes."""

    number: int
    items: Tensor  # (b, *shape), on the CPU; (b, *state_shape) for latents
    label: Tensor  # (b,)
    seeds: Tensor  # (b,)
    nfe: int
    disc_nfe: int = 0
    cost: Tensor | None = None  # (b, columns of `diffusion.rejection.Cost`), where it differs between items


@torch.no_grad()
def generate(
    model: LikelihoodModel,
    seeds: Sequence[int],
    spec: SamplingRecipe,
    *,
    batch: int,
    classes: Sequence[int] | None = None,
    only: Sequence[int] | None = None,
    as_given: Sequence[int] | None = None,
    as_latents: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Items of all seeds, one batch at a time. Raises UsageError if the model cannot be sampled so.

    The set is always cut in the same way: seeds in increasing order, `batch` at a time, the last of several batches
    filled up by repeating its last seed. So kernels see the same sizes whatever the order of the seeds, the process
    count, or where an earlier attempt was interrupted.

    only: numbers of the batches to make (for several processes, or to continue); all by default.
    as_given: the set's seeds in the order that labels by position count; None: that of `seeds`.
    as_latents: leaves them in model space.

    Samples are drawn in spec.precision and decoded in `decoding_precision`. On a CPU images are decoded in float32.
    """
    spec = on_device(model, spec, device)
    model.check_sampling(spec)
    if compilation.is_on(spec.compile, device):
        compilation.compile_network(model)
    ordered = sorted(seeds)
    has_choice = bool(model.num_classes and not classes)
    places = {seed: place for place, seed in enumerate(seeds if as_given is None else as_given)}
    size = min(batch, len(ordered))
    for number in range(num_batches(len(ordered), batch)) if only is None else only:
        kept = ordered[number * batch : (number + 1) * batch]
        padded = kept + [kept[-1]] * (size - len(kept))
        if spec.labels == "random" and has_choice:
            label = random_labels(model, padded, spec.rng)
        else:
            by_position = spec.labels == "position" and has_choice
            label = labels_of([places[seed] for seed in padded] if by_position else padded, model.num_classes, classes)
        with inference_precision(spec.precision, device):
            sampled = model.sample(to_device(label, device), seeded(padded, spec.rng), spec)
        with inference_precision(decoding_precision(spec, device), device):
            items = (sampled.x if as_latents else model.codec.decode(sampled.x)).cpu()[: len(kept)]
        cost = None if sampled.cost is None else torch.stack(sampled.cost, dim=1)[: len(kept)]
        yield Batch(number, items, label[: len(kept)], torch.tensor(kept), sampled.nfe, sampled.disc_nfe, cost)


def on_device(model: LikelihoodModel, spec: SamplingRecipe, device: Device) -> SamplingRecipe:
    """The settings with what the device decides: states of diffusion are float32 on Apple's GPUs, which lack float64.

    Raises UsageError for settings that need float64 there.
    """
    if torch.device(device).type != "mps" or model.codec.is_discrete:
        return spec
    if spec.dtype == "float64":
        raise UsageError("sampling.dtype = float64: Apple's GPUs have no float64; leave it out, or use --device cpu")
    return spec.model_copy(update={"dtype": "float32"})


def num_batches(num_seeds: int, batch: int) -> int:
    """Batches that `generate` cuts a set into."""
    return -(-num_seeds // batch)


def decoding_precision(spec: SamplingRecipe, device: Device) -> Precision:
    """Precision in which `generate` decodes: TF32 unless samples are drawn in float32.

    An image has 8 bits, and published figures were decoded so: EDM2's autoencoder with the convolutions in TF32 that
    torch has by default, VAR's in half precision.
    """
    return "float32" if resolved(spec.precision, device) == "float32" else "tf32"


# --- Labels


def labels_of(seeds: Sequence[int], num_classes: int, classes: Sequence[int] | None = None) -> Tensor:
    """Class-balanced labels, (B,): seed modulo the number of classes, so a label depends on its own seed only."""
    if not num_classes:
        return torch.full((len(seeds),), NO_LABEL)
    chosen = torch.tensor(list(classes) if classes else range(num_classes))
    return chosen[torch.tensor(list(seeds)) % len(chosen)]


def random_labels(model: LikelihoodModel, seeds: Sequence[int], kind: str | None = None) -> Tensor:
    """Labels (B,) drawn as in EDM's scripts: from each item's own generator, after the noise that it starts from."""
    rng = seeded(seeds, kind)
    if not model.codec.is_discrete:
        rng.randn(model.codec.state_shape)
    return rng.randint(model.num_classes)


def check_labels(spec: SamplingRecipe, num_classes: int, num_seeds: int, classes: Sequence[int] | None = None) -> None:
    """Raises UsageError if a set of so many items cannot have the labels that `spec` asks for."""
    if spec.labels in ("random", "position") and (classes or not num_classes):
        why = "--classes chooses them" if classes else "this model has no classes"
        raise UsageError(f"sampling.labels = {spec.labels}: {why}; leave it out")
    if spec.labels == "position" and num_seeds % num_classes:
        raise UsageError(
            f"sampling.labels = position gives each of {num_classes} classes the same number of images, and "
            f"{num_seeds} seeds are no multiple of it; draw {-(-num_seeds // num_classes) * num_classes}, or use "
            "labels = balanced"
        )


def check_channels(shape: Sequence[int]) -> None:
    """Raises UsageError for images (C, H, W) that are neither grey nor RGB."""
    if len(shape) == 3 and shape[0] not in (1, 3):
        raise UsageError(
            f"this model draws items of {shape[0]} channels, neither grey nor RGB: latents, it seems, of an "
            "autoencoder that its file lacks; give a model with its autoencoder, or register one (--model-file) whose "
            "codec decodes"
        )


# --- Items to states


@torch.no_grad()
def encoded(
    model: LikelihoodModel, items: np.ndarray, rows: np.ndarray, *key: int | str, device: torch.device
) -> Tensor:
    """x0 of these rows of a set, (N, ...), on the CPU.

    key: names the random numbers of an encoder that draws, which are the same on every process and in every run.
    """
    parts = []
    for start in range(0, len(rows), ENCODED_AT_ONCE):
        part = items[rows[start : start + ENCODED_AT_ONCE]]
        rng = RowRng.for_rows("encode", *key, rows=range(start, start + len(part)))
        inputs = model.codec.prepare(torch.from_numpy(part), rng)
        inputs = map_tensors(lambda tensor: to_device(tensor, device), inputs)
        parts.append(model.codec.encode(*inputs).cpu())
    return torch.cat(parts)
