"""The page of `ddo pretrain`, of models and of tokenizers."""

from typing import Any

from ddo_cli import rundir
from ddo_cli.engines import pages
from ddo_cli.files import read_json
from ddo_cli.metrics.uncertainty import mean
from ddo_cli.recipe.schema import Recipe
from ddo_cli.report import html
from ddo_cli.report.html import Picture, Section


def page(run_dir: rundir.RunDir, recipe: Recipe, state: dict[str, Any]) -> html.Page:
    """Of a run at any stage."""
    headline, tiles, file = "", list[tuple[str, str, str]](), run_dir.path / "metrics.json"
    if state.get("finished") and file.is_file():
        key, figures = state["metric"], read_json(file, list)
        score, of_image = mean([one[key] for one in figures]), "samples"
        if "image_error" in state:
            of_image = "reconstructions"
            tiles.append(("mean squared error", f"{state['image_error']:.4g}", "of pixels in [-1, 1]"))
        name, images = recipe.model.name, recipe.pretrain.images
        headline = f"After {images:,} images, {key} of the {of_image} of {name} is {score} (lower is better)."
        tiles.insert(
            0, (key, str(score), f"{len(figures)} ranges of seeds" if len(figures) > 1 else "one range of seeds")
        )
    results: list[html.Block] = (
        [html.Tiles(tiles), pages.protocol(recipe, run_dir.final, state["metric"])] if tiles else []
    )
    grid = Picture(
        run_dir.path / "grid.png", "images and their reconstructions" if "image_error" in state else "samples"
    )
    return pages.of_training(
        run_dir, recipe, state, "Pretraining", headline, [Section("Result", [*results, html.Pictures([grid])])]
    )
