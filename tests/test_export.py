"""`ddo export --like`: the original file but for its numbers."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from test_convert import ADM_SETTINGS, openai_file, random_adm
from test_foreign import (  # noqa: F401
    Reduced,
    blob,
    network,
    official,
    official_tensors,
    pickled_network,
    random_model,
    write,
)

from ddo_cli import checkpoint
from ddo_cli.engines.weights import convert, export
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models.adm import keys as adm_keys
from ddo_cli.models.edm.files import read_edm
from ddo_cli.safe_pickle import read_with_storages


def tuned(source, path, settings=(), scale=0.1):
    """The converted model with other numbers, as finetuning leaves it."""
    convert.run(source, path.with_suffix(".converted"), settings=settings)
    file = checkpoint.load(path.with_suffix(".converted"))
    torch.manual_seed(1)
    tensors = {key: tensor + scale * torch.randn_like(tensor) for key, tensor in file.tensors.items()}
    checkpoint.save(path, tensors, file.header)
    return str(path), tensors


@pytest.mark.parametrize(("kind", "inner"), [("EDMPrecond", "SongUNet"), ("iDDPMPrecond", "DhariwalUNet")])
def test_only_the_numbers_of_a_pickle_change(official, tmp_path, kind, inner):  # noqa: F811
    content, _ = pickled_network(official, kind, inner)
    like = write(tmp_path / "a.pkl", {**content, "note": "kept", "other": torch.arange(5.0)})
    ckpt, tensors = tuned(like, tmp_path / "t.safetensors")
    out = tmp_path / "out.pkl"
    found = export.run(ckpt, out, like=like)
    assert (found["family"], found["num_tensors"], found["verified"]) == ("edm", len(tensors), True)
    assert found["kept"] == (5 if kind == "iDDPMPrecond" else 0)  # four filters and the noise levels
    again = read_edm(out)
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in tensors.items())
    # Byte by byte: nothing but raw numbers differs, and most of those do.
    old, new = (np.frombuffer(path.read_bytes(), np.uint8).copy() for path in (like, out))
    assert len(old) == len(new)
    assert (old != new).mean() > 0.5
    for values, offset in read_with_storages(like)[1]:
        old[offset : offset + values.nbytes] = new[offset : offset + values.nbytes] = 0
    assert np.array_equal(old, new)


def test_another_reader_finds_the_numbers(official, tmp_path, monkeypatch):  # noqa: F811
    """Python's own unpickler and torch's own tensors, of a file that this test wrote."""
    like = write(tmp_path / "a.pkl", pickled_network(official, "EDMPrecond", "SongUNet")[0])
    ckpt, _ = tuned(like, tmp_path / "t.safetensors")
    export.run(ckpt, tmp_path / "out.pkl", like=like)

    def meta_of(meta):
        return types.SimpleNamespace(**meta["state"])

    monkeypatch.setattr(sys.modules["torch_utils.persistence"], "_reconstruct_persistent_obj", meta_of)
    net = pickle.loads((tmp_path / "out.pkl").read_bytes())["ema"]._modules["model"]
    tensors = checkpoint.load(ckpt).tensors
    assert torch.equal(net._modules["map_layer0"]._parameters["weight"], tensors["net.emb0.weight"])
    assert torch.equal(net._modules["enc"]._modules["8x8_conv"]._parameters["bias"], tensors["net.encoder.8.stem.bias"])


def test_tensors_stored_across_their_memory(official, tmp_path):  # noqa: F811
    """A transposed view: its numbers lie in another order than its shape says."""
    stored = official_tensors(random_model())
    stored["model.map_layer1.weight"] = stored["model.map_layer1.weight"].t().contiguous().t()
    assert not stored["model.map_layer1.weight"].is_contiguous()
    like = write(tmp_path / "a.pkl", {"ema": network(official, stored)})
    ckpt, tensors = tuned(like, tmp_path / "t.safetensors")
    export.run(ckpt, tmp_path / "out.pkl", like=like)
    found = read_edm(tmp_path / "out.pkl")
    assert not found.stored["model.map_layer1.weight"].is_contiguous()
    assert torch.equal(found.stored["model.map_layer1.weight"], tensors["net.emb1.weight"])


def shared_file(official, path, way):  # noqa: F811
    """Two biases of 8 numbers in one memory: as one tensor, or as one storage of the file that is read twice."""
    stored = official_tensors(random_model())
    keys = [key for key, tensor in stored.items() if key.endswith("norm0.bias") and tensor.shape == (8,)][:2]
    ema = network(official, stored)
    blocks = ema.reduction[1][0]["state"]["_modules"]["model"].reduction[1][0]["state"]["_modules"]["enc"]
    norms = [blocks._modules[key.split(".")[2]].reduction[1][0]["state"]["_modules"]["norm0"] for key in keys]
    parameters = [norm.reduction[1][0]["state"]["_parameters"] for norm in norms]
    assert len(parameters) == 2
    if way == "tensor":
        parameters[1]["bias"] = parameters[0]["bias"]
    else:
        raw = blob(torch.FloatStorage, 8, bytes(32))
        for entry in parameters:
            entry["bias"] = Reduced(
                torch._utils._rebuild_tensor_v2,
                Reduced(torch.storage._load_from_bytes, raw), 0, (8,), (1,), False, None,
            )  # fmt: skip
    return write(path, {"ema": ema}), keys


@pytest.mark.parametrize("way", [pytest.param("tensor", marks=pytest.mark.slow), "bytes"])
def test_shared_numbers_cannot_become_different(official, tmp_path, way):  # noqa: F811
    like, keys = shared_file(official, tmp_path / "a.pkl", way)
    ckpt, tensors = tuned(like, tmp_path / "t.safetensors")
    out = tmp_path / "out.pkl"
    with pytest.raises(CheckpointError, match="share their numbers"):
        export.run(ckpt, out, like=like)
    assert not out.exists()
    first, second = (read_edm(like).names.from_edm(key, None)[0] for key in keys)
    tensors[second] = tensors[first].clone()
    checkpoint.save(tmp_path / "t.safetensors", tensors, checkpoint.read_header(ckpt))
    found = export.run(ckpt, out, like=like)
    assert found["verified"]
    content = out.read_bytes()
    assert export.run(ckpt, out, like=like) == found  # finds it
    other, _ = tuned(like, tmp_path / "other.safetensors")
    with pytest.raises((UsageError, CheckpointError)):
        export.run(other, out, like=like)
    assert out.read_bytes() == content


def test_what_is_written_wrongly_is_noticed(official, tmp_path, monkeypatch):  # noqa: F811
    like = write(tmp_path / "a.pkl", pickled_network(official, "EDMPrecond", "SongUNet")[0])
    ckpt, _ = tuned(like, tmp_path / "t.safetensors")
    read = export._edm

    def wrong(path):
        """Leaves the old numbers."""
        return read(path)._replace(write=lambda tensors, target: target.write_bytes(path.read_bytes()))

    monkeypatch.setattr(export, "_edm", wrong)
    with pytest.raises(CheckpointError, match="reads back different"):
        export.run(ckpt, tmp_path / "out.pkl", like=like)
    assert [path.name for path in tmp_path.glob("*out*")] == []


def test_half_precision_originals_are_rounded_aloud(official, tmp_path, capsys):  # noqa: F811
    stored = {key: tensor.half() for key, tensor in official_tensors(random_model()).items()}
    like = write(tmp_path / "a.pkl", {"ema": network(official, stored)})
    ckpt, tensors = tuned(like, tmp_path / "t.safetensors")
    found = export.run(ckpt, tmp_path / "out.pkl", like=like)
    assert found["rounded"] > 100
    assert "lose precision" in capsys.readouterr().err
    written = read_edm(tmp_path / "out.pkl").tensors
    assert all(torch.equal(written[key], tensor.half().float()) for key, tensor in tensors.items())


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_an_adm_diffusion_model(tmp_path, order):
    model = random_adm()
    like = openai_file(model, tmp_path / "a.pt", order)
    settings = [f"qkv={order}", *ADM_SETTINGS]
    ckpt, tensors = tuned(like, tmp_path / "t.safetensors", settings)
    found = export.run(ckpt, tmp_path / "out.pt", like=like, settings=settings)
    assert (found["family"], found["verified"], found["kept"]) == ("adm", True, 0)
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(written) == list(torch.load(like, weights_only=True))
    expected = dict(adm_keys.to_openai(key, tensor, order, model.options) for key, tensor in tensors.items())
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_files_that_do_not_fit(official, tmp_path):  # noqa: F811
    like = write(tmp_path / "a.pkl", pickled_network(official, "EDMPrecond", "SongUNet")[0])
    ckpt, _ = tuned(like, tmp_path / "t.safetensors")
    out = tmp_path / "out.pkl"
    other = write(tmp_path / "b.pkl", pickled_network(official, "VEPrecond", "SongUNet")[0])
    with pytest.raises(CheckpointError, match="precond edm instead of ve"):
        export.run(ckpt, out, like=other)
    other = write(tmp_path / "c.pkl", {"ema": network(official, official_tensors(random_model(3)), 3)})
    with pytest.raises(CheckpointError, match="num_classes 2 instead of 3"):
        export.run(ckpt, out, like=other)
    with pytest.raises(CheckpointError, match="name patch-unet instead of edm-unet"):
        export.run(make_checkpoint(tmp_path / "m.safetensors"), out, like=like)
    with pytest.raises(UsageError, match="does not exist"):
        export.run(ckpt, out, like=tmp_path / "none.pkl")
    with pytest.raises(UsageError, match=r"is no file of published weights; give the \.pkl, \.pt or \.pth that was"):
        export.run(ckpt, tmp_path / "out.safetensors", like=tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=r"must end in \.pkl"):
        export.run(ckpt, tmp_path / "out.pt", like=like)
    with pytest.raises(UsageError, match="tells its configuration itself"):
        export.run(ckpt, out, like=like, settings=["qkv=new"])
    assert export.run(ckpt, out, like=like, dry_run=True)["dry_run"]
    assert not out.exists()
    out.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"out\.pkl exists"):
        export.run(ckpt, out, like=like)
    assert out.read_bytes() == b"precious"
