"""The one frame of every report: a self-contained HTML page that needs nothing from anywhere.

Charts are inline SVG in the page's own colours, so they follow light and dark. The only script compares pictures;
without it they stand side by side. Every text of a page goes through `text`.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ddo_cli.errors import visible
from ddo_cli.files import write_text
from ddo_cli.report import charts
from ddo_cli.report.charts import Chart

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f24; --dim: #59636e; --line: #d5dae0;
  --warn: #9a4a00; --c0: #0072b2; --c1: #c4500a; --c2: #00805f; --c3: #9b3f86; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1d2228; --ink: #e6e9ec; --dim: #9fa9b3;
  --line: #363d45; --warn: #ffb066; --c0: #5cb3f2; --c1: #f2894a; --c2: #3fc79c; --c3: #d98cc7; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere; }
h1 { font-size: 1.1rem; font-weight: 600; color: var(--dim); margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
.lead { font-size: clamp(1.2rem, 1rem + 1.2vw, 1.7rem); line-height: 1.35; margin: .5rem 0 1.25rem; }
.note, figcaption, .key { color: var(--dim); font-size: .9rem; }
.warning { color: var(--warn); font-weight: 600; }
.tiles, .charts { display: grid; gap: 1rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); margin: 1rem 0; }
.tile, figure { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; margin: 0; }
.tile b { display: block; font-size: 1.5rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: .85rem; }
figure svg { display: block; width: 100%; height: auto; }
figure img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
.key span { margin-right: 1rem; white-space: nowrap; } .key i { display: inline-block; width: 1.1rem; height: .2rem;
  margin-right: .35rem; vertical-align: middle; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .75rem 0; font-size: .95rem; }
th, td { padding: .3rem .75rem; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--dim); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } tr + tr { border-top: 1px solid var(--line); }
.texts th, .texts td { text-align: left; vertical-align: top; white-space: normal; min-width: 6.5rem; }
.texts th:first-child, .texts td:first-child { min-width: 7rem; }
pre { background: var(--card); padding: 1rem; overflow: auto; font-size: .8rem; border-radius: .5rem; }
summary { cursor: pointer; color: var(--dim); }
.compare { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.compare.live { grid-template-columns: 1fr 1fr; } .compare.live figure { display: none; }
.compare.live .on { display: block; } .compare.live .first { order: -1; }
.controls { grid-column: 1 / -1; order: 1; display: flex; flex-wrap: wrap; gap: .75rem; align-items: center; }
.controls input { flex: 1 1 12rem; accent-color: var(--c0); min-height: 2rem; }
.controls button { font: inherit; padding: .4rem .9rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--card); color: var(--ink); cursor: pointer; }
@media (max-width: 44rem) { .compare.live { grid-template-columns: 1fr; } .compare.live .first { display: none; }
  th, td { padding: .3rem .5rem; } }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""

# A slider over the pictures beside the first one, and a button that flips between the two in place.
SCRIPT = """
for (const box of document.querySelectorAll('.compare')) {
  const frames = [...box.querySelectorAll('figure')], last = frames.length - 1, first = frames[0].cloneNode(true);
  const controls = document.createElement('div'), slider = document.createElement('input');
  const flip = document.createElement('button'), said = document.createElement('output');
  let before = last;
  first.className = 'first on';
  first.querySelector('img').alt += ' (always shown for comparison)';
  Object.assign(slider, {type: 'range', min: 0, max: last, value: last});
  slider.setAttribute('aria-label', box.dataset.label);
  flip.type = 'button';
  flip.textContent = 'Flip before and after';
  controls.className = 'controls';
  controls.append(slider, flip, said);
  const show = () => {
    frames.forEach((frame, number) => frame.classList.toggle('on', number === Number(slider.value)));
    said.textContent = frames[slider.value].querySelector('figcaption').textContent;
    slider.setAttribute('aria-valuetext', said.textContent);
  };
  slider.oninput = show;
  flip.onclick = () => {
    if (Number(slider.value)) { before = slider.value; slider.value = 0; } else { slider.value = before; }
    show();
  };
  box.classList.add('live');
  box.append(first, controls);
  show();
}
"""


class Text(NamedTuple):
    """A paragraph. kind: "", "note" or "warning"."""

    text: str
    kind: str = "note"


class Tiles(NamedTuple):
    """The few figures that matter: label, value, and a word on it."""

    tiles: Sequence[tuple[str, str, str]]


class Table(NamedTuple):
    """A table with its heading. Of figures, aligned right, unless it is one of texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    of_texts: bool = False


class Charts(NamedTuple):
    """Charts of one size, as many side by side as fit."""

    charts: Sequence[Chart]


class Picture(NamedTuple):
    """A PNG file and its caption, which is its alternative text as well."""

    path: Path
    caption: str


class Pictures(NamedTuple):
    """Pictures side by side."""

    pictures: Sequence[Picture]


class Compare(NamedTuple):
    """Pictures of the same seeds: the first stays, a slider chooses the one beside it. label: of the slider."""

    label: str
    pictures: Sequence[Picture]


class Folded(NamedTuple):
    """A long text behind its title."""

    title: str
    text: str


Block = Text | Tiles | Table | Charts | Pictures | Compare | Folded


class Section(NamedTuple):
    """A heading and what follows. One without content is left out. id: for links, and for tests."""

    title: str
    blocks: Sequence[Block]
    id: str = ""


class Page(NamedTuple):
    """title: what this is; headline: what has come out, in a sentence; blocks: directly below it."""

    title: str
    headline: str
    blocks: Sequence[Block]
    sections: Sequence[Section]


def write(path: Path, page: Page) -> None:
    """Writes the page. Pictures whose files are missing are left out."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{text(page.title)}</title><style>{STYLE}</style>"
    body = f'<header><h1>{text(page.title)}</h1><p class="lead">{text(page.headline)}</p></header>'
    body += "".join(map(_block, page.blocks))
    for section in page.sections:
        if content := "".join(map(_block, section.blocks)):
            name = f' id="{text(section.id)}"' if section.id else ""
            body += f"\n<section{name}><h2>{text(section.title)}</h2>{content}</section>"
    script = f"<script>{SCRIPT}</script>" if 'class="compare"' in body else ""
    write_text(
        path, f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</main>{script}</body></html>\n'
    )


def text(text: str) -> str:
    """A text of the page: names and values of users are no elements and no marks of direction."""
    return html.escape(visible(text, "\n"))


def _block(block: Block) -> str:
    match block:
        case Text(content, kind):
            return f'<p class="{text(kind)}">{text(content)}</p>'
        case Tiles(tiles):
            shown = (f'<div class="tile"><span>{text(a)}</span><b>{text(b)}</b><span>{text(c)}</span></div>'
                     for a, b, c in tiles)  # fmt: skip
            return f'<div class="tiles">{"".join(shown)}</div>'
        case Table():
            return _table(block)
        case Charts(shown):
            return f'<div class="charts">{"".join(map(_chart, shown))}</div>' if shown else ""
        case Pictures(shown):
            found = "".join(map(_picture, shown))
            return f'<div class="charts">{found}</div>' if found else ""
        case Compare(label, shown):
            there = [picture for picture in shown if picture.path.is_file()]
            found, name = "".join(map(_picture, there)), ' class="compare"' if len(there) > 1 else ' class="charts"'
            return f'<div{name} data-label="{text(label)}">{found}</div>' if found else ""
        case Folded(title, content):
            return f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>"


def _chart(chart: Chart) -> str:
    lines = [*((line.label, f"var(--c{number % charts.COLORS})") for number, line in enumerate(chart.lines))]
    lines += [(label, "var(--dim)") for label, _ in chart.levels]
    is_named = len(lines) > 1
    key = "".join(f'<span><i style="background: {color}"></i>{text(label)}</span>' for label, color in lines)
    key = f'<div class="key">{key}</div>' if is_named else ""
    svg = charts.svg(chart).replace("<svg ", f'<svg role="img" aria-label="{text(charts.described(chart))}" ', 1)
    note = f"<figcaption>{text(chart.note)}</figcaption>" if chart.note else ""
    return f"<figure><h3>{text(chart.title)}</h3>{svg}{key}{note}</figure>"


def _picture(picture: Picture) -> str:
    if not picture.path.is_file():
        return ""
    data, caption = base64.b64encode(picture.path.read_bytes()).decode(), text(picture.caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    title, kind = f"<h3>{text(table.title)}</h3>" if table.title else "", ' class="texts"' if table.of_texts else ""
    cells = _row("th", table.columns) + "".join(_row("td", row) for row in table.rows)
    label = text(table.title or "table")
    return (
        f'{title}<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table{kind}>{cells}</table></div>'
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in cells) + "</tr>"
