"""A small case of every command that writes: inputs made once, and command lines of a second each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from conftest import TINY_VQVAE, make_checkpoint, make_discriminator, tiny_disc_recipe, tiny_recipe
from PIL import Image
from test_convert import ADM_SETTINGS, openai_file, random_adm

from ddo_cli.data.images import open_images
from ddo_cli.recipe.load import load, to_yaml
from ddo_cli.recipe.schema import Recipe


class Workload(NamedTuple):
    """`command` is disturbed; `before` has been carried out in its directory."""

    command: list[str]
    before: Sequence[list[str]] = ()
    adds: str = ""  # a file that each finished command adds to: what it holds is not that of an undisturbed one


def write_inputs(path: Path) -> None:
    """Models, discriminators, images and recipes that the commands read."""
    path.mkdir(parents=True)
    ckpt = make_checkpoint(path / "m.safetensors")
    make_checkpoint(path / "var.safetensors", "var")
    make_discriminator(path / "d.safetensors", ckpt, scale=0.5)
    found = open_images("embedded:digits32", 60)
    images = found.items.transpose(0, 2, 3, 1)
    np.savez(path / "images.npz", arr_0=images, label=found.labels)
    for number, image in enumerate(images[:24]):
        folder = path / "folder" / str(found.labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    one_score = "metric={name: fd_embedded, num_images: 16, repeats: 1}"
    one_round = tiny_recipe(ckpt, "diffusion", "finetune.rounds=1", "finetune.images_per_round=16",
                            "finetune.eval_every=8", one_score)  # fmt: skip
    _recipe(path, "ddo", tiny_recipe(ckpt, "diffusion", "finetune.images_per_round=16", "finetune.eval_every=8",
                                     "metric.repeats=1", "finetune.ema_widths=[0.1, 0.05]",
                                     "finetune.keep_candidates=best"))  # fmt: skip
    _recipe(path, "one-round", one_round)
    grid = ("finetune.alpha=[1, 2]", "finetune.beta=[0.05, 0.1]", "finetune.lr=0.01")
    _recipe(path, "sweep", tiny_recipe(ckpt, "diffusion", "finetune.rounds=1", "finetune.images_per_round=16",
                                       "finetune.eval_every=8", one_score, *grid))  # fmt: skip
    _recipe(path, "disc", tiny_disc_recipe(ckpt, "discriminator.images=64", "discriminator.select=fid", one_score))
    classifier = "classifier={held_out: 20, images: 48, batch: 8, lr: 3.0e-3, save_every: 2, log_every: 2, options: %s}"
    options = json.dumps({"widths": [8], "depths": [1], "emb_width": 16})
    _recipe(path, "classifier", tiny_disc_recipe(ckpt, classifier % options))
    toy = ("model.options={width: 8, depth: 1}", "pretrain.images=48", "pretrain.batch=8", "pretrain.save_every=2",
           "pretrain.log_every=2", "pretrain.snapshot_every=16", "pretrain.ema_widths=[0.1, 0.05]", "data.num=256",
           "metric.repeats=1")  # fmt: skip
    _recipe(path, "model", load("toy2d", toy))
    _recipe(path, "sharded", load("toy2d", [*toy, "pretrain.sharding=fsdp"]))
    _recipe(path, "tokenizer", load("quickstart", [
        "data={source: embedded:digits32, num: 32}", f"model={{name: vqvae, options: {json.dumps(TINY_VQVAE)}}}",
        "sampling={batch: 16, sampler: null, steps: null, sigma_min: null, sigma_max: null}", one_score,
        "pretrain={images: 48, batch: 8, lr: 3.0e-3, ema_half_life: 16.0, log_every: 2, save_every: 2}",
    ]))  # fmt: skip
    openai_file(random_adm(), path / "adm.pt")


def _recipe(path: Path, name: str, recipe: Recipe) -> None:
    (path / f"{name}.yaml").write_text(to_yaml(recipe))


def workloads(inputs: Path) -> dict[str, Workload]:
    """By name. Paths of inputs are absolute, all others relative to the directory of the run."""

    def given(name: str) -> str:
        return str(inputs / name)

    def training(command: str, recipe: str, *more: str) -> list[str]:
        return [command, "--recipe", given(f"{recipe}.yaml"), "--out", "out", *more]

    drawn = ["--ckpt", given("m.safetensors"), "--seeds", "0-15", "--out", "out"]
    guided = ["guide-sample", "--disc", given("d.safetensors"), "--seeds", "0-15", "--out", "out"]
    scored = ["fid", given("folder"), "--ref", given("images.npz"), "--num-images", "24", "--csv", "scores.csv"]
    scored += ["--nearest", "2", "--metrics", "fid,precision,recall"]
    return {
        "sample-png": Workload(["sample", *drawn]),
        "sample-npz": Workload(["sample", *drawn, "--format", "npz"]),
        "sample-shards": Workload(["sample", *drawn, "--format", "shards"]),
        "guide-sample": Workload(guided),
        "finetune-ddo": Workload(training("finetune-ddo", "ddo")),
        "more-rounds": Workload(
            training("finetune-ddo", "one-round", "--rounds", "2", "--control"), [training("finetune-ddo", "one-round")]
        ),
        "sweep": Workload(training("finetune-ddo", "sweep")),
        "pretrain": Workload(training("pretrain", "model")),
        "pretrain-sharded": Workload(training("pretrain", "sharded")),
        "pretrain-tokenizer": Workload(training("pretrain", "tokenizer")),
        "train-disc": Workload(training("train-disc", "disc")),
        "train-classifier": Workload(training("train-classifier", "classifier")),
        "train-extractor": Workload(
            ["train-extractor", "--data", given("images.npz"), "--out", "x.safetensors", "--images", "512"]
        ),
        "encode": Workload(
            ["encode", given("folder"), "--ckpt", given("var.safetensors"), "--out", "out", "--shard", "8",
             "--workers", "1"]
        ),
        "data": Workload(["data", given("folder"), "--size", "16", "--out", "set.zip"]),
        "convert": Workload(["convert", given("adm.pt"), *ADM_SETTINGS, "qkv=legacy", "--out", "c.safetensors"]),
        "export-pt": Workload(
            ["export", "c.safetensors", *ADM_SETTINGS, "qkv=legacy", "--like", given("adm.pt"), "--out", "e.pt"],
            [["convert", given("adm.pt"), *ADM_SETTINGS, "qkv=legacy", "--out", "c.safetensors"]],
        ),
        "export-folder": Workload(
            ["export", "c.safetensors", "--out", "folder"],
            [["convert", given("adm.pt"), *ADM_SETTINGS, "qkv=legacy", "--out", "c.safetensors"]],
        ),
        "ema": Workload(
            ["ema", "run", "--std", "0.08", "--out", "e.safetensors"],
            [["pretrain", "--recipe", given("model.yaml"), "--out", "run"]],
        ),
        "edit": Workload(
            ["edit", given("images.npz"), "--disc", given("d.safetensors"), "--num-images", "4", "--level", "1,2",
             "--ref", given("images.npz"), "--out", "out"]
        ),
        "analyze": Workload(["analyze", "--disc", given("d.safetensors"), "--out", "out", "--what", "gain,trajectory"]),
        "fid": Workload(scored, [[*scored[:2], "--csv", "scores.csv", "--no-cache"]], adds="scores.csv"),
        "stats": Workload(
            ["stats", given("folder"), "--metric", "fd_embedded", "--features", "--out", "s.safetensors"]
        ),
    }  # fmt: skip
