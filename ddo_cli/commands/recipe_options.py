"""Options that stand for recipe keys: name, type and help are the schema's.

`of_recipe("seed")` is a reader for `command.add` that makes a Recipe of --seed, --recipe and KEY=VALUE arguments.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Annotated, Any, Optional

from typer import Argument, Option

from ddo_cli.commands import completion
from ddo_cli.commands.options import floats, parsed
from ddo_cli.errors import RecipeError

if TYPE_CHECKING:
    from ddo_cli.recipe.schema import Recipe

_NAMES = {"data.source": "data", "model.file": "model_file", "metric.num_images": "eval_num"}  # else the last part
_FLAGS = {
    "discriminator.conditional": ["--conditional/--unconditional"], "discriminator.control": ["--control/--no-control"],
}  # fmt: skip
_TYPES = {"integer": int, "number": float, "true | false": bool}  # by `Key.type`; all others are text
_METAVARS = {"true | false": None, "number | list of number": "NUMBER[,...]",
             "number | list of number | auto": "NUMBER[,...]|auto"}  # fmt: skip
_TITLES = {"data": "Data and model", "model": "Data and model", "metric": "Score", "sampling": "Sampling",
           "guidance": "Discriminator guidance"}  # fmt: skip


class _KeyOptions:
    """A reader with an option for each of these keys; it returns read(values by key, **values of its own options).

    A value is None if the option was not typed. source: of the default, for --help.
    """

    def __init__(self, read: Callable[..., Any], keys: Iterable[str], source: str):
        self.read, self.keys, self.source = read, {_NAMES.get(key, key.split(".")[-1]): key for key in keys}, source

    @cached_property
    def __signature__(self) -> inspect.Signature:
        from ddo_cli.recipe.keys import described

        known = {key.name: key for key in described()}
        if self.source == "recipe":
            defaults = _defaults_of_recipe(self.keys.values())
        else:
            defaults = dict.fromkeys(self.keys.values(), self.source)
        parameters = [self._parameter(name, known[key], defaults[key]) for name, key in self.keys.items()]
        return inspect.Signature([*list(inspect.signature(self.read).parameters.values())[1:], *parameters])

    def _parameter(self, name: str, key: Any, default: str) -> inspect.Parameter:
        kind = key.type.removesuffix(" | null")
        option = Option(
            *_FLAGS.get(key.name, ()),
            help=key.meaning,
            metavar=_METAVARS.get(kind, kind.replace(" ", "") if "|" in kind else None),
            show_default=default,
            autocompletion=completion.of_key(key),
            rich_help_panel=_TITLES.get(key.name.partition(".")[0], "Training"),
        )
        annotation: Any = Annotated[Optional[_TYPES.get(kind, str)], option]  # noqa: UP045
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def __call__(self, **values: Any) -> Any:
        return self.read({key: values.pop(name) for name, key in self.keys.items()}, **values)


def _defaults_of_recipe(keys: Iterable[str]) -> dict[str, str]:
    """For --help: that the recipe has the default, and which, for the recipe that is read where none is given."""
    from ddo_cli.recipe.load import load
    from ddo_cli.recipe.schema import DEFAULT_RECIPE

    recipe = load(DEFAULT_RECIPE)
    values = {key: reduce(getattr, key.split("."), recipe) for key in keys}
    return {
        key: "recipe" if value is None else f"recipe, {_as_typed(value)} in {DEFAULT_RECIPE}"
        for key, value in values.items()
    }


def _as_typed(value: Any) -> str:
    """A value of a recipe as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def of_recipe(*keys: str, check_model: bool = False) -> Callable[..., Any]:
    """Reader of a Recipe, with options for some of its keys. check_model: the model section's options are checked."""

    def read(
        given: dict[str, Any],
        recipe: Annotated[
            str,
            Option(autocompletion=completion.recipes, help="A recipe by name (see `ddo recipes`) or a YAML file."),
        ] = "quickstart",
        overrides: Annotated[
            list[str] | None,
            Argument(
                metavar="[KEY=VALUE]...",
                autocompletion=completion.recipe_keys,
                help="Any recipe key, e.g. finetune.ema_half_life=500.",
            ),
        ] = None,
    ) -> "Recipe":
        from ddo_cli.models import registry
        from ddo_cli.recipe import load

        for key in given.keys() & {"finetune.alpha", "finetune.beta"}:
            if key != "finetune.beta" or given[key] != "auto":
                given[key] = coefficient(f"--{key.split('.')[-1]}", given[key])
        if problems := load.repeated(overrides or [], given):
            raise RecipeError("\n".join(problems))

        def check(recipe: "Recipe") -> list[str]:
            registry.load_file(recipe.model.file)
            return registry.problems(recipe.model.name, recipe.model.options, recipe.model.draw)

        return load.load(recipe, overrides or [], given, check if check_model else None)

    return _KeyOptions(read, keys, "recipe")


def of_sampling(*keys: str) -> Callable[..., Any]:
    """Reader of values for SamplingRecipe: options for these keys, KEY=VALUE arguments for the others."""

    def read(
        given: dict[str, Any],
        overrides: Annotated[
            list[str] | None,
            Argument(
                metavar="[KEY=VALUE]...",
                autocompletion=completion.sampling_keys,
                help="Any sampling key, e.g. sigma_max=20 top_k=5.",
            ),
        ] = None,
    ) -> dict[str, Any]:
        from ddo_cli.recipe.load import parse_sampling

        return parse_sampling(overrides or [], _unqualified(given))

    return _KeyOptions(read, [f"sampling.{key}" for key in keys], "model")


def of_guidance(*keys: str) -> Callable[..., Any]:
    """Reader of values for GuidanceRecipe, None where an option was not typed."""
    return _KeyOptions(_unqualified, [f"guidance.{key}" for key in keys], "discriminator")


def _unqualified(given: dict[str, Any]) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in given.items()}


def coefficient(option: str, text: str | None) -> float | list[float] | None:
    """The number, or those of a sweep, of --alpha and --beta. Raises UsageError."""
    auto = ", or auto" if option == "--beta" else ""
    values = parsed(option, text, floats, f"write a number such as 4, or those of a sweep such as 1,2,4{auto}")
    return values[0] if values and len(values) == 1 else values
