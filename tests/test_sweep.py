"""Sweeps over alpha and beta: the halving's arithmetic by hand; resume equals uninterrupted; nodes that diverge."""

import json
import math

import pytest
import torch
import yaml
from conftest import CPU, fit_events, make_checkpoint, tiny_recipe, torchrun
from kills import KilledError, until_done

from ddo_cli import checkpoint
from ddo_cli.commands.recipe_options import coefficient
from ddo_cli.engines.ddo import finetune, sweep
from ddo_cli.engines.ddo.sweep import Costs, Rung, Setting, is_past_best, plan_of, rungs_of, survivors
from ddo_cli.engines.ddo.trial import Trial
from ddo_cli.errors import NumericsError, RecipeError, RunError, UsageError
from ddo_cli.objectives import ddo_step as objective
from ddo_cli.objectives.ddo import ddo_loss
from ddo_cli.recipe.load import load, to_yaml
from ddo_cli.recipe.schema import Recipe, TrainRecipe
from ddo_cli.trainable import Loss, Trainable

GRID = ("finetune.alpha=[1, 2]", "finetune.beta=[0.05, 0.1, 0.2]")
# Six nodes: rungs at steps 2 and 3 of 6, candidates at 3 and 6.
SMALL = ("metric={name: fd_embedded, num_images: 24, repeats: 1}", "finetune.lr=0.01")


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.mark.parametrize(
    ("nodes", "steps", "most", "expected"),
    [
        (6, 120, 3, [(30, 6), (60, 3), (120, 1)]),
        (20, 100, 3, [(25, 20), (50, 10), (100, 5)]),
        (20, 100, 9, [(7, 20), (13, 10), (25, 5), (50, 2), (100, 1)]),
        (6, 120, 1, [(120, 6)]),  # every node in full
        (2, 120, 3, [(60, 2), (120, 1)]),  # one decision, as late as three rungs allow
        (3, 7, 3, [(4, 3), (7, 1)]),
    ],
)
def test_rungs(nodes, steps, most, expected):
    assert rungs_of(nodes, steps, most) == expected


def test_a_round_can_be_too_short_for_its_rungs():
    assert rungs_of(4, 3, 3) == [(1, 4), (2, 2), (3, 1)]
    with pytest.raises(UsageError, match="a round of 2 steps is too short for a sweep with 3 rungs"):
        rungs_of(4, 2, 3)


@pytest.mark.parametrize(
    ("keys", "is_told"),
    [(["ema_half_life=9"], True), (["ema_half_life=8"], False), (["ema_half_life=9", "sweep_rungs=1"], False),
     (["ema_half_life=9", "ema_widths=[0.1]"], False)],
)  # fmt: skip
def test_a_rung_before_the_averages_have_moved_is_told(keys, is_told):
    """The first of three rungs of 24 images in steps of 4 comes after 8 images."""
    recipe = tiny_recipe("m", "diffusion", *(f"finetune.{key}" for key in keys), "finetune.beta=[0.01,0.02,0.03,0.04]")
    told = sweep.too_early(plan_of(recipe, lambda images: images), recipe.finetune)
    assert bool(told) == is_told
    assert ("after 8 images already" in told) == is_told


def test_survivors_are_the_lowest_and_ties_go_to_the_earlier():
    assert survivors([3.0, 1.0, 2.0], 2) == [1, 2]
    assert survivors([5.0, 4.0, 5.0, 4.0], 3) == [0, 1, 3]
    assert survivors([math.nan, 7.0, math.inf], 1) == [1]
    assert survivors([2.0], 3) == [0]


@pytest.mark.parametrize(
    ("scores", "patience", "expected"),
    [
        ([], 1, False),
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 2.0, 2.0], 1, True),  # a tie is no better
        ([3.0, 2.0, 4.0], 2, False),
        ([3.0, 2.0, 4.0, 2.5], 2, True),
        ([3.0, 2.0, 4.0, 2.5], None, False),
        ([3.0, 2.0, math.nan], 1, True),
        ([math.nan, math.nan, 2.0], 1, False),
    ],
)
def test_scores_that_have_risen_again(scores, patience, expected):
    assert is_past_best(scores, patience) == expected


def test_cost_of_six_nodes_by_hand():
    """330 of 720 steps, six and three scores at the rungs, two candidates of twelve."""
    candidates_at, costs = [60, 120], Costs(step=512, rung=16_384, candidate=32_768)
    nodes = sweep.planned(rungs_of(6, 120, 3), candidates_at)
    spent, full = sweep.cost(nodes, candidates_at, costs)
    assert spent == (6 * 30 + 3 * 30 + 60) * 512 + 9 * 16_384 + 2 * 32_768 == 381_952
    assert full == 6 * (120 * 512 + 2 * 32_768) == 761_856
    every_node = sweep.planned(rungs_of(6, 120, 1), candidates_at)
    assert sweep.cost(every_node, candidates_at, costs) == (full, full)


def test_a_diverged_node_saves_nothing():
    """It would have ended at step 70 in the full grid as well, after one candidate."""
    node = {"stopped_at": 70, "outcome": "diverged", "rungs": [], "candidates": [{"step": 60}]}
    assert sweep.cost([node], [60, 120], Costs(2, 10, 100)) == (240, 240)


def test_quickstart_sweeps_for_half_the_price():
    grid = ["finetune.alpha=[1, 2, 4]", "finetune.beta=[0.02, 0.05]", "finetune.eval_every=3840"]
    recipe = load("quickstart", grid)
    plan = plan_of(recipe, lambda images: 8 * images)
    assert plan.rungs == [Rung(30, 6), Rung(60, 3), Rung(120, 1)]
    assert plan.costs == Costs(512, 8 * 2048, 8 * 4096)
    assert plan.forecast()["sweep_cost"] == pytest.approx(381_952 / 761_856)


def test_settings_are_all_pairs_with_names_of_their_own():
    recipe = load("quickstart", ["finetune.alpha=[4, 1]", "finetune.beta=[0.05, 0.02]"]).finetune
    assert sweep.settings_of(recipe) == [(4, 0.05), (4, 0.02), (1, 0.05), (1, 0.02)]
    assert Setting(4.0, 0.05).directory == "alpha-4-beta-0.05"
    assert Setting(1.0, 0.1234567).directory != Setting(1.0, 0.1234568).directory


def test_more_images_at_a_rung_than_at_the_end_are_refused():
    recipe = load("quickstart", [GRID[0], "finetune.sweep_images=5000"])
    with pytest.raises(UsageError, match=r"finetune\.sweep_images = 5000 is more than metric\.num_images = 4096"):
        plan_of(recipe, lambda images: images)


# ---------------------------------------------------------------------------------------------------------------------
# Recipe and flags


def test_lists_survive_the_resolved_recipe_and_a_list_of_one_is_a_number():
    recipe = load("quickstart", ["finetune.alpha=[1, 2.5]", "finetune.beta=[0.02]"])
    assert recipe.finetune.alpha == (1.0, 2.5)
    assert recipe.finetune.beta == 0.02
    assert Recipe.model_validate(yaml.safe_load(to_yaml(recipe))) == recipe
    assert yaml.safe_load(to_yaml(load("quickstart")))["finetune"]["alpha"] == 4.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "needs one value or several different ones"),
        ("[1, 2, 1.0]", "needs one value or several different ones"),
        ("[1, -2]", "should be greater than 0"),
        ("[1, two]", "should be a valid number"),
        ("[1, [2]]", "should be a valid number"),
        ("[1, .inf]", "should be a finite number"),
    ],
)
def test_bad_lists_are_refused(text, message):
    with pytest.raises(RecipeError, match=rf"command line: finetune\.alpha = .*{message}"):
        load("quickstart", [f"finetune.alpha={text}"])


def test_flags():
    assert coefficient("--alpha", None) is None
    assert coefficient("--alpha", "4") == 4.0
    assert coefficient("--alpha", "1,2,4") == [1.0, 2.0, 4.0]
    for text in ("", "1,,2", "a", "1;2"):
        with pytest.raises(UsageError, match=r"--beta .* cannot be read .* such as 1,2,4"):
            coefficient("--beta", text)


# ---------------------------------------------------------------------------------------------------------------------
# Training that pauses


def test_a_pause_changes_nothing(tmp_path):
    """Weights, averages and log of 7 steps, with a pause inside a logging interval; schedules are of all 7."""

    class Line(Trainable):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x):
            return self.linear(x)

    def loss(model, positions, rng):
        return Loss(model(torch.full((2, 3), 1.0 + rng.step)).square().mean(), {})

    def fit(name: str, *pauses: int | None):
        settings = TrainRecipe(lr=0.1, lr_schedule="cosine", batch=2, log_every=3, save_every=100, ema_half_life=4)
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        for until in pauses:
            torch.manual_seed(0)
            model = Line()
            *_, last = fit_events(model, loss, path, settings, 7, until)
        ema = last.averages.whole()
        lines = [json.loads(line) for line in (path / "log").read_text().splitlines()]
        return (
            model.linear.weight.detach(),
            ema["linear.weight"],
            [(line["step"], line["lr"], line["loss"]) for line in lines],
        )

    whole, paused, short = fit("whole", None), fit("paused", 2, 5, None), fit("short", 5)
    assert torch.equal(paused[0], whole[0])
    assert torch.equal(paused[1], whole[1])
    assert paused[2] == whole[2]
    assert short[2] == whole[2][:1]  # step 3; the pause itself is not logged
    assert not torch.equal(short[0], whole[0])
    with pytest.raises(RunError, match="is of step 5, after step 4"):
        fit("short", 4)


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps


def sweep_recipe(ckpt: str, *overrides: str) -> Recipe:
    return tiny_recipe(ckpt, "diffusion", *SMALL, *GRID, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted sweep of two rounds: (reference, directory, result)."""
    path = tmp_path_factory.mktemp("sweep")
    ckpt = make_checkpoint(path / "ref.safetensors")
    return ckpt, path / "run", finetune.run(sweep_recipe(ckpt), path / "run", device=CPU)


def rounds_of(out):
    return json.loads((out / "state.json").read_text())["rounds"]


def losses_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["round"], line["alpha"], line["beta"], line["step"], line["loss"]) for line in lines]


def test_nodes_of_a_sweep(finished):
    _, out, result = finished
    for number, record in enumerate(result["rounds"], start=1):
        nodes = record["nodes"]
        assert [(node["alpha"], node["beta"]) for node in nodes] == [(a, b) for a in (1, 2) for b in (0.05, 0.1, 0.2)]
        ends = [node["stopped_at"] for node in nodes]
        assert sorted(ends) == [2, 2, 2, 3, 3, 6]
        # The lower half of the scores at each rung went on.
        first = [node["rungs"][0]["score"] for node in nodes]
        assert {ends[i] > 2 for i in survivors(first, 3)} == {True}
        second = {i: node["rungs"][1]["score"] for i, node in enumerate(nodes) if ends[i] > 2}
        best = min(second, key=second.__getitem__)
        assert ends[best] == 6
        assert [c["step"] for c in nodes[best]["candidates"]] == [3, 6]
        assert all(node["candidates"] == [] for i, node in enumerate(nodes) if i != best)
        assert (record["alpha"], record["beta"]) == (nodes[best]["alpha"], nodes[best]["beta"])
        here = out / f"round-{number:02d}"
        assert (here / "samples").is_dir()
        assert not list(here.glob("nodes/*/samples"))
        assert not list(here.rglob("train-state*"))
        kept = sorted(str(file.relative_to(here / "nodes")) for file in here.glob("nodes/*/checkpoints/*"))
        directory = Setting(record["alpha"], record["beta"]).directory
        assert kept == [f"{directory}/checkpoints/step-{step:06d}.safetensors" for step in (3, 6)]


def test_cost_report_and_final_of_a_sweep(finished):
    _, out, result = finished
    # Rows: 32 a step, 5 an image (Heun's 3 steps); 6 * 2 + 3 + 3 of 36 steps, 9 scores of 12 images, 2 of 12 of 24.
    assert result["sweep_cost"] == pytest.approx((18 * 32 + 5 * (9 * 12 + 2 * 24)) / (36 * 32 + 5 * 12 * 24))
    text = (out / "report.html").read_text()
    assert "Round 2: fd_embedded of every node" in text
    assert text.count("alpha 2 beta 0.1<") == 2
    assert f"Sweep cost: {result['sweep_cost']:.2f} of the full grid" in text
    promoted = [record for record in result["rounds"] if record["promoted"]]
    links = checkpoint.read_header(out / "final.safetensors")["provenance"]
    assert [(link["round"], link["alpha"], link["beta"]) for link in links] == [
        (record["round"], record["alpha"], record["beta"]) for record in promoted
    ]


def test_a_node_trains_as_it_would_alone(finished, tmp_path):
    """Same data order, draws and schedule, whatever the pauses: the winner's candidates are those of a plain run."""
    ckpt, out, result = finished
    record = result["rounds"][0]
    alone = sweep_recipe(
        ckpt, "finetune.rounds=1", f"finetune.alpha={record['alpha']}", f"finetune.beta={record['beta']}"
    )
    found = finetune.run(alone, tmp_path / "run", device=CPU)
    assert "nodes" not in found["rounds"][0]
    assert "sweep_cost" not in found
    assert rounds_of(tmp_path / "run")[0]["candidates"] == rounds_of(out)[0]["candidates"]
    node = out / "round-01" / "nodes" / Setting(record["alpha"], record["beta"]).directory
    for step in (3, 6):
        name = f"checkpoints/step-{step:06d}.safetensors"
        ours, theirs = (checkpoint.load(path / name).tensors for path in (node, tmp_path / "run" / "round-01"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("every", [pytest.param(11, marks=pytest.mark.slow), 17])
def test_resume_equals_uninterrupted(finished, tmp_path, monkeypatch, every):
    """Killed at every so-many-th write, before and after its rename in turns, until it ends: 10 writes."""
    ckpt, reference, result = finished
    recipe = sweep_recipe(ckpt, "finetune.rounds=1")
    until_done(lambda: finetune.run(recipe, tmp_path / "run", device=CPU), every)
    found = finetune.run(recipe, tmp_path / "run", device=CPU)
    assert rounds_of(tmp_path / "run") == rounds_of(reference)[:1]
    keys = ("alpha", "beta", "nodes", "score")
    assert [found["rounds"][0][key] for key in keys] == [result["rounds"][0][key] for key in keys]
    # The header names the recipe, whose rounds differ here.
    best = [checkpoint.load(path / "round-01" / "best.safetensors").tensors for path in (tmp_path / "run", reference)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])
    assert losses_of(tmp_path / "run") == [line for line in losses_of(reference) if line[0] == 1]
    assert not list((tmp_path / "run").rglob("*.part"))


def diverging(monkeypatch, *settings, step: int = 0):
    """The gradient is NaN for these (alpha, beta) from a step on; each node calls the loss once a step."""
    calls: dict[tuple[float, float], int] = {}

    def broken(r_real, r_fake, alpha, beta, **kwargs):
        found = ddo_loss(r_real, r_fake, alpha, beta, **kwargs)
        calls[alpha, beta] = calls.get((alpha, beta), 0) + 1
        if (alpha, beta) in settings and calls[alpha, beta] > step:
            return found._replace(loss=found.loss * torch.nan)
        return found

    monkeypatch.setattr(objective, "ddo_loss", broken)


def test_a_diverging_node_leaves_the_sweep(finished, tmp_path, monkeypatch, capsys):
    ckpt, _, result = finished
    before = result["rounds"][0]
    winner = (before["alpha"], before["beta"])
    diverging(monkeypatch, winner)
    recipe = sweep_recipe(ckpt, "finetune.rounds=1")
    record = finetune.run(recipe, tmp_path / "run", device=CPU)["rounds"][0]
    assert "drops out: the gradient of step 0 is not finite" in capsys.readouterr().err.replace("\n", " ")
    nodes = {(node["alpha"], node["beta"]): node for node in record["nodes"]}
    assert (nodes[winner]["outcome"], nodes[winner]["stopped_at"], nodes[winner]["rungs"]) == ("diverged", 1, [])
    assert "is not finite" in nodes[winner]["reason"]
    assert (record["alpha"], record["beta"]) != winner
    # The others are scored as before, and the best three of five go on.
    for node in before["nodes"]:
        setting = (node["alpha"], node["beta"])
        assert setting == winner or nodes[setting]["rungs"][0] == node["rungs"][0]
    assert sorted(node["stopped_at"] for node in record["nodes"]) == [1, 2, 2, 3, 3, 6]


def test_a_late_divergence_does_not_reopen_an_earlier_rung(finished, tmp_path, monkeypatch):
    """The best node of the first rung diverges before the second; a continued run must not let another in for it."""
    ckpt, _, result = finished
    first = min(result["rounds"][0]["nodes"], key=lambda node: node["rungs"][0]["score"])
    recipe = sweep_recipe(ckpt, "finetune.rounds=1")
    diverging(monkeypatch, (first["alpha"], first["beta"]), step=2)
    whole = finetune.run(recipe, tmp_path / "whole", device=CPU)["rounds"][0]
    assert sorted(node["stopped_at"] for node in whole["nodes"]) == [2, 2, 2, 3, 3, 6]
    assert [node["outcome"] for node in whole["nodes"]].count("diverged") == 1
    train = Trial.train

    def killed(trial, until):
        if until == trial.steps:
            raise KilledError
        train(trial, until)

    diverging(monkeypatch, (first["alpha"], first["beta"]), step=2)
    monkeypatch.setattr(Trial, "train", killed)
    with pytest.raises(KilledError):
        finetune.run(recipe, tmp_path / "cut", device=CPU)
    monkeypatch.setattr(Trial, "train", train)
    assert finetune.run(recipe, tmp_path / "cut", device=CPU)["rounds"][0]["nodes"] == whole["nodes"]


def test_a_sweep_ends_when_every_node_diverges(finished, tmp_path, monkeypatch):
    ckpt, _, _ = finished
    diverging(monkeypatch, *((float(a), b) for a in (1, 2) for b in (0.05, 0.1, 0.2)))
    recipe = sweep_recipe(ckpt, "finetune.rounds=1")
    for _ in range(2):  # a second attempt says the same
        with pytest.raises(NumericsError, match=r"every node .* diverges .* lower finetune\.lr = 0\.01"):
            finetune.run(recipe, tmp_path / "run", device=CPU)


def test_dry_run_tells_nodes_rungs_and_cost(finished, tmp_path):
    ckpt, _, result = finished
    found = finetune.run(sweep_recipe(ckpt), tmp_path / "run", device=CPU, dry_run=True)
    assert len(found["nodes"]) == 6
    assert found["rungs"] == [
        {"step": 2, "num_nodes": 6}, {"step": 3, "num_nodes": 3}, {"step": 6, "num_nodes": 1}
    ]  # fmt: skip
    assert found["sweep_images"] == 12
    assert found["sweep_cost"] == pytest.approx(result["sweep_cost"])  # as nothing diverged
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_sweep_like_one(finished, tmp_path):
    _, out, one = finished
    (tmp_path / "recipe.yaml").write_text((out / "recipe.yaml").read_text())
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--rounds", "1", "--out", str(tmp_path / "run")]
    done = torchrun("-m", "ddo_cli", "finetune-ddo", *options, "--device", "cpu", "--json")
    found = json.loads(done.stdout)["rounds"][0]
    assert sorted(node["stopped_at"] for node in found["nodes"]) == [2, 2, 2, 3, 3, 6]
    # Sums over two processes round differently; a step or two apart from equal weights.
    for ours, theirs in zip(found["nodes"], one["rounds"][0]["nodes"], strict=True):
        assert ours["rungs"][0]["score"] == pytest.approx(theirs["rungs"][0]["score"], rel=1e-3)
