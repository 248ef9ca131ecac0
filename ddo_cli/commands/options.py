"""How commands get their options, and how their results are printed.

A command is a function with Typer's annotations. `@options.add(seeds=options.seeds_of)` adds the options that
`seeds_of` has for parameters; the command's argument `seeds` is what it returns. Such a reader is a function or a
NamedTuple. Options that stand for recipe keys take name, type and help from the schema: `of_recipe`, `of_sampling`, ...
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Optional, TypeVar

import typer
from rich.table import Table
from typer import Argument, Option
from typer.core import TyperCommand
from typer.models import OptionInfo

from ddo_cli import console
from ddo_cli.commands import completion
from ddo_cli.errors import DdoError, RecipeError, UsageError, printable, reason, visible
from ddo_cli.places import local

if TYPE_CHECKING:
    import torch

    from ddo_cli.engines.sampling import guides
    from ddo_cli.recipe.schema import Recipe

LogTo = Annotated[
    str,
    Option(
        help="Send figures and pictures to tensorboard, wandb, or a Python file with `tracker`; several between commas."
    ),
]


def trackers(log_to: str) -> tuple[str, ...]:
    """The trackers that --log-to names. Raises UsageError for what cannot be had."""
    from ddo_cli import tracking  # which reads the schema, slow to import

    return tracking.parse(log_to)


MAX_SEED = 2**32 - 1  # generators keep 32 bits
NUM_IMAGES = 64  # images that are drawn unless told otherwise
F = TypeVar("F", bound=Callable[..., Any])


# --- Commands


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


class Prompts(NamedTuple):
    """What is typed of prompts. negative: None: not typed."""

    texts: tuple[str, ...] = ()
    negative: str | None = None


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
        result = output if isinstance(output, Result) else Result(output)
        lines = lines_of(result.figures if result.shown is None else result.shown)
        console.result(result.figures, lines + result.text, result.table)
        if result.error is not None:
            raise result.error

    json_ = inspect.Parameter("json_", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    everything = [*direct, *(parameter for group in read.values() for parameter in group), json_]
    are_options = {each.name for each in everything if isinstance(each.annotation.__metadata__[0], OptionInfo)}
    everything.sort(key=lambda parameter: parameter.annotation.__metadata__[0].rich_help_panel == "Run")  # these last
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


# --- Single options


run_option = partial(Option, rich_help_panel="Run")
of_weights = partial(Option, autocompletion=completion.weights)  # a weight file or the directory of a run

Json = Annotated[bool, run_option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, run_option("--dry-run", help="Check everything, print the plan, write nothing.")]
MeasuredDryRun = Annotated[
    bool,
    run_option("--dry-run", help="Check everything, measure two training steps and a batch of samples, write nothing."),
]
Measure = Annotated[bool, run_option(" /--no-measure", help="With --dry-run: the plan alone.", show_default=False)]
Device = Annotated[
    str | None,
    run_option(
        metavar="cuda|mps|cpu",
        autocompletion=completion.choices("cuda", "mps", "cpu"),
        help="Default: cuda if there is one, else cpu. mps: a Mac's GPU, not tried.",
    ),
]
ModelFile = Annotated[str | None, run_option(help="Python file that registers your own model.")]
Batch = Annotated[int, run_option(min=1, help="Images per network pass.")]
Workers = Annotated[
    int | None, run_option(min=0, max=64, help="Processes that decode images. Default: depends on the machine.")
]
Images = Annotated[str, Argument(help="Images: a folder, zip, npz, sample set, or embedded:<name>.")]
SIZE = "SIDE|WxH"
Resize = Annotated[
    str | None,
    Option(metavar=SIZE, help="Crop and reduce images of mixed sizes to this one, in pixels, as `ddo data` does."),
]
NumImages = Annotated[int | None, Option(min=2, help="Number of images, always the same ones. Default: all.")]
Form = Annotated[
    Literal["png", "npz", "shards"] | None, Option("--format", help="Format. Default: png for images, npz for points.")
]
Force = Annotated[bool, Option("--force", help="Use a discriminator that was trained for another model.")]


# --- Options of recipe keys

_NAMES = {"data.source": "data", "model.file": "model_file", "metric.num_images": "eval_num"}  # else the last part
_FLAGS = {
    "discriminator.conditional": ["--conditional/--unconditional"], "discriminator.control": ["--control/--no-control"],
}  # fmt: skip
_TYPES = {"integer": int, "number": float, "true | false": bool}  # by `Key.type`; all others are text
_METAVARS = {"true | false": None, "number | list of number": "NUMBER[,...]",
             "number | list of number | auto": "NUMBER[,...]|auto"}  # fmt: skip
_TITLES = {"data": "Data and model", "model": "Data and model", "metric": "Score", "sampling": "Sampling",
           "guidance": "Discriminator guidance"}  # fmt: skip


class _KeyOptions:
    """A reader with an option for each of these keys; it returns read(values by key, **values of its own options).

    A value is None if the option was not typed. source: of the default, for --help.
    """

    def __init__(self, read: Callable[..., Any], keys: Iterable[str], source: str):
        self.read, self.keys, self.source = read, {_NAMES.get(key, key.split(".")[-1]): key for key in keys}, source

    @cached_property
    def __signature__(self) -> inspect.Signature:
        from ddo_cli.recipe.keys import described

        known = {key.name: key for key in described()}
        if self.source == "recipe":
            defaults = _defaults_of_recipe(self.keys.values())
        else:
            defaults = dict.fromkeys(self.keys.values(), self.source)
        parameters = [self._parameter(name, known[key], defaults[key]) for name, key in self.keys.items()]
        return inspect.Signature([*list(inspect.signature(self.read).parameters.values())[1:], *parameters])

    def _parameter(self, name: str, key: Any, default: str) -> inspect.Parameter:
        kind = key.type.removesuffix(" | null")
        option = Option(
            *_FLAGS.get(key.name, ()),
            help=key.meaning,
            metavar=_METAVARS.get(kind, kind.replace(" ", "") if "|" in kind else None),
            show_default=default,
            autocompletion=completion.of_key(key),
            rich_help_panel=_TITLES.get(key.name.partition(".")[0], "Training"),
        )
        annotation: Any = Annotated[Optional[_TYPES.get(kind, str)], option]  # noqa: UP045
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def __call__(self, **values: Any) -> Any:
        return self.read({key: values.pop(name) for name, key in self.keys.items()}, **values)


def _defaults_of_recipe(keys: Iterable[str]) -> dict[str, str]:
    """For --help: that the recipe has the default, and which, for the recipe that is read where none is given."""
    from ddo_cli.recipe.load import load
    from ddo_cli.recipe.schema import DEFAULT_RECIPE

    recipe = load(DEFAULT_RECIPE)
    values = {key: reduce(getattr, key.split("."), recipe) for key in keys}
    return {
        key: "recipe" if value is None else f"recipe, {_as_typed(value)} in {DEFAULT_RECIPE}"
        for key, value in values.items()
    }


def _as_typed(value: Any) -> str:
    """A value of a recipe as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def of_recipe(*keys: str, check_model: bool = False) -> Callable[..., Any]:
    """Reader of a Recipe, with options for some of its keys. check_model: the model section's options are checked."""

    def read(
        given: dict[str, Any],
        recipe: Annotated[
            str,
            Option(autocompletion=completion.recipes, help="A recipe by name (see `ddo recipes`) or a YAML file."),
        ] = "quickstart",
        overrides: Annotated[
            list[str] | None,
            Argument(
                metavar="[KEY=VALUE]...",
                autocompletion=completion.recipe_keys,
                help="Any recipe key, e.g. finetune.ema_half_life=500.",
            ),
        ] = None,
    ) -> "Recipe":
        from ddo_cli.models import registry
        from ddo_cli.recipe import load

        for key in given.keys() & {"finetune.alpha", "finetune.beta"}:
            if key != "finetune.beta" or given[key] != "auto":
                given[key] = coefficient(f"--{key.split('.')[-1]}", given[key])
        if problems := load.repeated(overrides or [], given):
            raise RecipeError("\n".join(problems))

        def check(recipe: "Recipe") -> list[str]:
            registry.load_file(recipe.model.file)
            return registry.problems(recipe.model.name, recipe.model.options, recipe.model.draw)

        return load.load(recipe, overrides or [], given, check if check_model else None)

    return _KeyOptions(read, keys, "recipe")


def of_sampling(*keys: str) -> Callable[..., Any]:
    """Reader of values for SamplingRecipe: options for these keys, KEY=VALUE arguments for the others."""

    def read(
        given: dict[str, Any],
        overrides: Annotated[
            list[str] | None,
            Argument(
                metavar="[KEY=VALUE]...",
                autocompletion=completion.sampling_keys,
                help="Any sampling key, e.g. sigma_max=20 top_k=5.",
            ),
        ] = None,
    ) -> dict[str, Any]:
        from ddo_cli.recipe.load import parse_sampling

        return parse_sampling(overrides or [], _unqualified(given))

    return _KeyOptions(read, [f"sampling.{key}" for key in keys], "model")


def of_guidance(*keys: str) -> Callable[..., Any]:
    """Reader of values for GuidanceRecipe, None where an option was not typed."""
    return _KeyOptions(_unqualified, [f"guidance.{key}" for key in keys], "discriminator")


def _unqualified(given: dict[str, Any]) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in given.items()}


# --- Readers of other options


def device_of(device: Device = None) -> "torch.device":
    """The device of --device. Raises UsageError if there is no such device."""
    from ddo_cli import dist

    return dist.init(device)


def device_and_models(model_file: ModelFile = None, device: Device = None) -> "torch.device":
    """The device of --device, once the Python file of --model-file has registered its models."""
    from ddo_cli.models import registry

    registry.load_file(model_file)
    return device_of(device)


def seeds_of(
    seeds: Annotated[str | None, Option(help="Seeds such as 0-49999 or 3,7,10-20.")] = None,
    seed: Annotated[int | None, Option(min=0, max=MAX_SEED, help="First seed.", show_default="0")] = None,
    num_images: Annotated[int | None, Option(min=1, help="Number of images.", show_default=str(NUM_IMAGES))] = None,
) -> Sequence[int]:
    """The seeds of --seeds, or else --num-images of them from --seed on. Raises UsageError if both are given."""
    from ddo_cli.data.samples import parse_seeds

    if seeds is not None:
        for option, value in (("--seed", seed), ("--num-images", num_images)):
            if value is not None:
                raise UsageError(f"{option} {value} has no effect beside --seeds {seeds}; leave one of them out")
        return parsed("--seeds", seeds, parse_seeds, "write seeds such as 0-49999 or 3,7")
    first, count = seed or 0, num_images or NUM_IMAGES
    if (last := first + count - 1) > MAX_SEED:
        raise UsageError(
            f"--seed {first} and --num-images {count} go up to seed {last}, and seeds end at {MAX_SEED}; lower one"
        )
    return range(first, first + count)


def classes_of(
    classes: Annotated[str | None, Option(help="Only these classes, e.g. 3,5.", rich_help_panel="Seeds")] = None,
) -> list[int] | None:
    """The classes of --classes."""
    return parsed("--classes", classes, numbers, "write classes such as 3,5")


def prompts_of(
    prompt: Annotated[
        list[str] | None, Option(help="Of a text-to-image model: what to draw. May be given more than once.")
    ] = None,
    prompts: Annotated[Path | None, Option(help="File with a prompt in each line; empty lines are left out.")] = None,
    negative_prompt: Annotated[
        str | None, Option(help="What guidance leads away from, in place of the empty prompt.", show_default="none")
    ] = None,
) -> "Prompts":
    """The prompts of --prompt or --prompts. Raises UsageError if the file cannot be read, or for both."""
    if prompt and prompts is not None:
        raise UsageError(f"--prompt {printable(prompt[0], 40)!r} beside --prompts {prompts}: leave one of them out")
    if prompts is None:
        return Prompts(tuple(prompt or ()), negative_prompt)
    try:
        lines = prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {prompts} cannot be read ({reason(error)}); give a UTF-8 text file") from None
    if not (texts := tuple(line.strip() for line in lines if line.strip())):
        raise UsageError(f"--prompts {prompts} holds no prompt; write one in each line")
    return Prompts(texts, negative_prompt)


class Pair(NamedTuple):
    """A discriminator and the model that it guides."""

    disc: Annotated[
        str | None, of_weights(help="File or run directory of `ddo train-disc`. Default: the newest below runs/.")
    ] = None
    ckpt: Annotated[str | None, of_weights(help="Model to guide. Default: the one that --disc was trained for.")] = None
    force: Force = False


def second_network(
    guide_ckpt: Annotated[
        str | None, of_weights(help="Weaker or unconditional version of the model, which guides it.")
    ] = None,
    autoguidance_scale: Annotated[float, Option(help="Scale of this guidance, 1 = off.")] = 1.0,
    guidance_interval: Annotated[
        str | None, Option(metavar="LOW,HIGH", help="Noise levels at which it acts; pixels lie in [-1, 1].")
    ] = None,
) -> "guides.Others":
    """Guidance by a second network (autoguidance, arXiv 2406.02507)."""
    from ddo_cli.engines.sampling import guides

    return guides.Others(guide_ckpt, autoguidance_scale, interval=interval_of(guidance_interval))


# --- Texts -> values


def size_of(option: str, text: str | None) -> tuple[int, int] | None:
    """ "64" -> (64, 64), "64x48" -> (64, 48): width and height. Raises UsageError."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(re.fullmatch(r"0*[1-9][0-9]{0,3}", part) for part in parts):
        raise UsageError(
            f"{option} {printable(text, 40)} is no size; write a side such as 64, or WIDTHxHEIGHT such as 64x48, up to "
            "9999"
        )
    return int(parts[0]), int(parts[-1])


def parsed(option: str, text: str | None, parse: Callable[[str], Any], remedy: str) -> Any:
    """What `parse` makes of an option's text; None without one. Raises UsageError with the remedy."""
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise UsageError(f"{option} {text} cannot be read ({reason(error)}); {remedy}") from None


def numbers(text: str) -> list[int]:
    """ "3,5" -> [3, 5]."""
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    """ "0.5,1" -> [0.5, 1.0]."""
    return [float(part) for part in text.split(",")]


def interval_of(text: str | None) -> Any:
    """The two levels of --guidance-interval. Raises UsageError."""
    remedy = "write two noise levels such as 0.3,2"
    if (values := parsed("--guidance-interval", text, floats, remedy)) is not None and len(values) != 2:
        raise UsageError(f"--guidance-interval {text} has {len(values)} numbers; {remedy}")
    return values and tuple(values)


def coefficient(option: str, text: str | None) -> float | list[float] | None:
    """The number, or those of a sweep, of --alpha and --beta. Raises UsageError."""
    auto = ", or auto" if option == "--beta" else ""
    values = parsed(option, text, floats, f"write a number such as 4, or those of a sweep such as 1,2,4{auto}")
    return values[0] if values and len(values) == 1 else values
