"""Tokenizers by name: autoencoders that `ddo pretrain` trains, and that models of tokens stand on.

They have no likelihood, so they are no models in the sense of `models.registry`.
"""

from typing import Any

from ddo_cli.errors import RecipeError
from ddo_cli.models.catalog import Catalog, option_problems

KIND = "tokenizer"  # of a weight file
BUILTIN = {"vqvae": "ddo_cli.models.var.vqvae"}
_catalog = Catalog("model.name", BUILTIN, "a new tokenizer is a line in models/var/tokenizers.py")
register = _catalog.register  # of builders (shape, options) -> Trainable


def problems(name: str, options: dict[str, Any]) -> list[str]:
    """What is wrong with a tokenizer's options, one line each."""
    return option_problems("model.options", name, _catalog.find(name).options, options)


def config_of(name: str, shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a weight file carries, with every default written out. Raises RecipeError."""
    if lines := problems(name, options):
        raise RecipeError("\n".join(lines))
    values = _catalog.find(name).options.model_validate(options).model_dump(mode="json")
    return {"name": name, "shape": list(shape), "options": values}


def build(config: dict[str, Any]) -> Any:
    """The tokenizer of a configuration. Raises RecipeError if it cannot be built."""
    entry, shape = _catalog.find(config["name"]), tuple(config["shape"])
    try:
        return entry.build(shape, entry.options.model_validate(config["options"]))
    except ValueError as error:
        raise RecipeError(f"model {config['name']} for items of shape {shape}: {error}") from None
