"""The engine: resume equals uninterrupted, one process equals two, promotion, refusals. Both kinds of model."""

import functools
import itertools
import json
import math
import os
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, KINDS, kinds, make_checkpoint, tiny_recipe, torchrun
from kills import KilledError
from launch import launch
from PIL import Image

import ddo_cli
from ddo_cli import checkpoint, files, rundir
from ddo_cli.data.images import open_images
from ddo_cli.engines.ddo import finetune, promotion, setup
from ddo_cli.engines.ddo.round import is_over
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import CheckpointError, NumericsError, RunError, UsageError
from ddo_cli.objectives import ddo_step as objective
from ddo_cli.objectives.ddo import ddo_loss


def kill_at_write(monkeypatch, number: int, before: bool) -> None:
    """Ends the process at its n-th file: before the rename, or right after it."""
    count, rename = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += 1
        if count == number and before:
            raise KilledError
        rename(source, target)
        if count == number:
            raise KilledError

    monkeypatch.setattr(files.os, "replace", replace)


@pytest.fixture(scope="module")
def finished_of(tmp_path_factory):
    """An uninterrupted run of a kind of model: (kind, reference, directory, result)."""

    @functools.cache
    def finished(kind):
        path = tmp_path_factory.mktemp(kind)
        ckpt = make_checkpoint(path / "ref.safetensors", kind)
        return kind, ckpt, path / "run", finetune.run(tiny_recipe(ckpt, kind), path / "run", device=CPU)

    return finished


@pytest.fixture(scope="module", params=kinds("diffusion", "autoregressive"))
def finished(request, finished_of):
    return finished_of(request.param)


def test_layout_of_a_run(finished):
    _, ckpt, out, result = finished
    expected = ["recipe.yaml", "state.json", "log.jsonl", "final.safetensors", "report.html"]
    for name in expected:
        assert (out / name).is_file(), name
    for number in (1, 2):
        here = out / f"round-{number:02d}"
        assert sorted(p.name for p in (here / "checkpoints").iterdir()) == [
            "step-000003.safetensors",
            "step-000006.safetensors",
        ]
        assert (here / "best.safetensors").is_file()
        assert (here / "grid.png").is_file()
        assert not list(here.glob("train-state*"))  # optimizer state does not cross rounds
    assert result["metric"] == "fd_embedded"
    assert [record["round"] for record in result["rounds"]] == [1, 2]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["round"], line["step"]) for line in lines] == [(1, 2), (1, 4), (1, 6), (2, 2), (2, 4), (2, 6)]
    assert {"loss", "r_real", "r_fake", "margin", "r_std", "accuracy", "grad_norm", "lr"} <= lines[0].keys()
    header = checkpoint.read_header(out / "final.safetensors", kind="model")
    promoted = [record["round"] for record in result["rounds"] if record["promoted"]]
    assert [link["round"] for link in header["provenance"]] == promoted or not promoted
    read = {"name", "seed", "data", "model", "sampling", "metric", "finetune"}  # of other sections weights know nothing
    assert all(link["recipe"].keys() == read for link in header["provenance"])
    assert header["config"] == checkpoint.read_header(ckpt)["config"]


def test_scores_of_promotion_never_rise_and_final_is_the_best(finished):
    _, ckpt, out, result = finished
    state = json.loads((out / "state.json").read_text())
    records = [state["reference"], *state["rounds"]]
    scores = [sum(figures["fd_embedded"] for figures in record["promotion"]) / 2 for record in records]
    assert scores == sorted(scores, reverse=True)
    assert result["final_score"] == state["rounds"][-1]["score"]
    last = (out / "round-02" / "best.safetensors").read_bytes()
    assert (out / "final.safetensors").read_bytes() == last
    if not any(record["promoted"] for record in result["rounds"]):
        assert last == Path(ckpt).read_bytes()


def test_equal_weights_have_a_ratio_of_exactly_zero(finished, tmp_path):
    """While the model equals the reference, r = 0 and the loss is (1 + alpha) log 2, at every step."""
    kind, ckpt, _, _ = finished
    one_line_a_step = (
        "finetune.lr=1.0e-30",
        "finetune.rounds=1",
        "finetune.log_every=1",
    )  # too small to move a float32
    recipe = tiny_recipe(ckpt, kind, *one_line_a_step)
    finetune.run(recipe, tmp_path / "run", device=CPU)
    first, *others = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert first["r_real"] == first["r_fake"] == first["r_std"] == 0.0
    assert first["accuracy"] == 0.5
    assert first["denoising_ratio"] == 1.0
    for line in others:
        if kind == "edm2":  # normalises its weights before each step, which rounds
            assert abs(line["r_real"]) + abs(line["r_fake"]) + line["r_std"] < 1e-3
        else:
            assert line["r_real"] == line["r_fake"] == line["r_std"] == 0.0
        assert line["loss"] == pytest.approx(2 * math.log(2), rel=1e-5)


def kills() -> Iterator[Any]:
    """(kind, number of the file, whether before its rename): every point of one kind of model, and of the others, whose
    states differ and not their files, one in training, one in scoring and one in the second round.
    """
    points = {kind: [(7, True), (20, False), (34, False)] for kind in KINDS}
    points["diffusion"] = list(itertools.product((1, 3, 7, 12, 15, 20, 27, 34), (True, False)))
    quick = {"diffusion": [(7, True), (12, False), (34, False)], "autoregressive": [(7, True)]}
    for kind in KINDS:
        for point in points[kind]:
            yield pytest.param(kind, *point, marks=() if point in quick.get(kind, ()) else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "number", "before"), list(kills()))
def test_resume_equals_uninterrupted(finished_of, tmp_path, monkeypatch, kind, number, before):
    _, ckpt, reference, _ = finished_of(kind)
    recipe = tiny_recipe(ckpt, kind)
    with monkeypatch.context() as patch:
        kill_at_write(patch, number, before)
        with pytest.raises(KilledError):
            finetune.run(recipe, tmp_path / "run", device=CPU)
    result = finetune.run(recipe, tmp_path / "run", device=CPU)
    assert (tmp_path / "run" / "final.safetensors").read_bytes() == (reference / "final.safetensors").read_bytes()
    assert result["final_score"] == json.loads((reference / "state.json").read_text())["rounds"][-1]["score"]
    ours, theirs = ((path / "log.jsonl").read_text().splitlines() for path in (tmp_path / "run", reference))
    assert [json.loads(line)["loss"] for line in ours] == [json.loads(line)["loss"] for line in theirs]
    assert not list((tmp_path / "run").rglob("*.part"))


def test_the_log_does_not_know_how_rows_are_cut(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ref.safetensors", "diffusion")
    lines = {}
    for name, keys in {"whole": [], "cut": ["finetune.micro_batch=1"]}.items():
        finetune.run(tiny_recipe(ckpt, "diffusion", "finetune.rounds=1", *keys), tmp_path / name, device=CPU)
        lines[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    for whole, cut in zip(lines["whole"], lines["cut"], strict=True):
        for key in ("loss", "margin", "r_std", "denoising_ratio"):
            assert cut[key] == pytest.approx(whole[key], rel=1e-3), key
    assert lines["whole"][-1]["r_std"] > 0.1


def test_only_the_best_candidates_stay(tmp_path, monkeypatch):
    kind = "diffusion"
    ckpt = make_checkpoint(tmp_path / "ref.safetensors", kind)
    keys = ("finetune.ema_widths=[0.1,0.05]", "finetune.max_denoising_ratio=1e9")
    everything, out = tmp_path / "all", tmp_path / "best"
    finetune.run(tiny_recipe(ckpt, kind, *keys), everything, device=CPU)
    drop, calls = promotion.drop_candidates, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:  # after the first round's record
            raise KilledError
        drop(*args)

    recipe = tiny_recipe(ckpt, kind, *keys, "finetune.keep_candidates=best")
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "drop_candidates", killed)
        with pytest.raises(KilledError):
            finetune.run(recipe, out, device=CPU)
    assert len(list((out / "round-01" / "checkpoints").iterdir())) == 4
    result = finetune.run(recipe, out, device=CPU)
    for record in result["rounds"]:
        here = out / f"round-{record['round']:02d}" / "checkpoints"
        step = record["best_images"] // recipe.finetune.batch
        names = [f"step-{step:06d}-ema0.050.safetensors", f"step-{step:06d}.safetensors"]
        assert sorted(path.name for path in here.iterdir()) == names
        for name in names:
            ours, theirs = (
                checkpoint.load(path).tensors for path in (here / name, everything / here.relative_to(out) / name)
            )
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert finetune.run(recipe, out, device=CPU) == result


def test_finished_run_answers_again_and_changes_nothing(finished):
    kind, ckpt, out, result = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert finetune.run(tiny_recipe(ckpt, kind), out, device=CPU) == result
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_recipe_is_refused_with_its_differing_keys(finished):
    kind, ckpt, out, _ = finished
    with pytest.raises(RunError, match=r"finetune\.alpha: 1\.0 -> 2\.0"):
        finetune.run(tiny_recipe(ckpt, kind, "finetune.alpha=2.0"), out, device=CPU)


def test_another_reference_is_refused(finished, tmp_path):
    kind, ckpt, out, _ = finished
    changed = Path(ckpt).read_bytes()
    make_checkpoint(Path(ckpt), kind, seed=1)
    try:
        with pytest.raises(RunError, match="reference_sha256"):
            finetune.run(tiny_recipe(ckpt, kind), out, device=CPU)
    finally:
        Path(ckpt).write_bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds("diffusion"))
def test_micro_batches_give_the_same_losses(finished_of, tmp_path, kind):
    _, ckpt, out, _ = finished_of(kind)
    finetune.run(tiny_recipe(ckpt, kind, "finetune.micro_batch=2"), tmp_path / "run", device=CPU)
    whole, cut = (
        [json.loads(x)["loss"] for x in (p / "log.jsonl").read_text().splitlines()] for p in (out, tmp_path / "run")
    )
    # Round 1 from equal references; other batch sizes round differently.
    torch.testing.assert_close(torch.tensor(cut[:3]), torch.tensor(whole[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", kinds("diffusion"))
def test_two_processes_equal_one(finished_of, tmp_path, kind):
    _, _, out, one = finished_of(kind)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((out / "recipe.yaml").read_text())
    options = ["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--device", "cpu", "--json"]
    done = torchrun("-m", "ddo_cli", "finetune-ddo", *options)
    found = json.loads(done.stdout)
    for name in ("shard-000000.safetensors", "shard-000001.safetensors"):
        path = Path("round-01") / "samples" / name
        assert (tmp_path / "run" / path).read_bytes() == (out / path).read_bytes()
    losses = [
        torch.tensor([json.loads(x)["loss"] for x in (p / "log.jsonl").read_text().splitlines()][:3])
        for p in (out, tmp_path / "run")
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert found["reference_score"] == pytest.approx(one["reference_score"], rel=1e-6)  # few images, singular


def test_second_process_is_refused(tmp_path):
    (tmp_path / "lock.py").write_text(
        "import sys; from pathlib import Path; from ddo_cli import rundir; from ddo_cli.errors import RunError\n"
        "try:\n    with rundir.locked(Path('run')): sys.exit(5)\n"
        "except RunError as error: sys.exit(7 if 'in use' in str(error) else 6)"
    )
    (tmp_path / "run").mkdir()
    with rundir.locked(tmp_path / "run"):
        assert launch("lock.py", cwd=tmp_path).returncode == 7
    assert launch("lock.py", cwd=tmp_path).returncode == 5


def test_divergence_stops_the_run_and_names_the_last_good_checkpoint(finished, tmp_path):
    kind, ckpt, _, _ = finished
    recipe = tiny_recipe(ckpt, kind, "finetune.lr=0.05", "finetune.max_denoising_ratio=1.01")
    with pytest.raises(NumericsError, match="last good checkpoint is"):
        finetune.run(recipe, tmp_path / "run", device=CPU)


def test_non_finite_loss_stops_the_run(finished, tmp_path, monkeypatch):
    kind, ckpt, _, _ = finished

    def broken(*args, **kwargs):
        found = ddo_loss(*args, **kwargs)
        return found._replace(loss=found.loss * torch.nan)

    monkeypatch.setattr(objective, "ddo_loss", broken)
    with pytest.raises(NumericsError, match=r"gradient of step 0 is not finite .* last good checkpoint is"):
        finetune.run(tiny_recipe(ckpt, kind), tmp_path / "run", device=CPU)


def test_six_frames_lead_from_the_command_to_the_loss(ddo, tmp_path, monkeypatch):
    """Command, run, trial, fit, step, loss: who reads the one after the other has read the method."""

    def told(*args, **kwargs):
        package = Path(ddo_cli.__file__).parent
        names = [frame.name for frame in traceback.extract_stack() if package in Path(frame.filename).parents]
        raise UsageError(" ".join(names[names.index("finetune_ddo") :]))

    monkeypatch.setattr(objective, "ddo_loss", told)
    ckpt = make_checkpoint(tmp_path / "ref.safetensors")
    recipe = tiny_recipe(ckpt).model_dump_json(exclude_unset=True)
    (tmp_path / "tiny.yaml").write_text(recipe)
    done = ddo("finetune-ddo", "--recipe", "tiny.yaml", "--device", "cpu", "--out", "run", code=2)
    assert done.stderr.split("error: ")[-1].strip() == "finetune_ddo run train fit ddo_step _loss"


def test_uneven_batches_are_refused_before_anything_is_written(finished, tmp_path):
    kind, ckpt, _, _ = finished
    with pytest.raises(UsageError, match="micro_batch = 3 does not divide"):
        finetune.run(tiny_recipe(ckpt, kind, "finetune.micro_batch=3"), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_labels_of_a_fake_set_are_checked_before_anything_is_written(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ref.safetensors")
    with pytest.raises(UsageError, match=r"position gives each of 10 classes .* 16 seeds .* draw 20"):
        finetune.run(tiny_recipe(ckpt, "diffusion", "sampling.labels=position"), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(finished, tmp_path):
    kind, ckpt, _, _ = finished
    found = finetune.run(tiny_recipe(ckpt, kind), tmp_path / "run", device=CPU, dry_run=True)
    assert found["steps_per_round"] == 6
    assert not (tmp_path / "run").exists()


def test_changed_data_is_refused(finished, tmp_path, monkeypatch):
    kind, ckpt, out, _ = finished
    opened = setup.open_images

    def changed(*args):
        found = opened(*args)
        return found._replace(items=255 - found.items)

    monkeypatch.setattr(setup, "open_images", changed)
    with pytest.raises(RunError, match="data_sha256"):
        finetune.run(tiny_recipe(ckpt, kind), out, device=CPU)


def test_a_mistake_in_the_metric_claims_nothing(finished, tmp_path):
    kind, ckpt, _, _ = finished
    with pytest.raises(CheckpointError, match=r"nope\.safetensors does not exist"):
        finetune.run(tiny_recipe(ckpt, kind, "metric.extractor=nope.safetensors"), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


def test_a_moved_run_answers_with_its_new_place_and_restores_a_lost_final(finished, tmp_path):
    kind, ckpt, out, result = finished
    shutil.copytree(out, tmp_path / "moved")
    (tmp_path / "moved" / "final.safetensors").unlink()
    found = finetune.run(tiny_recipe(ckpt, kind), tmp_path / "moved", device=CPU)
    assert found["final"] == str(tmp_path / "moved" / "final.safetensors")
    assert found["final_score"] == result["final_score"]
    assert Path(found["final"]).read_bytes() == (out / "final.safetensors").read_bytes()


def test_without_both_generations_of_its_state_a_run_is_refused(finished_of, tmp_path):
    kind, ckpt, out, _ = finished_of("diffusion")
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run" / "state.json").write_text("{}")
    (tmp_path / "run" / "state.previous.json").unlink()
    with pytest.raises(RunError, match=r"state\.json is damaged .2 bytes in place.* state\.previous\.json is missing"):
        finetune.run(tiny_recipe(ckpt, kind), tmp_path / "run", device=CPU)


def test_a_damaged_recipe_is_written_again_for_the_same_options_only(finished_of, tmp_path, capsys):
    kind, ckpt, out, result = finished_of("diffusion")
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text("foo")
    with pytest.raises(RunError, match=r"recipe\.yaml is damaged .* made with other options"):
        finetune.run(tiny_recipe(ckpt, kind, "finetune.alpha=2.0"), tmp_path / "run", device=CPU)
    assert finetune.run(tiny_recipe(ckpt, kind), tmp_path / "run", device=CPU)["final_score"] == result["final_score"]
    assert "recipe.yaml is damaged" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "recipe.yaml").read_text() == (out / "recipe.yaml").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What may change when a run goes on


def test_more_rounds_go_on_where_a_finished_run_ended(finished_of, tmp_path, capsys, monkeypatch):
    """... and end where a run of as many rounds ends."""
    _, ckpt, reference, _ = finished_of("diffusion")
    out = tmp_path / "run"
    finetune.run(tiny_recipe(ckpt, "diffusion", "finetune.rounds=1"), out, device=CPU)
    more, copy = tiny_recipe(ckpt, "diffusion", "finetune.log_every=3"), finetune.copy_weights

    def killed(source, target):
        if target.name == "final.safetensors":
            raise KilledError
        copy(source, target)

    with monkeypatch.context() as patch:  # after the last round, while the last file is that of fewer rounds
        patch.setattr(finetune, "copy_weights", killed)
        with pytest.raises(KilledError):
            finetune.run(more, out, device=CPU)
    again = finetune.run(more, out, device=CPU)
    assert "finetune.rounds: 1 -> 2" in " ".join(capsys.readouterr().err.split())
    ours, theirs = (checkpoint.load(path / "final.safetensors").tensors for path in (out, reference))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    scores = [[one["score"] for one in json.loads((p / "state.json").read_text())["rounds"]] for p in (out, reference)]
    assert scores[0] == scores[1]
    assert len(again["rounds"]) == 2
    with pytest.raises(RunError, match=r"finetune\.rounds: 2 -> 1"):
        finetune.run(tiny_recipe(ckpt, "diffusion", "finetune.rounds=1"), out, device=CPU)


EVERY_STEP = ("finetune.rounds=1", "finetune.eval_every=4", "finetune.lr=0.03", "metric.repeats=1")


@pytest.mark.slow
def test_patience_ends_a_round_where_scores_have_risen(finished_of, tmp_path, monkeypatch, capsys):
    """Until then it is the run without patience, also when it is killed on the way."""
    _, ckpt, _, _ = finished_of("autoregressive")
    finetune.run(tiny_recipe(ckpt, "autoregressive", *EVERY_STEP), tmp_path / "plain", device=CPU)
    (whole,) = json.loads((tmp_path / "plain" / "state.json").read_text())["rounds"]
    assert "trained_images" not in whole
    scores = [figures["fd_embedded"] for figures in whole["candidates"].values()]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 6

    patient, count, rename, run = (
        tiny_recipe(ckpt, "autoregressive", *EVERY_STEP, "finetune.patience=1"), 0, os.replace, Scoring.run,
    )  # fmt: skip

    def replace(source, target):
        nonlocal count
        rename(source, target)
        count += 1
        if count % 37 == 0:
            raise KilledError

    def rising(*arguments, **options):
        """Scores that rise after the third candidate."""
        return {"fd_embedded": abs(run(*arguments, **options)["fd_embedded"] - scores[2])}

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        patch.setattr(Scoring, "run", rising)
        for _ in range(12):
            try:
                found = finetune.run(patient, tmp_path / "run", device=CPU)
                break
            except KilledError:
                continue
    assert count > 37
    (record,) = json.loads((tmp_path / "run" / "state.json").read_text())["rounds"]
    assert [f["fd_embedded"] for f in record["candidates"].values()] == [abs(s - scores[2]) for s in scores[:4]]
    assert (record["ended_early"], record["trained_images"]) == (True, 16)
    assert found["rounds"][0]["best_images"] == 12
    assert "ends after 16 images" in " ".join(capsys.readouterr().err.split())
    assert "ended at 16" in (tmp_path / "run" / "report.html").read_text()
    ours, theirs = (losses_in(tmp_path / name) for name in ("run", "plain"))
    assert ours == theirs[: len(ours)]
    best = [
        checkpoint.load(path).tensors
        for path in (
            tmp_path / "run" / "round-01" / "best.safetensors",
            tmp_path / "plain" / "round-01" / "checkpoints" / "step-000003.safetensors",
        )
    ]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])


def losses_in(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.mark.slow
def test_rounds_without_promotion_end_a_run(finished_of, tmp_path, capsys):
    """With weights that do not move no candidate is better; without the rule the same run goes on."""
    _, ckpt, _, _ = finished_of("autoregressive")
    short = ("finetune.images_per_round=12", "finetune.eval_every=4", "finetune.patience=1", "metric.repeats=1")
    still = ("finetune.lr=1.0e-30", "finetune.rounds=3", *short)
    recipe, out = tiny_recipe(ckpt, "autoregressive", *still), tmp_path / "run"
    for _ in range(2):  # a finished run answers alike
        result = finetune.run(recipe, out, device=CPU)
        assert [record["promoted"] for record in result["rounds"]] == [False, False]
        assert result["ended_early"]
        assert "ended after round 2 of 3: 2 in a row without a promotion" in " ".join(capsys.readouterr().err.split())
    page = (out / "report.html").read_text()
    assert "Ended after round 2 of 3" in page
    assert page.count("; ended at 8<") == 2  # the second candidate, of three
    assert page.count("reference left, candidate right") == 2 * 2  # as caption and as alternative text
    assert (out / "final.safetensors").read_bytes() == Path(ckpt).read_bytes()
    more = tiny_recipe(ckpt, "autoregressive", *still, "finetune.patience_rounds=null")
    result = finetune.run(more, out, device=CPU)
    assert len(result["rounds"]) == 3
    assert "ended_early" not in result


def test_what_ends_a_run():
    def ends(outcomes: str, *overrides: str) -> bool:
        recipe = tiny_recipe("embedded:digits32", "diffusion", "finetune.rounds=6", *overrides)
        return is_over(recipe, [{"promoted": letter == "p"} for letter in outcomes])

    assert not ends("")
    assert not ends("-")
    assert ends("--")
    assert ends("p--")
    assert not ends("-p-")
    assert ends("pppppp")
    assert not ends("--", "finetune.patience_rounds=3")
    assert ends("---", "finetune.patience_rounds=3")
    assert not ends("-----", "finetune.patience_rounds=null")
    # Other settings are a new chance, for as many rounds.
    assert not ends("--", "finetune.from_round={3: {lr: 2.0e-5}}")
    assert not ends("---", "finetune.from_round={3: {lr: 2.0e-5}}")
    assert ends("----", "finetune.from_round={3: {lr: 2.0e-5}}")


def test_dry_run_tells_what_may_end_a_run_early(tmp_path):
    def told(*overrides: str) -> dict[str, int]:
        recipe = tiny_recipe("embedded:digits32", "diffusion", *overrides)
        return finetune.run(recipe, tmp_path / "run", device=CPU, dry_run=True, measure=False).get("may_end_early", {})

    assert told() == {}  # two rounds
    assert told("finetune.rounds=4") == {"rounds_without_promotion": 2}
    assert told("finetune.patience=3") == {"candidates_without_gain": 3}


def test_files_that_moved_are_taken_over(tmp_path, monkeypatch, capsys):
    """A run is tied to the content of its data and reference, not to where they lie or how that is spelt."""
    monkeypatch.chdir(tmp_path)
    ckpt, items = make_checkpoint(tmp_path / "ref.safetensors"), open_images("embedded:digits32", 64)
    np.savez(tmp_path / "d.npz", images=items.items, labels=items.labels)
    settings = ("finetune.rounds=1", "data.num=null")
    first = finetune.run(tiny_recipe(ckpt, "diffusion", "data.source=d.npz", *settings), tmp_path / "run", device=CPU)
    (tmp_path / "moved").mkdir()
    for name in ("d.npz", "ref.safetensors"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = tiny_recipe("moved/ref.safetensors", "diffusion", "data.source=./moved/d.npz", *settings)
    capsys.readouterr()
    assert finetune.run(moved, tmp_path / "run", device=CPU)["final_score"] == first["final_score"]
    said = " ".join(capsys.readouterr().err.split())
    assert "is continued with data.source: d.npz -> ./moved/d.npz; model.ckpt:" in said
    assert finetune.run(moved, tmp_path / "run", device=CPU)["final_score"] == first["final_score"]
    assert "is continued with" not in capsys.readouterr().err  # the new place is the run's
    np.savez(tmp_path / "other.npz", images=255 - items.items, labels=items.labels)
    with pytest.raises(RunError, match="data_sha256"):
        finetune.run(
            tiny_recipe("moved/ref.safetensors", "diffusion", "data.source=other.npz", *settings),
            tmp_path / "run",
            device=CPU,
        )


def test_names_of_classes_are_stored(tmp_path, monkeypatch, capsys):
    """Folders 0 ... 9 with other pictures in other folders are another run, and state.json says what a label means.

    So do weight files, and a later run from one of them compares.
    """
    monkeypatch.chdir(tmp_path)
    ckpt, items = make_checkpoint(tmp_path / "ref.safetensors"), open_images("embedded:digits32", 64)
    for row, (pixels, label) in enumerate(zip(items.items, items.labels, strict=True)):
        folder = tmp_path / "set" / "abcdefghij"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{row}.png")
    recipe = tiny_recipe(ckpt, "diffusion", "data.source=set", "data.num=null", "finetune.rounds=1")
    finetune.run(recipe, tmp_path / "run", device=CPU)
    stored = json.loads((tmp_path / "run" / "state.json").read_text())["classes"]
    assert stored == {str(label): name for label, name in enumerate("abcdefghij")}
    (tmp_path / "set" / "a").rename(tmp_path / "set" / "0a")
    with pytest.raises(RunError, match=r"classes\.0: a -> 0a"):
        finetune.run(recipe, tmp_path / "run", device=CPU)
    assert "are named otherwise" not in capsys.readouterr().err
    (tmp_path / "set" / "b").rename(tmp_path / "set" / "zz")  # class 9, and c becomes class 1
    later = tiny_recipe(str(tmp_path / "run" / "final.safetensors"), "diffusion", "data.source=set", "data.num=null")
    finetune.run(later, tmp_path / "later", device=CPU, dry_run=True, measure=False)
    said = "10 classes are named otherwise than in the data that the model was trained on: class 0 is 0a, there a;"
    assert said in capsys.readouterr().err
