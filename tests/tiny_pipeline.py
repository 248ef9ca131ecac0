"""A whole text-to-image pipeline of the real classes with tiny random networks, as diffusers writes it."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
Config = dict[str, Any]
UNET: Config = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 32,
    "attention_head_dim": 2, "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
XL: Config = {
    **UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (2, 4),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True, "cross_attention_dim": 40,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60,
}  # fmt: skip
SCHEDULER = {  # Stable Diffusion 1.5's and XL's, but for the class
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False, "timestep_spacing": "leading",
}  # fmt: skip


def randomised(module: torch.nn.Module, std: float = 0.15) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.eval()


def make_tokenizer(folder: Path) -> Any:
    """Letters, alone and at the end of a word, and the two marks."""
    from transformers import CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate([*ALPHABET, *(f"{c}</w>" for c in ALPHABET), *marks])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(vocab, [], model_max_length=16)


def clip(tokenizer: Any, width: int = 32, projection: int | None = None) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(tokenizer)
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
        projection_dim=projection or width,
    )  # fmt: skip
    return randomised((CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), 0.5)


def autoencoder(channels: int, kind: str = "AutoencoderKL", **config: Any) -> torch.nn.Module:
    import diffusers

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    tiny = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2, **blocks}
    return randomised(getattr(diffusers, kind)(**tiny, latent_channels=channels, **config))


def _sd(folder: Path, network: Config) -> Config:
    from diffusers import UNet2DConditionModel

    tokenizer = make_tokenizer(folder / "tokenizer")
    unet = randomised(UNet2DConditionModel(**{**UNET, **network}))
    return {"unet": unet, "vae": autoencoder(4), "text_encoder": clip(tokenizer), "tokenizer": tokenizer}


def _sdxl(folder: Path, network: Config) -> Config:
    second = make_tokenizer(folder / "tokenizer_2")
    vae, further = autoencoder(4, scaling_factor=0.13025), {"text_encoder_2": clip(second, 8, 12)}
    return {**_sd(folder, {**XL, **network}), "vae": vae, **further, "tokenizer_2": second}


def _sd3(folder: Path, network: Config) -> Config:
    from diffusers import SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    tokenizer, second = (make_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2"))
    marks = [(mark, 0.0) for mark in ("<pad>", "</s>", "<unk>")]
    third = T5TokenizerFast([*marks, ("\u2581", -2.0), *((letter, -3.0) for letter in ALPHABET)], extra_ids=0)
    t5 = T5Config(vocab_size=len(third), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32, "pos_embed_max_size": 8,
            "caption_projection_dim": 16, "pooled_projection_dim": 20, "dual_attention_layers": (0,),
            "qk_norm": "rms_norm", **network,
        }
    )  # fmt: skip
    return {
        "transformer": randomised(transformer), "vae": autoencoder(4, scaling_factor=1.5, shift_factor=0.06),
        "text_encoder": clip(tokenizer, 16, 12), "text_encoder_2": clip(second, 8, 8), "tokenizer": tokenizer,
        "text_encoder_3": randomised(T5EncoderModel(t5), 0.5), "tokenizer_2": second, "tokenizer_3": third,
    }  # fmt: skip


def qwen(folder: Path, width: int, num_layers: int, kind: str) -> Config:
    """A tokenizer of letters with a template for chats, and a language model."""
    import transformers

    letters = ["<|endoftext|>", *ALPHABET, "\u0120", ":", "|"]  # the last but two is a blank
    tokenizer = transformers.Qwen2TokenizerFast({letter: number for number, letter in enumerate(letters)}, [])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}|{% endfor %}"
        "{% if add_generation_prompt %}model:{% endif %}{% if not enable_thinking %}||{% endif %}"
    )
    config = transformers.Qwen3Config(
        vocab_size=len(letters), hidden_size=width, intermediate_size=8, num_hidden_layers=num_layers, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": randomised(getattr(transformers, kind)(config), 0.3)}


def _flux2(folder: Path, network: Config) -> Config:
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        **{
            "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 12, "timestep_guidance_channels": 8,
            "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False, **network,
        }
    )  # fmt: skip
    vae = autoencoder(2, "AutoencoderKLFlux2", sample_size=64)
    vae.bn.running_mean.copy_(torch.randn(8))
    vae.bn.running_var.copy_(torch.rand(8) + 0.5)
    return {"transformer": randomised(transformer, 0.3), "vae": vae, **qwen(folder, 4, 28, "Qwen3ForCausalLM")}


def _z_image(folder: Path, network: Config) -> Config:
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        **{
            "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 8, "axes_dims": [4, 2, 2], "axes_lens": [1024, 16, 16], **network,
        }
    )  # fmt: skip
    vae = autoencoder(4, scaling_factor=0.36, shift_factor=0.12, sample_size=64)
    return {"transformer": randomised(transformer), "vae": vae, **qwen(folder, 8, 2, "Qwen3Model")}


FLOW = "FlowMatchEulerDiscreteScheduler"
KINDS = {"sd": ("StableDiffusionPipeline", "DDIMScheduler", _sd)}
KINDS |= {"sdxl": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler", _sdxl)}

KINDS |= {"sd3": ("StableDiffusion3Pipeline", FLOW, _sd3), "flux2": ("Flux2KleinPipeline", FLOW, _flux2)}
KINDS |= {"z-image": ("ZImagePipeline", FLOW, _z_image)}


def make_pipeline(
    folder: Path, kind: str = "sd", scheduler: Config | None = None, seed: int = 0, **network: Any
) -> Path:
    """kind: a key of `KINDS`; scheduler, network: changes of the two configurations."""
    import diffusers

    torch.manual_seed(seed)
    pipeline, scheduler_class, make = KINDS[kind]
    changes = dict(scheduler or {})
    made_by = getattr(diffusers, changes.pop("_class_name", scheduler_class))
    known = inspect.signature(made_by.__init__).parameters
    parts = make(folder, network)
    trained = parts.get("unet") or parts["transformer"]
    for name, parameter in trained.named_parameters():
        if ".attn2." in name:  # else prompts would hardly show
            torch.nn.init.normal_(parameter, std=0.6)
    given = {"shift": 3.0, "use_dynamic_shifting": kind == "flux2"} if scheduler_class == FLOW else SCHEDULER
    config = {key: value for key, value in given.items() if key in known} | changes
    parts["scheduler"] = made_by(**config)
    # As `save_pretrained` of the pipeline, whose import takes seconds.
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        name: ["transformers" if name.startswith(("tok", "text")) else "diffusers", type(part).__name__]
        for name, part in parts.items()
    }
    further = {"safety_checker": [None, None]} if kind == "sd" else {}
    index = {"_class_name": pipeline, **index, **further}
    if pipeline.startswith("StableDiffusion"):
        index["feature_extractor"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
