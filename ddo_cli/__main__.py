"""The program `ddo`, also as `python -m ddo_cli`. Here, since Ctrl-C may come while its modules are imported."""

import os
import signal
import sys


def main() -> None:
    """Runs the program; exit code 130 without a traceback where it is interrupted before it has begun."""
    try:
        from ddo_cli import cli
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)  # what is half imported cannot be cleaned up
    cli.main()


if __name__ == "__main__":
    main()
