"""The program `ddo`: the table of its commands, and how errors end it. The commands are in `commands/`."""

import errno
import io
import os
import signal
import sys
import threading
import time
import traceback
from typing import Annotated, Any

import typer

from ddo_cli import __version__, console
from ddo_cli.commands import about, completion, data, evaluate, sample, train, weights
from ddo_cli.commands.command import Command
from ddo_cli.commands.examples import EXAMPLES
from ddo_cli.errors import SIGNALS, DdoError

# Raised for a bad option, by click or by the copy of it inside newer versions of Typer.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    help="Improve trained image models: finetune with Direct Discriminative Optimization (DDO), or guide the sampling "
    "with a discriminator (DG).",
    no_args_is_help=True,
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
    "report": evaluate.report,
    "data": data.data,
    "pretrain": train.pretrain,
    "encode": weights.encode,
    "train-classifier": train.train_classifier,
    "train-extractor": train.train_extractor,
    "ema": weights.ema,
    "convert": weights.convert,
    "export": weights.export,
    "push": weights.push,
    "info": weights.info,
    "recipes": about.recipes,
    "doctor": about.doctor,
}
ALIASES = {"finetune": "finetune-ddo"}
for name in (*COMMANDS, *ALIASES):
    function = COMMANDS[ALIASES.get(name, name)]
    epilog = "\n\n".join(["Examples:", *EXAMPLES[ALIASES.get(name, name)]])
    app.command(name, cls=Command.of(function), help=function.__doc__, epilog=epilog, hidden=name in ALIASES)(
        lambda: None
    )


# --- Entry point


def main() -> None:
    """Runs a command. A user's mistake gives one message on stderr and exit code 2, never a traceback.

    A bug gives a traceback. One of several processes then exits at once: a regular exit would let NCCL wait for the
    others, which wait for this process.
    """
    for stream in (sys.stdout, sys.stderr):  # never fail because the terminal lacks UTF-8
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
    # An error in parsing the options must be JSON, too.
    console.use_json("--json" in sys.argv)
    try:
        # Of several processes the launcher ends all; one that waits for another could not be interrupted.
        is_main_thread = threading.current_thread() is threading.main_thread()  # no other can set it
        for number in SIGNALS if not _is_one_of_several() and is_main_thread else ():
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _terminated)
        with completion.of_whole_words():
            code = app(prog_name="ddo", standalone_mode=False)
    except DdoError as error:
        _fail(error.kind, str(error), error.code)
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # which has been printed
            _exit(2)
        problem = error.format_message().replace("Value error, ", "")  # of Typer's own checks
        _fail("usage", f"{problem} ({_help_of(error)} lists the options)", 2)
    except (typer.Abort, KeyboardInterrupt):
        _interrupted()
    except OSError as error:
        if error.strerror is None:
            raise
        # Without torch, only help can have been written.
        is_help = error.filename is None and "torch" not in sys.modules
        if (failed := _stdout_error() or (error if is_help else None)) is not None:
            _fail("disk", f"stdout: {failed.strerror}; send it elsewhere", 2)
        place = error.filename or "the output directory"
        _fail("disk", f"{place}: {error.strerror}; {_REMEDIES.get(error.errno or 0, 'choose another path')}", 2)
    else:
        if code == 130:  # newer Typer turns Ctrl-C into an exit code
            _interrupted()
        if "torch" in sys.modules:
            from ddo_cli import dist

            dist.shutdown()
        _exit(code if isinstance(code, int) else 0)


_AGAIN = "and run the same command again, it continues"
_REMEDIES = {
    errno.ENOSPC: f"make room {_AGAIN}",
    errno.EDQUOT: f"make room {_AGAIN}",
    errno.EFBIG: f"raise the limit of file sizes (ulimit -f) {_AGAIN}",
    errno.EMFILE: f"raise the limit of open files (ulimit -n) {_AGAIN}",
    errno.EIO: f"check the disk {_AGAIN}",
    errno.EROFS: "choose another place",
    errno.ENOLCK: "its file system has no locks; choose a place on another",
    errno.ENOTSUP: "its file system has no locks; choose a place on another",
    errno.EACCES: "change its permissions, or choose another place",
}
_signals: list[int] = []  # that have ended the command; none: Ctrl-C


def _terminated(number: int, _: object) -> None:
    """Ends the command as Ctrl-C does, so that temporary files are removed."""
    _signals.append(number)
    raise KeyboardInterrupt


def _interrupted() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, *SIGNALS):
            signal.signal(number, signal.SIG_DFL)  # a second one ends at once
    _fail("interrupted", INTERRUPTED, 128 + (_signals[0] if _signals else signal.SIGINT))


def _help_of(error: Any) -> str:
    """The command line that lists the options of the misused command."""
    context = getattr(error, "ctx", None)
    return "ddo --help" if context is None or context.parent is None else f"ddo {context.info_name} --help"


def _fail(kind: str, message: str, code: int) -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # let rank 0 print first: torchrun then ends all processes
    console.error(kind, message)
    _exit(code)


def _exit(code: int) -> None:
    """Ends the process; under torchrun without cleaning up.

    After a failure, a regular exit would wait for the other processes, which wait for this one; torchrun ends them.
    After success, gloo's threads may abort the interpreter that shuts them down.
    """
    if (failed := _stdout_error()) is not None:
        console.error("disk", f"stdout: {failed.strerror}; send it elsewhere")
        code = code or 2
    sys.stderr.flush()
    os._exit(code) if _is_one_of_several() else sys.exit(code)


def _stdout_error() -> OSError | None:
    """Why stdout cannot be written to; its buffer is then discarded."""
    try:
        sys.stdout.flush()
    except OSError as error:
        console.release_stdout()
        return error
    return None


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1  # not by `dist`, which imports torch
