"""Facts about an image set, gathered in the same pass as its score: duplicates, range, class counts, content digest."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ddo_cli import dist
from ddo_cli.likelihood import NO_LABEL

LIMBS = 8  # of 32 bits: sums of fewer than 2^31 digests fit into int64


class Inspection:
    """Duplicates, value range, class counts and digest of the images passed to `update`, each once and on one process.

    labels: int64 (N,), -1 = none. Memory: about 16 bytes per image, for its digest (0.8 MB for 50,000).
    """

    def __init__(self, labels: np.ndarray, num_classes: int = 0):
        self.labels, self.num_classes = labels, num_classes
        self.digests = np.zeros((len(labels), 2), dtype=np.int64)  # first half of each image's BLAKE2b-256
        self.seen = np.zeros(len(labels), dtype=np.uint8)
        self.total = np.zeros(LIMBS, dtype=np.int64)  # sum of the digests' 32-bit limbs, carries left out
        self.low, self.high = 255, 0
        self.shape: tuple[int, ...] = ()

    def update(self, rows: np.ndarray, images: Tensor) -> None:
        """rows: positions in the set (b,); images: uint8 (b, C, H, W) on the CPU."""
        pixels = np.ascontiguousarray(images.numpy())
        if not len(pixels):
            return
        self.shape = tuple(pixels.shape[1:])
        # BLAKE2b releases Python's lock; images are equal where their digests are.
        raw = b"".join(hashlib.blake2b(image.data, digest_size=4 * LIMBS).digest() for image in pixels)
        self.digests[rows] = np.frombuffer(raw, "<i8").reshape(len(pixels), -1)[:, :2]
        self.total += np.frombuffer(raw, "<u4").reshape(-1, LIMBS).sum(0, dtype=np.int64)
        self.seen[rows] = 1
        self.low, self.high = min(self.low, int(pixels.min())), max(self.high, int(pixels.max()))

    def all_reduce(self, device: torch.device | None = None) -> None:
        """Merges the processes' shares; afterwards equal on all. Collective. device: that of the process group."""
        if dist.world_size() == 1:
            return
        device = device or torch.device("cpu")
        for figures in (self.digests, self.seen, self.total):  # zero where another process has seen the row
            figures[...] = dist.all_reduce_sum(torch.from_numpy(figures.copy()).to(device)).cpu().numpy()
        others = dist.gathered((self.low, self.high, self.shape))
        self.low, self.high = min(low for low, _, _ in others), max(high for _, high, _ in others)
        self.shape = next((shape for _, _, shape in others if shape), ())

    @property
    def num(self) -> int:
        """Images seen."""
        return int(self.seen.sum())

    @property
    def num_duplicates(self) -> int:
        """Images that are exact copies of an earlier one."""
        digests = self.digests[self.seen > 0]
        return len(digests) - len(np.unique(digests, axis=0))

    @property
    def counts(self) -> np.ndarray:
        """Images seen of each class, int64 (num_classes,)."""
        labels = self.labels[self.seen > 0]
        return np.bincount(labels[labels >= 0], minlength=self.num_classes)

    def digest(self) -> str:
        """Hex digest of the images seen, in any order: the same for a folder, a zip and an .npz of the same images.

        Hash of number, shape and the sum modulo 2^256 of the images' digests (an exclusive or would cancel copies).
        It detects accidental differences; an adversary who chooses very many images could forge it.
        """
        total = sum(int(limb) << (32 * place) for place, limb in enumerate(self.total)) % (1 << 256)
        return hashlib.sha256(repr((self.num, self.shape, total)).encode()).hexdigest()

    def order(self) -> str:
        """Hex digest of the images in their order."""
        return hashlib.sha256(repr(self.digest()).encode() + self.digests.astype("<i8").tobytes()).hexdigest()

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for `restore`. After `all_reduce`, when every row was seen."""
        limits = np.array([self.low, self.high], dtype=np.int64)
        return {"digests": self.digests, "total": self.total, "limits": limits, "shape": np.array(self.shape)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restores the state of a pass over the same images. Raises ValueError for any other."""
        content = {"digests": self.digests.shape, "total": self.total.shape, "limits": (2,), "shape": (3,)}
        for key, shape in content.items():
            if key not in state or state[key].shape != shape or state[key].dtype != np.int64:
                raise ValueError(f"its array '{key}' is not int64 {shape}")
        self.digests, self.total = state["digests"].copy(), state["total"].copy()
        self.low, self.high = (int(limit) for limit in state["limits"])
        self.shape = tuple(int(size) for size in state["shape"])
        self.seen[:] = 1

    def warnings(self, name: str) -> list[str]:
        """Warnings about the set, one sentence each."""
        num, copies = self.num, self.num_duplicates
        if num > 1 and copies == num - 1:
            return [
                f"{name}: all {num} images are the same; its scores mean nothing: was it sampled from a broken model?"
            ]
        warnings = []
        if num and self.high <= 1:
            warnings.append(
                f"{name}: no value is above {self.high}; images in [0, 1] seem to have been stored as uint8 without "
                "times 255: write them again in 0..255"
            )
        if copies:
            warnings.append(
                f"{name}: {copies} of {num} images are exact copies of others; was it written with repeated seeds, or "
                "one part twice? Published scores count distinct samples"
            )
        return warnings


def balance(labels: np.ndarray, num_classes: int, max_named: int = 5) -> str | None:
    """Why the classes of a set are not equally large; None if they are.

    labels: int64 (N,), -1 = none; num_classes: of the model or the data; max_named: classes that the message names.
    """
    if num_classes < 1:
        return None
    missing = int((labels <= NO_LABEL).sum())
    if missing:
        return f"{missing} of {len(labels)} images have no label, so that the balance of classes cannot be checked"
    counts = np.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes:
        return f"labels go up to {len(counts) - 1} where there are {num_classes} classes (0..{num_classes - 1})"
    if counts.max() - counts.min() <= 1 and counts.min():  # as equal as this number of images can be
        return None
    # The expected count: an equal share if N is divisible, else the most common count.
    is_divisible = len(labels) % num_classes == 0
    expected = len(labels) // num_classes if is_divisible else int(np.bincount(counts).argmax())
    off = np.flatnonzero(counts != expected)
    named = ", ".join(f"{label} ({counts[label]})" for label in off[:max_named].tolist())
    more = f" and {len(off) - max_named} more" if len(off) > max_named else ""
    return (
        f"classes are not balanced: {len(off)} of {num_classes} do not have {expected} images: {named}{more}; "
        "benchmarks of class-conditional models draw every class equally often"
    )
