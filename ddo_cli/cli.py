"""The commands: thin functions that read options, import an engine, and show what it returns."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddo_cli import __version__, console
from ddo_cli.errors import DdoError, UsageError

if TYPE_CHECKING:
    import torch

    from ddo_cli.recipe import Recipe

# Newer Typer carries its own copy of click, older ones import it: either way this is what a bad option raises.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Finetune likelihood-based image models with Direct Discriminative Optimization (DDO).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = "interrupted; the same command continues where it can"
MAX_SEED = 2**32 - 1  # generators keep 32 bits

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")]
ModelFile = Annotated[str | None, typer.Option(help="Python file that registers your own model.")]
RecipeName = Annotated[str, typer.Option(help="A recipe by name (see `ddo recipes`) or a YAML file.")]
Data = Annotated[
    str | None,
    typer.Option(help="Real images: a folder, zip, npz, or embedded:<name>."),
]
Out = Annotated[Path | None, typer.Option(help="Directory of the run. Default: runs/<recipe>.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any recipe key, e.g. finetune.ema_half_life=500."),
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"ddo {__version__}")
        raise typer.Exit


@app.command()
def sample(
    ckpt: Annotated[str, typer.Option(help="Weights: a safetensors file or embedded:<name>.")] = "embedded:digits32",
    # torchrun takes --num for an abbreviation of an option of its own; the longer name passes.
    num: Annotated[int, typer.Option("--num", "--num-images", min=1, help="How many.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="First seed.")] = 0,
    seeds: Annotated[str | None, typer.Option(help="Seeds such as 0-49999 or 3,7,10-20.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Only these classes, e.g. 3,5. Default: all, balanced."),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, heun (EDM) or dpmpp-2m.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    s_churn: Annotated[float | None, typer.Option(help="EDM's stochasticity.")] = None,
    cfg_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance, 1 = off."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per network pass.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the sample set.")] = Path("samples"),
    form: Annotated[str, typer.Option("--format", help="png, npz or shards.")] = "png",
    model_file: ModelFile = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Other sampling keys, e.g. sigma_max=20 top_k=5."),
    ] = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Draw samples: each image depends on its own seed only. Run again to continue."""
    console.use_json(json_)
    from ddo_cli.data.samples import Format, parse_seeds
    from ddo_cli.engines import sample as engine
    from ddo_cli.models import registry
    from ddo_cli.recipe import parse_sampling

    form_: Format = _choice("--format", form, ("png", "npz", "shards"))
    flags = {"sampler": sampler, "steps": steps, "s_churn": s_churn, "cfg_scale": cfg_scale, "batch": batch}
    sampling = parse_sampling(overrides or [], flags)
    registry.load_file(model_file)
    found = engine.run(
        ckpt,
        _parse("--seeds", seeds, parse_seeds, "write seeds such as 0-49999 or 3,7,10-20") or range(seed, seed + num),
        out,
        form=form_,
        classes=_parse("--classes", classes, _numbers, "write classes such as 3,5"),
        sampling=sampling,
        device=_device(device),
        dry_run=dry_run,
    )
    console.result(found, _lines(found))


@app.command("finetune-ddo")
def finetune_ddo(
    recipe: RecipeName = "quickstart",
    ckpt: Annotated[
        str | None,
        typer.Option(help="Reference to improve: a safetensors file or embedded:<name>."),
    ] = None,
    data: Data = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of self-play.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the fake term.")] = None,
    beta: Annotated[float | None, typer.Option(help="Scale of the log-ratio.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Real images per step, over all processes.")] = None,
    images_per_round: Annotated[int | None, typer.Option(help="Real images per round.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Images between candidates.")] = None,
    num_fake: Annotated[int | None, typer.Option(help="Samples of the reference per round.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, tf32 or bf16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Out = None,
    model_file: ModelFile = None,
    overrides: Overrides = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Finetune a model in rounds of self-play with the DDO loss. Run again to continue."""
    console.use_json(json_)
    given = {
        "seed": seed, "data.source": data, "model.ckpt": ckpt, "model.file": model_file,
        "finetune.rounds": rounds, "finetune.alpha": alpha, "finetune.beta": beta, "finetune.lr": lr,
        "finetune.batch": batch, "finetune.images_per_round": images_per_round, "finetune.eval_every": eval_every,
        "finetune.num_fake": num_fake, "finetune.precision": precision,
    }  # fmt: skip
    from ddo_cli import rundir
    from ddo_cli.engines import finetune_ddo as engine
    from ddo_cli.engines import finetune_report

    settings = _recipe(recipe, overrides, given)
    found = engine.run(settings, out or Path("runs") / settings.name, device=_device(device), dry_run=dry_run)
    if dry_run:
        console.result(found, _lines(found))
        return
    columns, rows = finetune_report.table_of(rundir.RunDir(Path(found["out"])), found["metric"])
    shown = {"final": found["final"], "report": str(Path(found["out"]) / "report.html")}
    console.result(found, _lines(shown), console.table("DDO by round (lower is better)", columns, rows))


@app.command()
def pretrain(
    recipe: RecipeName = "quickstart",
    data: Data = None,
    images: Annotated[int | None, typer.Option(help="Images to train on, repeats counted.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, tf32 or bf16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the run. Default: runs/<recipe>-pretrain."),
    ] = None,
    model_file: ModelFile = None,
    overrides: Overrides = None,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Train a model by maximum likelihood, to have a reference. Run again to continue."""
    console.use_json(json_)
    given = {
        "seed": seed, "data.source": data, "model.file": model_file, "pretrain.images": images, "pretrain.lr": lr,
        "pretrain.batch": batch, "pretrain.precision": precision,
    }  # fmt: skip
    from ddo_cli.engines import pretrain as engine

    settings = _recipe(recipe, overrides, given, own_model=True)
    out = out or Path("runs") / f"{settings.name}-pretrain"
    found = engine.run(settings, out, device=_device(device), dry_run=dry_run)
    console.result(found, _lines(found))


@app.command("train-extractor")
def train_extractor(
    data: Annotated[str, typer.Option(help="Labelled images: a folder, zip, npz, or embedded:<name>.")],
    out: Annotated[Path, typer.Option(help="The weight file to write.")],
    held_out: Annotated[
        str | None,
        typer.Option(help="Images for the accuracy. Default: a tenth of the data."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to train on, repeats counted.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    device: Device = None,
    dry_run: DryRun = False,
    json_: Json = False,
) -> None:
    """Train a small classifier whose features measure a Fréchet distance where Inception does not fit."""
    console.use_json(json_)
    from ddo_cli.engines import train_extractor as engine

    found = engine.run(data, out, held_out=held_out, images=images, seed=seed, device=_device(device), dry_run=dry_run)
    console.result(found, _lines(found))


@app.command()
def fid(
    source: Annotated[str, typer.Argument(help="Images: a folder, zip, npz, or sample set.")],
    ref: Annotated[
        str | None,
        typer.Option(help="Reference images, or .npz with mu and sigma. Default: embedded:digits32."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Inception-v3 weights of torch-fidelity. Without: the embedded extractor."),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(help="An extractor of `ddo train-extractor`, instead of Inception."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 256,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Fréchet distance between a set of images and a reference."""
    console.use_json(json_)
    from ddo_cli.engines import fid as engine

    metric: Any = "fd_embedded" if extractor else "fid"
    found = engine.run(source, ref, metric, weights=weights, extractor=extractor, batch=batch, device=_device(device))
    console.result(found, _lines(found))


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="A weight file, sample set, run directory, or embedded:<name>.")],
    json_: Json = False,
) -> None:
    """What a checkpoint, sample set or run holds: model, provenance, hashes."""
    console.use_json(json_)
    from ddo_cli.engines import info as engine

    found = engine.run(path)
    console.result(found, _lines(found))


@app.command()
def recipes(json_: Json = False) -> None:
    """The recipes that come with the program."""
    console.use_json(json_)
    from ddo_cli.recipe import recipe_names

    found = {
        name: next((line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")), "")
        for name, path in recipe_names().items()
    }
    console.result(found, _lines(found))


# ---------------------------------------------------------------------------------------------------------------------
# Options -> values


def _recipe(name: str, overrides: list[str] | None, given: dict[str, Any], own_model: bool = False) -> Recipe:
    """The resolved recipe. own_model: the recipe's model section is used, so its options are checked as well."""
    from ddo_cli import recipe as recipes_
    from ddo_cli.models import registry

    def check(recipe: Recipe) -> list[str]:
        registry.load_file(recipe.model.file)
        return registry.problems(recipe.model.name, recipe.model.options, recipe.model.draw)

    return recipes_.load(name, overrides or [], given, check if own_model else None)


def _device(name: str | None) -> torch.device:
    import torch

    from ddo_cli import dist

    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {name} is not known; use cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; leave the option out or use cpu")
    return dist.init(name)


def _choice(option: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise UsageError(f"{option} {value} is not known; use one of {', '.join(known)}")
    return value


def _parse(option: str, text: str | None, parse: Any, remedy: str) -> Any:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise UsageError(f"{option} {text} cannot be read ({error}); {remedy}") from None


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _lines(found: Mapping[str, Any], indent: str = "") -> str:
    """One "key value" line per entry; nested values indented."""
    lines = []
    for key, value in found.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}", _lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{key}", *(_lines(entry, indent + "  ") for entry in value)]
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            lines.append(f"{indent}{key:<{max(18 - len(indent), 1)}} {text}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Entry point


def main() -> None:
    """Runs a command; a user's mistake is one message on stderr and exit code 2, never a traceback."""
    # Options are parsed after this; an error before --json is read must still answer in JSON.
    console.use_json("--json" in sys.argv)
    try:
        code = app(standalone_mode=False)
    except DdoError as error:
        _fail(error.kind, str(error), 2)
    except _ClickException as error:
        _fail("usage", f"{error.format_message()} (ddo --help lists the options)", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", INTERRUPTED, 130)
    except OSError as error:
        if error.strerror is None:
            raise
        remedies = {
            errno.ENOSPC: "make room and run the same command again, it continues",
            errno.EDQUOT: "make room and run the same command again, it continues",
            errno.EACCES: "change its permissions, or choose another place",
            errno.EROFS: "choose another place",
        }
        place = error.filename or "the output directory"
        _fail("disk", f"{place}: {error.strerror}; {remedies.get(error.errno or 0, 'choose another path')}", 2)
    else:
        if code == 130:  # newer Typer turns Ctrl-C into an exit code
            _fail("interrupted", INTERRUPTED, 130)
        if "torch" in sys.modules:
            from ddo_cli import dist

            dist.shutdown()
        sys.exit(code if isinstance(code, int) else 0)


def _fail(kind: str, message: str, code: int) -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # the main process's message comes first, before torchrun ends them all
    console.error(kind, message)
    sys.stdout.flush()
    sys.stderr.flush()
    # Leaving the process group in the regular way would wait for the others, who wait for this process; torchrun
    # ends them once this one has.
    os._exit(code) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else sys.exit(code)
