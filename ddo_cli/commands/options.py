"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddo_cli.diffusion.samplers import SAMPLERS
from ddo_cli.errors import RecipeError, UsageError

if TYPE_CHECKING:
    import torch

    from ddo_cli.recipe.schema import Recipe

MAX_SEED = 2**32 - 1  # generators keep 32 bits
NUM = 64  # images that are drawn unless told otherwise
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")]
ModelFile = Annotated[str | None, typer.Option(help="Python file that registers your own model.")]
RecipeName = Annotated[str, typer.Option(help="A recipe by name (see `ddo recipes`) or a YAML file.")]
Data = Annotated[
    str | None,
    typer.Option(help="Real images: a folder, zip, npz, embedded:<name>, or what `ddo encode` made of them."),
]
Out = Annotated[Path | None, typer.Option(help="Directory of the run. Default: runs/<recipe>.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any recipe key, e.g. finetune.ema_half_life=500."),
]
Num = Annotated[
    int | None,
    typer.Option("--num-images", min=1, help="How many.", show_default=str(NUM)),
]
Seed = Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="First seed.", show_default="0")]
Seeds = Annotated[str | None, typer.Option(help="Seeds such as 0-49999 or 3,7,10-20.")]
Classes = Annotated[str | None, typer.Option(help="Only these classes, e.g. 3,5. Default: all, balanced.")]
Labels = Annotated[
    str | None,
    typer.Option(
        help="balanced (seed modulo classes), position (place in --seeds modulo classes), or random as EDM draws them."
    ),
]
Sampler = Annotated[str | None, typer.Option(help=f"One of {', '.join(SAMPLERS)}.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps.")]
Churn = Annotated[float | None, typer.Option(help="EDM's stochasticity.")]
CfgScale = Annotated[float | None, typer.Option(help="Classifier-free guidance, 1 = off.")]
Batch = Annotated[int | None, typer.Option(help="Images per network pass.")]
Form = Annotated[
    str | None, typer.Option("--format", help="png, npz or shards. Default: png for images, npz for points.")
]
SamplingKeys = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Other sampling keys, e.g. sigma_max=20 top_k=5."),
]
GuideCkpt = Annotated[
    str | None,
    typer.Option(help="Guide by a second network: a worse version of the model, or an unconditional one."),
]
Guidance = Annotated[float, typer.Option(help="Scale of its guidance, 1 = off.")]
GuidanceInterval = Annotated[
    str | None, typer.Option(metavar="LOW,HIGH", help="Noise levels at which it acts. Default: all.")
]
Disc = Annotated[
    str | None,
    typer.Option(help="Discriminator of `ddo train-disc`. Default: the newest below runs/."),
]
GuidedCkpt = Annotated[
    str | None, typer.Option(help="Model to guide. Default: the one that the discriminator was trained against.")
]
DgWeight = Annotated[
    float | None,
    typer.Option(help="Weight of the guidance in a step's predictor, 0 = off. Default: the recipe's."),
]
DgWeight2nd = Annotated[float | None, typer.Option("--dg-weight-2nd", help="Weight in its corrector (heun).")]
TimeMin = Annotated[float | None, typer.Option(help="Guide only at VP times from here on, in [0, 1].")]
TimeMax = Annotated[float | None, typer.Option(help="Guide only at VP times up to here, in [0, 1].")]
Force = Annotated[bool, typer.Option("--force", help="Use a discriminator that was trained for another model.")]

# ---------------------------------------------------------------------------------------------------------------------
# Options -> values

_SEEDS = "write seeds such as 0-49999 or 3,7,10-20"
_TWO_LEVELS = "write two noise levels such as 0.3,2"


def recipe_of(name: str, overrides: list[str] | None, given: dict[str, Any], own_model: bool = False) -> Recipe:
    """The resolved recipe. own_model: the recipe's model section is used, so its options are checked as well."""
    from ddo_cli.models import registry
    from ddo_cli.recipe import load as recipes_

    if problems := recipes_.repeated(overrides or [], given):
        raise RecipeError("\n".join(problems))

    def check(recipe: Recipe) -> list[str]:
        registry.load_file(recipe.model.file)
        return registry.problems(recipe.model.name, recipe.model.options, recipe.model.draw)

    return recipes_.load(name, overrides or [], given, check if own_model else None)


def device_of(name: str | None) -> torch.device:
    """The device of --device. Raises UsageError where there is no such device."""
    import torch

    from ddo_cli import dist

    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {name} is not known; use cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; leave the option out or use cpu")
    return dist.init(name)


def choice(option: str, value: str | None, known: tuple[str, ...]) -> Any:
    """The value, if it is one of the known ones or None. Raises UsageError."""
    if value is not None and value not in known:
        raise UsageError(f"{option} {value} is not known; use one of {', '.join(known)}")
    return value


def parsed(option: str, text: str | None, parse: Any, remedy: str) -> Any:
    """What `parse` makes of an option's text; None without one. Raises UsageError with the remedy."""
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise UsageError(f"{option} {text} cannot be read ({error}); {remedy}") from None


def seeds_of(text: str | None, first: int | None, num: int | None) -> Any:
    """The seeds of --seeds, or else --num-images from --seed on. Raises UsageError for both or too large ones."""
    from ddo_cli.data.samples import parse_seeds

    if text is not None:
        for option, value in (("--seed", first), ("--num-images", num)):
            if value is not None:
                raise UsageError(f"{option} {value} has no effect beside --seeds {text}; leave one of them out")
        return parsed("--seeds", text, lambda text: parse_seeds(_ascending(text)), _SEEDS)
    first, num = first or 0, num or NUM
    if first + num - 1 > MAX_SEED:
        raise UsageError(
            f"--seed {first} and --num-images {num} go up to seed {first + num - 1}, and seeds end at {MAX_SEED}; "
            "lower one"
        )
    return range(first, first + num)


def _ascending(text: str) -> str:
    """`text`. Raises ValueError for a range that ends before it begins."""
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if dash and first.isdecimal() and last.isdecimal() and int(last) < int(first):
            raise ValueError(f"{part.strip()} ends before it begins")
    return text


def classes_of(text: str | None) -> Any:
    """The classes of --classes."""
    return parsed("--classes", text, numbers, "write classes such as 3,5")


def numbers(text: str) -> list[int]:
    """ "3,5" -> [3, 5]."""
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    """ "0.5,1" -> [0.5, 1.0]."""
    return [float(part) for part in text.split(",")]


def interval_of(text: str | None) -> Any:
    """The two levels of --guidance-interval. Raises UsageError."""
    if (values := parsed("--guidance-interval", text, floats, _TWO_LEVELS)) is not None and len(values) != 2:
        raise UsageError(f"--guidance-interval {text} has {len(values)} numbers; {_TWO_LEVELS}")
    return values and tuple(values)


def coefficient(option: str, text: str | None) -> float | list[float] | None:
    """The number, or those of a sweep, of --alpha and --beta. Raises UsageError."""
    values = parsed(option, text, floats, "write a number such as 4, or those of a sweep such as 1,2,4")
    return values[0] if values and len(values) == 1 else values


def lines_of(found: Mapping[str, Any], indent: str = "") -> str:
    """One "key value" line per entry; nested values indented."""
    lines = []
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}", lines_of(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{key}", *(lines_of(entry, indent + "  ") for entry in value)]
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            lines.append(f"{indent}{key:<{max(18 - len(indent), 1)}} {text}")
    return "\n".join(lines)
