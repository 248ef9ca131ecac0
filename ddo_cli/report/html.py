"""A self-contained HTML page of a run: one file with its pictures, no script and nothing to download."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ddo_cli.errors import visible
from ddo_cli.files import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr + tr { border-top: 1px solid #ddd; }
img { max-width: 100%; } figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }
figcaption { color: #555; } pre { background: #f5f5f5; padding: 1rem; overflow: auto; font-size: 13px; }
"""


class Picture(NamedTuple):
    """A PNG file and its caption."""

    path: Path
    caption: str


class Table(NamedTuple):
    """A table with its heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    path: Path,
    title: str,
    summary: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    pictures: Sequence[Picture],
    recipe: str,
    further: Sequence[Table] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Writes the page: summary, warnings, table, further tables, pictures (missing files are left out), the resolved
    recipe.
    """
    body = [f"<h1>{text(title)}</h1>", f"<p>{text(summary)}</p>"]
    body += [f"<p>Warning: {text(warning)}</p>" for warning in warnings]
    body += [_table(columns, rows)]
    for table in further:
        body += [f"<h2>{text(table.title)}</h2>", _table(table.columns, table.rows)]
    for picture in pictures:
        if picture.path.is_file():
            data = base64.b64encode(picture.path.read_bytes()).decode()
            caption = text(picture.caption)
            image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
            body.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    body += ["<h2>Recipe</h2>", f"<pre>{text(recipe)}</pre>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{text(title)}</title><style>{STYLE}</style>"
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n')


def text(text: str) -> str:
    """A text of the page: names and values of users are no elements and no marks of direction."""
    return html.escape(visible(text, "\n"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<table>{_row('th', columns)}{''.join(_row('td', row) for row in rows)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"
