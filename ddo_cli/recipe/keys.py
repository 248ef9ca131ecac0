"""Every recipe key for people: type and default off the schema, meaning off the comment in the schema's source."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from ddo_cli.recipe.schema import Recipe, Section


class Key(NamedTuple):
    """A recipe key. meaning: empty where the name says it all."""

    name: str
    type: str
    default: Any
    meaning: str


def described(schema: type[Section] = Recipe, prefix: str = "") -> Iterator[Key]:
    """All keys, in the order of a recipe file."""
    meanings = {key: text for one in reversed(schema.__mro__) if one is not Section for key, text in _comments(one)}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from described(field.annotation, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            meaning = meanings.get(name) or field.description or ""
            yield Key(f"{prefix}{name}", _spelled(field.annotation), default, meaning.replace("None", "null"))


def _comments(schema: type) -> Iterator[tuple[str, str]]:
    """(field, comment): behind the field, or else in the lines right above it."""
    if not issubclass(schema, Section):
        return
    lines = inspect.getsource(schema).splitlines()
    for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = list[str]()
            for line in reversed(lines[: node.lineno - 1]):
                if not line.startswith("    # "):
                    break
                above.insert(0, line[6:])
            yield node.target.id, lines[(node.end_lineno or 1) - 1].partition("  # ")[2] or " ".join(above)


def _spelled(kind: Any) -> str:
    """A type as it reads in a recipe: `number | null`, `ddp | fsdp`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is Annotated:
        return _spelled(parts[0])
    if origin in (list, tuple, dict):
        return "mapping" if origin is dict else f"list of {_spelled(parts[0])}"
    if parts:
        return " | ".join(map(_spelled, parts))
    return {NoneType: "null", str: "text", float: "number", int: "integer", bool: "true | false"}.get(kind, "any")
