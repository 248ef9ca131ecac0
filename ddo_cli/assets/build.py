"""`python -m ddo_cli.assets.build` (or `make assets`): makes every file of this folder from its origin.

Needs scikit-learn (the `dev` extra) for the digits. Takes about six minutes on two CPU cores.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from ddo_cli import checkpoint, console, dist
from ddo_cli.checkpoint import ASSETS
from ddo_cli.diffusion.mixture import toy2d_wrong
from ddo_cli.engines.pretrain import extractor as train_extractor
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.files import replacing
from ddo_cli.models import registry
from ddo_cli.recipe.load import load

REFERENCES = {
    "digits16": "quickstart",
    "digits32": "quickstart-few-steps",
    "digits8": "digits8-ar",
    "toy2d": "toy2d",
}  # asset -> recipe that trains it
EXTRACTOR = "extractor-digits32.safetensors"


def main() -> None:
    """Builds the data, the extractor that the scores need, and then the references."""
    device = dist.init("cpu")
    _digits(ASSETS / "digits.npz")
    _wrong_mixture(ASSETS / "toy2d-wrong.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data, extractor = "embedded:digits32,embedded:digits8", work / EXTRACTOR
        train_extractor.run(data, extractor, held_out=None, images=100_000, seed=0, device=device)
        _install(extractor, ASSETS / EXTRACTOR)
        for asset, recipe in REFERENCES.items():
            figures = pretrain.run(load(recipe), work / asset, device=device)
            console.info(f"{asset}: {figures['metric']} {figures['score']:.4g}")
            _install(Path(figures["final"]), ASSETS / f"{asset}.safetensors")


def _install(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


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


def _digits(path: Path) -> None:
    """Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, UCI, CC BY 4.0), the 1797 of its test part."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)  # (1797, 8, 8) in 0..16; (1797,)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, levels=levels, labels=labels)


if __name__ == "__main__":
    main()
