"""YAML of recipes and of key=value overrides -> plain values, whatever the text holds."""

import re
from typing import Any

import yaml

from ddo_cli.errors import printable

LARGEST = 1 << 17  # bytes of a recipe; our choice, far above every one
_MOST_VALUES = 10_000  # in it
_LONGEST_NUMBER = 40  # characters; Python refuses to print integers of 4,300 digits
_DEEPEST = 20  # values within values
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
# What PyYAML raises for texts such as "!!int x", 2024-99-99, or ten thousand brackets.
_FAULTS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class SyntaxFaultError(ValueError):
    """A text that is no YAML that a recipe could be. The message is one line: the place in the text, and the fault."""


def parse(text: str | bytes) -> Any:
    """The value of a YAML text; bytes may be UTF-8 or, with a mark of byte order, UTF-16.

    Raises SyntaxFaultError, also for a repeated key, of which YAML would silently keep the last.
    """
    if len(text) > LARGEST:
        raise SyntaxFaultError(f"it has {len(text):,} characters, and a recipe a few thousand")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _value(loader, node)
    except yaml.reader.ReaderError as error:
        character = f"the character {error.character:#x}" if isinstance(error.character, int) else "bytes"
        raise SyntaxFaultError(f"position {error.position}: {character} that no text holds; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SyntaxFaultError(f"{line}{printable(error.problem or str(error), 120)}") from None
    except _FAULTS as error:
        raise SyntaxFaultError(printable(f"{type(error).__name__}: {error}", 120)) from None


def _value(loader: "_Loader", node: yaml.Node) -> Any:
    _count(node, {}, 0)
    return loader.construct_document(node)


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """The values of a node, those of an alias counted wherever it stands. Raises SyntaxFaultError beyond the limits.

    known: of the nodes met before.
    """
    if id(node) not in known:
        if depth > _DEEPEST:  # or an alias inside of what it stands for
            raise yaml.MarkedYAMLError(
                problem=f"more than {_DEEPEST} values within another", problem_mark=node.start_mark
            )
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = [] if isinstance(node, yaml.ScalarNode) else parts
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in inside)
    if known[id(node)] > _MOST_VALUES:
        raise yaml.MarkedYAMLError(problem=f"more than {_MOST_VALUES:,} values", problem_mark=node.start_mark)
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number; YAML 1.1 requires 1.0e-4."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Begins a list or dictionary in brackets. PyYAML's time grows with the square of their depth."""
        if self.flow_level > _DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"more than {_DEEPEST} values within another", problem_mark=self.get_mark()
            )
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A dictionary. Raises MarkedYAMLError for a repeated key."""
        seen = set[str]()
        for key_node, _ in node.value:
            if isinstance(key_node.value, str) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    fault = f"the key '{printable(key_node.value, 60)}' is given twice; leave one out"
                    raise yaml.MarkedYAMLError(problem=fault, problem_mark=key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> Any:
        """An integer. Raises MarkedYAMLError for one that is too long to be any value of a recipe."""
        if len(node.value) > _LONGEST_NUMBER:
            fault = f"a number of {len(node.value):,} characters"
            raise yaml.MarkedYAMLError(problem=fault, problem_mark=node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
