"""Commands about data: `data`."""

import re
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from ddo_cli import console
from ddo_cli.commands import command, options
from ddo_cli.errors import UsageError, printable


def data(
    source: Annotated[str, Argument(help="Pictures: a folder, zip, tar, parquet, npz, or any other set of images.")],
    out: Annotated[Path, Option(help="The .zip file to write.")],
    size: Annotated[
        str | None, Option(metavar=options.SIZE, help="Size of the images in pixels. Default: that of all pictures.")
    ] = None,
    crop: Annotated[
        Literal["center", "center-adm", "center-celeba", "pad", "none"],
        Option(
            help="Of other proportions: keep the centre, by Lanczos (EDM) or by box and bicubic (ADM, EDM2), or 140 x "
            "140 pixels (CelebA); pad; or stretch.",
        ),
    ] = "center",
    rgb: Annotated[bool, Option("--rgb", help="RGB images. Default: grey if all pictures are grey, else RGB.")] = False,
    grey: Annotated[bool, Option("--grey", help="Grey images.")] = False,
    background: Annotated[
        str | None,
        Option(
            metavar="white|black|#RRGGBB",
            help="Colour below transparent pixels and around padded images. Default: white and black.",
        ),
    ] = None,
    upscale: Annotated[bool, Option("--upscale", help="Enlarge smaller pictures; refused otherwise.")] = False,
    dry_run: options.DryRun = False,
) -> command.Result:  # fmt: skip
    """Make a zip of equal images, as EDM's tool does, of pictures of any size, mode and format."""
    if rgb and grey:
        raise UsageError("--rgb and --grey exclude each other; leave one of them out")
    colour = None if background is None else _colour(background)
    from ddo_cli.data import pictures
    from ddo_cli.engines import prepare

    figures = prepare.run(
        source, out, size=options.size_of("--size", size), crop=crop,
        mode="RGB" if rgb else "L" if grey else None, background=colour, upscale=upscale, dry_run=dry_run,
    )  # fmt: skip
    rows = [(pictures.EFFECTS[key].format(**figures), f"{count:,}") for key, count in figures["effects"].items()]
    rows += [("left out", f"{figures['left_out']:,}")] if figures["left_out"] else []
    title = f"{out}: {figures['num_images']:,} images"
    table = console.table(title, ["what is done", "images"], rows) if rows else None
    hidden = ("effects", "left_out", "problems", "classes", "background", "padding")
    return command.Result(figures, {key: value for key, value in figures.items() if key not in hidden}, table)


def _colour(text: str) -> tuple[int, int, int]:
    code = {"white": "#ffffff", "black": "#000000"}.get(text.lower(), text)
    if not re.fullmatch("#[0-9a-fA-F]{6}", code):
        raise UsageError(f"--background {printable(text, 40)} is no colour; write white, black or one like #80c0ff")
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)
