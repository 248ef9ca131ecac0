"""`finetune.beta = auto`: the search on known curves, where it begins, and whole runs that find their beta."""

import json
import math
from types import SimpleNamespace

import pytest
from conftest import CPU, make_checkpoint, tiny_recipe
from kills import until_done

from ddo_cli import checkpoint
from ddo_cli.commands.recipe_options import coefficient
from ddo_cli.engines.ddo import auto, finetune
from ddo_cli.engines.ddo.sweep import Setting, plan_of
from ddo_cli.errors import NumericsError, RecipeError, UsageError
from ddo_cli.recipe.load import load

AUTO = ("finetune.beta=auto", "finetune.alpha=2.0", "metric.repeats=1", "finetune.lr=0.01")


def curve(best: float, width: float = 1.0):
    """A score whose logarithm is a parabola over log beta."""
    return lambda beta: math.exp((math.log(beta / best) / width) ** 2)


@pytest.mark.parametrize(
    ("best", "tried", "found"),
    [
        (0.1, [0.05, 0.1, 0.2, 0.0707, 0.141], 0.1),
        (0.135, [0.05, 0.1, 0.2, 0.0707, 0.141], 0.141),
        (0.03, [0.025, 0.05, 0.1, 0.2, 0.0125, 0.0177, 0.0354], 0.0354),
        (0.5, [0.05, 0.1, 0.2, 0.4, 0.8, 0.283, 0.566], 0.566),
        (1e-6, [0.05, 0.1, 0.2, 0.025, 0.0125, 0.00625, 0.00313, 0.00221, 0.00443], 0.00221),  # as many as may be
    ],
)
def test_trials_go_on_while_the_best_one_is_at_an_end(best, tried, found):
    scores, asked = explored(curve(best))
    assert len(asked) == len(set(asked))
    assert sorted(asked) == sorted(scores) == sorted(tried)
    assert auto.best_of(scores) == found


def explored(score):
    """Of a search that begins at 0.1: scores by beta, and the betas that were asked for."""
    asked = []
    return auto.explored(0.1, lambda beta: asked.append(beta) or score(beta)), asked


def test_an_end_that_was_not_worth_it_is_not_gone_beyond():
    """The score falls by 1 % with each half of beta, as where the loss is linear; by 3 % it is worth it."""
    for each, most in ((0.01, 5), (0.03, 9)):
        scores, _ = explored(lambda beta, each=each: (1 - each) ** -math.log2(beta))
        assert len(scores) == most


@pytest.mark.parametrize(
    ("best", "asked"),
    [
        (0.1, [0.1, 0.2]),  # short trainings were right; 0.2 was second there
        (0.2, [0.1, 0.2, 0.4]),
        (0.8, [0.1, 0.2, 0.4, 0.8]),  # as many as may be
        (0.01, [0.1, 0.2]),  # on the side that looked worse
    ],
)
def test_whole_trainings_go_downhill(best, asked):
    short = {0.05: 3.0, 0.1: 1.0, 0.2: 2.0, 0.4: 4.0, 0.8: 5.0, 1.6: 6.0}
    order = []
    whole = auto.finished(short, lambda beta: order.append(beta) or curve(best)(beta))
    assert order == asked == list(whole)
    assert auto.best_of(whole) == min(asked, key=curve(best))


def test_whole_trainings_end_where_going_on_was_not_worth_it():
    scores = {0.2: 1.0, 0.1: 0.97, 0.05: 0.96}
    assert auto.finished({0.025: 4.0, 0.05: 3.0, 0.1: 2.0, 0.2: 1.0, 0.4: 3.0}, scores.__getitem__) == scores


def test_whole_trainings_go_beyond_the_short_ones_but_not_where_one_has_diverged():
    inf = math.inf
    assert list(auto.finished({0.1: 20.0, 0.2: 10.0, 0.4: 30.0}, curve(0.05))) == [0.2, 0.1, 0.0707, 0.05]
    assert list(auto.finished({0.1: inf, 0.2: 10.0, 0.4: 20.0}, curve(0.01))) == [0.2, 0.4]
    assert list(auto.finished({0.05: inf, 0.1: 9e3, 0.2: 8e3, 0.4: 9.9e3}, curve(0.01))) == [0.2, 0.1]


def test_where_the_score_has_risen_again_larger_betas_follow():
    """Half of a round was too short to overshoot in, with all of them; 0.1 looked better than 0.4 there."""
    short = {0.1: 2.0, 0.2: 1.0, 0.4: 3.0, 0.8: 4.0, 1.6: 5.0}
    for risen, asked in ((1.01, [0.2, 0.1]), (1.03, [0.2, 0.4, 0.8, 1.6])):
        whole = {0.1: 9.0, 0.2: risen, 0.4: 0.9 * risen, 0.8: 0.8 * risen, 1.6: 0.7 * risen}
        assert list(auto.finished(short, whole.__getitem__)) == asked


def test_the_search_goes_by_ends_and_the_choice_by_the_best_candidates(monkeypatch):
    """As on a small flow model: the best candidate is the one at half of the round, as long as its end overshoots."""
    halves = {0.05: 3.0, 0.1: 1.0, 0.2: 1.01, 0.0707: 1.04, 0.141: 1.005, 0.283: 1.2}
    ends = {0.1: 2.0, 0.141: 1.5, 0.2: 0.9, 0.283: 1.1}

    class Made:
        def __init__(self, _round, _networks, setting):
            self.beta = setting.beta

        def train(self, until):
            pass

        def drop(self):
            pass

        def score_at(self, until):
            return halves[self.beta] if until == 3 else min(halves[self.beta], ends[self.beta])

        @property
        def score_at_end(self):
            return ends[self.beta]

    monkeypatch.setattr(auto, "Trial", Made)
    monkeypatch.setattr(auto, "first", lambda alpha, dimensions: 0.1)
    told = []
    monkeypatch.setattr(auto.console, "info", told.append)
    scoring = SimpleNamespace(key="fd")
    plan = SimpleNamespace(settings=[Setting(1.0, None)], short=3, steps=6)
    codec = SimpleNamespace(shape=(3, 16, 16))
    this = SimpleNamespace(plan=plan, title="round 1/1", chain=SimpleNamespace(scoring=scoring))
    networks = SimpleNamespace(precision_error=None, scratch=SimpleNamespace(codec=codec))
    auto.search(this, networks, ())
    assert told == ["round 1/1: beta 0.2 by fd of 6 trainings"]


def test_where_a_search_begins_by_hand():
    """Training settles at log(4) / 0.0361 = 38.4 nats, 0.05 for each of 16 x 16 x 3 numbers."""
    assert auto.first(4.0, 768) == auto.first(0.25, 768) == 0.0361
    assert auto.first(4.0, 4 * 768) == pytest.approx(0.0361 / 4, rel=5e-3)
    assert auto.first(1.0, 768) == 0.0026


def test_words():
    assert load("quickstart", ["finetune.beta=auto"]).finetune.beta == "auto"
    for text in ("atuo", "AUTO"):
        with pytest.raises(RecipeError, match=rf"finetune\.beta = '{text}': must be a number, .* or auto"):
            load("quickstart", [f"finetune.beta={text}"])
        with pytest.raises(UsageError, match="such as 1,2,4, or auto"):
            coefficient("--beta", text)
    with pytest.raises(RecipeError, match=r"finetune\.alpha = 'auto'"):
        load("quickstart", ["finetune.alpha=auto"])
    with pytest.raises(RecipeError, match=r"finetune\.beta = 'auto': does not go with several values of alpha"):
        load("quickstart", ["finetune.beta=auto", "finetune.alpha=[1, 2]"])
    with pytest.raises(UsageError, match=r"a round of 1 steps is too short for finetune\.beta = auto"):
        plan_of(load("quickstart", ["finetune.beta=auto", "finetune.images_per_round=64"]), lambda images: images)
    with pytest.raises(UsageError, match=r"finetune\.sweep_images = 9000 is more"):
        plan_of(load("quickstart", ["finetune.beta=auto", "finetune.sweep_images=9000"]), lambda images: images)


def test_a_search_goes_away_from_what_diverges(monkeypatch):
    scores, _ = explored(lambda beta: math.inf if beta < 0.3 else curve(0.5)(beta))
    assert sorted(scores) == [0.05, 0.1, 0.2, 0.283, 0.4, 0.566, 0.8]
    monkeypatch.setattr(auto, "Trial", lambda *_: SimpleNamespace(train=lambda _: None, score_at=lambda _: math.inf))
    this = SimpleNamespace(
        plan=SimpleNamespace(settings=[Setting(4.0, math.nan)], short=3), title="round 2/2", recipe=load("quickstart")
    )
    with pytest.raises(NumericsError, match=r"round 2/2: training diverges with every beta from 0\.05 to 4\.53"):
        auto.search(this, None, [{"beta": 0.1}])  # 4.53 is the last of nine


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A run of two rounds with a control: (reference, directory, result)."""
    path = tmp_path_factory.mktemp("auto")
    ckpt = make_checkpoint(path / "ref.safetensors")
    recipe = tiny_recipe(ckpt, "diffusion", *AUTO, "finetune.control=true")
    return ckpt, path / "run", finetune.run(recipe, path / "run", device=CPU)


def test_beta_is_told_everywhere(found):
    _, out, result = found
    rounds = json.loads((out / "state.json").read_text())["rounds"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    page = (out / "report.html").read_text()
    for record, shown in zip(rounds, result["rounds"], strict=True):
        number, beta = record["round"], record["beta"]
        assert (record["alpha"], beta, record["nodes"]) == (2.0, shown["beta"], shown["nodes"])
        assert len(record["nodes"]) >= 5
        ends = {node["beta"]: min(each["score"] for each in node["candidates"]) for node in finished_of(record)}
        assert len(ends) >= 2
        assert beta == min(ends, key=ends.__getitem__)
        assert f"beta {beta:g}" in page
        lines = [line["step"] for line in log if (line["round"], line["beta"]) == (number, beta)]
        assert lines == [2, 4, 6]
        assert not list((out / f"round-{number:02d}").rglob("train-state*"))
        if record["promoted"]:
            best = checkpoint.read_header(out / f"round-{number:02d}" / "best.safetensors")
            assert best["provenance"][-1]["beta"] == beta
    starts = (auto.first(2.0, 3 * 32 * 32), rounds[0]["beta"])
    assert all(
        start in [each["beta"] for each in record["nodes"]] for start, record in zip(starts, rounds, strict=True)
    )
    assert "beta" not in result["control"]["rounds"][0]
    assert "sweep_cost" not in result


def finished_of(record):
    return [node for node in record["nodes"] if node["outcome"] == "finished"]


def test_it_trains_as_with_that_beta_given(found, tmp_path):
    ckpt, out, _ = found
    (first, _) = json.loads((out / "state.json").read_text())["rounds"]
    given = tiny_recipe(ckpt, "diffusion", *AUTO[1:], f"finetune.beta={first['beta']}", "finetune.rounds=1")
    finetune.run(given, tmp_path / "run", device=CPU)
    (alone,) = json.loads((tmp_path / "run" / "state.json").read_text())["rounds"]
    assert alone["candidates"] == first["candidates"]
    assert alone["repeats"] == first["repeats"]


def test_dry_run_tells_the_most_that_it_takes(found, tmp_path):
    ckpt, _, _ = found
    recipe = tiny_recipe(ckpt, "diffusion", *AUTO)
    told = finetune.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
    assert told["beta_auto"] == {"trials_at_most": 9, "whole_trials_at_most": 4, "steps_of_a_trial": 3}
    given = tiny_recipe(ckpt, "diffusion", *AUTO[1:])
    fixed = finetune.run(given, tmp_path / "run", device=CPU, dry_run=True)
    steps = [
        each["measured"]["hours"]["training"] * 3600 / each["measured"]["seconds_per_step"] for each in (told, fixed)
    ]
    assert steps == pytest.approx([2 * (8 * 3 + 4 * 6), 2 * 6])


@pytest.mark.slow
@pytest.mark.parametrize("every", [19, 41])
def test_resume_equals_uninterrupted(found, tmp_path, monkeypatch, every):
    """Killed at every so-many-th write, before and after its rename in turns, until it ends."""
    ckpt, reference, _ = found
    recipe = tiny_recipe(ckpt, "diffusion", *AUTO, "finetune.control=true")
    until_done(lambda: finetune.run(recipe, tmp_path / "run", device=CPU), every)
    for name in ("final.safetensors", "log.jsonl"):
        ours, theirs = (path / name for path in (tmp_path / "run", reference))
        if name == "log.jsonl":
            assert [strip(line) for line in ours.open()] == [strip(line) for line in theirs.open()]
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (json.loads((path / "state.json").read_text())["rounds"] for path in (tmp_path / "run", reference))
    assert ours == theirs


def strip(line: str) -> dict[str, float]:
    """Without what depends on the machine."""
    return {key: value for key, value in json.loads(line).items() if key != "images_per_second"}
