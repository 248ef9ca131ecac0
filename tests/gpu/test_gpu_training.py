"""Training on a GPU: every command, resuming, gradients that are not finite, one process of NCCL, memory."""

import json
import os

import pytest
import torch
from conftest import KINDS, TINY_VQVAE, make_checkpoint, make_discriminator, tiny_disc_recipe, tiny_recipe
from gpu_models import TINY, built
from test_gpu_parity import assert_same_images
from torch import nn

from ddo_cli import checkpoint, dist
from ddo_cli.data.images import open_images
from ddo_cli.data.pairs import Shuffled
from ddo_cli.engines import dry_run
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.discriminator import classifier as train_classifier
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.fid import fid
from ddo_cli.engines.pretrain import extractor as train_extractor
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.engines.sampling import guide_sample, sample
from ddo_cli.errors import NumericsError, UsageError
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.training import loop
from ddo_cli.training.meter import Meter

pytestmark = pytest.mark.gpu

TWO_STEPS = ("finetune.rounds=1", "finetune.images_per_round=8", "finetune.eval_every=8", "metric.repeats=1")
# What the checkpoint says, in place of the quickstart's values for a denoiser.
OWN = ("finetune.draw={}", *(f"sampling.{key}=null" for key in ("sampler", "steps", "sigma_min", "sigma_max")))


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Every command


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", "fp16"])
def test_a_round_of_ddo(tmp_path, device, kind, precision):
    ckpt = make_checkpoint(tmp_path / "ref.safetensors", kind)
    settings = (*TWO_STEPS, *OWN, f"finetune.precision={precision}", "finetune.log_every=1", "finetune.beta=1.0e-4")
    found = finetune.run(tiny_recipe(ckpt, kind, *settings), tmp_path / "run", device=device)
    first, second = log_of(tmp_path / "run")
    assert first["r_real"] == first["r_fake"] == 0  # the reference itself
    assert second["r_square" if "r_square" in second else "r_std"] > 0
    assert checkpoint.load(found["final"], kind="model").tensors.keys() == checkpoint.load(ckpt).tensors.keys()


def pretrain_recipe(name, options, *more):
    settings = [
        "data={source: embedded:digits32, num: 64}",
        f"model={{name: {name}, options: {json.dumps(options)}}}",
        "sampling={batch: 16}",
        "metric={name: fd_embedded, num_images: 16, repeats: 1}",
        "pretrain={images: 16, batch: 8, lr: 1.0e-3, ema_half_life: 16.0, log_every: 1, save_every: 1}",
    ]
    return load("quickstart", [*settings, *more])


@pytest.mark.parametrize("family", ["patch-unet", "ddpm++", "edm2", "vqvae"])
def test_pretraining(tmp_path, device, family):
    name, options = ("vqvae", TINY_VQVAE) if family == "vqvae" else (TINY[family].name, TINY[family].options)
    more = ["sampling.sampler=euler", "sampling.steps=2"] if family != "vqvae" else []
    found = pretrain.run(pretrain_recipe(name, options, *more), tmp_path / "run", device=device)
    assert len(log_of(tmp_path / "run")) == 2
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(found["final"]).tensors.values())


def test_discriminator_guided_sampling_and_its_distance(tmp_path, device):
    """On the device and on a CPU: the same weights draw the same images."""
    ckpt = make_checkpoint(tmp_path / "m.safetensors")
    more = ("discriminator.images=16", "discriminator.eval_every=16", "discriminator.num_fake=32")
    trained = train_disc.run(tiny_disc_recipe(ckpt, *more), tmp_path / "disc", device=device)
    assert trained["final"].endswith("final.safetensors")
    disc = make_discriminator(tmp_path / "d.safetensors", ckpt, scale=0.5)
    sampling = {"sampler": "heun", "steps": 4, "batch": 8, "precision": "float32"}
    images = {}
    for place in (device, torch.device("cpu")):
        out = tmp_path / f"guided-{place.type}"
        guidance = {"dg_weight": 2.0, "dg_weight_2nd": 1.0}
        guide_sample.run(
            disc, ckpt, range(16), out, form="npz", sampling=sampling, guidance=guidance, device=place, force=True
        )
        images[place.type] = torch.from_numpy(open_images(str(out)).items)
    sample.run(ckpt, range(16), tmp_path / "plain", form="npz", sampling=sampling, device=device)
    assert_same_images(images[device.type], images["cpu"], most=2)
    plain = torch.from_numpy(open_images(str(tmp_path / "plain")).items)
    assert not torch.equal(images[device.type], plain)
    options = fid.Options(num=16, workers=0, cache=False)  # without Inception, by the embedded extractor
    scores = {
        place.type: fid.run(str(tmp_path / "plain"), "embedded:digits32", options, device=place)
        for place in (device, torch.device("cpu"))
    }
    values = [next(v for k, v in score.items() if k.startswith("fd")) for score in scores.values()]
    assert values[0] == pytest.approx(values[-1], rel=1e-3)


def test_classifier_and_extractor(tmp_path, device):
    settings = "classifier={options: {widths: [8], depths: [1]}, held_out: 16, images: 16, batch: 8}"
    recipe = tiny_disc_recipe(make_checkpoint(tmp_path / "m.safetensors"), settings)
    assert train_classifier.run(recipe, tmp_path / "run", device=device)["levels"]
    data = "embedded:digits32"
    out = tmp_path / "extractor.safetensors"
    assert train_extractor.run(data, out, held_out=None, images=256, seed=0, device=device)["heldout_accuracy"] >= 0


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.fixture
def deterministic(monkeypatch):
    """Kernels whose sums have one order. CUBLAS_WORKSPACE_CONFIG is read once, when cuBLAS starts."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def trained(path, device, family, precision, until):
    """Weights after a pause at each of these steps, by as many calls of `fit`."""
    settings = TrainRecipe(
        batch=8,
        micro_batch=4,
        lr=1e-3,
        ema_half_life=16.0,
        precision=precision,
        log_every=2,
        save_every=2,
        grad_clip=1.0,
    )
    data = open_images("embedded:digits32", 64)
    stream = Shuffled(data.items, data.labels, "gpu")
    for step in until:
        model = built(TINY[family]).to(device)
        plan = loop.Plan("x", until[-1], settings, (0,), path / "state.safetensors", "gpu", lambda: "none", until=step)
        *_, last = loop.fit(
            model,
            pretrain.likelihood_objective(model),
            stream,
            plan,
            Meter(path / "log.jsonl", {}, settings.batch, device),
        )
    start = built(TINY[family]).state_dict()
    assert any(not torch.equal(tensor.cpu(), start[name]) for name, tensor in model.state_dict().items())
    return {**last.averages.whole(), **{f"live {name}": tensor for name, tensor in model.state_dict().items()}}


@pytest.mark.parametrize(("family", "precision"), [("ddpm++", "float32"), ("patch-unet", "fp16"), ("edm2", "tf32")])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, device, deterministic, family, precision):
    """Bit for bit with deterministic kernels."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = trained(tmp_path / "whole", device, family, precision, [6])
    parts = trained(tmp_path / "parts", device, family, precision, [2, 5, 6])
    assert [name for name in whole if not torch.equal(whole[name].cpu(), parts[name].cpu())] == []
    logs = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("whole", "parts")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_gradients_that_are_not_finite_stop_a_run(tmp_path, device, precision):
    recipe = pretrain_recipe(
        "patch-unet", TINY["patch-unet"].options, "pretrain.lr=1.0e+30", f"pretrain.precision={precision}",
        "pretrain.images=400",
    )  # fmt: skip
    with pytest.raises(NumericsError, match=r"gradient of step \d+ is not finite.* last good checkpoint"):
        pretrain.run(recipe, tmp_path / "run", device=device)


def test_one_process_of_nccl(tmp_path, device, monkeypatch):
    """DDP and the collective calls in a group of one process, of which the program makes none by itself."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "world_size", lambda: 2)  # as far as `dist` can tell
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert dist.init(device.type) == device if device.type == "cuda" else dist.init("cpu")
    try:
        assert torch.distributed.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
        torch.manual_seed(0)
        plain = nn.Linear(4, 4).to(device)
        wrapped = dist.wrap(nn.Sequential(nn.Linear(4, 4)).to(device), device)
        wrapped.module[0].load_state_dict(plain.state_dict())
        x = torch.randn(8, 4, device=device)
        plain(x).square().mean().backward()
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(x).square().mean().backward()
        torch.testing.assert_close(wrapped.module[0].weight.grad, plain.weight.grad)
        dist.barrier()
        assert float(dist.all_reduce_sum(torch.ones((), device=device))) == 1
        assert dist.from_main({"a": [1]}) == {"a": [1]}
    finally:
        dist.shutdown()
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_dry_run_reports_the_allocators_peaks(tmp_path, device):
    recipe = tiny_recipe(make_checkpoint(tmp_path / "m.safetensors"))
    figures = finetune.run(recipe, tmp_path / "run", device=device, dry_run=True)["measured"]
    assert figures["peak_memory_gib"] > 0
    if device.type == "cuda":
        assert figures["peak_reserved_gib"] >= figures["peak_memory_gib"]
        assert "H100" not in figures["device"] or torch.cuda.get_device_name(device) == figures["device"]


def test_too_little_memory_is_one_message(device):
    if device.type != "cuda":
        pytest.skip("a CPU has no allocator that refuses")
    with (
        pytest.raises(UsageError, match=r"does not fit into the memory of .*lower micro_batch"),
        dry_run._measured(device),
    ):
        torch.empty(2 * torch.cuda.get_device_properties(device).total_memory, dtype=torch.uint8, device=device)


def test_a_second_run_leaves_no_memory_behind(tmp_path, device):
    if device.type != "cuda":
        pytest.skip("measured by the allocator of a GPU")
    used = []
    for number in range(3):
        pretrain.run(pretrain_recipe("patch-unet", TINY["patch-unet"].options), tmp_path / str(number), device=device)
        loop.release(device)
        used.append(torch.cuda.memory_allocated(device))
    assert used[2] <= used[1] + 2**20
