"""What names of files, keys and classes, and values of recipes, may do to the terminal and to the report: nothing."""

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from ddo_cli import console
from ddo_cli.commands.command import lines_of
from ddo_cli.data import images
from ddo_cli.engines.panel import ROUNDS, Panel, _table
from ddo_cli.errors import LONGEST, CheckpointError, DataError, printable
from ddo_cli.recipe.load import load
from ddo_cli.report import html
from ddo_cli.report.charts import Chart
from ddo_cli.report.pictures import Curve

NASTY = {
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "markup": "[red]x[/] [bold",
    "backslash before markup": "\\[red]x\\\\[/red]",
    "closing nothing": "[/]",
    "link": "[link=file:///etc/passwd]x[/link]",
    "line": "x\nerror: disk: all is lost\r\x0b\x85\u2028",
    "right to left": "\u202egnp.exe\u2066",
    "half a character": "x\udcff",
    "nul": "a\0b",
    "long": "x" * 4000,
    "html": "</pre><script>alert(1)</script>&amp;\"'",
    "emoji code": ":boom:",
}


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def shown(request, monkeypatch):
    """What reaches stderr, as a pipe and as a terminal gets it."""
    text = io.StringIO()
    made = Console(file=text, force_terminal=request.param, color_system=None, emoji=False, soft_wrap=True)
    monkeypatch.setattr(console, "_err", made)
    monkeypatch.setattr(console, "_out", made)
    return text


@pytest.mark.parametrize("name", NASTY)
def test_names_are_shown_and_do_nothing(name, shown):
    value = NASTY[name]
    console.error("data", f"{value} cannot be read; remove it")
    console.warn(value)
    console.info(value)
    console.show(console.table(value, [value], [[value]]))
    with console.progress(value, 2, "images") as bar:
        bar.advance(fields=value)
    console.result({}, lines_of({value: value, "nested": {"a": [{value: [value]}]}}))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())  # Rich's own, which it writes to a terminal
    assert all(c.isprintable() or c in "\n\r" for c in text)
    lines = text.split("\n")
    assert not any(line.startswith("error: disk") for line in lines)
    assert lines[0].startswith("error: ")
    assert lines[0].endswith("cannot be read; remove it")
    assert len(lines[0]) <= LONGEST + len("error: ")
    if len(value) < 200:
        assert printable(value) in lines[0]


def page_of(value: str, place) -> str:
    """A report with this text wherever a user's can stand."""
    picture = place / "a.png"
    Image.new("L", (2, 2)).save(picture)
    shown, line = html.Picture(picture, value), Curve(value, [0, 1], [1, 2])
    blocks = [
        html.Text(value), html.Tiles([(value, value, value)]), html.Table(value, [value], [[value]]),
        html.Charts([Chart(value, [line, line], "images", value, [(value, 1.0)])]), html.Pictures([shown]),
        html.Compare(value, [shown, shown]), html.Folded(value, value),
    ]  # fmt: skip
    html.write(place / "r.html", html.Page(value, value, blocks, [html.Section(value, blocks)]))
    return (place / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NASTY)
def test_a_report_has_texts_and_no_elements(name, tmp_path):
    page, plain = page_of(NASTY[name], tmp_path), page_of("plain", tmp_path)
    assert re.findall(r"<[a-z]+", page) == re.findall(r"<[a-z]+", plain)
    assert page.count('"') == plain.count('"')  # so no text ends an attribute
    assert all(c.isprintable() or c == "\n" for c in page)
    assert set(page) - set(plain) <= set(map(chr, range(32, 127)))


def test_objects_are_left_out_of_messages(tmp_path):
    text = "cannot identify image file <_io.BytesIO object at 0x7f0c1a2b>; see PosixPath('/data/x.png')"
    assert str(CheckpointError(text)) == "cannot identify image file; see /data/x.png"
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image \(it is none of PNG, [^<]*\); replace"):
        images.open_images(str(tmp_path))


def test_problems_of_a_recipe_keep_their_lines(shown):
    console.error("recipe", f"x.yaml: a = 1\nx.yaml: {'b' * 4000}\nx.yaml: c\x1b; leave it out")
    lines = shown.getvalue().split("\n")
    assert [len(line) for line in lines] == [len("error: x.yaml: a = 1"), LONGEST, 27, 0]


def test_bars_and_panel_fit_the_smallest_terminal(monkeypatch):
    """80 x 24, and after a resize: no line is wrapped. Off a terminal there are lines for a log and no panel."""
    rounds = [
        {"round": number, "promoted": number != 2, "improvement": {"value": 3.5 - 2 * number, "std_error": 0.25},
         "repeats": [{"fid": 10.0 - number}, {"fid": 11.0 - number}]}
        for number in range(1, 20)
    ]  # fmt: skip
    state = {"metric": "fid", "reference": {"repeats": [{"fid": 12.0}]}, "rounds": rounds}
    shown = Panel(load("quickstart", ["finetune.rounds=20", "finetune.control=true"]))
    shown.begins(Path("runs/" + "long/" * 30), torch.nn.Linear(1000, 1000), torch.device("cpu"), state)
    with monkeypatch.context() as patch:
        patch.setattr("ddo_cli.engines.panel.time.monotonic", iter([0.0, 100.0]).__next__)
        shown.stepped(7680, False)
        shown.stepped(15360, False)
    for value, reached in ((9.5, 2560), (8.25, 5120), (8.75, 7680)):
        shown.scored("round 20/20", "fid", value, reached)
    for width in (80, 120):
        made = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=24)
        monkeypatch.setattr(console, "_err", made)
        with console.panel(lambda: shown.lines), console.progress("round 20/20", 7680, "images") as bar:
            bar.advance(2560, "step 40/120  " + "loss 2.47  " * 30)
            with console.progress("fid, seeds 0 to 4095", 4096, "images"):
                made = Console(file=(drawn := io.StringIO()), color_system=None, width=width)
                made.print(console._active.render())
        lines = drawn.getvalue().rstrip("\n").split("\n")
        assert len(lines) == 6 + 1 + ROUNDS
        assert all(len(line.rstrip()) <= width for line in lines)
        text = "\n".join(lines)
        assert "  fid, seeds 0 to 4095 " in text
        # 2 of 40 rounds in two measurements of which the first is the start: 1 in 100 s, 38 are left.
        assert "run: 5%, 1:03:20 left at most" in text
        assert "round 20/20: fid 8.75 at 7,680 images; best 8.25 at 5,120" in text
        assert "reference                 12" in text
        assert "round 19" in text
        assert "round 11" not in text
    assert "round 2 " in "\n".join(_table({**state, "rounds": rounds[:2]}, "fid"))
    assert "not promoted, worse by 0.50 ± 0.25" in _table({**state, "rounds": rounds[:2]}, "fid")[-1]
    with console.panel(tuple):
        stage = console.progress("ended early", 10, "images")
        stage.__enter__()
        stage.gen.close()  # as a generator that is closed where training ends before its last step
        assert not console._active.progress.tasks
    monkeypatch.setattr(console, "_err", Console(file=(text := io.StringIO()), force_terminal=False))
    with console.panel(lambda: shown.lines), console.progress("round 1/1", 10, "images") as bar:
        bar.advance(5)
    assert text.getvalue() == ""
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr("ddo_cli.console.time.monotonic", iter([0.0, 10.0]).__next__)
    with console.progress("pretraining", 1_000_000, "images") as bar:
        bar.advance(1000, "step 10/10000")
    assert text.getvalue() == "pretraining: 1,000/1,000,000 images (100 images/s, 2:46:30 left) step 10/10000\n"
