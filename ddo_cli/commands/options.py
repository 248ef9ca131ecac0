"""Options that several commands share: each alone, and readers of several for `command.add`."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from typer import Argument, Option

from ddo_cli.commands import completion
from ddo_cli.commands.command import RUN
from ddo_cli.errors import UsageError, printable, reason

if TYPE_CHECKING:
    import torch

    from ddo_cli.engines.sampling import guides

MAX_SEED = 2**32 - 1  # generators keep 32 bits
NUM_IMAGES = 64  # images that are drawn unless told otherwise


# --- Single options


run_option = partial(Option, rich_help_panel=RUN)
of_weights = partial(Option, autocompletion=completion.weights)  # a weight file or the directory of a run

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
Images = Annotated[str, Argument(help="Images: a folder, zip, tar, parquet, npz, sample set, or embedded:<name>.")]
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
LogTo = Annotated[
    str,
    Option(
        help="Send figures and pictures to tensorboard, wandb, or a Python file with `tracker`; several between commas."
    ),
]


# --- Readers


def device_of(device: Device = None) -> "torch.device":
    """The device of --device. Raises UsageError if there is no such device."""
    from ddo_cli import dist

    return dist.init(device)


def device_and_models(model_file: ModelFile = None, device: Device = None) -> "torch.device":
    """The device of --device, once the Python file of --model-file has registered its models."""
    from ddo_cli.models import registry

    registry.load_file(model_file)
    return device_of(device)


def trackers(log_to: str) -> tuple[str, ...]:
    """The trackers that --log-to names. Raises UsageError for what cannot be had."""
    from ddo_cli import tracking  # which reads the schema, slow to import

    return tracking.parse(log_to)


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


class Prompts(NamedTuple):
    """What is typed of prompts. negative: None: not typed."""

    texts: tuple[str, ...] = ()
    negative: str | None = None


def prompts_of(
    prompt: Annotated[
        list[str] | None, Option(help="Of a text-to-image model: what to draw. May be given more than once.")
    ] = None,
    prompts: Annotated[Path | None, Option(help="File with a prompt in each line; empty lines are left out.")] = None,
    negative_prompt: Annotated[
        str | None, Option(help="What guidance leads away from, in place of the empty prompt.", show_default="none")
    ] = None,
) -> Prompts:
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
