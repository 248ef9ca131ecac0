"""The control beside DDO, and the seeds that decide: what chooses, what promotes, and what is reported."""

import functools
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, KINDS, make_checkpoint, tiny_recipe, torchrun
from kills import KilledError

from ddo_cli import checkpoint, files
from ddo_cli.engines.ddo import finetune, promotion, report
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import UsageError
from ddo_cli.metrics.uncertainty import Mean, improvement, mean
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_batch, ddo_step
from ddo_cli.objectives.likelihood import likelihood_step, plain_batch
from ddo_cli.rng import StepRng

# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_loss_is_that_of_the_real_rows_of_ddo(kind, tmp_path):
    """The same noise for the same images: -log p on data, as DDO's guard against divergence has it, per dimension."""
    model = registry.load_model(make_checkpoint(tmp_path / "m.safetensors", kind), CPU).model
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 256, (8, *model.codec.shape), generator=generator, dtype=torch.uint8)
    real, fake, labels = items[:4], items[4:], torch.arange(4)
    both = ddo_batch(model, (real, labels), (fake, labels), StepRng((7, 1), 3, range(4)))
    plain = plain_batch(model, real, labels, StepRng((7, 1), 3, range(4)))
    with torch.no_grad():
        ref_loss = ddo_step(model, model, both, ref=model, settings=DdoSettings(1.0, 0.05)).log["ref_loss"]
        loss = likelihood_step(model, model, plain).loss
    torch.testing.assert_close(loss * math.prod(model.codec.state_shape), ref_loss, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def test_means_and_improvements_by_hand():
    assert mean([3.0]) == Mean(3.0, None)
    found = improvement([10.0, 12.0, 14.0], [7.0, 10.0, 13.0])  # 3, 2, 1: s = 1
    assert found.value == 2.0
    assert found.std_error == pytest.approx(1 / math.sqrt(3))
    assert str(found) == "2.00 ± 0.58"
    assert found._replace(value=-2.0).as_improvement == "worse by 2.00 ± 0.58"
    shown = {(42.183, 0.0874): "42.18 ± 0.09", (5959.4, 14.2): "5959 ± 14", (0.0, 0.0): "0", (0.04037, None): "0.04037"}
    assert {given: str(Mean(*given)) for given in shown} == shown
    assert math.isnan(mean([1.0, math.nan]).value)


@pytest.mark.parametrize(
    ("gain", "margin", "expected"),
    [
        (Mean(1.0, 2.0), 0.0, True),
        (Mean(1.0, 2.0), 0.5, True),
        (Mean(1.0, 2.0), 0.6, False),
        (Mean(0.0, 0.0), 0.0, False),  # equal weights
        (Mean(-1.0, 0.1), 0.0, False),
        (Mean(1.0, None), 3.0, True),  # a density: no noise
        (Mean(math.nan, math.nan), 0.0, False),
    ],
)
def test_what_is_better(gain, margin, expected):
    assert promotion.is_better(gain, margin) is expected


def test_no_seed_serves_two_purposes():
    scoring = Scoring.__new__(Scoring)
    scoring.density, scoring.metric = None, SimpleNamespace(repeats=4, num_images=10)
    ranges = [range(1), scoring.promotion_ranges, scoring.table_ranges]
    assert [list(one) for one in ranges] == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    scoring.density = object()  # without noise one score serves for all
    assert list(scoring.promotion_ranges) == list(scoring.table_ranges) == [0]


class Made:
    """A made-up model, known by the step that its weights are of."""

    def __init__(self, step: int):
        self.step = step

    def load_state_dict(self, step: int):
        self.step = step


class Noisy:
    """A made-up scorer: every model is worth 10, and a range of seeds adds noise of standard deviation 1."""

    key, promotion_ranges, table_ranges = "fd", range(1, 4), range(4, 7)

    def __init__(self, experiment: int):
        self.experiment = experiment

    def run(self, model: Made, number: int) -> dict[str, float]:
        return {"fd": 10.0 + np.random.default_rng((self.experiment, model.step, number)).standard_normal()}

    def picture(self, model, path):
        pass


def rounds_of_equals(monkeypatch, tmp_path, margin: float = 0.0, experiments: int = 400, candidates: int = 8):
    """Scorers, and records of rounds whose candidates are all as good as the reference, which is model 0."""
    monkeypatch.setattr(promotion.checkpoint, "load", lambda step, kind: SimpleNamespace(tensors=step))
    monkeypatch.setattr(promotion, "copy_weights", lambda source, target: None)
    monkeypatch.setattr(promotion, "write_json", lambda file, content: None)
    found = []
    for scoring in map(Noisy, range(experiments)):
        scored = {str(step): scoring.run(Made(step), 0) for step in range(1, candidates + 1)}
        networks = SimpleNamespace(scratch=Made(0))
        trial = SimpleNamespace(candidates=scored, candidate_file=lambda step: step, title="", networks=networks)
        this = SimpleNamespace(
            number=1, path=tmp_path, ref_file=0, plan=SimpleNamespace(has_nodes=False),
            chain=SimpleNamespace(scoring=scoring, device=CPU),
            recipe=SimpleNamespace(finetune=SimpleNamespace(margin=margin, batch=1, patience=None)),
        )  # fmt: skip
        start = promotion.record_of_start(scoring, Made(0), tmp_path / "reference-scores.json")
        found.append((scoring, promotion.promote(this, [trial], start)))
    return found


def test_the_best_of_many_looks_better_only_where_it_was_chosen(monkeypatch, tmp_path):
    """Means over 400 rounds of 8 candidates; their standard errors are 0.02 to 0.06."""
    found = rounds_of_equals(monkeypatch, tmp_path)
    first = [scoring.run(Made(record["best_images"]), 0)["fd"] for scoring, record in found]
    assert np.mean(first) == pytest.approx(10 - 1.42, abs=0.15)  # the expected least of 8 normal numbers
    promoted = [record for _, record in found if record["promoted"]]
    assert len(promoted) / len(found) == pytest.approx(0.5, abs=0.1)  # by fresh seeds: a coin
    fd = [figures["fd"] for record in promoted for figures in record["promotion"]]
    assert np.mean(fd) < 10 - 0.2  # promotion chooses, too, so its seeds are not those of the table
    assert np.mean([record["score"] for record in promoted]) == pytest.approx(10, abs=0.15)
    # The wrong rule: the range that chose the candidate among the three that promote it.
    by_wrong_rule = [
        improvement(
            *([scoring.run(Made(step), number)["fd"] for number in range(3)] for step in (0, record["best_images"]))
        )
        for scoring, record in found
    ]
    assert np.mean([gain.value > 0 for gain in by_wrong_rule]) > 0.65


def test_a_margin_keeps_chance_out(monkeypatch, tmp_path):
    """Student's t of two degrees of freedom is above 4.3 in 2.5 % of all cases."""
    found = rounds_of_equals(monkeypatch, tmp_path, margin=4.3)
    assert sum(record["promoted"] for _, record in found) <= 22  # 10 expected; more than 22: once in 3000


def test_margins_and_seeds_that_cannot_be_are_refused(tmp_path):
    def refused(*overrides: str) -> str:
        recipe = tiny_recipe("embedded:digits32", "diffusion", *overrides)
        with pytest.raises(UsageError) as caught:
            finetune.run(recipe, tmp_path / "run", device=CPU)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    assert "finetune.margin = 2 counts standard errors" in refused("finetune.margin=2.0", "metric.repeats=1")
    assert "take seeds up to 1799999, and those of fake sets begin at 1000000; lower one" in refused(
        "metric.num_images=200000", "metric.repeats=4"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def recipe_of(kind: str, ckpt: str, *overrides: str):
    return tiny_recipe(ckpt, kind, "finetune.rounds=1", "metric.repeats=2", *overrides)


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    """(reference, directory of a run without a control, with one) of a kind of model."""

    @functools.cache
    def made(kind):
        path = tmp_path_factory.mktemp(kind)
        ckpt = make_checkpoint(path / "ref.safetensors", kind)
        finetune.run(recipe_of(kind, ckpt), path / "plain", device=CPU)
        finetune.run(recipe_of(kind, ckpt, "finetune.control=true"), path / "both", device=CPU)
        return ckpt, path / "plain", path / "both"

    return made


def content(place) -> dict[str, object]:
    """Weights, scores and losses; a log's speed differs."""
    found: dict[str, object] = {}
    for path in sorted(place.rglob("*")):
        if path.suffix == ".safetensors" or path.name in ("metrics.json", "best-scores.json", "grid.png"):
            found[str(path.relative_to(place))] = path.read_bytes()
        elif path.name == "log.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[str(path.relative_to(place))] = [{**line, "images_per_second": 0} for line in lines]
    return found


@pytest.mark.parametrize(
    "kind", ["autoregressive", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("diffusion", "var"))]
)
def test_a_control_may_come_later_and_changes_nothing(runs_of, tmp_path, kind, capsys):
    ckpt, plain, both = runs_of(kind)
    shutil.copytree(plain, tmp_path / "run")
    before = content(plain)
    assert {name: bytes_ for name, bytes_ in content(both).items() if not name.startswith("control")} == before
    found = finetune.run(recipe_of(kind, ckpt, "finetune.control=true"), tmp_path / "run", device=CPU)
    assert content(tmp_path / "run") == content(both)
    assert "finetune.control: False -> True" in " ".join(capsys.readouterr().err.split())
    without = finetune.run(recipe_of(kind, ckpt), tmp_path / "run", device=CPU)
    assert without == found  # what there is stays, and is told
    state = json.loads((both / "state.json").read_text())
    (record,) = state["control"]
    (shown,) = found["control"]["rounds"]
    assert (shown["score"], shown["promoted"]) == (record["score"], record["promoted"])
    assert (
        found["better_than_control"]
        == improvement(
            *([one["fd_embedded"] for one in each["repeats"]] for each in (record, state["rounds"][0]))
        )._asdict()
    )
    lines = [json.loads(line) for line in (both / "control" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "grad_norm", "lr"} <= lines[0].keys()
    assert not {"r_real", "r_fake", "accuracy"} & lines[0].keys()
    header = checkpoint.read_header(both / "control" / "final.safetensors")
    assert [link["control"] for link in header["provenance"]] == [True] * record["promoted"]
    columns, rows = report.table(state, "fd_embedded")
    assert columns == ["reference", "fd_embedded", "ratio", "better by", "than control by", "outcome"]
    assert [row[0] for row in rows] == ["at the start", "after round 1", "control, round 1"]
    page = (both / "report.html").read_text()
    assert "than the control." in page
    assert "control, round 1, same seeds" in page
    assert not list((both / "control").rglob("samples"))


@pytest.mark.parametrize(("number", "before"), [(3, True), pytest.param(6, False, marks=pytest.mark.slow)])
def test_a_killed_control_ends_with_the_same_bytes(runs_of, tmp_path, monkeypatch, number, before):
    ckpt, plain, both = runs_of("autoregressive")
    shutil.copytree(plain, tmp_path / "run")
    recipe = recipe_of("autoregressive", ckpt, "finetune.control=true")
    count, rename = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += "/control/" in str(target)
        if count == number and before:
            raise KilledError
        rename(source, target)
        if count == number:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(KilledError):
            finetune.run(recipe, tmp_path / "run", device=CPU)
    finetune.run(recipe, tmp_path / "run", device=CPU)
    assert content(tmp_path / "run") == content(both)
    assert not list((tmp_path / "run").rglob("*.part"))


@pytest.mark.slow
def test_a_sweep_has_one_control(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ref.safetensors", "autoregressive")
    grid = ("finetune.beta=[0.05, 0.1]", "finetune.control=true", "metric.repeats=1")
    found = finetune.run(recipe_of("autoregressive", ckpt, *grid), tmp_path / "run", device=CPU)
    assert len(found["rounds"][0]["nodes"]) == 2
    assert "nodes" not in found["control"]["rounds"][0]
    assert found["better_than_control"]["std_error"] is None
    assert (tmp_path / "run" / "control" / "round-01" / "checkpoints" / "step-000006.safetensors").is_file()


def test_a_dry_run_names_the_price(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ref.safetensors", "autoregressive")
    recipe = recipe_of("autoregressive", ckpt, "finetune.control=true")
    found = finetune.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
    assert found["network_rows_per_step"]["control_forward_backward"] == recipe.finetune.batch
    figures = found["measured"]
    # Six steps at 3/8 of the price of DDO's; two candidates, and the best one on two and two ranges of 16 images.
    training, sampling = 6 * 3 / 8 * figures["seconds_per_step"], (2 + 4) * 16 / figures["images_per_second"]
    assert figures["hours"]["control"] == pytest.approx((training + sampling) / 3600)
    assert figures["hours"]["total"] == pytest.approx(
        sum(figures["hours"][key] for key in ("training", "sampling", "control"))
    )


@pytest.mark.slow
def test_two_processes_train_the_control_of_one(runs_of, tmp_path):
    *_, both = runs_of("autoregressive")
    (tmp_path / "recipe.yaml").write_text((both / "recipe.yaml").read_text())
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu", "--json"]
    found = json.loads(torchrun("-m", "ddo_cli", "finetune-ddo", *options).stdout)
    (one,) = json.loads((both / "state.json").read_text())["control"]
    assert found["control"]["final_score"] == pytest.approx(one["score"], rel=1e-3)  # sums of two round differently
