"""A whole text-to-image pipeline of the real classes with tiny random networks, as diffusers writes it."""

import json
from pathlib import Path
from typing import Any

import torch

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 32,
    "attention_head_dim": 2, "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SCHEDULER = {  # Stable Diffusion 1.5's
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


def make_pipeline(folder: Path, scheduler: dict[str, Any] | None = None, seed: int = 0, **unet: Any) -> Path:
    """scheduler, unet: changes of the two configurations."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )  # fmt: skip
    widths = (4, 4, 4, 4)
    vae = AutoencoderKL(
        block_out_channels=widths, layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    network = randomised(UNet2DConditionModel(**{**UNET, **unet}))
    for name, parameter in network.named_parameters():
        if ".attn2." in name:  # else prompts would hardly show
            torch.nn.init.normal_(parameter, std=0.6)
    parts = {"unet": network, "vae": randomised(vae), "text_encoder": randomised(CLIPTextModel(text), 0.5)}
    parts |= {"tokenizer": tokenizer, "scheduler": DDIMScheduler(**{**SCHEDULER, **(scheduler or {})})}
    # As `save_pretrained` of the pipeline, whose import takes seconds.
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    homes = {"text_encoder": "transformers", "tokenizer": "transformers"}
    index = {name: [homes.get(name, "diffusers"), type(part).__name__] for name, part in parts.items()}
    index = {"_class_name": "StableDiffusionPipeline", **index, "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | {"feature_extractor": [None, None]}))
    return folder
