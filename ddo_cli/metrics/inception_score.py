"""Inception Score: exp of the mean over images of KL(p(y|x) || p(y)), with p(y) the mean of p(y|x) (arXiv 1606.03498).

mean_x KL(p(y|x) || p(y)) = mean_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y), so that two running sums per split
suffice. Logits are without the classifier's bias, in both protocols.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddo_cli import dist
from ddo_cli.errors import DataError, UsageError
from ddo_cli.metrics.accumulators import Kept, Seen, Spread, State, checked, named, random_parts
from ddo_cli.precision import Device

Protocol = Literal["torch-fidelity", "adm"]
SPLITS = 10  # torch-fidelity's
ADM_SPLIT = 5000  # images of a split in ADM's evaluation suite


def splits_of(num: int, protocol: Protocol) -> np.ndarray:
    """The split of each row, int (num,).

    torch-fidelity: ten splits of a permutation with seed 2020. adm: 5000 consecutive images each, where a smaller last
    split has equal weight; depends on the order of the images, which should be random.
    Raises DataError if a split would be empty.
    """
    if protocol == "adm":
        if num < 1:
            raise DataError("the Inception Score of no images is not defined; give images")
        return np.arange(num) // ADM_SPLIT
    if protocol != "torch-fidelity":
        raise UsageError(f"Inception Score protocol '{protocol}' is unknown; choose torch-fidelity or adm")
    if num < SPLITS:
        raise DataError(f"{num} images are too few for an Inception Score of {SPLITS} splits; give at least {SPLITS}")
    return random_parts(num, SPLITS)


class InceptionScore:
    """Accumulates logits (B, classes) of `num` images. Memory: splits x classes float64, and 8 bytes per image."""

    needs = "logits"
    kept: Kept = "order"  # the splits depend on it

    def __init__(
        self, num: int, num_classes: int, protocol: Protocol = "torch-fidelity", device: Device = "cpu"
    ) -> None:
        self.seen, self.protocol = Seen(num, device), protocol
        self.split = torch.from_numpy(splits_of(num, protocol).astype(np.int32)).to(device)  # (num,)
        self.sizes = torch.bincount(self.split)  # (splits,)
        self.sum_p = torch.zeros(len(self.sizes), num_classes, dtype=torch.float64, device=device)
        self.sum_p_log_p = torch.zeros(len(self.sizes), dtype=torch.float64, device=device)

    def update(self, rows: np.ndarray, features: dict[str, Tensor]) -> None:
        logits = checked(rows, features[self.needs], self.needs).detach().to(self.sum_p.device, torch.float64)
        log_p = logits.log_softmax(1)  # (B, classes)
        p = log_p.exp()
        split = self.split[self.seen.add(rows)]  # (B,)
        member = (split == torch.arange(len(self.sizes), device=split.device)[:, None]).to(p)  # (splits, B)
        self.sum_p += member @ p
        self.sum_p_log_p += member @ (p * log_p).sum(1)

    def all_reduce(self) -> None:
        for total in (self.sum_p, self.sum_p_log_p, self.seen.counts):
            dist.all_reduce_sum(total)

    @property
    def kind(self) -> str:
        return f"score of {self.needs} by {self.protocol}"

    def state(self) -> State:
        self.seen.check()
        return {"sum_p": self.sum_p.cpu().numpy(), "sum_p_log_p": self.sum_p_log_p.cpu().numpy()}

    def restore(self, state: State) -> None:
        totals = {"sum_p": self.sum_p, "sum_p_log_p": self.sum_p_log_p}
        arrays = {key: named(state, key, tuple(total.shape), np.float64) for key, total in totals.items()}
        for key, total in totals.items():
            total.copy_(torch.from_numpy(arrays[key]))
        self.seen.counts += 1

    def result(self) -> Spread:
        """Mean and standard deviation of the splits' scores. After `all_reduce`."""
        self.seen.check()
        p = self.sum_p / self.sizes[:, None]  # (splits, classes)
        mean_kl = self.sum_p_log_p / self.sizes - torch.special.xlogy(p, p).sum(1)  # (splits,)
        scores = mean_kl.exp().cpu().numpy()
        return Spread(float(scores.mean()), float(scores.std()))
