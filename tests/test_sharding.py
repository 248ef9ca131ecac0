"""FSDP2 on two CPU processes: the same step as one process, states that resume anywhere, plain weight files."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import CPU, kinds, make_checkpoint, tiny_recipe, torchrun
from launch import launch
from torch import nn

from ddo_cli import checkpoint, sharding
from ddo_cli.engines.ddo import finetune
from ddo_cli.errors import CheckpointError
from ddo_cli.models import registry

# Adam divides by |g| + eps: with a small eps, gradients that are 0 but for rounding would move weights by whole steps.
SETTINGS = ["finetune.rounds=1", "finetune.adam_eps=1.0e-3", "finetune.ema_half_life=2.0", "finetune.grad_clip=0.01"]


def write_recipe(path: Path, ckpt: str, kind: str, *overrides: str) -> list[str]:
    """Options of a command that runs the tiny recipe."""
    recipe = tiny_recipe(ckpt, kind, *SETTINGS, *overrides)
    file = path / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    return ["-m", "ddo_cli", "finetune-ddo", "--recipe", str(file), "--device", "cpu", "--json"]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "round-01" / "checkpoints" / f"step-{step:06d}.safetensors", kind="model").tensors


def log(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{**line, "images_per_second": 0} for line in lines]


@pytest.fixture(scope="module", params=kinds())
def runs(request, tmp_path_factory):
    """The same run by one process, and sharded by two: (kind, reference, one, two, options)."""
    path = tmp_path_factory.mktemp(request.param)
    ckpt = make_checkpoint(path / "ref.safetensors", request.param)
    overrides = ["finetune.eval_every=4", "finetune.images_per_round=12", "finetune.micro_batch=1"]
    finetune.run(tiny_recipe(ckpt, request.param, *SETTINGS, *overrides), path / "one", device=CPU)
    extra = [*overrides, "finetune.sharding=fsdp", "finetune.activation_checkpointing=true"]
    options = write_recipe(path, ckpt, request.param, *extra)
    torchrun(*options, "--out", str(path / "two"))
    return request.param, ckpt, path / "one", path / "two", options


@pytest.mark.parametrize("step", [1, 3])
def test_two_sharded_processes_take_the_step_of_one(runs, step):
    """With recomputed blocks, two micro-batches on each process, and clipping."""
    _, ckpt, one, two, _ = runs
    first, second = weights(one, step), weights(two, step)
    assert first.keys() == second.keys()
    start = checkpoint.load(ckpt).tensors
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=1e-6, atol=3e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = max(float((first[name] - start[name]).abs().max()) for name in first)
    assert moved > 1e-5  # far above the tolerance
    norms = [[json.loads(x)["grad_norm"] for x in (p / "log.jsonl").read_text().splitlines()] for p in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_final_weights_are_one_plain_file(runs):
    two = runs[3]
    file = checkpoint.load(two / "final.safetensors", kind="model")
    assert all(type(tensor) is torch.Tensor for tensor in file.tensors.values())
    model = registry.load_model(two / "final.safetensors", CPU).model
    assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in file.tensors.items()}
    assert not list(two.rglob("train-state*"))


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(runs, tmp_path):
    """By as many processes, to the same bytes; by another number, within rounding."""
    kind, _, _, two, options = runs
    then = 1 if kind == "autoregressive" else 2
    out = tmp_path / "run"
    done = launch(*options, "--out", out, processes=2, until=lambda: any(out.glob("round-01/train-state/[0-9]*")))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "run" / "final.safetensors").exists()
    torchrun(*options, "--out", str(tmp_path / "run"), processes=then)
    tolerance = {"rtol": 0, "atol": 0} if then == 2 else {"rtol": 1e-6, "atol": 3e-8}
    for step in (1, 2, 3):
        torch.testing.assert_close(weights(tmp_path / "run", step), weights(two, step), **tolerance)
    if then == 2:
        assert log(out) == log(two)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_damage_of_a_run_of_two_processes_is_told(runs, tmp_path):
    """A bit flipped in the shard of the second process or in its samples, between two runs or during one."""
    kind, _, _, two, options = runs
    if kind != "diffusion":
        pytest.skip("one kind does")
    killed, samples = tmp_path / "killed", "round-01/samples/shard-000001.safetensors"
    launch(*options, "--out", killed, processes=2, until=lambda: any(killed.glob("round-01/train-state/[0-9]*")))
    state = next(killed.glob("round-01/train-state/*/__1_0.distcp")).relative_to(killed)
    for damaged, told in ((state, rf"{state.parent} is damaged"), (samples, rf"{samples} is damaged")):
        out = tmp_path / damaged.replace("/", "-") if isinstance(damaged, str) else tmp_path / "state"
        shutil.copytree(killed, out)
        flip(out / damaged)
        assert re.search(told, " ".join(torchrun(*options, "--out", str(out)).stderr.split()))
        torch.testing.assert_close(weights(out, 3), weights(two, 3), rtol=0, atol=0)
        assert log(out) == log(two)
    flipped = []

    def flip_once() -> bool:
        if not flipped and (killed / "round-01/checkpoints/step-000002.safetensors").exists():
            flip(killed / samples)
            flipped.append(samples)
        return False

    assert launch(*options, "--out", killed, processes=2, until=flip_once).returncode == 0
    assert flipped
    assert re.search(rf"{samples} is damaged", " ".join(torchrun(*options, "--out", str(killed)).stderr.split()))


# ---------------------------------------------------------------------------------------------------------------------
# States on disk, in one process


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 2), value), "adam.0.step": torch.tensor(value)}


HEADER = {"kind": "train-state", "step": 1}


def test_a_state_reads_back_and_keeps_the_one_before(tmp_path):
    place = tmp_path / "train-state"
    assert sharding.saved(place) == []
    for step in (1, 2, 10):
        sharding.save(place, step, state(step), {"meter.loss": torch.ones(())}, {**HEADER, "step": step})
    assert sorted(path.name for path in place.iterdir()) == ["000000002", "000000010"]  # and the one before
    found = state(0.0)
    sharding.load(sharding.saved(place)[0], found)
    torch.testing.assert_close(found, state(10.0), rtol=0, atol=0)
    assert checkpoint.load(sharding.saved(place)[0] / sharding.REST, kind="train-state").header["step"] == 10


@pytest.mark.parametrize("where", ["shards", "rest", "rename"])
def test_a_kill_while_saving_leaves_the_state_before(tmp_path, monkeypatch, where):
    place = tmp_path / "train-state"
    sharding.save(place, 1, state(1.0), {}, HEADER)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "shards":
            patch.setattr(torch.distributed.checkpoint, "save", die)
        elif where == "rest":
            patch.setattr(sharding.checkpoint, "save", die)
        else:
            patch.setattr(
                sharding.os, "replace", lambda source, target: die() if target == place / "000000002" else None
            )
        with pytest.raises((KeyboardInterrupt, FileNotFoundError)):
            sharding.save(place, 2, state(2.0), {}, {**HEADER, "step": 2})
    assert sharding.saved(place)[0].name == "000000001"
    sharding.save(place, 2, state(2.0), {}, {**HEADER, "step": 2})
    assert sorted(path.name for path in place.iterdir()) == ["000000001", "000000002"]


def test_a_damaged_state_is_named(tmp_path):
    place = tmp_path / "train-state"
    sharding.save(place, 1, state(1.0), {}, HEADER)
    shutil.copytree(place, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"cannot be read .*remove .*train-state"):
        sharding.load(sharding.saved(place)[0], {"model.other": torch.zeros(2)})
    for file in sharding.saved(place)[0].glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(CheckpointError, match=r"cannot be read .*remove .*train-state"):
        sharding.load(sharding.saved(place)[0], state(0.0))


def test_clipping_without_shards_is_torchs():
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    before = layer.weight.grad.norm().square() + layer.bias.grad.norm().square()
    assert sharding.clip_grad_norm(list(layer.parameters()), 0.5) == pytest.approx(float(before.sqrt()))
    after = layer.weight.grad.norm().square() + layer.bias.grad.norm().square()
    assert float(after.sqrt()) == pytest.approx(0.5, rel=1e-4)
