"""Learning rates in images, optimizers, float16, and settings that change between rounds."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, KINDS, fit_events, make_checkpoint, tiny_recipe
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ddo_cli import checkpoint
from ddo_cli.data.pairs import Pairs, Shuffled
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.engines.ddo import finetune
from ddo_cli.errors import NumericsError, RecipeError, RunError, UsageError
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_objective
from ddo_cli.recipe.load import load, to_yaml
from ddo_cli.recipe.schema import Recipe, TrainRecipe
from ddo_cli.trainable import Loss, Trainable
from ddo_cli.training import loop, optim
from ddo_cli.training.lr import learning_rate
from ddo_cli.training.meter import Meter

# ---------------------------------------------------------------------------------------------------------------------
# Learning rates


def test_inverse_square_root_is_edm2s():
    """EDM2-XS: 0.012, 10 million images of warm-up, falling from 70,000 batches of 2048 on; published values."""
    recipe = TrainRecipe(
        lr=0.012, lr_schedule="inverse-sqrt", warmup=10_000_000, decay_images=70_000 * 2048, batch=2048
    )
    at = {5_000_000: 0.006, 10_000_000: 0.012, 143_360_000: 0.012, 286_720_000: 0.00848528, 2**31: 0.00310049}
    for n_images, rate in at.items():
        assert learning_rate(recipe, n_images, 2**31) == pytest.approx(rate, rel=1e-5)
    # The decay counts the warm-up's images, too: where it is longer than the decay's start, both act.
    recipe = TrainRecipe(lr=1.0, lr_schedule="inverse-sqrt", warmup=400, decay_images=100)
    assert learning_rate(recipe, 200, 1000) == pytest.approx(0.5 / math.sqrt(2))


def test_line_is_vars():
    """0.05 of the images after the warm-up at the top, then a line to the end's share."""
    recipe = TrainRecipe(lr=2.0, lr_schedule="linear", warmup=100, lr_hold=0.2, lr_final=0.1)
    rates = [learning_rate(recipe, n, 1100) for n in (50, 100, 300, 700, 1100)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.1, 0.2])


def test_inverse_square_root_without_its_start():
    with pytest.raises(RecipeError, match=r"finetune\.lr_schedule = 'inverse-sqrt': inverse-sqrt needs decay_images"):
        load("quickstart", ["finetune.lr_schedule=inverse-sqrt"])


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Net(Trainable):
    """Two layers; `scale` stands for gradients that overflow."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def fit(path, *pauses, steps=6, factor=lambda step: 1.0, net=None, make=Net, **recipe):
    settings = TrainRecipe(**({"lr": 0.1, "batch": 2, "log_every": 1, "save_every": 100} | recipe))
    path.mkdir(exist_ok=True)

    def loss(model, positions, rng):
        x = torch.linspace(-1, 1, 6).reshape(2, 3) + rng.step
        return Loss(model(x).square().mean() * factor(rng.step), {})

    for until in (*pauses, None):
        trained = make() if net is None else net
        fit_events(trained, loss, path, settings, steps, until)
    return trained, [json.loads(line) for line in (path / "log").read_text().splitlines()]


def test_adamw_decays_matrices_only(tmp_path):
    """With no gradient at all each step takes lr * weight_decay off the weights that decay, and off nothing else."""
    before = Net()
    nothing = {"factor": lambda step: 0.0, "weight_decay": 0.5, "optimizer": "adamw", "steps": 3}
    after, _ = fit(tmp_path / "adamw", **nothing)
    assert_close(after.first.weight, before.first.weight * (1 - 0.1 * 0.5) ** 3)
    assert torch.equal(after.first.bias, before.first.bias)
    # Adam's decay is a gradient, which its division by the root mean square makes a step of lr, for biases as well.
    after, _ = fit(tmp_path / "adam", **{**nothing, "optimizer": "adam", "steps": 1})
    for ours, theirs in zip(after.parameters(), before.parameters(), strict=True):
        assert_close(ours, theirs - 0.1 * theirs.sign(), rtol=1e-4, atol=1e-5)


def test_a_model_exempts_parameters_from_decay():
    model = registry.load_model("embedded:digits32", CPU).model
    recipe = TrainRecipe(optimizer="adamw", weight_decay=0.1, adam_eps=1e-6)
    decayed, exempt = optim.build(model, recipe).param_groups
    assert {p.ndim for p in exempt["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) == 2
    assert (decayed["weight_decay"], exempt["weight_decay"], decayed["eps"]) == (0.1, 0.0, 1e-6)
    model.no_decay = lambda name, parameter: True
    assert [group["weight_decay"] for group in optim.build(model, recipe).param_groups] == [0.0]


@pytest.fixture(params=["asked", "fused"])
def stepping(request, monkeypatch):
    """The optimizer is asked to step or not; or, as on a GPU, a fused one decides itself and is read a step later."""
    if request.param == "fused":
        monkeypatch.setattr(optim, "_can_fuse", lambda parameters: True)
    return request.param


def test_adamw_goes_on_as_if_it_had_not_stopped(tmp_path, stepping):
    settings = {"optimizer": "adamw", "weight_decay": 0.1}
    whole, _ = fit(tmp_path / "whole", **settings)
    paused, _ = fit(tmp_path / "paused", 2, 5, **settings)
    for ours, theirs in zip(paused.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_moments_of_8_bits(tmp_path, monkeypatch):
    """They take a quarter of the bytes, steps are nearly AdamW's, and a training that was stopped ends alike."""
    pytest.importorskip("bitsandbytes")

    class Wide(Trainable):  # tensors of fewer than 4096 numbers have moments of float32
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = torch.nn.Linear(3, 80), torch.nn.Linear(80, 80)

        forward = Net.forward

    settings = {"optimizer": "adamw8bit", "weight_decay": 0.1, "lr": 1e-3}
    whole, _ = fit(tmp_path / "whole", make=Wide, **settings)
    paused, _ = fit(tmp_path / "paused", 2, 5, make=Wide, **settings)
    exact, _ = fit(tmp_path / "exact", make=Wide, **{**settings, "optimizer": "adamw"})
    for ours, theirs, other, start in zip(*(net.parameters() for net in (paused, whole, exact, Wide())), strict=True):
        assert torch.equal(ours, theirs)
        assert float((theirs - other).detach().abs().max()) < 0.1 * float((theirs - start).detach().abs().max())
    states = [checkpoint.load(tmp_path / name / "state").tensors for name in ("paused", "exact")]
    moments = [sum(t.nbytes for name, t in state.items() if name.startswith("adam.")) for state in states]
    assert moments[0] < 0.4 * moments[1]
    assert any(tensor.dtype == torch.uint8 for tensor in states[0].values())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"needs the library bitsandbytes.*pip install 'ddo-cli\[8bit\]'"):
        fit(tmp_path / "none", **settings)
    with pytest.raises(RecipeError, match=r"optimizer = 'adamw8bit': does not go with sharding = fsdp"):
        load("quickstart", ["finetune.optimizer=adamw8bit", "finetune.sharding=fsdp"])


def test_float16_is_near_float32_and_goes_on_as_if_it_had_not_stopped(tmp_path, stepping):
    whole, log = fit(tmp_path / "whole", precision="fp16")
    _, exact_log = fit(tmp_path / "exact")
    assert_close(log[0]["loss"], exact_log[0]["loss"], rtol=1e-2, atol=0)
    assert log[0]["loss"] != exact_log[0]["loss"]  # it was float16 indeed
    assert (log[-1]["loss_scale"], log[-1]["skipped_steps"]) == (2048, 0)
    assert "loss_scale" not in exact_log[0]
    paused, again = fit(tmp_path / "paused", 1, 4, precision="fp16")
    for ours, theirs in zip(paused.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [line["loss"] for line in again] == [line["loss"] for line in log]


def overflow(*steps):
    return lambda step: torch.inf if step in steps else 1.0


def test_the_scale_doubles_after_good_steps_in_a_row(tmp_path, monkeypatch, stepping):
    """The one that overflows ends the row of those before it."""
    monkeypatch.setattr(optim, "_STEPS_TO_DOUBLE", 3)
    _, log = fit(tmp_path / "x", factor=overflow(2), precision="fp16", lr=1e-3)
    assert [line["loss_scale"] for line in log] == [2048, 2048, 1024, 1024, 1024, 2048]


def test_a_step_that_overflows_is_left_out(tmp_path, stepping):
    settings = {"precision": "fp16", "lr": 1e-3}
    _, log = fit(tmp_path / "x", factor=overflow(1, 2), **settings)
    assert [line["loss_scale"] for line in log] == [2048, 1024, 512, 512, 512, 512]
    assert [line["skipped_steps"] for line in log] == [0, 1, 2, 2, 2, 2]
    assert all(math.isfinite(line["grad_norm"]) for line in log)
    short, _ = fit(tmp_path / "short", steps=1, **settings)
    cut, _ = fit(tmp_path / "cut", steps=3, factor=overflow(1, 2), **settings)
    for ours, theirs in zip(cut.parameters(), short.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the second and third step changed nothing
    _, paused = fit(tmp_path / "paused", 2, factor=overflow(1, 2), **settings)
    assert [line["loss_scale"] for line in paused] == [line["loss_scale"] for line in log]
    assert paused[-1]["skipped_steps"] == 2


def test_a_scale_that_cannot_fall_further_stops_the_run(tmp_path, stepping):
    with pytest.raises(NumericsError, match="the gradient of step 11 is not finite"):  # 2048 is 2^11
        fit(tmp_path / "x", steps=20, factor=overflow(*range(20)), precision="fp16")
    with pytest.raises(NumericsError, match="the gradient of step 1 is not finite"):
        fit(tmp_path / "y", steps=20, factor=overflow(*range(1, 20)))


def test_a_failure_is_known_one_step_later_and_no_step_is_taken_since(tmp_path, stepping):
    """At the latest before a state is saved. The loss is that of the step that failed."""
    good, _ = fit(tmp_path / "good", steps=3, log_every=100)
    for save_every, known_after in ((100, 4 if stepping == "fused" else 3), (4, 3)):
        path, net, called = tmp_path / str(save_every), Net(), []
        with pytest.raises(NumericsError, match=r"the gradient of step 3 is not finite \(loss inf\)") as caught:
            fit(
                path, steps=9, net=net, log_every=100, save_every=save_every,
                factor=lambda step, called=called: called.append(step) or overflow(3)(step),
            )  # fmt: skip
        assert caught.value.step == 4
        assert called == list(range(known_after + 1))
        assert not (path / "state").exists()
        for ours, expected in zip(net.parameters(), good.parameters(), strict=True):
            assert torch.equal(ours, expected)


class Reads(TorchDispatchMode):
    """Counts values, and sizes that depend on values, that Python asks tensors for: on a GPU it would wait for each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        by_numbers = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1])
        self.count += bool(waits) and not by_numbers
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_step_of_ddo_reads_whether_the_one_before_has_failed_and_nothing_else(tmp_path, monkeypatch, kind, precision):
    """From rows to averages, of every kind of model, when a fused optimizer decides. That number is on the CPU."""
    monkeypatch.setattr(optim, "_can_fuse", lambda parameters: True)
    model, ref = (registry.load_model(make_checkpoint(tmp_path / "x.safetensors", kind), CPU).model for _ in range(2))
    ref.requires_grad_(False)
    objective = ddo_objective(model, ref, DdoSettings(1.0, 0.05))
    items = np.random.default_rng(0).integers(0, 256, (32, *model.codec.shape), dtype=np.uint8)
    sides = [Shuffled(items, np.arange(32) % 10, side) for side in ("real", "fake")]
    settings = TrainRecipe(batch=4, micro_batch=2, log_every=100, save_every=100, grad_clip=1.0, precision=precision)
    plan = loop.Plan("x", 4, settings, (0,), tmp_path / "state", "", lambda: "none")
    with Reads() as reads:
        running, counts = loop.fit(model, objective, Pairs(*sides), plan, Meter(tmp_path / "log", {}, 4, CPU)), []
        for _ in range(3):
            reads.count = 0
            next(running)
            counts.append(reads.count)
        running.close()
    assert counts[1:] == [1, 1]


def test_a_fused_optimizer_takes_the_same_steps(tmp_path, monkeypatch):
    """But for rounding; so a state of a CPU goes on on a GPU, and the other way round."""
    settings = {"optimizer": "adamw", "weight_decay": 0.1, "precision": "fp16", "factor": overflow(1)}
    asked, _ = fit(tmp_path / "asked", **settings)
    monkeypatch.setattr(optim, "_can_fuse", lambda parameters: True)
    fused, _ = fit(tmp_path / "fused", **settings)
    assert optim.build(fused, TrainRecipe(optimizer="adamw")).defaults["fused"]
    names = [set(checkpoint.load(tmp_path / name / "state").tensors) for name in ("asked", "fused")]
    assert names[0] == names[1]
    for ours, theirs, start in zip(fused.parameters(), asked.parameters(), Net().parameters(), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert float((ours - start).detach().abs().max()) > 0.1


def test_the_model_is_told_of_each_step(tmp_path, monkeypatch):
    """Before the forward passes of every step, once for all its micro-batches, in rounds of DDO as well."""
    calls = []
    forward = DiffusionModel.forward
    monkeypatch.setattr(DiffusionModel, "before_step", lambda self: calls.append("step"))
    monkeypatch.setattr(DiffusionModel, "forward", lambda self, *a: (calls.append("pass"), forward(self, *a))[1])
    ckpt = make_checkpoint(tmp_path / "ref.safetensors")
    settings = ["finetune.rounds=1", "finetune.images_per_round=8", "finetune.micro_batch=2"]
    finetune.run(tiny_recipe(ckpt, "diffusion", *settings), tmp_path / "run", device=CPU)
    assert calls[calls.index("step") :] == ["step", *["step", "pass", "pass"] * 2]  # the first is the reference's


# ---------------------------------------------------------------------------------------------------------------------
# Settings from a round on


def test_later_settings_lie_on_top_of_earlier_ones():
    draw = "finetune.draw={p_mean: -0.4, p_std: 1.6}"
    changes = "finetune.from_round={2: {draw: {p_std: 3.0}, lr: 2e-5}, 4: {draw: {p_mean: 0.0}, alpha: [1, 2]}}"
    recipe = load("quickstart", [draw, changes, "finetune.from_round.2.lr=3e-5"])
    found = [recipe.finetune.of_round(number) for number in range(1, 6)]
    assert [one.draw["p_std"] for one in found] == [1.6, 3.0, 3.0, 3.0, 3.0]
    assert [one.draw["p_mean"] for one in found] == [-0.4, -0.4, -0.4, 0.0, 0.0]
    assert [one.lr for one in found] == [recipe.finetune.lr, *[3e-5] * 4]
    assert [one.alpha for one in found][2:] == [recipe.finetune.alpha, (1.0, 2.0), (1.0, 2.0)]
    assert recipe.of_round(4).finetune == found[3]
    assert Recipe.model_validate(yaml.safe_load(to_yaml(recipe))) == recipe  # keys of JSON are texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{3: {lrr: 1.0}}", r"unknown key 'finetune\.from_round\.3\.lrr' \(did you mean 'lr'\?\)"),
        ("{3: {lr: -1.0}}", r"finetune\.from_round\.3\.lr = -1\.0: input should be greater than 0"),
        ("{3: {draw: 5}}", r"finetune\.from_round\.3\.draw = 5: input should be a valid dictionary"),
        ("{3: {rounds: 5}}", r"finetune\.from_round\.3\.rounds = 5: is of all rounds; remove it here"),
        ("{3: {precision: bf16}}", r"finetune\.from_round\.3\.precision = 'bf16': is of all rounds"),
        ("{1: {lr: 1.0}}", r"finetune\.from_round\.1.* input should be greater than or equal to 2"),
        ("{two: {lr: 1.0}}", r"finetune\.from_round\.two.* input should be a valid integer"),
        ("{3: {lr_schedule: inverse-sqrt}}", r"finetune\.from_round\.3\.lr_schedule = .* needs decay_images"),
    ],
)
def test_settings_of_a_round_are_checked_like_the_others(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load("quickstart", [f"finetune.from_round={text}"])
    assert len(str(caught.value).splitlines()) == 1


def test_a_mistake_is_told_once_where_it_comes_in():
    with pytest.raises(RecipeError) as caught:
        load("quickstart", ["finetune.from_round={2: {lr: -1.0}, 3: {beta: 0.01}, 4: {lrr: 2.0}}"])
    lines = str(caught.value).splitlines()
    assert ["from_round.2.lr" in lines[0], "from_round.4.lrr" in lines[1], len(lines)] == [True, True, 2]


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    """Three rounds: the second with another p_std and twice the steps, the third with a sweep of two nodes."""
    path = tmp_path_factory.mktemp("rounds")
    ckpt = make_checkpoint(path / "ref.safetensors")
    changes = "finetune.from_round={2: {draw: {p_std: 3.0}, images_per_round: 48}, 3: {alpha: [1, 2], num_fake: 24}}"
    recipe = tiny_recipe(ckpt, "diffusion", "finetune.rounds=3", "metric.repeats=1", changes)
    return ckpt, recipe, path / "run", finetune.run(recipe, path / "run", device=CPU)


def test_rounds_run_with_their_own_settings(changing):
    _, _, out, result = changing
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [max(line["step"] for line in log if line["round"] == number) for number in (1, 2, 3)] == [6, 12, 12]
    assert ["nodes" in record for record in result["rounds"]] == [False, False, True]
    assert [node["alpha"] for node in result["rounds"][2]["nodes"]] == [1, 2]
    sets = [json.loads((out / f"round-0{n}" / "samples" / "manifest.json").read_text()) for n in (1, 2, 3)]
    assert len({json.dumps(one["seeds"]) for one in sets}) == 3  # no seed is drawn twice
    assert (out / "report.html").is_file()


def test_the_draw_of_a_round_is_really_used(changing, tmp_path, monkeypatch):
    """sigma = exp(p_mean + p_std n): with p_std = 3 log sigma spreads almost three times as far."""
    ckpt, _, _, _ = changing
    sigmas, draw = {}, DiffusionModel.draw

    def seen(self, num_rows, rng):
        found = draw(self, num_rows, rng)
        sigmas.setdefault(self.draw_options.p_std, []).append(found.sigma.log())
        return found

    monkeypatch.setattr(DiffusionModel, "draw", seen)
    changes = "finetune.from_round={2: {draw: {p_std: 3.0}}}"
    plain = tiny_recipe(ckpt, "diffusion", "finetune.rounds=2", "metric.repeats=1", changes)
    finetune.run(plain, tmp_path / "run", device=CPU)
    own = checkpoint.read_header(ckpt)["config"]["draw"]["p_std"]
    assert sorted(sigmas) == sorted({own, 3.0})
    spread = {p_std: float(torch.cat(found).std()) for p_std, found in sigmas.items()}
    assert spread[3.0] / spread[own] == pytest.approx(3.0 / own, rel=0.5)  # 24 values each


def test_other_settings_of_a_round_are_another_run(changing):
    _, recipe, out, result = changing
    assert finetune.run(recipe, out, device=CPU) == result  # finished, and read back from YAML as the same
    changed = recipe.model_dump()
    changed["finetune"]["from_round"][2]["images_per_round"] = 96
    with pytest.raises(RunError, match=r"finetune\.from_round\.2\.images_per_round: 48 -> 96"):
        finetune.run(Recipe.model_validate(changed), out, device=CPU)


def test_dry_run_shows_the_rounds_that_differ(changing, tmp_path):
    ckpt, recipe, _, _ = changing
    found = finetune.run(recipe, tmp_path / "run", device=CPU, dry_run=True)
    shown = found["settings_by_round"]
    assert [row["rounds"] for row in shown] == ["1", "2", "3"]
    assert [row["images_per_round"] for row in shown] == [24, 48, 48]
    assert shown[2]["draw"] == {"p_std": 3.0}
    assert "batch" not in shown[0]
    plain = finetune.run(tiny_recipe(ckpt), tmp_path / "run", device=CPU, dry_run=True)
    assert "settings_by_round" not in plain
    wrong = tiny_recipe(ckpt, "diffusion", "finetune.from_round={2: {draw: {p_sdt: 3.0}}}")
    with pytest.raises(RecipeError, match=r"round 2: finetune\.draw\.p_sdt .*did you mean 'p_std'"):
        finetune.run(wrong, tmp_path / "run", device=CPU, dry_run=True)
