"""Reads recipes: YAML files and key=value overrides. All problems of a recipe are reported together.

One recipe serves every command: `pretrain` reads `model` and `pretrain`, `finetune-ddo` reads `finetune`, `train-disc`
reads `discriminator` and stores `guidance` for `guide-sample`; all read `data`, `sampling` and `metric`. Training is
counted in images, as in the papers, not in steps.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ddo_cli.errors import RecipeError, printable
from ddo_cli.places import local
from ddo_cli.recipe import syntax
from ddo_cli.recipe.schema import DEFAULT_RECIPE, Recipe, SamplingRecipe, messages, nearest

_DEEPEST_KEY = 8  # dots in it; our choice, far above every key


def recipe_names() -> dict[str, Path]:
    """The recipes of the package: name -> file."""
    package = Path(__file__).resolve().parent.parent
    folders = package / "recipes", package.parent / "recipes"  # of an installed package, of a checkout
    return {path.stem: path for folder in folders for path in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or name. Raises RecipeError, which suggests the nearest name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"recipe {name} does not exist; give a YAML file or one of: {', '.join(recipe_names())}")
        return path
    if name not in recipe_names():
        raise RecipeError(f"unknown recipe '{name}'{nearest(name, recipe_names())}; known: {', '.join(recipe_names())}")
    return recipe_names()[name]


def load(
    name: str = DEFAULT_RECIPE,
    overrides: Sequence[str] = (),
    given: dict[str, Any] | None = None,
    check: Callable[[Recipe], list[str]] | None = None,
) -> Recipe:
    """The recipe `name`, with values of the command line.

    overrides: "section.key=value" strings with values in YAML; the last one of a key wins.
    given: values of options by dotted key; None leaves the recipe's value.
    check: finds further problems of a valid recipe, for example in the model's options.
    Raises RecipeError that lists all problems.
    """
    path = find_recipe(name)
    try:
        with open(path, "rb") as file:
            content = syntax.parse(file.read(syntax.LARGEST + 1))
    except syntax.SyntaxFaultError as error:
        where = f"{path}, " if str(error).startswith("line ") else f"{path} is not YAML: "
        raise RecipeError(f"{where}{error}; correct it, or give a recipe of `ddo recipes`") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold keys such as 'name:' and 'finetune:', not {type(content).__name__}")
    content = {key: value for key, value in content.items() if value is not None}  # a section without keys
    values, problems = _parse_overrides(overrides)
    values |= {key: value for key, value in (given or {}).items() if value is not None}
    _drop_options_of_others(content, values)
    for key, value in values.items():
        try:
            _set(content, key, value)
        except TypeError as error:
            problems.append(f"command line: {printable(f'{key}={value}', 80)}: {error}")
    places = dict.fromkeys(values, "command line")
    try:
        recipe = Recipe.model_validate(local(content))
    except ValidationError as error:
        raise RecipeError("\n".join(problems + list(messages(error, str(path), places)))) from None
    problems += check(recipe) if check else []
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Lines "key: theirs -> ours" for all keys whose values differ. None equals a missing key."""
    left, right = dict(_flatten(theirs)), dict(_flatten(ours))
    return [
        f"{key}: {left.get(key, 'absent')} -> {right.get(key, 'absent')}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML text."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values by key of "key=value" strings, and messages about the others.

    A dictionary, such as finetune={lr: 1e-4} or finetune.adapter={rank: 8}, sets the keys that it gives; the recipe's
    others stay. An empty one leaves none.
    """
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            shown = printable(override, 80)
            problems.append(f"'{shown}' is not of the form section.key=value, e.g. finetune.lr=1e-4")
            continue
        try:
            key, value = key.strip(), syntax.parse(text)
            if key.count(".") > _DEEPEST_KEY or not all(key.split(".")):
                raise syntax.SyntaxFaultError("a key is a section and a name, such as finetune.lr")
            if key in Recipe.model_fields and isinstance(value, dict):
                values |= {f"{key}.{name}": inner for name, inner in value.items()}
            else:
                values[key] = value
        except syntax.SyntaxFaultError as error:
            problems.append(f"command line: '{printable(override, 80)}' is not YAML: {error}")
    return values, problems


def repeated(overrides: Sequence[str], given: dict[str, Any]) -> list[str]:
    """A message for each key that a command line gives twice, since one value would be silently ignored.

    given: values of options by key. (`load` itself lets the last one win, for programs that append overrides.)
    """
    seen = {key: f"by its option ({value})" for key, value in given.items() if value is not None}
    problems = []
    for override in overrides:
        for key, _ in _flatten(_parse_overrides([override])[0]):
            if key in seen:
                problems.append(f"command line: {key} is given twice, {seen[key]} and as {override}; leave one out")
            seen[key] = f"as {override}"
    return problems


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets a value by its dotted key; a dictionary is merged into one that is there."""
    name, dot, rest = key.partition(".")
    # A round of finetune.from_round is an integer in a file, but text here.
    section: Any = int(name) if re.fullmatch(r"[0-9]{1,9}", name) and int(name) in content else name
    if dot:
        if content.get(section) is None:
            content[section] = {}
        if not isinstance(content[section], dict):
            raise TypeError(f"'{section}' is a value, not a section; write {section}.<key>=value")
        _set(content[section], rest, value)
    elif isinstance(content.get(section), dict) and isinstance(value, dict) and value:
        for inner, its_value in value.items():
            _set(content[section], str(inner), its_value)
    else:
        content[section] = value


def _drop_options_of_others(content: dict[str, Any], values: dict[str, Any]) -> None:
    """Removes from a recipe's content the options and draw of a network in place of which `values` name another."""
    for section, field in Recipe.model_fields.items():
        of_section, default = content.get(section), getattr(field.default, "name", None)
        name = values.get(f"{section}.name")
        if name is None or default is None or not isinstance(of_section, dict):
            continue
        if name != of_section.get("name", default):
            of_section.pop("options", None)
            of_section.pop("draw", None)


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_sampling(overrides: Sequence[str], flags: dict[str, Any]) -> dict[str, Any]:
    """Values of SamplingRecipe from "key=value" strings and options; options that are None are left out.

    Raises RecipeError that lists all problems.
    """
    values, problems = _parse_overrides(overrides)
    problems += repeated(overrides, flags)
    for key in values.keys() - SamplingRecipe.model_fields.keys():
        near = nearest(key, SamplingRecipe.model_fields)
        problems.append(f"command line: '{key}' is no sampling key{near}; write for example sigma_max=20")
        del values[key]
    values |= {key: value for key, value in flags.items() if value is not None}
    try:
        SamplingRecipe.model_validate(values)
    except ValidationError as error:
        problems += messages(error, "command line", {})
    if problems:
        raise RecipeError("\n".join(problems))
    return values
