"""What the shell completes: recipes, recipe keys with their values, weight files, runs. Typer talks to the shell."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddo_cli.places import EMBEDDED, embedded_names

if TYPE_CHECKING:
    from ddo_cli.recipe.keys import Key

VARIABLE = "_DDO_COMPLETE"  # Typer's; set while a shell asks
RUNS = Path("runs")


def choices(*values: str) -> Callable[[str], list[str]]:
    """Completes one of these."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Names of the program's recipes, and YAML files."""
    from ddo_cli.recipe.load import recipe_names

    names = [name for name in recipe_names() if name.startswith(incomplete)]
    return [*names, *_paths(incomplete, ".yaml", ".yml")]


def weights(incomplete: str) -> list[str]:
    """Runs below runs/, embedded models, weight files and directories that may hold some."""
    runs = [str(state.parent) for state in sorted(RUNS.glob("*/state.json"))]
    models = [f"{EMBEDDED}{name}" for name in embedded_names() if not name.startswith("extractor-")]
    found = [name for name in (*runs, *models) if name.startswith(incomplete)]
    return found or list(_paths(incomplete, ".safetensors"))


def _paths(incomplete: str, *suffixes: str) -> Iterator[str]:
    """Files of these suffixes and directories whose paths begin so; hidden ones only where they are asked for."""
    folder, start = os.path.split(incomplete)
    for path in sorted(Path(folder).glob("*")) if Path(folder or ".").is_dir() else []:
        if path.name.startswith(start) and (start or not path.name.startswith(".")):
            if path.is_dir():
                yield f"{os.path.join(folder, path.name)}/"
            elif path.suffix in suffixes:
                yield os.path.join(folder, path.name)


def recipe_keys(incomplete: str) -> list[str]:
    """KEY=VALUE arguments of a recipe."""
    return _settings("", incomplete)


def sampling_keys(incomplete: str) -> list[str]:
    """KEY=VALUE arguments of sampling, whose keys stand without their section."""
    return _settings("sampling.", incomplete)


def _settings(section: str, incomplete: str) -> list[str]:
    """Keys with their equals sign; of one key alone its values, too, of which the default is an example."""
    from ddo_cli.recipe.keys import described

    known = {key.name.removeprefix(section): key for key in described() if key.name.startswith(section)}
    name, equals, _ = incomplete.partition("=")
    matches = [key for key in known if key == name] if equals else [key for key in known if key.startswith(name)]
    found = [f"{key}=" for key in matches]
    if len(matches) == 1:
        found += [f"{matches[0]}={value}" for value in values_of(known[matches[0]])]
    return [text for text in found if text.startswith(incomplete) and text != incomplete]


def values_of(key: "Key") -> list[str]:
    """Values of a recipe key as they are typed: all, where they can be counted, else the default."""
    if counted := _counted(key):
        return counted
    return [] if key.default is None or isinstance(key.default, (dict, list)) else [str(key.default)]


def of_key(key: "Key") -> Callable[[str], list[str]] | None:
    """Completes the option of a recipe key; None: with files, as the shell does."""
    if key.name == "model.ckpt":
        return weights
    return choices(*counted) if (counted := _counted(key)) else None


def _counted(key: "Key") -> list[str]:
    from ddo_cli.diffusion.samplers import SAMPLERS

    if key.name == "sampling.sampler":
        return list(SAMPLERS)
    if re.search(r"\b(text|number|integer|mapping|list|any)\b", key.type):
        return []
    return [value for value in key.type.split(" | ") if value != "null"]


# --- Bash


@contextlib.contextmanager
def of_whole_words() -> Iterator[None]:
    """Completes words with = and :, which bash cuts there: they are joined before, and answers are cut again."""
    if os.environ.get(VARIABLE) != "complete_bash" or "COMP_CWORD" not in os.environ:
        yield
        return
    cut = os.environ.get("COMP_WORDS", "").split("\n")
    number = int(os.environ["COMP_CWORD"])
    words, done = _joined([*cut, *[""] * (number + 1 - len(cut))][: number + 1])
    os.environ.update(COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1))
    answer = io.StringIO()
    try:
        with contextlib.redirect_stdout(answer):
            yield
    finally:
        lines = answer.getvalue().splitlines()
        sys.stdout.write("".join(f"{line.removeprefix(done)}\n" for line in lines))


def _joined(cut: Sequence[str]) -> tuple[list[str], str]:
    """The words up to the cursor as they were typed, and what of the last one bash leaves as it is."""
    words, done = list(cut[:1]), ""
    for part in cut[1:]:
        is_break = part in ("=", ":")
        if len(words) > 1 and (is_break or words[-1].endswith(("=", ":"))):
            done = words[-1] + part if is_break else words[-1]
            words[-1] += part
        else:
            words.append(part)
            done = ""
    return words, done
