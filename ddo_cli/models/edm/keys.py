"""Names of tensors: `edm_unet` in a DiffusionModel <-> the published EDM weights (U-Net inside its preconditioner)."""

import re

_FREQUENCIES = {"noise_features.frequencies": "map_noise.freqs"}  # below "net." here, below "model." there
_ROOT = {
    "label_emb": "map_label",
    "augment_emb": "map_augment",
    "emb0": "map_layer0",
    "emb1": "map_layer1",
}
_HEAD = {"head_norm": "aux_norm", "head": "aux_conv"}
_PART = {"stem": "conv", "aux": "aux_residual"}
_LAYER = {"attention.norm": "norm2", "attention.qkv": "qkv", "attention.proj": "proj"}
_TENSOR = r"(?P<tensor>weight|bias|resample_filter)"
_OWN = re.compile(rf"net\.(?P<half>encoder|decoder)\.(?P<side>\d+)\.(?P<part>\w+)(?:\.(?P<layer>.+))?\.{_TENSOR}")
_THEIRS = re.compile(rf"model\.(?P<half>enc|dec)\.(?P<side>\d+)x(?P=side)_(?P<part>\w+)(?:\.(?P<layer>.+))?\.{_TENSOR}")


def official_name(key: str, size: int) -> str:
    """The published name of a tensor of ours. size: side of the images in pixels. Raises KeyError for another name."""
    if match := _OWN.fullmatch(key):
        layer = f".{_LAYER.get(match['layer'], match['layer'])}" if match["layer"] else ""
        part = _PART.get(match["part"], match["part"])
        return f"model.{match['half'][:3]}.{match['side']}x{match['side']}_{part}{layer}.{match['tensor']}"
    name, _, tensor = key.removeprefix("net.").rpartition(".")
    if name in _HEAD:
        return f"model.dec.{size}x{size}_{_HEAD[name]}.{tensor}"
    return f"model.{_renamed(key.removeprefix('net.'), _FREQUENCIES, _ROOT)}"


def own_name(key: str) -> str:
    """Our name of a published tensor; the inverse of `official_name`. Raises KeyError for another name."""
    if match := _THEIRS.fullmatch(key):
        for ours, theirs in _HEAD.items():
            if match["part"] == theirs:
                return f"net.{ours}.{match['tensor']}"
        layer = f".{_inverse(_LAYER).get(match['layer'], match['layer'])}" if match["layer"] else ""
        part = _inverse(_PART).get(match["part"], match["part"])
        half = {"enc": "encoder", "dec": "decoder"}[match["half"]]
        return f"net.{half}.{match['side']}.{part}{layer}.{match['tensor']}"
    return f"net.{_renamed(key.removeprefix('model.'), _inverse(_FREQUENCIES), _inverse(_ROOT))}"


def _renamed(key: str, whole: dict[str, str], layers: dict[str, str]) -> str:
    """`key`, a whole name or a tensor of a layer, by the names it has on the other side."""
    if key in whole:
        return whole[key]
    layer, _, tensor = key.rpartition(".")
    return f"{layers[layer]}.{tensor}"


def _inverse(names: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}
