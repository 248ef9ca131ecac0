"""How a function with Typer's annotations becomes a command, and how its result is printed.

`@add(seeds=options.seeds_of)` adds the options that `seeds_of` has for parameters; the command's argument `seeds` is
what it returns. Such a reader is a function or a NamedTuple.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, reduce
from typing import Annotated, Any, NamedTuple, TypeVar

import typer
from rich.table import Table
from typer import Option
from typer.core import TyperCommand
from typer.models import OptionInfo

from ddo_cli import console
from ddo_cli.errors import DdoError, UsageError, reason, visible
from ddo_cli.places import local

F = TypeVar("F", bound=Callable[..., Any])
RUN = "Run"  # title of the last options in --help
Json = Annotated[bool, Option("--json", help="Print one JSON object on stdout.", rich_help_panel=RUN)]


class Result(NamedTuple):
    """What a command prints: `figures` with --json, else the table, `shown` (None: the figures) and the text."""

    figures: Mapping[str, Any]
    shown: Mapping[str, Any] | None = None
    table: Table | None = None
    text: str = ""
    error: DdoError | None = None  # raised once the rest is printed


def add(**readers: Callable[..., Any]) -> Callable[[F], F]:
    """Adds the options of each reader to a command, under a title of --help made of the argument's name.

    A command with an argument `typed` gets the values of all options that were typed, by name.
    """

    def attach(command: F) -> F:
        command.readers = readers  # type: ignore[attr-defined]
        return command

    return attach


class Command(TyperCommand):
    """A command whose options are made on demand: those of recipe keys need the schema, which is slow to import."""

    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Any) -> "type[Command]":
        """The class of one command, as Typer takes it."""
        return type("Command", (cls,), {"function": staticmethod(function)})

    @cached_property
    def whole(self) -> Any:
        """The command with its options."""
        app = typer.Typer(add_completion=False)
        app.command(self.name)(_flat(self.function))
        return typer.main.get_command(app)

    def get_params(self, ctx: Any) -> Any:
        return self.whole.get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        return self.whole.invoke(ctx)


def _flat(command: Callable[..., Any]) -> Callable[..., None]:
    """The command as a function of all its options, which prints the result."""
    readers = getattr(command, "readers", {})
    arguments = inspect.signature(command).parameters
    direct = [parameter for name, parameter in arguments.items() if name not in (*readers, "typed")]
    read = {name: list(inspect.signature(reader).parameters.values()) for name, reader in readers.items()}
    for name, parameters in read.items():
        for option in (parameter.annotation.__metadata__[0] for parameter in parameters):
            if isinstance(option, OptionInfo) and option.rich_help_panel is None:
                option.rich_help_panel = name.replace("_", " ").capitalize()

    def run(**values: Any) -> None:
        console.use_json(values.pop("json_"))
        values = local(values)
        made = {"typed": {name: value for name, value in values.items() if value is not None}}
        for name, parameters in read.items():
            made[name] = readers[name](**{parameter.name: values[parameter.name] for parameter in parameters})
        values |= made
        try:
            output = command(**{name: values[name] for name in arguments})
        except DdoError as error:
            options = {name: value for name, value in made["typed"].items() if name in are_options}
            raise _naming_key(error, options, made.get("recipe")) from None
        except (TypeError, RuntimeError) as error:  # as torch refuses what a Mac's GPU cannot do
            if made["typed"].get("device") != "mps" or "MPS" not in str(error):
                raise
            problem = f"--device mps: torch cannot do this there ({reason(error)}); use --device cpu"
            raise UsageError(problem) from None
        result = output if isinstance(output, Result) else Result(output)
        lines = lines_of(result.figures if result.shown is None else result.shown)
        console.result(result.figures, lines + result.text, result.table)
        if result.error is not None:
            raise result.error

    json_ = inspect.Parameter("json_", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    everything = [*direct, *(parameter for group in read.values() for parameter in group), json_]
    are_options = {each.name for each in everything if isinstance(each.annotation.__metadata__[0], OptionInfo)}
    everything.sort(key=lambda parameter: parameter.annotation.__metadata__[0].rich_help_panel == RUN)  # these last
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in everything]
    )
    return run


def _naming_key(error: DdoError, options: Mapping[str, Any], recipe: Any) -> DdoError:
    """The error of a missing file, with the option or the recipe key that names the file."""
    if error.missing is None:
        return error
    named = {f"--{name.replace('_', '-')}": given for name, given in options.items()}
    if recipe is not None:
        from ddo_cli.recipe.schema import all_keys

        named |= {key: reduce(getattr, key.split("."), recipe) for key in all_keys()}
    key = next((key for key, given in named.items() if str(given) == error.missing), None)
    return error if key is None else type(error)(f"{key} {error}")


def lines_of(figures: Mapping[str, Any], indent: str = "") -> str:
    """One "key value" line per entry; nested values indented."""
    lines = []
    for key, value in figures.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{visible(str(key))}", lines_of(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{key}", *(lines_of(entry, indent + "  ") for entry in value)]
        else:
            text = f"{value:.6g}" if isinstance(value, float) else visible(str(value))  # one line, whatever it holds
            lines.append(f"{indent}{visible(str(key)):<{max(18 - len(indent), 1)}} {text}")
    return "\n".join(lines)
