"""Weights on the Hugging Face Hub: hf://user/name[@revision]."""

import re
from pathlib import Path

from ddo_cli.errors import CheckpointError, reason

ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILE = "model.safetensors"  # of a repository, with this program's header


def is_address(name: str) -> bool:
    """Whether a name of weights is one of the Hub."""
    return name.startswith("hf://")


def download(name: str) -> Path:
    """The weight file of a repository, from the Hub's cache on this machine if it is there. Raises CheckpointError."""
    if (match := ADDRESS.fullmatch(name)) is None:
        raise CheckpointError(f"{name} is no repository of the Hub; write hf://user/name or hf://user/name@revision")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointError(f"{name} needs huggingface_hub; run `pip install 'ddo-cli[hub]'`") from None
    try:
        return Path(hf_hub_download(match[1], FILE, revision=match[2]))
    except Exception as error:  # of the library, of its client or of the network
        raise CheckpointError(
            f"{name}: {FILE} cannot be fetched ({type(error).__name__}: {reason(error, 90)}); check name, revision and "
            "network, and for a private one `hf auth login`"
        ) from None
