"""ADM's U-Net as a UNet2DModel of the library diffusers: the same function under other names.

A level of ADM is the library's block with residual halvings and doublings, ResnetDownsampleBlock2D, or with attention
AttnDownBlock2D; with halvings by a convolution, DownBlock2D. What it cannot express is refused in `configs`.
"""

from typing import Any

from torch import Tensor

from ddo_cli.diffusion.precond import NUM_STEPS
from ddo_cli.models.adm.layers import head_width
from ddo_cli.models.adm.unet import level_widths

GROUPS = 32
_SCHEDULES = {
    "iddpm": "squaredcos_cap_v2",
    "cosine": "squaredcos_cap_v2",
    "ddpm": "linear",
}  # the library's names of the betas
_LAYERS = {  # of a residual block, then of attention
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_DROPPED = "augment_emb.weight"  # it multiplies the zeros that stand for an unaugmented image, and has no bias


def configs(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(unet/config.json, scheduler/scheduler_config.json) of an adm-unet's configuration.

    Raises ValueError, saying why, if the library has no such network or process.
    """
    options, (channels, side, _) = config["options"], config["shape"]
    widths = level_widths(options["width"], options["channel_mult"])
    attending = _attending(config)
    attended = [width for width, attends in zip(widths, attending, strict=True) if attends] + widths[-1:]
    heads = {head_width(width, options["num_head_channels"], options["num_heads"]) for width in attended}
    if widths[0] != options["width"]:
        raise ValueError(
            f"channel_mult[0] = {options['channel_mult'][0]} must be 1: a UNet2DModel tells its first level's width "
            "and the noise level's features apart no more"
        )
    if len(heads) > 1:
        raise ValueError(
            f"num_heads = {options['num_heads']} and num_head_channels = {options['num_head_channels']} give heads of "
            f"{sorted(heads)} channels, and a UNet2DModel has one number for all levels"
        )
    if min(widths) // options["group_channels"] < GROUPS:
        raise ValueError(
            f"norms of {min(widths)} channels with group_channels = {options['group_channels']} have fewer than "
            f"{GROUPS} groups, and a UNet2DModel has one number for all of them"
        )
    down, up, resampling = ("DownBlock2D", "UpBlock2D", "conv")
    if options["updown"]:
        down, up, resampling = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "resnet")
    unet = {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels * (2 if options["learned_variance"] else 1),
        "num_class_embeds": config["num_classes"] or None,
        "block_out_channels": widths,
        "layers_per_block": options["num_blocks"],
        "attention_head_dim": heads.pop(),
        "down_block_types": ["AttnDownBlock2D" if each else down for each in attending],
        "up_block_types": ["AttnUpBlock2D" if each else up for each in reversed(attending)],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resnet_time_scale_shift": "scale_shift" if options["scale_shift"] else "default",
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,  # else the middle's attention has no norm
        "norm_eps": 1e-5,
        "dropout": options["dropout"],
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,  # [cos | sin]
        "freq_shift": 0,
    }
    return unet, _scheduler(options)


def _scheduler(options: dict[str, Any]) -> dict[str, Any]:
    precond, learned = options["precond"], options["learned_variance"]
    if options["rescaled_steps"]:
        raise ValueError("rescaled_steps = True: no scheduler of diffusers tells steps as of 1000")
    if precond in _SCHEDULES:
        scale = NUM_STEPS / options["num_steps"]
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": options["num_steps"],
            "beta_schedule": _SCHEDULES[precond],
            "beta_start": scale * 1e-4,
            "beta_end": scale * 0.02,
            "prediction_type": "epsilon",
            "variance_type": "learned_range" if learned else "fixed_small",
            "clip_sample": True,
        }
    if precond != "edm" or learned:
        what = f"precond = {precond}" + (" with learned_variance" if learned else "")
        raise ValueError(f"no scheduler of diffusers matches {what}; known are edm, iddpm, cosine and ddpm")
    return {  # with EDM's c_skip, c_out, c_in and c_noise; what it calls epsilon is F
        "_class_name": "EDMEulerScheduler",
        **{key: options[key] for key in ("sigma_min", "sigma_max", "sigma_data")},
        "prediction_type": "epsilon",
    }


def tensors(ours: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The network's tensors under the library's names. ours: of the whole model, all below "net."."""
    layers, named = _ENDS | _layers(config), dict[str, Tensor]()
    for name, tensor in ours.items():
        key = name.removeprefix("net.")
        if key == _DROPPED:
            continue
        layer = max((each for each in layers if key.startswith(f"{each}.")), key=len)
        part, kind = key[len(layer) :].rpartition(".")[::2]  # ".qkv", "weight"
        theirs, part = layers[layer], part.removeprefix(".")
        if part == "qkv":
            width = head_width(len(tensor) // 3, config["options"]["num_head_channels"], config["options"]["num_heads"])
            # Channels of ADM: q, k, v of one head, then the next; theirs are three matrices.
            for letter, third in zip("qkv", tensor.unflatten(0, (-1, 3, width)).unbind(1), strict=True):
                named[f"{theirs}.to_{letter}.{kind}"] = third.flatten(0, 1).flatten(1 if third.ndim > 2 else 0)
        else:
            flat = tensor.flatten(1) if part == "proj_out" and kind == "weight" else tensor  # a convolution of 1 pixel
            named[".".join(filter(None, (theirs, _LAYERS.get(part, part), kind)))] = flat
    return named


def _attending(config: dict[str, Any]) -> list[bool]:
    side, levels = config["shape"][1], len(config["options"]["channel_mult"])
    return [side >> level in config["options"]["attention"] for level in range(levels)]


def _layers(config: dict[str, Any]) -> dict[str, str]:
    """Their names of the residual blocks and attentions on the way down and up, by ours."""
    depth, attending = config["options"]["num_blocks"], _attending(config)
    names, last = dict[str, str](), len(attending) - 1
    number = 1
    for level, attends in enumerate(attending):
        theirs = f"down_blocks.{level}"
        for i in range(depth):
            names[f"input_blocks.{number}.0"] = f"{theirs}.resnets.{i}"
            if attends:
                names[f"input_blocks.{number}.1"] = f"{theirs}.attentions.{i}"
            number += 1
        if level < last:
            names[f"input_blocks.{number}.0"] = f"{theirs}.downsamplers.0"
            number += 1
    number = 0
    for level, attends in reversed(list(enumerate(attending))):
        theirs = f"up_blocks.{last - level}"
        for i in range(depth + 1):
            names[f"output_blocks.{number}.0"] = f"{theirs}.resnets.{i}"
            if attends:
                names[f"output_blocks.{number}.1"] = f"{theirs}.attentions.{i}"
            if level and i == depth:
                names[f"output_blocks.{number}.{1 + attends}"] = f"{theirs}.upsamplers.0"
            number += 1
    return names
