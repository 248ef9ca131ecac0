"""The frame of reports, and `ddo report` of each kind of directory."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU

from ddo_cli.engines import pages
from ddo_cli.engines import report as engine
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.errors import RunError, UsageError
from ddo_cli.metrics.uncertainty import mean
from ddo_cli.recipe.load import load
from ddo_cli.report import charts, html, pictures
from ddo_cli.report.charts import Chart
from ddo_cli.report.pictures import Curve
from ddo_cli.rundir import locked


@pytest.mark.usefixtures("real_pictures")
def test_a_page_needs_nothing_from_anywhere(tmp_path):
    pictures.contact_sheet(np.zeros((5, 3, 8, 8), dtype=np.uint8), tmp_path / "grid.png")
    pictures.contact_sheet(np.random.default_rng(0).normal(size=(5, 2)), tmp_path / "points.png")
    pictures.densities({"p": np.ones((4, 4))}, (0, 1, 0, 1), tmp_path / "density.png")
    names = ["grid.png", "points.png", "density.png", "missing.png"]
    shown = [html.Picture(tmp_path / name, f"<{name}>") for name in names]
    chart = Chart("score", [Curve("a", [0, 1], [1, 2])], "images")
    blocks = [html.Pictures(shown), html.Charts([chart]), html.Compare("round", shown)]
    html.write(tmp_path / "r.html", html.Page("title & more", "s", blocks, [html.Section("empty", [html.Charts([])])]))
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # the missing one is left out, twice
    assert base64.b64encode((tmp_path / "grid.png").read_bytes()).decode() in page
    assert "title &amp; more" in page
    assert "<h2>" not in page  # nor a section without content
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    outside = re.findall(r"""(?:src|href|url|@import|action)\s*[=(]?\s*["'(]?(?!data:image/png|#)[a-z]+:""", page)
    assert not outside
    assert "http" not in page
    assert page.count("<img ") == page.count(' alt="&lt;') == 6
    assert page.count("<svg ") == page.count('<svg role="img" aria-label="score, by images. a: 2 points') == 1


def test_one_picture_is_not_compared(tmp_path):
    pictures.contact_sheet(np.zeros((2, 3, 8, 8), dtype=np.uint8), tmp_path / "grid.png")
    alone = html.Compare("round", [html.Picture(tmp_path / "grid.png", "")])
    html.write(tmp_path / "r.html", html.Page("t", "h", [alone], []))
    assert "<script" not in (tmp_path / "r.html").read_text()


@pytest.mark.usefixtures("real_pictures")
def test_a_chart_is_in_the_colours_of_the_page_and_always_the_same():
    lines = [Curve(str(number), [0, 1, 2], [3.0, 1.0, 2.0], error=[0.1, None, 0.2]) for number in range(5)]
    chart = Chart("x", lines, "round", levels=[("published", 1.5)], breaks=[1])
    drawn = charts.svg(chart)
    assert drawn == charts.svg(chart)
    assert not re.findall(r"#[0-9a-f]{6}|fill: black|stroke: black", drawn)
    assert {f"var(--c{number})" for number in range(4)} <= set(re.findall(r"var\(--\w+\)", drawn))
    assert "published: 1.5." in charts.described(chart)


def test_long_lines_are_thinned_and_keep_their_mean():
    x, y = charts.thinned(range(3001), [float(value % 7) for value in range(3001)])
    assert len(x) == len(y) <= charts.MOST_POINTS
    assert np.average(y, weights=[11] * (len(y) - 1) + [3001 - 11 * (len(y) - 1)]) == pytest.approx(3.0, abs=0.01)


def test_lines_are_cut_where_a_round_begins():
    line = Curve("r", [1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0])
    assert [piece.x for piece in charts._pieces(line, [2])] == [[1, 2], [3, 4]]
    assert charts._pieces(line, []) == [line]


def test_hours_count_every_process():
    log = [{"images": n, "n_images": n, "images_per_second": 10.0, "processes": 2} for n in (36_000, 72_000)]
    tiles = pages.cost([log, log]).blocks[0]
    assert tiles.tiles[0][1] == "8"  # 2 logs of 2 hours on 2 processes
    assert tiles.tiles[2][1] == "144,000"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    settings = [
        "model.options={patch: 4, widths: [8], depths: [1], emb_width: 8}",
        "pretrain.images=48",
        "pretrain.batch=16",
        "pretrain.log_every=1",
    ]
    settings += ["data.num=64", "metric.num_images=16", "metric.repeats=2", "sampling.steps=2"]
    recipe = load("quickstart", settings)
    pretrain.run(recipe, tmp_path_factory.mktemp("pretrain") / "run", device=CPU)
    return tmp_path_factory.getbasetemp() / "pretrain0" / "run"


def test_pretraining_has_a_page_that_can_be_made_again(pretrained, tmp_path):
    page = (pretrained / "report.html").read_text()
    scores = [one["fd_embedded"] for one in json.loads((pretrained / "metrics.json").read_text())]
    assert f"fd_embedded of the samples of patch-unet is {mean(scores)} (lower is better)" in page
    assert all(f"<h3>{title}</h3>" in page for title in ("Loss", "Gradient norm", "Learning rate", "Images per second"))
    for row in ("pretrain.images", "model.options.widths"):
        assert f"<td>{row}</td>" in page  # of the recipe only what differs
    assert "<td>pretrain.lr</td>" not in page
    assert "Unfinished" not in page
    (pretrained / "report.html").unlink()
    assert engine.run(pretrained)["report"] == str(pretrained / "report.html")
    assert (pretrained / "report.html").read_text() == page
    with locked(pretrained), pytest.raises(RunError, match="in use by another process"):
        engine.run(pretrained)
    assert engine.run(pretrained, tmp_path / "elsewhere.html")["headline"] in (tmp_path / "elsewhere.html").read_text()


def test_what_is_no_run_is_refused(tmp_path, pretrained):
    with pytest.raises(UsageError, match=r"is no directory; give one that finetune-ddo"):
        engine.run(tmp_path / "none")
    with pytest.raises(UsageError, match=r"without figures of a run"):
        engine.run(tmp_path)
    with pytest.raises(UsageError, match=r"--out x\.pdf is not the name of a page"):
        engine.run(pretrained, Path("x.pdf"))
