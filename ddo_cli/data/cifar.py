"""CIFAR-10 as published: cifar-10-python.tar.gz, or the folder cifar-10-batches-py in it. Training images only.

Its batches are pickles of Python 2. They are only parsed: no function that they name is called.

Source: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddo_cli.data import tars
from ddo_cli.errors import CheckpointError, DataError, printable, reason
from ddo_cli.safe_pickle import Array, parse_pickle

TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar")
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))  # test_batch is not for training
NUM_CLASSES = 10
MAX_BATCH, MAX_TAR = 64 << 20, 320 << 20  # bytes: well above the published 31 MB of a batch, 186 MB of the tar unpacked


def open_tar(source: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The 50,000 training images uint8 (N, 3, 32, 32) and their labels int64 (N,).

    Raises DataError for another tar, and for a batch of another layout.
    """
    try:
        # Unpacked up to a limit, because a small file can unpack to any size.
        with open(path, "rb") if path.suffix.lower() == ".tar" else gzip.open(path) as file:
            raw = file.read(MAX_TAR + 1)
        if len(raw) > MAX_TAR:
            raise DataError(
                f"{source} unpacks to more than {MAX_TAR >> 20} MB, CIFAR-10 to 186; give the published file"
            )
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            members = dict[str, tarfile.TarInfo]()
            for member in tars.members(archive):
                name = Path(member.name).name  # wherever it points
                if not member.isreg() or member.issparse():  # links are left out
                    continue
                if name in members and name in BATCHES:  # of which one would be passed over
                    raise DataError(f"{source} holds {name} more than once; give the published file")
                members[name] = member

            def read(name: str) -> bytes | None:
                member = members.get(name)
                if member is not None and member.size > MAX_BATCH:
                    raise DataError(_too_large(f"{source}: {name}", member.size))
                content = archive.extractfile(member) if member is not None else None
                return content.read() if content is not None else None

            return _join_batches(source, read)
    except tars.DAMAGE as error:
        raise DataError(f"{source} is not a whole .tar.gz ({reason(error)}); download it again") from None


def open_unpacked(source: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same from the unpacked folder."""

    def read(name: str) -> bytes | None:
        file = path / name
        try:
            if file.stat().st_size > MAX_BATCH:
                raise DataError(_too_large(str(file), file.stat().st_size))
            return file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); correct its permissions") from None

    return _join_batches(source, read)


def _too_large(where: str, size: int) -> str:
    return f"{where} has {size >> 20} MB, a batch of CIFAR-10 31; give the published file"


def _join_batches(source: str, read: Callable[[str], bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    batches = []
    for name in BATCHES:
        raw = read(name)
        if raw is None:
            raise DataError(f"{source} has no {name}; give cifar-10-python.tar.gz, or its folder cifar-10-batches-py")
        batches.append(_batch(f"{source}: {name}", raw))
    items, labels = zip(*batches, strict=True)
    return np.concatenate(items), np.concatenate(labels)


def _batch(where: str, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of one batch."""
    try:
        content = parse_pickle(where, raw, "the published cifar-10-python.tar.gz")
        array, labels = content["data"], content["labels"]
        if type(array) is not Array or array.values is None or array.values.dtype != np.uint8:
            raise ValueError("its data are no array of uint8")
        rows = np.ascontiguousarray(array.values)
        if rows.ndim != 2 or rows.shape[1] != 3 * 32 * 32 or not len(rows):
            raise ValueError(f"its data are {rows.shape}, not (N, 3072)")
        if type(labels) is not list or len(labels) != len(rows):
            raise ValueError(f"{len(rows)} images and {len(labels)} labels")
        if any(type(label) is not int or not 0 <= label < NUM_CLASSES for label in labels):
            raise ValueError("a label is not one of 0..9")
    except CheckpointError as error:
        raise DataError(str(error)) from None
    except (ValueError, TypeError, LookupError) as error:
        problem = f"{type(error).__name__}: {printable(str(error))}"
        raise DataError(f"{where} is not a whole batch of CIFAR-10 ({problem}); download it again") from None
    return rows.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)
