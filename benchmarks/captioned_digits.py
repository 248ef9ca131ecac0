"""Coloured digits with captions such as "a red three on blue", and whether images show what their captions say.

    python benchmarks/captioned_digits.py make                # captioned/train and captioned/held-out
    python benchmarks/captioned_digits.py accuracy SET ...    # of folders with captions, or sets of `ddo sample`

docs/evidence/captioned-digits.md has the commands that train on them, and their figures.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddo_cli import checkpoint
from ddo_cli.data.images import open_images
from ddo_cli.metrics.extractors.digit_net import DigitNet

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (235, 210, 50),
    "white": (235, 235, 235), "black": (25, 25, 25),
}  # fmt: skip
JITTER = 20  # of each channel of a colour
SIDE = 16  # pixels of an image; the digits are of 8x8 cells
TRAINED_ON = 1197  # of the 1797 digits; held-out images show the others
NUM = 8192  # images of each part


class Shown(NamedTuple):
    """What a caption says, or an image shows."""

    ink: str
    digit: str
    paper: str


def read(caption: str) -> Shown:
    _, ink, digit, _, paper = caption.split()
    return Shown(ink, digit, paper)


def render(seed: int, levels: np.ndarray, digits: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """Images, uint8 (16, 16, 3), and captions. levels: uint8 (M, 8, 8) in 0..16, used equally often."""
    rng = np.random.Generator(np.random.PCG64(seed))
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    for row in np.concatenate([rng.permutation(len(levels)) for _ in range(-(-NUM // len(levels)))])[:NUM]:
        ink, paper = rng.choice(len(names), 2, replace=False)
        grid = Image.fromarray(np.rint(levels[row] * (255 / 16)).astype(np.uint8))
        mask = np.asarray(grid.resize((4 * SIDE, 4 * SIDE), Image.Resampling.BICUBIC), dtype=np.float64) / 255
        mask = np.clip(2 * mask - 0.5, 0, 1).reshape(SIDE, 4, SIDE, 4).mean((1, 3))[..., None]
        colours = np.clip(palette[[ink, paper]] + rng.integers(-JITTER, JITTER + 1, (2, 3)), 0, 255)
        image = np.rint(colours[1] + (colours[0] - colours[1]) * mask).astype(np.uint8)
        yield image, f"a {names[ink]} {NUMBERS[digits[row]]} on {names[paper]}"


def write(folder: Path, images: Iterator[tuple[np.ndarray, str]]) -> None:
    """A .png and a .txt of each image."""
    folder.mkdir(parents=True)
    for number, (image, caption) in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(caption + "\n")


def make(root: Path) -> None:
    """Writes both parts."""
    with np.load(checkpoint.ASSETS / "digits.npz") as content:
        levels, digits = content["levels"], content["labels"]
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(levels))
    for seed, (part, rows) in enumerate((("train", order[:TRAINED_ON]), ("held-out", order[TRAINED_ON:]))):
        write(root / part, render(seed, levels[rows], digits[rows]))


# --- Caption accuracy


def classifier() -> DigitNet:
    """The embedded classifier of digits."""
    tensors, header, _, _ = checkpoint.load("embedded:extractor-digits32", kind="extractor")
    network = DigitNet(**header["config"].get("options", {}))
    network.load_state_dict(tensors)
    return network.eval()


@torch.no_grad()
def shown(images: Tensor, network: DigitNet) -> list[Shown]:
    """What images, uint8 (N, 3, 16, 16), show.

    Paper: the median colour of the columns at both edges. Ink: the median of the twentieth of the pixels that differ
    most from it. Either is the nearest of COLOURS. The digit: what the classifier reads in white on black, after a
    projection on the line between both colours.
    """
    x, palette = images.to(torch.float32), torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    paper = torch.cat([x[..., :1], x[..., -1:]], dim=3).flatten(2).median(dim=2).values  # (N, 3)
    offset = x - paper[:, :, None, None]
    far = offset.square().sum(1).flatten(1).topk(SIDE * SIDE // 20, dim=1).indices  # (N, pixels)
    ink = x.flatten(2).gather(2, far[:, None].expand(-1, 3, -1)).median(dim=2).values  # (N, 3)
    axis = (ink - paper)[:, :, None, None]
    mask = (offset * axis).sum(1, keepdim=True) / axis.square().sum(1, keepdim=True).clamp(min=1)  # (N, 1, H, W)
    grey = F.interpolate(mask.clamp(0, 1).expand(-1, 3, -1, -1), (32, 32), mode="bilinear", antialias=True)
    digits = network(2 * grey - 1).argmax(1)
    inks, papers = (torch.cdist(colour, palette).argmin(1) for colour in (ink, paper))
    names, found = list(COLOURS), torch.stack([inks, digits, papers], dim=1).tolist()
    return [Shown(names[a], NUMBERS[b], names[c]) for a, b, c in found]


def accuracy(source: str) -> dict[str, float]:
    """Shares of the images whose ink, digit, paper and whole caption are right."""
    found = open_images(source)
    captions = found.captions
    if not captions:  # drawn
        prompts = json.loads((Path(source) / "manifest.json").read_text())["prompts"]
        captions = tuple(prompts[label] for label in found.labels.tolist())
    seen = shown(torch.from_numpy(found.items.copy()), classifier())
    right = np.array(
        [[a == b for a, b in zip(one, read(text), strict=True)] for one, text in zip(seen, captions, strict=True)]
    )
    shares = dict(zip(Shown._fields, right.mean(0).tolist(), strict=True))
    return {"images": len(right), **shares, "caption": float(right.all(1).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("--out", type=Path, default=Path("captioned"))
    commands.add_parser("accuracy").add_argument("sets", nargs="+")
    given = parser.parse_args()
    if given.command == "make":
        make(given.out)
        return
    for source in given.sets:
        print(json.dumps({"set": source, **accuracy(source)}))


if __name__ == "__main__":
    main()
