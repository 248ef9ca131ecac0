"""What is computed in which precision, said where it counts, and what it does to the log-ratio."""

import importlib.util
import json
import math
from pathlib import Path

import families
import pytest
import torch
from conftest import make_checkpoint, tiny_recipe

from ddo_cli import dist
from ddo_cli.engines import training_run
from ddo_cli.engines.ddo import finetune, reference
from ddo_cli.errors import RunError, UsageError
from ddo_cli.generation import decoding_precision
from ddo_cli.precision import _switches_kept, inference_precision, resolved, settled, training_precision
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.recipe.training import FinetuneRecipe
from ddo_cli.rng import RowRng
from ddo_cli.trainable import Loss, Objective, Trainable
from ddo_cli.training import loop
from ddo_cli.training.meter import Meter

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# ---------------------------------------------------------------------------------------------------------------------
# auto


def test_auto_is_tf32_on_a_gpu_and_float32_on_a_cpu():
    assert [resolved(value, CPU) for value in (None, "auto", "tf32", "fp16")] == ["float32", "float32", "tf32", "fp16"]
    assert [resolved(value, CUDA) for value in (None, "auto", "float32", "bf16")] == ["tf32", "tf32", "float32", "bf16"]
    published = SamplingRecipe(precision="fp16")
    assert [settled(published, device).precision for device in (CPU, CUDA)] == ["fp16", "fp16"]
    assert [settled(SamplingRecipe(), device).precision for device in (CPU, CUDA)] == ["float32", "tf32"]
    assert [decoding_precision(SamplingRecipe(), device) for device in (CPU, CUDA)] == ["float32", "tf32"]
    assert training_run.precision_of(FinetuneRecipe(precision="fp16"), SamplingRecipe(), CUDA) == {
        "precision": {"training": "fp16", "sampling": "tf32"}
    }


def convolutions_and_products() -> tuple[str, str]:
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def test_a_process_starts_without_tf32():
    with _switches_kept():
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # torch's default
        dist.init("cpu")
        assert convolutions_and_products() == ("ieee", "ieee")


class Line(Trainable):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.weight.register_hook(lambda _: self.seen.append(("backward", *convolutions_and_products())))
        self.seen = []

    def forward(self, x):
        self.seen.append(("forward", *convolutions_and_products()))
        return self.weight * x


class Ones:
    def rows(self, start, stop):
        return (torch.ones(stop - start),)


def test_training_in_tf32_switches_steps_and_nothing_else(tmp_path):
    model, settings = Line(), FinetuneRecipe(precision="tf32", batch=2)
    plan = loop.Plan("t", 1, settings, (0,), tmp_path / "s", "t", lambda: "none", frozenset([1]))
    with _switches_kept():
        objective = Objective(lambda x, rng: x, lambda wrapped, x: Loss(wrapped(x).mean(), {}))
        for event in loop.fit(model, objective, Ones(), plan, Meter(tmp_path / "l", {}, 2, CPU)):
            if isinstance(event, loop.Evaluate):
                model.seen.append(("evaluation", *convolutions_and_products()))
        model.seen.append(("afterwards", *convolutions_and_products()))
    tf32, ieee = ("tf32", "tf32"), ("ieee", "ieee")
    assert model.seen == [
        ("forward", *tf32), ("backward", *tf32), ("evaluation", *ieee), ("afterwards", *ieee)
    ]  # fmt: skip


def test_a_section_as_a_whole_keeps_the_keys_that_it_does_not_give():
    plain = load("quickstart")
    changed = load("quickstart", ["finetune={precision: fp16, lr: 1e-5}"])
    update = {"precision": "fp16", "lr": 1e-5}
    assert plain.finetune.warmup != FinetuneRecipe().warmup, "the recipe's own, which was lost"
    assert changed == plain.model_copy(update={"finetune": plain.finetune.model_copy(update=update)})
    assert load("toy2d").model.options
    assert load("toy2d", ["model={name: patch-unet}"]).model.options == {}, "those of another network"
    assert load("quickstart", ["model.options={patch: 2}"]).model.options["widths"] == [32], "merged likewise"
    assert load("quickstart", ["model.options={}"]).model.options == {}


# ---------------------------------------------------------------------------------------------------------------------
# The log-ratio


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_model_and_reference_start_at_a_ratio_of_exactly_0(family, precision):
    """In every precision: the same kernels on the same batch. Predictions are float32, so that r does not cancel."""
    model = families.build(family)
    ref = families.frozen(model)
    with training_precision(precision, CPU):
        loss = families.step(model, ref)
        draw = model.draw(2, RowRng([0, 1]))
        x = model.codec.encode(torch.zeros(2, *model.codec.shape, dtype=torch.uint8))
        prediction = model.predict(x, torch.zeros(2, dtype=torch.int64), draw)
    assert prediction.dtype == model.log_lik(prediction, x, draw).dtype == loss.loss.dtype == torch.float32
    assert float(loss.log["r_square"]) == 0.0
    assert float(loss.loss.detach()) == pytest.approx(2 * math.log(2), rel=1e-6)
    loss.loss.backward()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights)
    assert any(weight.grad.any() for weight in weights)
    with torch.no_grad():
        next(weight for weight in reversed(weights) if weight.grad.any()).add_(0.01)
    with training_precision(precision, CPU):
        assert float(families.step(model, ref).log["r_square"]) > 0, "equality is no accident"


def settings_of(precision, *more):
    return [f"finetune.precision={precision}", "finetune.rounds=1", "finetune.images_per_round=4", *more]


def test_a_run_says_its_precision_its_error_and_does_not_change_it(tmp_path, capsys):
    ckpt = make_checkpoint(tmp_path / "x.safetensors")
    recipe = tiny_recipe(ckpt, "diffusion", *settings_of("bf16", "finetune.beta=1.0e-6", "finetune.log_every=1"))
    result = finetune.run(recipe, tmp_path / "run", device=CPU)
    said = capsys.readouterr().err
    assert "precision: training bf16, sampling float32" in said
    assert "round 1: precision bf16: log-ratio off by" in said
    file = tmp_path / "run" / "state.json"
    state = json.loads(file.read_text())
    assert result["precision"] == state["precision"] == {"training": "bf16", "sampling": "float32"}
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert state["rounds"][0]["precision_error"] == line["precision_error"] > 0
    assert line["r_std"] == 0.0, "the first step: model and reference make the same errors"
    sampled = json.loads((tmp_path / "run" / "round-01" / "samples" / "manifest.json").read_text())
    assert sampled["sampling"]["precision"] == "float32"
    # As where the run began on a GPU, where auto is another precision.
    file.write_text(json.dumps({**state, "precision": {"training": "bf16", "sampling": "tf32"}}))
    (tmp_path / "run" / ".files.jsonl").unlink()  # which would call it damaged
    with pytest.raises(RunError, match=r"precision\.sampling: tf32 -> float32"):
        finetune.run(recipe, tmp_path / "run", device=CPU)


def test_a_precision_that_is_too_coarse_is_refused_before_anything_is_drawn(tmp_path):
    ckpt = make_checkpoint(tmp_path / "x.safetensors")
    recipe = tiny_recipe(ckpt, "diffusion", *settings_of("bf16", "finetune.beta=50.0"))
    with pytest.raises(UsageError, match=r"precision bf16: .* more than 0\.1; use finetune\.precision = fp16, which"):
        finetune.run(recipe, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run" / "round-01").exists()


def error_of(ckpt, *settings):
    from ddo_cli.data.images import open_images

    recipe = tiny_recipe(ckpt, "diffusion", *settings)
    return reference.precision_error(recipe, ckpt, open_images("embedded:digits32", 64), 1, CPU)


def test_the_error_orders_precisions_and_does_not_know_how_rows_are_cut(tmp_path):
    ckpt = make_checkpoint(tmp_path / "x.safetensors")
    bf16, fp16 = error_of(ckpt, "finetune.precision=bf16"), error_of(ckpt, "finetune.precision=fp16")
    assert error_of(ckpt, "finetune.precision=float32") == 0.0
    assert 0 < 3 * fp16 < bf16  # 11 bits of a significand against 8
    assert error_of(ckpt, "finetune.precision=bf16", "finetune.micro_batch=2") == pytest.approx(bf16, rel=0.05)
    assert error_of(ckpt, "finetune.reference_precision=bf16") > 0


def test_the_known_answer_of_the_error(tmp_path, monkeypatch):
    """Predictions off by a known amount: the root mean square of r over the rows of the batch."""
    ckpt, shift = make_checkpoint(tmp_path / "x.safetensors"), 0.01
    found = []

    class Shifted(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, *args):
            return self.net(*args) + (shift if torch.is_autocast_enabled("cpu") else 0)

    loaded = reference.registry.load_model

    def load_model(*args):
        model, file = loaded(*args)
        model.net = Shifted(model.net)
        log_ratio = model.log_ratio

        def kept(*args):
            found.append(log_ratio(*args))
            return found[-1]

        model.log_ratio = kept
        return reference.registry.Loaded(model, file)

    monkeypatch.setattr(reference.registry, "load_model", load_model)
    error = error_of(ckpt, "finetune.precision=bf16")
    assert error == pytest.approx(float(torch.cat(found).double().square().mean().sqrt()), rel=1e-9)
    assert error > 1


def test_precision_of_inference_takes_auto():
    with inference_precision("auto", CPU):
        assert convolutions_and_products() == ("ieee", "ieee")
    with inference_precision(None, CUDA):  # switches and autocast need no card
        assert convolutions_and_products() == ("tf32", "tf32")


def test_tf32_of_the_benchmark_rounds_operands_forwards_and_backwards():
    path = Path(__file__).parent.parent / "benchmarks" / "precision.py"
    spec = importlib.util.spec_from_file_location("precision_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    tie, above = 1 + 2**-11, 1 + 3 * 2**-11  # halfway between numbers of 10 bits: to the even one
    values = torch.tensor([tie, above, -above, 1 + 2**-10, 0.0])
    assert benchmark.rounded(values).tolist() == [1.0, 1 + 2**-9, -1 - 2**-9, 1 + 2**-10, 0.0]
    x, w = torch.full((1, 1), tie), torch.full((1, 1), tie, requires_grad=True)
    with benchmark.in_format("tf32"):
        product = x @ w
        product.sum().backward()
    assert (float(product.detach()), float(w.grad), float((x @ w).detach())) == (1.0, 1.0, float(x * w.detach()))
