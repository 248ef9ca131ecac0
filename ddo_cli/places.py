"""Paths as users write them on command lines and in recipes: ~ for their home; names of what comes with the
program; addresses, which are not fetched.
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ddo_cli.errors import UsageError, printable

ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED = "embedded:"
WEIGHTS = ("ckpt", "disc", "guide_ckpt", "classifier")  # options and keys that take hf://user/name, see `hub`
_ADDRESS = re.compile(r"(?:^|[=,])((?:https?|ftp|s3|gs|hf|file):/+\S*)", re.IGNORECASE)
_HUB = "huggingface.co"
_LONGEST = 90  # characters of an address that is shown


def embedded_names() -> list[str]:
    """Names of the embedded weight files."""
    return sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def local(value: Any) -> Any:
    """A path that begins with ~ as a shell expands it, which leaves the one of --out=~/x as it is; in dicts and lists.

    Raises UsageError for the address of a file elsewhere, with the line that fetches it.
    """
    if isinstance(value, dict):
        fetched = {key: inner for key, inner in value.items() if key in WEIGHTS and str(inner).startswith("hf://")}
        return {key: inner if key in fetched else local(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [local(inner) for inner in value]
    is_path = isinstance(value, (str, os.PathLike))
    if is_path and (match := _ADDRESS.search(str(value))):
        raise UsageError(f"{printable(str(value), _LONGEST)} is not fetched; {_how_to_fetch(match[1])}")
    return type(value)(os.path.expanduser(value)) if is_path and str(value).startswith("~") else value


def of_environment(variable: str) -> str | None:
    """The path in an environment variable, which no shell has expanded where a file sets it; None without.

    Raises UsageError as `local`.
    """
    value = os.environ.get(variable)
    return value and str(local(value))


def _how_to_fetch(address: str) -> str:
    scheme, _, rest = re.sub(r":/+", "://", address).partition("://")  # a Path has lost one of its slashes
    host, _, place = rest.partition("/")
    if scheme.lower() == "file":
        return "give the path by itself"
    if scheme.lower() in ("s3", "gs"):
        return "copy it here with the tool of its store, and give the path"
    if scheme.lower() == "hf" or (host == _HUB and place.count("/") == 1):  # a repository
        name = place if host == _HUB else rest
        return f"run `hf download {shlex.quote(name[:_LONGEST])} --local-dir NAME`, and give NAME"
    raw = place.replace("/blob/", "/resolve/" if host == _HUB else "/raw/", 1)  # /blob/ is a page about the file
    name = shlex.quote(unquote(place.partition("?")[0].rpartition("/")[2])[:_LONGEST] or "NAME")
    whole = f"{scheme}://{host}/{raw}"
    return f"run `curl -L -o {name} {shlex.quote(whole) if len(whole) <= _LONGEST else 'ADDRESS'}`, and give {name}"
