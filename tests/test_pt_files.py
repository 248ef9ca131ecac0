"""Networks inside the checkpoints of training programs, and torch's two layouts of files."""

import argparse
import io
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_convert import ADM_SETTINGS, openai_file, random_adm
from test_hostile import refused

from ddo_cli import checkpoint, torch_files
from ddo_cli.data.images import open_images
from ddo_cli.engines.weights import convert
from ddo_cli.errors import CheckpointError, DataError
from ddo_cli.models import pt_files

MARK = "input_blocks.0.0.weight"


def net(value=0.0, prefix=""):
    return OrderedDict({f"{prefix}{MARK}": torch.full((2,), value), f"{prefix}out.2.bias": torch.full((3,), value)})


def optimizer():
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


# What trainers save -> where the weights with value 1 lie.
CHECKPOINTS = {
    "bare": (net(1), ""),
    "DDP": (net(1, "module."), "module"),
    "torch.compile in DDP": (net(1, "module._orig_mod."), "module"),
    "torch.compile of a part": ({MARK.replace("s.0", "s.0._orig_mod"): torch.ones(2), "out.2.bias": torch.ones(3)}, ""),
    "DiT's trainer": ({"model": net(), "ema": net(1), "opt": optimizer(), "args": argparse.Namespace(lr=1.0)}, "ema"),
    "of DDP": ({"model": net(0, "module."), "ema": net(1, "module."), "args": Path("x")}, "ema.module"),
    "without an average": ({"state_dict": net(1), "epoch": 3, "rng": np.zeros(3, np.uint32)}, "state_dict"),
    "model_ema": ({"model": net(), "model_ema": net(1), "optimizer": optimizer()}, "model_ema"),
    "ema-pytorch": (
        {"ema": {**net(0, "online_model."), **net(1, "ema_model."), "initted": torch.tensor(True)}}, "ema.ema_model"
    ),
    "Lightning": ({"state_dict": {**net(0, "n."), **net(1, "n_ema.")}, "h": defaultdict(list)}, "state_dict.n_ema"),
    "beside another": ({"model": net(1), "teacher": net(), "step": 7}, "model"),
    "with a counter": ({**net(1), "step": 7}, ""),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_found(name, zipped, tmp_path):
    content, place = CHECKPOINTS[name]
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = pt_files.read(tmp_path / "a.pt", "give another", ["pos_1LC", MARK])
    assert (found.place, list(found.tensors)) == (place, list(net()))
    assert all(bool((tensor == 1).all()) for tensor in found.tensors.values())
    assert found.notes.get("weights") == (place or None)
    assert ("not_read" in found.notes) == (
        name not in ("bare", "DDP", "torch.compile in DDP", "torch.compile of a part")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": net(), "b": net()}, r"holds several networks \(a, b\); save the one"),
        (
            {"model": {"map_layer0.weight": torch.zeros(1)}, "opt": optimizer()},
            r"holds EDM's tensors without their configuration \(give its network-snapshot-\*.pkl\); give another",
        ),
        (optimizer(), "is the state of an optimizer, not of a network; give the file of the averaged weights"),
        ({"opt": optimizer()}, "is the state of an optimizer"),
        ({"epoch": 3}, "holds epoch, not a bare state dict of a known network; give another"),
        (torch.nn.Linear(2, 2), r"refused: it names 'torch\.nn\.modules\.linear\.Linear'"),
    ],
)
def test_what_is_no_network_is_named(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        pt_files.read(tmp_path / "a.pt", "give another", [MARK])


def test_files_beside_it_are_named(tmp_path):
    for name in ("ema_0.9999_010000.pt", "ema_0.9999_020000.pt", "model010000.pt"):
        torch.save(net(1), tmp_path / name)
    torch.save(optimizer(), tmp_path / "opt010000.pt")
    with pytest.raises(CheckpointError, match=r"optimizer, not of a network; give ema_0\.9999_010000\.pt"):
        convert.run(tmp_path / "opt010000.pt", tmp_path / "x.safetensors")
    openai_file(random_adm(), tmp_path / "model010000.pt")
    found = convert.run(
        tmp_path / "model010000.pt", tmp_path / "x.safetensors", settings=["qkv=new", *ADM_SETTINGS], dry_run=True
    )
    assert found["averaged"] == "ema_0.9999_010000.pt lies beside it; samples are drawn of averaged weights"


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def repacked(source, target, method=zipfile.ZIP_STORED, **changes):
    """A copy of a zip file with another method, and other contents of members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, changes.get(Path(entry.filename).name, old.read(entry)))
    return target


@pytest.mark.parametrize("method", ["LZMA", "BZIP2", "DEFLATED"])
def test_compressed_zips_are_refused(method, tmp_path):
    torch.save(net(), tmp_path / "a.pt")
    path = repacked(tmp_path / "a.pt", tmp_path / "b.pt", getattr(zipfile, f"ZIP_{method}"))
    refused(path, "refused: it unpacks to|compressed or encrypted", lambda path: torch_files.read(path, str(path), "x"))
    raw = bytearray((tmp_path / "a.pt").read_bytes())
    where = raw.rfind(b"PK\1\2") + 10
    raw[where : where + 2] = (99).to_bytes(2, "little")  # a method that nobody knows
    path.write_bytes(raw)
    refused(path, "compressed or encrypted", lambda path: torch_files.read(path, str(path), "x"))


def of_tar(path, **changes):
    """A tar with a link out of it, in the layout of torch before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("/pickle"), io.BytesIO())
    return path


def test_other_archives_are_named(tmp_path):
    refused(
        of_tar(tmp_path / "a.pt"), "is a tar archive; unpack it", lambda path: torch_files.read(path, str(path), "x")
    )
    torch.save(net(), tmp_path / "b.pt")
    script = repacked(tmp_path / "b.pt", tmp_path / "c.pt")
    with zipfile.ZipFile(script, "a") as archive:
        archive.writestr("b/constants.pkl", b"")
    refused(script, "TorchScript", lambda path: torch_files.read(path, str(path), "x"))
    big = repacked(tmp_path / "b.pt", tmp_path / "d.pt", byteorder=b"big")
    refused(big, "big-endian", lambda path: torch_files.read(path, str(path), "x"))


def test_as_torch_reads_it(tmp_path):
    """Views, shared storages, types, empty tensors, parameters: as `torch.load` gives them."""
    base = torch.arange(12.0)
    content = {
        "views": [base[3:], base.reshape(3, 4).T, base[::5], base[:0]],
        "types": [torch.ones(2, dtype=kind) for kind in (torch.bool, torch.int16, torch.bfloat16, torch.float64)],
        "parameter": torch.nn.Parameter(base, requires_grad=False),
        "plain": [torch.Size([1, 2]), {1, 2}, b"x", 2**70, None, 1.5, ("a", {"b": [True]})],
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        found = torch_files.read(tmp_path / "a.pt", "a.pt", "x")
        assert found["plain"] == content["plain"]
        assert torch.equal(found["parameter"], base)
        for key in ("views", "types"):
            for ours, theirs in zip(found[key], content[key], strict=True):
                assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
                assert torch.equal(ours, theirs)
        assert found["views"][0].untyped_storage().data_ptr() == found["views"][2].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of Git LFS, not the file; run `git",
        ),
        (b"\n<!DOCTYPE html><html><title>Sign in</title>", "is a web page, .*; download it again"),
    ],
)
def test_what_was_left_in_place_of_a_file(content, message, tmp_path):
    for name in ("a.pkl", "a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
    for act in (
        lambda: convert.run(tmp_path / "a.pkl", tmp_path / "x.safetensors"),
        lambda: convert.run(tmp_path / "a.pt", tmp_path / "x.safetensors"),
        lambda: checkpoint.load(tmp_path / "a.safetensors"),
        lambda: torch_files.read_tensors(tmp_path / "a.safetensors", "a.safetensors", "x"),
    ):
        with pytest.raises(CheckpointError, match=message):
            act()
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_images(str(tmp_path / "a.zip"))
