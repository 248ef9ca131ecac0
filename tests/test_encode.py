"""`ddo encode`: content, sharing among processes, continuing, and what is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, torchrun
from kills import KilledError
from safetensors.torch import load_file
from toy_latent import make_toy

from ddo_cli.data.images import open_images
from ddo_cli.data.inspection import Inspection
from ddo_cli.data.latents import MANIFEST
from ddo_cli.data.stream import open_stream
from ddo_cli.engines import encode
from ddo_cli.engines.sampling import sample
from ddo_cli.engines.weights import info
from ddo_cli.errors import DataError, RunError, UsageError
from ddo_cli.models import registry

DATA = "embedded:digits32"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy") / "m.safetensors", std=0.25)


def encoded(ckpt, out, **options):
    return encode.run(DATA, ckpt, out, num=40, **{"shard": 16, "batch": 8, "device": CPU, **options})


def test_the_set_holds_what_the_model_makes_of_every_image(ckpt, tmp_path):
    found = encoded(ckpt, tmp_path / "set")
    assert (found["num_images"], found["shape"], found["dtype"], found["shards"]) == (40, [24, 16, 16], "float32", 3)
    model, images = registry.load_model(ckpt, CPU).model, open_images(DATA, 40)
    opened = open_images(str(tmp_path / "set"))
    assert opened.items.shape == (40, 24, 16, 16)
    assert opened.num_classes == images.num_classes
    np.testing.assert_array_equal(opened.labels, images.labels)
    expected = model.codec.latents(torch.from_numpy(images.items)).numpy()
    np.testing.assert_array_equal(opened.items[np.arange(40)], expected)
    shards = [load_file(tmp_path / "set" / f"latents-{n:06d}.safetensors") for n in range(3)]
    np.testing.assert_array_equal(torch.cat([shard["latents"] for shard in shards]).numpy(), expected)
    assert [len(shard["labels"]) for shard in shards] == [16, 16, 8]
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_text())
    assert manifest["encoder"] == "toy 0.25"
    assert manifest["image_shape"] == [3, 32, 32]
    inspection = Inspection(images.labels)
    inspection.update(np.arange(40), torch.from_numpy(images.items))
    assert manifest["source_digest"] == found["source_digest"] == inspection.digest()


def test_tokens(tmp_path):
    ckpt = make_checkpoint(tmp_path / "var.safetensors", "var")
    found = encoded(ckpt, tmp_path / "set")
    assert (found["shape"], found["dtype"]) == ([85], "int16")
    assert found["encoder"].startswith("vqvae:")
    model, images = registry.load_model(ckpt, CPU).model, torch.from_numpy(open_images(DATA, 40).items)
    tokens = torch.from_numpy(open_images(str(tmp_path / "set")).items[:])
    assert torch.equal(model.codec.encode(tokens), model.codec.encode(images))
    with pytest.raises(UsageError, match="tokens"):
        encoded(ckpt, tmp_path / "half", dtype="float16")


def test_half_precision(ckpt, tmp_path):
    found = encoded(ckpt, tmp_path / "set", dtype="float16")
    exact = encoded(ckpt, tmp_path / "exact")
    # 1.05 (40 (24 16 16 itemsize + 8)): the labels are not halved
    assert (found["bytes"], exact["bytes"]) == (int(40 * 12296 * 1.05), int(40 * 24584 * 1.05))
    half, whole = (open_images(str(tmp_path / name)).items for name in ("set", "exact"))
    assert half.dtype == np.float16
    # float16 has 11 bits; latents lie in [-1, 1]
    np.testing.assert_allclose(half[:].astype(np.float32), whole[:], atol=2**-11)
    assert (half[:] != whole[:]).any()


def test_an_unfinished_set_is_continued(ckpt, tmp_path, monkeypatch):
    write, written, limit = encode.latents.write_shard, [], 2

    def killed(file, *rest):
        if len(written) == limit:
            raise KilledError
        written.append(file.name)
        write(file, *rest)

    monkeypatch.setattr(encode.latents, "write_shard", killed)
    with pytest.raises(KilledError):
        encoded(ckpt, tmp_path / "set")
    limit = None
    with pytest.raises(DataError, match="unfinished"):
        open_images(str(tmp_path / "set"))
    first = (tmp_path / "set" / written[0]).stat().st_mtime_ns
    written.clear()
    encoded(ckpt, tmp_path / "set")
    assert written == ["latents-000002.safetensors"]
    assert (tmp_path / "set" / "latents-000000.safetensors").stat().st_mtime_ns == first
    encoded(ckpt, tmp_path / "other")
    for file in sorted((tmp_path / "other").glob("latents-*")):
        assert file.read_bytes() == (tmp_path / "set" / file.name).read_bytes()
    written.clear()
    assert encoded(ckpt, tmp_path / "set")["source_digest"]
    assert written == []
    (tmp_path / "set" / "latents-000001.safetensors").unlink()
    encoded(ckpt, tmp_path / "set")
    assert written == ["latents-000001.safetensors"]


def test_images_that_moved_are_compared(ckpt, tmp_path, capsys):
    """An archive that was copied elsewhere goes on; one with other images or labels does not."""
    items = open_images(DATA, 40)

    def act(name, pixels, labels):
        np.savez(tmp_path / name, arr_0=pixels, arr_1=labels)
        return encode.run(str(tmp_path / name), ckpt, tmp_path / "set", shard=16, batch=8, device=CPU)

    first = act("a.npz", items.items, items.labels)
    files = {file: file.read_bytes() for file in (tmp_path / "set").glob("latents-*")}
    (tmp_path / "set" / "latents-000002.safetensors").unlink()
    assert act("b.npz", items.items, items.labels)["source_digest"] == first["source_digest"]
    assert f"is continued with source: {tmp_path / 'a.npz'} -> {tmp_path / 'b.npz'}" in capsys.readouterr().err
    assert all(file.read_bytes() == content for file, content in files.items())
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["source"] == str(tmp_path / "b.npz")
    pixels, labels = items.items.copy(), items.labels.copy()
    pixels[20, 0, 0, 0] ^= 1
    labels[[0, 39]] = (labels[[0, 39]] + 1) % 10
    with pytest.raises(DataError, match=r"holds 1 shards of other images or labels than .*, latents-000001"):
        act("c.npz", pixels, items.labels)
    with pytest.raises(DataError, match=r"holds 2 shards of other images or labels than .*, latents-000000"):
        act("d.npz", items.items, labels)


def test_two_processes_write_the_same_set(tmp_path):
    ckpt = make_checkpoint(tmp_path / "var.safetensors", "var")
    options = ["--num-images", "40", "--shard", "16", "--batch", "8", "--device", "cpu", "--json"]
    arguments = ["-m", "ddo_cli", "encode", DATA, "--ckpt", ckpt, *options]
    done = torchrun(*arguments, "--out", str(tmp_path / "two"))
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    one = encode.run(DATA, ckpt, tmp_path / "one", num=40, shard=16, batch=8, device=CPU)
    assert found["source_digest"] == one["source_digest"]
    files = sorted(file.name for file in (tmp_path / "one").glob("[!.]*"))
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_dry_run_writes_nothing(ckpt, tmp_path):
    found = encoded(ckpt, tmp_path / "set", dry_run=True)
    assert found["dry_run"]
    assert found["bytes"] < found["bytes_free"]
    assert found["images_per_second"] > 0
    assert not (tmp_path / "set").exists()


def test_what_is_refused(ckpt, tmp_path):
    with pytest.raises(UsageError, match="nothing to encode"):
        encoded(make_checkpoint(tmp_path / "pixels.safetensors"), tmp_path / "a")
    with pytest.raises(DataError, match="8x8 grey"):
        encode.run("embedded:digits8", ckpt, tmp_path / "b", device=CPU)
    encoded(ckpt, tmp_path / "set")
    with pytest.raises(RunError, match="shard"):
        encoded(ckpt, tmp_path / "set", shard=8)
    with pytest.raises(RunError, match="num"):
        encode.run(DATA, ckpt, tmp_path / "set", num=41, shard=16, device=CPU)
    with pytest.raises(DataError, match="latents or tokens, not images"):
        encode.run(str(tmp_path / "set"), ckpt, tmp_path / "c", device=CPU)
    with pytest.raises(DataError, match="latents or tokens, not images"):
        open_stream(str(tmp_path / "set"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("")
    sample.run(ckpt, range(2), tmp_path / "drawn", sampling={"steps": 2}, device=CPU)
    for name in ("full", "drawn"):
        before = sorted((tmp_path / name).iterdir())
        with pytest.raises(RunError, match="not empty and holds no encoded set"):
            encoded(ckpt, tmp_path / name)
        assert sorted((tmp_path / name).iterdir()) == before


def test_info_tells_a_set_of_tokens_from_one_of_samples(ckpt, tmp_path):
    encoded(ckpt, tmp_path / "set")
    found = info.run(str(tmp_path / "set"))
    assert (found["holds"], found["num"], found["shards"]) == ("encoded set", 40, 3)
    sample.run(ckpt, range(2), tmp_path / "drawn", sampling={"steps": 2}, form="shards", device=CPU)
    found = info.run(str(tmp_path / "drawn"))
    assert (found["holds"], found["num"]) == ("sample set", 2)


def test_a_full_disk_is_noticed_before(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_free", lambda out: 1000)
    with pytest.raises(RunError, match="make room"):
        encoded(ckpt, tmp_path / "set")
