"""Apple's GPUs, by a stand-in (see fake_mps.py): what is computed there, and what is refused."""

import pytest
import torch
from conftest import CPU, make_checkpoint
from fake_mps import MPS, REFUSED, FakeMps, OnMps

from ddo_cli import dist
from ddo_cli.engines.sampling import sample
from ddo_cli.errors import UsageError
from ddo_cli.generation import generate, on_device
from ddo_cli.likelihood import LikelihoodModel
from ddo_cli.metrics.extractors.select import select_extractor
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import DdoSettings
from ddo_cli.objectives.ddo_step import ddo_batch, ddo_step
from ddo_cli.rng import StepRng
from ddo_cli.trainable import map_tensors


def moved(model: LikelihoodModel) -> LikelihoodModel:
    """The model with its weights on the stand-in; `Module.to` would ask for the driver."""
    model.load_state_dict({name: OnMps(tensor) for name, tensor in model.state_dict().items()}, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, OnMps(buffer))
    return model


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("mps") / "m.safetensors")


def test_samples_are_those_of_a_cpu_in_float32(ckpt):
    model, file = registry.load_model(ckpt, CPU)
    spec = sample.spec_of(file, dtype="float32")
    expected = next(generate(model, range(2), spec, batch=2, device=CPU)).items
    with FakeMps():
        found = next(generate(moved(model), range(2), sample.spec_of(file), batch=2, device=MPS)).items
    assert torch.equal(found, expected)


def test_a_step_of_ddo_is_that_of_a_cpu(ckpt, tmp_path):
    images, labels = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32) % 256, torch.tensor([3, 5])
    rows = (images.to(torch.uint8), labels)
    other = make_checkpoint(tmp_path / "other.safetensors", seed=1)

    def step(move, to) -> list[torch.Tensor]:
        model, ref = move(registry.load_model(other, CPU)[0]), move(registry.load_model(ckpt, CPU)[0])
        batch = map_tensors(to, ddo_batch(model, rows, rows, StepRng(("mps",), 0, range(2))))
        loss = ddo_step(model, model, batch, ref=ref, settings=DdoSettings(4.0, 0.05, False, "ddo"))
        loss.loss.backward()
        return [loss.loss.detach(), *(parameter.grad for parameter in model.parameters())]

    expected = step(lambda model: model, lambda tensor: tensor)
    with FakeMps():
        found = [tensor.cpu() for tensor in step(moved, lambda tensor: tensor.to(MPS))]
    assert found[1].abs().sum() > 0
    torch.testing.assert_close(found, expected)


def test_what_needs_float64_is_refused(ckpt):
    model, file = registry.load_model(ckpt, CPU)
    spec = sample.spec_of(file)
    assert on_device(model, spec, MPS).dtype == "float32"
    assert on_device(model, spec, CPU) is spec
    with pytest.raises(UsageError, match="Apple's GPUs have no float64"):
        on_device(model, spec.merged(dtype="float64"), MPS)
    with pytest.raises(UsageError, match=r"sampler is float64; leave sampling.dtype out \(not on mps: use cpu\)"):
        next(generate(model, range(1), spec.merged(schedule="vp"), batch=1, device=MPS))
    with FakeMps(), pytest.raises(TypeError, match="MPS"):
        torch.ones(2, device=MPS).double()


def test_the_option(monkeypatch, capsys, ddo):
    """Taken where torch has such a GPU; features stay on the CPU; what torch lacks there ends in one message."""
    with pytest.raises(UsageError, match="--device mps: this torch is not for Macs; leave the option out or use cpu"):
        dist.init("mps")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(UsageError, match="torch finds no Apple GPU"):
        dist.init("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert dist.init("mps") == torch.device("mps")
    assert "device mps: not tried on a Mac" in capsys.readouterr().err
    assert select_extractor("fd_embedded", device="mps").device == CPU
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes cannot share an Apple GPU"):
        dist.init("mps")
    monkeypatch.delenv("WORLD_SIZE")

    def refuse(*_: object, **__: object) -> None:
        raise TypeError(REFUSED)

    monkeypatch.setattr(registry, "load_model", refuse)
    done = ddo("sample", "--device", "mps", code=2)
    assert "--device mps: torch cannot do this there (Cannot convert a MPS Tensor to float64" in done.stderr
    assert "use --device cpu" in done.stderr
