"""Commands about weight files: `convert`, `export`, `ema`, `push`, `info`; `encode` for data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from ddo_cli import console
from ddo_cli.commands import command, completion, options

if TYPE_CHECKING:
    import torch

FileSettings = Annotated[
    list[str] | None,
    Argument(
        metavar="[KEY=VALUE]...",
        help="What the file does not tell. ADM .pt: size=, qkv=legacy|new, heads= or head_channels=, "
        "schedule=linear|cosine, steps=, rescale=true|false; updown= and scale_shift= are checked. "
        "DiT or SiT .pt: arch=dit|sit|repa, heads=. VAR .pth: patch_nums=1,2,3,... Text-to-image folder: size=.",
        show_default=False,
    ),
]


def convert(
    source: Annotated[
        Path,
        Argument(help="EDM or EDM2 .pkl; ADM, ADM classifier, DG, DiT or SiT .pt; VAR .pth; diffusers folder."),
    ],
    out: Annotated[Path, Option(help="The safetensors file to write.")],
    settings: FileSettings = None,
    model: Annotated[str | None, Option(help="Of a discriminator: the converted model that it guides.")] = None,
    trunk: Annotated[str | None, Option(help="Of a discriminator: the converted classifier under it.")] = None,
    vae: Annotated[Path | None, Option(help="Of a VAR: the published file of its tokenizer.")] = None,
    verify: Annotated[bool, Option("--verify", help="Read the file again and compare every tensor.")] = False,
    dry_run: options.DryRun = False,
) -> dict[str, Any]:
    """Convert published weights to safetensors, without running the code inside them."""
    from ddo_cli.engines.weights import convert

    return convert.run(
        source, out, model=model, trunk=trunk, vae=vae, settings=settings or (), verify=verify, dry_run=dry_run
    )


def export(
    ckpt: Annotated[str, Argument(autocompletion=completion.weights, help="A converted or finetuned model.")],
    out: Annotated[Path, Option(help="The file to write like ORIGINAL; without one, a folder for diffusers.")],
    like: Annotated[Path | None, Option(help="ORIGINAL: the published .pkl, .pt or .pth of the model.")] = None,
    settings: FileSettings = None,
    merge: Annotated[
        bool, Option("--merge", help="Of an adapter: add it to its base's weights; --out may be a .safetensors file.")
    ] = False,
    dry_run: options.DryRun = False,
) -> dict[str, Any]:
    """Write a model as the published file it was converted from, or without --like as a folder of diffusers."""
    from ddo_cli.engines.weights import export

    return export.run(ckpt, out, like=like, settings=settings or (), merge=merge, dry_run=dry_run)


def ema(
    sources: Annotated[list[Path], Argument(metavar="FILES...", help="Snapshots of one run, or their directory.")],
    std: Annotated[float, Option(help="Relative standard deviation of the average, EDM2's sigma_rel.")],
    out: Annotated[Path, Option(help="The safetensors file to write.")],
    at: Annotated[int | None, Option(min=1, help="Images at which it ends. Default: the last snapshot's.")] = None,
    model_file: options.ModelFile = None,
    dry_run: options.DryRun = False,
) -> command.Result:
    """Make averaged weights of any width from a run's snapshots, without training again."""
    from ddo_cli.engines.weights import ema
    from ddo_cli.models import registry

    registry.load_file(model_file)
    figures = ema.run(sources, out, std=std, at=at, dry_run=dry_run)
    rows = [
        (str(row["file"]), f"{row['std']:.3f}", f"{row['images']:,}", f"{row['weight']:+.5f}")
        for row in figures["snapshots"]
    ]
    shown = {key: value for key, value in figures.items() if key != "snapshots"}
    return command.Result(figures, shown, console.table("Snapshots", ["file", "std", "images", "weight"], rows))


@command.add(device=options.device_and_models)
def encode(
    device: "torch.device",
    data: options.Images,
    ckpt: Annotated[str, options.of_weights(help="A model of latents or tokens, whose encoder is used.")],
    out: Annotated[Path, Option(help="Directory of the set, for data.source.")],
    num_images: options.NumImages = None,
    shard: Annotated[int, Option(min=1, help="Images per file.")] = 1024,
    batch: Annotated[int, Option(min=1, help="Images per network pass.")] = 64,
    dtype: Annotated[
        Literal["float32", "float16"] | None, Option(help="Type of latents. Default: the encoder's.")
    ] = None,
    workers: options.Workers = None,
    dry_run: options.DryRun = False,
) -> dict[str, Any]:
    """Encode an image set once, into the latents or tokens that a model is trained on."""
    from ddo_cli.engines import encode

    return encode.run(
        data, ckpt, out, num=num_images, shard=shard, batch=batch, dtype=dtype, workers=workers, device=device,
        dry_run=dry_run,
    )  # fmt: skip


def push(
    source: Annotated[
        str, Argument(metavar="RUN", autocompletion=completion.weights, help="A run directory or a weight file.")
    ],
    repo: Annotated[str, Argument(metavar="USER/NAME", help="Repository of the Hub; created if there is none.")],
    private: Annotated[bool, Option("--private", help="Only you and your organisation can see it.")] = False,
    revision: Annotated[
        str | None, Option(help="Branch to commit to, created if there is none.", show_default="main")
    ] = None,
    license_: Annotated[
        str | None,
        Option("--license", help="As the Hub names it, e.g. apache-2.0.", show_default="that of the base, where known"),
    ] = None,
    dry_run: Annotated[
        bool, options.run_option("--dry-run", help="Print what would be sent, and the card; send nothing.")
    ] = False,
) -> command.Result:
    """Publish weights on the Hugging Face Hub, with their recipe and a card made from their provenance."""
    from ddo_cli.engines.weights import push

    figures = push.run(source, repo, private=private, revision=revision, licence=license_, dry_run=dry_run)
    shown = {key: value for key, value in figures.items() if key != "card"}
    return command.Result(figures, shown, text=f"\n\n{figures['card']}" if dry_run else "")


def info(
    path: Annotated[
        str,
        Argument(
            autocompletion=completion.weights,
            help="A weight file, sample or encoded set, run directory, or embedded:<name>.",
        ),
    ],
) -> dict[str, Any]:
    """What a checkpoint, sample set, encoded set or run holds: model, provenance, hashes."""
    from ddo_cli.engines.weights import info

    return info.run(path)
