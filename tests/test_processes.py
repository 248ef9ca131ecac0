"""Training on several processes, and what each of them holds and does when one of them fails."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, fit_events, make_checkpoint, torchrun

from ddo_cli import checkpoint, cli, dist, sharding
from ddo_cli import precision as precision_module
from ddo_cli.engines.sampling import sample
from ddo_cli.errors import RunError, UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.rng import RowRng
from ddo_cli.trainable import Loss
from ddo_cli.training import loop
from ddo_cli.training.state import read_state

SETTINGS = {
    "lr": 1e-3, "batch": 4, "micro_batch": 1, "log_every": 1, "save_every": 100, "ema_half_life": 0.0,
    "adam_eps": 1e-3, "grad_clip": 0.01, "activation_checkpointing": True,
}  # fmt: skip


def fit(model, directory: Path, steps: int = 2, until: int | None = None, **recipe) -> dict[str, torch.Tensor]:
    """Trains on fixed images."""
    items = torch.randint(
        0, 256, (4, *model.codec.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )

    def loss(wrapped, positions, rng):
        x = model.codec.encode(items[positions % 4])
        draw = model.draw(len(x), RowRng.for_rows("x", rng.step, rows=rng.rows))
        return Loss(-wrapped(x, torch.zeros(len(x), dtype=torch.long), draw).mean() / 1000, {})

    directory.mkdir(parents=True, exist_ok=True)
    *_, last = fit_events(model, loss, directory, TrainRecipe(**SETTINGS, **recipe), steps, until)
    return last.averages.whole()


def with_scalars(ckpt: str):
    """The model with gains that have no dimension, as a user's may."""
    model = registry.load_model(ckpt, CPU).model
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if name.endswith("gain"):
                module._parameters[name] = torch.nn.Parameter(parameter.detach().reshape(()))
    return model


def work(ckpt: str, out: Path) -> None:
    """What each process of `found` does; rank 0 writes results, and each rank its own answers."""
    dist.init("cpu")
    rank = dist.rank()
    answers = {}
    # Scalars are whole on each process, other weights spread; the gradients too, between micro-batches.
    model, whole = with_scalars(ckpt), []
    own_class, forward = type(model), type(model).forward

    def watched(self, *args):
        grads = [p.grad for p in self.parameters() if p.grad is not None and p.ndim]
        whole.append(sum(type(grad) is torch.Tensor for grad in grads))
        states = [m._get_fsdp_state()._fsdp_param_group for m in self.modules() if hasattr(m, "_get_fsdp_state")]
        params = [param for group in states if group is not None for param in group.fsdp_params]
        answers["params"] = len(params)
        whole.append(sum(param.unsharded_accumulated_grad is not None for param in params))
        return forward(self, *args)

    own_class.forward = watched
    averages = fit(model, out / "fsdp", precision="fp16", sharding="fsdp")
    own_class.forward = forward
    answers["whole"], answers["scalars"] = whole, sum(not p.ndim for p in model.parameters())
    if dist.is_main():
        torch.save(averages, out / "fsdp.pt")
    unit = weakref.ref(model.units()[0])
    del model, averages
    loop.release(CPU)
    answers["gone"] = unit() is None
    # Directories of their own: the state that the main process wrote is not there for the other.
    fit(registry.load_model(ckpt, CPU).model, out / str(rank), until=1)
    try:
        fit(registry.load_model(ckpt, CPU).model, out / str(rank))
    except RunError as error:
        answers["missing"] = str(error)
    # The other way round: what only the other finds is nothing.
    if dist.is_main():
        (out / "0" / "state").rename(out / "1" / "state")
    dist.barrier()
    answers["alone"] = fit(registry.load_model(ckpt, CPU).model, out / str(rank)) != {}
    (out / f"{rank}.json").write_text(json.dumps(answers))
    dist.shutdown()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(reference, directory, answers of both processes)."""
    out = tmp_path_factory.mktemp("processes")
    ckpt = make_checkpoint(out / "ref.safetensors", "edm2")
    torchrun(__file__, ckpt, str(out))
    return ckpt, out, [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_sharded_float16_with_scalars_takes_the_step_of_one_process(found, tmp_path):
    ckpt, out, answers = found
    assert answers[0]["scalars"] > 0
    model = with_scalars(ckpt)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone, sharded = fit(model, tmp_path, precision="fp16"), torch.load(out / "fsdp.pt")
    torch.testing.assert_close(sharded, alone, rtol=1e-5, atol=1e-6)
    moved = {name: float((alone[name] - before[name]).abs().max()) for name in alone}
    assert max(moved.values()) > 1e-4  # far above the tolerance
    assert max(moved[name] for name in moved if name.endswith("gain")) > 1e-4
    lines = [json.loads((path / "log").read_text().splitlines()[-1]) for path in (tmp_path, out / "fsdp")]
    assert lines[1]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-3)
    assert lines[1]["loss_scale"] == 2048


def test_no_process_holds_the_gradients_of_all_weights(found):
    """Between micro-batches, of which each process takes two in a step."""
    for answers in found[2]:
        assert answers["params"] > 10
        assert len(answers["whole"]) == 2 * 4
        assert set(answers["whole"]) == {0}


def test_a_sharded_model_goes_when_it_is_released(found):
    assert [answers["gone"] for answers in found[2]] == [True, True]


def test_all_processes_resume_at_the_main_one_s_step(found):
    _, out, answers = found
    for rank, one in enumerate(answers):
        assert one["missing"] == (
            f"{out / str(rank) / 'state'} is of step 1 for the main process and missing for process 1; --out must be a "
            "directory that all processes share"
        )
        assert one["alone"]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([(3, "me"), (2, "me")], "is of step 3 for the main process and of step 2 for process 1; --out must be"),
        ([(3, "you"), (3, "me")], "belongs to another run; remove it or choose another --out"),
    ],
)
def test_states_that_differ_are_refused(tmp_path, monkeypatch, states, message):
    file = tmp_path / "state"
    checkpoint.save(file, {"x": torch.ones(1)}, {"kind": "train-state", "step": states[1][0], "owner": states[1][1]})
    monkeypatch.setattr(dist, "gathered", lambda value: [states[0], value])
    with pytest.raises(RunError, match=message):
        read_state(file, "me")


def test_the_optimizer_of_a_fit_is_gone_after_it(tmp_path, monkeypatch):
    """And the model when who had it lets go, with no collection in between."""
    kept, build = [], loop.optim.build
    monkeypatch.setattr(loop.optim, "build", lambda *a: kept.append(weakref.ref(found := build(*a))) or found)
    model = registry.load_model(make_checkpoint(tmp_path / "x.safetensors", "edm2"), CPU).model
    gc.disable()
    try:
        fit(model, tmp_path / "run")
        assert kept[0]() is None
        unit = weakref.ref(model.units()[0])
        del model
        assert unit() is None
    finally:
        gc.enable()


def test_a_gpu_s_reserve_is_given_back_around_scoring(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    for device, expected in (("cuda", ["emptied", "scored", "emptied"]), ("cpu", ["scored"])):
        done.clear()
        for event in loop._evaluated(loop.Evaluate(1, None), torch.device(device)):
            done.append("scored")
            assert event.step == 1
        assert done == expected


def test_averages_are_gathered_for_who_asks(tmp_path, monkeypatch):
    model = registry.load_model(make_checkpoint(tmp_path / "x.safetensors"), CPU).model
    gathered = []
    monkeypatch.setattr(sharding, "full", lambda tensors: gathered.append(1) or tensors)
    *_, last = fit_events(model, lambda *_: None, tmp_path, TrainRecipe(batch=1), steps=0)
    assert gathered == []
    assert last.averages.whole().keys() == model.state_dict().keys()
    assert gathered == [1]


# ---------------------------------------------------------------------------------------------------------------------
# Joining and leaving


@pytest.mark.parametrize(
    ("device", "visible", "expected"), [("cuda", 4, "cuda:1"), ("cuda", 1, "cuda:0"), ("cpu", 0, None)]
)
def test_nccl_is_told_its_gpu(monkeypatch, device, visible, expected):
    """Also where each process sees its own only."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")  # the second GPU of the second machine
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist.torch_dist, "init_process_group", lambda backend, **more: calls.append((backend, more)))
    dist.init(device)
    backend, more = calls[0]
    assert (backend, more.get("device_id")) == (("nccl", torch.device(expected)) if expected else ("gloo", None))


SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}


def test_tasks_of_srun_are_the_processes_of_one_run(monkeypatch):
    monkeypatch.setattr(dist.torch_dist, "init_process_group", lambda backend, **more: None)
    monkeypatch.setattr(os, "environ", {**SRUN, "MASTER_ADDR": "node7"})
    dist.init("cpu")
    assert (dist.rank(), dist.world_size()) == (5, 8)
    assert [os.environ[key] for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")] == ["1", "4", "29500"]
    monkeypatch.setattr(os, "environ", SRUN)
    with pytest.raises(UsageError, match=r"srun started 8 tasks, .* export MASTER_ADDR=\$\(scontrol show hostnames"):
        dist.init("cpu")


@pytest.mark.parametrize(
    "more", [{"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": ""}]
)
def test_one_task_and_torchrun_inside_a_job_are_left_alone(monkeypatch, more):
    """As a batch script is, which has the job's variables and no step of its own."""
    given = {key: value for key, value in {**SRUN, "SLURM_NTASKS": "8", **more}.items() if value}
    monkeypatch.setattr(os, "environ", given)
    dist.init("cpu")
    assert (dist.rank(), dist.world_size()) == (0, 1)


def test_torchrun_itself_starts_the_program(tmp_path):
    """Other tests of several processes fork them, which is faster."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ddo_cli"]
    given = ["sample", "--ckpt", "embedded:digits32", "--num-images", "4", "--format", "npz", "--device", "cpu"]
    done = subprocess.run(
        [*command, *given, "--out", str(tmp_path / "two"), "--json"],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 4
    sample.run("embedded:digits32", range(4), tmp_path / "one", form="npz", device=CPU)
    assert np.array_equal(*(np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two")))


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_mistake_of_ours_ends_a_process_at_once(world):
    """With several processes nothing runs after the traceback, such as NCCL's shutdown; with one it all does."""
    program = (
        "import atexit\n"
        "from ddo_cli import cli\n"
        "atexit.register(lambda: open(1, 'w').write('waited'))\n"
        "def broken(**_): raise ValueError('ours')\n"
        "cli.app = broken\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "WORLD_SIZE": world, "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "ValueError: ours" in done.stderr
    assert done.stdout == ("" if world == "2" else "waited")


# ---------------------------------------------------------------------------------------------------------------------
# TensorFloat-32


def switches() -> list:
    backends = torch.backends
    operations = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul
    old = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    return [*old, *(operation.fp32_precision for operation in operations)]


@pytest.fixture
def switches_kept():
    with precision_module._switches_kept():
        yield


@pytest.mark.parametrize("before", [None, "float32", "tf32", "medium"])
def test_torchs_switches_agree_and_are_put_back(switches_kept, before):
    """Reading the old ones, as others' code does, raises where they differ from the new."""
    if before == "medium":
        torch.set_float32_matmul_precision("medium")
    elif before:
        precision_module.allow_tf32(before == "tf32")
    found = switches()
    for precision in ("float32", "tf32", "bf16"):
        is_on = precision == "tf32"
        with precision_module.inference_precision(precision, CPU):
            inside = ["high" if is_on else "highest", *["tf32" if is_on else "ieee"] * 4]
            assert switches() == [is_on, is_on, *inside]
            with pytest.raises(ZeroDivisionError), precision_module.inference_precision("tf32", CPU):
                1 / 0  # noqa: B018
            assert switches() == [is_on, is_on, *inside]
        assert switches() == found


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
