"""Relatives of DDO: values, gradients and optima in closed form; the rows that they compare; tiny runs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, tiny_recipe
from families import build, frozen
from kills import KilledError
from PIL import Image
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from ddo_cli import checkpoint
from ddo_cli.data.embedded import open_embedded
from ddo_cli.data.images import open_images
from ddo_cli.data.pairs import Examples, OfOneClass, Pairs, Relabelled, Shuffled
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.ddo.rejected import open_rejected
from ddo_cli.engines.ddo.trial import Trial
from ddo_cli.errors import DataError, UsageError
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_batch, ddo_step
from ddo_cli.objectives.relatives import cca_loss, pairwise_loss
from ddo_cli.rng import StepRng

LOG2 = math.log(2)
NO = torch.zeros(3, dtype=torch.bool)


# --- Losses


def test_values_at_zero_ratio():
    zero = torch.zeros(3)
    found = cca_loss(zero, zero, NO, alpha=4.0, beta=0.05)
    assert_close(found.loss.item(), 5 * LOG2)  # DDO's (1 + alpha) log 2
    one_match = torch.tensor([True, False, False])
    assert_close(cca_loss(zero, zero, one_match, alpha=4.0, beta=0.05).loss.item(), (1 + 4 * 2 / 3 + 1 / 3) * LOG2)
    pair = pairwise_loss(zero, zero, beta=0.05)
    assert_close(pair.loss.item(), LOG2)
    assert found.accuracy.item() == pair.accuracy.item() == 0.5


@pytest.mark.parametrize(("divide", "divisor"), [(False, 1), (True, 3)])
def test_gradients_of_cca(divide, divisor):
    real = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    alpha, beta, match = 3.0, 0.7, torch.tensor([False, True, False])
    cca_loss(real, other, match, alpha, beta, divide).loss.backward()
    assert_close(real.grad, -beta * (-beta * real).sigmoid() / 3 / divisor)
    negative = alpha * beta * (beta * other).sigmoid()
    positive = -beta * (-beta * other).sigmoid()  # a label that was drawn for its own image
    assert_close(other.grad, torch.where(match, positive, negative) / 3 / divisor)


def test_gradients_of_pairs():
    real = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    beta, weight = 0.7, torch.tensor([1.0, 0.0, 1.0])
    found = pairwise_loss(real, fake, beta, weight)
    found.loss.backward()
    slope = beta * (-beta * (real - weight * fake)).sigmoid() / 3
    assert_close(real.grad, -slope)
    assert_close(fake.grad, weight * slope)
    assert_close(found.margin.item(), (1 - 2 + 3) / 3 - (2 + 0.5 - 1) / 3)
    assert found.accuracy.item() == pytest.approx(1 / 3)  # 1 < 2, -2 < 0, 3 > -1
    with pytest.raises(ValueError, match="must be positive"):
        pairwise_loss(NO, NO, 0.0)


def test_accuracy_of_cca_counts_matches_as_positives():
    r = torch.tensor([1.0, 2.0, -1.0])
    found = cca_loss(r, torch.tensor([-1.0, 2.0, 0.0]), torch.tensor([False, True, False]), 1.0, 1.0)
    assert found.accuracy.item() == pytest.approx((1 + 1 + 0 + 1 + 1 + 0.5) / 6)


def test_optimum_of_pairs_is_that_of_ddo():
    """r* = log(p_data / p_ref) / beta + c on three atoms, over all pairs of a real and a fake row (Bradley-Terry)."""
    p_data, p_ref, beta = torch.tensor([5, 3, 2]), torch.tensor([2, 3, 5]), 0.5
    r = ((p_data / p_ref).log().double() / beta + 7).requires_grad_()
    real, fake = (torch.arange(3).repeat_interleave(counts) for counts in (p_data, p_ref))
    pairs = torch.cartesian_prod(real, fake)
    (gradient,) = torch.autograd.grad(pairwise_loss(r[pairs[:, 0]], r[pairs[:, 1]], beta).loss, r)
    assert gradient.abs().max() < 1e-7
    (wrong,) = torch.autograd.grad(pairwise_loss(1.1 * r[pairs[:, 0]], 1.1 * r[pairs[:, 1]], beta).loss, r)
    assert wrong.abs().max() > 1e-3


def test_optimum_of_cca():
    """Positives at (x, c): p(x, c) (1 + p(c)); negatives: alpha p(c) (p(x) - p(x, c)); beta r* = log of their ratio."""
    counts = torch.tensor([[4, 1], [2, 3], [1, 5]])  # of (x, c)
    alpha, beta = 3.0, 0.5
    joint = counts.double() / counts.sum()
    p_c, p_x = joint.sum(0), joint.sum(1)
    positive, negative = joint * (1 + p_c), alpha * p_c * (p_x[:, None] - joint)
    r = ((positive / negative).log() / beta).requires_grad_()
    x, c = (
        part.repeat_interleave(counts.flatten()) for part in torch.cartesian_prod(torch.arange(3), torch.arange(2)).T
    )
    rows = torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(x)))  # every row with every row's label
    x, c, other = x[rows[:, 0]], c[rows[:, 0]], c[rows[:, 1]]

    def gradient(r):
        return torch.autograd.grad(cca_loss(r[x, c], r[x, other], c == other, alpha, beta).loss, r)[0].abs().max()

    assert gradient(r) < 1e-7
    assert gradient((r + 0.1).detach().requires_grad_()) > 1e-3


# --- Rows

ITEMS = np.arange(23, dtype=np.uint8).reshape(23, 1, 1, 1)
LABELS = np.arange(23) % 3


def real_rows(hflip: bool = False) -> Shuffled:
    return Shuffled(ITEMS, LABELS, "real", 0, hflip=hflip)


def test_other_labels_are_those_of_the_next_image_however_rows_are_cut():
    stream = Relabelled(real_rows())
    _, (items, labels) = stream.rows(0, 60)
    assert items is None
    assert torch.equal(labels, real_rows().rows(1, 61).label)
    parts = [Relabelled(real_rows()).rows(start, min(start + 7, 60)) for start in range(0, 60, 7)]
    assert torch.equal(torch.cat([part[1][1] for part in parts]), labels)
    assert torch.equal(torch.cat([part[0].items for part in parts]), real_rows().rows(0, 60).items)


def test_pairs_of_one_class():
    fake_labels = np.array([0, 0, 1, 2, 2, 2, 1, 0, 0, 1])
    fakes = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)

    def stream() -> OfOneClass:
        return OfOneClass(real_rows(), fakes, fake_labels, "fake", 0)

    real, fake = stream().rows(0, 12 * 23)
    assert torch.equal(real.label, fake.label)
    assert torch.equal(real.items, real_rows().rows(0, 12 * 23).items)
    np.testing.assert_array_equal(fake_labels[fake.items.flatten()], fake.label)
    for number, size in ((0, 4), (1, 3), (2, 3)):  # each class's fakes equally often, in an order of their own
        drawn = fake.items.flatten()[fake.label == number]
        rounds = len(drawn) // size
        assert len(set(map(tuple, drawn[: rounds * size].view(rounds, size).sort().values.tolist()))) == 1
        assert len(set(map(tuple, drawn[: rounds * size].view(rounds, size).tolist()))) > 1
    cut = stream()
    for start in (250, 40, 7, 0, 22, 23):
        for side, whole in zip(cut.rows(start, start + 9), (real, fake), strict=True):
            assert torch.equal(side.items, whole.items[start : start + 9])


def test_a_class_without_fakes_is_refused():
    with pytest.raises(DataError, match=r"no generated image has class 2.*num_fake"):
        OfOneClass(real_rows(), ITEMS[:4], np.array([0, 1, 0, 1]), "fake", 0)


def test_user_s_pairs_stay_together_and_are_mirrored_together():
    winners = np.arange(40 * 6, dtype=np.uint8).reshape(40, 1, 2, 3)
    sides = [Shuffled(items, LABELS[:1].repeat(40), "real", 0, hflip=True) for items in (winners, 255 - winners)]
    real, fake = Pairs(*sides).rows(0, 90)
    assert torch.equal(fake.items, 255 - real.items)


# --- The step


@pytest.mark.parametrize("objective", ["ddo", "cca", "spin", "dpo"])
@pytest.mark.parametrize("family", ["patch-unet", "pixel-transformer"])
def test_a_step(family, objective):
    """Exactly 0 for equal weights; else the loss of the rows' log-ratios, with one draw for both halves."""
    model = build(family)
    other = build(family, seed=1)
    rng = torch.Generator().manual_seed(0)
    items = torch.randint(0, 17, (6, *model.codec.shape), generator=rng).to(torch.uint8)
    label = torch.tensor([0, 1, 2, 0, 4, 5])  # row 0: a match
    real = Examples(items[:3], label[:3])
    fake = (None if objective == "cca" else items[3:], label[3:])
    settings = DdoSettings(None if objective in ("spin", "dpo") else 3.0, 0.01, objective=objective)
    batch = ddo_batch(model, real, fake, StepRng((0,), 0, range(3)))
    found = ddo_step(model, model, batch, ref=frozen(model), settings=settings)
    assert found.log["r_real"] == found.log["r_fake"] == found.log["r_square"] == 0

    batch = batch._replace(draw=batch.draw._replace(drop=torch.tensor([False, True, False])))
    found = ddo_step(model, model, batch, ref=frozen(other), settings=settings)
    fake_items = items[:3] if objective == "cca" else items[3:]
    r = []
    for side, labels in ((items[:3], label[:3]), (fake_items, label[3:])):
        x = model.codec.encode(*model.codec.prepare(side, StepRng((0,), 0, range(3))("encode")))
        r.append(model(x, labels, batch.draw, other.predict(x, labels, batch.draw)))
    positive, negative = logsigmoid(0.01 * r[1]), logsigmoid(-0.01 * r[1])
    second = {
        "ddo": -3 * (negative[0] + negative[2]) / 3,
        "cca": -(positive[0] + positive[1] + 3 * negative[2]) / 3,  # a match, no label, a negative
    }
    pairs = -logsigmoid(0.01 * (r[0] - r[1] * torch.tensor([1, 0, 1]))).mean()
    expected = -logsigmoid(0.01 * r[0]).mean() + second[objective] if objective in second else pairs
    assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)


# --- Runs


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ref") / "ref.safetensors", "autoregressive")


def twenty_digits() -> tuple[np.ndarray, np.ndarray]:
    """Two of each class."""
    digits, labels = open_embedded("embedded:digits8", None)
    rows = np.concatenate([np.flatnonzero(labels == number)[:2] for number in range(10)])
    return digits[rows], labels[rows]


@pytest.fixture(scope="module")
def users_pairs(tmp_path_factory):
    """Two folders of 20 digits, images of a pair under one name, in a subfolder for each class."""
    path = tmp_path_factory.mktemp("pairs")
    digits, labels = twenty_digits()
    for side, shift, suffix in (("better", 0, "png"), ("worse", 1, "bmp")):
        for number, (image, label) in enumerate(zip(digits, labels, strict=True)):
            folder = path / side / f"{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(image[0], shift, 1)).save(folder / f"{number:02d}.{suffix}")
    return path


def recipe_of(ckpt, objective, *overrides):
    return tiny_recipe(ckpt, "autoregressive", "finetune.rounds=1", "finetune.eval_every=24", "metric.repeats=1",
                       f"finetune.objective={objective}", *overrides)  # fmt: skip


def keys_of(objective, users_pairs):
    sides = {"source": users_pairs / "better", "rejected": users_pairs / "worse"}
    return [f"data.{key}={path}" for key, path in sides.items()] if objective == "dpo" else []


@pytest.mark.parametrize("objective", ["cca", "spin", "dpo"])
def test_a_run(ckpt, users_pairs, tmp_path, objective, capsys):
    recipe = recipe_of(ckpt, objective, *keys_of(objective, users_pairs))
    result = finetune.run(recipe, tmp_path / "run", device=CPU)
    assert math.isfinite(result["final_score"])
    first, *_ = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert {"loss", "r_real", "r_fake", "margin", "r_std", "accuracy"} <= first.keys()
    assert (tmp_path / "run" / "round-01" / "samples").exists() == (objective == "spin")
    assert f"{objective.upper()}: run (recipe quickstart)" in (tmp_path / "run" / "report.html").read_text()
    said = " ".join(capsys.readouterr().err.split())
    assert f"not read by finetune.objective = {objective}" in said
    assert ("finetune.num_fake = 16" in said) == (objective != "spin")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["cca", "spin", "dpo"])
def test_a_killed_sweep_of_beta_ends_as_in_one_go(ckpt, users_pairs, tmp_path, objective):
    keys = keys_of(objective, users_pairs)
    recipe = recipe_of(ckpt, objective, "finetune.beta=[0.01,0.1]", "finetune.sweep_rungs=1", *keys)
    plan = finetune.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
    assert plan["fake_images_per_round"] == (16 if objective == "spin" else 0)
    result = finetune.run(recipe, tmp_path / "run", device=CPU)
    alpha = 1.0 if objective == "cca" else None
    assert [(node["alpha"], node["beta"]) for node in result["rounds"][0]["nodes"]] == [(alpha, 0.01), (alpha, 0.1)]
    nodes = ["alpha-1-beta-0.01", "alpha-1-beta-0.1"] if alpha else ["beta-0.01", "beta-0.1"]
    assert sorted(path.name for path in (tmp_path / "run" / "round-01" / "nodes").iterdir()) == nodes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trial, "_keep", killed)
        with pytest.raises(KilledError):
            finetune.run(recipe, tmp_path / "again", device=CPU)
    finetune.run(recipe, tmp_path / "again", device=CPU)
    for name in ("final.safetensors", f"round-01/nodes/{nodes[1]}/checkpoints/step-000006.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def killed(*args):
    raise KilledError


def test_pairs_that_do_not_match(ckpt, users_pairs, tmp_path):
    def refusal(better, worse) -> str:
        recipe = recipe_of(ckpt, "dpo", f"data.source={better}", f"data.rejected={worse}")
        with pytest.raises(DataError) as caught:
            finetune.run(recipe, tmp_path / "run", device=CPU)
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    better, worse = users_pairs / "better", tmp_path / "worse"
    shutil.copytree(users_pairs / "worse", worse)
    first = sorted(worse.rglob("*.bmp"))[0]
    first.rename(first.with_name("zz.bmp"))
    assert "images have no counterpart of their name" in refusal(better, worse)
    first.with_name("zz.bmp").unlink()
    assert "holds 20 images and data.rejected" in refusal(better, worse)
    digits, labels = twenty_digits()
    np.savez(tmp_path / "better.npz", images=digits, labels=labels)
    np.savez(tmp_path / "worse.npz", images=255 - digits, labels=labels[::-1])
    count = np.count_nonzero(labels != labels[::-1])
    assert f"{count} of 20 pairs have two labels" in refusal(tmp_path / "better.npz", tmp_path / "worse.npz")


def test_pairs_by_position_have_the_label_of_the_better_image(ckpt, tmp_path, capsys):
    digits, labels = twenty_digits()
    np.savez(tmp_path / "worse.npz", images=255 - digits)
    recipe = recipe_of(ckpt, "dpo", "data.source=embedded:digits8", f"data.rejected={tmp_path}/worse.npz")
    with pytest.raises(DataError, match=r"holds 1797 images and data\.rejected"):
        finetune.run(recipe, tmp_path / "run", device=CPU)
    np.savez(tmp_path / "better.npz", images=digits, labels=labels)
    recipe = recipe_of(ckpt, "dpo", f"data.source={tmp_path}/better.npz", f"data.rejected={tmp_path}/worse.npz")
    finetune.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
    real, model = open_images(f"{tmp_path}/better.npz"), registry.load_model(ckpt, CPU).model
    rejected = open_rejected(recipe, real, model)
    np.testing.assert_array_equal(rejected.labels, labels)
    assert "are by position" in " ".join(capsys.readouterr().err.split())


def test_cca_needs_classes(tmp_path):
    for classes, text in ((0, "is unconditional"), (1, "has one class")):
        config = registry.config_of("pixel-transformer", (1, 8, 8), classes, {"width": 16, "depth": 1, "heads": 2}, {})
        model = registry.build(config)
        header = {"kind": "model", "config": config, "sampling": {}, "provenance": []}
        checkpoint.save(tmp_path / "ref.safetensors", model.state_dict(), header)
        np.savez(tmp_path / "data.npz", images=open_embedded("embedded:digits8", 20)[0], labels=np.zeros(20, np.int64))
        recipe = recipe_of(str(tmp_path / "ref.safetensors"), "cca", f"data.source={tmp_path}/data.npz")
        with pytest.raises(UsageError, match=rf"cca compares .* {text}; use ddo or spin"):
            finetune.run(recipe, tmp_path / "run", device=CPU)


def test_spin_needs_samples_of_every_class(ckpt, tmp_path):
    with pytest.raises(UsageError, match=r"num_fake = 9 is less than the model's 10 classes"):
        finetune.run(recipe_of(ckpt, "spin", "finetune.num_fake=9"), tmp_path / "run", device=CPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "spin", "--alpha", "2"], "--alpha 2 has no effect with finetune.objective = spin"),
        (["--objective", "cca", "finetune.num_fake=64"], "finetune.num_fake=64 has no effect"),
        (["--objective", "dpo"], "give the worse image of each as data.rejected"),
        (["--rejected", "worse"], "data.rejected = worse is read by finetune.objective = dpo alone"),
        (["--objective", "gan"], "finetune.objective = 'gan'"),
        (["finetune.from_round={2: {objective: spin}}"], "is of all rounds"),
    ],
)
def test_refused_options(ddo, arguments, message):
    found = " ".join(ddo("finetune-ddo", *arguments, code=2).stderr.split())
    assert message in found
