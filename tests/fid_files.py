"""Writers of files in the formats that `ddo fid` reads, whole or with something wrong."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

NUM, SIZE, FEATURES = 24, 8, 64
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM, SIZE, SIZE, 3), dtype=np.uint8)

Writer = Callable[[Path], str]  # writes a file or folder into a directory and returns its name there


def png(image: np.ndarray = PIXELS[0], mode: str | None = None, form: str = "png") -> bytes:
    file, picture = io.BytesIO(), Image.fromarray(image)
    (picture if mode is None else picture.convert(mode)).save(file, form)
    return file.getvalue()


def good(root: Path) -> str:
    np.savez(root / "good.npz", images=PIXELS)
    return str(root / "good.npz")


def members(changed: dict[str, bytes]) -> dict[str, bytes]:
    return {**{f"{i}.png": png(PIXELS[i]) for i in range(3)}, **changed}


def folder(changed: dict[str, bytes]) -> Writer:
    def write(root: Path) -> str:
        for name, content in members(changed).items():
            (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "set" / name).write_bytes(content)
        return "set"

    return write


def zipped(changed: dict[str, bytes]) -> Writer:
    def write(root: Path) -> str:
        with zipfile.ZipFile(root / "set.zip", "w") as archive:
            for name, content in members(changed).items():
                archive.writestr(name, content)
        return "set.zip"

    return write


def arrays(**content) -> Writer:
    def write(root: Path) -> str:
        np.savez(root / "set.npz", **content)
        return "set.npz"

    return write


def raw(name: str, content: bytes) -> Writer:
    def write(root: Path) -> str:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        return name

    return write


def cut(name: str, write: Writer, part: float) -> Writer:
    """The beginning of what `write` writes."""

    def shorten(root: Path) -> str:
        content = (root / write(root)).read_bytes()
        (root / name).write_bytes(content[: int(len(content) * part)])
        return name

    return shorten


def flipped(write: Writer, part: float) -> Writer:
    """The same with one byte changed."""

    def change(root: Path) -> str:
        path = root / write(root)
        content = bytearray(path.read_bytes())
        content[int(len(content) * part)] ^= 0xFF
        path.write_bytes(content)
        return path.name

    return change


def moments(size: int = FEATURES, **changed) -> dict[str, np.ndarray]:
    return {"mu": np.zeros(size), "sigma": np.eye(size), **changed}


def samples(**changed) -> Writer:
    """A sample set in the format png, and what is wrong with its manifest."""
    manifest = {"format": "png", "num": 3, "seeds": "0-2", "labels": [0, 1, 2], "complete": True, **changed}
    files = {f"{i:06d}.png": png(PIXELS[i]) for i in range(3)}
    return folder({**files, "manifest.json": json.dumps(manifest).encode()})


def within(write: Writer) -> Writer:
    """The folder of the file that `write` writes."""
    return lambda root: Path(write(root)).parent.name


def nothing(root: Path) -> str:
    return "missing"
