"""Lazy registry; unknown names get a suggestion."""

import difflib
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from ddo_cli.errors import RecipeError
from ddo_cli.likelihood import DrawOptions, Options

F = TypeVar("F", bound=Callable[..., Any])


class Entry(NamedTuple):
    """A registered builder and the classes of its arguments; the draw options are those of likelihood models."""

    build: Callable[..., Any]
    options: type[Options]
    draw_options: type[DrawOptions]


class Catalog:
    """Entries by name. key: the recipe key that holds the name; builtin: name -> module that adds it when imported.

    also: further names that the key may have, for the suggestion.
    """

    def __init__(self, key: str, builtin: Mapping[str, str], remedy: str, also: Collection[str] = ()):
        self.key, self.builtin, self.remedy, self.also = key, builtin, remedy, also
        self.entries: dict[str, Entry] = {}

    def register(
        self, name: str, options: type[Options], draw_options: type[DrawOptions] = DrawOptions
    ) -> Callable[[F], F]:
        """Decorator of a builder: makes it known under `name`."""

        def add(build: F) -> F:
            self.entries[name] = Entry(build, options, draw_options)
            return build

        return add

    def find(self, name: str) -> Entry:
        """The entry called `name`. Raises RecipeError naming the nearest."""
        if name not in self.entries and name in self.builtin:
            importlib.import_module(self.builtin[name])
        if name not in self.entries:
            known = sorted({*self.builtin, *self.entries, *self.also} - {name})
            near = difflib.get_close_matches(name[:60], known, 1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise RecipeError(f"{self.key} = {name!r} is not known{hint}; known: {', '.join(known)}; {self.remedy}")
        return self.entries[name]


def option_problems(section: str, owner: str, schema: type[BaseModel], values: dict[str, Any]) -> list[str]:
    """What is wrong with the options of `owner` that a recipe gives under `section`, one line each."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        return [_problem(section, owner, schema, problem) for problem in error.errors()]
    return []


def _problem(section: str, owner: str, schema: type[BaseModel], problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"{section}.{key} of {owner}: {problem['input']!r}: {problem['msg']}"
    near = difflib.get_close_matches(key[:60], list(schema.model_fields), 1)
    hint = f" (did you mean '{near[0]}'?)" if near else f"; known: {', '.join(schema.model_fields)}"
    return f"{section}.{key} of {owner}: unknown key{hint}"
