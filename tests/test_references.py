"""Files of statistics as others and we write them, and what becomes of broken and hostile ones."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddo_cli import checkpoint, npz
from ddo_cli.engines.scoring import open_reference
from ddo_cli.errors import CheckpointError, DataError, DdoError
from ddo_cli.metrics import references, stats
from ddo_cli.metrics.references import is_reference, read_reference, save_reference
from ddo_cli.metrics.stats import Statistics

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 3))
MU, SIGMA = ROWS.mean(0), np.cov(ROWS.T)


class Measure:
    """An extractor of three features, as far as references know one."""

    def __init__(self, key="fid", name="net", num_features=3, **protocol):
        self.key, self.name, self.num_features, self.changes = key, name, num_features, protocol

    def protocol(self):
        own = {"extractor": self.name, "weights_sha256": "a" * 64, "resize": "bilinear", "precision": "float32"}
        return {**own, **self.changes}


NET = Measure()
DATA = {"name": "x", "num_images": 40, "num_classes": 0, "shape": [3, 8, 8], "digest": "0"}


def own_file(path, features=True, protocol=None, tensors=None, **header):
    moments = {"pool": Statistics(torch.from_numpy(MU), torch.from_numpy(SIGMA))}
    rows = {"pool": torch.from_numpy(ROWS.astype(np.float32))} if features else {}
    save_reference(path, moments, rows, metric="fid", protocol=protocol or NET.protocol(), data=DATA)
    if tensors is not None or header:
        old = checkpoint.load(path)
        checkpoint.save(path, {**old.tensors, **(tensors or {})}, {**old.header, **header})
    return path


def assert_moments(found):
    np.testing.assert_array_equal(found.mean.numpy(), MU)
    np.testing.assert_array_equal(found.cov.numpy(), SIGMA)


# ---------------------------------------------------------------------------------------------------------------------
# Honest files


def test_edm(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=MU, sigma=SIGMA)
    found = read_reference(tmp_path / "edm.npz")
    assert_moments(found.statistics(NET))
    assert_moments(found.statistics(Measure("fd_dinov2", "other")))  # it names no extractor and is believed
    assert (found.num_images, found.images, found.protocol) == (None, None, None)
    with pytest.raises(DataError, match="no spatial features of net; give ADM's VIRTUAL"):
        found.statistics(NET, "spatial")
    with pytest.raises(DataError, match=r"moments only, not the features of each image.*--features"):
        found.features(NET)


def test_ours_of_before(tmp_path):
    """An .npz with the name of the extractor."""
    np.savez(tmp_path / "a.npz", mu=MU, sigma=SIGMA, num_images=40, extractor="net")
    found = read_reference(tmp_path / "a.npz")
    assert found.num_images == 40
    assert_moments(found.statistics(NET))
    with pytest.raises(DataError, match="extractor 'net', which cannot be compared with those of 'other'"):
        found.statistics(Measure(name="other"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels_last", [True, False])
def test_adm(tmp_path, save, channels_last, monkeypatch):
    """The images come a batch at a time, channels first, out of stored and compressed files."""
    monkeypatch.setattr(references, "SPATIAL_FEATURES", 2)
    images = RNG.integers(0, 256, (10, 5, 6, 3), dtype=np.uint8)
    arr = images if channels_last else images.transpose(0, 3, 1, 2).copy()
    save(tmp_path / "VIRTUAL.npz", arr_0=arr, mu=MU, sigma=SIGMA, mu_s=MU[:2], sigma_s=SIGMA[:2, :2])
    found = read_reference(tmp_path / "VIRTUAL.npz")
    assert is_reference(tmp_path / "VIRTUAL.npz")
    assert found.num_images is None  # the statistics are of the whole data, not of these images
    assert_moments(found.statistics(NET))
    assert found.statistics(NET, "spatial").mean.tolist() == MU[:2].tolist()
    assert (found.images.num, found.images.shape) == (10, (3, 5, 6))
    batches = list(found.images.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat(batches).numpy().tolist() == images.transpose(0, 3, 1, 2).tolist()
    with pytest.raises(DataError, match="holds the images, not the features"):
        found.features(NET)


def edm2(**changes):
    fid = {"mu": MU, "sigma": SIGMA}
    dino = {"mu": MU[:2].astype(np.float32), "sigma": SIGMA[:2, :2].astype(np.float32)}
    return {"num_images": 1000, "fid": fid, "fd_dinov2": dino, **changes}


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
def test_edm2(tmp_path, protocol, order, module):
    """Of either numpy, whose private module changed its name in version 2."""
    sigma = np.asarray(SIGMA, order=order)
    content = pickle.dumps(edm2(fid={"mu": MU, "sigma": sigma}), protocol=protocol)
    name = (b"numpy._core.multiarray", b"numpy._core.numeric")[protocol == 5]
    content = content.replace(
        b"\x8c" + bytes([len(name)]) + name, b"\x8c" + bytes([len(n := name.replace(b"numpy._core", module))]) + n
    )
    # A frame tells its length, which Python's own pickler fits; without frames there is none to correct.
    at = content.index(b"\x95")
    (tmp_path / "img64.pkl").write_bytes(content[:at] + content[at + 9 :] if module == b"numpy.core" else content)
    found = read_reference(tmp_path / "img64.pkl")
    assert is_reference(tmp_path / "img64.pkl")
    assert found.num_images == 1000
    assert_moments(found.statistics(NET))
    dino = found.statistics(Measure("fd_dinov2", "dinov2", 2))
    torch.testing.assert_close(dino.mean, torch.from_numpy(MU[:2]), rtol=1e-6, atol=0)
    assert dino.cov.dtype == torch.float64
    assert dino.num_images == 1000
    with pytest.raises(DataError, match=r"holds fd_dinov2: pool; fid: pool.*nothing of fd_clip.*--metric fd_clip"):
        found.statistics(Measure("fd_clip", "clip"))


def test_ours(tmp_path):
    path = own_file(tmp_path / "a" / "ref.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["ref.safetensors"]
    found = read_reference(path)
    assert (found.num_images, found.data, found.protocol) == (40, DATA, NET.protocol())
    assert_moments(found.statistics(NET))
    torch.testing.assert_close(found.features(NET), torch.from_numpy(ROWS.astype(np.float32)))
    with pytest.raises(DataError, match="moments only"):
        read_reference(own_file(tmp_path / "b.safetensors", features=False)).features(NET)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (Measure(weights_sha256="b" * 64), r"weights_sha256: aaaaaaaa\.\. -> bbbbbbbb\.\."),
        (Measure(name="net2"), "extractor: net -> net2"),
        (Measure(resize="bicubic"), "resize: bilinear -> bicubic"),
        (Measure(precision="bf16"), "precision: float32 -> bf16"),
        (Measure(resize="bicubic", precision="bf16"), "precision: float32 -> bf16; resize: bilinear -> bicubic"),
        (Measure("fd_clip"), "nothing of fd_clip"),
    ],
)
def test_other_protocols_are_refused(tmp_path, other, match):
    found = read_reference(own_file(tmp_path / "ref.safetensors"))
    for ask in (found.statistics, found.features):
        with pytest.raises(DataError, match=match) as caught:
            ask(other)
        assert "\n" not in str(caught.value)


def test_what_is_a_reference(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "folder.npz").mkdir()
    assert not is_reference(tmp_path / "images.npz")
    assert not is_reference(tmp_path / "folder.npz")
    assert not is_reference("embedded:digits32")
    assert is_reference("missing.pkl")
    with pytest.raises(DataError, match=r"missing\.pkl does not exist; give EDM's"):
        read_reference("missing.pkl")


def test_training_rounds_take_every_kind(tmp_path):
    np.savez(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(edm2()))
    own_file(tmp_path / "c.safetensors")
    for name in ("a.npz", "b.pkl", "c.safetensors"):
        assert_moments(open_reference(str(tmp_path / name), NET))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert open_reference(str(tmp_path / "images.npz"), NET).items.shape == (2, 3, 4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Broken and hostile files: one line that begins with the file's name


def refused(path, match, ask=lambda path: read_reference(path).statistics(NET)):
    with pytest.raises(DdoError, match=match) as caught:
        ask(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 1000
    assert caught.value.kind in ("data", "checkpoint")


SKEW = SIGMA + np.triu(np.ones((3, 3)), 1)
WRONG = {  # mu, sigma -> what the message says
    "nan": (MU * np.nan, SIGMA, "not finite"),
    "inf": (MU, SIGMA * np.inf, "not finite"),
    "skew": (MU, SKEW, "not symmetric"),
    "negative": (MU, -SIGMA, "semidefinite"),
    "small": (MU[:2], SIGMA[:2, :2], r"must be \(3,\)"),
    "unlike": (MU, SIGMA[:2, :2], r"must be \(3,\)"),
    "matrix": (MU[None], SIGMA, r"must be \(3,\)"),
    "scalar": (np.array(1.0), np.array(1.0), r"must be \(3,\)"),
    "half": (MU.astype(np.float16), SIGMA.astype(np.float16), "mu is float16"),
    "half sigma": (MU, SIGMA.astype(np.float16), "sigma float16"),
    "complex": (MU, SIGMA + 0j, "sigma complex128"),
    "integers": (MU.astype(int), SIGMA, "mu is int64"),
    "bool": (MU > 0, SIGMA, "mu is bool"),
}
NPZ_ONLY = {
    "texts": (np.array(["a", "b", "c"]), SIGMA, "mu is <U1"),
    "objects": (np.array([{}, {}, {}], dtype=object), SIGMA, "array of objects"),
    "records": (np.zeros(3, dtype=[("a", "f8")]), SIGMA, "something else than numbers"),
}


@pytest.mark.parametrize("name", [*WRONG, *NPZ_ONLY])
def test_wrong_npz(tmp_path, name):
    mu, sigma, match = {**WRONG, **NPZ_ONLY}[name]
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    refused(tmp_path / "ref.npz", match)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pickle(tmp_path, name):
    mu, sigma, match = WRONG[name]
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(edm2(fid={"mu": mu, "sigma": sigma})))
    refused(tmp_path / "ref.pkl", "not a whole pickle" if name == "complex" else match)


OWN = {"half": "torch.float16", "half sigma": "torch.float16", "integers": "int64", "bool": "bool"}


@pytest.mark.parametrize("name", [name for name in WRONG if name != "complex"])  # which safetensors cannot write
def test_wrong_file_of_ours(tmp_path, name):
    mu, sigma, match = WRONG[name]
    tensors = {"pool.mean": torch.from_numpy(mu), "pool.cov": torch.from_numpy(sigma)}
    refused(own_file(tmp_path / "ref.safetensors", tensors=tensors), OWN.get(name, match))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "pickle without statistics"),
        ({}, "pickle without statistics"),
        ({"num_images": 5}, "pickle without statistics"),
        ({"fid": {"mu": MU}}, "pickle without statistics"),
        (edm2(fid={"mu": [1.0], "sigma": SIGMA}), "must be arrays"),
        (edm2(fid={"mu": MU, "sigma": "x"}), "must be arrays"),
        (edm2(num_images="many"), "num_images = many"),
        (edm2(num_images=1), "num_images = 1"),
        ({5: {"mu": MU, "sigma": SIGMA}}, "pickle without statistics"),
        (edm2(fid={"mu": np.array([print], dtype=object), "sigma": SIGMA}), "numpy type 'O8'"),
        (edm2(fid={"mu": print, "sigma": SIGMA}), r"names 'builtins\.print', which could run code"),
        ({"f\nid\x1b[2J": {"mu": MU[:1], "sigma": SIGMA}, "fid": {"mu": 1, "sigma": 1}}, "."),
    ],
)
def test_wrong_pickles(tmp_path, content, match):
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content))
    refused(tmp_path / "ref.pkl", match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "model"}, "kind 'model' where a 'statistics' is needed"),
        ({"metric": None}, "does not say what made it"),
        ({"protocol": "x"}, "does not say what made it"),
        ({"data": {}}, "does not say what made it"),
        ({"data": {"num_images": 39}}, "not those of 39 images"),
        ({"tensors": {"pool.features": torch.zeros(40)}}, "not those of 40 images"),
        ({"tensors": {"spatial.mean": torch.zeros(2)}}, "no whole 'spatial.cov'"),
    ],
)
def test_wrong_headers_of_ours(tmp_path, changes, match):
    refused(own_file(tmp_path / "ref.safetensors", **changes), match)


def test_features_that_are_not_finite(tmp_path):
    path = own_file(tmp_path / "ref.safetensors", tensors={"pool.features": torch.full((40, 3), np.nan)})
    refused(path, "not finite numbers", lambda path: read_reference(path).features(NET))


def test_other_safetensors(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "without this program's header")
    checkpoint.save(
        tmp_path / "y.safetensors", {}, {"kind": "statistics", "metric": "fid", "protocol": {}, "data": DATA}
    )
    refused(tmp_path / "y.safetensors", "no whole 'pool.mean'")


@pytest.mark.parametrize(
    "changes", [{"mu_s": MU[:2]}, {"arr_0": np.zeros((4, 8, 8), np.uint8)}, {"arr_0": np.zeros((4, 8, 8, 3))}]
)
def test_wrong_adm(tmp_path, changes):
    np.savez(tmp_path / "v.npz", mu=MU, sigma=SIGMA, **changes)
    refused(tmp_path / "v.npz", r"sigma_s|arr_0 is")


def npz_claiming(path, shape, size=None):
    """An .npz whose `mu` claims a shape that its bytes do not have; `size` is what the zip's directory claims."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", head.getvalue() + bytes(24))
        sigma = io.BytesIO()
        np.save(sigma, SIGMA)
        archive.writestr("sigma.npy", sigma.getvalue())
    if size is not None:
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\x01\x02") + 24
        content[at : at + 4] = struct.pack("<I", size + len(head.getvalue()))
        path.write_bytes(content)
    return path


def test_shapes_that_are_claimed(tmp_path):
    """No memory is reserved for them."""
    ask = stats.read_npz
    refused(npz_claiming(tmp_path / "a.npz", (10**12,)), "claims the shape", ask)
    refused(
        npz_claiming(tmp_path / "b.npz", (2**29 - 64,), 2**32 - 512),
        "larger than any statistics|of nearly nothing",
        ask,
    )
    refused(npz_claiming(tmp_path / "c.npz", (2**20,), 2**23), "ends early|Bad|not an .npz", ask)
    assert npz.members(npz_claiming(tmp_path / "d.npz", (3,)))["mu"].read().tolist() == [0, 0, 0]


def test_mutated_files(tmp_path):
    """Cut anywhere, or with any byte changed: refused in one line, or read as before where the byte means nothing."""
    np.savez(tmp_path / "a.npz", mu=MU, sigma=SIGMA, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(edm2(), protocol=4))
    own_file(tmp_path / "c.safetensors")
    rng = np.random.default_rng(1)
    messages = []
    for name in ("a.npz", "b.pkl", "c.safetensors"):
        whole = (tmp_path / name).read_bytes()
        path = tmp_path / f"mutated-{name}"
        for cut in np.linspace(0, len(whole) - 1, 25).astype(int):
            path.write_bytes(whole[:cut])
            refused(path, ".")
        for place in rng.integers(0, len(whole), 100):
            content = bytearray(whole)
            content[place] ^= int(rng.integers(1, 256))
            path.write_bytes(content)
            try:
                read_reference(path).statistics(NET)
            except (DataError, CheckpointError) as error:
                messages.append(str(error))
    assert len(messages) > 100
    assert [message for message in messages if not message.isprintable()] == []
