"""Estimates of a run: what is counted once, what is timed, and what it leaves as it was."""

import pytest
import torch
import toy_latent
import var_models
from conftest import CPU

from ddo_cli.engines import estimate, step_cost
from ddo_cli.models import registry
from ddo_cli.schema import SamplingRecipe
from ddo_cli.schema_training import FinetuneRecipe, PretrainRecipe

WORK = estimate.Work(steps=10, scored=100, fake=50, stored=3)
IMAGE = ((3, 16, 16), torch.uint8)
LATENT = registry.config_of("toy-latent", (3, 16, 16), 4, toy_latent.OPTIONS, {})


def of(config, item=IMAGE, steps=8, **values) -> dict:
    settings = FinetuneRecipe(**{"batch": 4, **values})
    spec = SamplingRecipe(batch=2, steps=steps, sampler="euler")
    return estimate.estimate(config, settings, spec, [item, item], WORK, device=CPU)


@pytest.fixture
def clocks(monkeypatch):
    """Seconds of a micro-batch, an update, a pass of sampling, and decoding; products of 1e9 operations a second."""
    seconds = {"piece": 0.5, "run": 0.25, "predict": 0.125, "decode": 8.0}
    monkeypatch.setattr(step_cost, "_seconds", lambda run, device: seconds.get(run.__name__) or 2 * 512**3 / 1e9)
    return seconds


def test_seconds_add_up(clocks):
    found = of(LATENT, micro_batch=2)
    seconds = found["seconds"]
    assert found["is_timed"] == {"training": True, "sampling": True}
    assert seconds["step"] == 2 * 0.5 + 0.25  # one update for both micro-batches
    assert seconds["training"] == 10 * seconds["step"]
    image = (8 * 0.125 + 8.0) / 2  # 8 passes, but decoded once
    assert seconds["fake_sets"] == 50 * image
    assert seconds["scores"] == 100 * image
    assert found["flops_per_second"]["training"] == pytest.approx(found["flops"]["step"] / seconds["step"])
    assert "timed" in estimate.described(found)["time"]


def test_long_passes_are_not_timed(clocks, monkeypatch):
    monkeypatch.setattr(step_cost, "LONGEST", 0.0)
    found = of(LATENT)
    assert found["is_timed"] == {"training": False, "sampling": False}
    expected = found["flops"]["step"] / (1e9 * estimate.EFFICIENCY["cpu"])
    assert found["seconds"]["step"] == pytest.approx(expected)
    time = estimate.described(found)["time"]
    assert "assumed" in time
    assert "timed" not in time


def test_what_cannot_be_timed_is_assumed(monkeypatch):
    def fail(trial):
        raise torch.OutOfMemoryError("a micro-batch does not fit")

    tried = []
    monkeypatch.setattr(step_cost, "timed", lambda *given, old=step_cost.timed: tried.append(old(*given)) or tried[0])
    traced = step_cost.traced

    def then_fail(setup):
        found = traced(setup)
        monkeypatch.setattr(step_cost._Trial, "piece", fail)
        return found

    monkeypatch.setattr(step_cost, "traced", then_fail)
    found = of(LATENT)
    assert tried[0].keys() == {"predict", "decode"}
    assert found["is_timed"] == {"training": False, "sampling": True}


def test_real_passes_are_timed_and_leave_no_trace():
    config = registry.config_of("patch-unet", (3, 16, 16), 4, {"widths": [8], "depths": [1], "emb_width": 8}, {})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    settings = PretrainRecipe(batch=4)
    found = estimate.estimate(config, settings, SamplingRecipe(batch=2, steps=2), [IMAGE], WORK, device=CPU)
    assert found["is_timed"] == {"training": True, "sampling": True}
    assert 0 < found["seconds"]["step"] < 10
    assert torch.equal(before, torch.get_rng_state())  # pretraining draws dropout from it


def test_frozen_weights_have_no_average():
    """A tokenizer's weights are the model's own in every average, on disk as in memory."""
    options = {"depth": 2, "width": 16, "heads": 2, "vqvae": var_models.TINY_VAE}
    config = registry.config_of("var", (3, 4, 4), 3, options, {})
    item = ((3, 4, 4), torch.uint8)
    settings = FinetuneRecipe(batch=2)
    found = estimate.estimate(config, settings, SamplingRecipe(batch=2), [item, item], WORK, device=CPU)
    held = found["bytes"]
    assert held["averages"] == held["gradients"] < held["weights"]
    lasting = ("program", "weights", "moments", "averages", "reference", "evaluation_copy")
    assert held["peak"] == sum(held[key] for key in (*lasting, "step", "heap"))
    assert found["disk_bytes"]["train_state"] == pytest.approx(held["weights"] + 3 * held["gradients"], rel=0.01)
