"""Foreign weight files, written here in the layout of the published ones; none of them is trusted."""

import builtins
import contextlib
import io
import os
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch

from ddo_cli.errors import CheckpointError
from ddo_cli.models import registry
from ddo_cli.models.adm.keys import EdmKeys
from ddo_cli.models.edm import keys as edm_keys
from ddo_cli.models.edm.files import read_edm
from ddo_cli.safe_pickle import Record, read_pickle

NETWORK = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "augment_dim": 9,
    "dropout": 0.13,
}
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
OWN = {"channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9}
OWN_NCSNPP = {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "resample_filter": [1, 3, 3, 1]}
DAMAGED = "not a whole pickle"


@pytest.fixture
def official(monkeypatch, tmp_path):
    """`official_names`, and a check that nothing has run."""
    yield official_names(monkeypatch, tmp_path / "ran")
    assert not (tmp_path / "ran").exists()


def official_names(monkeypatch, marker):
    """The names that EDM's files refer to, as far as Python's pickler wants to see them, and a trap in the source."""
    modules = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("ran")

    class EasyDict(dict):
        pass

    for module, item in (("torch_utils.persistence", _reconstruct_persistent_obj), ("dnnlib.util", EasyDict)):
        item.__module__, item.__qualname__ = module, item.__name__
        setattr(modules[module], item.__name__, item)
    return types.SimpleNamespace(
        reconstruct=_reconstruct_persistent_obj,
        easy_dict=EasyDict,
        marker=marker,
        source=f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\n",
    )


class Reduced:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.reduction = (function, arguments)

    def __reduce__(self):
        return self.reduction


def persistent(official, class_name, **state):
    meta = {"type": "class", "version": 6, "module_src": official.source, "class_name": class_name, "state": state}
    return Reduced(official.reconstruct, meta)


def module(official, class_name, tensors, inner="SongUNet", **attributes):
    """A module as EDM stores it; its tensors are named by their dotted paths below it."""
    parameters, buffers, below = {}, {"resample_filter": None}, {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = tensor
        elif name in ("resample_filter", "freqs"):
            buffers[name] = tensor
        else:
            parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
    children = {}
    for name, inside in below.items():
        if name in ("enc", "dec"):
            container = torch.nn.ModuleDict()
            blocks = {}
            for key, tensor in inside.items():
                head, _, rest = key.partition(".")
                blocks.setdefault(head, {})[rest] = tensor
            container._modules.update({key: module(official, "UNetBlock", block) for key, block in blocks.items()})
            children[name] = container
        else:
            children[name] = module(official, inner if name == "model" else "Conv2d", inside)
    return persistent(
        official,
        class_name,
        training=False,
        _parameters=parameters,
        _buffers=buffers,
        _non_persistent_buffers_set=set(),
        _modules=children,
        skip_scale=np.float64(0.5**0.5),
        map_label=None,
        _init_args=(),
        **attributes,
    )


# As the published files have them, written down here apart from the program's own.
CONSTANTS = {
    "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "sigma_min": 0.001, "sigma_max": 152},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000, "sigma_min": 0.006, "sigma_max": 20291},
}


def network(
    official, tensors, label_dim=0, class_name="EDMPrecond", inner="SongUNet", constants=None, base=NETWORK, **kwargs
):
    given = {"img_resolution": 8, "img_channels": 3, "label_dim": label_dim, "model_type": inner, **base, **kwargs}
    return module(
        official,
        class_name,
        tensors,
        inner,
        img_resolution=8,
        img_channels=3,
        label_dim=label_dim,
        **{"use_fp16": False, **CONSTANTS.get(class_name, {}), **(constants or {})},
        _init_kwargs=official.easy_dict(given),
    )


def random_model(num_classes=0, **options):
    torch.manual_seed(0)
    model = registry.build(registry.config_of("edm-unet", (3, 8, 8), num_classes, {**OWN, **options}, {}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def official_tensors(model):
    return {edm_keys.official_name(key, 8): tensor for key, tensor in model.state_dict().items()}


def write(path, content, protocol=4):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Honest files


@pytest.mark.parametrize("num_classes", [0, 2])
@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(("theirs", "ours"), [({}, {}), (NCSNPP, OWN_NCSNPP)], ids=["ddpmpp", "ncsnpp"])
def test_a_network_comes_back_bit_for_bit(official, tmp_path, num_classes, protocol, theirs, ours):
    model = random_model(num_classes, **ours)
    ema = network(official, official_tensors(model), num_classes, **theirs)
    content = {"ema": ema, "loss_fn": persistent(official, "EDMLoss", P_mean=-1.2), "augment_pipe": None}
    path = write(tmp_path / "edm.pkl", {**content, "dataset_kwargs": official.easy_dict(path="x")}, protocol)
    converted = read_edm(path)
    own = model.state_dict()
    assert list(converted.tensors) == list(own)
    assert all(torch.equal(converted.tensors[key], own[key]) for key in own)
    rebuilt = registry.build(converted.config)
    rebuilt.load_state_dict(converted.tensors)
    assert rebuilt.num_classes == num_classes
    assert converted.config["options"]["dropout"] == 0
    x, sigma, label = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 3.0]), torch.tensor([0, -1])
    assert torch.equal(rebuilt.denoise(x, sigma, label), model.denoise(x, sigma, label))


OWN_ADM = {"width": 32, "channel_mult": [1, 2], "num_blocks": 1, "attention": [4], "group_channels": 4}
ADM = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}
KINDS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}


def levels():
    """The buffer `u` of iDDPMPrecond, from its formula in float64."""
    steps = torch.arange(1001, dtype=torch.float64)
    alpha_bar = torch.sin(torch.pi / 2 * steps / 1000 / 1.008) ** 2
    u = [torch.tensor(0.0, dtype=torch.float64)]
    for j in range(1000, 0, -1):
        u.append((((u[-1] ** 2 + 1) / torch.clamp(alpha_bar[j - 1] / alpha_bar[j], min=0.001)) - 1).sqrt())
    return torch.stack(u[::-1]).float()


def pickled_network(official, kind, inner):
    """An EDM file of one of the eight combinations, as opcodes will hold it, and the model in it."""
    options = {"precond": KINDS[kind], "learned_variance": kind == "iDDPMPrecond"}
    extra = {"u": levels()} if kind == "iDDPMPrecond" else {}
    if inner == "SongUNet":
        model = random_model(2, **options)
        tensors = official_tensors(model)
        return {"ema": network(official, {**extra, **tensors}, 2, kind)}, model
    torch.manual_seed(0)
    model = registry.build(registry.config_of("adm-unet", (3, 8, 8), 2, {**OWN_ADM, **options}, {}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    names = EdmKeys(8, model.options)
    tensors = dict(names.to_edm(key, tensor) for key, tensor in model.state_dict().items())
    for place in ("enc.4x4_down", "dec.8x8_up"):
        for layer in ("conv0", "skip"):
            extra[f"model.{place}.{layer}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return {"ema": network(official, {**extra, **tensors}, 2, kind, inner, base=ADM)}, model


@pytest.mark.parametrize("inner", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_preconditioner_around_every_network(official, tmp_path, kind, inner):
    content, model = pickled_network(official, kind, inner)
    found = read_edm(write(tmp_path / "a.pkl", content))
    assert found.classes == (kind, inner)
    assert found.config["name"] == {"SongUNet": "edm-unet", "DhariwalUNet": "adm-unet"}[inner]
    assert found.config["options"]["precond"] == KINDS[kind]
    assert found.config["options"]["learned_variance"] == (kind == "iDDPMPrecond")
    own = model.state_dict()
    assert list(found.tensors) == list(own)
    assert all(torch.equal(found.tensors[key], own[key]) for key in own)


def test_levels_too_narrow_for_a_head_do_not_attend(official, tmp_path):
    """EDM's heads have 64 channels or more: 96 are one head, and 32 none, though their side is named."""
    torch.manual_seed(0)
    config = {**OWN_ADM, "channel_mult": [1, 3], "precond": "edm"}
    model = registry.build(registry.config_of("adm-unet", (3, 8, 8), 2, config, {}))
    names = EdmKeys(8, model.options)
    tensors = dict(names.to_edm(key, tensor) for key, tensor in model.state_dict().items())
    base = {**ADM, "channel_mult": [1, 3], "attn_resolutions": [8, 4]}
    ema = network(official, tensors, 2, "EDMPrecond", "DhariwalUNet", base=base)
    found = read_edm(write(tmp_path / "a.pkl", {"ema": ema}))
    assert found.config["options"]["attention"] == [4]
    own = model.state_dict()
    assert all(torch.equal(found.tensors[key], own[key]) for key in own)
    narrow = network(official, tensors, 2, "EDMPrecond", "DhariwalUNet", base={**base, "channel_mult": [1, 1]})
    with pytest.raises(CheckpointError, match="coarsest level has 32 channels, fewer than the 64 of a head"):
        read_edm(write(tmp_path / "b.pkl", {"ema": narrow}))


def test_noise_levels_that_are_not_the_cosine_schedules(official, tmp_path):
    content, _ = pickled_network(official, "iDDPMPrecond", "SongUNet")
    read_edm(write(tmp_path / "a.pkl", content))
    wrong = network(official, {"u": levels() * 1.01, **official_tensors(random_model(2, learned_variance=True))}, 2)
    with pytest.raises(CheckpointError, match="cosine"):
        read_edm(write(tmp_path / "b.pkl", {"ema": wrong}))


def test_the_source_is_text(official, tmp_path):
    found = read_pickle(write(tmp_path / "a.pkl", persistent(official, "Linear", weight=torch.arange(3.0))))
    assert isinstance(found, Record)
    assert (found.class_name, found.source) == ("Linear", official.source)
    assert found.state["weight"].tolist() == [0, 1, 2]


PLAIN = {
    "numbers": [0, -1, 255, 256, 70000, -(2**31), 2**40, -(2**70), 1.5, float("inf"), True, False, None],
    "texts": ["", "a" * 300, "ü", "\ud800"],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4, (5, [6]))],
    3: {"nested": {"empty": {}, "list": []}},
    "many": list(range(3000)),
    "table": {i: str(i) for i in range(3000)},
}
SHARED = ["memo"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_read_as_python_does(tmp_path, protocol):
    plain = {**PLAIN, "shared": [SHARED, SHARED]}
    if protocol >= 4:
        plain |= {"sets": [set(), {1, "a"}], "bytes": [b"", b"x" * 300]}
    found = read_pickle(write(tmp_path / "a.pkl", plain, protocol))
    assert found == plain
    assert found["shared"][0] is found["shared"][1]


DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_type(tmp_path, dtype):
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(getattr(torch, dtype))
    views = [tensor, tensor.T, tensor[1:, 1:], tensor[0, 0], tensor[:0]]
    found = read_pickle(write(tmp_path / "a.pkl", views))
    for value, expected in zip(found, views, strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_numpy_numbers_become_pythons(tmp_path):
    numbers = [np.float64(0.7), np.float32(0.5), np.int64(-3), np.uint8(200), np.bool_(True)]
    assert read_pickle(write(tmp_path / "a.pkl", numbers)) == [0.7, 0.5, -3, 200, True]


# ---------------------------------------------------------------------------------------------------------------------
# Files that do not fit


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop("model.map_layer0.bias"), "missing model.map_layer0.bias"),
        (lambda tensors: tensors.update({"model.map_layer1.bias": torch.zeros(3)}), r"of shape \(3,\) instead of"),
        (lambda tensors: tensors.update({"model.out_conv.bias": torch.zeros(3)}), "does not fit its description"),
        (lambda tensors: tensors.update({"model.dec.4x4_aux_norm.bias": torch.zeros(8)}), "unexpected model.dec.4x4"),
        (lambda tensors: tensors.update({"model.map_layer1.bias": torch.zeros(32).int()}), "floating-point"),
    ],
)
def test_tensors_that_do_not_fit_are_named(official, tmp_path, change, problem):
    tensors = official_tensors(random_model())
    change(tensors)
    with pytest.raises(CheckpointError, match=problem):
        read_edm(write(tmp_path / "a.pkl", {"ema": network(official, tensors)}))


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"class_name": "EDMPrecond", "inner": "VisionTransformer"}, "EDMPrecond around a VisionTransformer"),
        ({"constants": {"sigma_data": "0.5"}}, "sigma_data is not a number"),
        ({"class_name": "VPPrecond", "constants": {"beta_d": 19.8}}, r"beta_d = 19.8 of its VPPrecond.* has 19.9"),
        ({"class_name": "VPPrecond", "constants": {"beta_min": 0.2}}, "beta_min = 0.2"),
        ({"class_name": "VPPrecond", "constants": {"M": 999}}, "M = 999"),
        ({"class_name": "VPPrecond", "constants": {"epsilon_t": 1e-3}}, "epsilon_t = 0.001"),
        ({"class_name": "VEPrecond", "constants": {"sigma_max": 50}}, "sigma_max = 50"),
        ({"class_name": "iDDPMPrecond", "constants": {"C_2": 0.01}}, "C_2 = 0.01"),
        ({"class_name": "iDDPMPrecond"}, r"instead of \(6,"),
        ({"inner": "DhariwalUNet", "base": {"channel_mult_emb": 2}}, "channel_mult_emb = 2 of its DhariwalUNet"),
        ({"colour": 1}, "not known: colour"),
        ({"decoder_type": "skip"}, "decoder"),
        ({"embedding_type": "learned"}, "embedding"),
        ({"num_blocks": 10**9}, "too few"),
        ({"model_channels": 2**62}, "does not fit"),
        ({"channel_mult": [2, 2]}, "instead of"),
    ],
)
def test_networks_that_are_not_known_are_named(official, tmp_path, kwargs, problem):
    ema = network(official, official_tensors(random_model()), **kwargs)
    with pytest.raises(CheckpointError, match=problem):
        read_edm(write(tmp_path / "a.pkl", {"ema": ema}))


@pytest.mark.parametrize("content", [[], {}, {"ema": None}, {"net": {}}, None, 3])
def test_without_an_averaged_network(tmp_path, content):
    with pytest.raises(CheckpointError, match="'ema'"):
        read_edm(write(tmp_path / "a.pkl", content))


def test_a_module_inside_itself_is_refused(official, tmp_path):
    state = {"_parameters": {}, "_buffers": {}, "_modules": {}, "_init_args": (), "_init_kwargs": {}}
    inner = torch.nn.ModuleDict()
    inner._modules["model"] = inner
    unet = persistent(official, "SongUNet", **{**state, "_modules": {"enc": inner}})
    given = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "sigma_data": 0.5}
    ema = persistent(official, "EDMPrecond", **{**state, **given, "_modules": {"model": unet}})
    with pytest.raises(CheckpointError, match="not a module of its own"):
        read_edm(write(tmp_path / "a.pkl", {"ema": ema}))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile and damaged files


def text(value):
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module, name):
    return text(module) + text(name) + b"\x93"


def touch(official):
    return f"touch {official.marker}"


HOSTILE = {
    "system": (lambda o: Reduced(os.system, touch(o)), "system"),
    "eval": (lambda o: Reduced(builtins.eval, o.source), "builtins.eval"),
    "exec": (lambda o: Reduced(builtins.exec, o.source), "builtins.exec"),
    "getattr": (lambda o: Reduced(getattr, o.easy_dict(), "update"), "builtins.getattr"),
    "import": (lambda o: Reduced(__import__, "os"), "builtins.__import__"),
    "torch.load": (lambda o: Reduced(torch.load, "x"), "torch.serialization.load"),
    "in a dict": (lambda o: {"ema": [o.easy_dict(x=Reduced(os.system, touch(o)))]}, "system"),
    "in an argument": (lambda o: persistent(o, "Linear", x=Reduced(os.system, touch(o))), "system"),
    "as an argument": (lambda o: persistent(o, "Linear", x=os.system), "system"),
    "in a storage": (
        lambda o: Reduced(torch.storage._load_from_bytes, pickle.dumps(Reduced(os.system, touch(o)))),
        "system",
    ),
    "in a storage's type": (
        lambda o: Reduced(torch.storage._load_from_bytes, blob(os.system)),
        "system",
    ),
    "text operations": (lambda o: b"cos\nsystem\n(S'" + touch(o).encode() + b"'\ntR.", "os.system"),
    "from the memo": (
        lambda o: b"\x80\x04" + text("os") + b"\x940" + b"\x80\x04h\x00" + text("system") + b"\x93.",
        "POP",
    ),
    "memo names": (
        lambda o: b"\x80\x04" + text("system") + b"\x94" + text("os") + b"\x94h\x01h\x00\x93" + text("x") + b"\x85R.",
        "os.system",
    ),
    "attribute of a known name": (
        lambda o: b"\x80\x04" + named("collections", "OrderedDict.__init__.__globals__") + b".",
        "__globals__",
    ),
    "extension": (lambda o: b"\x80\x02\x82\x01.", "EXT1"),
    "instance": (lambda o: b"(ios\nsystem\n.", "INST"),
    "object": (lambda o: b"(" + named("os", "system") + b"o.", "os.system"),
    "keyword call": (lambda o: b"\x80\x04" + named("collections", "OrderedDict") + b")}\x92.", "NEWOBJ_EX"),
    "persistent id": (lambda o: b"\x80\x02K\x01Q.", "BINPERSID"),
    "buffers": (lambda o: b"\x80\x05\x97.", "NEXT_BUFFER"),
    # the names we know, used for what they are not
    "call of a text": (lambda o: b"\x80\x04" + text("x") + b")R.", DAMAGED),
    "state of a name": (lambda o: b"\x80\x04" + named("collections", "OrderedDict") + b"}b.", DAMAGED),
    "state of a dict": (lambda o: b"\x80\x04" + named("collections", "OrderedDict") + b")R}b.", DAMAGED),
    "state twice": (
        lambda o: b"\x80\x04" + named("torch.nn.modules.container", "ModuleDict") + b")\x81}b}b.",
        DAMAGED,
    ),
    "call of a call": (lambda o: b"\x80\x04" + named("collections", "OrderedDict") + b")R)R.", DAMAGED),
    "call of a storage's type": (lambda o: b"\x80\x04" + named("torch", "FloatStorage") + b")R.", "FloatStorage"),
    "text as a list": (lambda o: b"\x80\x04" + text("x") + text("y") + b"a.", DAMAGED),
    "deep key": (lambda o: b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.", DAMAGED),
    "empty stack": (lambda o: b"\x80\x04.", DAMAGED),
    "no mark": (lambda o: b"\x80\x04]e.", DAMAGED),
    "absent memo": (lambda o: b"\x80\x04h\x07.", DAMAGED),
    "long claim": (lambda o: b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.", DAMAGED),
    "frame claim": (lambda o: b"\x80\x04\x95" + (2**63 - 1).to_bytes(8, "little"), DAMAGED),
    "empty": (lambda o: b"", DAMAGED),
    "text": (lambda o: b"version https://git-lfs.github.com/spec/v1\n", "refused|" + DAMAGED),
    "zip": (lambda o: zipped(), "refused|" + DAMAGED),
    "no source": (lambda o: Reduced(o.reconstruct, {"type": "class", "class_name": "X", "state": {}}), DAMAGED),
    "no class": (lambda o: Reduced(o.reconstruct, {"type": "function"}), DAMAGED),
    "number of the wrong length": (lambda o: Reduced(np.float64(1).__reduce__()[0], np.dtype("f8"), b"123"), DAMAGED),
    "objects of numpy": (lambda o: np.dtype("O"), DAMAGED),
}


def zipped():
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, stream)
    return stream.getvalue()


def blob(storage_type, count=2, raw=b"\0" * 8, magic=0x1950A86A20F9469CFC6C):
    """A storage in torch's old format."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", storage_type, "0", "cpu", count, None) if obj is Pickler else None

    stream = io.BytesIO()
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    for content in (magic, 1001, info, Pickler, ["0"]):
        Pickler(stream, protocol=2).dump(content)
    return stream.getvalue() + count.to_bytes(8, "little", signed=True) + raw


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(official, tmp_path, name):
    make, problem = HOSTILE[name]
    path = write(tmp_path / "hostile.pkl", make(official))
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_pickle(path)
    assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError):
        read_edm(path)


def test_the_trap_works(official):
    """The hostile files above would have run."""
    pickle.loads(pickle.dumps(HOSTILE["system"][0](official)))
    assert official.marker.exists()
    official.marker.unlink()


def test_a_far_memo_costs_nothing(tmp_path):
    assert read_pickle(write(tmp_path / "a.pkl", b"\x80\x04Nr\xff\xff\xff\xff.")) is None


def tensor_call(raw, offset, size, stride):
    storage = Reduced(torch.storage._load_from_bytes, raw)
    return Reduced(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, None)


@pytest.mark.parametrize(
    ("raw", "offset", "size", "stride"),
    [
        ({}, 0, (3,), (1,)),
        ({}, 1, (2,), (1,)),
        ({}, -1, (1,), (1,)),
        ({}, 0, (2,), (-1,)),
        ({}, 0, (1000, 1000), (0, 0)),
        ({}, 0, (2,), (1, 1)),
        ({}, 0.0, (2,), (1,)),
        ({}, 0, (2**62, 2**62), (1, 1)),
        ({"raw": b"\0" * 7}, 0, (2,), (1,)),
        ({"count": 10**15}, 0, (2,), (1,)),
        ({"count": -2}, 0, (2,), (1,)),
        ({"magic": 3}, 0, (2,), (1,)),
    ],
)
def test_lying_tensors_are_refused(tmp_path, raw, offset, size, stride):
    content = tensor_call(blob(torch.FloatStorage, **raw), offset, size, stride)
    with pytest.raises(CheckpointError, match=DAMAGED):
        read_pickle(write(tmp_path / "a.pkl", content))
    honest = tensor_call(blob(torch.FloatStorage), 0, (2,), (1,))
    assert read_pickle(write(tmp_path / "b.pkl", honest)).tolist() == [0, 0]


def test_a_storage_repeated_beyond_the_files_size_is_refused(tmp_path):
    raw = blob(torch.FloatStorage, 1000, b"\0" * 4000)
    content = [tensor_call(raw, 0, (1000,), (1,)) for _ in range(100)]  # the bytes are stored once
    assert len(pickle.dumps(content)) < 20_000
    with pytest.raises(CheckpointError, match="more bytes than the file"):
        read_pickle(write(tmp_path / "a.pkl", content))


def test_every_truncation_and_any_changed_byte_is_answered(official, tmp_path):
    """A damaged file is refused or read as other data; nothing else is raised, and nothing runs."""
    content = {"ema": module(official, "Linear", {"weight": torch.arange(6.0)}), "x": SHARED}
    whole = pickle.dumps(content, protocol=4)
    for end in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_pickle(write(tmp_path / "cut.pkl", whole[:end]))
    rng = random.Random(0)
    for _ in range(2000):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        with contextlib.suppress(CheckpointError):
            read_pickle(write(tmp_path / "changed.pkl", bytes(changed)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_edm(tmp_path / "absent.pkl")
