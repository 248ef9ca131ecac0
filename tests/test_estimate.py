"""Estimates of a run: what is counted once, what is timed, and what it leaves as it was."""

import pytest
import torch
import toy_latent
import var_models
from conftest import CPU

from ddo_cli import dist
from ddo_cli.diffusion.denoiser import DiffusionModel
from ddo_cli.engines import estimate, sample_cost, step_cost
from ddo_cli.models import registry
from ddo_cli.precision import inference_precision
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.recipe.training import FinetuneRecipe, PretrainRecipe
from ddo_cli.rng import RowRng
from ddo_cli.training import memory

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


# ---------------------------------------------------------------------------------------------------------------------
# Scores

VAR = {"depth": 3, "width": 32, "heads": 2, "vqvae": var_models.SMALL_VAE}  # 30 tokens
EDM2 = {"width": 16, "channel_mult": [1, 2], "num_blocks": 1, "head_width": 16}
CASES = {
    "var": ("var", (3, 64, 64), VAR, {}),
    "guided": ("var", (3, 64, 64), VAR, {"cfg_scale": 2.0}),
    "smooth": ("var", (3, 64, 64), VAR, {"smooth": True}),
    "bf16": ("var", (3, 64, 64), VAR, {"precision": "bf16"}),
    "pixels": ("pixel-transformer", (1, 4, 4), {"width": 16, "depth": 3, "heads": 2}, {}),
    "heun": ("edm2-unet", (3, 16, 16), EDM2, {"sampler": "heun", "steps": 4}),
    "churned": ("edm2-unet", (3, 16, 16), EDM2, {"sampler": "heun", "steps": 4, "s_churn": 1.0, "cfg_scale": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_samples_takes_what_it_takes_when_it_is_drawn(case):
    """Counted on real tensors, with all steps, and every block run."""
    name, shape, options, values = CASES[case]
    config = registry.config_of(name, shape, 4, options, {})
    spec = SamplingRecipe(batch=2, **values)
    model, label = registry.build(config).eval(), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad(), inference_precision(spec.precision or "float32", CPU):
        drawn = memory.cost(lambda: model.sample(label, RowRng(range(2)), spec), model).peak
    with torch.device("meta"):
        model = registry.build(config)
    with memory.imagined():
        memory.without_content(model, CPU)
        found = sample_cost.of(model, spec, CPU)
    assert found.traced == sample_cost.WHOLE
    # Autocast's copies of one block's weights are counted twice.
    assert found.peak == pytest.approx(drawn, rel=0.05 if case == "bf16" else 0.02)


def test_a_score_has_the_keys_and_values_of_all_tokens(monkeypatch):
    monkeypatch.setattr(step_cost, "LONGEST", 0.0)
    options = {"depth": 3, "width": 64, "heads": 2, "vqvae": var_models.TINY_VAE}
    config = registry.config_of("var", (3, 4, 4), 4, options, {})
    item, settings = ((3, 4, 4), torch.uint8), FinetuneRecipe(batch=2)

    def score(**values):
        spec = SamplingRecipe(batch=64, **values)
        held = estimate.estimate(config, settings, spec, [item, item], WORK, device=CPU)["bytes"]
        assert held["score_of"] == sample_cost.WHOLE
        return held["score"]

    plain, guided = score(), score(cfg_scale=2.0)
    assert guided > plain + 64 * 3 * 2 * 5 * 64 * 4  # rows, blocks, keys and values, tokens, width, bytes


def test_what_cannot_be_followed_is_said(monkeypatch):
    whole = of(LATENT)
    assert whole["bytes"]["score_of"] == sample_cost.WHOLE
    assert "a score's" not in estimate.described(whole)["memory"]
    monkeypatch.setattr(sample_cost, "LONGEST", 10)
    part = of(LATENT)
    assert part["bytes"]["score_of"] == "the first 10 operations of a sample"

    def fail(*given):
        raise ValueError("its tensors are empty")

    monkeypatch.setattr(DiffusionModel, "sample", fail)
    monkeypatch.setattr(DiffusionModel, "passes", lambda self, spec: 8)
    without = of(LATENT)
    assert without["bytes"]["score_of"] == "one pass (ValueError: its tensors are empty)"
    assert 0 < without["bytes"]["score"] <= whole["bytes"]["score"]
    assert "; a score's is that of one pass (ValueError" in estimate.described(without)["memory"]


def test_what_is_whole_where_weights_are_sharded(monkeypatch):
    """Averages on their way to be scored; and the candidate beside two other models, when training is over."""
    monkeypatch.setattr(dist, "world_size", lambda: 64)
    monkeypatch.setattr(step_cost, "LONGEST", 0.0)
    config = registry.config_of(
        "pixel-transformer", (1, 2, 2), 10, {"width": 128, "depth": 12, "heads": 2, "levels": 4}, {}
    )
    item = ((1, 2, 2), torch.uint8)

    def held(settings):
        return estimate.estimate(config, settings, SamplingRecipe(batch=32), [item, item], WORK, device=CPU)["bytes"]

    sharded = held(FinetuneRecipe(batch=64, sharding="fsdp"))
    assert sharded["gathered"] == pytest.approx(64 * sharded["gradients"], rel=0.001)
    assert sharded["candidate"] == sharded["evaluation_copy"] >= sharded["gathered"]
    assert sharded["peak_in"] == "a promotion"
    whole = 2 * sharded["candidate"] + sharded["program"] + sharded["reference"]
    assert sharded["peak"] == whole + sharded["score"]
    assert held(FinetuneRecipe(batch=64))["gathered"] == 0
    assert held(PretrainRecipe(batch=64, sharding="fsdp"))["candidate"] == 0
