"""Parsers of recipes, runs and tables."""

import csv
import io
import json
from pathlib import Path
from unittest import mock

from harness import Target
from hypothesis import strategies as st
from mutations import Inputs, dumps, files, json_near, near
from seeds import models, networks, tensors_file, weights_near

from ddo_cli import console
from ddo_cli.engines.fid import report as fid_report
from ddo_cli.engines.sampling import guides
from ddo_cli.engines.weights import info
from ddo_cli.errors import RecipeError
from ddo_cli.recipe.load import DEFAULT_RECIPE, find_recipe, load, parse_sampling, repeated
from ddo_cli.rundir import RunDir


def of_info() -> Inputs:
    run_state = {
        "command": "finetune-ddo", "reference_sha256": "0" * 64, "reference": {"score": 1.5}, "finished": True,
        "score": 1.0, "rounds": [{"round": 1, "score": 1.0, "promoted": True}], "settled": {"precision": "float32"},
    }  # fmt: skip
    manifest = {"format": "png", "num": 3, "seeds": "0-2", "labels": [1, 2, 3], "complete": True}
    encoded = {"format": "latents", "encoder": "x", "shards": [{"num": 3, "sha256": "x"}]}
    small = tensors_file({}, kind="model")
    return st.one_of(
        files(**{"run/state.json": json_near([run_state]), "run/final.safetensors": small}),
        files(**{"run/manifest.json": json_near([manifest, encoded])}),
        files(**{"run/edit.json": json_near([{"source": "x", "levels": [0.5]}])}),
        files(**{"run/gain.json": json_near([{"analysis": "gain", "weight": 1.0, "total": {"gain": 1}}])}),
        files(run=weights_near([models()["mlp"], networks()["discriminator time-mlp"]])),
    )


def describe(place: Path) -> None:
    """`ddo info`, whose result must be JSON."""
    json.dumps(info.run(str(place / "run")))


def of_runs() -> Inputs:
    identity = {"command": "finetune-ddo", "data_sha256": "x"}
    run_state = {**identity, "rounds": [{"round": 1, "score": 2.0, "promoted": True}], "finished": False}
    text = find_recipe(DEFAULT_RECIPE).read_bytes()
    return files(**{"run/state.json": json_near([run_state, identity]), "run/recipe.yaml": st.just(text)}) | files(
        **{"run/state.json": dumps(run_state), "run/recipe.yaml": of_yaml()}
    )


def run_directory(place: Path) -> None:
    """Compares a run's directory with what is asked for."""
    RunDir(place / "run").check("finetune-ddo", load(DEFAULT_RECIPE), data_sha256="x")


def of_finished() -> Inputs:
    told = json_near([{"command": "train-disc", "finished": True}])
    return files(**{"a/state.json": told, "a/final.safetensors": weights_near([networks()["discriminator time-mlp"]])})


def newest(place: Path) -> None:
    """Looks for discriminators below a directory of runs."""
    with mock.patch.object(guides, "RUNS", place):
        guides.newest_discriminator("x")


LETTERS = "bcdefghijklmnopqrstu"
BOMB = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{chr(ord(c) - 1)}'] * 4)}]\n" for c in LETTERS)
YAML = (
    "a: &a [x]\nb: *a\n", "x: &x [*x]\n", "&a a: *a\n", "? [a]\n: b\n", "<<: {data: {num: 1}}\n", "x: &x {<<: *x}\n",
    "!!python/object:os.x {}\n", "!!binary x\n", "!!timestamp x\n", "2001-01-01: x\n", "x: 2001-99-99\n", "!!set {a}\n",
    "!!omap [a: 1]\n", "--- a\n--- b\n", "%YAML 9.9\n", "x: 1:60:60\n", f"x: 0x{'f' * 5000}\n", f"x: {'9' * 5000}\n",
    "x: 1e99999\n", "x: .inf\n", "x: 0b1\n", "\t", "@", "`", "x: " + "[" * 3000 + "\n", "x: " + "{a: " * 2000 + "\n",
    "- " * 2000 + "\n", BOMB, "\x00", "\ufeff", 'x: "\\e[2J"\n', "x: '\x85'\n", "finetune: {lr: -1, batch: nan}\n",
    "model: 5\n", "data:\n", "finetune: {from_round: {2: {lr: 1}, x: {}}}\n",
)  # fmt: skip


def of_yaml() -> st.SearchStrategy[bytes]:
    own = b"data: {source: 'embedded:digits32'}\nfinetune: {lr: 1e-4, rounds: 2}\nmodel: {name: mlp}\n"
    texts = [find_recipe(DEFAULT_RECIPE).read_bytes(), own]
    odd = st.sampled_from([text.encode() for text in YAML])
    extended = st.builds(lambda text, more: text + more, st.sampled_from(texts), odd)
    nested = odd.map(lambda more: b"finetune:\n" + b"".join(b"  " + line + b"\n" for line in more.splitlines()))
    return st.one_of(near(texts), extended, nested, odd, odd.flatmap(lambda text: near([text])))


def of_recipes() -> Inputs:
    return files(x__yaml=of_yaml())


def recipe(place: Path) -> None:
    load(str(place / "x.yaml"))


KEYS = (
    "finetune.lr", "finetune", "data.source", "data", "model.options", "model.options.width", "model.draw", "name", "x",
    "finetune.from_round.2.lr", "sampling.steps", "sampling", "metric.ref", "", ".", "a..b", "finetune.lr.x", "steps",
    "discriminator.options", "sigma_max",
)  # fmt: skip
VALUES = ("1", "-1", "1e-4", "nan", "null", "[1, 2]", "{lr: 1}", "{name: mlp}", "9" * 4400, "x" * 5000, "~/x")


def of_overrides() -> Inputs:
    values = st.sampled_from(YAML) | st.sampled_from(VALUES) | st.text(max_size=20)
    equals = st.sampled_from(("=", "=", "=", "", "=="))
    line = st.builds("{}{}{}".format, st.sampled_from(KEYS), equals, values)
    lines = st.just(["finetune.lr=1e-4"]) | st.lists(line, min_size=1, max_size=3)
    return files(lines=lines.map(lambda lines: json.dumps(lines).encode()))


def overrides(place: Path) -> None:
    """A recipe with key=value texts, and the same as sampling keys."""
    lines = json.loads((place / "lines").read_bytes())
    repeated(lines, {})
    try:
        parse_sampling(lines, {})
    except RecipeError as error:
        for line in str(error).split("\n"):
            console.warn(line)
    load(overrides=lines)


def of_tables() -> Inputs:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([[*fid_report.DESCRIBED, "fid"], ["x"] * (len(fid_report.DESCRIBED) + 1)])
    return files(log__csv=near([text.getvalue().encode()]))


def table(place: Path) -> None:
    """Adds a row to a table of scores."""
    fid_report.append(place / "log.csv", {"source": "x", "reference": "y", "num_images": 9, "fid": 1.0})


TARGETS = (
    Target("info", of_info, describe),
    Target("runs", of_runs, run_directory),
    Target("newest", of_finished, newest),
    Target("recipes", of_recipes, recipe),
    Target("overrides", of_overrides, overrides),
    Target("csv", of_tables, table),
)
