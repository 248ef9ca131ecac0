"""Weight files made to harm: nothing of them runs, one message says what is wrong, and memory and time stay small.

The pickles are written opcode by opcode or by Python's pickler; `ran` is the file that any executed payload leaves.
"""

import builtins
import functools
import importlib
import io
import json
import operator
import os
import pickle
import resource
import subprocess
import time

import numpy as np
import pytest
import torch
from test_foreign import (  # noqa: F401
    Reduced,
    blob,
    named,
    network,
    official,
    official_tensors,
    persistent,
    random_model,
    tensor_call,
    text,
    write,
)

from ddo_cli import console
from ddo_cli.engines.weights import convert, export
from ddo_cli.errors import CheckpointError, printable
from ddo_cli.models.edm.files import read_edm

SECONDS = 2.0  # of processor time for one hostile file
MEGABYTES = 200  # above what the process had before
DAMAGED = "not a whole pickle"
MISFIT = "does not fit its description"


def peak() -> float:
    """Largest memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused(path, problem, act=None):
    """Reads a hostile file; it must be refused within bounds, by one message that names the file. Returns that."""
    memory, start = peak(), time.process_time()
    with pytest.raises(CheckpointError, match=problem) as caught:
        (act or read_edm)(path)
    assert time.process_time() - start < SECONDS
    assert peak() - memory < MEGABYTES
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()  # one line, no escape codes
    assert len(message) < 1000
    return message


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """What torch imports on first use is not the files' doing."""
    with torch.device("meta"):
        random_model()


def archive(tmp_path, content, **kwargs):
    torch.save(content, tmp_path / "hostile.pt", **kwargs)
    return tmp_path / "hostile.pt"


def length(code, number, width):
    return code + number.to_bytes(width, "little")


PROTO = b"\x80\x04"


# ---------------------------------------------------------------------------------------------------------------------
# Code


def shell(o):
    return f"touch {o.marker}"


def array_in(subtype=b"", shape=b"K\x02\x85", raw=bytes(16), order=b"\x89"):
    """The opcodes of a numpy array of float64."""
    empty = named("numpy._core.multiarray", "_reconstruct")
    empty += (subtype or named("numpy", "ndarray")) + b"K\x00\x85C\x01b\x87R"
    kind = named("numpy", "dtype") + text("f8") + b"\x89\x88\x87R(K\x03" + text("<")
    kind += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return PROTO + empty + b"(K\x01" + shape + kind + order + length(b"B", len(raw), 4) + raw + b"tb."


CODE = {
    "os.system": (lambda o: Reduced(os.system, shell(o)), "system"),
    "eval": (lambda o: Reduced(builtins.eval, o.source), "builtins.eval"),
    "exec": (lambda o: Reduced(builtins.exec, o.source), "builtins.exec"),
    "compile": (lambda o: Reduced(builtins.compile, o.source, "x", "exec"), "builtins.compile"),
    "open": (lambda o: Reduced(open, str(o.marker), "w"), r"io.open|_io.open"),
    "import_module": (lambda o: Reduced(importlib.import_module, "os"), "importlib.import_module"),
    "getattr chain": (lambda o: getattr_chain(o), "builtins.getattr"),
    "attrgetter": (lambda o: Reduced(operator.attrgetter, "system"), "operator.attrgetter"),
    "methodcaller": (lambda o: Reduced(operator.methodcaller, "system", shell(o)), "operator.methodcaller"),
    "partial": (lambda o: functools.partial(os.system, shell(o)), "functools.partial"),
    "map": (lambda o: map(os.system, [shell(o)]), "builtins.map"),
    "subprocess": (lambda o: Reduced(subprocess.Popen, ["touch", str(o.marker)]), "subprocess.Popen"),
    "torch.load": (lambda o: Reduced(torch.load, io.BytesIO(b"x")), "torch.serialization.load|_io.BytesIO"),
    "pickle.loads": (lambda o: Reduced(pickle.loads, pickle.dumps(Reduced(os.system, shell(o)))), "pickle.loads"),
    "numpy.load": (lambda o: Reduced(np.load, "x.npy"), "numpy.*load"),
    "storage with a program": (
        lambda o: Reduced(torch.storage._load_from_bytes, pickle.dumps(Reduced(os.system, shell(o)))),
        "system",
    ),
    "storage in a storage": (
        lambda o: Reduced(torch.storage._load_from_bytes, pickle.dumps(Reduced(torch.storage._load_from_bytes, b"x"))),
        "_load_from_bytes",
    ),
    "storage of a class": (lambda o: Reduced(torch.storage._load_from_bytes, blob(Reduced)), "test_foreign.Reduced"),
    "numpy array of a class": (lambda o: array_in(b"cos\nsystem\n"), "os.system"),
    "numpy array of another class": (lambda o: array_in(named("numpy", "dtype")), "a class of its own"),
    "numpy array called": (lambda o: PROTO + named("numpy", "ndarray") + b"K\x02\x85R.", "class is called"),
    "numpy objects": (lambda o: np.array([Reduced(os.system, shell(o))], dtype=object), "numpy type 'O8'"),
    "numpy records": (lambda o: np.zeros(2, dtype=[("a", "f4")]), "numpy type 'V4'"),
    "numpy texts": (lambda o: np.array(["a"]), "numpy type 'U1'"),
    "numpy complex": (lambda o: np.zeros(2, complex), "numpy type 'c16'"),
    "numpy big-endian": (lambda o: np.zeros(2, ">f8"), DAMAGED),
    "numpy subclass": (lambda o: np.ma.zeros(2), "numpy.ma"),
    "a subclass": (lambda o: Bad({"a": 1}), "test_hostile.Bad"),
    "a text's subclass": (lambda o: BadText("x"), "copyreg|test_hostile.BadText"),
    "copyreg": (lambda o: b"ccopyreg\n_reconstructor\n.", "copyreg._reconstructor"),
    "INST": (lambda o: b"(S'" + shell(o).encode() + b"'\nios\nsystem\n.", "STRING|INST"),
    "INST alone": (lambda o: b"(ios\nsystem\n.", "INST"),
    "OBJ": (lambda o: b"(" + named("collections", "OrderedDict") + b"o.", "OBJ"),
    "NEWOBJ": (lambda o: PROTO + named("os", "system") + text(shell(o)) + b"\x85\x81.", "os.system"),
    "NEWOBJ_EX": (lambda o: PROTO + named("collections", "OrderedDict") + b")}\x92.", "NEWOBJ_EX"),
    "EXT1": (lambda o: b"\x80\x02\x82\x01.", "EXT1"),
    "EXT2": (lambda o: b"\x80\x02\x83\x01\x00.", "EXT2"),
    "EXT4": (lambda o: b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
    "BUILD of a name": (
        lambda o: PROTO + named("torch.nn.modules.container", "ModuleDict") + b"}" + text("x") + b"Nsb.",
        DAMAGED,
    ),
    "BUILD with __setstate__": (
        lambda o: (
            PROTO
            + (named("torch.nn.modules.container", "ModuleDict") + b")\x81")
            + (b"}" + text("__setstate__") + named("os", "system") + b"sb.")
            + b""
        ),
        "os.system",
    ),
    "BUILD with slots": (
        lambda o: PROTO + named("torch.nn.modules.container", "ModuleDict") + b")\x81N}\x86b.",
        DAMAGED,
    ),
    "persistent id": (lambda o: b"\x80\x02K\x01Q.", "BINPERSID"),
    "persistent id as text": (lambda o: b"Px\n.", "PERSID"),
    "source that writes": (lambda o: {"ema": persistent(o, "Evil", _init_kwargs={})}, MISFIT),
    "dotted name": (lambda o: PROTO + named("collections", "OrderedDict.fromkeys.__self__") + b".", "__self__"),
    "attributes of a name": (lambda o: PROTO + named("torch._utils", "os.system") + b".", "torch._utils.os.system"),
}


class Bad(dict):
    pass


class BadText(str):
    __slots__ = ()


def getattr_chain(o):
    """importlib.import_module("os").system.__call__, as calls inside calls."""
    system = Reduced(getattr, Reduced(importlib.import_module, "os"), "system")
    return Reduced(getattr, system, "__call__")


@pytest.mark.parametrize("name", CODE)
def test_nothing_runs(official, tmp_path, name):  # noqa: F811
    make, problem = CODE[name]
    refused(write(tmp_path / "hostile.pkl", make(official)), problem)
    assert not official.marker.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Memory and time


def doubled_tuples(depth=60, leaf=b"K\x01"):
    """((x, x), (x, x)), ...: 2**depth leaves."""
    return leaf + b"".join(b"\x94h" + bytes([level]) + b"\x86" for level in range(depth))


def doubled_lists(depth=60):
    """A list of lists, each of which holds the one before it twice: the last has 2**depth leaves."""
    code = b"](]\x94K\x01a"
    for level in range(depth):
        code += b"]\x94(" + (b"h" + bytes([level])) * 2 + b"e"
    return code + b"e"


def state_dict_of(**changes):
    """A description of a network whose arguments are replaced."""

    def make(o):
        return {"ema": network(o, official_tensors(random_model()), **changes)}

    return make


def record(class_name, state):
    """An object of EDM's, its state given in opcodes."""
    meta = text("type") + text("class") + text("class_name") + text(class_name) + text("module_src") + text("")
    meta += text("state") + b"}(" + state + b"u"
    return named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}(" + meta + b"u\x85R"


def made_with(arguments):
    """A network whose arguments are what the opcodes make."""
    network = text("_modules") + b"}" + text("model") + record("SongUNet", b"") + b"s"
    ema = record("EDMPrecond", text("_init_kwargs") + arguments + network)
    return PROTO + b"}" + text("ema") + ema + b"s."


def deep_storage(inner):
    """A storage whose key is `inner` there and there again: comparing the two takes as long as they have leaves."""
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, stream, protocol=2)
    kind = b"X\x07\x00\x00\x00storage" + b"ctorch\nFloatStorage\n"
    stream.write(b"\x80\x02(" + kind + inner + b"X\x03\x00\x00\x00cpuK\x00NtQ.")
    stream.write(b"\x80\x02]" + inner + b"a.")
    return stream.getvalue() + bytes(8)


def chain(length):
    """Modules in modules below a network that is described as it should be."""
    state = text("_parameters") + b"}q\x00" + text("_buffers") + b"h\x00"
    begin = b")\x81}(" + state.replace(b"}q\x00", b"h\x00") + text("_modules") + b"}" + text("x")
    container = named("torch.nn.modules.container", "ModuleDict") + b"q\x01"
    first = container + b")\x81}(" + state + text("_modules") + b"}" + text("x")
    modules = first + (b"h\x01" + begin) * length + b"N" + b"sub" * (length + 1)
    children = text("_modules") + b"}" + text("enc") + modules + b"s"
    song = record("SongUNet", text("_parameters") + b"}" + text("_buffers") + b"}" + children)
    numbers = b"".join(text(key) + b"K\x08" for key in ("img_resolution", "img_channels", "label_dim", "sigma_data"))
    outer = text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + b"}" + text("model") + song + b"s"
    given = text("_init_kwargs") + b"}" + text("_init_args") + b")" + numbers
    return PROTO + b"}" + text("ema") + record("EDMPrecond", given + outer) + b"s."


LARGE = {
    "bytes": (lambda o: PROTO + length(b"\x8e", 2**60, 8) + b"x.", DAMAGED),
    "bytes of 4 GB": (lambda o: PROTO + length(b"B", 2**32 - 1, 4) + b"x.", DAMAGED),
    "bytes beyond all": (lambda o: PROTO + length(b"\x8e", 2**64 - 1, 8) + b"x.", DAMAGED),
    "text": (lambda o: PROTO + length(b"\x8d", 2**60, 8) + b"x.", DAMAGED),
    "number": (lambda o: PROTO + length(b"\x8b", 2**31 - 1, 4) + b"x.", DAMAGED),
    "negative number": (lambda o: PROTO + length(b"\x8b", 2**31, 4) + b"x.", DAMAGED),
    "decimal number": (lambda o: b"L" + b"9" * 1_000_000 + b"L\n.", DAMAGED),
    "frame": (lambda o: PROTO + length(b"\x95", 2**63 - 1, 8), DAMAGED),
    "bytearray": (lambda o: b"\x80\x05" + length(b"\x96", 2**60, 8) + b"x.", DAMAGED),
    "memo": (lambda o: PROTO + b"N" + length(b"r", 2**32 - 1, 4) + b".", "'ema'"),
    "memo of texts": (lambda o: b"Np99999999999999999999\n.", "refused"),
    "tensor": (lambda o: tensor_call(blob(torch.FloatStorage), 0, (10**6, 10**6), (1, 1)), DAMAGED),
    "expanded tensor": (lambda o: tensor_call(blob(torch.FloatStorage), 0, (10**12,), (0,)), DAMAGED),
    "dimensions": (lambda o: tensor_call(blob(torch.FloatStorage), 0, (1,) * 10_000, (1,) * 10_000), DAMAGED),
    "size of many digits": (lambda o: tensor_call(blob(torch.FloatStorage), 0, (2**2000,), (1,)), DAMAGED),
    "storage that claims": (
        lambda o: Reduced(torch.storage._load_from_bytes, blob(torch.FloatStorage, 10**12, b"")),
        DAMAGED,
    ),
    "negative storage": (lambda o: Reduced(torch.storage._load_from_bytes, blob(torch.FloatStorage, -1)), DAMAGED),
    "doubled tuples": (lambda o: PROTO + b"}" + text("ema") + doubled_tuples() + b"s.", "'ema'"),
    "doubled lists": (lambda o: PROTO + doubled_lists() + b".", "'ema'"),
    "doubled lists as an argument": (lambda o: made_with(b"}" + text("odd") + doubled_lists() + b"s"), "'odd'"),
    "doubled tuples in a storage": (
        lambda o: Reduced(torch.storage._load_from_bytes, deep_storage(doubled_tuples(40))),
        "a tuple where a str belongs",
    ),
    "deep tuples": (lambda o: PROTO + b"}" + text("ema") + b")" + b"\x85" * 200_000 + b"s.", "'ema'"),
    "deep lists": (lambda o: PROTO + b"}" + text("ema") + b"]" * 140_000 + b"a" * 139_999 + b"s.", "'ema'"),
    "deep tuple as a key": (lambda o: PROTO + b"})" + b"\x85" * 200_000 + b"Ns.", DAMAGED),
    "deep tuple as pairs": (lambda o: made_with(b"](" + b")" + b"\x85" * 100_000 + b"N\x86e"), "not a dict"),
    "deep tuple as a byte order": (
        lambda o: PROTO + named("numpy", "dtype") + text("f4") + b"NN\x87R(K\x03)" + b"\x85" * 100_000 + b"tb.",
        DAMAGED,
    ),
    "colliding keys": (lambda o: colliding(), "60 bits"),
    "operations": (lambda o: PROTO + b"N0" * 1_000_000 + b"N.", "POP"),
    "dicts": (lambda o: PROTO + b"}" * 3_000_000 + b".", "operations"),
    "sets": (lambda o: PROTO + b"\x8f" * 3_000_000 + b".", "operations"),
    "memos": (lambda o: PROTO + b"N" + b"\x94" * 3_000_000 + b".", "operations"),
    "marks": (lambda o: PROTO + b"(" * 3_000_000 + b".", "operations"),
    "one storage many times": (lambda o: repeated(), DAMAGED),
    "modules in modules": (lambda o: chain(15_000), "RecursionError"),
    "100,000 modules": (lambda o: chain(100_000), "operations"),
    "array of a claimed shape": (lambda o: array_in(shape=b"J\x00\x00\x00\x7f\x85"), "wrong length"),
    "array of many digits": (
        lambda o: array_in(shape=length(b"\x8a", 200, 1) + b"\x7f" * 200 + b"\x85"),
        "wrong length",
    ),
    "array of a product that overflows": (
        lambda o: array_in(shape=(b"\x8a\x06" + bytes(5) + b"\x01") * 2 + b"\x86", raw=b""),
        "wrong length",
    ),
    "array of no numbers": (
        lambda o: array_in(shape=b"K\x00" + b"\x8a\x09" + bytes(8) + b"\x01" + b"\x86", raw=b""),
        DAMAGED,
    ),
    "array of a negative size": (lambda o: array_in(shape=b"J\xff\xff\xff\xff\x85"), "impossible shape"),
    "array of many dimensions": (
        lambda o: array_in(shape=b"(" + b"K\x01" * 70 + b"t", raw=bytes(8)),
        "impossible shape",
    ),
    "array of too few bytes": (lambda o: array_in(raw=bytes(15)), "wrong length"),
    "array of too many bytes": (lambda o: array_in(raw=bytes(24)), "wrong length"),
    "array whose order is a number": (lambda o: array_in(order=b"K\x01"), "a int where a bool"),
    "array given a state twice": (lambda o: array_in()[:-1] + b"(K\x01tb.", "takes no state"),
    "one buffer many times": (lambda o: array_repeated(), "more bytes than the file"),
    "many blocks": (state_dict_of(num_blocks=10**9), "too few"),
    "many levels": (state_dict_of(channel_mult=[1] * 60), "too few"),
    "long lists": (state_dict_of(channel_mult=[1] * 10**5), "channel_mult"),
    "long texts": (state_dict_of(embedding_type="x" * 10**6), "embedding_type"),
    "wide": (state_dict_of(model_channels=2**40), "fit"),
    "many classes": (state_dict_of(label_dim=10**9), "fit|instead|missing"),
}


def colliding():
    """A dict whose keys all hash to 0: multiples of the prime that integers are hashed by."""
    keys = b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 50_000))
    return PROTO + b"}(" + keys + b"u."


def repeated():
    """Ten thousand storages from one blob of 100 kB."""
    raw = blob(torch.FloatStorage, 25_000, bytes(100_000))
    call = named("torch.storage", "_load_from_bytes")
    first = PROTO + b"](" + call + b"\x94" + length(b"B", len(raw), 4) + raw + b"\x94\x85R"
    return first + b"h\x00h\x01\x85R" * 10_000 + b"e."


def array_repeated():
    """A thousand arrays of one buffer of 100 kB."""
    kind = named("numpy", "dtype") + text("f8") + b"\x89\x88\x87R"
    call = named("numpy._core.numeric", "_frombuffer")
    raw = length(b"\x96", 100_000, 8) + bytes(100_000)
    head = PROTO + b"](" + call + b"\x94(" + raw + b"\x94" + kind + b"\x94"
    return (
        head
        + b"M\xd4\x30\x85"
        + text("C")
        + b"tR"
        + (b"h\x00(h\x01h\x02M\xd4\x30\x85" + text("C") + b"tR") * 1000
        + b"e."
    )


@pytest.mark.parametrize("name", LARGE)
def test_memory_and_time_are_bounded(official, tmp_path, name):  # noqa: F811
    make, problem = LARGE[name]
    path = write(tmp_path / "hostile.pkl", make(official))
    refused(path, problem)


def test_the_bounds_can_fail(tmp_path):
    """A reader that believes a claim of 1 GB, or that takes its time, does not pass `refused`."""

    def trusting(path):
        bytearray(1_200_000_000)[::4096] = b"x" * len(range(0, 1_200_000_000, 4096))
        raise CheckpointError(f"{path} is bad")

    with pytest.raises(AssertionError):
        refused(tmp_path / "x.pkl", "bad", trusting)


def test_one_tensor_under_many_names_is_not_multiplied(official, tmp_path):  # noqa: F811
    """Half-precision views of one storage: each would become numbers of its own."""
    tensors = official_tensors(random_model())
    shared = torch.zeros(2_000_000, dtype=torch.float16)
    odd = {f"model.odd{i}.freqs": shared for i in range(300)}
    path = write(tmp_path / "a.pkl", {"ema": network(official, {**tensors, **odd})})
    assert path.stat().st_size < 10e6
    refused(path, "claim")


def test_cut_files(official, tmp_path):  # noqa: F811
    whole = pickle.dumps({"ema": network(official, official_tensors(random_model()))}, protocol=4)
    for size in [*range(0, 400, 7), *range(400, len(whole), len(whole) // 40), len(whole) - 1]:
        refused(write(tmp_path / "cut.pkl", whole[:size]), f"{DAMAGED}|refused")


# ---------------------------------------------------------------------------------------------------------------------
# Messages


UGLY = "a\nerror: b\x1b[2J\x9b31m\u202e\r"


def test_names_are_written_out(official, tmp_path):  # noqa: F811
    assert printable(UGLY).isprintable()
    assert printable("plain é [x]") == "plain é [x]"
    assert len(printable("x" * 10**6)) < 300
    tensors = official_tensors(random_model())
    files = {
        "global": PROTO + named("os", UGLY) + b".",
        "class": {"ema": network(official, tensors, class_name=UGLY)},
        "argument": {"ema": network(official, tensors, **{UGLY: 1})},
        "value": {"ema": network(official, tensors, embedding_type=UGLY)},
        "tensor": {"ema": network(official, {**tensors, f"model.{UGLY}": torch.zeros(1)})},
        "type": {"ema": network(official, {**tensors, f"model.{UGLY}": torch.zeros(1).int()})},
    }
    for name, content in files.items():
        refused(write(tmp_path / f"{name}.pkl", content), ".")
    with pytest.raises(CheckpointError) as caught:
        convert.run(archive(tmp_path, {f"output_blocks.{UGLY}": torch.zeros(1)}), tmp_path / "out.safetensors")
    assert str(caught.value).isprintable()


def test_the_terminal_sees_no_control_characters(capsys):
    console.error("checkpoint", f"a{UGLY}")
    console.info(UGLY)
    console.warn(UGLY)
    shown = capsys.readouterr().err
    assert shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_the_command_exits_with_2(ddo, official, tmp_path):  # noqa: F811
    """That of `convert` is in test_convert."""
    write(tmp_path / "evil.pkl", Reduced(os.system, shell(official)))
    done = ddo("export", "embedded:digits32", "--out", "x.pkl", "--like", "evil.pkl", "--json", code=2)
    assert "posix.system" in json.loads(done.stdout)["error"]["message"]
    assert not any(path.name.startswith("x.") for path in tmp_path.iterdir())


def test_export_refuses_a_hostile_original(official, tmp_path):  # noqa: F811
    path = write(tmp_path / "evil.pkl", Reduced(os.system, shell(official)))
    refused(path, "posix.system", lambda path: export.run("embedded:digits32", tmp_path / "o.pkl", like=path))
    assert not (tmp_path / "o.pkl").exists()
