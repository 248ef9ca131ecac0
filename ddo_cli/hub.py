"""Weights on the Hugging Face Hub: hf://user/name[@revision]."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddo_cli import extras
from ddo_cli.errors import CheckpointError, UsageError, reason

ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILE = "model.safetensors"  # of a repository, with this program's header
CARD = "README.md"  # which the Hub shows as the repository's page


def is_address(name: str) -> bool:
    """Whether a name of weights is one of the Hub."""
    return name.startswith("hf://")


def download(name: str) -> Path:
    """The weight file of a repository, from the Hub's cache on this machine if it is there. Raises CheckpointError."""
    repo, revision = _parts(name)
    try:
        return Path(_library(name).hf_hub_download(repo, FILE, revision=revision))
    except CheckpointError:
        raise
    except Exception as error:  # of the library, of its client or of the network
        raise CheckpointError(
            f"{name}: {FILE} cannot be fetched ({type(error).__name__}: {reason(error, 90)}); check name, revision and "
            "network, and for a private one `hf auth login`"
        ) from None


def index_of(name: str, file: str) -> Path | None:
    """A small file of a repository that says what is in it; None if there is none, or it cannot be read."""
    repo, revision = _parts(name)
    library = _library(name)
    try:
        return Path(library.hf_hub_download(repo, file, revision=revision))
    except Exception:  # as above; `download` tells
        return None


def folder(name: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    """Those files of a repository that match patterns, in the Hub's cache on this machine. Raises CheckpointError."""
    repo, revision = _parts(name)
    try:
        return Path(
            _library(name).snapshot_download(
                repo, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
            )
        )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{name} cannot be fetched ({type(error).__name__}: {reason(error, 110)}); check network and free disk "
            "space, and whether its licence has to be accepted on its page"
        ) from None


def licence(name: str) -> str | None:
    """The licence that the card of a repository states; None if it has none, or cannot be read."""
    repo, revision = _parts(name)
    try:
        card = _library(name).HfApi().model_info(repo, revision=revision).card_data
    except Exception:  # as above; what the weights come from can be told without
        return None
    stated = card.get("license") if card is not None else None
    return stated if isinstance(stated, str) else None


def upload(
    repo: str, files: Mapping[str, Path | bytes], message: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Commits files to a repository, which is created if it does not exist; returns the commit's address.

    private: refuse a repository that others can see. revision: a branch, created if it does not exist.
    Raises UsageError without a token, and where the Hub refuses.
    """
    library = _library(f"ddo push to {repo}")
    if library.get_token() is None:
        raise UsageError(
            f"{repo}: no token of the Hub was found; run `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api = library.HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:  # whose visibility `create_repo` leaves as it is
            raise UsageError(f"{repo} exists and is public; make it private on its page, or leave --private out")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        additions = [
            library.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        return str(api.create_commit(repo, additions, commit_message=message, revision=revision).commit_url)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{repo} cannot be pushed to ({type(error).__name__}: {reason(error, 110)}); check name, network, and that "
            "the token may write there (`hf auth whoami`)"
        ) from None


def _parts(name: str) -> tuple[str, str | None]:
    """Repository and revision of an address. Raises CheckpointError."""
    if (match := ADDRESS.fullmatch(name)) is None:
        raise CheckpointError(f"{name} is no repository of the Hub; write hf://user/name or hf://user/name@revision")
    return match[1], match[2]


def _library(what: str) -> Any:
    """Raises CheckpointError without it."""
    return extras.imported(f"{what} needs", "huggingface_hub", "hub", CheckpointError)
