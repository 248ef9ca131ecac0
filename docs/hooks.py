"""What mkdocs calls while it builds: pages made from the code, and formulas as MathML.

A page asks for generated text by a comment of its own, `<!-- generated: commands -->`; see GENERATED. Formulas are
written in LaTeX between dollar signs and become MathML, which browsers draw without a script.
"""

import html
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from typer.utils import get_params_from_function

from ddo_cli.cli import app
from ddo_cli.commands.examples import EXAMPLES
from ddo_cli.diffusion.samplers import SAMPLERS
from ddo_cli.recipe import keys
from ddo_cli.recipe.load import load, recipe_names

ALL: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMANDS: dict[str, Any] = {name: command.whole for name, command in ALL.items() if not command.hidden}
HELP = {name: ALL[name].help for name in COMMANDS}
VALUES = {int: "N", float: "X", Path: "PATH"}  # how the value of an option is written; any other is TEXT


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in what is generated."""
    return re.sub(r"<!-- generated: ([\w-]+) -->", lambda match: "\n".join(GENERATED[match[1]]()), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turns the formulas that arithmatex has marked into MathML."""
    from latex2mathml.converter import convert  # the tests of these pages do without

    def mathml(match: re.Match[str]) -> str:
        formula = html.unescape(match["formula"])
        display = "block" if match["tag"] == "div" else "inline"
        # Without a space after it, "log p" reads as one word.
        return convert(formula, display=display).replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em"/>')

    marked = r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<formula>.*?)\\[\])]</(?P=tag)>'
    return re.sub(marked, mathml, content, flags=re.DOTALL)


def commands() -> Iterator[str]:
    """All commands: a line each, then one section with the arguments and options of each."""
    yield from table(["command", ""], ([f"[`ddo {name}`](#{name})", text] for name, text in HELP.items()))
    for name, command in COMMANDS.items():
        types = {key: value.annotation for key, value in get_params_from_function(command.callback).items()}
        rows = {parameter: parameter_row(parameter, types[parameter.name]) for parameter in command.params}
        required = [row[0].strip("`") for row in rows.values() if row[2] == "required"]
        yield f"\n## `ddo {name}` {{#{name}}}\n\n{HELP[name]}\n"
        yield f"```text\n{' '.join(['ddo', name, *required, '[OPTIONS]'])}\n```\n"
        yield "```sh\n" + "\n".join(EXAMPLES[name]) + "\n```\n"
        groups: dict[str, list[list[str]]] = {}  # as --help shows them
        for parameter, row in rows.items():
            groups.setdefault(parameter.rich_help_panel or "", []).append(row)
        titled = ([[f"**{title}**", "", ""], *group] if title else group for title, group in groups.items())
        yield from table(["", "", "default"], chain.from_iterable(titled))


def parameter_row(parameter: Any, annotation: Any) -> list[str]:
    """Names with the kind of value, the help, and the default where it is a value."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if kind in VALUES]
    choices = [
        *chain.from_iterable(
            get_args(kind) for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal
        )
    ]
    value = parameter.metavar or ("|".join(choices) if choices else VALUES[kinds[0]] if kinds else "TEXT")
    spelled = [*parameter.opts, *parameter.secondary_opts]
    if not spelled[0].startswith("-"):
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{option}`" if parameter.is_flag else f"`{option} {value}`" for option in spelled)
    if parameter.required:
        default = "required"
    elif isinstance(parameter.show_default, str):
        default = f"`{parameter.show_default}`"
    else:
        default = "" if parameter.default is None or isinstance(parameter.default, bool) else f"`{parameter.default}`"
    return [names, cell(parameter.help or ""), default]


def recipe_table() -> Iterator[str]:
    """All recipes: a line each, then head and content of each."""
    files = recipe_names()
    by_place: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted(files):
        by_place[load(name).data.source.startswith("embedded:")].append(name)
    for is_embedded, title in ((True, "On embedded data"), (False, "On data and checkpoints of your own")):
        yield f"\n## {title}\n"
        yield from table(["recipe", ""], ([f"[`{name}`](#{name})", head(name)[0]] for name in by_place[is_embedded]))
        for name in by_place[is_embedded]:
            yield f"\n### `{name}` {{#{name}}}\n\n```yaml\n{files[name].read_text(encoding='utf-8').rstrip()}\n```\n"


def samplers() -> Iterator[str]:
    """The table of samplers."""
    rows = []
    for sampler in SAMPLERS.values():
        text = getattr(sampler.integrate, "func", sampler.integrate).__doc__.partition("\n")[0]
        evaluations, steps = "n" if sampler.evaluations == 1 else f"{sampler.evaluations}n - 1", str(sampler.steps)
        if sampler.is_adaptive:
            evaluations, steps = "as many as it needs", ""
        rows.append([f"`{sampler.name}`", cell(text), evaluations, steps, "yes" if sampler.churns else ""])
    yield from table(["`--sampler`", "", "evaluations in n steps", "default n", "takes churn"], rows)


def head(name: str) -> list[str]:
    """The comment that a recipe opens with, line by line."""
    lines = recipe_names()[name].read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def table(titles: list[str], rows: Any) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(titles)} |"
    yield "|" + " --- |" * len(titles)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def cell(text: str) -> str:
    """Text that Markdown keeps as it is, in a cell of a table."""
    parts = re.split(r"(`[^`]*`)", text)  # code is left alone
    escaped = [part if part.startswith("`") else re.sub(r"([\[\]*_])", r"\\\1", html.escape(part)) for part in parts]
    return "".join(escaped).replace("|", "\\|")


GENERATED = {
    "commands": commands,
    "recipe-keys": lambda: [keys.markdown()],
    "recipes": recipe_table,
    "samplers": samplers,
}
