"""VAR's published .pth files: bare state dicts of transformer and VQVAE, whose configuration is read off the shapes."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli.errors import CheckpointError, RecipeError, UsageError, printable
from ddo_cli.models import pt_files, registry
from ddo_cli.models.var import vqvae
from ddo_cli.models.var.transformer import VarOptions

EXPECTED = "VAR's files are var_d16.pth and the like, with vae_ch160v4096z32.pth as the tokenizer"
MARK, MARK_OF_VAE = "pos_1LC", "quantize.ema_vocab_hit_SV"  # tensors by which the two are known
SAMPLING = {"batch": 25}  # of the published scripts; without guidance and truncation, as DDO samples
LABEL_DROPOUT = 0.1
LISTS = (  # published sides of the token maps
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
)

# Official name -> ours: patterns of whole names, tried in order.
_VAR_NAMES = [
    (r"pos_start", "start"),
    (r"pos_1LC", "position"),
    (r"word_embed\.(weight|bias)", r"word.\1"),
    (r"class_emb\.weight", "class_embedding.weight"),
    (r"lvl_embed\.weight", "level_embedding.weight"),
    (r"shared_ada_lin\.1\.(weight|bias)", r"shared_adaln.\1"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"head.adaln.\1"),
    (r"head\.(weight|bias)", r"head.linear.\1"),
    (r"blocks\.(\d+)\.ada_lin\.1\.(weight|bias)", r"blocks.\1.adaln.\2"),
    (r"blocks\.(\d+)\.ada_gss", r"blocks.\1.adaln"),
    (r"blocks\.(\d+)\.attn\.scale_mul_1H11", r"blocks.\1.attn.log_scale"),
    (r"blocks\.(\d+)\.attn\.(q_bias|v_bias)", r"blocks.\1.attn.\2"),
    (r"blocks\.(\d+)\.attn\.mat_qkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.ffn\.(fc[12])\.(weight|bias)", r"blocks.\1.\2.\3"),
]
_END = r"\.(weight|bias)"
_VAE_NAMES = [
    (r"(encoder|decoder)\.(conv_in|norm_out|conv_out)" + _END, r"\1.\2.\3"),
    (r"(encoder|decoder)\.mid\.block_1\.(norm\d|conv\d)" + _END, r"\1.middle.0.\2.\3"),
    (r"(encoder|decoder)\.mid\.attn_1\.(norm|qkv)" + _END, r"\1.middle.1.\2.\3"),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out" + _END, r"\1.middle.1.out.\2"),
    (r"(encoder|decoder)\.mid\.block_2\.(norm\d|conv\d)" + _END, r"\1.middle.2.\2.\3"),
    (r"(encoder\.down|decoder\.up)\.(\d+)\.block\.(\d+)\.(norm\d|conv\d)" + _END, r"\1.\2.block.\3.\4.\5"),
    (r"(encoder\.down|decoder\.up)\.(\d+)\.block\.(\d+)\.nin_shortcut" + _END, r"\1.\2.block.\3.shortcut.\4"),
    (r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.(\d+)\.(norm|qkv)" + _END, r"\1.\2.attn.\3.\4.\5"),
    (r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.(\d+)\.proj_out" + _END, r"\1.\2.attn.\3.out.\4"),
    (r"(encoder\.down\.\d+)\.downsample\.conv" + _END, r"\1.resample.\2"),
    (r"(decoder\.up\.\d+)\.upsample\.conv" + _END, r"\1.resample.\2"),
    (r"quantize\.quant_resi\.qresi_ls\.(\d+)" + _END, r"quantize.phi.\1.\2"),
    (r"quantize\.embedding\.weight", "quantize.embedding.weight"),
    (r"(quant_conv|post_quant_conv)" + _END, r"\1.\2"),
]
# Constants that we compute, and a statistic of training.
_BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
_DAMAGE = (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, RecipeError)


class VarFile(NamedTuple):
    """The configuration that `registry.build` takes, and the tensors of that model, the VQVAE's among them."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def is_var(tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors are those of a transformer."""
    return MARK in tensors


def is_vae(tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors are those of a tokenizer."""
    return MARK_OF_VAE in tensors


def own_name(name: str, of_vae: bool = False) -> str | None:
    """Our name of an official tensor; None for a buffer. Raises KeyError for another."""
    if name.split(".")[-1] in _BUFFERS:
        return None
    for pattern, ours in _VAE_NAMES if of_vae else _VAR_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise KeyError(f"unexpected {name}")


def var(
    stored: dict[str, Tensor], path: str | Path, vae: Path | None, patch_nums: tuple[int, ...] | None = None
) -> VarFile:
    """The model of a transformer's tensors, which must be of honest size (`pt_files.check_size`), and a tokenizer's.

    vae: the tokenizer's file; None: a training checkpoint's own. patch_nums: sides of the token maps, where they are
    not a published list. Raises CheckpointError for other tensors, UsageError where something must be told.
    """
    tokenizer = pt_files.read(vae or path, EXPECTED, (MARK_OF_VAE, MARK)).tensors
    if not is_vae(tokenizer) and vae is None:
        raise UsageError(
            f"{path} holds VAR's transformer without its tokenizer; give the tokenizer's file with --vae, "
            "e.g. --vae vae_ch160v4096z32.pth"
        )
    if not is_vae(tokenizer):
        raise CheckpointError(f"--vae {vae} holds no VQVAE of VAR; {EXPECTED}")
    vae = vae or Path(path)
    pt_files.check_size(tokenizer.values(), vae)
    with _blamed(path):
        sides = _sides(stored, path, patch_nums)
    with _blamed(vae):
        vae_options = _vae_options(tokenizer, sides)
    with _blamed(path):
        _check_codes(stored, vae_options, path, vae)
        options, num_classes = _var_options(stored, vae_options)
        side = vae_options.image_side
        shape = (tokenizer["encoder.conv_in.weight"].shape[1], side, side)
        config = registry.config_of(
            "var", shape, num_classes, options.model_dump(mode="json"), {"label_dropout": LABEL_DROPOUT}
        )
        with torch.device("meta"):
            expected = registry.build(config)
        _check_buffers(stored, sides)
        tensors = _renamed(stored) | {f"vqvae.{key}": tensor for key, tensor in _renamed(tokenizer, True).items()}
    tensors = _checked(expected, tensors, path)
    size = f"var_d{options.depth}" if len(sides) == len(LISTS[0]) and options.width is None else "no published one"
    notes = {"published_as": size, "patch_nums": ",".join(map(str, sides)), "tokenizer": vae.name}
    return VarFile(config, tensors, notes)


def vae_file(stored: dict[str, Tensor], path: str | Path, patch_nums: tuple[int, ...] | None = None) -> VarFile:
    """A tokenizer by itself, to train a VAR on. patch_nums: of the published 256x256 one unless told."""
    with _blamed(path):
        scales = len(stored["quantize.ema_vocab_hit_SV"])  # with which it was trained; other lists may be as long
        if patch_nums is None and scales != len(LISTS[0]):
            raise UsageError(f"{path} was trained on {scales} scales; tell their sides, e.g. patch_nums=1,2,3,4")
        options = _vae_options(stored, patch_nums or LISTS[0])
        shape = (stored["encoder.conv_in.weight"].shape[1], options.image_side, options.image_side)
        with torch.device("meta"):
            expected = vqvae.Vqvae(shape, options)
        tensors = _renamed(stored, of_vae=True)
    notes = {"patch_nums": ",".join(map(str, options.patch_nums))}
    return VarFile(vqvae.config_of(shape, options), _checked(expected, tensors, path), notes)


# --- Configuration from shapes


def _sides(stored: dict[str, Tensor], path: str | Path, told: tuple[int, ...] | None) -> tuple[int, ...]:
    length, scales = stored["pos_1LC"].shape[1], stored["lvl_embed.weight"].shape[0]
    known = [sides for sides in LISTS if sum(side**2 for side in sides) == length and len(sides) == scales]
    if told is None and not known:
        raise UsageError(
            f"{path} has {length} tokens in {scales} scales, which no published VAR has; tell their sides, e.g. "
            "patch_nums=1,2,3,4"
        )
    sides = told or known[0]
    if sum(side**2 for side in sides) != length or len(sides) != scales:
        raise UsageError(
            f"patch_nums={','.join(map(str, sides))} makes {sum(side**2 for side in sides)} tokens in {len(sides)} "
            f"scales, and {path} has {length} in {scales}"
        )
    return sides


def _vae_options(stored: dict[str, Tensor], sides: Sequence[int]) -> vqvae.VqvaeOptions:
    levels = _count(stored, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    widths = [stored[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    channels = stored["encoder.conv_in.weight"].shape[0]
    if any(width % channels for width in widths):
        raise ValueError(f"widths {widths} are no multiples of {channels}")
    vocabulary, z_channels = stored["quantize.embedding.weight"].shape
    return vqvae.VqvaeOptions(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_blocks=_count(stored, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
        z_channels=z_channels,
        vocabulary=vocabulary,
        patch_nums=tuple(sides),
    )


def _var_options(stored: dict[str, Tensor], tokenizer: vqvae.VqvaeOptions) -> tuple[VarOptions, int]:
    depth = _count(stored, r"blocks\.(\d+)\.attn\.mat_qkv\.weight")
    rows, width = stored["class_emb.weight"].shape
    scale = stored.get("blocks.0.attn.scale_mul_1H11")
    heads = None if scale is None else scale.shape[1]
    is_published = width == 64 * depth and heads in (None, depth)
    options = VarOptions(
        depth=depth,
        width=None if is_published else width,
        heads=None if is_published else heads,
        shared_adaln="shared_ada_lin.1.weight" in stored,
        l2_norm=scale is not None,
        vqvae=tokenizer,
    )
    return options, rows - 1


def _check_codes(stored: dict[str, Tensor], tokenizer: vqvae.VqvaeOptions, path: str | Path, vae: Path) -> None:
    """Raises UsageError if the transformer was trained on other codes than the tokenizer's."""
    theirs = (stored["head.weight"].shape[0], stored["word_embed.weight"].shape[1])
    if theirs != (tokenizer.vocabulary, tokenizer.z_channels):
        raise UsageError(
            f"--vae {vae} has {tokenizer.vocabulary} codes of {tokenizer.z_channels} numbers, and {path} was trained "
            f"on {theirs[0]} of {theirs[1]}; give the tokenizer that it was trained with"
        )


def _count(stored: dict[str, Tensor], pattern: str) -> int:
    """The number of blocks whose names match. Raises ValueError unless they are numbered 0, 1, ..."""
    numbers = sorted({int(match[1]) for key in stored if (match := re.fullmatch(pattern, key))})
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"the blocks named {pattern.replace(chr(92), '')} are not numbered from 0 on")
    return len(numbers)


# --- Tensors


def _check_buffers(stored: dict[str, Tensor], sides: Sequence[int]) -> None:
    """Raises ValueError if constants of the file are not the ones that we compute."""
    level = torch.cat([torch.full((side**2,), s) for s, side in enumerate(sides)])
    if not torch.equal(stored["lvl_1L"].flatten(), level):
        raise ValueError("lvl_1L is not that of its scales")
    sees = stored["attn_bias_for_masking"].squeeze(0).squeeze(0) == 0
    if not torch.equal(sees, level[:, None] >= level):
        raise ValueError("attn_bias_for_masking is not causal over the scales")
    if any(tensor.any() for key, tensor in stored.items() if key.endswith("zero_k_bias")):
        raise ValueError("zero_k_bias is not zero")


def _renamed(stored: dict[str, Tensor], of_vae: bool = False) -> dict[str, Tensor]:
    named = ((own_name(key, of_vae), tensor) for key, tensor in stored.items())
    return {key: tensor for key, tensor in named if key is not None}


def _checked(expected: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The tensors in float32. Raises CheckpointError unless they are those of the network."""
    wanted = expected.state_dict()
    if problems := pt_files.misfits(wanted, tensors):
        listed = printable("; ".join(problems[:5]), 160)
        raise CheckpointError(f"{path}: {len(problems)} tensors do not fit the network of its shapes: {listed}")
    return {key: tensors[key].to(torch.float32).contiguous() for key in wanted}


@contextlib.contextmanager
def _blamed(path: str | Path) -> Iterator[None]:
    """Raises a CheckpointError that names the file in place of the errors that malformed tensors cause."""
    try:
        yield
    except _DAMAGE as error:
        why = f"{type(error).__name__}: {printable(str(error))}"
        raise CheckpointError(f"{path}: the tensors make no VAR ({why}); {EXPECTED}; download it again") from None
