"""Commands about the program itself: `recipes`, `doctor`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ddo_cli.commands import command
from ddo_cli.errors import UsageError


def recipes(
    name: Annotated[str | None, Argument(help="Print this recipe, of the program or a YAML file.")] = None,
    copy: Annotated[
        Path | None, Option(help="Write a copy of the recipe to this new file, to be edited and given as --recipe.")
    ] = None,
    keys: Annotated[bool, Option("--keys", help="Every key of a recipe instead: default, type, meaning.")] = False,
) -> command.Result:
    """The recipes that come with the program; with a name, that recipe."""
    if name is None and copy is not None:
        raise UsageError(
            f"--copy {copy} needs the name of a recipe before it, e.g. ddo recipes quickstart --copy {copy}"
        )
    if name is not None and keys:
        raise UsageError(f"--keys are those of every recipe, not of {name}; leave one of them out")
    if name is not None:
        return _one(name, copy)
    return _keys() if keys else _all()


def _all() -> command.Result:
    from ddo_cli.recipe.load import recipe_names

    headers = {name: path.read_text(encoding="utf-8").splitlines() for name, path in recipe_names().items()}
    return command.Result(
        {
            name: next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
            for name, lines in headers.items()
        }
    )


def _keys() -> command.Result:
    from ddo_cli.recipe.keys import described

    known = {key.name: key for key in described()}
    lines = [f"{key.name:<36} {json.dumps(key.default):<14} {key.type}; {key.meaning}" for key in known.values()]
    return command.Result({name: key._asdict() for name, key in known.items()}, {}, text="\n".join(lines))


def _one(name: str, copy: Path | None) -> command.Result:
    from ddo_cli.files import write_text
    from ddo_cli.recipe.load import find_recipe, load

    file = find_recipe(name)
    recipe = load(name)  # refuses a file that is no recipe
    text = file.read_text(encoding="utf-8")
    figures = {"name": recipe.name, "file": str(file), "recipe": recipe.model_dump(mode="json")}
    if copy is None:
        return command.Result(figures, {}, text=text.rstrip("\n"))
    if copy.is_dir() or copy.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--copy {copy} is not the name of a YAML file; write for example --copy mine.yaml")
    if copy.exists():
        raise UsageError(f"--copy {copy}: there is such a file already; choose another name")
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_text(copy, text)
    return command.Result({**figures, "copy": str(copy)}, {"copy": str(copy), "use": f"--recipe {copy}"})


def doctor() -> command.Result:
    """What of this machine matters: versions, devices, disk, cache, weights; to paste into an issue."""
    from ddo_cli.engines import doctor

    figures = doctor.run()
    return command.Result(figures, {}, text=doctor.screen(figures))
