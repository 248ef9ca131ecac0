"""Broken and hostile inputs of `ddo fid`: one message that names them, exit code 2, and nothing written.

Every case goes through the program's entry point. Mutations are made by loops, so that every part of a format is hit.
"""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from fid_files import (
    FEATURES,
    NUM,
    PIXELS,
    SIZE,
    Writer,
    arrays,
    cut,
    flipped,
    folder,
    good,
    moments,
    nothing,
    png,
    raw,
    samples,
    within,
    zipped,
)
from launch import launch
from safetensors.numpy import save

from ddo_cli import cli
from ddo_cli.metrics import references
from ddo_cli.metrics.extractors.select import load_extractor
from ddo_cli.metrics.stats import Statistics

LOG = "source,reference,num_images\nearlier.zip,ref.npz,9\n"

CASES: dict[str, tuple[Callable[[Path], list[str]], str]] = {}  # name: what makes the arguments, part of the message


def source(name: str, write: Writer, message: str, *given: str) -> None:
    """A case whose images are wrong."""
    CASES[f"source, {name}"] = lambda root: [str(root / write(root)), *filled(given, root)], message


def reference(name: str, write: Writer, message: str, *given: str) -> None:
    """A case whose reference is wrong."""
    CASES[f"reference, {name}"] = (
        lambda root: [good(root), "--ref", str(root / write(root)), *filled(given, root)],
        message,
    )


def option(name: str, message: str, *given: str) -> None:
    """A case whose images are right and whose options are not."""
    CASES[f"option, {name}"] = lambda root: [good(root), *filled(given, root)], message


def filled(given: tuple[str, ...], root: Path) -> list[str]:
    return [part.replace("@", str(root)) for part in given]


# ---------------------------------------------------------------------------------------------------------------------
# Images

WHOLE = png()
UNREADABLE = "cannot be read as an image"
for part in (0.0, 0.05, 0.2, 0.5, 0.8):
    for name in ("0.png", "1.png", "2.png"):
        broken = {name: WHOLE[: int(len(WHOLE) * part)]}
        source(f"{name} of a folder cut at {part}", folder(broken), f"{name} {UNREADABLE}")
        source(f"{name} of a zip cut at {part}", zipped(broken), f"{name} {UNREADABLE}")
for place in range(0, 8):
    content = bytes(byte ^ (0xFF if i == place else 0) for i, byte in enumerate(WHOLE))
    source(f"byte {place} of a PNG", folder({"1.png": content}), f"1.png {UNREADABLE}")
for place in (45, 60, 90, 150):  # inside the compressed pixels, which carry a checksum
    content = bytes(byte ^ (0xFF if i == place else 0) for i, byte in enumerate(WHOLE))
    source(f"byte {place} of a PNG", folder({"2.png": content}), f"2.png {UNREADABLE}")
for name, content in {"text": b"no image", "zeros": bytes(300), "gif header": b"GIF89a" + bytes(20)}.items():
    source(f"{name} called .png", folder({"1.png": content}), UNREADABLE)
deep = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 900
clear = np.dstack([PIXELS[0], np.full((SIZE, SIZE), 128, np.uint8)])
source("16-bit grey", folder({"1.png": png(deep)}), "has 16 bits a channel")
source("transparency", folder({"1.png": png(clear)}), "transparent pixels")
source("32-bit float TIFF called .png", folder({"1.png": png(mode="F", form="tiff")}), "1.png")
source("one grey among colours", folder({"1.png": png(mode="L")}), "must have one size and mode")
for shape in ((8, 9), (9, 8), (1, 1), (4, 4), (16, 16)):
    image = np.zeros((*shape, 3), np.uint8)
    for write in (folder, zipped):
        source(f"{write.__name__}, one of {shape}", write({"1.png": png(image)}), "must have one size and mode")
source("empty folder", lambda root: (root / "set").mkdir() or "set", "holds no images")
source("folder of text", within(raw("set/readme.txt", b"hello")), "holds no images")
source("one image", within(raw("set/only.png", WHOLE)), "holds one image")
source("missing", nothing, "does not exist")
source("text file", raw("notes.txt", b"hello"), "neither a folder nor")
source("empty zip", raw("set.zip", b"PK\x05\x06" + bytes(18)), "holds no images")
source("zip of text", lambda root: zipped({})(root) and "set.txt.zip", "does not exist")
for part in (0.0, 0.1, 0.5, 0.9, 0.99):
    source(f"zip cut at {part}", cut("cut.zip", zipped({}), part), "not a whole zip file")
for labels in (b"{", b"[]", b"{}", b'{"labels": 3}', b'{"labels": [["0.png", 0]]}', b'{"labels": [["0.png"]]}',
               b'{"labels": [["0.png", -1], ["1.png", 0], ["2.png", 0]]}',
               b'{"labels": [["0.png", 1.5], ["1.png", 0], ["2.png", 0]]}', b"\xff\xfe", b"[" * 9999):  # fmt: skip
    source(f"dataset.json {labels[:40]!r} {len(labels)}", zipped({"dataset.json": labels}), "dataset.json")

# ---------------------------------------------------------------------------------------------------------------------
# Arrays

for kind in ("float16", "float32", "float64", "int8", "int16", "uint16", "int32", "int64", "complex64", "bool", "U3"):
    for key in ("images", "arr_0"):
        source(f"{key} of {kind}", arrays(**{key: PIXELS.astype(kind)}), kind if kind != "U3" else "<U3")
source("NaN", arrays(images=np.full((4, 8, 8, 3), np.nan)), "images are uint8 0..255")
source("objects", arrays(images=np.array([{}, {}], dtype=object)), "not a whole .npz")
for shape in ((8, 8, 3), (8, 8), (8,), (), (2, 8, 8, 8, 3), (4, 8, 8, 2), (4, 8, 8, 4), (4, 5, 8, 8), (0, 8, 8, 3),
              (4, 0, 8, 3), (4, 8, 8, 0)):  # fmt: skip
    source(
        f"images of shape {shape}",
        arrays(images=np.zeros(shape, np.uint8)),
        "must be uint8" if len(shape) != 4 or 0 in shape else "1 or 3 channels",
    )
source("one image in an array", arrays(images=PIXELS[:1]), "holds one image")
source("points", arrays(samples=np.zeros((9, 2), np.float32)), "points")
source("wrong key", arrays(pixels=PIXELS), "only pixels")
source("no key", arrays(), "needs an array named")
source("statistics", arrays(**moments()), "feature statistics, not images")
for name, labels in {"too few": np.zeros(3, int), "negative": np.full(NUM, -2), "floats": np.zeros(NUM),
                     "no one-hot rows": np.ones((NUM, 3)), "words": np.full(NUM, "cat"),
                     "huge": np.full(NUM, 2**40)}.items():  # fmt: skip
    source(f"labels: {name}", arrays(images=PIXELS, labels=labels), "labels")
for part in (0.0, 0.02, 0.3, 0.7, 0.95):
    source(f"npz cut at {part}", cut("cut.npz", arrays(images=PIXELS), part), "not a whole .npz")
source("garbage called .npz", raw("set.npz", bytes(range(256)) * 9), "not a whole .npz")
for size in (b"(10, 8, 8, 3)", b"(999999999999, 8, 8, 3)", b"(-24, 8, 8, 3)", b"[24, 8, 8, 3]", b"__import__('os')"):
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + size + b", }"
    member = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + PIXELS.tobytes()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", member)
    source(f"header {size!r}", raw("set.npz", file.getvalue()), "set.npz")

# ---------------------------------------------------------------------------------------------------------------------
# Sample sets, runs, models

source("unfinished samples", samples(complete=False), "unfinished sample set")
for key, value in {"seeds": "0-5", "labels": [0], "seeds ": 0}.items():
    source(f"manifest with {key} {value}", samples(**{key.strip(): value}), "set")
source("samples without a manifest's files", samples(seeds="7-9"), "set")
source("npz samples without the file", samples(format="npz"), "samples.npz")
source("shards without shards", samples(format="shards"), "set")
source("damaged shard", raw("set/shard-000000.safetensors", b"garbage" * 9), "set")
source("garbage called .safetensors", raw("m.safetensors", b"garbage" * 40), "m.safetensors")
source("no bytes called .safetensors", raw("m.safetensors", b""), "m.safetensors")
source("a bare file of tensors", raw("m.safetensors", save({"a": np.zeros(3)})), "m.safetensors")
for part in (0.001, 0.1, 0.9):
    source(
        f"model cut at {part}",
        cut("m.safetensors", lambda root: Path(make_checkpoint(root / "whole.safetensors")).name, part),
        "m.safetensors",
    )
source("run with a broken model", raw("run/final.safetensors", b"garbage" * 40), "final.safetensors")
source("unfinished run", raw("run/recipe.yaml", b"data: {}\n"), "run")
source("sampling keys for images", arrays(images=PIXELS), "steps", "steps=3")
source("a pickle of weights", raw("m.pkl", pickle.dumps({})), "m.pkl")

# ---------------------------------------------------------------------------------------------------------------------
# References

for size in (1, 63, 65, 2048):
    reference(f"mu and sigma of {size}", arrays(**moments(size)), "must be (64,)")
skewed = np.eye(FEATURES) + np.triu(np.ones((FEATURES, FEATURES)), 1)
for name, changed in {
    "mu of another size": {"mu": np.zeros(63)}, "sigma of another size": {"sigma": np.eye(63)},
    "sigma not square": {"sigma": np.zeros((64, 63))}, "sigma flat": {"sigma": np.zeros(64)},
    "mu of rows": {"mu": np.zeros((1, 64))}, "mu a number": {"mu": np.zeros(())},
    "NaN in mu": {"mu": np.full(64, np.nan)}, "infinity in mu": {"mu": np.full(64, np.inf)},
    "NaN in sigma": {"sigma": np.full((64, 64), np.nan)}, "infinity in sigma": {"sigma": np.full((64, 64), np.inf)},
    "negative sigma": {"sigma": -np.eye(64)}, "skewed sigma": {"sigma": skewed},
    "complex mu": {"mu": np.zeros(64, complex)}, "words": {"mu": np.full(64, "x")},
    "objects": {"mu": np.array([{}] * 64, dtype=object)}, "bools": {"mu": np.zeros(64, bool)},
}.items():  # fmt: skip
    reference(f"npz, {name}", arrays(**moments(**changed)), "set.npz")
reference("only mu", arrays(mu=np.zeros(64)), "set.npz")
reference("only sigma", arrays(sigma=np.eye(64)), "set.npz")
for part in (0.0, 0.1, 0.5, 0.99):
    reference(f"npz cut at {part}", cut("cut.npz", arrays(**moments()), part), "cut.npz")
reference("one byte of sigma", flipped(arrays(**moments()), 0.5), "set.npz")
reference("images of ADM that are floats", arrays(**moments(), arr_0=PIXELS / 1.0), "arr_0", "--metrics", "precision")
reference("missing", nothing, "does not exist")
reference("missing statistics", lambda root: "gone.pkl", "gone.pkl does not exist")
reference("empty zip", raw("set.zip", b"PK\x05\x06" + bytes(18)), "holds no images")
reference("cut PNG", folder({"2.png": WHOLE[:99]}), UNREADABLE)
reference("one image", within(raw("set/only.png", WHOLE)), "holds one image")
reference("garbage called .safetensors", raw("r.safetensors", b"garbage" * 40), "r.safetensors")
reference("a model", lambda root: Path(make_checkpoint(root / "r.safetensors")).name, "r.safetensors")


def stored(root: Path) -> str:
    """A reference of `ddo stats` with the features of every image, and without the images."""
    references.save_reference(
        root / "r.safetensors",
        {"pool": Statistics(torch.zeros(FEATURES).double(), torch.eye(FEATURES).double())},
        {"pool": torch.zeros(9, FEATURES)},
        metric="fd_embedded",
        protocol=load_extractor().protocol(),
        data={"num_images": 9},
    )
    return "r.safetensors"


class Reduced:
    """An object whose pickle calls what it is given."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


MARKER = Path(os.environ.get("TMPDIR", "/tmp")) / f"ddo-hostile-{os.getpid()}"
for name, payload in {
    "os.system": Reduced(os.system, f"touch {MARKER}"), "eval": Reduced(eval, f"open({str(MARKER)!r}, 'w')"),
    "exec": Reduced(exec, f"open({str(MARKER)!r}, 'w')"), "open": Reduced(open, str(MARKER), "w"),
    "Popen": Reduced(subprocess.Popen, ["touch", str(MARKER)]), "loads": Reduced(pickle.loads, b"."),
    "getattr": Reduced(getattr, "x", "upper"),
}.items():  # fmt: skip
    inside = {"num_images": 9, "fid": {"mu": payload, "sigma": np.eye(2)}}
    reference(f"pickle, {name}", raw("r.pkl", pickle.dumps(payload)), "r.pkl")
    reference(f"pickle, {name} inside", raw("r.pkl", pickle.dumps(inside)), "r.pkl")
EDM2 = {"num_images": 9, "fid": moments(), "fd_embedded": moments()}
for name, content in {
    "nothing": None, "a list": [1], "no metrics": {"num_images": 9}, "words": {"fid": {"mu": "a", "sigma": "b"}},
    "lists": {"fid": {"mu": [0.0], "sigma": [[1.0]]}}, "without sigma": {"fid": {"mu": np.zeros(64)}},
    "another metric": {"num_images": 9, "fid": moments()}, "keys that are numbers": {1: moments()},
    "NaN": {**EDM2, "fd_embedded": moments(mu=np.full(64, np.nan))},
    "another size": {**EDM2, "fd_embedded": moments(63)}, "one image": {**EDM2, "num_images": 1},
    "a count in words": {**EDM2, "num_images": "9" * 99},
}.items():  # fmt: skip
    reference(f"pickle of {name}", raw("r.pkl", pickle.dumps(content)), "r.pkl")
for part in (0.0, 0.01, 0.3, 0.999):
    reference(f"pickle cut at {part}", raw("r.pkl", pickle.dumps(EDM2)[: int(len(pickle.dumps(EDM2)) * part)]), "r.pkl")
reference("moments for KID", arrays(**moments()), "moments only", "--metrics", "precision")
reference("moments for --nearest", arrays(**moments()), "moments only", "--nearest", "4")
reference("features without images for --nearest", stored, "holds statistics", "--nearest", "4")
reference("moments for --per-class", arrays(**moments()), "per class", "--per-class")
reference("images without labels for --per-class", arrays(images=PIXELS), "has no labels", "--per-class")

# ---------------------------------------------------------------------------------------------------------------------
# Options

option("metric", "is not known (did you mean 'precision'?)", "--metrics", "fid,precison")
option("metric twice", "different metrics", "--metrics", "fid,fid")
option("no metric", "is not known", "--metrics", "")
option("metrics of Inception", "the metric 'is' is of Inception-v3", "--metrics", "is")
option("sfid without Inception", "Inception", "--metrics", "sfid")
option("too few for KID", "24 images are too few for the metric 'kid', which needs 1000; give more, or --kid-subset 12",
       "--metrics", "kid")  # fmt: skip
option("--kid-subset without KID", "of the metric kid; add it", "--kid-subset", "12")
option("too large a subset", "which needs 25; give more, or --kid-subset 12", "--metrics", "kid", "--kid-subset", "25")
option("too few for --uncertainty", "--uncertainty", "--uncertainty", "--num-images", "12")
option("more images than there are", "good.npz", "--num-images", "25")
option("--repeat", "lower it", "--repeat", "20")
option("--uncertainty without fid", "metric fid", "--metrics", "precision", "--uncertainty")
option("images without labels, --per-class", "labels", "--per-class", "--ref", "embedded:digits32")
option("--compare alone", "give both", "--compare", "@/good.npz")
option("--nll without Inception", "Inception", "--nll")
option("--nll of a metric with a network of its own", "--nll", "--nll", "--metrics", "fd_dinov2")
option("--compare with what is missing", "does not exist", "--nll", "--compare", "@/gone")
option("--nearest of a metric with a network of its own", "--nearest", "--nearest", "2", "--metrics", "fd_clip")
option("benchmark", "is not known", "--benchmark", "cifar10-unconditional")
option("precision", "--precision", "--precision", "float16")
option("weights and extractor", "have no effect", "--weights", "@/good.npz")
option("extractor that is missing", "none.safetensors", "--extractor", "@/none.safetensors")
option("reference that is embedded nowhere", "embedded:digit", "--ref", "embedded:digit")
option("log in no directory", "cannot be written", "--csv", "@/none/log.csv")
option("page that is none", "is not the name of a page", "--report", "@/x.pdf")
option("page in no directory", "in a directory that exists", "--report", "@/none/x.html")
option("log that is a directory", "cannot be written", "--csv", "@")
option("log that is binary", "cannot be read as CSV", "--csv", "@/good.npz")
option("log of something else", "no CSV file of `ddo fid`", "--csv", "@/notes.csv")
option("--adm without is", "--adm is a protocol of the metric 'is'", "--adm", "--metrics", "fid,kid")
option("--pictures without one", "--pictures there has no effect without --nearest or --nll", "--pictures", "there")
option("--download of an extractor", "no effect beside --extractor", "--download")
option(
    "--extractor of a metric with a network of its own",
    "fd_dinov2 have networks of their own",
    "--metrics",
    "fd_dinov2",
    "--extractor",
    "embedded:extractor-digits32",
)
option("missing weights", "none.pth does not exist; run `curl -L -o weights-inception", "--weights", "none.pth")
option("pictures below a file", "--pictures ", "--nearest", "2", "--pictures", "@/notes.csv/pictures")
option("unknown option", "--metric", "--metric-s", "fid")


def ran(arguments: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `ddo fid` in this process."""
    monkeypatch.setattr(sys, "argv", ["ddo", "fid", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def given(root: Path, name: str) -> list[str]:
    """Arguments of a case, with an extractor and a log where it does not choose its own."""
    arguments = CASES[name][0](root)
    if "--ref" not in arguments:
        arguments += ["--ref", good(root)]
    if not any(word in name for word in ("network of its own", "missing weights")) and "--extractor" not in arguments:
        arguments += ["--extractor", "embedded:extractor-digits32"]
    (root / "log.csv").write_text(LOG)
    (root / "notes.csv").write_text("name,value\na,1\n")
    return [*arguments, *([] if "--csv" in arguments else ["--csv", str(root / "log.csv")]), "--json"]


@pytest.mark.parametrize("name", CASES)
def test_refused(name, tmp_path, monkeypatch, capsys):
    arguments = given(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = ran(arguments, monkeypatch, capsys)
    assert code == 2, (out, err)
    found = json.loads(out)  # one object, and no figure beside it
    assert found.keys() == {"error"}
    message = found["error"]["message"]
    assert CASES[name][1] in message
    assert message.isprintable(), "one line, without codes for the terminal"
    assert 20 < len(message) < 1000
    assert "Traceback" not in err
    assert (tmp_path / "log.csv").read_text() == LOG
    assert sorted(tmp_path.rglob("*")) == before
    assert not MARKER.exists()


def test_what_is_whole_is_scored(tmp_path, monkeypatch, capsys):
    """Each writer's unbroken files are good: the cases above fail for what they changed."""
    writers = [folder({}), zipped({}), arrays(images=PIXELS), samples()]
    references = [*writers, arrays(**moments()), raw("r.pkl", pickle.dumps(EDM2))]
    for number, (first, second) in enumerate(
        [(one, references[2]) for one in writers] + [(writers[0], one) for one in references]
    ):
        root = tmp_path / str(number)
        (root / "ref").mkdir(parents=True)
        names = str(root / first(root)), str(root / "ref" / second(root / "ref"))
        code, out, err = ran(
            [names[0], "--ref", names[1], "--extractor", "embedded:extractor-digits32", "--json"], monkeypatch, capsys
        )
        assert code == 0, err
        assert json.loads(out)["fd_embedded"] >= 0


def test_number_of_cases():
    assert len(CASES) >= 200


@pytest.mark.parametrize("name", ["source, 1.png of a folder cut at 0.5", "reference, pickle, os.system inside"])
def test_refused_by_the_program_itself(name, tmp_path):
    done = launch("-m", "ddo_cli", "fid", *given(tmp_path, name))
    assert done.returncode == 2, done.stderr
    assert CASES[name][1] in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr
    assert not MARKER.exists()
