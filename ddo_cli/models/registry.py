"""Models by name. A new backbone is one file here and one line in BUILTIN; users register theirs the same way.

A user's Python file (`model.file` of a recipe, `--model-file` of a command) registers its model when it is imported:

    from ddo_cli.models.registry import register
    from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
    from ddo_cli.codec import PixelCodec

    class Options(DiffusionOptions):
        width: int = 64

    @register("my-net", Options, DiffusionDrawOptions)
    def build(shape, num_classes, options, draw_options):
        net = MyNet(shape[0], options.width, num_classes)     # net(x, c_noise, label) -> F
        return DiffusionModel(net, PixelCodec(shape), num_classes, options, draw_options)
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddo_cli import checkpoint, hub
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.errors import CheckpointError, RecipeError, UsageError, reason
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.models import adapters
from ddo_cli.models.catalog import Catalog, option_problems
from ddo_cli.models.loading import of_file
from ddo_cli.models.var import tokenizers

BUILTIN = {
    "patch-unet": "ddo_cli.models.toy.patch_unet",
    "mlp": "ddo_cli.models.toy.mlp",
    "mixture": "ddo_cli.models.toy.mixture",
    "edm-unet": "ddo_cli.models.edm.unet",
    "adm-unet": "ddo_cli.models.adm.unet",
    "edm2-unet": "ddo_cli.models.edm2.unet",
    "diffusers-unet": "ddo_cli.models.diffusers.unet",
    "text-to-image": "ddo_cli.models.diffusers.text_model",
    "pixel-transformer": "ddo_cli.models.toy.pixel_transformer",
    "dit": "ddo_cli.models.dit.transformer",
    "var": "ddo_cli.models.var.transformer",
}

PIPELINES = "ddo_cli.models.diffusers.pipelines"  # reads folders; registers its networks here, as the above

_catalog = Catalog(
    "model.name",
    BUILTIN,
    "a model of your own is registered by the Python file given as model.file",
    also=tokenizers.BUILTIN,
)
find = _catalog.find
register = _catalog.register
"""register(name, options, draw_options) decorates (shape, num_classes, options, draw_options) -> LikelihoodModel."""


def load_file(path: str | None) -> None:
    """Imports a user's Python file so that it registers its models. This runs the file's code."""
    if path is None:
        return
    if not Path(path).is_file():
        raise UsageError(
            f"--model-file (model.file) {path} does not exist; give the Python file that registers the model"
        )
    name = f"ddo_user_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"model.file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"model.file {path} failed on import: {type(error).__name__}: {reason(error, 200)}") from error


def problems(name: str, options: dict[str, Any], draw: dict[str, Any], draw_key: str = "model.draw") -> list[str]:
    """What is wrong with the options of a model or tokenizer, one line each. draw_key: the recipe key of `draw`."""
    if name in tokenizers.BUILTIN:
        return tokenizers.problems(name, options)
    try:
        entry = find(name)
    except RecipeError as error:
        return [str(error)]
    return [
        *option_problems("model.options", name, entry.options, options),
        *option_problems(draw_key, name, entry.draw_options, draw),
    ]


def build(config: dict[str, Any], draw: dict[str, Any] | None = None) -> LikelihoodModel:
    """A model from the configuration stored in its weights; see `config_of`. `draw` replaces draw options.

    Raises RecipeError listing what is wrong with the options.
    """
    draw_values = {**config["draw"], **(draw or {})}
    if lines := problems(config["name"], config["options"], draw_values, "finetune.draw"):
        remedy = f"; the weights are those of a {config['name']}: give options of that model, or a recipe made for it"
        raise RecipeError("\n".join(lines) + remedy)
    entry = find(config["name"])
    try:
        return entry.build(
            tuple(config["shape"]),
            config["num_classes"],
            entry.options.model_validate(config["options"]),
            entry.draw_options.model_validate(draw_values),
        )
    except ValueError as error:
        raise RecipeError(f"model {config['name']} for items of shape {tuple(config['shape'])}: {error}") from None


class Loaded(NamedTuple):
    """A model on its device, in eval mode, and its file; the file's own copy of the tensors is freed."""

    model: LikelihoodModel
    checkpoint: Checkpoint


def file_of(path: str | Path) -> str:
    """The weight file of what is given as a model: of a text-to-image pipeline's folder, the one made of it.

    The folder may be a repository of the Hub, which is fetched.
    """
    if not hub.is_address(str(path)) and not (Path(path) / "model_index.json").is_file():
        return str(path)
    pipelines = importlib.import_module(PIPELINES)
    folder = pipelines.folder_of(str(path))
    return str(path if folder is None else pipelines.weight_file(folder))


def base_of(file: Checkpoint) -> str | None:
    """The base's file for an adapter's one; None for other files. Raises CheckpointError where it is nowhere.

    Of a pipeline's network it lies in the cache: where it is gone, it is made anew of the pipeline's folder.
    """
    try:
        return adapters.base_of(file)
    except CheckpointError as error:
        if "pipeline" not in file.header["config"]["options"]:
            raise
        pipelines = importlib.import_module(PIPELINES)
        if (again := pipelines.made_again(file.header)) is None:
            raise CheckpointError(f"{error}, or set {pipelines.texts.VARIABLE} to the folder of its pipeline") from None
        return str(again)


def reads_text(name: str) -> bool:
    """Whether labels of this model are the numbers of prompts."""
    return "prompts" in find(name).options.model_fields


def tell(model: LikelihoodModel, config: dict[str, Any], texts: Sequence[str], negative: str = "") -> dict[str, Any]:
    """Gives a model these prompts for its labels, and `negative` for the label -1; returns its new configuration.

    Raises UsageError for a model that reads no text.
    """
    tell = getattr(model, "tell", None)
    if tell is None:
        kind = type(model).__name__
        raise UsageError(f"prompts: a {kind} reads no text; leave them out, or give a text-to-image model")
    return {**config, **tell(texts, negative)}


def told(loaded: Loaded, texts: Sequence[str], negative: str = "") -> Loaded:
    """`tell` of a model of a file, whose header gets the new configuration."""
    header = loaded.checkpoint.header
    header = {**header, "config": tell(loaded.model, header["config"], texts, negative)}
    return loaded._replace(checkpoint=loaded.checkpoint._replace(header=header))


def load_model(path: str | Path, device: torch.device, draw: dict[str, Any] | None = None) -> Loaded:
    """A model from a weight file, "embedded:<name>" or a pipeline's folder. `draw` replaces its draw options.

    Of an adapter's file the base is loaded, too. Raises CheckpointError if the file does not hold a model of this
    program or its tensors do not fit.
    """
    file = checkpoint.load(file_of(path), kind="model")
    config = check_config(file.header.get("config"), str(path))
    if (base := base_of(file)) is not None:
        model = load_model(base, adapters.loading_device(file.header["adapter"], device), draw).model
        adapters.fill(model, file)
        loaded, options = Loaded(model.to(device), file._replace(tensors={})), config["options"]
        return told(loaded, options["prompts"], options["negative_prompt"]) if "prompts" in options else loaded
    try:
        if config["name"] in BUILTIN:
            model = of_file(lambda: build(config, draw), file, device)
        else:  # a user's code may compute with tensors as it builds, which the meta device does not allow
            model = build(config, draw)
            model.load_state_dict(file.tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: tensors do not fit the model its header describes: {reason(error)}") from None
    return Loaded(model.to(device).eval(), file._replace(tensors={}))


def config_of(
    name: str, shape: tuple[int, ...], num_classes: int, options: dict[str, Any], draw: dict[str, Any]
) -> dict[str, Any]:
    """The configuration that a weight file carries, with every default written out."""
    if lines := problems(name, options, draw):
        raise RecipeError("\n".join(lines))
    entry = find(name)
    return {
        "name": name,
        "shape": list(shape),
        "num_classes": num_classes,
        "options": entry.options.model_validate(options).model_dump(mode="json"),
        "draw": entry.draw_options.model_validate(draw).model_dump(mode="json"),
    }


def check_config(config: Any, path: str) -> dict[str, Any]:
    """The configuration found in a weight file. Raises CheckpointError if it is not one of ours."""
    keys = {"name", "shape", "num_classes", "options", "draw"}
    if not isinstance(config, dict) or not keys <= config.keys():
        raise CheckpointError(f"{path} holds no model configuration of this program; convert foreign weights first")
    if "label_drop" in config["draw"]:
        raise CheckpointError(
            f"{path} was written before config.draw.label_drop became label_dropout; convert or train it again, or "
            "rename the key in the file's header"
        )
    return config
