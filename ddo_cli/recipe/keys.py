"""Every recipe key with type, default and description, for `ddo recipes --keys`, the options and the docs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from ddo_cli.recipe.schema import Recipe
from ddo_cli.recipe.training import Section, TrainRecipe


class Key(NamedTuple):
    """A recipe key by its dotted name."""

    name: str
    type: str
    default: Any
    meaning: str


def described(schema: Any = Recipe, prefix: str = "") -> Iterator[Key]:
    """All keys, in the order of a recipe file."""
    for name, field in schema.model_fields.items():
        if _is_section(field.annotation):
            yield from described(field.annotation, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield Key(f"{prefix}{name}", spelled(field.annotation), default, _description(schema, name))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _description(schema: Any, name: str) -> str:
    """A section that changes only the default of an inherited key has no text of its own for it."""
    fields = [parent.model_fields[name] for parent in schema.__mro__ if name in getattr(parent, "model_fields", ())]
    return next(field.description for field in fields if field.description)


def spelled(annotation: Any) -> str:
    """A type as it reads in a recipe: `number | null`, `ddp | fsdp`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is Annotated:
        return spelled(parts[0])
    if origin in (list, tuple, dict):
        return "mapping" if origin is dict else f"list of {spelled(parts[0])}"
    if parts:
        return " | ".join(map(spelled, parts))
    return {NoneType: "null", str: "text", float: "number", int: "integer", bool: "true | false"}.get(annotation, "any")


def markdown() -> str:
    """All keys as Markdown: a table for each section, and one for what the training sections share."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items() if _is_section(field.annotation)}
    tables = [_table("Top level", Recipe), _table("Keys of every training section", TrainRecipe)]
    return "\n".join(tables + [_table(f"`{name}`", schema) for name, schema in sections.items()])


def _table(title: str, schema: Any) -> str:
    """The keys that this class declares itself, as a Markdown section."""
    lines = [f"## {title}", "", schema.__doc__, "", "| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for key in described(schema):
        if key.name in schema.__annotations__:
            kind, meaning = key.type.replace(" | ", ", "), key.meaning.replace("<", "&lt;")  # a bar would end the cell
            lines.append(f"| `{key.name}` | {kind} | `{json.dumps(key.default)}` | {meaning} |")
    return "\n".join(lines) + "\n"
