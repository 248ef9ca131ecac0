"""Small VARs and VQVAEs, and official tensors filled by a rule."""

import math

import numpy as np
import torch
from test_edm_unet import uniform

from ddo_cli.models import registry
from ddo_cli.models.var import files as var_files
from ddo_cli.models.var import vqvae

SMALL_VAE = {"channels": 32, "vocabulary": 64, "patch_nums": [1, 2, 3, 4]}  # images of 64 x 64
TINY_VAE = {  # images of 4 x 4, five tokens
    "channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "groups": 4, "z_channels": 4, "vocabulary": 3,
    "patch_nums": [1, 2],
}  # fmt: skip
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def build(vae=TINY_VAE, shape=(3, 4, 4), num_classes=3, draw=None, seed=0, std=0.4, **options):
    """A model with random weights throughout: built ones start at the uniform distribution."""
    options = {"depth": 2, "width": 16, "heads": 2, "vqvae": vae, **options}
    model = registry.build(registry.config_of("var", shape, num_classes, options, draw or {}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 1.0 if name.startswith("vqvae.quantize.embedding") else std
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def official_names(module, of_vae=False):
    """Our tensors by their official names, made by writing each rule backwards."""
    found = {}
    for key, tensor in module.state_dict().items():
        if not of_vae and key.startswith("vqvae."):
            continue
        name = official_vae(key) if of_vae else official_var(key)
        assert var_files.own_name(name, of_vae) == key
        found[name] = tensor
    return found


def official_var(key):
    name = {
        "start": "pos_start", "position": "pos_1LC", "class_embedding.weight": "class_emb.weight",
        "level_embedding.weight": "lvl_embed.weight",
    }.get(key, key)  # fmt: skip
    for ours, theirs in (
        ("word.", "word_embed."), ("shared_adaln.", "shared_ada_lin.1."), ("head.adaln.", "head_nm.ada_lin.1."),
        ("head.linear.", "head."), (".adaln.", ".ada_lin.1."), (".log_scale", ".scale_mul_1H11"),
        (".qkv.", ".mat_qkv."), (".attn.out.", ".attn.proj."), (".fc1.", ".ffn.fc1."), (".fc2.", ".ffn.fc2."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name[: -len("adaln")] + "ada_gss" if name.endswith(".adaln") else name


def official_vae(key):
    for ours, theirs in (
        ("middle.0.", "mid.block_1."), ("middle.1.", "mid.attn_1."), ("middle.2.", "mid.block_2."),
        (".out.", ".proj_out."), (".shortcut.", ".nin_shortcut."), ("quantize.phi.", "quantize.quant_resi.qresi_ls."),
    ):  # fmt: skip
        key = key.replace(ours, theirs)
    return key.replace(".resample.", ".downsample.conv." if key.startswith("encoder") else ".upsample.conv.")


def fill(tensors):
    """Sets official tensors by their sorted number, as the published values of the tests were made with."""
    for i, name in enumerate(sorted(tensors)):
        tensor = tensors[name]
        u = uniform(i, np.arange(tensor.numel(), dtype=np.uint32))
        if tensor.ndim >= 2:
            values = (2 * u - 1) * math.sqrt(3 / (tensor.numel() / tensor.shape[0]))
        else:
            values = 0.4 * (u - 0.5) + (1 if name.endswith(".weight") else 0)
        tensor.copy_(torch.from_numpy(values).view(tensor.shape))


def filled(shared_adaln=False):
    """Depth 2, width 128, 10 classes, images of 64 x 64."""
    model = build(SMALL_VAE, (3, 64, 64), 10, width=None, heads=None, shared_adaln=shared_adaln)
    tensors = official_names(model), official_names(model.vqvae, of_vae=True)
    assert [len(side) for side in tensors] == [34, 323]
    for side in tensors:
        fill(side)
    return model


def official_files(model, scales=None):
    """State dicts as the official program saves them: transformer and tokenizer, with their buffers."""
    sides = model.sides
    level = model.level[None]
    mask = torch.where(level[0][:, None] >= level, 0.0, -torch.inf)[None, None]
    var = {"lvl_1L": level.clone(), "attn_bias_for_masking": mask, **official_names(model)}
    var |= {f"blocks.{i}.attn.zero_k_bias": torch.zeros(model.width) for i in range(len(model.blocks))}
    hits = torch.zeros(scales or len(sides), model.options.vqvae.vocabulary)
    vae = {"quantize.ema_vocab_hit_SV": hits, **official_names(model.vqvae, of_vae=True)}
    return {key: tensor.clone() for key, tensor in var.items()}, vae


def truth(vocabulary=64, sides=(1, 2, 3, 4)):
    """Tokens (2, L) by the same rule."""
    maps = []
    for s, side in enumerate(sides):
        u = uniform(2000 + s, np.arange(2 * side**2, dtype=np.uint32))
        maps.append(torch.from_numpy(np.floor(vocabulary * u)).to(torch.int64).view(2, -1))
    return torch.cat(maps, 1)


def tiny_tokenizer(path, options, shape=(3, 32, 32), seed=0):
    """A random tokenizer's file."""
    from ddo_cli import checkpoint

    torch.manual_seed(seed)
    vae = vqvae.Vqvae(shape, vqvae.VqvaeOptions.model_validate(options))
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    checkpoint.save(path, vae.state_dict(), {"kind": "tokenizer", "config": vqvae.config_of(shape, vae.options)})
    return str(path)
