"""Prompts -> the embeddings that a text-to-image network is conditioned on, by the text encoder of a pipeline's folder.

A condition stays a label: the number of a prompt, -1 for none. Embeddings are computed once for a process, or read from
what `ddo encode` has stored, and are no part of a model's weights. Each prompt is encoded by itself, so that its
embedding does not depend on the others.
"""

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddo_cli import console
from ddo_cli.errors import CheckpointError, UsageError, printable, reason
from ddo_cli.files import sha256
from ddo_cli.precision import inference_precision

VARIABLE = "DDO_PIPELINE"  # environment variable: the pipeline's folder, in place of the one that a weight file names
PARTS = ("tokenizer", "text_encoder")
NONE = ""  # the prompt of the label -1, unless there is a negative one
ON_DEVICE = 1 << 30  # bytes of embeddings that are kept on the device; our choice
EXTRA = "pip install 'ddo-cli[t2i]'"


class Encoder(NamedTuple):
    """A text encoder. place: the pipeline's folder; digest: of its tokenizer and text encoder, see `digest_of`."""

    place: str
    digest: str

    def folder(self) -> Path:
        """The pipeline's folder, or $DDO_PIPELINE. Raises CheckpointError if its text encoder is another one."""
        folder = Path(os.environ.get(VARIABLE) or self.place)
        if digest_of(folder) != self.digest:
            problem = "holds another text encoder" if (folder / "text_encoder").is_dir() else "has no text encoder"
            raise CheckpointError(
                f"{folder} {problem} where the model needs the one that it was trained with; set {VARIABLE} to the "
                "folder of its pipeline"
            )
        return folder


def encoder_of(config: Mapping[str, Any]) -> Encoder | None:
    """The text encoder of a model's configuration; None where it reads no text."""
    options = config["options"]
    return Encoder(options["pipeline"], options["text_encoder"]) if "text_encoder" in options else None


class Prompts(NamedTuple):
    """What labels mean: texts by number, and the text of the label -1."""

    texts: tuple[str, ...] = ()
    negative: str = NONE


_known: dict[tuple[str, str], Tensor] = {}  # (encoder's digest, text) -> (L, E), on the CPU


def remember(digest: str, texts: Sequence[str], embeddings: Tensor) -> None:
    """Takes embeddings (N, L, E) of an encoder for those that `embeddings_of` would compute."""
    _known.update(((digest, text), row) for text, row in zip(texts, embeddings, strict=True))


def embeddings_of(encoder: Encoder, texts: Sequence[str], device: torch.device) -> Tensor:
    """(N, L, E) float32 on the CPU. device: where the text encoder runs, if it is needed."""
    missing = [text for text in dict.fromkeys(texts) if (encoder.digest, text) not in _known]
    if missing:
        remember(encoder.digest, missing, encode(encoder, missing, device))
        _load.cache_clear()  # its memory is the network's
    return torch.stack([_known[encoder.digest, text] for text in texts])


@functools.lru_cache(maxsize=2)  # with and without a negative prompt
def _table(encoder: Encoder, prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings of the texts that differ (U, L, E), and the row of each label, that of -1 last, (N + 1,)."""
    texts = [*prompts.texts, prompts.negative]
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    table = embeddings_of(encoder, list(row_of), device)
    place = device if table.nbytes <= ON_DEVICE else torch.device("cpu")
    return table.to(place), torch.tensor([row_of[text] for text in texts], device=place)


def rows(encoder: Encoder, prompts: Prompts, label: Tensor) -> Tensor:
    """The embeddings of labels (B,), -1 for none: (B, L, E) on their device."""
    table, row_of = _table(encoder, prompts, label.device)
    return table[row_of[label.to(table.device)]].to(label.device)


def digest_of(folder: Path) -> str:
    """Hash of the files of tokenizer and text encoder; that of none where there is no such folder."""
    total = hashlib.sha256()
    for part in PARTS:
        for path in sorted((folder / part).glob("*")):
            if path.suffix in (".json", ".txt", ".model", ".safetensors"):
                total.update(f"{part}/{path.name} {_sha256(str(path), path.stat().st_mtime_ns)}\n".encode())
    return total.hexdigest()[:32]


@functools.cache
def _sha256(path: str, mtime: int) -> str:
    """Of a file that changes only with its time."""
    return sha256(Path(path))


def library() -> Any:
    """transformers, imported where it is needed because that takes seconds. Raises UsageError where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"prompts need the library transformers, which cannot be imported ({reason(error, 80)}); install it: "
            f"{EXTRA}"
        ) from None
    return transformers


def encode(encoder: Encoder, texts: Sequence[str], device: torch.device) -> Tensor:
    """(N, L, E) float32 on the CPU, computed anew.

    As StableDiffusionPipeline: padded or cut to the tokenizer's length, the encoder's last hidden state.
    """
    tokenizer, network = _load(encoder, device)
    length, parts = tokenizer.model_max_length, []
    ids = [tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids for text in texts]
    if cut := [text for text in texts if len(tokenizer(text).input_ids) > length]:
        console.warn(f"{len(cut)} prompts are longer than {length} tokens and cut, such as {printable(cut[0], 60)!r}")
    with torch.no_grad(), inference_precision("float32", device):
        for each in ids:
            parts.append(network(torch.tensor([each], device=device))[0].cpu())
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def _load(encoder: Encoder, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and text encoder, frozen."""
    folder, transformers = encoder.folder(), library()
    transformers.utils.logging.disable_progress_bar()  # for a file that loads at once
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        network = transformers.CLIPTextModel.from_pretrained(
            folder / "text_encoder", use_safetensors=True, torch_dtype=torch.float32
        )
    except Exception as error:  # of transformers, tokenizers or safetensors, as the failure may be
        raise CheckpointError(
            f"{folder}: its text encoder cannot be loaded ({reason(error, 100)}); copy the folder again"
        ) from None
    if getattr(network.config, "use_attention_mask", False):
        raise CheckpointError(f"{folder}: its text encoder uses attention masks, which is not supported; use another")
    return tokenizer, network.to(device).eval().requires_grad_(False)
