"""The program: its commands by name, and what becomes of errors. The commands themselves are in `commands/`."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
import traceback
from typing import Annotated, Any

import typer

from ddo_cli import __version__, console
from ddo_cli.commands import evaluate, sample, train, weights
from ddo_cli.commands.options import Command
from ddo_cli.errors import DdoError

# Newer Typer carries its own copy of click, older ones import it: either way this is what a bad option raises.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Improve trained image models: finetune with Direct Discriminative Optimization (DDO), or guide the sampling "
    "with a discriminator (DG).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = "interrupted; the same command continues where it can"


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"ddo {__version__}")
        raise typer.Exit


COMMANDS = {  # in the order of the help text
    "sample": sample.sample,
    "finetune-ddo": train.finetune_ddo,
    "train-disc": train.train_disc,
    "guide-sample": sample.guide_sample,
    "fid": evaluate.fid,
    "stats": evaluate.stats,
    "edit": sample.edit,
    "analyze": evaluate.analyze,
    "pretrain": train.pretrain,
    "encode": weights.encode,
    "train-classifier": train.train_classifier,
    "train-extractor": train.train_extractor,
    "ema": weights.ema,
    "convert": weights.convert,
    "export": weights.export,
    "info": weights.info,
    "recipes": weights.recipes,
}
for name, function in COMMANDS.items():
    app.command(name, cls=Command.of(function), help=function.__doc__)(lambda: None)


# ---------------------------------------------------------------------------------------------------------------------
# Entry point


def main() -> None:
    """Runs a command; a user's mistake is one message on stderr and exit code 2, never a traceback.

    Our own mistakes are tracebacks. Of several processes one that has made it ends at once, like one that met the
    user's: on its way out of the interpreter, NCCL would wait for the others, who wait for it.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without our letters is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _run()
    except Exception:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        _exit(1)


def _run() -> None:
    # Options are parsed after this; an error before --json is read must still answer in JSON.
    console.use_json("--json" in sys.argv)
    try:
        code = app(standalone_mode=False)
    except DdoError as error:
        _fail(error.kind, str(error), 2)
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is already there
            _exit(2)
        _fail("usage", f"{error.format_message()} ({_help_of(error)} lists the options)", 2)
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
        # Without torch nothing has been written but help.
        is_help = error.filename is None and "torch" not in sys.modules
        if (failed := _stdout_error() or (error if is_help else None)) is not None:
            _fail("disk", f"stdout: {failed.strerror}; send it elsewhere", 2)
        place = error.filename or "the output directory"
        _fail("disk", f"{place}: {error.strerror}; {remedies.get(error.errno or 0, 'choose another path')}", 2)
    else:
        if code == 130:  # newer Typer turns Ctrl-C into an exit code
            _fail("interrupted", INTERRUPTED, 130)
        if "torch" in sys.modules:
            from ddo_cli import dist

            dist.shutdown()
        _exit(code if isinstance(code, int) else 0)


def _help_of(error: Any) -> str:
    """The line that shows the options of the command that was misused."""
    context = getattr(error, "ctx", None)
    names = [] if context is None or context.parent is None else [context.info_name]
    return " ".join(["ddo", *names, "--help"])


def _fail(kind: str, message: str, code: int) -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # the main process's message comes first, before torchrun ends them all
    console.error(kind, message)
    _exit(code)


def _exit(code: int) -> None:
    """Ends the process; under torchrun at once.

    After a failure, leaving the process group in the regular way would wait for the others, who wait for this process;
    torchrun ends them once this one has. After success, gloo's threads may abort an interpreter that takes them down.
    """
    if (failed := _stdout_error()) is not None:
        console.error("disk", f"stdout: {failed.strerror}; send it elsewhere")
        code = code or 2
    sys.stderr.flush()
    os._exit(code) if _is_one_of_several() else sys.exit(code)


def _stdout_error() -> OSError | None:
    """Why stdout cannot be written to, which then is let go."""
    try:
        sys.stdout.flush()
    except OSError as error:
        console.release_stdout()
        return error
    return None


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1  # `dist` would load torch
