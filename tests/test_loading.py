"""Models from files are built without memory, and are what building and filling them gives."""

import os

import pytest
import torch
from conftest import CPU, KINDS, TINY, make_checkpoint

from ddo_cli import checkpoint, files
from ddo_cli.errors import CheckpointError
from ddo_cli.models import registry
from ddo_cli.models.loading import with_tensors

OTHERS = {
    "mlp": ("mlp", (2,), {}),
    "ncsn++": (
        "edm-unet",
        (3, 8, 8),
        {"channels": 4, "channel_mult": [1, 1], "num_blocks": 1, "embedding": "fourier", "encoder": "residual"},
    ),
    "adm": ("adm-unet", (3, 8, 8), {"width": 32, "channel_mult": [1], "num_blocks": 1, "num_head_channels": 16}),
    "mixture": ("mixture", (2,), {}),
}


def everything(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_a_loaded_model_is_the_built_and_filled_one(tmp_path, kind):
    name, shape, options = OTHERS[kind] if kind in OTHERS else TINY[kind][:3]
    classes = 0 if kind == "mixture" else 10
    built = registry.build(registry.config_of(name, shape, classes, options, {})).eval()
    header = {"kind": "model", "config": registry.config_of(name, shape, classes, options, {})}
    checkpoint.save(tmp_path / "model", built.state_dict(), header)
    state = torch.get_rng_state()
    loaded = registry.load_model(tmp_path / "model", CPU).model
    assert torch.equal(torch.get_rng_state(), state)  # no initial weights are drawn
    ours, theirs = everything(loaded), everything(built)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
        assert ours[key].stride() == tensor.stride(), key  # patch-unet's convolutions are channels_last
        assert (ours[key].dtype, ours[key].requires_grad) == (tensor.dtype, tensor.requires_grad), key
        assert isinstance(ours[key], torch.nn.Parameter) == isinstance(tensor, torch.nn.Parameter), key
    assert not loaded.training


def test_tensors_get_the_types_of_the_network(tmp_path):
    ckpt = make_checkpoint(tmp_path / "model")
    file = checkpoint.load(ckpt)
    checkpoint.save(tmp_path / "half", {key: tensor.half() for key, tensor in file.tensors.items()}, file.header)
    assert {tensor.dtype for tensor in everything(registry.load_model(tmp_path / "half", CPU).model).values()} == {
        torch.float32
    }


def test_a_module_whose_constants_are_made_anywhere():
    class Careless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(2))
            self.register_buffer("constant", torch.arange(2.0), persistent=False)

    module = with_tensors(Careless, {"weight": torch.tensor([3.0, 4.0])}, CPU)
    assert (module.constant * module.weight).tolist() == [0, 4]


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    ckpt = make_checkpoint(tmp_path / "model")
    file = checkpoint.load(ckpt)
    first, *others = file.tensors
    for wrong in (
        {key: file.tensors[key] for key in others},
        file.tensors | {first: file.tensors[first].flatten()[:1]},
        file.tensors | {"more": torch.ones(1)},
    ):
        checkpoint.save(tmp_path / "wrong", wrong, file.header)
        with pytest.raises(CheckpointError, match="tensors do not fit the model"):
            registry.load_model(tmp_path / "wrong", CPU)


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    first = files.sha256(path)
    path.write_bytes(b"other")  # as long, and as new as its clock can tell
    assert files.sha256(path) != first
    monkeypatch.setattr(files, "_SETTLED", -1.0)
    other = files.sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(files.hashlib, "sha256", None)
        assert files.sha256(path) == other
    status = path.stat()
    path.write_bytes(b"again")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert files.sha256(path) not in (first, other)


def test_the_encoder_of_a_var_is_hashed_until_it_changes(tmp_path, monkeypatch):
    model = registry.load_model(make_checkpoint(tmp_path / "model", "var"), CPU).model
    first = model.codec.encoder_id()
    with monkeypatch.context() as patch:
        patch.setattr("ddo_cli.models.var.transformer.hash_of", None)
        assert model.codec.encoder_id() == first
    model.load_state_dict({key: tensor + 1 for key, tensor in model.state_dict().items()})
    assert model.codec.encoder_id() != first
