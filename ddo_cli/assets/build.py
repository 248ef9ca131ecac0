"""`python -m ddo_cli.assets.build` (or `make assets`): makes every file of this folder from its origin.

Needs scikit-learn (the `dev` extra) for the digits. Takes about five minutes on two quiet CPU cores. Training
amplifies rounding: the files come back bit for bit on a like CPU with the same torch, which README.md names.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddo_cli import checkpoint, console, dist
from ddo_cli.checkpoint import ASSETS
from ddo_cli.diffusion.mixture import toy2d_wrong
from ddo_cli.engines.pretrain import extractor as train_extractor
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.files import replacing
from ddo_cli.models import registry
from ddo_cli.recipe.load import load

CPU = torch.device("cpu")
THREADS = 2  # whatever the machine has: their number decides where sums are cut, and so about rounding


def _digits(path: Path) -> None:
    """Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, UCI, CC BY 4.0), the 1797 of its test part."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)  # (1797, 8, 8) in 0..16; (1797,)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, levels=levels, labels=labels)


def _wrong_mixture(path: Path) -> None:
    """The model of recipes/toy2d-dg.yaml: an exact score of the wrong density."""
    recipe = load("toy2d-dg")
    mixture = toy2d_wrong()
    config = registry.config_of("mixture", (2,), 0, {"components": len(mixture.weights)}, recipe.model.draw)
    sampling = recipe.sampling.model_dump(mode="json", exclude_none=True)
    header = {"kind": "model", "config": config, "sampling": sampling, "provenance": [{"command": "toy2d_wrong"}]}
    tensors = {"net.means": mixture.means, "net.covs": mixture.covs, "net.weights": mixture.weights}
    registry.build(config).load_state_dict(tensors)  # raises unless they fit
    checkpoint.save(path, tensors, header)


def _extractor(path: Path) -> None:
    """The classifier whose features the scores compare."""
    data = "embedded:digits32,embedded:digits8"
    train_extractor.run(data, path, held_out=None, images=100_000, seed=0, device=CPU)


def _reference(path: Path, name: str) -> None:
    """What `ddo pretrain` makes of the recipe; the header tells the recipe as its file states it.

    With the defaults of all other keys, a key that is added to recipes would change the bytes of equal weights.
    """
    recipe = load(name)
    figures = pretrain.run(recipe, path.with_suffix(""), device=CPU)
    console.info(f"{path.stem}: {figures['metric']} {figures['score']:.4g}")
    made = checkpoint.load(figures["final"])
    (link,) = made.header["provenance"]
    stated = recipe.model_dump(mode="json", include={"data", "model", "pretrain"}, exclude_unset=True)
    checkpoint.save(path, made.tensors, {**made.header, "provenance": [{**link, "recipe": recipe.told() | stated}]})


# In the order of building: the extractor sees the digits, and the references are scored by it.
MAKERS: dict[str, Callable[[Path], None]] = {
    "digits.npz": _digits,
    "toy2d-wrong.safetensors": _wrong_mixture,
    "extractor-digits32.safetensors": _extractor,
    "digits16.safetensors": partial(_reference, name="quickstart"),
    "digits32.safetensors": partial(_reference, name="quickstart-few-steps"),
    "digits8.safetensors": partial(_reference, name="digits8-ar"),
    "toy2d.safetensors": partial(_reference, name="toy2d"),
}


def make(name: str, path: Path) -> None:
    """Makes the file of this name at `path`."""
    torch.set_num_threads(THREADS)
    MAKERS[name](path)


def difference(made: Path, own: Path) -> str:
    """What replaces the file `own`, in words: the same bytes, another header, or other weights, and how far away."""
    if own.is_file() and made.read_bytes() == own.read_bytes():
        return "same bytes"
    if not own.is_file() or made.suffix != ".safetensors":
        return "changed"
    (new, old) = (checkpoint.load(path).tensors for path in (made, own))
    if {name: tensor.shape for name, tensor in new.items()} != {name: tensor.shape for name, tensor in old.items()}:
        return "changed: tensors of other names or shapes"
    apart = max(float((new[name] - old[name]).norm() / old[name].norm().clamp_min(1e-30)) for name in old)
    return f"changed: weights {apart:.1e} apart" if apart else "changed: the header, same weights"


def main() -> None:
    """Makes each file aside, tells what it changes, and puts it in its place."""
    dist.init("cpu")
    with tempfile.TemporaryDirectory() as folder:
        for name in MAKERS:
            made, own = Path(folder) / name, ASSETS / name
            make(name, made)
            console.result({}, f"{name}: {difference(made, own)}")
            with replacing(own) as temporary:
                temporary.write_bytes(made.read_bytes())


if __name__ == "__main__":
    main()
