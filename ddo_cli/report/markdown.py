"""Blocks of a page as Markdown, for places that show no HTML: the card of a model on the Hub."""

import re
from collections.abc import Iterable, Sequence

from ddo_cli.errors import visible
from ddo_cli.report.html import Block, Table, Text


def text(content: str) -> str:
    """A text of the page: names and values of users are no marks of Markdown and no elements of HTML."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", visible(content))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    escaped = [lines[0], lines[1], *([text(cell) for cell in row] for row in lines[2:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def blocks(shown: Iterable[Block]) -> str:
    """Paragraphs and tables; what has no words, such as a chart, is left out."""
    parts = []
    for block in shown:
        if isinstance(block, Text):
            parts.append(f"**{text(block.text)}**" if block.kind == "warning" else text(block.text))
        elif isinstance(block, Table) and block.rows:
            title = [f"**{text(block.title)}**"] if block.title else []
            parts += [*title, table(block.columns, block.rows)]
    return "\n\n".join(parts)
