"""Tensors of ADM's U-Net under the names, and in the orders of channels, of the published files."""

import pytest
import torch
from test_adm_unet import TINY, perturbed

from ddo_cli.diffusion.denoiser import DiffusionDrawOptions
from ddo_cli.models.adm.keys import EdmKeys, from_openai, reordered, to_openai
from ddo_cli.models.adm.published import PUBLISHED
from ddo_cli.models.adm.unet import AdmUnetOptions, build

# file -> keys of the official preconditioner's state dict, its buffers, parameters
EDM_TABLE = {
    "edm-imagenet-64x64-cond-adm.pkl": (553, 12, 295_899_267),
    "baseline-imagenet-64x64-cond-adm.pkl": (554, 13, 295_904_454),
}


@pytest.mark.parametrize("name", EDM_TABLE)
def test_edm_s_networks_have_the_published_names(name):
    keys, buffers, parameters = EDM_TABLE[name]
    entry = PUBLISHED[name]
    options = AdmUnetOptions.model_validate(entry.options)
    with torch.device("meta"):
        net = build((3, entry.size, entry.size), entry.num_classes, options, DiffusionDrawOptions()).net
    assert sum(tensor.numel() for tensor in net.parameters()) == parameters
    names = EdmKeys(entry.size, options)
    state = {f"net.{key}": tensor for key, tensor in net.state_dict().items()}
    official = {theirs: tuple(t.shape) for theirs, t in (names.to_edm(key, tensor) for key, tensor in state.items())}
    assert len(official) == len(state) == keys - buffers
    back = [names.from_edm(theirs, torch.empty(shape, device="meta")) for theirs, shape in official.items()]
    assert [(ours, tensor.shape) for ours, tensor in back] == [(key, tensor.shape) for key, tensor in state.items()]
    outputs = 6 if options.learned_variance else 3
    expected = {
        "model.map_layer0.weight": (768, 192),
        "model.map_layer1.bias": (768,),
        "model.map_label.weight": (768, 1000),
        "model.enc.64x64_conv.weight": (192, 3, 3, 3),
        "model.enc.64x64_block2.conv1.weight": (192, 192, 3, 3),
        "model.enc.32x32_down.conv0.weight": (192, 192, 3, 3),
        "model.enc.32x32_block0.skip.weight": (384, 192, 1, 1),
        "model.enc.16x16_block0.norm1.bias": (576,),
        "model.enc.8x8_block2.qkv.weight": (2304, 768, 1, 1),
        "model.dec.8x8_in0.proj.bias": (768,),
        "model.dec.8x8_in1.affine.weight": (1536, 768),
        "model.dec.8x8_block3.conv0.weight": (768, 1344, 3, 3),
        "model.dec.16x16_up.conv0.weight": (768, 768, 3, 3),
        "model.dec.16x16_block3.norm0.weight": (960,),
        "model.dec.32x32_up.conv0.weight": (576, 576, 3, 3),
        "model.dec.32x32_block2.norm2.weight": (384,),
        "model.dec.64x64_up.conv0.weight": (384, 384, 3, 3),
        "model.dec.64x64_block3.skip.weight": (192, 384, 1, 1),
        "model.out_norm.weight": (192,),
        "model.out_conv.weight": (outputs, 192, 3, 3),
    }
    assert {name: official.get(name) for name in expected} == expected
    for absent in (
        "map_label.bias",
        "enc.32x32_down.skip.weight",
        "dec.8x8_in1.qkv.weight",
        "dec.64x64_block0.qkv.bias",
    ):
        assert f"model.{absent}" not in official


def place(order: str, head: int, k: int, c: int, channels: int, d: int) -> int:
    """The channel of query, key or value k, number c of a head."""
    if order == "new":
        return channels * k + d * head + c
    return 3 * d * head + (d * k + c if order == "legacy" else 3 * c + k)


def test_orders_of_channels():
    channels, d = 6, 2  # three heads
    source = {order: torch.empty(18, 1, dtype=torch.int64) for order in ("legacy", "new", "interleaved")}
    for order, tensor in source.items():
        for head in range(3):
            for k in range(3):
                for c in range(d):
                    tensor[place(order, head, k, c, channels, d)] = 100 * head + 10 * k + c
    for one in source:
        for other in source:
            found = reordered(source[one], one, other, d)
            assert torch.equal(found, source[other])
            assert found.is_contiguous()
            assert torch.equal(reordered(source[one][:, 0], one, other, d), source[other][:, 0])  # a bias
    assert not torch.equal(source["legacy"], source["new"])
    assert not torch.equal(source["legacy"], source["interleaved"])


@pytest.mark.parametrize("options", [{}, {"num_heads": 4}, {"attention": (16,), "num_heads": 2}, {"num_blocks": 2}])
def test_keys_go_there_and_back_bit_for_bit(options):
    model = perturbed(augment_dim=9, **options)
    keys, state = EdmKeys(16, model.options), model.state_dict()
    for name, tensor in state.items():
        theirs, moved = keys.to_edm(name, tensor)
        assert theirs.startswith("model.")
        ours, back = keys.from_edm(theirs, moved)
        assert ours == name
        assert torch.equal(back, tensor)
        assert back.is_contiguous()
        assert moved.is_contiguous()
        qkv = ".qkv." in name
        assert torch.equal(moved.flatten(), tensor.flatten()) != (qkv or "label_emb" in name)
        theirs, moved = to_openai(name, tensor, "new", model.options)
        ours, back = from_openai(theirs, moved, "new", model.options)
        assert (ours, f"net.{theirs}") == (name, name)
        assert torch.equal(back, tensor)
        assert torch.equal(moved, tensor) != qkv
        assert torch.equal(to_openai(name, tensor, "legacy", model.options)[1], tensor)


def test_edm_s_constants_are_dropped_and_other_names_refused():
    keys = EdmKeys(16, AdmUnetOptions(**TINY))
    mean = torch.full((1, 1, 2, 2), 0.25)
    assert keys.from_edm("model.enc.8x8_down.conv0.resample_filter", mean) is None
    assert keys.from_edm("u", torch.zeros(1001)) is None
    with pytest.raises(ValueError, match="2x2 mean"):
        keys.from_edm("model.enc.8x8_down.conv0.resample_filter", torch.full((1, 1, 4, 4), 1 / 16))
    for name in ("model.enc.32x32_conv.weight", "enc.16x16_conv.weight", "model.map_noise.freqs", "model.map_layer0"):
        with pytest.raises(KeyError):
            keys.from_edm(name, torch.zeros(1))
    with pytest.raises(KeyError):
        keys.to_edm("head.weight", torch.zeros(1))
    with pytest.raises(KeyError):
        to_openai("head.weight", torch.zeros(1), "new", AdmUnetOptions(**TINY))
