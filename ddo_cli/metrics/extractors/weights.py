"""Finds the weights of published networks, checks their hash, and reads them without running code from the file.

Order of search: the given path, an environment variable, torch hub's cache (where torch-fidelity and pytorch-fid store
theirs), and with `download` the published address. Nothing is downloaded without being asked: files have up to 1.2 GB,
and compute nodes without network would wait for a timeout.
"""

import hashlib
import shlex
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddo_cli import checkpoint, console, dist, torch_files
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.files import replacing, sha256
from ddo_cli.places import of_environment

Network = Literal["fid", "fd_dinov2", "fd_clip"]
TIMEOUT = 30.0  # seconds without a byte before a download is given up
BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Published:
    """A weight file that published scores use. names: of the file in several libraries; the first is ours."""

    title: str
    names: tuple[str, ...]
    sha256: str
    variable: str
    address: Callable[[], str]

    def remedy(self) -> str:
        """How to get the file, for messages."""
        return (
            f"run `{self.line(self.names[0])}` and give the file as --weights or in {self.variable}, or put it into "
            f"{cache()}"
        )

    def line(self, file: str | Path) -> str:
        """The command that fetches it."""
        return f"curl -L -o {shlex.quote(str(file))} {shlex.quote(self.address())}"


def _inception_address() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3  # imports for seconds

    return str(URL_INCEPTION_V3)


def _clip_address() -> str:
    from torch_fidelity.feature_extractor_clip import MODEL_URLS

    return str(MODEL_URLS["clip-vit-b-32"])


CLIP_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"

PUBLISHED: dict[Network, Published] = {
    "fid": Published(
        "Inception-v3",
        # torch-fidelity's name, and pytorch-fid's for the same bytes
        ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "DDO_INCEPTION_WEIGHTS",
        _inception_address,
    ),
    "fd_dinov2": Published(
        "DINOv2 ViT-L/14",
        ("dinov2_vitl14_pretrain.pth",),
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        "DDO_DINOV2_WEIGHTS",
        lambda: "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    ),
    "fd_clip": Published(
        "CLIP ViT-B/32",
        ("ViT-B-32.pt", f"clip-vit-b-32-{CLIP_SHA256}.pt"),  # OpenAI's name, and torch-fidelity's
        CLIP_SHA256,
        "DDO_CLIP_WEIGHTS",
        _clip_address,
    ),
}


NAMES = (*PUBLISHED, "clip")  # of `by_network`; that of the CLIP score is a folder, see `clip_text`


class WeightFile(NamedTuple):
    """A weight file, its hash, and whether it is the published one. label: its name in messages."""

    path: Path
    sha256: str
    is_published: bool
    label: str


def cache() -> Path:
    """Torch hub's directory of weights (TORCH_HOME changes it)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find(network: Network, path: str | None = None, download: bool = False) -> WeightFile | None:
    """The weight file of a network; None if there is none and `download` is false.

    path: given by the user, then nothing else is searched. With download, the main process fetches it for all
    (collective). Raises CheckpointError for a file that does not exist, that has the published name but other content,
    or that cannot be fetched.
    """
    published = PUBLISHED[network]
    label = path or ""
    if path is None and (path := of_environment(published.variable) or None):
        label = f"{published.variable}={path}"
    if path is not None:
        if not path.startswith(checkpoint.EMBEDDED) and not Path(path).exists():
            raise CheckpointError(f"{label} does not exist; {published.remedy()}", missing=label)
        return _checked(published, checkpoint.resolve(path), label)
    # The main process decides for all, since a slower process might already see the downloaded file.
    if download and dist.from_main(_cached(published) is None):
        _fetch(published)
    file = _cached(published)
    return None if file is None else _checked(published, file, str(file))


def _cached(published: Published) -> Path | None:
    files = (cache() / name for name in published.names)
    return next((file for file in files if file.is_file()), None)


def require(network: Network, path: str | None = None, download: bool = False) -> WeightFile:
    """`find`, but if there is none, raises CheckpointError with the address."""
    file = find(network, path, download)
    if file is None:
        published = PUBLISHED[network]
        raise CheckpointError(f"there are no weights of {published.title} here; {published.remedy()}")
    return file


def _checked(published: Published, file: Path, label: str) -> WeightFile:
    """The file with its hash. Raises CheckpointError if it has a published name but other content."""
    digest = sha256(file)
    if file.name in published.names and digest != published.sha256:
        raise CheckpointError(
            f"{label} has the wrong hash {digest[:8]}, not {published.sha256[:8]}: it is damaged, or other weights, "
            f"which need another name; fetch it by `{published.line(file)}`"
        )
    return WeightFile(file, digest, digest == published.sha256, label)


def _fetch(published: Published) -> None:
    """Downloads into the cache. The file gets its name only if it has the published hash."""
    problem: str | None = None
    if dist.is_main():
        try:
            _download(published, cache() / published.names[0])
        except (OSError, ValueError) as error:  # no network, no space, no such address; a wrong hash
            problem = str(error) or type(error).__name__
    if (problem := dist.from_main(problem)) is not None:
        raise CheckpointError(
            f"{published.title}: {published.address()} cannot be downloaded ({problem}); where there is a network, "
            f"{published.remedy()}"
        )


def _download(published: Published, target: Path) -> None:
    digest = hashlib.sha256()
    with urllib.request.urlopen(published.address(), timeout=TIMEOUT) as response, replacing(target) as temporary:
        size = int(response.headers.get("Content-Length") or 0)
        with console.progress(target.name, size >> 20, "MB") as bar, open(temporary, "wb") as file:
            while block := response.read(BLOCK):
                digest.update(block)
                file.write(block)
                bar.advance()
        if digest.hexdigest() != published.sha256:  # `replacing` removes the file
            raise ValueError(f"wrong hash {digest.hexdigest()[:16]}... instead of {published.sha256[:16]}...")


def by_network(given: Sequence[str]) -> str | dict[str, str] | None:
    """The values of --weights: a single PATH, or paths by network given as NAME=PATH; PATH among them is Inception's.

    A value with "=" that is the name of a file is a path. Raises UsageError for an unknown or repeated name.
    """
    paths: dict[str, str] = {}
    for text in given:
        name, separator, path = text.partition("=")
        if not separator or "/" in name or Path(text).is_file():
            name, path = "fid", text
        if name not in NAMES or not path:
            raise UsageError(
                f"--weights {text}: {name or 'an empty name'} is no network that takes weights, or its path is "
                f"missing; write PATH, or NAME=PATH with one of {', '.join(NAMES)}"
            )
        if name in paths:
            raise UsageError(f"--weights gives {name} two files, {paths[name]} and {path}; leave one out")
        paths[name] = path
    if len(given) == 1 and given[0] in paths.values():
        return given[0]
    return paths or None


# --- Reading


def read_tensors(file: WeightFile, remedy: str) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors file, or of a .pth of tensors only. Runs no code from the file.

    remedy: what to give instead, for messages. Raises CheckpointError if it is something else, or not finite.
    """
    state = torch_files.read_tensors(file.path, file.label, remedy)
    require_finite(file.label, state)
    return state


def require_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError if a tensor holds NaN or infinity."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name}: the tensor '{key}' holds values that are not finite; copy the file again")


def content_sha256(state: dict[str, Tensor]) -> str:
    """Hash of the tensors as float32, the type that networks compute in: equal for copies in another format."""
    digest = hashlib.sha256()
    for name in sorted(str(key) for key in state):
        if name.endswith("num_batches_tracked"):
            continue  # a counter of training, missing in files from before torch 0.4.1
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
