"""Libraries of the extras: imported where they are needed; that takes seconds, and they may be missing."""

import importlib
import logging
from types import ModuleType

from ddo_cli.errors import DdoError, UsageError, reason


def imported(needed_by: str, name: str, extra: str, error: type[DdoError] = UsageError) -> ModuleType:
    """The module of this name, such as "peft" or "pyarrow.parquet". needed_by: begins the message, "adapters need".

    Raises `error`, with the line that installs the extra, where it cannot be imported.
    """
    package = name.partition(".")[0]
    # peft and diffusers import it where it is there, and it warns of kernels for 4 bits, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        importlib.import_module(package)  # also where a part of it is there from before
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as problem:  # lazy imports turn the first into the second
        raise error(
            f"{needed_by} the library {package}, which cannot be imported ({reason(problem, 80)}); "
            f"install it: pip install 'ddo-cli[{extra}]'"
        ) from None
