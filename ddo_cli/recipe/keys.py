"""Every recipe key with type, default and description, for `ddo recipes --keys`, the options and the docs."""

import json
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from ddo_cli.recipe.schema import Recipe, fields
from ddo_cli.recipe.training import TrainRecipe


class Key(NamedTuple):
    """A recipe key by its dotted name."""

    name: str
    type: str
    default: Any
    meaning: str


def described(schema: Any = Recipe) -> Iterator[Key]:
    """All keys of a recipe or section, in the order of a file."""
    for name, section, field in fields(schema):
        # A section that only changes the default of an inherited key has the text of the class above it.
        parents = [getattr(parent, "model_fields", {}).get(name.rpartition(".")[2]) for parent in section.__mro__]
        meaning = next(parent.description for parent in parents if parent and parent.description)
        yield Key(name, spelled(field.annotation), field.get_default(call_default_factory=True), meaning)


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
    sections = {name.rpartition(".")[0]: section for name, section, _ in fields() if "." in name}
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
